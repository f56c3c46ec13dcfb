//! ICMP errors about translated packets, and all other ICMP.
use std::net::IpAddr;

use rstest::rstest;
use svc_common::Reason;
use svc_dataplane::packet::{Extension, ICMPV6, IcmpError, LINK, MACS, Packet, SCTP, TCP, UDP, network_of};
use svc_dataplane::tables::Kind::{self, ClusterIp, ExternalIp, NodePort};
use svc_dataplane::{Hook, Verdict, net};

use crate::stage::{
    Family, HIT, REPLY, V4, V6, answer, assert_changed, assert_not_ours, assert_untouched, error_about, on, open,
    service, translated,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Error {
    Unreachable,
    TooBig,
    HopLimit,
    Malformed,
}
use Error::{HopLimit, Malformed, TooBig, Unreachable};

impl Error {
    /// RFC 792; RFC 4443, 3.
    fn of(self, family: Family) -> ((u8, u8), u16) {
        match (self, family) {
            (Unreachable, V4) => ((3, 3), 0),
            (Unreachable, V6) => ((1, 4), 0),
            (TooBig, V4) => ((3, 4), 1400),
            (TooBig, V6) => ((2, 0), 1400),
            (HopLimit, V4) => ((11, 0), 0),
            (HopLimit, V6) => ((3, 0), 0),
            (Malformed, V4) => ((12, 0), 0),
            (Malformed, V6) => ((4, 0), 0),
        }
    }
}

/// What is quoted of a packet: a datagram whole, of all else the network header and 8 bytes.
fn quote(packet: &Packet) -> Vec<u8> {
    let network = packet.network();
    let length = match packet.protocol {
        UDP => network.len(),
        _ if packet.is_v4() => 28,
        _ => 48,
    };
    network[..length].to_vec()
}

/// As it is sent on by its route.
fn sent(error: IcmpError) -> Vec<u8> {
    let macs = net::macs(net::route(error.dst).unwrap(), error.dst).unwrap();
    IcmpError { macs, hop_limit: error.hop_limit - 1, ..error }.frame()
}

/// A host on the way, which is nobody else here.
fn router(family: Family) -> IpAddr {
    family.of("192.0.2.200", "2001:db8::200")
}

#[rstest]
fn an_error_about_a_request_reaches_the_client(
    #[values(Unreachable, TooBig, HopLimit, Malformed)] error: Error,
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(true, false)] local: bool,
) {
    let backend = if local { family.local() } else { family.remote() };
    let (service, request) = service(NodePort, family, protocol, &[(backend, local)], family.client());
    let (kind, mtu) = error.of(family);
    on(&[service], |node| {
        let there = translated(&request, open(node, Hook::Ingress, &request));
        let from = if local { backend } else { router(family) };
        let told = error_about(from, kind, mtu, &quote(&there), there.src);
        let expected = error_about(request.dst, kind, mtu, &quote(&request), request.src);
        if local {
            let outcome = node.run(Hook::Egress, &told.frame());
            assert_changed(&outcome, Verdict::Next, REPLY, &expected.frame());
        } else {
            assert_not_ours(&node.run(Hook::Xdp, &told.frame()), &told.frame());
            let outcome = node.run(Hook::Ingress, &told.frame());
            assert_changed(&outcome, Verdict::Redirect, REPLY, &sent(expected));
        }
    });
}

#[rstest]
fn an_error_about_a_reply_reaches_the_backend(
    #[values(Unreachable, TooBig)] error: Error,
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(NodePort, ExternalIp)] service_kind: Kind,
    #[values(true, false)] local: bool,
) {
    let backend = if local { family.local() } else { family.remote() };
    let (service, request) = service(service_kind, family, protocol, &[(backend, local)], family.client());
    let (kind, mtu) = error.of(family);
    on(&[service], |node| {
        let seen = open(node, Hook::Ingress, &request);
        let from = family.of("203.0.113.1", "2001:db8:c::1");
        let told = error_about(from, kind, mtu, &quote(&request.reply()), request.dst);
        let reply = answer(&request, seen);
        let outcome = node.run(Hook::Ingress, &told.frame());
        if local {
            let expected = error_about(from, kind, mtu, &quote(&reply), backend);
            assert_changed(&outcome, Verdict::Next, HIT, &expected.frame());
        } else {
            let expected = error_about(family.node(), kind, mtu, &quote(&reply), backend);
            assert_changed(&outcome, Verdict::Redirect, HIT, &sent(expected));
        }
    });
}

#[rstest]
fn an_error_about_a_pods_request_reaches_the_pod(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
) {
    let (service, request) = service(ClusterIp, family, protocol, &[(family.remote(), false)], family.pod());
    let (kind, mtu) = TooBig.of(family);
    on(&[service], |node| {
        let there = translated(&request, open(node, Hook::PodIngress, &request));
        let told = error_about(router(family), kind, mtu, &quote(&there), request.src);
        assert_not_ours(&node.run(Hook::Ingress, &told.frame()), &told.frame());
        let expected = error_about(request.dst, kind, mtu, &quote(&request), request.src);
        let outcome = node.run(Hook::PodEgress, &told.frame());
        assert_changed(&outcome, Verdict::Next, REPLY, &expected.frame());
    });
}

