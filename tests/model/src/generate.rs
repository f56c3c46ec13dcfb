//! Cases, small ones that meet: few Services, few connections.
use std::net::IpAddr;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use svc_dataplane::packet::{Extension, SCTP, TCP, UDP};
use svc_dataplane::tables::{Kind, Service, Settings};
use svc_dataplane::{Hook, net};

use crate::case::{Case, Connection, Oddity, Shape, SocketKind, SourcePort, Step, Until, What};
use crate::world::World;

fn ip(v4: bool, four: &str, six: &str) -> IpAddr {
    (if v4 { four } else { six }).parse().expect("an address")
}

/// Who could be a backend, and whether it is on this node.
fn backend(v4: bool, at: usize) -> (IpAddr, bool) {
    match at {
        0 => (ip(v4, "10.244.1.5", "fd00:244:1::5"), true),
        1 => (ip(v4, "10.244.1.6", "fd00:244:1::6"), true),
        2 => (ip(v4, "10.244.2.5", "fd00:244:2::5"), false),
        // Behind a link that takes small packets only; whose neighbour is not known; outside the cluster; out of reach.
        3 => (ip(v4, "10.244.3.5", "fd00:244:3::5"), false),
        4 => (ip(v4, "10.244.4.5", "fd00:244:4::5"), false),
        5 => (ip(v4, "203.0.113.50", "2001:db8:c::50"), false),
        _ => (ip(v4, "10.99.0.1", "fd00:99::1"), false),
    }
}
const BACKENDS: usize = 7;

fn client(v4: bool, at: usize) -> (Hook, IpAddr) {
    match at {
        0 => (Hook::Ingress, ip(v4, "203.0.113.7", "2001:db8:c::7")),
        1 => (Hook::Xdp, ip(v4, "203.0.113.8", "2001:db8:c::8")),
        // A pod of another node.
        2 => (Hook::Ingress, ip(v4, "10.244.2.9", "fd00:244:2::9")),
        3 => (Hook::PodIngress, ip(v4, "10.244.1.9", "fd00:244:1::9")),
        // A pod that may be a backend, too.
        4 => (Hook::PodIngress, ip(v4, "10.244.1.5", "fd00:244:1::5")),
        // What stands behind a pod's interface and is none of the pods' range: a virtual machine.
        5 => (Hook::PodIngress, ip(v4, "203.0.113.60", "2001:db8:c::60")),
        6 => (Hook::Egress, ip(v4, "192.0.2.1", "2001:db8::1")),
        _ => (Hook::Egress, ip(v4, "198.18.0.1", "2001:db8:18::1")),
    }
}
const CLIENTS: usize = 8;

/// What its frontend of this kind is found by; a NodePort has the unspecified address.
fn frontend(v4: bool, kind: Kind, id: u32, on_node: bool) -> (IpAddr, u16) {
    let port = 80 + id as u16;
    match kind {
        // Services with several ports share their addresses.
        Kind::ClusterIp => (ip(v4, "10.96.0.10", "fd00:96::10"), port),
        Kind::NodePort => (ip(v4, "0.0.0.0", "::"), 30_080 + id as u16),
        Kind::ExternalIp if on_node => (ip(v4, "192.0.2.1", "2001:db8::1"), 8080 + id as u16),
        Kind::ExternalIp => (ip(v4, "198.51.100.10", "2001:db8:e::10"), port),
        Kind::LoadBalancer => (ip(v4, "198.51.100.20", "2001:db8:e::20"), port),
    }
}

/// The frontends of one Service port, of which there is at least one.
fn service(id: u32) -> impl Strategy<Value = Vec<Service>> {
    let backends = prop_oneof![1 => Just(0u8), 4 => (0..BACKENDS).prop_map(|at| 1 << at), 6 => 0..1u8 << BACKENDS];
    let ranges = prop_oneof![8 => Just(None), 1 => (0..4usize).prop_map(Some)];
    let affinity = prop_oneof![4 => Just(0u32), 1 => Just(30u32), 1 => Just(10_800u32)];
    let policies = (prop::bool::weighted(0.25), prop::bool::weighted(0.25));
    let where_from = (any::<bool>(), select(vec![TCP, TCP, UDP, UDP, SCTP]), 1..16u8, any::<bool>());
    (where_from, backends, ranges, affinity, policies, any::<bool>()).prop_map(
        move |((v4, protocol, kinds, on_node), backends, ranges, affinity_seconds, policies, same_port)| {
            let of = Kind::ALL.into_iter().enumerate().filter(|(at, _)| kinds >> at & 1 != 0);
            let frontends = of.map(|(_, kind)| {
                let (address, port) = frontend(v4, kind, id, on_node);
                let backends = (0..BACKENDS).filter(|at| backends >> at & 1 != 0);
                let backends = backends.map(|at| {
                    let (to, local) = backend(v4, at);
                    (to, if same_port { 80 + id as u16 } else { 9376 }, local)
                });
                Service {
                    backends: backends.collect(),
                    internal_local: policies.0,
                    external_local: policies.1,
                    source_ranges: ranges.filter(|_| kind != Kind::ClusterIp).map(|at| source_ranges(v4, at)),
                    affinity_seconds,
                    ..Service::new(id, kind, address, port, protocol, &[])
                }
            });
            frontends.collect()
        },
    )
}

