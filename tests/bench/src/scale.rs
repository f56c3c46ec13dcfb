//! Many Services of a real API server: how long a start and a change take, and what they cost. The agents of both nodes, then
//! kube-proxy on both nodes.
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kube::Client;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use svc_agent::source::encoding::ACCEPT;
use svc_lab::agent::Agent;
use svc_lab::client::{Options, Outcome, monotonic_us};
use svc_lab::control_plane::{ControlPlane, api};
use svc_lab::kube_proxy::{KubeProxy, Mode};
use svc_lab::load::Load;
use svc_lab::manifests::Manifests;
use svc_lab::process::{Process, kibibytes};
use svc_lab::source::Source;
use svc_lab::topology::{BACKENDS, CLIENT, Lab, NODES, Pod};
use svc_parity::objects::nodes;
use svc_tests::cluster::{endpoint, service_of};

use crate::Effort;
use crate::figure::Figure;
use crate::figure::Goal::AtMost;

/// The Service that is changed. Its backend is one of two pods, one on each node.
const CANARY: &str = "canary";
const CANARY_IP: &str = "10.96.0.200";
/// Requests a second that look for the change.
const LOOKS: u32 = 2000;
const PATIENCE: Duration = Duration::from_secs(600);

const SVC: &str = "svc";
const LISTS: &str = "the API server's lists alone";
const KUBE_PROXY: &str = "kube-proxy nftables";

/// Who serves both nodes.
enum Proxies {
    Svc(Vec<Agent>),
    KubeProxy(Vec<KubeProxy>),
}

impl Proxies {
    fn processes(&self) -> Vec<&Process> {
        match self {
            Proxies::Svc(agents) => agents.iter().map(Agent::process).collect(),
            Proxies::KubeProxy(proxies) => proxies.iter().map(KubeProxy::process).collect(),
        }
    }

    fn cpu_ns(&self) -> Result<u64> {
        self.processes().into_iter().map(Process::cpu_ns).sum()
    }
}

struct World {
    source: Source,
    lab: Lab,
}

/// How much there is.
struct Size {
    services: u32,
    /// Of each.
    endpoints: u32,
    /// How often one endpoint is changed, with svc and with kube-proxy.
    changes: [u32; 2],
}

const QUICK: &[Size] = &[Size { services: 1_000, endpoints: 4, changes: [50, 10] }];
/// In the last, kube-proxy takes minutes for a few changes.
const WHOLE: &[Size] = &[
    Size { services: 1_000, endpoints: 4, changes: [200, 15] },
    Size { services: 10_000, endpoints: 10, changes: [200, 15] },
    Size { services: 30_000, endpoints: 4, changes: [100, 3] },
];

pub(crate) fn rows(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let sizes = if effort.quick { QUICK } else { WHOLE };
    sizes.iter().try_for_each(|size| measure(size, show))
}

