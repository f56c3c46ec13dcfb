//! The life of a node under steady traffic: what is asked of a Service while its proxy is replaced, upgraded or killed, its
//! backends are rolled out, a kubelet starts anew and a node is drained.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use svc_lab::binaries;
use svc_lab::client::{Outcome, monotonic_us};

use crate::image::Purpose;
use crate::network::{CLIENT, NODES, addresses};
use crate::programs::source;
use crate::proxy::{Proxy, rollout};
use crate::state::Cluster;
use crate::{node, up};

/// Of the Service in manifests/life.
const CLUSTER_IP: &str = "http://10.96.0.80/";
const NODE_PORT: u16 = 30080;
const ROLLOUTS: u32 = 10;
/// Before and after each scenario.
const CALM: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(180);

/// What happened, and when, in microseconds of CLOCK_MONOTONIC.
struct Scenario {
    title: &'static str,
    proxy: Proxy,
    from: u64,
    to: u64,
    /// Connections that are kept should be.
    keeps: bool,
}

/// Where requests are from, and whether they are on one connection.
#[derive(Clone, Copy)]
struct Client {
    place: &'static str,
    kept: bool,
}

/// What became of the requests of one scenario.
#[derive(Default)]
struct Row {
    requests: usize,
    failures: BTreeMap<String, usize>,
}

impl Row {
    fn failed(&self) -> usize {
        self.failures.values().sum()
    }
}

/// Tries all, with kube-proxy and with svc. The cluster is started for it, and ended.
pub(crate) fn run(cluster: &Cluster) -> Result<()> {
    if cluster.mark().exists() {
        bail!(
            "the cluster is up, and this test starts its own: `cargo xtask cluster down` first, or give another --name"
        );
    }
    up::up(cluster, Proxy::Kube, Purpose::Any)?;
    let mut life = Life { cluster, scenarios: Vec::new(), outcomes: Vec::new() };
    let result = life.all();
    // What was seen until then says more than the error alone.
    let judged = life.judge();
    result?;
    judged?;
    cluster.down()
}

struct Life<'a> {
    cluster: &'a Cluster,
    scenarios: Vec<Scenario>,
    /// Of clients that have ended.
    outcomes: Vec<(Client, Outcome)>,
}

impl Life<'_> {
    fn all(&mut self) -> Result<()> {
        let cluster = self.cluster;
        cluster.ask(&["apply", "-f", &manifests("life/web.yaml")])?;
        cluster.ask(&["rollout", "status", "deployment/web", "--timeout=120s"])?;

        let clients = Clients::start(cluster)?;
        self.everyday(Proxy::Kube)?;
        self.scenario("taking over from kube-proxy", Proxy::Svc, true, take_over)?;
        clients.finish(&mut self.outcomes)?;

        // Connections that kube-proxy translates have to end before its rules do.
        let clients = Clients::start(cluster)?;
        self.scenario("removing kube-proxy's rules", Proxy::Svc, true, remove_rules)?;
        self.everyday(Proxy::Svc)?;
        self.scenario("giving back to kube-proxy", Proxy::Svc, true, give_back)?;
        clients.finish(&mut self.outcomes)
    }

    /// What happens on every cluster, whatever serves its Services.
    fn everyday(&mut self, proxy: Proxy) -> Result<()> {
        self.scenario("rolling upgrade of the DaemonSet", proxy, true, |cluster| upgrade(cluster, proxy))?;
        self.scenario("its process killed on every node", proxy, true, |cluster| kill(cluster, proxy))?;
        self.scenario("kubelet killed on a node", proxy, true, restart_kubelet)?;
        self.scenario("backends rolled out ten times", proxy, false, roll_out)?;
        self.scenario("a node drained", proxy, false, drain)
    }

    fn scenario(
        &mut self,
        title: &'static str,
        proxy: Proxy,
        keeps: bool,
        work: impl FnOnce(&Cluster) -> Result<()>,
    ) -> Result<()> {
        let serving = proxy.daemon_set().unwrap_or_default();
        crate::step::step(&format!("{serving}: {title}"), || {
            thread::sleep(CALM);
            let from = monotonic_us();
            work(self.cluster)?;
            thread::sleep(CALM);
            self.scenarios.push(Scenario { title, proxy, from, to: monotonic_us(), keeps });
            Ok(())
        })
    }

    /// Prints the table, and fails where svc loses requests and kube-proxy does not.
    fn judge(&self) -> Result<()> {
        println!("\n{:<12} {:<36} {:>8} {:>7}", "serving", "while", "requests", "failed");
        let mut failed = BTreeMap::new();
        for scenario in &self.scenarios {
            let row = self.row(scenario);
            let name = scenario.proxy.daemon_set().unwrap_or_default();
            println!("{name:<12} {:<36} {:>8} {:>7}", scenario.title, row.requests, row.failed());
            for (error, count) in &row.failures {
                println!("{:<12}   {count} {error}", "");
            }
            if row.requests == 0 {
                bail!("no request was made while: {}", scenario.title);
            }
            failed.insert((scenario.title, scenario.proxy == Proxy::Svc), row.failed());
        }
        // What is done with svc only may lose nothing.
        let theirs = |title| failed.get(&(title, false)).copied().unwrap_or(0);
        let ours = failed.iter().filter(|((title, svc), count)| *svc && **count > 0 && theirs(*title) == 0);
        let worse: Vec<_> = ours.map(|((title, _), _)| *title).collect();
        if !worse.is_empty() {
            bail!("svc loses requests, and kube-proxy does not, while: {}", worse.join(", "));
        }
        Ok(())
    }

    fn row(&self, scenario: &Scenario) -> Row {
        let mut row = Row::default();
        for (client, outcome) in &self.outcomes {
            if !(scenario.from..scenario.to).contains(&outcome.at_us) || client.kept && !scenario.keeps {
                continue;
            }
            row.requests += 1;
            if let Some(error) = &outcome.error {
                let kind = if client.kept { "a connection that is kept" } else { "new connections" };
                *row.failures.entry(format!("{error} ({}, {kind})", client.place)).or_default() += 1;
            }
        }
        row
    }
}

