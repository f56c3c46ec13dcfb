//! The kernel part's programs by themselves (BPF_PROG_TEST_RUN), beside an empty one and beside one that looks something up.
//!
//! A generator makes the packets, and is a part of each figure; `nothing` is the generator alone.
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use anyhow::{Result, ensure};
use aya::include_bytes_aligned;
use aya::programs::{ProgramFd, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use svc_agent::sys::{self, Plain};
use svc_common::Addr;
use svc_common::map::{
    ADDRESS_CLUSTER_IP, Backend, BackendSlot, FRONTEND_CLUSTER_IP, Frontend, FrontendKey, cluster_set, local_set,
};
use svc_dataplane::packet::{ACK, Packet, SYN, TCP, UDP};
use svc_dataplane::tables::{Kind, Service, Tables};
use svc_dataplane::{Hook, net};
use svc_tests::kernel::{self, Kernel, Sizes};
use svc_tests::test_run::{Context, run};

use crate::Effort;
use crate::figure::Figure;
use crate::template::{Template, WORDS};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.o"));

// SAFETY: integers without padding.
unsafe impl Plain for Template {}

const NODE_PORT: u16 = 30_080;
/// Room for a million flows at half of the cells.
const FLOW_SETS: u32 = 1 << 20;
/// Towards each of which there are 25,000 source ports. So many that of a million half-open flows none has to give its port up to
/// another.
const BACKENDS: u8 = 240;
const FIRST_PORT: u16 = 32_768;

#[derive(Clone, Copy, Debug)]
struct Case {
    v4: bool,
    protocol: u8,
    services: u32,
}

impl Case {
    fn name(&self) -> String {
        let protocol = if self.protocol == TCP { "TCP" } else { "UDP" };
        format!("IPv{} {protocol}, {} services", if self.v4 { 4 } else { 6 }, self.services)
    }

    /// A client's packet; its flow is what a generator writes into it.
    fn packet(&self, flags: u8) -> Packet {
        let (client, node) = if self.v4 { ("203.0.113.7", "192.0.2.1") } else { ("2001:db8:c::7", "2001:db8::1") };
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        Packet { flags, ..Packet::new(self.protocol, ip(client), 40_000, ip(node), NODE_PORT) }
    }

    fn template(&self, flags: u8, mask: u32, in_turn: bool, first: u32) -> Template {
        let mut frame = self.frame(flags);
        frame.truncate(WORDS * 8);
        let words = frame.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")));
        let (address, port) = if self.v4 { (28, 34) } else { (36, 54) };
        Template {
            header: words.collect::<Vec<_>>().try_into().expect("as many words"),
            mask,
            in_turn: in_turn.into(),
            address,
            port,
            first,
            first_port: FIRST_PORT.into(),
        }
    }

    fn frame(&self, flags: u8) -> Vec<u8> {
        let mut frame = self.packet(flags).frame();
        frame.resize(frame.len().max(WORDS * 8), 0);
        frame
    }

    /// The one NodePort, and as many other Services.
    fn tables(&self) -> Tables {
        let any = if self.v4 { "0.0.0.0" } else { "::" };
        let backends: Vec<(IpAddr, bool)> = (1..=BACKENDS)
            .map(|number| {
                let text = if self.v4 { format!("10.244.2.{number}") } else { format!("fd00:244:2::{number:x}") };
                (text.parse().expect("an address"), false)
            })
            .collect();
        let any = any.parse().expect("an address");
        let service = Service::new(1, Kind::NodePort, any, NODE_PORT, self.protocol, &backends);
        let mut tables = Tables::with(&[service]);
        tables.config.flow_sets = FLOW_SETS;
        for id in 2..=self.services {
            let address = Addr::from(IpAddr::from((0x0a60_0000 + id).to_be_bytes()));
            let backend = Backend {
                addr: Addr::from(IpAddr::from((0x0af4_0000 + id).to_be_bytes())),
                port: 9376u16.to_be(),
                protocol: self.protocol,
                live: 1,
                service: id,
            };
            let number = u32::from(BACKENDS) + id;
            tables.backends.insert(number, backend);
            let slot = BackendSlot { addr: backend.addr, port: backend.port, flags: 0, id: number };
            tables.sets.insert(cluster_set(id), vec![slot]);
            tables.sets.insert(local_set(id), Vec::new());
            tables.addresses.insert(address, ADDRESS_CLUSTER_IP);
            let frontend = Frontend { service: id, flags: FRONTEND_CLUSTER_IP, affinity_seconds: 0 };
            tables.frontends.insert(FrontendKey::new(address, 80u16.to_be(), self.protocol), frontend);
        }
        tables
    }

    fn sizes(&self) -> Sizes {
        Sizes { flow_sets: FLOW_SETS, services: self.services + 16, backends: self.services + u32::from(BACKENDS) + 16 }
    }
}

/// The generators and the floors, loaded in the calling thread's network namespace.
pub(crate) struct Bench(Ebpf);

#[derive(Clone, Copy, PartialEq, Debug)]
enum Contestant {
    Nothing,
    Empty,
    Lookup,
    Xdp,
    Redirect,
    Tcx,
}

impl Contestant {
    const ALL: [Contestant; 6] = [
        Contestant::Nothing,
        Contestant::Empty,
        Contestant::Lookup,
        Contestant::Xdp,
        Contestant::Redirect,
        Contestant::Tcx,
    ];

    fn name(self) -> &'static str {
        match self {
            Contestant::Nothing => "nothing",
            Contestant::Empty => "XDP_TX",
            Contestant::Lookup => "XDP look-up",
            Contestant::Xdp => "svc XDP",
            Contestant::Redirect => "tcx redirect",
            Contestant::Tcx => "svc tcx",
        }
    }

    fn is_tc(self) -> bool {
        matches!(self, Contestant::Redirect | Contestant::Tcx)
    }
}

