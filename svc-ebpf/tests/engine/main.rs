//! The engine over memory: the same code as in the kernel, without one.
mod linkless;
mod world;

use svc_common::Reason;
use svc_common::map::{
    ADDRESS_CLUSTER_IP, ADDRESS_NODE, CIDR_SERVICES, CONFIG_TAKE_OVER, FRONTEND_EXTERNAL_LOCAL, FRONTEND_NODE_PORT,
    FRONTEND_SOURCE_RANGES, TCP, UDP,
};
use svc_ebpf::parse::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use svc_ebpf::wire::Next;
use world::{Frame, World, addr};

const CLIENT: &str = "192.0.2.7";
const NODE: &str = "192.0.2.1";
const LOCAL: &str = "10.244.1.5";
const REMOTE: &str = "10.244.2.5";
const VIP: &str = "10.96.0.10";

fn node_port(world: &mut World, backends: &[(&str, bool)], flags: u32) {
    world.address(NODE, ADDRESS_NODE);
    world.service(7, "0.0.0.0", 30080, TCP, FRONTEND_NODE_PORT | flags, backends);
}

fn syn() -> Frame {
    Frame::tcp(CLIENT, 4000, NODE, 30080, TCP_SYN)
}

#[test]
fn what_is_no_services_passes_untouched() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    let mut frame = Frame::tcp(CLIENT, 4000, NODE, 22, TCP_SYN);
    let before = frame.clone();
    assert_eq!(world.ingress(&mut frame), Err(Reason::NotService));
    assert_eq!(frame, before);
    assert_eq!(world.counts(), []);
}

#[test]
fn a_local_backend_sees_the_client_and_its_reply_comes_from_the_frontend() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    let mut frame = syn();
    assert_eq!(world.ingress(&mut frame), Ok(Next::Stack));
    let (src, port, dst, dport) = frame.endpoints();
    assert_eq!((src.as_str(), dst.as_str(), dport), (CLIENT, LOCAL, 9376));
    assert!((15_000..=29_999).contains(&port), "a port that the client does not choose by itself: {port}");
    assert!(frame.checksums_are_right());
    let mut reply = Frame::tcp(LOCAL, 9376, CLIENT, port, TCP_SYN | TCP_ACK);
    assert_eq!(world.egress(&mut reply), Ok(Next::Stack));
    assert_eq!(reply.endpoints(), (NODE.into(), 30080, CLIENT.into(), 4000));
    assert!(reply.checksums_are_right());
    assert_eq!(world.counts(), [(Reason::FlowHit, 1), (Reason::FlowOpened, 1), (Reason::Reply, 1)]);
}

#[test]
fn a_remote_backend_sees_the_node_and_its_reply_goes_back_to_the_client() {
    let mut world = World::default();
    node_port(&mut world, &[(REMOTE, false)], 0);
    let mut frame = syn();
    assert_eq!(world.ingress(&mut frame), Ok(Next::Send));
    let (src, port, dst, dport) = frame.endpoints();
    assert_eq!((src.as_str(), dst.as_str(), dport), (NODE, REMOTE, 9376));
    assert!((15_000..=29_999).contains(&port), "{port}");
    assert_eq!(frame.hop_limit(), 63);
    assert!(frame.checksums_are_right());
    let mut reply = Frame::tcp(REMOTE, 9376, NODE, port, TCP_SYN | TCP_ACK);
    assert_eq!(world.ingress(&mut reply), Ok(Next::Send));
    assert_eq!(reply.endpoints(), (NODE.into(), 30080, CLIENT.into(), 4000));
    assert!(reply.checksums_are_right());
}

#[test]
fn a_flow_stays_with_its_backend_when_the_set_changes() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    world.ingress(&mut syn()).unwrap();
    node_port(&mut world, &[("10.244.1.6", true)], 0);
    world.kill(LOCAL);
    let mut data = Frame::tcp(CLIENT, 4000, NODE, 30080, TCP_ACK);
    world.ingress(&mut data).unwrap();
    assert_eq!(data.endpoints().2, LOCAL);
    let mut again = syn();
    world.ingress(&mut again).unwrap();
    assert_eq!(again.endpoints().2, "10.244.1.6", "a new connection on the old flow chooses anew");
}

