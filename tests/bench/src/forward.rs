//! What a packet costs a node, by live frames: P1 to P4, and P8's packets.
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use svc_dataplane::packet::{ACK, SYN, TCP};

use crate::Effort;
use crate::figure::Figure;
use crate::figure::Goal::{AtLeast, AtMost};
use crate::nodes::{BACKEND_PORT, Contestant, Kind, NODE_PORT, Nodes, named};
use crate::template::BACKENDS;
use crate::wire::{Sample, Traffic};

/// Of what a node takes in, so much is to come out again. On a machine with other work the far end may be kept from its queue for
/// longer than that holds.
const SHARE: f64 = 0.98;
/// With less, a sample is none.
const LEAST_SHARE: f64 = 0.75;
const TRIES: u32 = 4;
/// Each packet begins a flow.
const NEW_FLOWS: u32 = 1 << 24;

impl Effort {
    pub(crate) fn rounds(self) -> u32 {
        if self.quick { 3 } else { 5 }
    }

    fn packets(self, kind: Kind) -> u64 {
        kind.thousands() * if self.quick { 300 } else { 1000 }
    }

    fn flows(self) -> &'static [u32] {
        if self.quick { &[1 << 6, 1 << 14, 1 << 18] } else { &[1 << 6, 1 << 10, 1 << 14, 1 << 18, 1 << 20] }
    }
}

/// A NodePort's packets of known flows: P1, P1t, P2.
pub(crate) fn hits(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let kinds = [Kind::XdpTx, Kind::Lookup, Kind::Redirect, Kind::SvcXdp, Kind::SvcTcx, Kind::Nftables, Kind::Iptables];
    let most = *effort.flows().last().expect("there are some");
    let nodes = Nodes::new(&kinds.map(|kind| (kind, 1)), most)?;
    for flows in effort.flows() {
        for tcp in [false, true] {
            // Half-open flows do not wait for a round of a million.
            if tcp && *flows > if effort.quick { 1 << 6 } else { 1 << 18 } {
                continue;
            }
            let case = format!("{}, {flows} flows", if tcp { "TCP" } else { "UDP" });
            let mut figure = Figure::new("P1", case, "ns a packet")
                .ratio_of("P1", "svc XDP", "XDP look-up", Some(AtMost(1.0)))
                .ratio_of("P1", "XDP_TX", "svc XDP", (*flows == 64).then_some(AtLeast(0.8)))
                .ratio_of("P1t", "svc tcx", "tcx redirect", Some(AtMost(1.15)));
            for (mode, is_target) in [("kube-proxy nftables", true), ("kube-proxy iptables", false)] {
                figure = figure.ratio_of("P2", "svc XDP", mode, is_target.then_some(AtMost(0.1))).ratio_of(
                    "P2",
                    "svc tcx",
                    mode,
                    is_target.then_some(AtMost(0.4)),
                );
            }
            show(known(&nodes, effort, figure, *flows, tcp)?);
        }
    }
    Ok(())
}

/// Packets of flows that were opened before.
fn known(nodes: &Nodes, effort: Effort, figure: Figure, flows: u32, tcp: bool) -> Result<Figure> {
    println!("  {} ...", figure.case);
    let traffic = |contestant: &Contestant, flags: u8| {
        let udp = Traffic::udp(contestant.node, NODE_PORT, flows);
        if tcp { Traffic { protocol: TCP, flags, ..udp } } else { udp }
    };
    for contestant in nodes.contestants.iter().filter(|contestant| contestant.kind.has_flows()) {
        // Connection tracking takes up a connection in its middle, and believes no acknowledgement of an unanswered SYN.
        let flags = if contestant.kind.is_kube_proxy() { ACK } else { SYN };
        open(nodes, contestant, &traffic(contestant, flags))?;
    }
    race(nodes, effort, figure, |contestant| traffic(contestant, ACK), Kind::forwards)
}

/// Begins all flows.
pub(crate) fn open(nodes: &Nodes, contestant: &Contestant, traffic: &Traffic) -> Result<()> {
    nodes.far.open(&contestant.wire, traffic, contestant.kind.pause())
}

/// All contestants in turn, round after round. `forwards`: whether the packets are to go to backends.
fn race(
    nodes: &Nodes,
    effort: Effort,
    mut figure: Figure,
    mut traffic: impl FnMut(&Contestant) -> Traffic,
    forwards: fn(Kind) -> bool,
) -> Result<Figure> {
    for _ in 0..effort.rounds() {
        for contestant in &nodes.contestants {
            let traffic = traffic(contestant);
            figure.add(&contestant.name, sample(nodes, effort, contestant, &traffic, forwards)?.nanoseconds);
        }
    }
    Ok(figure)
}

/// What came out is what went in, but for what the far end had no time for: of several tries the one with the least loss.
pub(crate) fn sample(
    nodes: &Nodes,
    effort: Effort,
    contestant: &Contestant,
    traffic: &Traffic,
    forwards: fn(Kind) -> bool,
) -> Result<Sample> {
    let mut best: Option<(f64, Sample)> = None;
    for _ in 0..TRIES {
        let sample = nodes.far.measure(&contestant.wire, traffic, effort.packets(contestant.kind))?;
        let out = if forwards(contestant.kind) { sample.forwarded } else { sample.arrived };
        let share = out as f64 / sample.taken as f64;
        if best.is_none_or(|(most, _)| share > most) {
            best = Some((share, sample));
        }
        if share >= SHARE {
            break;
        }
    }
    let (share, sample) = best.context("no try")?;
    ensure!(share >= LEAST_SHARE, "{}: of what went in, there came out {share:.3}", contestant.name);
    if share < SHARE {
        println!("    {}: of what went in, there came out {share:.3}", contestant.name);
    }
    Ok(sample)
}