impl Bench {
    pub(crate) fn load() -> Result<Self> {
        let mut ebpf = EbpfLoader::new().btf(None).load(OBJECT)?;
        for name in
            ["generate_xdp", "generate_only", "empty_xdp", "lookup_xdp", "generate_live", "lookup_live", "arrive"]
        {
            let program: &mut Xdp = ebpf.program_mut(name).expect("it is in the object").try_into()?;
            program.load()?;
        }
        for name in ["generate_tc", "redirect_tc"] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).expect("it is in the object").try_into()?;
            program.load()?;
        }
        Ok(Bench(ebpf))
    }

    pub(crate) fn map(&self, name: &str) -> BorrowedFd<'_> {
        use aya::maps::Map;
        let (Map::Array(map) | Map::ProgramArray(map)) = self.0.map(name).expect("it is in the object") else {
            panic!("{name} is of an unknown type");
        };
        map.fd().as_fd()
    }

    pub(crate) fn program(&self, name: &str) -> Result<&ProgramFd> {
        let program = self.0.program(name).expect("it is in the object");
        Ok(program.fd()?)
    }

    /// Nanoseconds for each of as many packets.
    fn run(&self, node: &Kernel, contestant: Contestant, template: &Template, packets: u32) -> Result<f64> {
        sys::update(self.map("TEMPLATE"), &0u32, template)?;
        let target = match contestant {
            Contestant::Nothing => None,
            Contestant::Empty => Some(self.program("empty_xdp")?.as_fd()),
            Contestant::Lookup => Some(self.program("lookup_xdp")?.as_fd()),
            Contestant::Xdp => Some(node.program(Hook::Xdp)),
            Contestant::Redirect => Some(self.program("redirect_tc")?.as_fd()),
            Contestant::Tcx => Some(node.program(Hook::Ingress)),
        };
        let (array, generator) = match contestant {
            Contestant::Nothing => ("XDP", "generate_only"),
            contestant if contestant.is_tc() => ("TC", "generate_tc"),
            _ => ("XDP", "generate_xdp"),
        };
        if let Some(target) = target {
            sys::update(self.map(array), &0u32, &(target.as_raw_fd() as u32))?;
        }
        let context =
            Context { xdp: !contestant.is_tc(), interface: net::UPLINK, repeat: packets, ..Context::default() };
        let frame: Vec<u8> = template.header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Ok(run(self.program(generator)?.as_fd(), context, &frame)?.nanoseconds.into())
    }
}

