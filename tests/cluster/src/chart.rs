//! The chart: installed, upgraded and uninstalled as docs/operations.md says, and what is left on the nodes then.
use anyhow::{Context, Result, bail};
use svc_lab::binaries;
use svc_lab::control_plane::helm_binary;

use crate::clients::{CLUSTER_IP, ask, node_port};
use crate::network::{CLIENT, CONTROL_PLANE, NODES, POD_CIDRS};
use crate::parts::{in_deploy, said, serve, wait_for};
use crate::proxy::rollout;
use crate::state::Cluster;
use crate::step::step;
use crate::{attached, life, node, sockets};

const REQUESTS: u32 = 50;
const NAMESPACE: [&str; 2] = ["--namespace", "kube-system"];

/// On a cluster that nothing serves.
pub(crate) fn run(cluster: &Cluster) -> Result<()> {
    let before = traces(cluster)?;
    step("helm install", || {
        let pods = format!("clusterCIDR={{{POD_CIDRS}}}");
        helm(cluster, &["install", "svc", &in_deploy("chart"), "--set", &pods])?;
        rollout(cluster, "daemonset/svc-agent")?;
        // Its pods reach the API server by its ClusterIP.
        rollout(cluster, "deployment/coredns")
    })?;
    step("requests", || serve(cluster).and_then(|()| requests(cluster)))?;
    step("sockets of every node", || sockets::run(cluster))?;
    step("helm upgrade", || {
        helm(cluster, &["upgrade", "svc", &in_deploy("chart"), "--reuse-values", "--set", "log.format=json"])?;
        rollout(cluster, "daemonset/svc-agent")?;
        requests(cluster)
    })?;
    let installed = traces(cluster)?;
    step("helm uninstall", || {
        helm(cluster, &["uninstall", "svc", "--wait"])?;
        life::uninstall(cluster)
    })?;
    step("nothing left", || {
        for ((node, before), installed) in NODES.into_iter().zip(&before).zip(&installed) {
            if ["svc", "cgroup: ", "at ingress"].iter().any(|word| !installed.iter().any(|line| line.contains(word))) {
                bail!("{node} showed too little while svc was installed: {installed:?}");
            }
            let left: Vec<_> = of_node(cluster, node)?.into_iter().filter(|line| !before.contains(line)).collect();
            if !left.is_empty() {
                bail!("{node} still has: {}", left.join("\n"));
            }
        }
        // The pods end a little after what made them.
        wait_for(|| {
            let objects = "daemonsets,pods,serviceaccounts,clusterroles,clusterrolebindings,secrets";
            let objects = cluster.ask(&[&["get", objects, "--output=name"], &NAMESPACE[..]].concat())?;
            Ok(!objects.contains("svc"))
        })
        .context("the cluster still has objects of svc's")?;
        let client = node::command(cluster, NODES[0], &binaries::lab()?.display().to_string())?;
        if ask(client, CLUSTER_IP, 1).is_ok() {
            bail!("a socket is still pointed at a backend");
        }
        Ok(())
    })
}

/// From outside and from a node.
fn requests(cluster: &Cluster) -> Result<()> {
    let lab = binaries::lab()?;
    ask(cluster.command(CLIENT, &lab)?, &node_port(), REQUESTS).context("from outside")?;
    ask(node::command(cluster, NODES[0], &lab.display().to_string())?, CLUSTER_IP, REQUESTS).context("from a node")
}

fn helm(cluster: &Cluster, arguments: &[&str]) -> Result<()> {
    let mut helm = cluster.command(CONTROL_PLANE, helm_binary()?)?;
    helm.env("KUBECONFIG", cluster.kubeconfig("admin")).env("HOME", cluster.directory());
    said(helm.args(arguments).args(NAMESPACE)).map(drop)
}

fn traces(cluster: &Cluster) -> Result<Vec<Vec<String>>> {
    NODES.into_iter().map(|node| of_node(cluster, node)).collect()
}

/// Pins, programs, rules and queues: whatever something that serves Services may leave on a node.
fn of_node(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let mut lines = attached::on(cluster, node)?;
    for (program, arguments, word) in [
        ("ls", &["-A", "/sys/fs/bpf"][..], ""),
        ("ip", &["-details", "-oneline", "link"], "xdp"),
        ("tc", &["qdisc", "show"], "clsact"),
        ("ip", &["rule"], ""),
        ("ip", &["-6", "rule"], ""),
        ("nft", &["--stateless", "list", "ruleset"], ""),
    ] {
        let text = said(node::command(cluster, node, program)?.args(arguments))?;
        lines.extend(text.lines().filter(|line| line.contains(word)).map(str::to_owned));
    }
    Ok(lines)
}
