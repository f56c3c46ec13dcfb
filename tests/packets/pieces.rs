//! Datagrams in pieces.
use rstest::rstest;
use svc_common::Reason;
use svc_dataplane::packet::{Packet, SCTP, TCP, UDP};
use svc_dataplane::tables::Kind::{self, ClusterIp, NodePort};
use svc_dataplane::tables::Service;
use svc_dataplane::{Hook, Outcome, Verdict, net};
use svc_tests::kernel::Tap;

use crate::stage::Client::{self, Host, Network, Pod};
use crate::stage::{
    Family, HIT, OPENED, REPLY, V4, V6, answer, assert_changed, assert_not_ours, assert_told, assert_untouched, ends,
    on, sent, service, translated,
};

/// A whole header, and 8 bytes of what follows it.
const FIRST: usize = 24;

fn long(request: Packet) -> Packet {
    Packet { payload: vec![7; 100], ..request }
}

/// A backend's port that is the Service's own.
fn same_port(service: Service) -> Service {
    let port = service.port;
    Service { backends: service.backends.iter().map(|(to, _, local)| (*to, port, *local)).collect(), ..service }
}

#[track_caller]
fn assert_kept(outcome: &Outcome) {
    assert_eq!(outcome.verdict, Verdict::Drop);
    assert!(outcome.moved_only(&[Reason::FragmentKept]), "{:?}", outcome.moved);
}

#[rstest]
fn pieces_go_where_their_first_one_went(
    #[values(TCP, UDP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(ClusterIp, NodePort)] kind: Kind,
    #[values(true, false)] local: bool,
    #[values(Network, Pod, Host)] from: Client,
) {
    let backend = if local { family.local() } else { family.remote() };
    let (hook, client) = from.of(family);
    let (service, request) = service(kind, family, protocol, &[(backend, local)], client);
    let request = long(request);
    on(&[service], |node| {
        let [first, second] = request.pieces(FIRST);
        if from == Network {
            for piece in [&first, &second] {
                assert_not_ours(&node.run(Hook::Xdp, &piece.frame()), &piece.frame());
            }
        }
        let outcome = node.run(hook, &first.frame());
        let seen = ends(&outcome);
        let there = translated(&request, seen).pieces(FIRST).map(|piece| match (from, local) {
            (Network, false) => (Verdict::Redirect, sent(&piece, true)),
            (Host, _) => (Verdict::Redirect, sent(&piece, false)),
            _ => (Verdict::Next, piece.frame()),
        });
        assert_changed(&outcome, there[0].0, OPENED, &there[0].1);
        assert_changed(&node.run(hook, &second.frame()), there[1].0, HIT, &there[1].1);
    });
}

#[rstest]
fn a_reply_in_pieces_is_restored(
    #[values(TCP, UDP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(true, false)] local: bool,
) {
    let backend = if local { family.local() } else { family.remote() };
    let (service, request) = service(NodePort, family, protocol, &[(backend, local)], family.client());
    on(&[service], |node| {
        let seen = ends(&node.run(Hook::Ingress, &request.frame()));
        let reply = long(answer(&request, seen)).pieces(FIRST);
        let back = long(request.reply()).pieces(FIRST);
        for (reply, back) in reply.iter().zip(back) {
            if local {
                let outcome = node.run(Hook::Egress, &reply.frame());
                assert_changed(&outcome, Verdict::Next, REPLY, &back.frame());
            } else {
                let outcome = node.run(Hook::Ingress, &reply.frame());
                assert_changed(&outcome, Verdict::Redirect, REPLY, &sent(&back, true));
            }
        }
    });
}

#[rstest]
fn a_piece_that_comes_first_waits_for_the_first_one(
    #[values(TCP, UDP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(ClusterIp, NodePort)] kind: Kind,
    #[values(Network, Pod)] from: Client,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(kind, family, protocol, &[(family.local(), true)], client);
    let request = long(request);
    on(&[service], |node| {
        let [first, second] = request.pieces(FIRST);
        let outcome = node.run(hook, &second.frame());
        assert_kept(&outcome);
        assert_eq!(outcome.frame, second.frame());

        let released = node.run(hook, &first.frame());
        assert_eq!(released.verdict, Verdict::Drop, "both are sent once more");
        assert!(released.moved_only(&[Reason::FlowOpened]), "{:?}", released.moved);

        let outcome = node.run(hook, &first.frame());
        let there = translated(&request, ends(&outcome)).pieces(FIRST);
        assert_changed(&outcome, Verdict::Next, HIT, &there[0].frame());
        assert_changed(&node.run(hook, &second.frame()), Verdict::Next, HIT, &there[1].frame());
    });
}

#[rstest]
fn what_waited_comes_up_the_interface_behind_its_first_piece(#[values(V4, V6)] family: Family) {
    let (service, request) = service(NodePort, family, UDP, &[(family.local(), true)], family.client());
    let request = Packet { payload: vec![7; 56], ..request };
    on(&[service], |node| {
        let pieces = [0..24, 24..48, 48..64].map(|range| Packet { piece: Some(range), ..request.clone() }.frame());
        for later in [&pieces[2], &pieces[1]] {
            assert_kept(&node.run(Hook::Ingress, later));
        }
        let tap = Tap::new(net::UPLINK);
        node.run(Hook::Ingress, &pieces[0]);
        for expected in [&pieces[0], &pieces[2], &pieces[1]] {
            assert_eq!(tap.frame_from(request.src).as_ref(), Some(expected));
        }
    });
}

