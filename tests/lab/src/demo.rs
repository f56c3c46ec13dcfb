//! svc at work, readable at a glance: who asks whom, which backend answered how often, and how many requests failed.
mod chart;
mod interrupt;

use std::collections::BTreeSet;
use std::fs;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use svc_lab::agent::{Agent, inspect};
use svc_lab::client;
use svc_lab::load::{Load, Tally};
use svc_lab::manifests::Manifests;
use svc_lab::source::Source;
use svc_lab::topology::{BACKENDS, CLIENT, Lab, NODES, OUTSIDE};

use self::interrupt::Interrupt;

/// The Services of examples/hostnames.
const CLUSTER_IP: &str = "http://10.96.0.80/";
const CLUSTER_IP_V6: &str = "http://[fd00:10:96::80]/";
const ECHO: &str = "udp://10.96.0.7:7";
const NODE_PORT: u16 = 30080;
const ECHO_NODE_PORT: u16 = 30007;

/// How much of a long listing is shown.
const LISTING_LINES: usize = 12;

/// Show Services being balanced over pods, in network namespaces.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Exit when everything was shown; non-zero if a request failed or a backend was never reached.
    #[arg(long)]
    once: bool,
    /// Take the Services from a real kube-apiserver instead of a folder of manifests.
    #[arg(long)]
    control_plane: bool,
    /// Requests on each path.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    let mut lab = Lab::new()?;
    let interrupt = Interrupt::watch(lab.cgroup("")?)?;
    match show(&mut lab, options, start, &interrupt) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        // What failed failed because its processes were ended.
        Err(_) if interrupt.happened() => Ok(ExitCode::from(130)),
        Err(error) => Err(error),
    }
}

/// Whether everything went as it should.
fn show(lab: &mut Lab, options: &Options, start: Instant, interrupt: &Interrupt) -> Result<bool> {
    println!("{DRAWING}");
    let mut source = if options.control_plane { Source::control_plane(lab)? } else { Source::directory(lab) };
    let mut manifests = Manifests::hostnames()?;
    source.publish(lab, &manifests)?;
    let agents = NODES.iter().map(|node| Agent::start(lab, node, &source, &[])).collect::<Result<Vec<_>>>()?;
    let from = if options.control_plane { "a real kube-apiserver" } else { "examples/hostnames" };
    println!("  two agents serve the Services of {from}, {:.1} s after the start\n", start.elapsed().as_secs_f32());

    let mut right = balance(lab, options.requests, interrupt)?;
    right &= remove_backend(lab, &mut source, &mut manifests, interrupt)?;
    inspect_node(lab, interrupt)?;
    for (node, agent) in NODES.iter().zip(&agents) {
        println!("  agent on {}: {:.1} MiB resident", node.name, agent.process().resident_kib()? as f64 / 1024.0);
    }
    let verdict = if right { "no request failed, every backend was reached" } else { "NOT AS IT SHOULD BE: see above" };
    println!("\n  {verdict} ({:.0} s)", start.elapsed().as_secs_f32());

    if !options.once && std::io::stdout().is_terminal() {
        print_hints(lab, &source)?;
        interrupt.wait();
        println!("\nremoving the lab");
        return Ok(right);
    }
    interrupt.check()?;
    Ok(right)
}

const DRAWING: &str = "
                 out  172.31.0.99   a client outside the cluster
                  |
   ---------------+---+----- LAN 172.31.0.0/24 fd00:31::/64 --+---------------
                      |                                       |
        node-a  172.31.0.11  svc-agent          node-b  172.31.0.12  svc-agent
          |- client  10.244.1.10                  |- b1  10.244.2.11:9376
          |- a1      10.244.1.11:9376             |- b2  10.244.2.12:9376
          |- a2      10.244.1.12:9376
";

struct Path {
    title: &'static str,
    host: &'static str,
    target: String,
}

fn paths() -> Vec<Path> {
    let path = |title, host, target: String| Path { title, host, target };
    let [a, b] = &NODES;
    vec![
        path("pod -> ClusterIP", CLIENT, CLUSTER_IP.into()),
        path("outside -> node-a's nodePort", OUTSIDE, format!("http://{}:{NODE_PORT}/", a.v4())),
        path("outside -> node-b's nodePort", OUTSIDE, format!("http://{}:{NODE_PORT}/", b.v4())),
        path("node-a -> its own localhost's nodePort", a.name, format!("http://127.0.0.1:{NODE_PORT}/")),
        path("pod -> ClusterIP, IPv6", CLIENT, CLUSTER_IP_V6.into()),
        path("outside -> node-a's nodePort, IPv6", OUTSIDE, format!("http://[{}]:{NODE_PORT}/", a.v6())),
        path("pod -> ClusterIP, UDP echo", CLIENT, ECHO.into()),
        path("outside -> node-b's nodePort, UDP echo", OUTSIDE, format!("udp://{}:{ECHO_NODE_PORT}", b.v4())),
    ]
}

