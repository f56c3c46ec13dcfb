//! Packets with more than the plain headers, and with less.
use std::net::IpAddr;

use rstest::rstest;
use svc_common::Reason;
use svc_dataplane::packet::Extension::{self, Atomic, Authentication, Destination, HopByHop, Long, Routing};
use svc_dataplane::packet::{LINK, Packet, SCTP, TCP, UDP};
use svc_dataplane::tables::Kind;
use svc_dataplane::{Hook, Verdict};

use crate::stage::{
    Family, OPENED, REPLY, V4, V6, answer, assert_changed, assert_not_ours, assert_untouched, ends, on, open, sent,
    service, translated,
};

/// There and back by either backend, with whatever `dressed` gives every packet.
fn there_and_back(family: Family, protocol: u8, local: bool, dressed: impl Fn(Packet) -> Packet + Sync) {
    let backend = if local { family.local() } else { family.remote() };
    let (service, request) = service(Kind::NodePort, family, protocol, &[(backend, local)], family.client());
    let request = dressed(request);
    on(&[service], |node| {
        let xdp = node.run(Hook::Xdp, &request.frame());
        assert_not_ours(&xdp, &request.frame());

        let outcome = node.run(Hook::Ingress, &request.frame());
        let seen = ends(&outcome);
        let there = translated(&request, seen);
        let (verdict, expected) =
            if local { (Verdict::Next, there.frame()) } else { (Verdict::Redirect, sent(&there, true)) };
        assert_changed(&outcome, verdict, OPENED, &expected);

        let reply = dressed(answer(&request, seen));
        let back =
            Packet { src: request.dst, sport: request.dport, dst: request.src, dport: request.sport, ..reply.clone() };
        let (hook, expected) = if local { (Hook::Egress, back.frame()) } else { (Hook::Ingress, sent(&back, true)) };
        assert_changed(&node.run(hook, &reply.frame()), verdict, REPLY, &expected);
    });
}

#[rstest]
#[case::padding(&[1, 1, 1, 1])]
#[case::router_alert(&[0x94, 4, 0, 0])]
#[case::as_many_as_there_can_be(&[1; 40])]
fn ipv4_options_stay_as_they_are(
    #[case] options: &[u8],
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(true, false)] local: bool,
) {
    there_and_back(V4, protocol, local, |packet| Packet { options: options.to_vec(), ..packet });
}

#[rstest]
#[case::hop_by_hop(&[HopByHop])]
#[case::destination(&[Destination])]
#[case::routing(&[Routing])]
#[case::authentication(&[Authentication])]
#[case::atomic_fragment(&[Atomic])]
#[case::five(&[HopByHop, Destination, Routing, Authentication, Destination])]
#[case::long(&[Long(256)])]
fn ipv6_extension_headers_stay_as_they_are(
    #[case] extensions: &[Extension],
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(true, false)] local: bool,
) {
    there_and_back(V6, protocol, local, |packet| Packet { extensions: extensions.to_vec(), ..packet });
}

#[rstest]
#[case::longer_than_is_followed(&[Long(464)], Some(Reason::Unsupported))]
#[case::a_fragment_header_behind_what_is_followed(&[Long(456), Atomic], Some(Reason::Unsupported))]
#[case::more_than_are_followed(&[HopByHop, Destination, Routing, Authentication, Destination, Destination], None)]
fn ipv6_extension_headers_that_are_not_followed(#[case] extensions: &[Extension], #[case] reason: Option<Reason>) {
    let (service, request) = service(Kind::NodePort, V6, TCP, &[(V6.local(), true)], V6.client());
    let frame = Packet { extensions: extensions.to_vec(), ..request }.frame();
    on(&[service], |node| {
        for hook in [Hook::Ingress, Hook::Egress, Hook::PodIngress] {
            match reason {
                Some(reason) => assert_untouched(&node.run(hook, &frame), &frame, Verdict::Next, reason),
                None => assert_not_ours(&node.run(hook, &frame), &frame),
            }
        }
        assert_not_ours(&node.run(Hook::Xdp, &frame), &frame);
    });
}