#[rstest]
fn no_more_than_eight_pieces_of_a_datagram_wait(#[values(V4, V6)] family: Family) {
    let (service, request) = service(NodePort, family, UDP, &[(family.local(), true)], family.client());
    let request = Packet { payload: vec![7; 120], ..request };
    on(&[service], |node| {
        let piece = |at: usize| Packet { piece: Some(at..at + 8), ..request.clone() }.frame();
        for index in 1..=8 {
            assert_kept(&node.run(Hook::Ingress, &piece(index * 8)));
        }
        let ninth = piece(9 * 8);
        assert_untouched(&node.run(Hook::Ingress, &ninth), &ninth, Verdict::Next, Reason::FragmentUnknown);
        let other = Packet { id: 78, ..request.clone() }.pieces(FIRST)[1].frame();
        assert_kept(&node.run(Hook::Ingress, &other));
    });
}

#[rstest]
fn a_piece_to_nobody_known_does_not_wait(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Hook::Ingress, Hook::PodIngress, Hook::Egress, Hook::PodEgress)] hook: Hook,
) {
    let request =
        long(Packet::new(protocol, family.client(), 40_000, family.of("198.51.100.99", "2001:db8:e::99"), 80));
    on(&[], |node| {
        let second = request.pieces(FIRST)[1].frame();
        assert_untouched(&node.run(hook, &second), &second, Verdict::Next, Reason::FragmentUnknown);
    });
}

#[rstest]
fn on_its_way_out_no_piece_waits(
    #[values(V4, V6)] family: Family,
    #[values(Hook::Egress, Hook::PodEgress)] hook: Hook,
) {
    let (service, request) = service(NodePort, family, UDP, &[(family.local(), true)], family.client());
    let second = long(request).pieces(FIRST)[1].frame();
    on(&[service], |node| {
        assert_untouched(&node.run(hook, &second), &second, Verdict::Next, Reason::FragmentUnknown);
    });
}

#[rstest]
fn pieces_of_sctp_whose_ports_stay_are_translated(
    #[values(V4, V6)] family: Family,
    #[values(true, false)] local: bool,
) {
    let backend = if local { family.local() } else { family.remote() };
    // The node's address goes with a port of its own; a pod's stays, and so does its port.
    let (service, request) = service(ClusterIp, family, SCTP, &[(backend, local)], family.pod());
    let request = long(request);
    on(&[same_port(service)], |node| {
        let [first, second] = request.pieces(FIRST);
        let outcome = node.run(Hook::PodIngress, &first.frame());
        let there = translated(&request, ends(&outcome)).pieces(FIRST);
        assert_changed(&outcome, Verdict::Next, OPENED, &there[0].frame());
        assert_changed(&node.run(Hook::PodIngress, &second.frame()), Verdict::Next, HIT, &there[1].frame());
    });
}

#[rstest]
fn pieces_of_sctp_whose_port_changes_are_all_left_alone(
    #[values(V4, V6)] family: Family,
    #[values(true, false)] local: bool,
) {
    let backend = if local { family.local() } else { family.remote() };
    let (service, request) = service(NodePort, family, SCTP, &[(backend, local)], family.client());
    on(&[service], |node| {
        let [first, second] = long(request).pieces(FIRST).map(|piece| piece.frame());
        let outcome = node.run(Hook::Ingress, &first);
        assert_eq!((outcome.verdict, &outcome.frame), (Verdict::Next, &first));
        assert!(outcome.moved_only(&[Reason::FlowOpened, Reason::Unsupported]), "{:?}", outcome.moved);
        assert_untouched(&node.run(Hook::Ingress, &second), &second, Verdict::Next, Reason::Unsupported);
    });
}

#[rstest]
fn of_a_rejected_datagram_the_first_piece_is_answered(#[values(V4, V6)] family: Family) {
    let (service, request) = service(ClusterIp, family, UDP, &[], family.client());
    on(&[service], |node| {
        let [first, second] = long(request).pieces(FIRST);
        let outcome = node.run(Hook::Ingress, &first.frame());
        if family == V4 {
            assert_told(&outcome, &[Reason::NoBackend], &first, (3, 3), None);
        } else {
            // What has an extension header is not answered.
            assert_untouched(&outcome, &first.frame(), Verdict::Drop, Reason::NoBackend);
        }
        let outcome = node.run(Hook::Ingress, &second.frame());
        assert_untouched(&outcome, &second.frame(), Verdict::Drop, Reason::NoBackend);
    });
}

#[rstest]
fn a_first_piece_without_the_whole_transport_header_passes(#[values(V4, V6)] family: Family) {
    let (service, request) = service(NodePort, family, TCP, &[(family.local(), true)], family.client());
    let first = long(request).pieces(8)[0].frame();
    on(&[service], |node| {
        assert_untouched(&node.run(Hook::Ingress, &first), &first, Verdict::Next, Reason::Truncated);
    });
}