#[test]
fn a_datagram_never_goes_to_a_backend_that_has_left() {
    let mut world = World::default();
    world.address(NODE, ADDRESS_NODE);
    world.service(7, "0.0.0.0", 30080, UDP, FRONTEND_NODE_PORT, &[(LOCAL, true)]);
    let mut frame = Frame::udp(CLIENT, 4000, NODE, 30080);
    world.ingress(&mut frame).unwrap();
    assert_eq!(frame.endpoints().2, LOCAL);
    world.service(7, "0.0.0.0", 30080, UDP, FRONTEND_NODE_PORT, &[("10.244.1.6", true)]);
    world.kill(LOCAL);
    let mut frame = Frame::udp(CLIENT, 4000, NODE, 30080);
    world.ingress(&mut frame).unwrap();
    assert_eq!(frame.endpoints().2, "10.244.1.6");
}

#[test]
fn a_privileged_port_stays() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    let mut frame = Frame::tcp(CLIENT, 1023, NODE, 30080, TCP_SYN);
    assert_eq!(world.ingress(&mut frame), Ok(Next::Stack));
    assert_eq!(frame.endpoints(), (CLIENT.into(), 1023, LOCAL.into(), 9376));
}

#[test]
fn a_direct_connection_from_the_same_port_is_not_taken_for_a_flows() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    world.ingress(&mut syn()).unwrap();
    let mut direct = Frame::tcp(LOCAL, 9376, CLIENT, 4000, TCP_SYN | TCP_ACK);
    let before = direct.clone();
    assert_eq!(world.egress(&mut direct), Err(Reason::NotService));
    assert_eq!(direct, before);
}

#[test]
fn a_closed_connections_port_may_be_used_again_at_once() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    let mut first = syn();
    world.ingress(&mut first).unwrap();
    let port = first.endpoints().1;
    world.egress(&mut Frame::tcp(LOCAL, 9376, CLIENT, port, TCP_SYN | TCP_ACK)).unwrap();
    world.ingress(&mut Frame::tcp(CLIENT, 4000, NODE, 30080, TCP_ACK | TCP_FIN)).unwrap();
    world.egress(&mut Frame::tcp(LOCAL, 9376, CLIENT, port, TCP_ACK | TCP_FIN)).unwrap();
    node_port(&mut world, &[("10.244.1.6", true)], 0);
    let mut again = syn();
    world.ingress(&mut again).unwrap();
    assert_eq!(again.endpoints().2, "10.244.1.6");
}

#[test]
fn two_frontends_never_share_a_reverse_entry() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    world.service(8, "0.0.0.0", 30081, TCP, FRONTEND_NODE_PORT, &[(LOCAL, true)]);
    let mut first = syn();
    let mut second = Frame::tcp(CLIENT, 4000, NODE, 30081, TCP_SYN);
    world.ingress(&mut first).unwrap();
    world.ingress(&mut second).unwrap();
    let (_, first_port, ..) = first.endpoints();
    let (_, second_port, ..) = second.endpoints();
    assert_ne!(first_port, second_port);
    for (port, frontend) in [(first_port, 30080), (second_port, 30081)] {
        let mut reply = Frame::tcp(LOCAL, 9376, CLIENT, port, TCP_SYN | TCP_ACK);
        world.egress(&mut reply).unwrap();
        assert_eq!(reply.endpoints(), (NODE.into(), frontend, CLIENT.into(), 4000));
    }
}

#[test]
fn no_backend_is_a_reject_and_no_local_one_a_drop() {
    let mut world = World::default();
    node_port(&mut world, &[], 0);
    assert_eq!(world.ingress(&mut syn()), Err(Reason::NoBackend));
    node_port(&mut world, &[(REMOTE, false)], FRONTEND_EXTERNAL_LOCAL);
    assert_eq!(world.ingress(&mut syn()), Err(Reason::NoLocalBackend));
    node_port(&mut world, &[], FRONTEND_EXTERNAL_LOCAL);
    assert_eq!(world.ingress(&mut syn()), Err(Reason::NoBackend));
}