fn source_ranges(v4: bool, at: usize) -> Vec<(IpAddr, u8)> {
    match at {
        0 => Vec::new(),
        1 => vec![(ip(v4, "203.0.113.7", "2001:db8:c::7"), if v4 { 32 } else { 128 })],
        2 => vec![(ip(v4, "10.244.0.0", "fd00:244::"), if v4 { 16 } else { 32 })],
        _ => vec![(ip(v4, "0.0.0.0", "::"), 0)],
    }
}

fn settings() -> impl Strategy<Value = Settings> {
    let rarely = || prop::bool::weighted(0.2);
    (rarely(), rarely(), rarely()).prop_map(|(masquerade_all, detect_pods_v4, detect_pods_v6)| Settings {
        masquerade_all,
        detect_pods_v4,
        detect_pods_v6,
        ..Settings::default()
    })
}

/// Few source ports: 28 for masqueraded flows.
const FEW_PORTS: (u16, u16) = (1024, 1055);

fn world() -> impl Strategy<Value = World> {
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Short {
        Nothing,
        Ports,
        Room,
    }
    let services = (service(1), service(2), service(3), 1..=3usize);
    let short = prop_oneof![8 => Just(Short::Nothing), 2 => Just(Short::Ports), 1 => Just(Short::Room)];
    (services, settings(), short).prop_map(|((a, b, c, count), settings, short)| {
        let services = [a, b, c].into_iter().take(count).flatten().collect();
        let mut world = World { services, settings, sockets: Vec::new() };
        match short {
            Short::Nothing => (),
            Short::Ports => world.settings.source_ports = FEW_PORTS,
            Short::Room => world.settings.flow_sets = 1,
        }
        if short != Short::Nothing {
            // Who is out of reach never shows its port, and what is free would be a guess.
            for service in &mut world.services {
                let out_of_reach = backend(service.address.is_ipv4(), BACKENDS - 1).0;
                service.backends.retain(|(to, ..)| *to != out_of_reach);
                if short == Short::Ports {
                    service.affinity_seconds = 0;
                }
            }
        }
        world
    })
}

/// Numbers that become a connection once there is a world.
type Talk = (usize, usize, usize, usize);

fn connection((who, to, sport, at): Talk, world: &World) -> Connection {
    let service = &world.services[at % world.services.len()];
    let v4 = service.address.is_ipv4();
    let (hook, client) = client(v4, who);
    let to = match to {
        // A NodePort is had at each address of the node.
        0..=7 if service.kind == Kind::NodePort && to % 2 == 0 => {
            (ip(v4, "198.18.0.1", "2001:db8:18::1"), service.port)
        }
        0..=7 if service.kind == Kind::NodePort => (ip(v4, "192.0.2.1", "2001:db8::1"), service.port),
        0..=7 => (service.address, service.port),
        // Ports that no Service has, and an address.
        8 => (ip(v4, "10.96.0.10", "fd00:96::10"), 7777),
        9 => (ip(v4, "192.0.2.1", "2001:db8::1"), 7777),
        10 => (ip(v4, "10.96.0.99", "fd00:96::99"), 80),
        // A backend itself.
        _ => {
            let mut backends = service.backends.iter().filter(|(to, ..)| net::route(*to).is_some());
            backends.next().map_or((backend(v4, to % 3).0, 9376), |(to, port, _)| (*to, *port))
        }
    };
    let sport = match sport {
        0..=3 => SourcePort::Fixed(40_000),
        4 | 5 => SourcePort::Fixed(40_001),
        6 => SourcePort::Fixed(1023),
        7 => SourcePort::Fixed(9376),
        8 => SourcePort::Fixed(service.port),
        _ => SourcePort::GivenTo(sport),
    };
    Connection { hook, protocol: service.protocol, client, sport, to }
}

fn oddity() -> impl Strategy<Value = Oddity> {
    let extension = prop_oneof![
        select(vec![
            Extension::HopByHop,
            Extension::Routing,
            Extension::Destination,
            Extension::Authentication,
            Extension::Atomic,
        ]),
        (1..60usize).prop_map(|words| Extension::Long(words * 8)),
    ];
    prop_oneof![
        40 => Just(Oddity::None),
        3 => Just(Oddity::FirstPiece),
        3 => Just(Oddity::LaterPiece),
        1 => (1..=10usize).prop_map(Oddity::Options),
        2 => vec(extension, 1..=6).prop_map(Oddity::Extensions),
        1 => Just(Oddity::NoChecksum),
        2 => (1..70usize).prop_map(Oddity::Cut),
        1 => (1..30usize).prop_map(Oddity::Padded),
        1 => Just(Oddity::Tagged),
        2 => ((12..120usize), 1..=255u8).prop_map(|(at, change)| Oddity::Mutated(at, change)),
        1 => Just(Oddity::Mapped),
    ]
}

