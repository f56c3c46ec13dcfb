//! From nothing to a cluster.
use std::fs;
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::image::Purpose;
use crate::network::{self, NODES, pod_cidrs};
use crate::programs::{Programs, source};
use crate::proxy::{Proxy, rollout};
use crate::state::Cluster;
use crate::step::step;
use crate::{control_plane, hierarchies, image, node};

/// Where it is up already, nothing is done.
pub(crate) fn up(cluster: &Cluster, proxy: Proxy, with: Purpose) -> Result<()> {
    if cluster.mark().exists() {
        let is = fs::read_to_string(cluster.mark())?;
        let wanted = proxy.daemon_set().unwrap_or_default();
        if is != wanted {
            bail!("the cluster is up with {is:?} serving Services: `cargo xtask cluster down` first");
        }
        println!("it is up already");
        return Ok(());
    }
    hierarchies::all()?;
    let programs = Programs::ensure()?;
    let images = image::ensure(&programs, proxy, with)?;
    let start = Instant::now();
    // Of one that was cut short.
    cluster.down()?;
    step("networks", || network::create(cluster))?;
    step("control plane", || control_plane::start(cluster, &programs))?;
    step("nodes", || {
        register(cluster)?;
        at_once(|node| {
            node::start(cluster, node)?;
            node::import(cluster, node, &images.first)
        })
    })?;
    step("nodes ready", || {
        cluster.ask(&["wait", "--for=condition=Ready", "node", "--all", "--timeout=300s"]).map(drop)
    })?;
    if let Some(name) = proxy.daemon_set() {
        step(name, || {
            proxy.install(cluster)?;
            proxy.wait(cluster)
        })?;
    }
    let dns = source("manifests/coredns.yaml").display().to_string();
    cluster.ask(&["apply", "-f", &dns])?;
    step("images of tests", || at_once(|node| node::import(cluster, node, &images.rest)))?;
    if proxy != Proxy::None {
        step("DNS", || rollout(cluster, "deployment/coredns"))?;
    }
    fs::write(cluster.mark(), proxy.daemon_set().unwrap_or_default())?;
    println!("up after {:.0} s; cargo xtask cluster kubectl get pods -A", start.elapsed().as_secs_f32());
    Ok(())
}

/// Nodes with their pods' addresses, which kubelets find when they register.
fn register(cluster: &Cluster) -> Result<()> {
    let objects: Vec<_> = NODES
        .iter()
        .enumerate()
        .map(|(index, node)| {
            let cidrs = pod_cidrs(node);
            json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": { "name": node, "labels": { "topology.kubernetes.io/zone": format!("z{}", index + 1) } },
                "spec": { "podCIDR": cidrs[0], "podCIDRs": cidrs },
            })
        })
        .collect();
    cluster.apply(&objects)
}

fn at_once(work: impl Fn(&str) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let threads = NODES.map(|node| {
            let work = &work;
            scope.spawn(move || work(node))
        });
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// What kubectl says of it.
pub(crate) fn status(cluster: &Cluster) -> Result<()> {
    for arguments in [["get", "nodes", "-o", "wide"].as_slice(), &["get", "pods", "-A", "-o", "wide"]] {
        let mut kubectl: Command = cluster.kubectl()?;
        kubectl.args(arguments).status().context("cannot start kubectl")?;
    }
    Ok(())
}