#[test]
fn an_unknown_port_of_a_cluster_ip_is_refused_and_of_the_node_is_the_nodes() {
    let mut world = World::default();
    world.address(VIP, ADDRESS_CLUSTER_IP);
    world.address(NODE, ADDRESS_NODE);
    assert_eq!(world.ingress(&mut Frame::tcp(CLIENT, 4000, VIP, 81, TCP_SYN)), Err(Reason::UnknownPort));
    assert_eq!(world.ingress(&mut Frame::tcp(CLIENT, 4000, NODE, 81, TCP_SYN)), Err(Reason::NotService));
}

#[test]
fn headers_cut_short_anywhere_are_left_alone() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    for length in 0..54 {
        let mut frame = syn();
        frame.bytes.truncate(length);
        let before = frame.clone();
        assert_eq!(world.ingress(&mut frame), Err(Reason::Truncated), "{length}");
        assert_eq!(frame, before, "{length}");
    }
}

#[test]
fn no_checksum_stays_none() {
    let mut world = World::default();
    world.address(NODE, ADDRESS_NODE);
    world.service(7, "0.0.0.0", 30080, UDP, FRONTEND_NODE_PORT, &[(LOCAL, true)]);
    let mut frame = Frame::udp(CLIENT, 4000, NODE, 30080);
    frame.bytes[40..42].fill(0);
    world.ingress(&mut frame).unwrap();
    assert_eq!(frame.bytes[40..42], [0, 0]);
}

#[test]
fn a_packet_at_the_end_of_its_hops_goes_no_further() {
    let mut world = World::default();
    node_port(&mut world, &[(REMOTE, false)], 0);
    let mut frame = syn();
    frame.set_hop_limit(1);
    let before = frame.clone();
    assert_eq!(world.ingress(&mut frame), Err(Reason::HopLimit));
    assert_eq!(frame, before);
}

const POD: &str = "10.244.1.9";

fn cluster_ip(world: &mut World, backends: &[(&str, bool)], flags: u32) {
    world.address(VIP, ADDRESS_CLUSTER_IP);
    world.address(NODE, ADDRESS_NODE);
    world.service(7, VIP, 80, TCP, flags, backends);
}

#[test]
fn a_pod_reaches_a_backend_by_the_packet_path_and_sees_the_frontend_only() {
    for local in [true, false] {
        let mut world = World::default();
        cluster_ip(&mut world, &[(LOCAL, local)], 0);
        let mut frame = Frame::tcp(POD, 4000, VIP, 80, TCP_SYN);
        assert_eq!(world.pod_ingress(&mut frame), Ok(Next::Stack));
        let (src, port, dst, dport) = frame.endpoints();
        assert_eq!((src.as_str(), dst.as_str(), dport), (POD, LOCAL, 9376));
        let mut reply = Frame::tcp(LOCAL, 9376, POD, port, TCP_SYN | TCP_ACK);
        assert_eq!(
            world.pod_ingress(&mut reply.clone()),
            Err(Reason::NotService),
            "on its way to the client's interface"
        );
        assert_eq!(world.pod_egress(&mut reply), Ok(Next::Stack));
        assert_eq!(reply.endpoints(), (VIP.into(), 80, POD.into(), 4000));
        assert!(reply.checksums_are_right());
    }
}

#[test]
fn a_pod_that_is_sent_to_itself_sees_the_node() {
    let mut world = World::default();
    cluster_ip(&mut world, &[(POD, true)], 0);
    let mut frame = Frame::tcp(POD, 4000, VIP, 80, TCP_SYN);
    assert_eq!(world.pod_ingress(&mut frame), Ok(Next::Send));
    let (src, port, dst, _) = frame.endpoints();
    assert_eq!((src.as_str(), dst.as_str()), (NODE, POD));
    let mut reply = Frame::tcp(POD, 9376, NODE, port, TCP_SYN | TCP_ACK);
    assert_eq!(world.pod_ingress(&mut reply), Ok(Next::Send));
    assert_eq!(reply.endpoints(), (VIP.into(), 80, POD.into(), 4000));
}