/// Known flows beside many Services, and new flows: P3.
pub(crate) fn services(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let sizes: &[u32] = if effort.quick { &[1, 10_000] } else { &[1, 1_000, 10_000, 100_000] };
    let mut kinds = vec![(Kind::Lookup, 1)];
    for size in sizes {
        kinds.extend([(Kind::SvcXdp, *size), (Kind::SvcTcx, *size)]);
    }
    let flows = 1 << 14;
    let nodes = Nodes::new(&kinds, flows)?;
    let mut figure = Figure::new("P3", format!("UDP, {flows} flows"), "ns a packet");
    for size in &sizes[1..] {
        for kind in [Kind::SvcXdp, Kind::SvcTcx] {
            figure = figure.ratio_of("P3", &named(kind, *size), &named(kind, 1), Some(AtMost(1.05)));
        }
    }
    show(known(&nodes, effort, figure, flows, false)?);

    let figure = Figure::new("P3", "TCP, each packet a new flow".to_owned(), "ns a packet").ratio_of(
        "P3",
        "svc XDP",
        "XDP look-up",
        Some(AtMost(1.0)),
    );
    println!("  {} ...", figure.case);
    let mut turn = 0;
    let figure = race(
        &nodes,
        effort,
        figure,
        |contestant| {
            turn += 1;
            // More than a sample takes, so that a flow comes again only after all others.
            let from = Some(turn << 21);
            let udp = Traffic::udp(contestant.node, NODE_PORT, NEW_FLOWS);
            Traffic { protocol: TCP, flags: SYN, from, ..udp }
        },
        Kind::forwards,
    )?;
    show(figure);
    Ok(())
}

/// Packets that are no Service's: P8.
pub(crate) fn others(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let kinds = [Kind::Plain, Kind::SvcXdp, Kind::SvcTcx, Kind::Nftables, Kind::Iptables];
    let all = effort.flows();
    let flows: Vec<u32> = all.iter().copied().filter(|flows| ![1 << 10, 1 << 20].contains(flows)).collect();
    let nodes = Nodes::new(&kinds.map(|kind| (kind, 1)), 1 << 18)?;
    let [a, b] = BACKENDS;
    for flows in flows {
        let mut figure = Figure::new("P8", format!("packets of no Service, UDP, {flows} flows"), "ns a packet");
        for kind in &kinds[1..] {
            let goal = (!kind.is_kube_proxy()).then_some(AtMost(1.05));
            figure = figure.ratio_of("P8", &named(*kind, 1), "plain routing", goal);
        }
        println!("  {} ...", figure.case);
        let traffic = Traffic::udp(Ipv4Addr::new(a, b, 0, 1), BACKEND_PORT, flows);
        for contestant in nodes.contestants.iter().filter(|contestant| contestant.kind.is_kube_proxy()) {
            nodes.far.open(&contestant.wire, &traffic, contestant.kind.pause())?;
        }
        show(race(&nodes, effort, figure, |_| traffic, |_| true)?);
    }
    Ok(())
}

/// How much later a flow's first packet arrives than by plain routing: P4.
pub(crate) fn first_packets(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let sizes: &[u32] = if effort.quick { &[1_000] } else { &[1, 1_000, 30_000] };
    for services in sizes {
        delays(*services, effort, show)?;
    }
    Ok(())
}

fn delays(services: u32, effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let mut kinds = vec![(Kind::Plain, 1)];
    kinds.extend([Kind::SvcXdp, Kind::SvcTcx, Kind::Nftables].map(|kind| (kind, services)));
    // With more, iptables takes longer than all that is compared.
    if services <= 1_000 {
        kinds.push((Kind::Iptables, services));
    }
    let nodes = Nodes::with_far_end(&kinds, 1 << 18, false)?;
    let nftables = named(Kind::Nftables, services);
    let figure = |what: &str| {
        let mut figure = Figure::new("P4", format!("{what}, {services} Services"), "us");
        for kind in [Kind::SvcXdp, Kind::SvcTcx] {
            figure = figure.ratio_of("P4", &named(kind, services), &nftables, Some(AtMost(0.1)));
        }
        figure
    };
    let parts = [("p50", 0.5), ("p99", 0.99)];
    let mut added = parts.map(|(name, _)| figure(&format!("first packet's added latency, {name}")));
    let mut whole = parts.map(|(name, _)| {
        Figure::new("P4", format!("first packet from its making to the far end, {name}, {services} Services"), "us")
    });
    let packets = if effort.quick { 4_000 } else { 20_000 };
    let [a, b] = BACKENDS;
    println!("  first packets, {services} Services ...");
    for round in 0..effort.rounds() {
        let mut plain = [0.0; 2];
        for contestant in &nodes.contestants {
            let is_plain = contestant.kind == Kind::Plain;
            let (to, port) =
                if is_plain { (Ipv4Addr::new(a, b, 0, 1), BACKEND_PORT) } else { (contestant.node, NODE_PORT) };
            let traffic = Traffic { from: Some(round << 20), ..Traffic::udp(to, port, NEW_FLOWS) };
            let ages = nodes.far.ages(&contestant.wire, &traffic, packets)?;
            ensure!(ages.len() as f64 >= SHARE * f64::from(packets), "{}: {} arrived", contestant.name, ages.len());
            for (index, (_, part)) in parts.iter().enumerate() {
                let age = f64::from(ages[((ages.len() - 1) as f64 * part) as usize]) / 1000.0;
                whole[index].add(&contestant.name, age);
                if is_plain {
                    plain[index] = age;
                } else {
                    added[index].add(&contestant.name, age - plain[index]);
                }
            }
        }
    }
    added.into_iter().chain(whole).for_each(show);
    Ok(())
}
