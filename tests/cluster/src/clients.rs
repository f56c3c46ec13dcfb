//! Steady traffic, and what became of it.
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use svc_lab::binaries;
use svc_lab::client::Outcome;

use crate::network::{CLIENT, NODES, addresses};
use crate::node;
use crate::parts::manifests;
use crate::state::Cluster;

/// Of the Service in manifests/life.
pub(crate) const CLUSTER_IP: &str = "http://10.96.0.80/";
pub(crate) const NODE_PORT: u16 = 30080;

/// Of another node than the client's.
pub(crate) fn node_port() -> String {
    format!("http://{}:{NODE_PORT}/", addresses(NODES[1]).0)
}

/// Where requests are from, and whether they are on one connection.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    pub(crate) place: &'static str,
    pub(crate) kept: bool,
}

/// From a pod and from a process of the same node to the ClusterIP, and from outside to a NodePort of another node: each with
/// a new connection a request, and with one that is kept.
pub(crate) struct Clients<'a> {
    cluster: &'a Cluster,
    processes: Vec<(Client, Child, PathBuf)>,
}

const CLIENT_NODE: &str = NODES[0];
const CONTAINERS: [(&str, bool); 2] = [("new", false), ("kept", true)];

impl<'a> Clients<'a> {
    pub(crate) fn start(cluster: &'a Cluster) -> Result<Self> {
        cluster.ask(&["apply", "-f", &manifests("life/client.yaml")])?;
        cluster.ask(&["wait", "--for=condition=Ready", "pod/client", "--timeout=300s"])?;
        let lab = binaries::lab()?;
        let node_port = node_port();
        let mut processes = Vec::new();
        for kept in [false, true] {
            let on_node = node::command(cluster, CLIENT_NODE, &lab.display().to_string())?;
            let outside = cluster.command(CLIENT, &lab)?;
            for (place, mut command, target) in
                [("a node", on_node, CLUSTER_IP), ("outside", outside, node_port.as_str())]
            {
                let path = cluster.directory().join(format!("client-{}.json", processes.len()));
                command.args(["client", target, "--rate=50"]).args(kept.then_some("--keep-alive"));
                let child = command.stdin(Stdio::piped()).stdout(File::create(&path)?).spawn();
                processes.push((Client { place, kept }, child.context("cannot start a client")?, path));
            }
        }
        Ok(Clients { cluster, processes })
    }

    /// Lets the requests under way end.
    pub(crate) fn finish(mut self, outcomes: &mut Vec<(Client, Outcome)>) -> Result<()> {
        let mut texts = Vec::new();
        for (client, child, path) in &mut self.processes {
            drop(child.stdin.take());
            child.wait()?;
            texts.push((*client, fs::read_to_string(path)?));
        }
        for (container, kept) in CONTAINERS {
            // It may be ended with its container. Whether it did its work is seen below.
            let _ = self.cluster.ask(&["exec", "client", "-c", container, "--", "touch", "/stop"]);
            let ended = format!(
                "jsonpath={{.status.containerStatuses[?(@.name==\"{container}\")].state.terminated.exitCode}}=0"
            );
            self.cluster.ask(&["wait", &format!("--for={ended}"), "pod/client", "--timeout=120s"])?;
            texts.push((Client { place: "a pod", kept }, self.cluster.ask(&["logs", "client", "-c", container])?));
        }
        self.cluster.ask(&["delete", "pod", "client", "--now"])?;
        for (client, text) in texts {
            let lines = text.lines().map(|line| serde_json::from_str(line).map(|outcome| (client, outcome)));
            outcomes.extend(lines.collect::<Result<Vec<_>, _>>().context("a client's output cannot be read")?);
        }
        Ok(())
    }
}

impl Drop for Clients<'_> {
    fn drop(&mut self) {
        for (_, child, _) in &mut self.processes {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Has svc-lab's client, which the command is, ask so often.
///
/// # Errors
/// Where a request fails.
pub(crate) fn ask(mut lab: Command, target: &str, requests: u32) -> Result<()> {
    let output = lab.args(["client", target, &format!("--requests={requests}")]).stdin(Stdio::null()).output()?;
    answered(&String::from_utf8_lossy(&output.stdout))
}

/// Whether all requests that a client tells of were answered.
pub(crate) fn answered(log: &str) -> Result<()> {
    let outcomes = log.lines().map(serde_json::from_str).collect::<Result<Vec<Outcome>, _>>();
    let outcomes = outcomes.context("a client's output cannot be read")?;
    let errors: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.error.as_deref()).collect();
    if !errors.is_empty() || outcomes.is_empty() {
        bail!("of {} requests {} failed: {}", outcomes.len(), errors.len(), errors.join(", "));
    }
    Ok(())
}