#[test]
fn a_reply_to_the_nodes_own_connection_is_restored_where_it_comes_in() {
    let mut world = World::default();
    cluster_ip(&mut world, &[(LOCAL, true)], 0);
    let mut frame = Frame::tcp(NODE, 40_000, VIP, 80, TCP_SYN);
    assert_eq!(world.egress(&mut frame), Ok(Next::Send));
    let (src, port, dst, _) = frame.endpoints();
    assert_eq!((src.as_str(), dst.as_str()), (NODE, LOCAL));
    let mut reply = Frame::tcp(LOCAL, 9376, NODE, port, TCP_SYN | TCP_ACK);
    assert_eq!(world.pod_ingress(&mut reply), Ok(Next::Reenter));
    assert_eq!(reply.endpoints(), (VIP.into(), 80, NODE.into(), 40_000));
}

/// What a daemon of the node does that has bound a port of the source ports and talks to a backend directly.
fn direct(port: u16) -> Frame {
    Frame::udp(NODE, port, REMOTE, 9376)
}

/// A flow to [`REMOTE`] that is masqueraded, and the source port that it has.
fn forwarded(world: &World, mut frame: Frame) -> u16 {
    assert_eq!(world.ingress(&mut frame), Ok(Next::Send));
    frame.endpoints().1
}

fn udp_node_port(world: &mut World) -> Frame {
    world.address(NODE, ADDRESS_NODE);
    world.service(7, "0.0.0.0", 30080, UDP, FRONTEND_NODE_PORT, &[(REMOTE, false)]);
    Frame::udp(CLIENT, 4000, NODE, 30080)
}

#[test]
fn a_source_port_is_none_that_a_socket_has() {
    let mut world = World::default();
    let mut frame = udp_node_port(&mut world);
    frame.sockets = 15_000..18_000;
    for sport in 4000..4500 {
        let frame = &mut Frame { bytes: Frame::udp(CLIENT, sport, NODE, 30080).bytes, ..frame.clone() };
        let port = forwarded(&world, frame.clone());
        assert!(port >= 18_000, "{port}");
    }
    let mut refused = Frame { sockets: 0..u16::MAX, ..Frame::udp(CLIENT, 5000, NODE, 30080) };
    assert_eq!(world.ingress(&mut refused), Err(Reason::NoSourcePort));
}

/// How many source ports [`World`] has for masqueraded flows.
const PORTS: u32 = 13_125;

/// The `n`th client, each of which asks once.
fn client(n: u32) -> (String, u16) {
    (format!("198.51.{}.{}", n >> 8 & 0xff, n & 0xff), 1024 + (n >> 16) as u16)
}

fn connect(world: &World, n: u32) -> u16 {
    let (addr, port) = client(n);
    forwarded(world, Frame::tcp(&addr, port, NODE, 30080, TCP_SYN))
}

/// What the backend sends to this port; true where it goes to the `n`th client.
fn reply(world: &World, port: u16, flags: u8, n: u32) -> bool {
    let mut frame = Frame::tcp(REMOTE, 9376, NODE, port, flags);
    let (addr, client_port) = client(n);
    world.ingress(&mut frame) == Ok(Next::Send) && frame.endpoints() == (NODE.into(), 30080, addr, client_port)
}

fn establish(world: &World, n: u32) -> u16 {
    let port = connect(world, n);
    assert!(reply(world, port, TCP_SYN | TCP_ACK, n));
    let (addr, client_port) = client(n);
    assert_eq!(world.ingress(&mut Frame::tcp(&addr, client_port, NODE, 30080, TCP_ACK)), Ok(Next::Send));
    port
}

