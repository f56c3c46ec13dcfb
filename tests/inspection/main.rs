//! What the agent's other subcommands say of a node at work.
mod bad_days;
mod bugreport;
mod check;
mod listings;
mod metrics;
mod monitor;
mod trace;

use serde_json::Value;
use svc_agent::host::online_cpus;
use svc_agent::kube_proxy_config::default_flow_table_size;
use svc_lab::agent::ask;
use svc_lab::topology::NODES;
use svc_tests::cluster::Cluster;

/// Of the flow table that an agent has which is not told otherwise: two of a flow, and as many again, so that it is half full at most.
fn flow_cells() -> u32 {
    4 * default_flow_table_size(online_cpus()).next_power_of_two()
}

/// A subcommand on the first node: its exit code, and what it printed, as JSON.
fn json(cluster: &Cluster, arguments: &[&str]) -> (i32, Value) {
    let output = ask(&cluster.lab, &NODES[0], &[arguments, &["-o", "json"]].concat()).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let value = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text:?}, {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), value)
}
