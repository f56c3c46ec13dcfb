//! Who is who in the packet tests, and how a packet's fate is told.
use std::net::IpAddr;
use std::ops::Range;

use svc_common::Reason;
use svc_dataplane::check::{Ends, checksums, view};
use svc_dataplane::net;
use svc_dataplane::packet::{ACK, ICMP, ICMPV6, IcmpError, LINK, MACS, Packet, RST, TCP};
use svc_dataplane::tables::{Kind, Service, Tables};
use svc_dataplane::{Hook, Outcome, Verdict};
use svc_tests::kernel::{self, Kernel};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Family {
    V4,
    V6,
}
pub(crate) use Family::{V4, V6};

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl Family {
    pub(crate) fn of(self, v4: &str, v6: &str) -> IpAddr {
        ip(if self == V4 { v4 } else { v6 })
    }

    pub(crate) fn client(self) -> IpAddr {
        self.of("203.0.113.7", "2001:db8:c::7")
    }

    pub(crate) fn node(self) -> IpAddr {
        self.of("192.0.2.1", "2001:db8::1")
    }

    pub(crate) fn local(self) -> IpAddr {
        self.of("10.244.1.5", "fd00:244:1::5")
    }

    pub(crate) fn pod(self) -> IpAddr {
        self.of("10.244.1.9", "fd00:244:1::9")
    }

    pub(crate) fn remote(self) -> IpAddr {
        self.of("10.244.2.5", "fd00:244:2::5")
    }

    pub(crate) fn narrow(self) -> IpAddr {
        self.of("10.244.3.5", "fd00:244:3::5")
    }

    pub(crate) fn cluster_ip(self) -> IpAddr {
        self.of("10.96.0.10", "fd00:96::10")
    }

    pub(crate) fn any(self) -> IpAddr {
        self.of("0.0.0.0", "::")
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Client {
    Network,
    Pod,
    Host,
}

impl Client {
    /// Where its packets are met first, and its address.
    pub(crate) fn of(self, family: Family) -> (Hook, IpAddr) {
        match self {
            Client::Network => (Hook::Ingress, family.client()),
            Client::Pod => (Hook::PodIngress, family.pod()),
            Client::Host => (Hook::Egress, family.node()),
        }
    }
}

/// The parts of the source ports 1024 to 29999 (docs/architecture.md).
pub(crate) const MASQUERADED: Range<u16> = 1024..26_378;
pub(crate) const FROM_NETWORK: Range<u16> = 26_378..28_188;
pub(crate) const FROM_HERE: Range<u16> = 28_188..29_999;

/// What a client sends to, and the address that the agent writes for it.
pub(crate) fn frontend(kind: Kind, family: Family) -> (IpAddr, IpAddr, u16) {
    let same = |address: IpAddr, port| (address, address, port);
    match kind {
        Kind::ClusterIp => same(family.cluster_ip(), 80),
        Kind::NodePort => (family.node(), family.any(), 30_080),
        Kind::ExternalIp => same(family.of("198.51.100.10", "2001:db8:e::10"), 80),
        Kind::LoadBalancer => same(family.of("198.51.100.20", "2001:db8:e::20"), 80),
    }
}

/// A Service of this kind, and the first packet of a client's connection to it.
pub(crate) fn service(
    kind: Kind,
    family: Family,
    protocol: u8,
    backends: &[(IpAddr, bool)],
    client: IpAddr,
) -> (Service, Packet) {
    let (address, key, port) = frontend(kind, family);
    let service = Service::new(1, kind, key, port, protocol, backends);
    (service, Packet::new(protocol, client, 40_000, address, port))
}

pub(crate) fn on<T: Send>(services: &[Service], test: impl FnOnce(&mut Kernel) -> T + Send) -> T {
    kernel::with(&Tables::with(services), test)
}

pub(crate) const OPENED: &[Reason] = &[Reason::FlowOpened, Reason::FlowHit];
pub(crate) const HIT: &[Reason] = &[Reason::FlowHit];
pub(crate) const REPLY: &[Reason] = &[Reason::Reply];

/// The packet went on as it came, and no counter moved.
#[track_caller]
pub(crate) fn assert_not_ours(outcome: &Outcome, frame: &[u8]) {
    assert_eq!((outcome.verdict, &outcome.moved), (Verdict::Next, &[].into()));
    assert_eq!(outcome.frame, frame);
}

/// The packet went on or was dropped as it came, for this reason.
#[track_caller]
pub(crate) fn assert_untouched(outcome: &Outcome, frame: &[u8], verdict: Verdict, reason: Reason) {
    assert_eq!(outcome.verdict, verdict, "{:?}", outcome.moved);
    assert!(outcome.moved_only(&[reason]), "{:?}", outcome.moved);
    assert_eq!(outcome.frame, frame);
}

/// Exactly these bytes came out, with right checksums, and these counters moved by one.
#[track_caller]
pub(crate) fn assert_changed(outcome: &Outcome, verdict: Verdict, reasons: &[Reason], expected: &[u8]) {
    assert_eq!(outcome.verdict, verdict, "{:?}", outcome.moved);
    assert!(outcome.moved_only(reasons), "{:?}", outcome.moved);
    assert_eq!(outcome.frame, expected, "\n{:02x?}\n{expected:02x?}", outcome.frame);
    assert_eq!(checksums(expected), Ok(()));
}

/// Where the packet goes to now.
pub(crate) fn ends(outcome: &Outcome) -> Ends {
    view(&outcome.frame).ends()
}

/// A flow that was opened by `request`: its packets on the way to the backend have these ends.
pub(crate) fn open(node: &mut Kernel, hook: Hook, request: &Packet) -> Ends {
    let outcome = node.run(hook, &request.frame());
    assert!(outcome.moved_only(OPENED), "{:?}", outcome.moved);
    ends(&outcome)
}

/// `packet` with other ends.
pub(crate) fn translated(packet: &Packet, to: Ends) -> Packet {
    Packet { src: to.src, sport: to.sport, dst: to.dst, dport: to.dport, ..packet.clone() }
}

/// The answer to what the backend sees of a request, as the backend sends it.
pub(crate) fn answer(request: &Packet, seen: Ends) -> Packet {
    translated(request, seen).reply()
}

/// The frame as it leaves by its route. `hops`: one fewer are left.
pub(crate) fn sent(packet: &Packet, hops: bool) -> Vec<u8> {
    let macs = net::macs(net::route(packet.dst).unwrap(), packet.dst).unwrap();
    let hop_limit = packet.hop_limit - u8::from(hops);
    Packet { macs, hop_limit, ..packet.clone() }.frame()
}

/// What somebody on the way says about a packet, of which he quotes this much from its network header on.
pub(crate) fn error_about(from: IpAddr, (kind, code): (u8, u8), mtu: u16, quoted: &[u8], to: IpAddr) -> IcmpError {
    IcmpError { macs: MACS, src: from, dst: to, kind, code, mtu, hop_limit: 64, quoted: quoted.to_vec() }
}

/// Link addresses the other way round.
fn turned(frame: &[u8]) -> Vec<u8> {
    [&frame[6..12], &frame[..6]].concat()
}

/// The packet went back as an ICMP error about it; `mtu`: what it tells, if anything.
#[track_caller]
pub(crate) fn assert_told(
    outcome: &Outcome,
    reasons: &[Reason],
    request: &Packet,
    (kind, code): (u8, u8),
    mtu: Option<u16>,
) {
    assert_eq!(outcome.verdict, Verdict::Redirect, "{:?}", outcome.moved);
    assert!(outcome.moved_only(reasons), "{:?}", outcome.moved);
    assert_eq!(checksums(&outcome.frame), Ok(()));
    let frame = request.frame();
    assert_eq!(outcome.frame[..12], turned(&frame));
    let seen = view(&outcome.frame);
    let protocol = if request.is_v4() { ICMP } else { ICMPV6 };
    assert_eq!((seen.src, seen.dst, seen.protocol, seen.hop_limit), (request.dst, request.src, protocol, 64));
    assert_eq!((seen.segment[0], seen.segment[1]), (kind, code));
    if let Some(mtu) = mtu {
        assert_eq!(seen.segment[4..8], u32::from(mtu).to_be_bytes());
    }
    let header = if request.is_v4() { 20 } else { 40 };
    assert_eq!(seen.segment[8..], frame[LINK..LINK + header + 8], "it quotes the network header and 8 bytes");
}

/// The segment went back as a reset.
#[track_caller]
pub(crate) fn assert_reset(outcome: &Outcome, reason: Reason, request: &Packet, seq: u32, ack: Option<u32>) {
    assert_eq!(outcome.verdict, Verdict::Redirect, "{:?}", outcome.moved);
    assert!(outcome.moved_only(&[reason]), "{:?}", outcome.moved);
    assert_eq!(checksums(&outcome.frame), Ok(()));
    assert_eq!(outcome.frame[..12], turned(&request.frame()));
    let seen = view(&outcome.frame);
    assert_eq!((seen.protocol, seen.hop_limit, seen.segment.len()), (TCP, 64, 20));
    let back = Ends { src: request.dst, sport: request.dport, dst: request.src, dport: request.sport };
    assert_eq!(seen.ends(), back);
    assert_eq!(seen.segment[4..8], seq.to_be_bytes(), "sequence number");
    assert_eq!(seen.segment[8..12], ack.unwrap_or(0).to_be_bytes(), "acknowledgment number");
    assert_eq!(seen.segment[12..14], [0x50, if ack.is_some() { RST | ACK } else { RST }]);
}