#[test]
fn flows_that_are_over_give_their_ports_up() {
    let mut world = World::default();
    node_port(&mut world, &[(REMOTE, false)], 0);
    for n in 0..3 * PORTS {
        let port = establish(&world, n);
        assert!(reply(&world, port, TCP_RST, n));
    }
}

#[test]
fn flows_without_a_packet_for_too_long_give_their_ports_up() {
    let mut world = World::default();
    udp_node_port(&mut world);
    for n in 0..3 * PORTS {
        let (addr, port) = client(n);
        forwarded(&world, Frame::udp(&addr, port, NODE, 30080));
        if n % 256 == 0 {
            world.ticks.set(world.ticks.get() + 1);
        }
    }
}

#[test]
fn a_flood_takes_neither_a_living_flow_nor_the_youngest_half_open_one() {
    let mut world = World::default();
    node_port(&mut world, &[(REMOTE, false)], 0);
    let living: Vec<u16> = (0..500).map(|n| establish(&world, n)).collect();
    let mut next = 500;
    let mut flood = |count: u32| {
        for _ in 0..count {
            connect(&world, next);
            next += 1;
        }
    };
    flood(2 * PORTS);
    let newcomers: Vec<u16> = (0..100).map(|n| connect(&world, 1_000_000 + n)).collect();
    flood(PORTS / 2);
    for (n, port) in (0..).zip(newcomers) {
        assert!(reply(&world, port, TCP_SYN | TCP_ACK, 1_000_000 + n), "{n}");
    }
    for (n, port) in (0..).zip(living) {
        assert!(reply(&world, port, TCP_ACK, n), "{n}");
    }
}

/// The turns are counted for all backends together.
#[test]
fn a_half_open_flow_keeps_its_port_while_its_backend_has_others() {
    let mut world = World::default();
    let backends: Vec<_> = (1..=20).map(|n| format!("10.244.2.{n}")).collect();
    let backends: Vec<_> = backends.iter().map(|address| (&address[..], false)).collect();
    node_port(&mut world, &backends, 0);
    let connected = |n: u32| {
        let (addr, port) = client(n);
        let mut frame = Frame::tcp(&addr, port, NODE, 30080, TCP_SYN);
        assert_eq!(world.ingress(&mut frame), Ok(Next::Send));
        frame.endpoints()
    };
    let opened: Vec<_> = (0..100).map(connected).collect();
    for n in 1000..1000 + 2 * PORTS {
        connect(&world, n);
    }
    for (n, to) in (0..).zip(opened) {
        assert_eq!(connected(n), to, "{n}");
    }
}

#[test]
fn nine_tenths_of_the_ports_can_be_in_use() {
    let mut world = World::default();
    node_port(&mut world, &[(REMOTE, false)], 0);
    let ports: std::collections::BTreeSet<_> = (0..PORTS * 9 / 10).map(|n| establish(&world, n)).collect();
    assert_eq!(ports.len() as u32, PORTS * 9 / 10);
}

#[test]
fn one_client_may_have_more_connections_to_a_backend_here_than_there_are_ports_to_give_out() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    let mut ports = std::collections::BTreeSet::new();
    for sport in 30_000..40_000 {
        let send = |flags: u8| {
            let mut frame = Frame::tcp(CLIENT, sport, NODE, 30080, flags);
            assert_eq!(world.ingress(&mut frame), Ok(Next::Stack), "{sport}");
            frame.endpoints().1
        };
        let port = send(TCP_SYN);
        let mut reply = Frame::tcp(LOCAL, 9376, CLIENT, port, TCP_SYN | TCP_ACK);
        assert_eq!(world.egress(&mut reply), Ok(Next::Stack));
        assert_eq!(reply.endpoints(), (NODE.into(), 30080, CLIENT.into(), sport));
        assert_eq!(send(TCP_ACK), port);
        assert!(ports.insert(port), "{port} twice");
    }
    assert!((800..2000).contains(&ports.range(..30_000).count()), "first those to give out");
}

