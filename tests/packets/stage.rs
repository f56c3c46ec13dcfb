//! Who is who in the packet tests, and how a packet's fate is told.
use std::net::IpAddr;

use svc_common::Reason;
use svc_dataplane::check::{Ends, checksums, view};
use svc_dataplane::packet::Packet;
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
