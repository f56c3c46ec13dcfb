//! What is sent on to another host: by which route, how far and how large; and which source it takes.
use std::net::IpAddr;

use rstest::rstest;
use svc_common::Reason;
use svc_common::map::{CONFIG_DETECT_PODS_V4, CONFIG_DETECT_PODS_V6, CONFIG_MASQUERADE_ALL, CONFIG_TAKE_OVER};
use svc_dataplane::check::Ends;
use svc_dataplane::packet::{ACK, Extension, Packet, SCTP, TCP, UDP};
use svc_dataplane::tables::Kind::{self, ClusterIp, ExternalIp, LoadBalancer, NodePort};
use svc_dataplane::tables::Tables;
use svc_dataplane::{Hook, Verdict, net};
use svc_tests::kernel;

use crate::stage::Client::{self, Host, Network, Pod};
use crate::stage::{
    FROM_HERE, Family, HIT, MASQUERADED, OPENED, REPLY, V4, V6, answer, assert_changed, assert_not_ours, assert_told,
    assert_untouched, ends, error_about, on, open, sent, service, translated,
};

const OPENED_AND_SPENT: &[Reason] = &[Reason::FlowOpened, Reason::HopLimit];
const OPENED_AND_TOO_BIG: &[Reason] = &[Reason::FlowOpened, Reason::TooBig];

const fn by_family(family: Family, v4: (u8, u8), v6: (u8, u8)) -> (u8, u8) {
    match family {
        V4 => v4,
        V6 => v6,
    }
}

#[rstest]
fn a_spent_packet_to_another_host_is_told_of(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(0, 1)] hop_limit: u8,
) {
    let (service, request) = service(NodePort, family, protocol, &[(family.remote(), false)], family.client());
    let request = request.hop_limit(hop_limit);
    on(&[service], |node| {
        let kind = by_family(family, (11, 0), (3, 0));
        assert_told(&node.run(Hook::Ingress, &request.frame()), OPENED_AND_SPENT, &request, kind, None);
        assert_told(&node.run(Hook::Ingress, &request.frame()), &[Reason::HopLimit], &request, kind, None);
        assert_not_ours(&node.run(Hook::Xdp, &request.frame()), &request.frame());
    });
}

#[rstest]
fn a_spent_reply_from_another_host_is_told_of(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
) {
    let (service, request) = service(NodePort, family, protocol, &[(family.remote(), false)], family.client());
    on(&[service], |node| {
        let reply = answer(&request, open(node, Hook::Ingress, &request)).hop_limit(1);
        let kind = by_family(family, (11, 0), (3, 0));
        assert_told(&node.run(Hook::Ingress, &reply.frame()), &[Reason::HopLimit], &reply, kind, None);
    });
}

#[rstest]
fn the_last_hop_but_one_is_gone(
    #[values(V4, V6)] family: Family,
    #[values(Hook::Ingress, Hook::Xdp)] hook: Hook,
    #[values(2, 255)] hop_limit: u8,
) {
    let (service, request) = service(NodePort, family, TCP, &[(family.remote(), false)], family.client());
    let request = request.hop_limit(hop_limit);
    on(&[service], |node| {
        let outcome = node.run(hook, &request.frame());
        let there = translated(&request, ends(&outcome));
        assert_changed(&outcome, Verdict::Redirect, OPENED, &sent(&there, true));
    });
}

#[rstest]
fn a_spent_packet_to_a_backend_here_arrives(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Hook::Ingress, Hook::Xdp)] hook: Hook,
) {
    let (service, request) = service(NodePort, family, protocol, &[(family.local(), true)], family.client());
    let request = request.hop_limit(1);
    on(&[service], |node| {
        let outcome = node.run(hook, &request.frame());
        let there = translated(&request, ends(&outcome));
        assert_changed(&outcome, Verdict::Next, OPENED, &there.frame());
    });
}

#[rstest]
#[case::with_options(V4, |packet: Packet| Packet { options: vec![1; 4], ..packet })]
#[case::with_an_extension_header(V6, |packet: Packet| Packet { extensions: vec![Extension::HopByHop], ..packet })]
fn a_spent_packet_with_more_than_plain_headers_is_dropped(
    #[case] family: Family,
    #[case] made: impl Fn(Packet) -> Packet,
) {
    let (service, request) = service(NodePort, family, TCP, &[(family.remote(), false)], family.client());
    let frame = made(request.clone()).hop_limit(1).frame();
    on(&[service], |node| {
        open(node, Hook::Ingress, &request);
        assert_untouched(&node.run(Hook::Ingress, &frame), &frame, Verdict::Drop, Reason::HopLimit);
    });
}