#[test]
fn a_datagram_on_a_flow_that_had_none_for_too_long_is_balanced_anew() {
    let mut world = World::default();
    let frame = udp_node_port(&mut world);
    let first = forwarded(&world, frame.clone());
    world.ticks.set(world.ticks.get() + 13);
    assert_eq!(forwarded(&world, frame.clone()), first);
    world.ticks.set(world.ticks.get() + 17);
    assert_ne!(forwarded(&world, frame), first);
}

#[test]
fn a_socket_that_takes_a_flows_port_goes_by_another_and_both_get_their_replies() {
    let mut world = World::default();
    let frame = udp_node_port(&mut world);
    let port = forwarded(&world, frame);
    let mut datagram = direct(port);
    assert_eq!(world.egress(&mut datagram), Ok(Next::Send));
    let (src, moved, dst, dport) = datagram.endpoints();
    assert_eq!((src.as_str(), dst.as_str(), dport), (NODE, REMOTE, 9376));
    assert_ne!(moved, port);
    assert!(datagram.checksums_are_right());

    let mut to_the_socket = Frame::udp(REMOTE, 9376, NODE, moved);
    assert_eq!(world.ingress(&mut to_the_socket), Ok(Next::Stack));
    assert_eq!(to_the_socket.endpoints(), (REMOTE.into(), 9376, NODE.into(), port));
    let mut to_the_client = Frame::udp(REMOTE, 9376, NODE, port);
    assert_eq!(world.ingress(&mut to_the_client), Ok(Next::Send));
    assert_eq!(to_the_client.endpoints(), (NODE.into(), 30080, CLIENT.into(), 4000));

    let mut again = direct(port);
    assert_eq!(world.egress(&mut again), Ok(Next::Send));
    assert_eq!(again.endpoints().1, moved, "the same flow");
}

#[test]
fn a_reply_of_a_local_pod_to_a_moved_socket_comes_by_the_pods_interface() {
    let mut world = World::default();
    cluster_ip(&mut world, &[(POD, true)], 0);
    let mut hairpin = Frame::tcp(POD, 4000, VIP, 80, TCP_SYN);
    world.pod_ingress(&mut hairpin).unwrap();
    let port = hairpin.endpoints().1;
    let mut syn = Frame::tcp(NODE, port, POD, 9376, TCP_SYN);
    assert_eq!(world.pod_egress(&mut syn), Ok(Next::Send));
    let moved = syn.endpoints().1;
    let mut reply = Frame::tcp(POD, 9376, NODE, moved, TCP_SYN | TCP_ACK);
    assert_eq!(world.pod_ingress(&mut reply), Ok(Next::Stack));
    assert_eq!(reply.endpoints(), (POD.into(), 9376, NODE.into(), port));
}

#[test]
fn a_server_of_the_node_is_left_alone_on_any_port() {
    let mut world = World::default();
    let frame = udp_node_port(&mut world);
    let port = forwarded(&world, frame);
    let mut elsewhere = Frame::udp(NODE, port, "198.51.100.77", 9376);
    assert_eq!(world.egress(&mut elsewhere), Err(Reason::NotService));
    let mut answer = Frame::tcp(NODE, port, REMOTE, 9376, TCP_SYN | TCP_ACK);
    assert_eq!(world.egress(&mut answer), Err(Reason::NotService));
}

#[test]
fn a_source_outside_the_ranges_is_dropped_and_one_inside_is_served() {
    let mut world = World::default();
    cluster_ip(&mut world, &[(LOCAL, true)], FRONTEND_SOURCE_RANGES);
    assert_eq!(world.ingress(&mut Frame::tcp(CLIENT, 4000, VIP, 80, TCP_SYN)), Err(Reason::SourceRange));
    world.ranges.push((7, addr("192.0.2.0"), 96 + 24));
    assert_eq!(world.ingress(&mut Frame::tcp(CLIENT, 4000, VIP, 80, TCP_SYN)), Ok(Next::Stack));
}