fn shape() -> impl Strategy<Value = Shape> {
    let hop_limit = prop_oneof![12 => Just(64u8), 1 => 0..=2u8, 1 => Just(255u8)];
    let payload = prop_oneof![10 => 0..20usize, 1 => Just(1300usize), 1 => 1240..1500usize];
    (0..8usize, hop_limit, payload, oddity()).prop_map(|(flags, hop_limit, payload, oddity)| Shape {
        flags,
        hop_limit,
        payload,
        oddity,
    })
}

/// What a subject can bear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Its clock may be put forward.
    Memory,
    /// Time goes by as it does, and to change a Service takes long: cases have more packets.
    Kernel,
}

fn step(scope: Scope) -> impl Strategy<Value = Step> {
    let what = prop_oneof![
        10 => Just(What::Request),
        7 => Just(What::Reply),
        1 => Just(What::ToSomebodyElse),
        1 => Just(What::ErrorAboutRequest),
        1 => Just(What::ErrorAboutReply),
        1 => Just(What::Direct),
        1 => Just(What::ReplyToDirect),
    ];
    // Requests mostly where their client is, all else anywhere.
    let hook = (0..5usize, 0..10u8).prop_map(|(at, chance)| (Hook::ALL[at], chance));
    let send = (0..8usize, what, shape(), hook).prop_map(|(connection, what, shape, (hook, chance))| {
        let natural = match what {
            What::Request | What::Direct => chance > 0,
            What::ErrorAboutReply => chance > 4,
            _ => false,
        };
        Step::Send { connection, what, shape, hook: (!natural).then_some(hook) }
    });
    let seconds = prop_oneof![3 => 1..5u32, 2 => 20..70u32, 1 => 100..400u32, 1 => Just(100_000u32)];
    let bytes = (select(Hook::ALL.to_vec()), any::<bool>(), vec(any::<u8>(), 40..120)).prop_map(|(hook, v4, rest)| {
        let (ethertype, version) = if v4 { ([8, 0], 0x45) } else { ([0x86, 0xdd], 0x60) };
        let bytes = [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0xfe][..], &ethertype, &[version], &rest].concat();
        Step::Bytes { hook, bytes }
    });
    let until = prop_oneof![
        1 => Just(Until::Request),
        1 => Just(Until::Reply),
        3 => Just(Until::Handshake),
        1 => Just(Until::Reset),
    ];
    let flood = (0..8usize, any::<bool>());
    let kind = prop_oneof![any::<bool>().prop_map(|any| SocketKind::Bound { any }), Just(SocketKind::Connected)];
    let all = FEW_PORTS.1 - FEW_PORTS.0 + 1;
    let ports = prop_oneof![1 => Just((0, all)), 1 => Just((0, 0)), 2 => (0..all, 1..all)];
    let sockets = (0..8usize, kind, ports);
    prop_oneof![
        if scope == Scope::Memory { 800 } else { 2000 } => send,
        20 => (0..8usize, 1..40u16, until).prop_map(|(connection, count, until)| Step::Crowd { connection, count, until }),
        40 => seconds.prop_map(move |seconds| Step::Wait { seconds: if scope == Scope::Memory { seconds } else { 0 } }),
        40 => (1..=3u32, any::<u8>()).prop_map(|(service, present)| Step::Backends { service, present }),
        20 => (0..12usize).prop_map(|frontend| Step::Toggle { frontend }),
        20 => bytes,
        if scope == Scope::Memory { 1 } else { 6 } => flood.prop_map(move |(connection, answered)| {
            // What is answered is another frame then, which the kernel's flood would go on with.
            Step::Flood { connection, answered: answered && scope == Scope::Memory }
        }),
        if scope == Scope::Memory { 20 } else { 100 } => sockets.prop_map(|(connection, kind, (first, count))| Step::Sockets { connection, kind, first, count }),
    ]
}

pub fn cases(scope: Scope) -> impl Strategy<Value = Case> {
    let talk = (0..CLIENTS, 0..13usize, 0..12usize, 0..12usize);
    let steps = if scope == Scope::Memory { 1..60 } else { 1..150 };
    (world(), vec(talk, 1..8), vec(step(scope), steps)).prop_map(|(world, talks, steps)| {
        let connections = talks.into_iter().map(|talk| connection(talk, &world)).collect();
        Case { world, connections, steps }
    })
}
