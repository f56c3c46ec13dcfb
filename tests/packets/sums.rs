//! Checksums at their edges, and bytes that they do not cover.
use rstest::rstest;
use svc_common::Reason;
use svc_dataplane::packet::{Packet, SCTP, TCP, UDP};
use svc_dataplane::tables::Kind::{ClusterIp, NodePort};
use svc_dataplane::{Hook, Verdict};

use crate::stage::{
    Family, OPENED, REPLY, V4, V6, answer, assert_changed, assert_reset, ends, on, open, sent, service, translated,
};

/// Of a frame's UDP header.
fn checksum(packet: &Packet) -> u16 {
    let segment = packet.segment();
    u16::from_be_bytes([segment[6], segment[7]])
}

/// With the first two bytes of payload that make it so.
fn with_payload(packet: &Packet, is_so: impl Fn(&Packet) -> bool) -> Packet {
    (0..=u16::MAX)
        .map(|word| Packet { payload: [&word.to_be_bytes()[..], b"twelve bytes"].concat(), ..packet.clone() })
        .find(is_so)
        .unwrap()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum When {
    /// As it comes in.
    Before,
    /// After the translation.
    After,
    /// When the address is the new one and the port is still the old one.
    Between,
}
use When::{After, Before, Between};

/// A sum of 0 is written as 0xffff, since 0 says that there is none (RFC 768).
#[rstest]
fn a_udp_checksum_that_would_be_zero_is_all_ones(
    #[values(Before, After, Between)] when: When,
    #[values(V4, V6)] family: Family,
    #[values(Hook::Ingress, Hook::Xdp)] hook: Hook,
) {
    let (service, request) = service(NodePort, family, UDP, &[(family.local(), true)], family.client());
    // A privileged port stays, so that what comes out is known before.
    let request = Packet { sport: 800, ..request };
    let there = |packet: &Packet| Packet { dst: family.local(), dport: 9376, ..packet.clone() };
    let request = with_payload(&request, |packet| {
        let at = match when {
            Before => packet.clone(),
            After => there(packet),
            Between => Packet { dst: family.local(), ..packet.clone() },
        };
        checksum(&at) == 0xffff
    });
    on(&[service], |node| {
        assert_changed(&node.run(hook, &request.frame()), Verdict::Next, OPENED, &there(&request).frame());
        let reply = there(&request).reply();
        let outcome = node.run(Hook::Egress, &reply.frame());
        assert_changed(&outcome, Verdict::Next, REPLY, &request.reply().frame());
    });
}

/// As short packets are padded to the least that Ethernet carries.
fn padded(mut frame: Vec<u8>) -> Vec<u8> {
    frame.extend([0xa5; 7]);
    frame
}

#[rstest]
fn padding_behind_a_packet_counts_for_nothing(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(true, false)] local: bool,
    #[values(Hook::Ingress, Hook::Xdp)] hook: Hook,
) {
    let backend = if local { family.local() } else { family.remote() };
    let (service, request) = service(NodePort, family, protocol, &[(backend, local)], family.client());
    on(&[service], |node| {
        let outcome = node.run(hook, &padded(request.frame()));
        let seen = ends(&outcome);
        let there = translated(&request, seen);
        let (verdict, expected) =
            if local { (Verdict::Next, there.frame()) } else { (Verdict::Redirect, sent(&there, true)) };
        assert_changed(&outcome, verdict, OPENED, &padded(expected));

        let back = request.reply();
        let (hook, expected) = if local { (Hook::Egress, back.frame()) } else { (hook, sent(&back, true)) };
        let outcome = node.run(hook, &padded(answer(&request, seen).frame()));
        assert_changed(&outcome, verdict, REPLY, &padded(expected));
    });
}

#[rstest]
fn a_reset_acknowledges_no_padding(#[values(V4, V6)] family: Family) {
    let (service, request) = service(ClusterIp, family, TCP, &[], family.client());
    on(&[service], |node| {
        let outcome = node.run(Hook::Ingress, &padded(request.frame()));
        assert_reset(&outcome, Reason::NoBackend, &request, 0, Some(22));
    });
}

#[rstest]
fn a_wrong_checksum_stays_wrong(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Hook::Ingress, Hook::Xdp)] hook: Hook,
) {
    let (service, request) = service(NodePort, family, protocol, &[(family.local(), true)], family.client());
    on(&[service], |node| {
        open(node, hook, &request);
        let mut frame = request.frame();
        *frame.last_mut().unwrap() ^= 1;
        let outcome = node.run(hook, &frame);
        assert!(svc_dataplane::check::checksums(&outcome.frame).is_err(), "{:02x?}", outcome.frame);
    });
}