#[test]
fn a_client_with_affinity_keeps_its_backend_for_as_long_as_it_was_told() {
    let mut world = World::default();
    world.affinity_seconds = 60;
    let backends: Vec<String> = (1..=9).map(|n| format!("10.244.1.{n}")).collect();
    let backends: Vec<_> = backends.iter().map(|text| (text.as_str(), true)).collect();
    cluster_ip(&mut world, &backends, 0);
    let asked = |world: &World, sport: u16| {
        let mut frame = Frame::tcp(CLIENT, sport, VIP, 80, TCP_SYN);
        world.ingress(&mut frame).unwrap();
        frame.endpoints().2
    };
    let first = asked(&world, 4000);
    for sport in 4001..4006 {
        world.seconds.set(world.seconds.get() + 50);
        assert_eq!(asked(&world, sport), first);
    }
    world.seconds.set(world.seconds.get() + 61);
    let later: std::collections::BTreeSet<_> = (5000..5004)
        .map(|sport| {
            world.seconds.set(world.seconds.get() + 61);
            asked(&world, sport)
        })
        .collect();
    assert!(later.len() > 1, "chosen anew each time: {later:?}");
}

#[test]
fn an_address_of_the_service_range_that_nobody_has_is_dropped() {
    let mut world = World::default();
    world.cidrs.push((addr("10.96.0.0"), 96 + 16, CIDR_SERVICES));
    assert_eq!(world.ingress(&mut Frame::tcp(CLIENT, 4000, "10.96.9.9", 80, TCP_SYN)), Err(Reason::UnallocatedAddress));
}

#[test]
fn what_opens_no_connection_does_not_make_affinity_last_longer() {
    let mut world = World::default();
    world.affinity_seconds = 60;
    let backends: Vec<String> = (1..=9).map(|n| format!("10.244.1.{n}")).collect();
    let backends: Vec<_> = backends.iter().map(|text| (text.as_str(), true)).collect();
    cluster_ip(&mut world, &backends, 0);
    let stayed = (1..=50).filter(|n| {
        let client = format!("192.0.2.{n}");
        let asked = |sport: u16| {
            let mut frame = Frame::tcp(&client, sport, VIP, 80, TCP_SYN);
            world.ingress(&mut frame).unwrap();
            frame.endpoints().2
        };
        let first = asked(4000);
        world.seconds.set(world.seconds.get() + 50);
        assert_eq!(world.ingress(&mut Frame::tcp(&client, 4001, VIP, 80, TCP_RST)), Err(Reason::NotService));
        world.seconds.set(world.seconds.get() + 50);
        asked(4002) == first
    });
    let stayed = stayed.count();
    assert!(stayed < 25, "{stayed} of 50 clients stayed with one backend of 9");
}

#[test]
fn what_a_backend_sends_to_somebody_else_leaves_a_flow_as_it_is() {
    let mut world = World::default();
    node_port(&mut world, &[(REMOTE, false)], 0);
    let port = forwarded(&world, syn());
    let mut other = Frame::tcp(REMOTE, 9376, "198.51.100.9", port, TCP_RST | TCP_ACK);
    assert_eq!(world.ingress(&mut other), Err(Reason::NotService));
    world.ingress(&mut syn()).unwrap();
    let opened = world.counts().into_iter().find(|(reason, _)| *reason == Reason::FlowOpened);
    assert_eq!(opened, Some((Reason::FlowOpened, 1)), "the reset was another connection's");
}

#[test]
fn a_port_of_the_node_that_stays_is_its_own_sockets() {
    let mut world = World::default();
    world.address(VIP, ADDRESS_CLUSTER_IP);
    world.address(NODE, ADDRESS_NODE);
    world.service(7, VIP, 123, UDP, 0, &[(REMOTE, false)]);
    let mut frame = Frame { sockets: 123..124, ..Frame::udp(NODE, 123, VIP, 123) };
    assert_eq!(world.egress(&mut frame), Ok(Next::Send));
    assert_eq!(frame.endpoints(), (NODE.into(), 123, REMOTE.into(), 9376));
}

/// From port 4000 to port 80 of an address that is no frontend.
fn strangers() -> [Frame; 2] {
    [Frame::tcp(CLIENT, 4000, LOCAL, 80, TCP_SYN), Frame::udp(CLIENT, 4000, LOCAL, 80)]
}

