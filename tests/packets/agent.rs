//! The programs that the agent has loaded and attached, over the maps that it has written.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};

use svc_agent::inspect::Pins;
use svc_common::Reason;
use svc_common::checksum::{fold, sum};
use svc_lab::topology::{BACKENDS, NODES, OUTSIDE};
use svc_tests::cluster::{CLUSTER_IP, Cluster, NODE_PORT, all_backends, service};
use svc_tests::test_run::{self, Context, bpf};

/// tcx and XDP verdicts (linux/bpf.h).
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

const TCP: u8 = 6;
const UDP: u8 = 17;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hook {
    Xdp,
    Ingress,
    Egress,
}

struct Bench {
    cluster: Cluster,
    programs: BTreeMap<&'static str, OwnedFd>,
}

impl Bench {
    /// A lab whose node-a knows its neighbours, since some traffic has been there.
    fn new() -> Self {
        let mut cluster = Cluster::with_generic_xdp();
        cluster.change(|manifests| {
            service("empty", "10.96.0.99", &[]).into_iter().for_each(|object| manifests.put(object));
        });
        for target in
            [format!("http://{}:{NODE_PORT}/", NODES[0].v4()), format!("http://[{}]:{NODE_PORT}/", NODES[0].v6())]
        {
            cluster.expect_soon(OUTSIDE, &target, &all_backends());
        }
        cluster.expect_soon("client", CLUSTER_IP, &all_backends());
        let pins = Pins::open(&cluster.lab.bpffs(NODES[0].name)).unwrap();
        let hooks = cluster.lab.namespace(NODES[0].name).unwrap().inside(|| pins.hooks()).unwrap();
        let program = |name: &str| {
            let hook = hooks.iter().find(|hook| hook.name == name).unwrap();
            let mut by_id = [hook.program_id.unwrap(), 0, 0];
            // SAFETY: a new descriptor of our own.
            unsafe { OwnedFd::from_raw_fd(bpf(13, &mut by_id).unwrap() as i32) }
        };
        let programs =
            ["xdp-eth0", "ingress-eth0", "egress-eth0"].into_iter().map(|name| (name, program(name))).collect();
        Bench { cluster, programs }
    }

    /// The verdict, and the packet as it is afterwards.
    fn run(&self, hook: Hook, packet: &[u8]) -> (u32, Vec<u8>) {
        let name = match hook {
            Hook::Xdp => "xdp-eth0",
            Hook::Ingress => "ingress-eth0",
            Hook::Egress => "egress-eth0",
        };
        let inside = self.cluster.lab.namespace(NODES[0].name).unwrap().inside(|| {
            // SAFETY: a name that ends in zero.
            let interface = unsafe { libc::if_nametoindex(c"eth0".as_ptr()) };
            let context = Context { xdp: hook == Hook::Xdp, interface, ..Context::default() };
            let ran = test_run::run(self.programs[name].as_fd(), context, packet)?;
            Ok((ran.verdict, ran.packet))
        });
        inside.unwrap_or_else(|error| panic!("{hook:?}, {} bytes: {error:#}", packet.len()))
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let pins = Pins::open(&self.cluster.lab.bpffs(NODES[0].name)).unwrap();
        let counters = pins.counters().unwrap();
        counters.into_iter().map(|(reason, counter): (Reason, _)| (reason.label(), counter.packets)).collect()
    }

