//! The kernel's programs and the engine over memory are the same code in different hands: whatever packets come, both do the
//! same to them. Only the source ports that each gives out at random differ.
use std::collections::HashMap;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestCaseError;
use svc_dataplane::check::{Ends, checksums, view};
use svc_dataplane::memory::Memory;
use svc_dataplane::packet::{ABORT, ACK, DATA, Extension, FIN, INIT, LINK, Packet, RST, SCTP, SHUTDOWN, SYN, TCP, UDP};
use svc_dataplane::tables::Kind::{self, ClusterIp, ExternalIp, LoadBalancer, NodePort};
use svc_dataplane::tables::{Service, Tables};
use svc_dataplane::{Hook, Outcome};
use svc_tests::kernel;

use crate::stage::Client::{self, Host, Network, Pod};
use crate::stage::{FROM_HERE, FROM_NETWORK, MASQUERADED, V4, V6, ends, error_about, frontend, translated};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Request,
    Reply,
    ErrorAboutTheRequest,
    /// Two pieces, in order.
    Pieces,
    /// Without this many of its last bytes.
    Cut(usize),
    /// With IPv4 options or an IPv6 extension header.
    Dressed,
}

/// A connection: who talks to which Service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Connection {
    v4: bool,
    protocol: u8,
    kind: usize,
    from: usize,
    sport: u16,
}

#[derive(Clone, Debug)]
struct Step {
    connection: Connection,
    what: What,
    /// Of those that the protocol has.
    flags: usize,
    hop_limit: u8,
    payload: usize,
    in_front_of_the_stack: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    use What::{Cut, Dressed, ErrorAboutTheRequest, Pieces, Reply, Request};
    let connection = (any::<bool>(), select(vec![TCP, UDP, SCTP]), 0..4usize, 0..3usize, 40_000..40_002u16)
        .prop_map(|(v4, protocol, kind, from, sport)| Connection { v4, protocol, kind, from, sport });
    let what = prop_oneof![
        6 => Just(Request),
        4 => Just(Reply),
        1 => Just(ErrorAboutTheRequest),
        1 => Just(Pieces),
        1 => (1..30usize).prop_map(Cut),
        1 => Just(Dressed),
    ];
    let hop_limit = prop_oneof![5 => Just(64), 1 => Just(1)];
    let payload = prop_oneof![5 => Just(12), 1 => Just(1_300)];
    let step = (connection, what, 0..6usize, hop_limit, payload, any::<bool>()).prop_map(
        |(connection, what, flags, hop_limit, payload, in_front_of_the_stack)| Step {
            connection,
            what,
            flags,
            hop_limit,
            payload,
            in_front_of_the_stack,
        },
    );
    // Few connections, so that many packets meet.
    (prop::collection::vec(step, 1..60), any::<bool>(), 0..3usize).prop_map(|(mut steps, v4, from)| {
        for step in &mut steps {
            step.connection.v4 = v4;
            step.connection.from = from;
        }
        steps
    })
}

const CLIENTS: [Client; 3] = [Network, Pod, Host];

/// Each kind of Service has one backend, or none.
fn tables() -> Tables {
    let mut services = Vec::new();
    for family in [V4, V6] {
        for protocol in [TCP, UDP, SCTP] {
            for kind in Kind::ALL {
                let backends = match kind {
                    ClusterIp => vec![(family.local(), true)],
                    NodePort => vec![(family.remote(), false)],
                    LoadBalancer => vec![(family.narrow(), false)],
                    ExternalIp => Vec::new(),
                };
                let (_, address, port) = frontend(kind, family);
                services.push(Service::new(services.len() as u32 + 1, kind, address, port, protocol, &backends));
            }
        }
    }
    Tables::with(&services)
}

fn request(step: &Step) -> (Hook, Packet) {
    let Connection { v4, protocol, kind, from, sport } = step.connection;
    let family = if v4 { V4 } else { V6 };
    let (hook, client) = CLIENTS[from].of(family);
    let (address, _, port) = frontend(Kind::ALL[kind], family);
    let flags = match protocol {
        TCP => [SYN, SYN, ACK, ACK, FIN | ACK, RST][step.flags],
        SCTP => [INIT, INIT, DATA, DATA, SHUTDOWN, ABORT][step.flags],
        _ => 0,
    };
    let packet = Packet::new(protocol, client, sport, address, port).flags(flags).hop_limit(step.hop_limit);
    let hook = if hook == Hook::Ingress && step.in_front_of_the_stack { Hook::Xdp } else { hook };
    (hook, Packet { payload: vec![7; step.payload], ..packet })
}

/// One of the two, and what it has made of the connections' requests.
struct Side<F> {
    run: F,
    seen: HashMap<Connection, Ends>,
}