#[test]
fn what_is_no_services_is_known_again_until_the_epoch_ends() {
    let world = World::default();
    for frame in strangers() {
        assert!(!world.is_known(&frame), "before it was met");
        world.meet(&frame);
        assert!(world.is_known(&frame));
        world.end_epochs();
        assert!(!world.is_known(&frame), "in the next epoch");
    }
}

#[test]
fn what_differs_from_what_is_known_is_not_known() {
    let world = World::default();
    for frame in strangers() {
        world.meet(&frame);
        // The ethertype, options, fragments, the protocol, addresses and ports.
        let fields = [(12, 1), (14, 1), (20, 0x20), (21, 1), (23, 1)].into_iter().chain((26..38).map(|byte| (byte, 1)));
        for (byte, bits) in fields {
            let mut other = frame.clone();
            other.bytes[byte] ^= bits;
            assert!(!world.is_known(&other), "byte {byte}");
        }
        let mut short = frame.clone();
        short.bytes.truncate(41);
        assert!(!world.is_known(&short));
        assert!(world.is_known(&frame));
    }
}

#[test]
fn what_has_a_flow_is_not_known() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    let mut frame = syn();
    world.ingress(&mut frame).unwrap();
    let (_, port, ..) = frame.endpoints();
    // The uplink's egress is where it becomes the frontend's.
    let reply = Frame::tcp(LOCAL, 9376, CLIENT, port, TCP_SYN | TCP_ACK);
    world.meet(&reply);
    assert!(!world.is_known(&reply));
}

#[test]
fn what_gets_a_flow_is_not_known_any_more() {
    // A source port that is given out, and one that its client keeps.
    for client_port in [4000, 600] {
        let new = || {
            let mut world = World::default();
            node_port(&mut world, &[(LOCAL, true)], 0);
            world
        };
        let open = |world: &World| {
            let mut first = Frame::tcp(CLIENT, client_port, NODE, 30080, TCP_SYN);
            world.ingress(&mut first).unwrap();
            Frame::tcp(LOCAL, 9376, CLIENT, first.endpoints().1, TCP_SYN | TCP_ACK)
        };
        let reply = open(&new());
        let world = new();
        world.meet(&reply);
        assert!(world.is_known(&reply));
        assert_eq!(open(&world), reply, "the same port");
        assert!(!world.is_known(&reply));
    }
}

/// A connection that begins by a port that is given out may be one that a flow shadows.
#[test]
fn of_ports_that_are_given_out_the_first_packet_is_not_known() {
    let world = World::default();
    for (from, known) in [(14_999, true), (15_000, false), (29_999, false), (30_000, true)] {
        let of = |flags| Frame::tcp(CLIENT, from, LOCAL, 80, flags);
        world.meet(&of(TCP_SYN));
        assert_eq!(world.is_known(&of(TCP_SYN)), known, "{from}");
        assert!(
            [TCP_ACK, TCP_SYN | TCP_ACK, TCP_FIN, TCP_RST].into_iter().all(|flags| world.is_known(&of(flags))),
            "{from}"
        );
        let datagram = Frame::udp(CLIENT, from, LOCAL, 80);
        world.meet(&datagram);
        assert_eq!(world.is_known(&datagram), known, "{from}");
    }
}

#[test]
fn what_is_left_to_another_proxy_is_not_known() {
    let mut world = World::default();
    world.flags = CONFIG_TAKE_OVER;
    node_port(&mut world, &[(LOCAL, true)], 0);
    let under_way = Frame::tcp(CLIENT, 4000, NODE, 30080, TCP_ACK);
    world.meet(&under_way);
    assert!(!world.is_known(&under_way));
}

#[test]
fn a_reset_makes_no_packet_known() {
    let mut world = World::default();
    node_port(&mut world, &[(LOCAL, true)], 0);
    world.meet(&Frame::tcp(CLIENT, 4000, NODE, 30080, TCP_RST));
    assert!(!world.is_known(&syn()));
}
