//! What connections cost that processes in pods make: P5 to P7, and P8's.
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use svc_lab::agent::Agent;
use svc_lab::kube_proxy::{KubeProxy, Mode as Rules};
use svc_lab::process::Process;
use svc_lab::source::Source;
use svc_lab::topology::{BACKENDS, CLIENT, Lab, NODES, Node, Pod};
use svc_tests::cluster::{endpoint, service_of};

use crate::Effort;
use crate::figure::Figure;
use crate::figure::Goal::{AtLeast, AtMost};
use crate::load::{Done, Mode};
use crate::nodes::{other_services, write_manifests};
use crate::scale::publish_nodes;

const CLUSTER_IP: &str = "10.96.8.2";
const SERVICE_PORT: u16 = 80;
const PORT: u16 = 9377;
/// The server's pod, on the node that the client is not on.
const SERVER: &Pod = &BACKENDS[2];
const PATIENCE: Duration = Duration::from_secs(120);

const POD: &str = "pod, nothing attached";
const POD_SVC: &str = "pod, svc attached";
const POD_ONE: &str = "pod, svc attached on one of two nodes";
const POD_KUBE_PROXY: &str = "pod, beside kube-proxy";
const SVC: &str = "svc";
const KUBE_PROXY: &str = "kube-proxy iptables";

/// Two nodes, a client in a pod of the one, a server in a pod of the other.
struct World {
    server: Process,
    _agents: Vec<Agent>,
    lab: Lab,
}

struct Contestant<'a> {
    name: &'static str,
    world: &'a World,
    to: String,
}

pub(crate) fn rows(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let sizes: &[u32] = if effort.quick { &[10] } else { &[10, 10_000] };
    for services in sizes {
        size(*services, effort, show)?;
    }
    Ok(())
}

fn size(services: u32, effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let plain = World::start(Lab::new()?, Vec::new())?;
    println!("  svc, {services} Services ...");
    let svc = World::with_svc(services, &NODES)?;
    let one = World::with_svc(services, &NODES[..1])?;
    println!("  kube-proxy, {services} Services ...");
    let kube_proxy = World::with_kube_proxy(services)?;
    let (pod, cluster_ip) = (format!("{}:{PORT}", SERVER.v4()), format!("{CLUSTER_IP}:{SERVICE_PORT}"));
    let contestants = [
        Contestant { name: POD, world: &plain, to: pod.clone() },
        Contestant { name: POD_SVC, world: &svc, to: pod.clone() },
        Contestant { name: POD_ONE, world: &one, to: pod.clone() },
        Contestant { name: SVC, world: &svc, to: cluster_ip.clone() },
        Contestant { name: POD_KUBE_PROXY, world: &kube_proxy, to: pod },
        Contestant { name: KUBE_PROXY, world: &kube_proxy, to: cluster_ip },
    ];
    for contestant in &contestants {
        contestant.wait_until_served()?;
    }
    for (mode, what, unit, scale) in [
        (Mode::Connect, "connect, request, close", "a second", 1.0),
        (Mode::Stream, "stream", "Gbit/s", 8e-9),
        (Mode::Request, "request-response", "a second", 1.0),
    ] {
        let row = if mode == Mode::Connect { "P5" } else { "P7" };
        let case = |what: &str| format!("{what}, {services} Services");
        let mut rate = Figure::new(row, case(what), unit).ratio_of(row, SVC, POD_SVC, Some(AtLeast(1.0)));
        let least = if services > 10 { 3.0 } else { 1.2 };
        rate = rate
            .ratio_of("P6", SVC, KUBE_PROXY, (mode == Mode::Connect).then_some(AtLeast(least)))
            .ratio_of("P8", POD_SVC, POD, Some(AtLeast(1.0)))
            .ratio_of("P8", POD_ONE, POD, Some(AtLeast(0.97)))
            .ratio_of("P8", POD_KUBE_PROXY, POD, None);
        let per = if mode == Mode::Stream { "ns of CPU a KiB" } else { "us of CPU each" };
        let mut cost = Figure::new(row, case(&format!("{what}: CPU of client and server")), per)
            .ratio_of(row, SVC, POD_SVC, Some(AtMost(1.0)))
            .ratio_of("P6", SVC, KUBE_PROXY, None)
            .ratio_of("P8", POD_SVC, POD, Some(AtMost(1.0)))
            .ratio_of("P8", POD_ONE, POD, None)
            .ratio_of("P8", POD_KUBE_PROXY, POD, None);
        println!("  {} ...", rate.case);
        let (rounds, milliseconds) = if effort.quick { (5, 600) } else { (21, 500) };
        for _ in 0..rounds {
            for contestant in &contestants {
                let before = contestant.world.server.cpu_ns()?;
                let done = contestant.load(mode, milliseconds)?;
                if done.failed > 0 {
                    println!("    {}: {} of {} failed", contestant.name, done.failed, done.count);
                }
                // kube-proxy at 10,000 Services loses some of a few hundred.
                let share = if contestant.name == KUBE_PROXY { 10 } else { 1000 };
                ensure!(done.failed * share <= done.count, "{}: too many failed", contestant.name);
                let cpu = done.cpu_ns + contestant.world.server.cpu_ns()?.saturating_sub(before);
                rate.add(contestant.name, done.rate * scale);
                let each = cpu as f64 / done.count as f64;
                cost.add(contestant.name, if mode == Mode::Stream { each * 1024.0 } else { each / 1000.0 });
            }
        }
        show(rate);
        show(cost);
    }
    Ok(())
}