/// From a pod and from a process of the same node to the ClusterIP, and from outside to a NodePort of another node: each with
/// a new connection a request, and with one that is kept.
struct Clients<'a> {
    cluster: &'a Cluster,
    processes: Vec<(Client, Child, PathBuf)>,
}

const CLIENT_NODE: &str = NODES[0];
const CONTAINERS: [(&str, bool); 2] = [("new", false), ("kept", true)];

impl<'a> Clients<'a> {
    fn start(cluster: &'a Cluster) -> Result<Self> {
        cluster.ask(&["apply", "-f", &manifests("life/client.yaml")])?;
        cluster.ask(&["wait", "--for=condition=Ready", "pod/client", "--timeout=60s"])?;
        let lab = binaries::lab()?;
        let node_port = format!("http://{}:{NODE_PORT}/", addresses(NODES[1]).0);
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
    fn finish(mut self, outcomes: &mut Vec<(Client, Outcome)>) -> Result<()> {
        let mut texts = Vec::new();
        for (client, child, path) in &mut self.processes {
            drop(child.stdin.take());
            child.wait()?;
            texts.push((*client, fs::read_to_string(path)?));
        }
        for (container, kept) in CONTAINERS {
            self.cluster.ask(&["exec", "client", "-c", container, "--", "touch", "/stop"])?;
            let ended = format!(
                "jsonpath={{.status.containerStatuses[?(@.name==\"{container}\")].state.terminated.exitCode}}=0"
            );
            self.cluster.ask(&["wait", &format!("--for={ended}"), "pod/client", "--timeout=30s"])?;
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

fn in_deploy(name: &str) -> String {
    source("../../deploy").join(name).display().to_string()
}

fn manifests(name: &str) -> String {
    source("manifests").join(name).display().to_string()
}

fn patch_kube_proxy(cluster: &Cluster, file: &str) -> Result<()> {
    let patch = format!("--patch-file={}", in_deploy(file));
    cluster.ask(&["-n", "kube-system", "patch", "daemonset", "kube-proxy", &patch]).map(drop)
}

/// As docs/operations.md has it, up to where connections of kube-proxy's should end.
fn take_over(cluster: &Cluster) -> Result<()> {
    patch_kube_proxy(cluster, "kube-proxy/stop.yaml")?;
    cluster.ask(&["apply", "-k", &manifests("take-over")])?;
    rollout(cluster, "daemonset/svc-agent")
}

/// The rules translate what began before svc was there, and without them the kernel's connection tracking drops a new
/// connection that has the addresses and ports of one it still remembers.
fn remove_rules(cluster: &Cluster) -> Result<()> {
    for node in NODES {
        wait_for(|| Ok(!tracked(cluster, node)?))?;
    }
    cluster.ask(&["apply", "-k", &in_deploy("kube-proxy")])?;
    rollout(cluster, "daemonset/kube-proxy-cleanup")?;
    cluster.ask(&["delete", "-k", &in_deploy("kube-proxy")])?;
    cluster.ask(&["apply", "-k", &manifests("svc")])?;
    rollout(cluster, "daemonset/svc-agent")
}

/// Whether the kernel of a node remembers a connection to the Service.
fn tracked(cluster: &Cluster, node: &str) -> Result<bool> {
    let output = node::command(cluster, node, "cat")?.arg("/proc/net/nf_conntrack").output()?;
    if !output.status.success() {
        bail!("{node} does not show its connections: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok([" dst=10.96.0.80 ".to_owned(), format!(" dport={NODE_PORT} ")].iter().any(|word| text.contains(word)))
}

fn give_back(cluster: &Cluster) -> Result<()> {
    cluster.ask(&["-n", "kube-system", "delete", "daemonset", "svc-agent"])?;
    patch_kube_proxy(cluster, "kube-proxy/start.yaml")?;
    rollout(cluster, "daemonset/kube-proxy")?;
    for node in NODES {
        // Its pod is ready before its rules are there.
        let healthz = format!("/api/v1/nodes/{node}:10256/proxy/healthz");
        wait_for(|| Ok(cluster.ask(&["get", "--raw", &healthz]).is_ok()))?;
    }
    cluster.ask(&["apply", "-k", &in_deploy("give-back")])?;
    rollout(cluster, "daemonset/svc-cleanup")
}

fn upgrade(cluster: &Cluster, proxy: Proxy) -> Result<()> {
    let name = format!("daemonset/{}", proxy.daemon_set().unwrap_or_default());
    cluster.ask(&["-n", "kube-system", "rollout", "restart", &name])?;
    rollout(cluster, &name)
}

fn kill(cluster: &Cluster, proxy: Proxy) -> Result<()> {
    let name = proxy.daemon_set().unwrap_or_default();
    for node in NODES {
        let before = pid_of(cluster, node, name)?.with_context(|| format!("no {name} runs on {node}"))?;
        end(node::command(cluster, node, "kill")?.args(["-KILL", &before]))?;
        wait_for(|| Ok(pid_of(cluster, node, name)?.is_some_and(|now| now != before)))?;
    }
    rollout(cluster, &format!("daemonset/{name}"))
}

/// Every pod of the node goes on meanwhile.
fn restart_kubelet(cluster: &Cluster) -> Result<()> {
    let node = NODES[1];
    let before = pid_of(cluster, node, "kubelet")?.context("no kubelet runs")?;
    end(node::command(cluster, node, "kill")?.args(["-KILL", &before]))?;
    wait_for(|| Ok(pid_of(cluster, node, "kubelet")?.is_some_and(|now| now != before)))?;
    // A kubelet that is there says so by its lease and its status, every few seconds.
    thread::sleep(Duration::from_secs(10));
    cluster.ask(&["wait", "--for=condition=Ready", "node", node, "--timeout=60s"]).map(drop)
}

fn roll_out(cluster: &Cluster) -> Result<()> {
    for _ in 0..ROLLOUTS {
        cluster.ask(&["rollout", "restart", "deployment/web"])?;
        cluster.ask(&["rollout", "status", "deployment/web", "--timeout=120s"])?;
    }
    // The last ones that end.
    thread::sleep(Duration::from_secs(6));
    Ok(())
}

/// Another than the client's, and than the one whose NodePort is asked.
fn drain(cluster: &Cluster) -> Result<()> {
    let node = NODES[2];
    cluster.ask(&["drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=90s"])?;
    cluster.ask(&["rollout", "status", "deployment/web", "--timeout=120s"])?;
    cluster.ask(&["uncordon", node]).map(drop)
}

/// In the node's own PID namespace.
fn pid_of(cluster: &Cluster, node: &str, program: &str) -> Result<Option<String>> {
    let output = node::command(cluster, node, "pidof")?.args(["-s", program]).output()?;
    let pid = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok((!pid.is_empty()).then_some(pid))
}

fn end(command: &mut Command) -> Result<()> {
    let status = command.status()?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

fn wait_for(mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is()? {
        if Instant::now() > deadline {
            bail!("nothing came of it within {} s", PATIENCE.as_secs());
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