impl<F: FnMut(Hook, &[u8]) -> Outcome> Side<F> {
    fn step(&mut self, step: &Step) -> Vec<Outcome> {
        let (hook, request) = request(step);
        let seen = self.seen.get(&step.connection).copied();
        let frames = match (step.what, seen) {
            (What::Request, _) => vec![(hook, request.frame())],
            (What::Pieces, _) => request
                .pieces(if request.protocol == TCP { 24 } else { 16 })
                .map(|piece| (hook, piece.frame()))
                .to_vec(),
            (What::Cut(bytes), _) => {
                let frame = request.frame();
                // A test run takes no packet without a whole network header.
                let length = (frame.len() - bytes).max(LINK + if request.is_v4() { 20 } else { 40 });
                vec![(hook, frame[..length].to_vec())]
            }
            (What::Dressed, _) => {
                let (options, extensions) = (vec![1; 8], vec![Extension::Destination]);
                let dressed =
                    if request.is_v4() { Packet { options, ..request } } else { Packet { extensions, ..request } };
                vec![(hook, dressed.frame())]
            }
            (What::Reply, Some(seen)) => {
                let flags = request.flags;
                let reply = Packet { flags, hop_limit: step.hop_limit, ..translated(&request, seen).reply() };
                self.way_back(step).map(|hook| (hook, reply.frame())).to_vec()
            }
            (What::ErrorAboutTheRequest, Some(seen)) => {
                let there = translated(&request, seen);
                let quoted = &there.network()[..if there.is_v4() { 28 } else { 48 }];
                let kind = if there.is_v4() { (3, 4) } else { (2, 0) };
                let told = error_about(seen.dst, kind, 1400, quoted, seen.src).frame();
                self.way_back(step).map(|hook| (hook, told.clone())).to_vec()
            }
            (What::Reply | What::ErrorAboutTheRequest, None) => Vec::new(),
        };
        let outcomes: Vec<_> = frames.iter().map(|(hook, frame)| (self.run)(*hook, frame)).collect();
        if step.what == What::Request && outcomes[0].moved.contains_key("flow_hit") {
            self.seen.insert(step.connection, ends(&outcomes[0]));
        }
        outcomes
    }

    /// Every hook that a reply could pass.
    fn way_back(&self, step: &Step) -> [Hook; 3] {
        let first = if step.in_front_of_the_stack { Hook::Xdp } else { Hook::Ingress };
        [first, Hook::PodIngress, Hook::Egress]
    }
}

/// The frame with each port that was given out at random as the part of the range that it is of, and so without the sums
/// over it.
fn normal(frame: &[u8]) -> Vec<u8> {
    let seen = view(frame);
    let start = seen.segment.as_ptr() as usize - frame.as_ptr() as usize;
    let mut bytes = frame.to_vec();
    let mut ports = vec![start];
    let is_icmp = seen.protocol == 1 || seen.protocol == 58;
    if is_icmp {
        let (protocol, header) = if seen.src.is_ipv4() { (9, 20) } else { (6, 40) };
        let quoted = start + 8;
        ports = vec![quoted + header];
        bytes[start + 2..start + 4].fill(0);
        if bytes[quoted + protocol] == UDP {
            bytes[quoted + header + 6..quoted + header + 8].fill(0);
        }
    }
    if seen.protocol == TCP || seen.protocol == UDP || seen.protocol == SCTP {
        let (at, length) = match seen.protocol {
            TCP => (16, 2),
            UDP => (6, 2),
            _ => (8, 4),
        };
        if let Some(checksum) = bytes.get_mut(start + at..start + at + length) {
            checksum.fill(0);
        }
    }
    for at in ports.into_iter().flat_map(|at| [at, at + 2]) {
        if let Some(bytes) = bytes.get_mut(at..at + 2) {
            let port = u16::from_be_bytes([bytes[0], bytes[1]]);
            let parts = [MASQUERADED, FROM_NETWORK, FROM_HERE];
            if port != 9376
                && let Some(part) = parts.iter().position(|part| part.contains(&port))
            {
                bytes.copy_from_slice(&[0, part as u8]);
            }
        }
    }
    bytes
}

fn compare(step: &Step, kernel: &[Outcome], memory: &[Outcome]) -> Result<(), TestCaseError> {
    prop_assert_eq!(kernel.len(), memory.len());
    for (kernel, memory) in kernel.iter().zip(memory) {
        prop_assert_eq!((kernel.verdict, &kernel.moved), (memory.verdict, &memory.moved), "{:?}", step);
        if matches!(step.what, What::Cut(_)) {
            continue;
        }
        prop_assert_eq!(normal(&kernel.frame), normal(&memory.frame), "{:?}", step);
        prop_assert_eq!(checksums(&kernel.frame), Ok(()), "{:?}", step);
        prop_assert_eq!(checksums(&memory.frame), Ok(()), "{:?}", step);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_part_does_what_the_engine_does_over_memory(steps in steps()) {
        let tables = tables();
        kernel::with(&tables, |node| {
            let memory = Memory::new(tables.clone(), 1);
            let mut kernel = Side { run: |hook, frame: &[u8]| node.run(hook, frame), seen: HashMap::new() };
            let mut memory = Side { run: |hook, frame: &[u8]| memory.run(hook, frame), seen: HashMap::new() };
            for step in &steps {
                compare(step, &kernel.step(step), &memory.step(step))?;
            }
            Ok::<(), TestCaseError>(())
        })?;
    }
}
