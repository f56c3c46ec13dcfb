//! What it costs a node's traffic to be counted and watched: P13.
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use svc_dataplane::packet::ACK;
use svc_lab::binaries;
use svc_lab::process::Process;
use svc_lab::topology::{Lab, NODES, Node};

use crate::Effort;
use crate::figure::Figure;
use crate::figure::Goal::AtMost;
use crate::forward::{open, sample};
use crate::nodes::{Contestant, Kind, NODE_PORT, Nodes};
use crate::wire::Traffic;

/// What is noise on a machine with nothing else to do.
const NOTHING: f64 = 1.02;

/// A NodePort's packets of known flows, with and without somebody who counts or looks.
pub(crate) fn rows(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let kinds = [Kind::SvcXdp, Kind::SvcTcx, Kind::SvcXdpCounting, Kind::SvcTcxCounting].map(|kind| (kind, 1));
    let nodes = Nodes::new(&kinds, 1 << 18)?;
    for flows in [1 << 6, 1 << 14] {
        let mut figure = Figure::new("P13", format!("UDP, {flows} flows"), "ns a packet");
        for name in ["svc XDP", "svc tcx"] {
            figure = figure.ratio_of("P13", &format!("{name}, watched"), name, Some(AtMost(NOTHING))).ratio_of(
                "P13",
                &format!("{name}, counting bytes"),
                name,
                None,
            );
        }
        println!("  {} ...", figure.case);
        let traffic =
            |contestant: &Contestant, flags: u8| Traffic { flags, ..Traffic::udp(contestant.node, NODE_PORT, flows) };
        for contestant in &nodes.contestants {
            open(&nodes, contestant, &traffic(contestant, ACK))?;
        }
        for _ in 0..effort.rounds() {
            for contestant in &nodes.contestants {
                let taken = sample(&nodes, effort, contestant, &traffic(contestant, ACK), Kind::forwards)?;
                figure.add(&contestant.name, taken.nanoseconds);
            }
            let _watchers = watch_all(nodes.first_lab())?;
            for contestant in nodes.contestants.iter().filter(|contestant| contestant.kind.is_plain_svc()) {
                let taken = sample(&nodes, effort, contestant, &traffic(contestant, ACK), Kind::forwards)?;
                figure.add(&format!("{}, watched", contestant.name), taken.nanoseconds);
            }
        }
        show(figure);
    }
    Ok(())
}

fn watch_all(lab: &Lab) -> Result<Vec<Watchers>> {
    let watchers = NODES.iter().map(|node| Watchers::start(lab, node)).collect::<Result<_>>()?;
    // They look every second or two.
    thread::sleep(Duration::from_secs(3));
    Ok(watchers)
}

/// `monitor` and `top`, open as an administrator has them. They end when this is dropped.
struct Watchers {
    _processes: [Process; 2],
}

impl Watchers {
    fn start(lab: &Lab, node: &Node) -> Result<Self> {
        let agent = binaries::agent()?;
        let bpffs = lab.bpffs(node.name);
        let mut monitor = Command::new(&agent);
        monitor.args(["monitor", "--bpffs"]).arg(&bpffs);
        // It needs a terminal, which script(1) makes.
        let mut top = Command::new("script");
        top.args(["--quiet", "--return", "--command"]);
        top.arg(format!("{} top --bpffs {}", agent.display(), bpffs.display())).arg("/dev/null");
        let spawn = |mut command: Command| {
            command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
            lab.spawn(node.name, command)
        };
        Ok(Watchers { _processes: [spawn(monitor)?, spawn(top)?] })
    }
}