fn measure(size: &Size, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let Size { services, endpoints, changes } = *size;
    let mut lab = Lab::new()?;
    let mut source = Source::control_plane(&mut lab)?;
    publish_nodes(&mut source, &lab)?;
    let world = World { source, lab };
    println!("  {services} Services of {endpoints} endpoints ...");
    let control_plane = world.source.api_server()?;
    let objects: Vec<Value> = (0..services).flat_map(|number| others(number, endpoints)).collect();
    control_plane.create(&world.lab, &objects)?;
    control_plane.create(&world.lab, &canary(&BACKENDS[0]))?;

    let case = |what: &str| format!("{what}, {services} Services of {endpoints} endpoints");
    let figure = |row: &str, what: &str, unit: &str, most: Option<f64>| {
        let goal = most.filter(|_| services >= 10_000).map(AtMost);
        Figure::new(row, case(what), unit).ratio_to(SVC, KUBE_PROXY, goal)
    };
    let mut start = figure("P10", "start to the last Service answering, nothing being there", "s", Some(0.02))
        .ratio_of("P10", LISTS, KUBE_PROXY, None);
    let mut restart = figure("P10", "restart to what has changed meanwhile being in force", "s", Some(0.02));
    let mut change =
        figure("P9", "one endpoint change, from the API write to the new backend answering", "ms", Some(0.001));
    let mut cost = figure("P9", "CPU time of one endpoint change, both nodes together", "ms", None);
    let mut resident = figure("P11", "resident memory of one node's process", "MiB", None);
    let mut kernel = figure("P11", "the kernel's memory for one node", "MiB", None);
    let mut both = figure("P11", "resident memory of one node's process and the kernel's for it", "MiB", Some(0.2));
    start.add(LISTS, world.lists()?);
    for (name, changes) in [SVC, KUBE_PROXY].into_iter().zip(changes) {
        let load = world.look()?;
        let without = settled_kernel_bytes()?;
        world.point_canary(&BACKENDS[0])?;
        let (proxies, seconds) = world.timed_start(name, &load, &BACKENDS[0])?;
        start.add(name, seconds);
        let before = proxies.cpu_ns()?;
        for milliseconds in world.changes(changes, &load)? {
            change.add(name, milliseconds);
        }
        let spent = proxies.cpu_ns()?.saturating_sub(before);
        cost.add(name, spent as f64 / 1e6 / f64::from(changes));
        let (process, tables) =
            (proxies.processes()[0].resident_kib()? * 1024, kernel_bytes()?.saturating_sub(without));
        let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let tables = tables / NODES.len() as u64;
        resident.add(name, mebibytes(process));
        kernel.add(name, mebibytes(tables));
        both.add(name, mebibytes(process + tables));
        drop(proxies);
        world.point_canary(&BACKENDS[1])?;
        let (proxies, seconds) = world.timed_start(name, &load, &BACKENDS[1])?;
        restart.add(name, seconds);
        drop(proxies);
        if name == SVC {
            world.cleanup()?;
        }
    }
    for figure in [start, restart, change, cost, resident, kernel, both] {
        show(figure);
    }
    Ok(())
}

/// Without its addresses kube-proxy waits half a minute for a node's.
pub(crate) fn publish_nodes(source: &mut Source, lab: &Lab) -> Result<()> {
    let mut manifests = Manifests::default();
    nodes().into_iter().for_each(|node| manifests.put(node));
    source.publish(lab, &manifests)
}

impl World {
    fn control_plane(&self) -> Result<&ControlPlane> {
        self.source.api_server()
    }

    /// Asks the canary, over and over.
    fn look(&self) -> Result<Load> {
        let options = Options { rate: Some(LOOKS), timeout_ms: 250, ..Options::to(format!("http://{CANARY_IP}/")) };
        Load::start(&self.lab, CLIENT, &options)
    }

    /// Until each says that the kernel knows everything.
    fn start(&self, name: &str) -> Result<Proxies> {
        // Both nodes at once.
        thread::scope(|scope| {
            if name == SVC {
                let each = |node| scope.spawn(move || Agent::start(&self.lab, node, &self.source, &[]));
                let agents: Vec<_> = NODES.iter().map(each).collect();
                Ok(Proxies::Svc(agents.into_iter().map(|agent| agent.join().expect("it ends")).collect::<Result<_>>()?))
            } else {
                let control_plane = self.control_plane()?;
                let each =
                    |node| scope.spawn(move || KubeProxy::start(&self.lab, node, control_plane, Mode::Nftables, &[]));
                let proxies: Vec<_> = NODES.iter().map(each).collect();
                let proxies = proxies.into_iter().map(|proxy| proxy.join().expect("it ends"));
                Ok(Proxies::KubeProxy(proxies.collect::<Result<_>>()?))
            }
        })
    }

    /// The seconds that the API server takes to tell both nodes what there is, which no start can be shorter than.
    fn lists(&self) -> Result<f64> {
        let control_plane = self.control_plane()?;
        let list = || -> Result<()> {
            for path in ["/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices"] {
                control_plane.get(&self.lab, path, ACCEPT)?;
            }
            Ok(())
        };
        let begin = Instant::now();
        thread::scope(|scope| {
            let clients = NODES.each_ref().map(|_| scope.spawn(list));
            clients.into_iter().try_for_each(|client| client.join().expect("it ends"))
        })?;
        Ok(begin.elapsed().as_secs_f64())
    }

    fn point_canary(&self, backend: &Pod) -> Result<()> {
        self.control_plane()?.with_client(&self.lab, async |client| set_backend(&client, backend).await)
    }