impl World {
    fn start(lab: Lab, agents: Vec<Agent>) -> Result<Self> {
        // The more ports, the longer until one is used again that the server or connection tracking still remembers.
        lab.namespace(CLIENT)?.sysctl(&[("ipv4/ip_local_port_range", "4096 65535")])?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").arg(format!("0.0.0.0:{PORT}")).stdin(Stdio::null());
        let server = lab.spawn(SERVER.name, command)?;
        lab.wait_for_port(SERVER.name, PORT)?;
        Ok(World { server, _agents: agents, lab })
    }

    fn with_svc(services: u32, nodes: &[Node]) -> Result<Self> {
        let lab = Lab::new()?;
        write_manifests(&lab, &objects(services))?;
        let source = Source::directory(&lab);
        let agents = nodes.iter().map(|node| Agent::start(&lab, node, &source, &[]));
        let agents = agents.collect::<Result<_>>()?;
        World::start(lab, agents)
    }

    /// Its rules stay when it ends, and so it does.
    fn with_kube_proxy(services: u32) -> Result<Self> {
        let mut lab = Lab::new()?;
        let mut source = Source::control_plane(&mut lab)?;
        publish_nodes(&mut source, &lab)?;
        source.api_server()?.create(&lab, &objects(services))?;
        let world = World::start(lab, Vec::new())?;
        let start = |node| KubeProxy::start(&world.lab, node, source.api_server()?, Rules::Iptables, &[]);
        let proxies = NODES.iter().map(start).collect::<Result<Vec<_>>>()?;
        let to = format!("{CLUSTER_IP}:{SERVICE_PORT}");
        Contestant { name: KUBE_PROXY, world: &world, to }.wait_until_served()?;
        drop(proxies);
        Ok(world)
    }
}

impl Contestant<'_> {
    fn load(&self, mode: Mode, milliseconds: u64) -> Result<Done> {
        let connections = if mode == Mode::Connect { 4 } else { 1 };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["load", mode.name(), &self.to, "--connections", &connections.to_string()]);
        command.args(["--milliseconds", &milliseconds.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.world.lab.spawn(CLIENT, command)?.output()?;
        if !output.status.success() {
            bail!("the load ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("the load's output")
    }

    fn wait_until_served(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.load(Mode::Connect, 50)?.count == 0 {
            if Instant::now() > deadline {
                bail!("{} is not served after {PATIENCE:?}", self.name);
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

/// One Service with the server behind it, and others before and after it in what a list of rules is sorted by.
fn objects(services: u32) -> Vec<Value> {
    let mut objects = service_of("load", CLUSTER_IP, &[endpoint(&SERVER.v4().to_string(), SERVER.node())]).to_vec();
    objects[0]["spec"]["ports"][0]["targetPort"] = PORT.into();
    objects[1]["ports"][0]["port"] = PORT.into();
    objects.extend(other_services(services));
    objects
}