#[rstest]
fn a_spent_icmp_error_is_dropped(#[values(V4, V6)] family: Family) {
    let (service, request) = service(NodePort, family, UDP, &[(family.remote(), false)], family.client());
    on(&[service], |node| {
        let there = translated(&request, open(node, Hook::Ingress, &request));
        let kind = by_family(family, (3, 3), (1, 4));
        let mut told = error_about(there.dst, kind, 0, &there.network(), there.src);
        told.hop_limit = 1;
        let outcome = node.run(Hook::Ingress, &told.frame());
        assert_untouched(&outcome, &told.frame(), Verdict::Drop, Reason::HopLimit);
    });
}

/// A request to a backend behind the narrow link, of this many bytes from its network header on.
fn narrow(family: Family, protocol: u8, client: IpAddr, size: u16) -> (svc_dataplane::tables::Service, Packet) {
    let (service, request) = service(ClusterIp, family, protocol, &[(family.narrow(), false)], client);
    let headers = request.network().len() - request.payload.len();
    let request = Packet { payload: vec![7; usize::from(size) - headers], ..request };
    (service, request)
}

#[rstest]
fn what_is_too_large_for_the_next_link_is_told_its_size(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Network, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    let (service, request) = narrow(family, protocol, client, net::NARROW_MTU + 1);
    on(&[service], |node| {
        let outcome = node.run(hook, &request.frame());
        let kind = by_family(family, (3, 4), (2, 0));
        assert_told(&outcome, OPENED_AND_TOO_BIG, &request, kind, Some(net::NARROW_MTU));
    });
}

/// By RFC 791 a router could cut it in pieces.
#[rstest]
fn what_may_be_cut_in_pieces_is_told_the_links_size_too(#[values(TCP, UDP)] protocol: u8) {
    let (service, request) = narrow(V4, protocol, V4.client(), net::NARROW_MTU + 100);
    let [first, _] = request.pieces(1_304);
    on(&[service], |node| {
        let outcome = node.run(Hook::Ingress, &first.frame());
        assert_told(&outcome, OPENED_AND_TOO_BIG, &first, (3, 4), Some(net::NARROW_MTU));
    });
}

#[rstest]
fn what_the_next_link_just_takes_is_sent_with_that_links_address(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
) {
    let (service, request) = narrow(family, protocol, family.client(), net::NARROW_MTU);
    on(&[service], |node| {
        assert_not_ours_but_opened(&node.run(Hook::Xdp, &request.frame()), &request.frame());
        let outcome = node.run(Hook::Ingress, &request.frame());
        let there = translated(&request, ends(&outcome));
        assert_eq!(there.src, family.of("198.18.0.1", "2001:db8:18::1"));
        assert_changed(&outcome, Verdict::Redirect, HIT, &sent(&there, true));
    });
}

/// In front of the stack the flow was opened, and the packet left to the stack.
#[track_caller]
fn assert_not_ours_but_opened(outcome: &svc_dataplane::Outcome, frame: &[u8]) {
    assert_untouched(outcome, frame, Verdict::Next, Reason::FlowOpened);
}

#[rstest]
fn a_packet_that_stands_for_several_is_never_too_large(#[values(V4, V6)] family: Family) {
    let (service, request) = narrow(family, TCP, family.client(), net::NARROW_MTU + 200);
    on(&[service], |node| {
        let outcome = node.run_segments(Hook::Ingress, &request.frame(), 2, 1_000);
        assert_eq!(outcome.verdict, Verdict::Redirect);
        assert!(outcome.moved_only(OPENED), "{:?}", outcome.moved);
        assert_eq!(outcome.frame, sent(&translated(&request, ends(&outcome)), true));
    });
}