    /// And the seconds until that, and the canary's backend, which it is to have now, answers.
    fn timed_start(&self, name: &str, load: &Load, backend: &Pod) -> Result<(Proxies, f64)> {
        load.take();
        let begin = monotonic_us();
        let proxies = self.start(name)?;
        let started = monotonic_us();
        let answered = wait_for(load, begin, |outcome| outcome.backend.as_deref() == Some(backend.name))?;
        Ok((proxies, (answered.max(started) - begin) as f64 / 1e6))
    }

    /// The milliseconds that each took.
    fn changes(&self, count: u32, load: &Load) -> Result<Vec<f64>> {
        self.control_plane()?.with_client(&self.lab, async |client| {
            // What it is already: the connection is no part of the first change.
            set_backend(&client, &BACKENDS[0]).await?;
            let mut milliseconds = Vec::new();
            for number in 1..=count {
                let backend = &BACKENDS[if number % 2 == 0 { 0 } else { 2 }];
                let begin = monotonic_us();
                set_backend(&client, backend).await?;
                let answered = wait_for(load, begin, |outcome| outcome.backend.as_deref() == Some(backend.name))?;
                milliseconds.push((answered - begin) as f64 / 1000.0);
                thread::sleep(Duration::from_millis(20));
            }
            Ok(milliseconds)
        })
    }

    /// Nothing of svc's is left on the nodes.
    fn cleanup(&self) -> Result<()> {
        for node in &NODES {
            svc_lab::agent::inspect(&self.lab, node, &["cleanup"])?;
        }
        Ok(())
    }
}

async fn set_backend(client: &Client, backend: &Pod) -> Result<()> {
    let [_, slice] = canary(backend);
    let patch = Patch::Merge(json!({ "endpoints": slice["endpoints"] }));
    api(client, &slice)?.patch(&format!("{CANARY}-ipv4"), &PatchParams::default(), &patch).await?;
    Ok(())
}

/// When the first request that ended after `begin` was answered as wanted.
fn wait_for(load: &Load, begin: u64, wanted: impl Fn(&Outcome) -> bool) -> Result<u64> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let outcomes = load.take();
        let answers = outcomes.iter().filter(|outcome| outcome.at_us > begin && outcome.backend.is_some());
        if let Some(outcome) = answers.into_iter().find(|outcome| wanted(outcome)) {
            return Ok(outcome.at_us);
        }
        if Instant::now() > deadline {
            bail!("the Service {CANARY} does not answer as wanted after {} s", PATIENCE.as_secs());
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// A Service without pods behind its endpoints, and its slice.
pub(crate) fn others(number: u32, endpoints: u32) -> [Value; 2] {
    let address = format!("10.96.{}.{}", 16 + number / 250, 1 + number % 250);
    let endpoints = (0..endpoints).map(|offset| {
        let index = number * endpoints + offset;
        let address = format!("10.{}.{}.{}", 16 + index / 62_500, index / 250 % 250, 1 + index % 250);
        endpoint(&address, &NODES[index as usize % NODES.len()])
    });
    service(&format!("service-{number}"), &address, &endpoints.collect::<Vec<_>>())
}

fn canary(backend: &Pod) -> [Value; 2] {
    service(CANARY, CANARY_IP, &[endpoint(&backend.v4().to_string(), backend.node())])
}

/// Marked by a label, to be deleted by it.
fn service(name: &str, address: &str, endpoints: &[Value]) -> [Value; 2] {
    service_of(name, address, endpoints).map(|mut object| {
        object["metadata"]["labels"]["bench"] = "other".into();
        object
    })
}

/// When the maps of those who ended before are freed, which the kernel does in its own time.
fn settled_kernel_bytes() -> Result<u64> {
    let mut last = kernel_bytes()?;
    for _ in 0..30 {
        thread::sleep(Duration::from_millis(500));
        let now = kernel_bytes()?;
        if last.abs_diff(now) < 1 << 20 {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

/// What the kernel holds for itself: maps, rules, sets.
fn kernel_bytes() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let parts = ["SUnreclaim", "VmallocUsed", "Percpu"].into_iter().map(|name| kibibytes(&text, name));
    Ok(parts.sum::<Result<u64>>()? * 1024)
}
