//! The life of a node under steady traffic: what is asked of a Service while its proxy is replaced, upgraded or killed, its
//! backends are rolled out, a kubelet starts anew and a node is drained.
use std::collections::BTreeMap;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use svc_lab::client::{Outcome, monotonic_us};

use crate::clients::{Client, Clients, NODE_PORT};
use crate::network::NODES;
use crate::node;
use crate::parts::{in_deploy, manifests, said, serve, wait_for};
use crate::proxy::{Proxy, rollout};
use crate::state::Cluster;

const ROLLOUTS: u32 = 10;
/// Before and after each scenario.
const CALM: Duration = Duration::from_secs(3);

/// What happened, and when, in microseconds of CLOCK_MONOTONIC.
struct Scenario {
    title: &'static str,
    proxy: Proxy,
    from: u64,
    to: u64,
    /// Connections that are kept should be.
    keeps: bool,
}

/// What became of the requests of one scenario.
#[derive(Default)]
struct Row {
    requests: usize,
    /// By what is said of them, when each was known, in seconds from the scenario's start.
    failures: BTreeMap<String, Vec<f64>>,
}

impl Row {
    fn failed(&self) -> usize {
        self.failures.values().map(Vec::len).sum()
    }
}

/// All that may happen to a node, with kube-proxy, on whose cluster it starts, and with svc.
pub(crate) fn run(cluster: &Cluster) -> Result<()> {
    judged(cluster, |life| life.all())
}

/// svc in kube-proxy's place and back, as often, on kube-proxy's cluster.
pub(crate) fn take_overs(cluster: &Cluster, times: u32) -> Result<()> {
    judged(cluster, |life| (0..times).try_for_each(|_| life.there_and_back()))
}

fn judged(cluster: &Cluster, work: impl FnOnce(&mut Life<'_>) -> Result<()>) -> Result<()> {
    serve(cluster)?;
    let mut life = Life { cluster, scenarios: Vec::new(), outcomes: Vec::new() };
    let result = work(&mut life);
    // What was seen until then says more than the error alone.
    let judged = life.judge();
    result?;
    judged
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

    /// Connections end with each half: what translates them does not outlive it.
    fn there_and_back(&mut self) -> Result<()> {
        for (title, work) in [
            ("taking over from kube-proxy", take_over as fn(&Cluster) -> Result<()>),
            ("giving back to kube-proxy", give_back),
        ] {
            let clients = Clients::start(self.cluster)?;
            self.scenario(title, Proxy::Svc, true, work)?;
            clients.finish(&mut self.outcomes)?;
        }
        uninstall(self.cluster)
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
            for (error, times) in &row.failures {
                let times: Vec<_> = times.iter().map(|seconds| format!("{seconds:.1}")).collect();
                println!("{:<12}   {} {error}, after {} s", "", times.len(), times.join(", "));
            }
            if row.requests == 0 {
                bail!("no request was made while: {}", scenario.title);
            }
            *failed.entry((scenario.title, scenario.proxy == Proxy::Svc)).or_default() += row.failed();
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
                let seconds = (outcome.at_us - scenario.from) as f64 / 1e6;
                row.failures.entry(format!("{error} ({}, {kind})", client.place)).or_default().push(seconds);
            }
        }
        row
    }
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
    let text = said(node::command(cluster, node, "cat")?.arg("/proc/net/nf_conntrack"))
        .with_context(|| format!("{node} does not show its connections"))?;
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

/// What is left on the nodes once the agent's DaemonSet is gone.
pub(crate) fn uninstall(cluster: &Cluster) -> Result<()> {
    cluster.ask(&["apply", "-k", &in_deploy("uninstall")])?;
    rollout(cluster, "daemonset/svc-cleanup")?;
    cluster.ask(&["delete", "-k", &in_deploy("uninstall")]).map(drop)
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