#[test]
fn a_packet_without_a_next_header_is_whole() {
    let (service, request) = service(Kind::NodePort, V6, TCP, &[(V6.local(), true)], V6.client());
    let mut frame = request.frame()[..LINK + 40].to_vec();
    frame[LINK + 4..LINK + 7].copy_from_slice(&[0, 0, 59]);
    on(&[service], |node| {
        for hook in Hook::ALL {
            assert_not_ours(&node.run(hook, &frame), &frame);
        }
    });
}

#[rstest]
fn an_ipv4_services_address_in_an_ipv6_header_is_nobodys(#[values(TCP, UDP)] protocol: u8) {
    let (service, request) = service(Kind::ClusterIp, V4, protocol, &[(V4.local(), true)], V4.client());
    let mapped = |address: IpAddr| match address {
        IpAddr::V4(address) => IpAddr::V6(address.to_ipv6_mapped()),
        IpAddr::V6(_) => address,
    };
    let frame = Packet { src: mapped(request.src), dst: mapped(request.dst), ..request }.frame();
    on(&[service], |node| {
        for hook in Hook::ALL {
            assert_not_ours(&node.run(hook, &frame), &frame);
        }
    });
}

#[rstest]
fn a_udp_datagram_without_a_checksum_gets_none(
    #[values(V4, V6)] family: Family,
    #[values(true, false)] local: bool,
    #[values(Hook::Ingress, Hook::Xdp)] hook: Hook,
) {
    let backend = if local { family.local() } else { family.remote() };
    let (service, request) = service(Kind::NodePort, family, UDP, &[(backend, local)], family.client());
    let request = Packet { has_checksum: false, ..request };
    on(&[service], |node| {
        let outcome = node.run(hook, &request.frame());
        assert!(outcome.moved_only(OPENED), "{:?}", outcome.moved);
        let there = translated(&request, ends(&outcome));
        assert_eq!(outcome.frame, if local { there.frame() } else { sent(&there, true) });

        let reply = Packet { has_checksum: false, ..there.reply() };
        let outcome = node.run(if local { Hook::Egress } else { hook }, &reply.frame());
        assert!(outcome.moved_only(REPLY), "{:?}", outcome.moved);
        let back = Packet { has_checksum: false, ..request.reply() };
        assert_eq!(outcome.frame, if local { back.frame() } else { sent(&back, true) });
    });
}

/// What a packet of the protocol has to have behind its network header.
const fn transport_header(protocol: u8) -> usize {
    match protocol {
        TCP => 20,
        UDP => 8,
        _ => 13,
    }
}

#[rstest]
fn a_packet_that_ends_within_its_transport_header_passes(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Hook::Ingress, Hook::Egress, Hook::PodIngress, Hook::PodEgress)] hook: Hook,
) {
    let (service, request) = service(Kind::NodePort, family, protocol, &[(family.local(), true)], family.client());
    let frame = request.frame();
    let transport = frame.len() - request.segment().len();
    on(&[service], |node| {
        for length in transport..transport + transport_header(protocol) {
            let short = &frame[..length];
            assert_untouched(&node.run(hook, short), short, Verdict::Next, Reason::Truncated);
            assert_not_ours(&node.run(Hook::Xdp, short), short);
        }
    });
}