/// Known flows, one after the other at random.
pub(crate) fn hits(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let (many, rounds, packets) = if effort.quick { (1, 5, 200_000) } else { (100_000, 9, 400_000) };
    let flows: &[u32] = if effort.quick { &[1 << 6, 1 << 18] } else { &[1 << 6, 1 << 10, 1 << 14, 1 << 18, 1 << 20] };
    let mut cases = vec![
        Case { v4: true, protocol: UDP, services: 1 },
        Case { v4: true, protocol: TCP, services: 1 },
        Case { v4: false, protocol: UDP, services: 1 },
    ];
    if many > 1 {
        cases.push(Case { v4: true, protocol: UDP, services: many });
        cases.push(Case { v4: false, protocol: UDP, services: many });
    }
    for case in cases {
        let mut figures = Vec::new();
        on(case, |node, bench| {
            for flows in flows {
                node.forget();
                // By XDP and by tcx alike, so both find all of them.
                let open = case.template(SYN, flows - 1, true, 0);
                for contestant in [Contestant::Lookup, Contestant::Xdp] {
                    bench.run(node, contestant, &open, *flows)?;
                }
                node.moved();
                let template = case.template(ACK, flows - 1, false, 0);
                let figure = Figure::new("P1p", format!("{}, {flows} flows", case.name()), "ns a packet");
                let figure = race(bench, node, figure, rounds, packets, |_| template)?;
                let moved = node.moved();
                let expected = 2 * u64::from(rounds * packets);
                ensure!(moved.get("flow_hit") == Some(&expected) && moved.len() == 1, "{}: {moved:?}", figure.case);
                figures.push(figure);
            }
            Ok(())
        })?;
        figures.drain(..).for_each(&mut *show);
    }
    Ok(())
}

/// Each packet begins a flow.
pub(crate) fn opens(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let (rounds, packets) = if effort.quick { (5, 50_000) } else { (9, 100_000) };
    let mut cases = vec![Case { v4: true, protocol: TCP, services: 1 }, Case { v4: false, protocol: TCP, services: 1 }];
    if !effort.quick {
        cases.push(Case { v4: true, protocol: TCP, services: 100_000 });
    }
    for case in cases {
        let figure = on(case, |node, bench| {
            node.forget();
            node.moved();
            let figure = Figure::new("P3p", case.name(), "ns a packet");
            let figure = race(bench, node, figure, rounds, packets, |turn| {
                case.template(SYN, (1 << 24) - 1, true, turn * packets)
            })?;
            let moved = node.moved();
            let expected = 2 * u64::from(rounds * packets);
            ensure!(moved.get("flow_opened") == Some(&expected), "{}: {moved:?}", figure.case);
            Ok(figure)
        })?;
        show(figure);
    }
    Ok(())
}

/// All contestants in turn, round after round, on one CPU.
fn race(
    bench: &Bench,
    node: &Kernel,
    figure: Figure,
    rounds: u32,
    packets: u32,
    template: impl Fn(u32) -> Template,
) -> Result<Figure> {
    let mut figure = figure.ratio("XDP_TX", "svc XDP").ratio("svc XDP", "XDP look-up").ratio("svc tcx", "tcx redirect");
    let mut turn = 0;
    for _ in 0..rounds {
        for contestant in Contestant::ALL {
            figure.add(contestant.name(), bench.run(node, contestant, &template(turn), packets)?);
            turn += 1;
        }
    }
    Ok(figure)
}

fn on<T: Send>(case: Case, measure: impl FnOnce(&mut Kernel, &Bench) -> Result<T> + Send) -> Result<T> {
    println!("  {} ...", case.name());
    kernel::with_sizes(case.sizes(), &case.tables(), |node| measure(node, &Bench::load()?))
}