fn balance(lab: &Lab, requests: u32, interrupt: &Interrupt) -> Result<bool> {
    let mut right = true;
    for path in paths() {
        interrupt.check()?;
        let client = client::Options { requests: Some(requests), concurrency: 4, ..client::Options::to(&path.target) };
        let tally = lab.tally(path.host, &client)?;
        println!("{}", chart::draw(&format!("{:<40} {}", path.title, path.target), &tally));
        right &= tally.failed() == 0 && reached(&tally) == all_backends();
    }
    Ok(right)
}

/// A backend leaves while requests go on, from a pod and from outside.
fn remove_backend(lab: &Lab, source: &mut Source, manifests: &mut Manifests, interrupt: &Interrupt) -> Result<bool> {
    const GONE: &str = "b1";
    interrupt.check()?;
    let node_port = format!("http://{}:{NODE_PORT}/", NODES[0].v4());
    let steady = |target: &str| client::Options { rate: Some(200), concurrency: 4, ..client::Options::to(target) };
    let loads = [
        ("pod", Load::start(lab, CLIENT, &steady(CLUSTER_IP))?),
        ("outside", Load::start(lab, OUTSIDE, &steady(&node_port))?),
    ];
    let measure = |title: &str, time: Duration| -> Vec<Tally> {
        thread::sleep(time);
        let tallies: Vec<Tally> = loads.iter().map(|(_, load)| load.tally()).collect();
        for ((from, _), tally) in loads.iter().zip(&tallies) {
            println!("{}", chart::draw(&format!("{title}, from {from}"), tally));
        }
        tallies
    };
    let before = measure("requests go on", Duration::from_secs(1));
    manifests.remove_pod(GONE);
    source.publish(lab, manifests)?;
    let during = measure(&format!("while {GONE} is removed"), Duration::from_millis(500));
    let after = measure(&format!("after {GONE} was removed"), Duration::from_secs(1));
    for (_, load) in loads {
        load.finish()?;
    }

    let left: BTreeSet<&str> = all_backends().into_iter().filter(|name| *name != GONE).collect();
    Ok(before.iter().all(|tally| reached(tally) == all_backends())
        && after.iter().all(|tally| reached(tally) == left)
        && before.iter().chain(&during).chain(&after).all(|tally| tally.failed() == 0))
}

fn inspect_node(lab: &Lab, interrupt: &Interrupt) -> Result<()> {
    let node = &NODES[0];
    for arguments in [&["services"][..], &["backends", "default/hostnames"], &["flows"], &["status"]] {
        interrupt.check()?;
        println!("{} $ svc-agent {} --bpffs {}", node.name, arguments.join(" "), lab.bpffs(node.name).display());
        let text = inspect(lab, node, arguments)?;
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().take(LISTING_LINES) {
            println!("  {line}");
        }
        if lines.len() > LISTING_LINES {
            println!("  ... and {} lines more", lines.len() - LISTING_LINES);
        }
        println!();
    }
    Ok(())
}

fn print_hints(lab: &Lab, source: &Source) -> Result<()> {
    let program = std::env::current_exe()?;
    let program = program.display();
    println!("\nThe lab stays up until Ctrl-C. From another terminal, as root:");
    println!("  {program} enter client                          a shell in the client pod");
    println!("  {program} enter client curl -s {CLUSTER_IP}");
    println!("  {program} enter out curl -s http://{}:{NODE_PORT}/", NODES[1].v4());
    let agent = svc_lab::binaries::agent()?;
    println!("  {} flows --bpffs {}", agent.display(), lab.bpffs(NODES[0].name).display());
    if let Source::Directory(directory) = source {
        println!("  edit the Services: {}", fs::canonicalize(directory)?.display());
    }
    if let Source::ControlPlane(control_plane) = source {
        let kubeconfig = control_plane.admin_kubeconfig();
        println!("  {program} enter cp kubectl --kubeconfig {} get service,endpointslice", kubeconfig.display());
    }
    Ok(())
}

fn reached(tally: &Tally) -> BTreeSet<&str> {
    tally.names().into_iter().collect()
}

fn all_backends() -> BTreeSet<&'static str> {
    BACKENDS.iter().map(|pod| pod.name).collect()
}