#[rstest]
#[case::options(V4, Packet { options: vec![1; 40], ..request_of(V4) }, LINK + 20..LINK + 60)]
#[case::hop_by_hop(V6, Packet { extensions: vec![HopByHop], ..request_of(V6) }, LINK + 40..LINK + 48)]
#[case::authentication(V6, Packet { extensions: vec![Authentication], ..request_of(V6) }, LINK + 40..LINK + 64)]
#[case::fragment_header(V6, request_of(V6).pieces(24)[0].clone(), LINK + 40..LINK + 48)]
fn a_packet_that_ends_within_what_follows_its_network_header_passes(
    #[case] family: Family,
    #[case] request: Packet,
    #[case] lengths: std::ops::Range<usize>,
) {
    let (service, _) = service(Kind::NodePort, family, TCP, &[(family.local(), true)], family.client());
    let frame = request.frame();
    on(&[service], |node| {
        for length in lengths {
            let short = &frame[..length];
            assert_untouched(&node.run(Hook::Ingress, short), short, Verdict::Next, Reason::Truncated);
            assert_not_ours(&node.run(Hook::Xdp, short), short);
        }
    });
}

fn request_of(family: Family) -> Packet {
    service(Kind::NodePort, family, TCP, &[], family.client()).1
}

#[rstest]
#[case::of_no_bytes(0x40)]
#[case::shorter_than_it_can_be(0x44)]
#[case::of_another_version(0x55)]
fn an_ipv4_header_that_is_none_passes(#[case] version_and_length: u8) {
    let (service, request) = service(Kind::NodePort, V4, TCP, &[(V4.local(), true)], V4.client());
    let mut frame = request.frame();
    frame[LINK] = version_and_length;
    on(&[service], |node| {
        assert_untouched(&node.run(Hook::Ingress, &frame), &frame, Verdict::Next, Reason::Unsupported);
        assert_not_ours(&node.run(Hook::Xdp, &frame), &frame);
    });
}

#[rstest]
#[case::gre(47)]
#[case::esp(50)]
#[case::nothing(59)]
#[case::reserved(255)]
fn another_protocol_to_a_cluster_ip_passes(#[case] protocol: u8, #[values(V4, V6)] family: Family) {
    let (service, request) = service(Kind::ClusterIp, family, TCP, &[(family.local(), true)], family.client());
    let mut frame = request.frame();
    frame[if family == V4 { LINK + 9 } else { LINK + 6 }] = protocol;
    on(&[service], |node| {
        for hook in Hook::ALL {
            assert_not_ours(&node.run(hook, &frame), &frame);
        }
    });
}

#[rstest]
#[case::arp(0x0806)]
#[case::vlan(0x8100)]
#[case::mpls(0x8847)]
fn a_frame_that_is_no_ip_packet_passes(#[case] ethertype: u16) {
    let (service, request) = service(Kind::ClusterIp, V4, TCP, &[(V4.local(), true)], V4.client());
    let mut frame = request.frame();
    frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
    on(&[service], |node| {
        for hook in Hook::ALL {
            assert_not_ours(&node.run(hook, &frame), &frame);
        }
    });
}

#[rstest]
fn garbage_behind_the_addresses_harms_nobody(#[values(V4, V6)] family: Family) {
    let (service, request) = service(Kind::ClusterIp, family, TCP, &[(family.local(), true)], family.client());
    let frame = request.frame();
    let addresses = if family == V4 { LINK + 12..LINK + 20 } else { LINK + 8..LINK + 40 };
    on(&[service], |node| {
        let mut state = 1u64;
        for _ in 0..2_000 {
            let mut garbage = frame.clone();
            for (at, byte) in garbage.iter_mut().enumerate().skip(LINK) {
                // Knuth's MMIX.
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if !addresses.contains(&at) {
                    *byte = (state >> 56) as u8;
                }
            }
            // A test run takes a packet by its first half-byte.
            garbage[LINK] = garbage[LINK] & 0xf | if family == V4 { 0x40 } else { 0x60 };
            for hook in Hook::ALL {
                let outcome = node.run(hook, &garbage);
                let passed = ["truncated", "unsupported", "fragment_unknown", "fragment_kept"];
                if outcome.moved.keys().all(|label| passed.contains(label)) {
                    assert_eq!(outcome.frame, garbage, "{hook:?}, {:?}", outcome.moved);
                }
            }
        }
        open(node, Hook::Ingress, &Packet { sport: 50_000, ..request.clone() });
    });
}
