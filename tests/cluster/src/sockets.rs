//! Whose sockets a node's hooks point at backends: those of every pod of the node, of the node itself, and no other node's.
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use svc_lab::binaries;

use crate::clients::{answered, ask};
use crate::image::LAB;
use crate::network::{NODES, number};
use crate::node;
use crate::parts::{said, wait_for};
use crate::state::Cluster;

const METRICS: u16 = 10249;
/// Of each client.
const REQUESTS: u32 = 20;

/// The pods that ask, by the cgroup that a kubelet makes for them: one for each class of service, and one that is in the
/// node's own network namespace.
const PODS: [&str; 4] = ["guaranteed", "burstable", "best-effort", "host-network"];

/// A Service for each node, which clients of that node ask: its agent has to have pointed all of their sockets at backends, and
/// the other agents none.
pub(crate) fn run(cluster: &Cluster) -> Result<()> {
    cluster.apply(&NODES.map(service))?;
    let mut asked = Vec::new();
    for node in NODES {
        // Until the Service is in force.
        wait_for(|| Ok(ask(node_client(cluster, node)?, &url(node), 1).is_ok()))?;
        ask(node_client(cluster, node)?, &url(node), REQUESTS)?;
        asked.push(1 + REQUESTS);
    }
    cluster.apply(&NODES.into_iter().flat_map(|node| PODS.map(|kind| pod(node, kind))).collect::<Vec<_>>())?;
    for (node, asked) in NODES.into_iter().zip(&mut asked) {
        for kind in PODS {
            let name = format!("pod/{kind}-{node}");
            cluster.ask(&["wait", "--for=jsonpath={.status.phase}=Succeeded", &name, "--timeout=300s"])?;
            let log = cluster.ask(&["logs", &name])?;
            answered(&log).with_context(|| format!("{name} asked"))?;
            *asked += REQUESTS;
        }
        // runc puts what is executed in a container into its cgroup by another way than its first process.
        let server = cluster.ask(&[
            "get",
            "pods",
            "--selector=app=web",
            &format!("--field-selector=spec.nodeName={node}"),
            "--output=name",
        ])?;
        let server = server.lines().next().with_context(|| format!("no server is on {node}"))?;
        let requests = format!("--requests={REQUESTS}");
        let log = cluster.ask(&["exec", server, "--", "svc-lab", "client", &url(node), &requests])?;
        answered(&log).with_context(|| format!("what is executed in {server} asked"))?;
        *asked += REQUESTS;
    }
    for node in NODES {
        let counts = connections(cluster, node)?;
        for (whose, asked) in NODES.into_iter().zip(&asked) {
            let wanted = if whose == node { *asked } else { 0 };
            let is = counts(whose);
            if is != wanted {
                bail!("{node} counts {is} connections of clients on {whose}, and not {wanted}");
            }
            let flows = flows(cluster, node, whose)?;
            if flows > 0 {
                bail!("{node} has {flows} flows of clients on {whose}: their sockets were not pointed at backends");
            }
        }
    }
    Ok(())
}

fn address(node: &str) -> Ipv4Addr {
    Ipv4Addr::new(10, 96, 0, 80 + number(node))
}

fn url(node: &str) -> String {
    format!("http://{}/", address(node))
}

fn service(node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": format!("web-{node}") },
        "spec": { "clusterIP": address(node), "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": 8080 }] },
    })
}

fn pod(node: &str, kind: &str) -> Value {
    let some = json!({ "cpu": "50m", "memory": "32Mi" });
    let resources = match kind {
        "guaranteed" => json!({ "requests": some, "limits": some }),
        "burstable" => json!({ "requests": some }),
        _ => json!({}),
    };
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": format!("{kind}-{node}") },
        "spec": {
            "nodeName": node, "restartPolicy": "Never", "hostNetwork": kind == "host-network",
            "containers": [{
                "name": "ask", "image": LAB, "resources": resources,
                "args": ["client", url(node), format!("--requests={REQUESTS}")],
            }],
        },
    })
}

fn node_client(cluster: &Cluster, node: &str) -> Result<Command> {
    node::command(cluster, node, &binaries::lab()?.display().to_string())
}

/// What a node's agent has counted, by the node whose clients asked.
fn connections(cluster: &Cluster, node: &str) -> Result<impl Fn(&str) -> u32> {
    let text = cluster.namespace(node).inside(|| {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS));
        let mut stream = TcpStream::connect(address).context("the agent has no metrics")?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    Ok(move |whose: &str| {
        let service = format!("service=\"web-{whose}\"");
        let of = |line: &&str| line.starts_with("svc_service_connections_total{") && line.contains(&service);
        let values = text.lines().filter(of).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        values.sum::<f64>() as u32
    })
}

/// Those that packets have opened.
fn flows(cluster: &Cluster, node: &str, whose: &str) -> Result<usize> {
    let mut agent = node::command(cluster, node, &binaries::agent()?.display().to_string())?;
    let listed = said(agent.args(["flows", "--output=json", &format!("--service=web-{whose}")]))
        .with_context(|| format!("{node} does not list its flows"))?;
    let flows: Vec<Value> = serde_json::from_str(&listed).context("the list of flows cannot be read")?;
    Ok(flows.len())
}