#[rstest]
fn a_quoted_datagram_without_a_checksum_gets_none(#[values(true, false)] local: bool) {
    let backend = if local { V4.local() } else { V4.remote() };
    let (service, request) = service(NodePort, V4, UDP, &[(backend, local)], V4.client());
    let request = Packet { has_checksum: false, ..request };
    let (kind, mtu) = Unreachable.of(V4);
    on(&[service], |node| {
        let there = translated(&request, open(node, Hook::Ingress, &request));
        let told = error_about(backend, kind, mtu, &quote(&there), there.src);
        let expected = error_about(request.dst, kind, mtu, &quote(&request), request.src);
        let (hook, verdict, expected) = if local {
            (Hook::Egress, Verdict::Next, expected.frame())
        } else {
            (Hook::Ingress, Verdict::Redirect, sent(expected))
        };
        assert_changed(&node.run(hook, &told.frame()), verdict, REPLY, &expected);
    });
}

#[rstest]
fn an_error_about_an_unknown_flow_passes(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Hook::Ingress, Hook::Egress, Hook::PodIngress, Hook::PodEgress)] hook: Hook,
) {
    let (service, request) = service(NodePort, family, protocol, &[(family.local(), true)], family.client());
    let (kind, mtu) = Unreachable.of(family);
    on(&[service], |node| {
        for quoted in [request.reply(), request.clone()] {
            let told = error_about(router(family), kind, mtu, &quote(&quoted), quoted.src);
            assert_not_ours(&node.run(hook, &told.frame()), &told.frame());
        }
    });
}

#[rstest]
fn an_error_that_quotes_too_little_passes(#[values(V4, V6)] family: Family) {
    let (service, request) = service(NodePort, family, TCP, &[(family.remote(), false)], family.client());
    let (kind, mtu) = Unreachable.of(family);
    let header = if family == V4 { 20 } else { 40 };
    on(&[service], |node| {
        let there = translated(&request, open(node, Hook::Ingress, &request));
        for length in 0..header + 8 {
            let told = error_about(router(family), kind, mtu, &there.network()[..length], there.src);
            let outcome = node.run(Hook::Ingress, &told.frame());
            assert_untouched(&outcome, &told.frame(), Verdict::Next, Reason::Truncated);
        }
    });
}

#[rstest]
#[case::later_piece(6, 0x20)]
#[case::header_too_short(0, 0x44)]
#[case::another_version(0, 0x65)]
#[case::another_protocol(9, 47)]
fn an_error_about_what_is_no_services_passes(#[case] at: usize, #[case] byte: u8) {
    let (service, request) = service(NodePort, V4, TCP, &[(V4.remote(), false)], V4.client());
    let (kind, mtu) = Unreachable.of(V4);
    on(&[service], |node| {
        let there = translated(&request, open(node, Hook::Ingress, &request));
        let mut quoted = there.network();
        quoted[at] = byte;
        // In the offset's low byte.
        quoted[7] |= u8::from(at == 6);
        let told = error_about(router(V4), kind, mtu, &quoted, there.src);
        assert_not_ours(&node.run(Hook::Ingress, &told.frame()), &told.frame());
    });
}

#[rstest]
#[case::echo_request(8, 128)]
#[case::echo_reply(0, 129)]
#[case::router_or_neighbour_solicitation(10, 135)]
#[case::timestamp_or_neighbour_advertisement(13, 136)]
fn icmp_that_is_no_error_passes(
    #[case] v4: u8,
    #[case] v6: u8,
    #[values(V4, V6)] family: Family,
    #[values(ClusterIp, NodePort)] service_kind: Kind,
) {
    let (service, request) = service(service_kind, family, TCP, &[(family.local(), true)], family.client());
    let kind = if family == V4 { v4 } else { v6 };
    let message = [&[kind, 0, 0, 0, 0, 1, 0, 1][..], &request.network()].concat();
    let frame = network_of(MACS, request.src, request.dst, 64, &message);
    on(&[service], |node| {
        for hook in Hook::ALL {
            assert_not_ours(&node.run(hook, &frame), &frame);
        }
        let short = &frame[..LINK + if family == V4 { 20 } else { 40 }];
        assert_untouched(&node.run(Hook::Ingress, short), short, Verdict::Next, Reason::Truncated);
    });
}

#[test]
fn an_error_behind_more_headers_than_are_followed_is_left_alone() {
    let (service, request) = service(NodePort, V6, UDP, &[(V6.local(), true)], V6.client());
    on(&[service], |node| {
        open(node, Hook::Ingress, &request);
        let error = error_about(request.src, (1, 4), 0, &quote(&request.reply()), request.dst).frame();
        let (fixed, message) = error.split_at(LINK + 40);
        let mut frame = [fixed, &Extension::Long(424).bytes(ICMPV6), message].concat();
        let length = (frame.len() - LINK - 40) as u16;
        frame[LINK + 4..LINK + 6].copy_from_slice(&length.to_be_bytes());
        frame[LINK + 6] = 60;
        assert_untouched(&node.run(Hook::Ingress, &frame), &frame, Verdict::Next, Reason::Unsupported);
    });
}