#[rstest]
fn without_a_route_to_the_backend_packets_are_dropped(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Network, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    let nowhere = family.of("100.64.0.1", "2001:db8:dead::1");
    let (service, request) = service(ClusterIp, family, protocol, &[(nowhere, false)], client);
    on(&[service], |node| {
        let frame = request.frame();
        let outcome = node.run(hook, &frame);
        assert_eq!((outcome.verdict, &outcome.frame), (Verdict::Drop, &frame));
        assert!(outcome.moved_only(&[Reason::FlowOpened, Reason::NoRoute]), "{:?}", outcome.moved);
        assert_untouched(&node.run(hook, &frame), &frame, Verdict::Drop, Reason::NoRoute);
    });
}

#[rstest]
fn the_stack_finds_a_neighbour_that_is_not_known(#[values(TCP, UDP)] protocol: u8, #[values(V4, V6)] family: Family) {
    let unresolved = family.of("10.244.4.5", "fd00:244:4::5");
    let (service, request) = service(NodePort, family, protocol, &[(unresolved, false)], family.client());
    on(&[service], |node| {
        assert_not_ours_but_opened(&node.run(Hook::Xdp, &request.frame()), &request.frame());
        let outcome = node.run(Hook::Ingress, &request.frame());
        let there = translated(&request, ends(&outcome));
        let expected = Packet { hop_limit: 63, ..there }.frame();
        assert_changed(&outcome, Verdict::Redirect, HIT, &expected);
    });
}

#[rstest]
fn a_pod_that_is_its_own_backend_sees_the_node(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(ClusterIp, NodePort, ExternalIp, LoadBalancer)] kind: Kind,
) {
    let (service, request) = service(kind, family, protocol, &[(family.pod(), true)], family.pod());
    on(&[service], |node| {
        let outcome = node.run(Hook::PodIngress, &request.frame());
        let seen = ends(&outcome);
        assert_eq!((seen.src, seen.dst), (family.node(), family.pod()));
        assert!(MASQUERADED.contains(&seen.sport), "{}", seen.sport);
        let there = translated(&request, seen);
        assert_changed(&outcome, Verdict::Redirect, OPENED, &sent(&there, true));

        let reply = answer(&request, seen);
        let outcome = node.run(Hook::PodIngress, &reply.frame());
        assert_changed(&outcome, Verdict::Redirect, REPLY, &sent(&request.reply(), true));
    });
}

#[rstest]
fn while_taking_over_a_connection_begins_with_its_first_packet(
    #[values(Network, Pod)] from: Client,
    #[values(V4, V6)] family: Family,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(ClusterIp, family, TCP, &[(family.local(), true)], client);
    let mut tables = Tables::with(&[service]);
    tables.config.flags = CONFIG_TAKE_OVER;
    kernel::with(&tables, |node| {
        let later = request.clone().flags(ACK);
        assert_not_ours(&node.run(hook, &later.frame()), &later.frame());
        let seen = ends(&node.run(hook, &request.frame()));
        assert_eq!(seen.dst, family.local());
        assert_eq!(ends(&node.run(hook, &later.frame())), seen);
    });
}

#[rstest]
#[case::all(CONFIG_MASQUERADE_ALL, Network, true)]
#[case::all_of_pods(CONFIG_MASQUERADE_ALL, Pod, true)]
#[case::no_pod(CONFIG_DETECT_PODS_V4 | CONFIG_DETECT_PODS_V6, Pod, false)]
fn a_cluster_ips_clients_are_masqueraded_as_configured(
    #[case] flags: u32,
    #[case] from: Client,
    #[case] pods_are_known: bool,
    #[values(V4, V6)] family: Family,
    #[values(TCP, UDP, SCTP)] protocol: u8,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(ClusterIp, family, protocol, &[(family.local(), true)], client);
    let mut tables = Tables::with(&[service]);
    tables.config.flags = flags;
    if !pods_are_known {
        tables.cidrs.clear();
    }
    kernel::with(&tables, |node| {
        let outcome = node.run(hook, &request.frame());
        let seen = ends(&outcome);
        assert_eq!((seen.src, seen.dst), (family.node(), family.local()));
        let there = translated(&request, seen);
        assert_changed(&outcome, Verdict::Redirect, OPENED, &sent(&there, true));
        let outcome = node.run(Hook::PodIngress, &answer(&request, seen).frame());
        assert_changed(&outcome, Verdict::Redirect, REPLY, &sent(&request.reply(), true));
    });
}