    /// What the counters have moved by since `before`, those that stand still left out.
    fn moved(&self, before: &BTreeMap<&'static str, u64>) -> Vec<(&'static str, u64)> {
        let now = self.counters();
        now.into_iter().map(|(label, count)| (label, count - before[label])).filter(|(_, count)| *count > 0).collect()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ends {
    src: IpAddr,
    sport: u16,
    dst: IpAddr,
    dport: u16,
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn packet(ends: Ends, protocol: u8, flags: u8) -> Vec<u8> {
    let mut segment = [ends.sport.to_be_bytes(), ends.dport.to_be_bytes()].concat();
    if protocol == TCP {
        segment.extend([0, 0, 0, 9, 0, 0, 0, 5, 0x50, flags, 1, 0, 0, 0, 0, 0]);
    } else {
        segment.extend([0, 20, 0, 0]);
    }
    segment.extend(b"twelve bytes");
    let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if ends.src.is_ipv4() {
        bytes.extend([8, 0, 0x45, 0]);
        bytes.extend((20 + segment.len() as u16).to_be_bytes());
        bytes.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    } else {
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        bytes.extend((segment.len() as u16).to_be_bytes());
        bytes.extend([protocol, 64]);
    }
    bytes.extend(octets(ends.src));
    bytes.extend(octets(ends.dst));
    bytes.extend(segment);
    if ends.src.is_ipv4() {
        let header = !fold(sum(&bytes[14..34]));
        bytes[24..26].copy_from_slice(&header.to_ne_bytes());
    }
    let transport = l4(&bytes);
    let field = transport + if protocol == TCP { 16 } else { 6 };
    let full = !fold(transport_sum(&bytes));
    bytes[field..field + 2].copy_from_slice(&full.to_ne_bytes());
    bytes
}

fn is_v4(bytes: &[u8]) -> bool {
    bytes[12..14] == [8, 0]
}

fn l4(bytes: &[u8]) -> usize {
    if is_v4(bytes) { 34 } else { 54 }
}

fn protocol(bytes: &[u8]) -> u8 {
    if is_v4(bytes) { bytes[23] } else { bytes[20] }
}

fn transport_sum(bytes: &[u8]) -> u64 {
    let segment = &bytes[l4(bytes)..];
    let addresses = if is_v4(bytes) { &bytes[26..34] } else { &bytes[22..54] };
    let pseudo = [0, 0, (segment.len() >> 8) as u8, segment.len() as u8, 0, protocol(bytes)];
    // ICMP for IPv4 has no pseudo header.
    if protocol(bytes) == 1 { sum(segment) } else { sum(addresses) + sum(&pseudo) + sum(segment) }
}

fn assert_checksums(bytes: &[u8]) {
    if is_v4(bytes) {
        assert_eq!(fold(sum(&bytes[14..34])), 0xffff, "the network header's checksum: {bytes:02x?}");
    }
    assert_eq!(fold(transport_sum(bytes)), 0xffff, "the transport checksum: {bytes:02x?}");
}

fn ends(bytes: &[u8]) -> Ends {
    let address = |from: usize, to: usize| {
        let octets = &bytes[from..to];
        <[u8; 4]>::try_from(octets)
            .map(IpAddr::from)
            .unwrap_or_else(|_| IpAddr::from(<[u8; 16]>::try_from(octets).unwrap()))
    };
    let (src, dst) = if is_v4(bytes) { (address(26, 30), address(30, 34)) } else { (address(22, 38), address(38, 54)) };
    let at = l4(bytes);
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    Ends { src, sport: port(at), dst, dport: port(at + 2) }
}

fn hop_limit(bytes: &[u8]) -> u8 {
    if is_v4(bytes) { bytes[22] } else { bytes[21] }
}

/// The client outside, its request to node-a's nodePort, and node-a's address, in both families.
fn families() -> [(IpAddr, IpAddr); 2] {
    [("172.31.0.99".parse().unwrap(), NODES[0].v4().into()), ("fd00:31::99".parse().unwrap(), NODES[0].v6().into())]
}

#[test]
fn a_flow_is_opened_followed_and_answered_at_either_hook_in_either_family() {
    let bench = Bench::new();
    let backend_ports = 9376;
    for (hook, passed, sent) in [(Hook::Ingress, NEXT, REDIRECT), (Hook::Xdp, XDP_PASS, XDP_TX)] {
        for (client, node) in families() {
            let (mut locals, mut remotes) = (0, 0);
            for attempt in 0..64 {
                let sport = 40_000 + attempt + if hook == Hook::Xdp { 100 } else { 0 };
                let request = Ends { src: client, sport, dst: node, dport: NODE_PORT };
                let syn = packet(request, TCP, SYN);
                let before = bench.counters();
                let (verdict, out) = bench.run(hook, &syn);
                assert_eq!(bench.moved(&before), [("flow_hit", 1), ("flow_opened", 1)]);
                assert_checksums(&out);
                let there = ends(&out);
                assert_eq!(there.dport, backend_ports);
                let before = bench.counters();
                assert_eq!(bench.run(hook, &syn), (verdict, out.clone()), "the flow's next packet goes the same way");
                assert_eq!(bench.moved(&before), [("flow_hit", 1)]);
                let pod = BACKENDS.iter().find(|pod| [IpAddr::from(pod.v4()), pod.v6().into()].contains(&there.dst));
                let pod = pod.expect("a backend");
                let answer = Ends { src: there.dst, sport: there.dport, dst: there.src, dport: there.sport };
                let reply = packet(answer, TCP, SYN | ACK);
                let before = bench.counters();
                let back = if pod.node().name == NODES[0].name {
                    locals += 1;
                    assert_eq!((verdict, there.src), (passed, client));
                    assert!((1_024..=29_999).contains(&there.sport), "{there:?}");
                    assert_eq!(hop_limit(&out), 64);
                    let (verdict, back) = bench.run(Hook::Egress, &reply);
                    assert_eq!(verdict, NEXT);
                    back
                } else {
                    remotes += 1;
                    assert_eq!((verdict, there.src), (sent, node));
                    assert!((1_024..=29_999).contains(&there.sport), "{there:?}");
                    assert_eq!(hop_limit(&out), 63);
                    assert_ne!(out[..12], syn[..12], "the next hop's link addresses");
                    let (verdict, back) = bench.run(hook, &reply);
                    assert_eq!(verdict, sent);
                    back
                };
                assert_eq!(bench.moved(&before), [("reply", 1)]);
                assert_checksums(&back);
                assert_eq!(ends(&back), Ends { src: node, sport: NODE_PORT, dst: client, dport: sport });
                if locals > 0 && remotes > 0 {
                    break;
                }
            }
            assert!(locals > 0 && remotes > 0, "{hook:?} {client}: {locals} local, {remotes} remote");
        }
    }
}

#[test]
fn what_is_no_services_and_what_is_cut_short_passes_untouched() {
    let bench = Bench::new();
    for (hook, passed) in [(Hook::Ingress, NEXT), (Hook::Xdp, XDP_PASS), (Hook::Egress, NEXT)] {
        for (client, node) in families() {
            let stranger = packet(Ends { src: client, sport: 2000, dst: node, dport: 22 }, TCP, SYN);
            let before = bench.counters();
            assert_eq!(bench.run(hook, &stranger), (passed, stranger.clone()));
            assert_eq!(bench.moved(&before), []);
            let request = packet(Ends { src: client, sport: 2000, dst: node, dport: NODE_PORT }, TCP, SYN);
            // A test run takes no packet without a whole network header; the engine's own tests go below.
            let shortest = l4(&request);
            for length in shortest..l4(&request) + 20 {
                let short = &request[..length];
                let before = bench.counters();
                assert_eq!(bench.run(hook, short), (passed, short.to_vec()), "{hook:?}, {length} bytes");
                let expected: &[_] = if hook == Hook::Xdp { &[] } else { &[("truncated", 1)] };
                assert_eq!(bench.moved(&before), expected, "{hook:?}, {length} bytes");
            }
        }
    }
}

#[test]
fn without_a_backend_tcp_is_reset_and_udp_told_that_the_port_is_unreachable() {
    let bench = Bench::new();
    let client: IpAddr = "172.31.0.99".parse().unwrap();
    for (address, port, reason) in [("10.96.0.99", 80, "no_backend"), ("10.96.0.80", 81, "unknown_port")] {
        let request = Ends { src: client, sport: 3000, dst: address.parse().unwrap(), dport: port };
        let syn = packet(request, TCP, SYN);
        assert_eq!(bench.run(Hook::Xdp, &syn), (XDP_PASS, syn.clone()), "XDP leaves refusals to tc");
        let before = bench.counters();
        let (verdict, out) = bench.run(Hook::Ingress, &syn);
        assert_eq!(verdict, REDIRECT);
        assert_eq!(bench.moved(&before), [(reason, 1)]);
        assert_checksums(&out);
        assert_eq!(out.len(), 54);
        let back = Ends { src: request.dst, sport: port, dst: client, dport: 3000 };
        assert_eq!(ends(&out), back);
        assert_eq!((out[..6].to_vec(), out[6..12].to_vec()), (syn[6..12].to_vec(), syn[..6].to_vec()));
        // 9 + the SYN + 12 bytes.
        assert_eq!((&out[38..42], &out[42..46], out[47]), (&[0; 4][..], &[0, 0, 0, 22][..], RST | ACK));
        assert_eq!(bench.run(Hook::Ingress, &out).0, NEXT, "a reset to the client is nobody's");
    }
    let rst = packet(Ends { src: client, sport: 3000, dst: "10.96.0.99".parse().unwrap(), dport: 80 }, TCP, RST);
    assert_eq!(bench.run(Hook::Ingress, &rst).0, DROP, "a reset is not answered");

    for (client, address) in [("172.31.0.99", "10.96.0.7"), ("fd00:31::99", "fd00:10:96::7")] {
        let request = Ends { src: client.parse().unwrap(), sport: 3000, dst: address.parse().unwrap(), dport: 8 };
        let datagram = packet(request, UDP, 0);
        let (verdict, out) = bench.run(Hook::Ingress, &datagram);
        assert_eq!(verdict, REDIRECT);
        assert_checksums(&out);
        let at = l4(&datagram);
        let (kind, code) = if is_v4(&datagram) { (3, 3) } else { (1, 4) };
        assert_eq!((out[at], out[at + 1]), (kind, code));
        assert_eq!(out[at + 8..], datagram[14..at + 8], "it quotes what it refuses");
    }
}

#[test]
fn no_checksum_stays_none_and_the_sender_of_a_spent_packet_is_told() {
    let bench = Bench::new();
    let (client, node) = families()[0];
    let mut datagram = packet(Ends { src: client, sport: 4000, dst: node, dport: 30007 }, UDP, 0);
    datagram[40..42].fill(0);
    for hook in [Hook::Ingress, Hook::Xdp] {
        let (_, out) = bench.run(hook, &datagram);
        assert_ne!(ends(&out).dst, node);
        assert_eq!(out[40..42], [0, 0]);
    }

    let told = (0..64).filter(|attempt| {
        let mut spent = packet(Ends { src: client, sport: 4100 + attempt, dst: node, dport: NODE_PORT }, TCP, SYN);
        spent[22] = 1;
        let (verdict, out) = bench.run(Hook::Ingress, &spent);
        // RFC 792: time exceeded.
        verdict == REDIRECT && out[23] == 1 && out[34..36] == [11, 0]
    });
    assert!(told.count() > 0, "towards a backend elsewhere");
    assert!(bench.counters()["hop_limit"] > 0);
}