#[rstest]
#[case::pods_are_told_in_both_families(CONFIG_DETECT_PODS_V4 | CONFIG_DETECT_PODS_V6, V4, true)]
#[case::pods_are_told_in_both_families_v6(CONFIG_DETECT_PODS_V4 | CONFIG_DETECT_PODS_V6, V6, true)]
#[case::only_in_the_other_family(CONFIG_DETECT_PODS_V6, V4, false)]
#[case::only_in_the_other_family_v6(CONFIG_DETECT_PODS_V4, V6, false)]
fn a_pod_keeps_its_address(#[case] flags: u32, #[case] family: Family, #[case] pods_are_known: bool) {
    let (service, request) = service(ClusterIp, family, TCP, &[(family.local(), true)], family.pod());
    let mut tables = Tables::with(&[service]);
    tables.config.flags = flags;
    if !pods_are_known {
        tables.cidrs.clear();
    }
    kernel::with(&tables, |node| assert_eq!(open(node, Hook::PodIngress, &request).src, family.pod()));
}

/// The node's own connection to a backend, from the very port that a flow has there.
#[rstest]
fn a_connection_that_a_flow_shadows_goes_by_another_port(
    #[values(TCP, UDP)] protocol: u8,
    #[values(V4, V6)] family: Family,
) {
    let (service, request) = service(NodePort, family, protocol, &[(family.remote(), false)], family.client());
    on(&[service], |node| {
        let there = translated(&request, open(node, Hook::Ingress, &request));
        let own = Packet::new(protocol, family.node(), there.sport, family.remote(), there.dport);
        let outcome = node.run(Hook::Egress, &own.frame());
        let seen = ends(&outcome);
        assert_eq!((seen.src, seen.dst, seen.dport), (own.src, own.dst, own.dport));
        assert!(FROM_HERE.contains(&seen.sport), "{}", seen.sport);
        assert_changed(&outcome, Verdict::Redirect, OPENED, &sent(&translated(&own, seen), false));

        let outcome = node.run(Hook::Ingress, &answer(&own, seen).frame());
        assert_changed(&outcome, Verdict::Next, REPLY, &own.reply().frame());
        let outcome = node.run(Hook::Ingress, &answer(&request, ends_of(&there)).frame());
        assert_changed(&outcome, Verdict::Redirect, REPLY, &sent(&request.reply(), true));
    });
}

fn ends_of(packet: &Packet) -> Ends {
    Ends { src: packet.src, sport: packet.sport, dst: packet.dst, dport: packet.dport }
}

#[rstest]
fn a_connection_that_no_flow_shadows_is_not_ours(#[values(TCP, UDP)] protocol: u8, #[values(V4, V6)] family: Family) {
    let (service, request) = service(NodePort, family, protocol, &[(family.remote(), false)], family.client());
    on(&[service], |node| {
        let there = translated(&request, open(node, Hook::Ingress, &request));
        for sport in [there.sport ^ 1, 40_000] {
            let own = Packet::new(protocol, family.node(), sport, family.remote(), there.dport).frame();
            assert_not_ours(&node.run(Hook::Egress, &own), &own);
        }
    });
}

#[rstest]
fn a_privileged_source_port_stays(
    #[values(TCP, UDP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Network, Pod, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(ClusterIp, family, protocol, &[(family.local(), true)], client);
    let request = Packet { sport: 800, ..request };
    on(&[service], |node| {
        let seen = open(node, hook, &request);
        assert_eq!((seen.src, seen.sport), (client, 800));
    });
}

#[test]
fn twenty_thousand_connections_to_one_backend_elsewhere_live_side_by_side() {
    let (service, request) = service(NodePort, V4, TCP, &[(V4.remote(), false)], V4.client());
    let mut tables = Tables::with(&[service]);
    tables.config.flow_sets = 1 << 15;
    kernel::with(&tables, |node| {
        let flows: Vec<(Packet, Packet)> = (30_000..50_000)
            .map(|sport| {
                let request = Packet { sport, ..request.clone() };
                let reply = answer(&request, open(node, Hook::Ingress, &request));
                node.run(Hook::Ingress, &reply.frame());
                node.run(Hook::Ingress, &request.clone().flags(ACK).frame());
                (request, reply)
            })
            .collect();
        for (request, reply) in flows {
            let outcome = node.run(Hook::Ingress, &reply.frame());
            assert!(outcome.moved_only(REPLY), "{request:?}: {:?}", outcome.moved);
            assert_eq!(ends(&outcome).dport, request.sport);
        }
    });
}
