//! What is rejected or dropped, and why.
use std::net::{IpAddr, UdpSocket};

use rstest::rstest;
use svc_common::Reason;
use svc_dataplane::packet::{ABORT, ACK, FIN, Packet, RST, SCTP, SYN, TCP, UDP};
use svc_dataplane::tables::Kind::{self, ClusterIp, ExternalIp, LoadBalancer, NodePort};
use svc_dataplane::tables::{Service, Tables};
use svc_dataplane::{Hook, Outcome, Verdict};
use svc_tests::kernel;

use crate::stage::Client::{self, Host, Network, Pod};
use crate::stage::{
    Family, HIT, OPENED, V4, V6, assert_not_ours, assert_reset, assert_told, assert_untouched, ends, on, open, service,
};

/// Port unreachable.
const fn unreachable(family: Family) -> (u8, u8) {
    match family {
        V4 => (3, 3),
        V6 => (1, 4),
    }
}

/// The way that its protocol has of it.
#[track_caller]
fn assert_rejected(outcome: &Outcome, reason: Reason, request: &Packet, family: Family) {
    if request.protocol == TCP {
        // A SYN's own number and 12 bytes behind 9.
        assert_reset(outcome, reason, request, 0, Some(22));
    } else {
        assert_told(outcome, &[reason], request, unreachable(family), None);
    }
}

#[rstest]
fn a_service_without_a_backend_rejects(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(ClusterIp, NodePort, ExternalIp, LoadBalancer)] kind: Kind,
    #[values(Network, Pod, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(kind, family, protocol, &[], client);
    on(&[service], |node| {
        assert_not_ours(&node.run(Hook::Xdp, &request.frame()), &request.frame());
        assert_rejected(&node.run(hook, &request.frame()), Reason::NoBackend, &request, family);
    });
}

#[rstest]
fn a_port_that_a_cluster_ip_does_not_have_is_rejected(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Network, Pod, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(ClusterIp, family, protocol, &[(family.local(), true)], client);
    let request = Packet { dport: 81, ..request };
    on(&[service], |node| {
        assert_rejected(&node.run(hook, &request.frame()), Reason::UnknownPort, &request, family);
    });
}

#[rstest]
fn a_port_that_another_kind_of_address_does_not_have_is_not_ours(
    #[values(NodePort, ExternalIp, LoadBalancer)] kind: Kind,
    #[values(V4, V6)] family: Family,
    #[values(Network, Pod, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(kind, family, TCP, &[(family.local(), true)], client);
    let request = Packet { dport: 81, ..request };
    on(&[service], |node| assert_not_ours(&node.run(hook, &request.frame()), &request.frame()));
}

/// RFC 9293, 3.10.7.1.
#[rstest]
#[case::syn(SYN, 0, Some(22))]
#[case::syn_and_fin(SYN | FIN, 0, Some(23))]
#[case::nothing(0, 0, Some(21))]
#[case::fin(FIN, 0, Some(22))]
#[case::ack(ACK, 5, None)]
#[case::fin_and_ack(FIN | ACK, 5, None)]
#[case::syn_and_ack(SYN | ACK, 5, None)]
fn a_reset_has_the_numbers_that_its_receiver_expects(
    #[case] flags: u8,
    #[case] seq: u32,
    #[case] ack: Option<u32>,
    #[values(V4, V6)] family: Family,
) {
    let (service, request) = service(ClusterIp, family, TCP, &[], family.client());
    let request = request.flags(flags);
    on(&[service], |node| {
        assert_reset(&node.run(Hook::Ingress, &request.frame()), Reason::NoBackend, &request, seq, ack);
    });
}

#[rstest]
fn the_number_that_a_reset_acknowledges_wraps(#[values(V4, V6)] family: Family) {
    let (service, request) = service(ClusterIp, family, TCP, &[], family.client());
    let request = Packet { seq: u32::MAX, ..request };
    on(&[service], |node| {
        assert_reset(&node.run(Hook::Ingress, &request.frame()), Reason::NoBackend, &request, 0, Some(12));
    });
}

#[rstest]
#[case::reset(|packet: Packet| packet.flags(RST))]
#[case::reset_that_acknowledges(|packet: Packet| packet.flags(RST | ACK))]
#[case::with_options(|packet: Packet| Packet { options: vec![1; 4], ..packet })]
fn what_is_not_answered_is_dropped(#[case] made: impl Fn(Packet) -> Packet) {
    let (service, request) = service(ClusterIp, V4, TCP, &[], V4.client());
    let frame = made(request).frame();
    on(&[service], |node| {
        assert_untouched(&node.run(Hook::Ingress, &frame), &frame, Verdict::Drop, Reason::NoBackend);
    });
}

#[rstest]
fn an_address_that_no_service_has_is_dropped(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Network, Pod, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(ClusterIp, family, protocol, &[(family.local(), true)], client);
    let frame = Packet { dst: family.of("10.96.0.11", "fd00:96::11"), ..request }.frame();
    on(&[service], |node| {
        assert_untouched(&node.run(hook, &frame), &frame, Verdict::Drop, Reason::UnallocatedAddress);
    });
}

fn with_ranges(family: Family, ranges: &[(&str, u8)], client: IpAddr) -> (Service, Packet) {
    let (service, request) = service(LoadBalancer, family, TCP, &[(family.local(), true)], client);
    let ranges = ranges.iter().map(|(address, length)| (address.parse().unwrap(), *length)).collect();
    (Service { source_ranges: Some(ranges), ..service }, request)
}

#[rstest]
#[case::its_own_address(V4, Network, &[("203.0.113.7", 32)])]
#[case::its_network(V4, Network, &[("203.0.113.0", 24)])]
#[case::one_of_two(V4, Network, &[("198.18.0.0", 15), ("203.0.113.0", 24)])]
#[case::all(V4, Network, &[("0.0.0.0", 0)])]
#[case::its_own_address_v6(V6, Network, &[("2001:db8:c::7", 128)])]
#[case::its_network_v6(V6, Network, &[("2001:db8:c::", 64)])]
#[case::all_v6(V6, Network, &[("::", 0)])]
#[case::of_a_pod(V4, Pod, &[("10.244.0.0", 16)])]
#[case::of_the_node(V6, Host, &[("2001:db8::", 64)])]
fn a_source_in_the_services_ranges_is_served(
    #[case] family: Family,
    #[case] from: Client,
    #[case] ranges: &[(&str, u8)],
) {
    let (hook, client) = from.of(family);
    let (service, request) = with_ranges(family, ranges, client);
    on(&[service], |node| assert_eq!(open(node, hook, &request).dst, family.local()));
}

#[rstest]
#[case::the_address_beside(V4, Network, &[("203.0.113.6", 32)])]
#[case::another_network(V4, Network, &[("203.0.112.0", 24)])]
#[case::none(V4, Network, &[])]
#[case::the_address_beside_v6(V6, Network, &[("2001:db8:c::6", 128)])]
#[case::none_v6(V6, Network, &[])]
#[case::all_of_the_other_family(V6, Network, &[("0.0.0.0", 0)])]
#[case::a_pods(V4, Pod, &[("203.0.113.0", 24)])]
#[case::a_pods_v6(V6, Pod, &[("2001:db8:c::", 64)])]
#[case::the_nodes(V4, Host, &[("203.0.113.0", 24)])]
#[case::the_nodes_v6(V6, Host, &[("2001:db8:c::", 64)])]
fn a_source_outside_of_the_services_ranges_is_dropped(
    #[case] family: Family,
    #[case] from: Client,
    #[case] ranges: &[(&str, u8)],
) {
    let (hook, client) = from.of(family);
    let (service, request) = with_ranges(family, ranges, client);
    on(&[service], |node| {
        let frame = request.frame();
        assert_untouched(&node.run(hook, &frame), &frame, Verdict::Drop, Reason::SourceRange);
    });
}

#[rstest]
fn external_clients_of_a_local_service_are_dropped_where_no_backend_is_here(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(NodePort, ExternalIp, LoadBalancer)] kind: Kind,
) {
    let (service, request) = service(kind, family, protocol, &[(family.remote(), false)], family.client());
    let service = Service { external_local: true, ..service };
    on(&[service], |node| {
        let frame = request.frame();
        assert_not_ours(&node.run(Hook::Xdp, &frame), &frame);
        assert_untouched(&node.run(Hook::Ingress, &frame), &frame, Verdict::Drop, Reason::NoLocalBackend);
    });
}

#[rstest]
fn a_pod_of_another_node_is_an_external_client_of_a_local_service(#[values(V4, V6)] family: Family) {
    let (service, request) = service(NodePort, family, TCP, &[(family.remote(), false)], family.narrow());
    let service = Service { external_local: true, ..service };
    on(&[service], |node| {
        let frame = request.frame();
        assert_untouched(&node.run(Hook::Ingress, &frame), &frame, Verdict::Drop, Reason::NoLocalBackend);
    });
}

#[rstest]
fn internal_clients_of_an_externally_local_service_get_all_backends(
    #[values(V4, V6)] family: Family,
    #[values(NodePort, ExternalIp, LoadBalancer)] kind: Kind,
    #[values(Pod, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(kind, family, TCP, &[(family.remote(), false)], client);
    let service = Service { external_local: true, ..service };
    on(&[service], |node| assert_eq!(open(node, hook, &request).dst, family.remote()));
}

#[rstest]
fn clients_of_an_internally_local_service_are_dropped_where_no_backend_is_here(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(Network, Pod, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    let (service, request) = service(ClusterIp, family, protocol, &[(family.remote(), false)], client);
    let service = Service { internal_local: true, ..service };
    on(&[service], |node| {
        let frame = request.frame();
        assert_untouched(&node.run(hook, &frame), &frame, Verdict::Drop, Reason::NoLocalBackend);
    });
}

#[rstest]
fn a_local_service_uses_the_backend_that_is_here(
    #[values(V4, V6)] family: Family,
    #[values(ClusterIp, NodePort)] kind: Kind,
) {
    let backends = [(family.remote(), false), (family.local(), true)];
    let (service, request) = service(kind, family, TCP, &backends, family.client());
    let service = Service { internal_local: true, external_local: true, ..service };
    on(&[service], |node| {
        for sport in 40_000..40_020 {
            let seen = open(node, Hook::Ingress, &Packet { sport, ..request.clone() });
            assert_eq!((seen.src, seen.dst), (family.client(), family.local()));
        }
    });
}

#[rstest]
fn a_local_service_without_any_backend_rejects(
    #[values(V4, V6)] family: Family,
    #[values(ClusterIp, NodePort)] kind: Kind,
) {
    let (service, request) = service(kind, family, UDP, &[], family.client());
    let service = Service { internal_local: true, external_local: true, ..service };
    on(&[service], |node| {
        assert_rejected(&node.run(Hook::Ingress, &request.frame()), Reason::NoBackend, &request, family);
    });
}

#[rstest]
#[case::tcp(TCP, RST)]
#[case::tcp_that_acknowledges(TCP, RST | ACK)]
#[case::sctp(SCTP, ABORT)]
fn a_reset_of_no_flow_opens_none(#[case] protocol: u8, #[case] flags: u8, #[values(V4, V6)] family: Family) {
    let (service, request) = service(ClusterIp, family, protocol, &[(family.local(), true)], family.client());
    let frame = request.flags(flags).frame();
    on(&[service], |node| assert_not_ours(&node.run(Hook::Ingress, &frame), &frame));
}

#[rstest]
fn a_full_flow_table_refuses_newcomers_and_serves_whom_it_knows(#[values(V4, V6)] family: Family) {
    let (service, request) = service(ClusterIp, family, TCP, &[(family.local(), true)], family.client());
    let mut tables = Tables::with(&[service]);
    tables.config.flow_sets = 1;
    kernel::with(&tables, |node| {
        let numbered = |sport| Packet { sport, ..request.clone() };
        for sport in [40_000, 40_001] {
            let request = numbered(sport);
            let seen = open(node, Hook::Ingress, &request);
            node.run(Hook::Egress, &crate::stage::answer(&request, seen).frame());
            node.run(Hook::Ingress, &request.flags(ACK).frame());
        }
        let frame = numbered(40_002).frame();
        assert_untouched(&node.run(Hook::Ingress, &frame), &frame, Verdict::Drop, Reason::FlowTableFull);
        assert_not_ours(&node.run(Hook::Xdp, &frame), &frame);
        for sport in [40_000, 40_001] {
            let outcome = node.run(Hook::Ingress, &numbered(sport).flags(ACK).frame());
            assert!(outcome.moved_only(HIT), "{:?}", outcome.moved);
        }
    });
}

#[rstest]
fn without_a_free_source_port_newcomers_are_dropped(#[values(V4, V6)] family: Family) {
    let (service, request) = service(ClusterIp, family, UDP, &[(family.remote(), false)], family.client());
    let mut tables = Tables::with(&[service]);
    // Three of them go with the node's address.
    (tables.config.snat_first, tables.config.snat_last) = (20_000, 20_003);
    kernel::with(&tables, |node| {
        let mut ports = std::collections::BTreeSet::new();
        for sport in 40_000..40_003 {
            let request = Packet { sport, ..request.clone() };
            let outcome = node.run(Hook::Ingress, &request.frame());
            assert!(outcome.moved_only(OPENED), "{:?}", outcome.moved);
            let seen = ends(&outcome);
            ports.insert(seen.sport);
            node.run(Hook::Ingress, &crate::stage::answer(&request, seen).frame());
            node.run(Hook::Ingress, &request.frame());
        }
        assert_eq!(ports.into_iter().collect::<Vec<_>>(), [20_000, 20_001, 20_002]);
        let frame = Packet { sport: 40_003, ..request.clone() }.frame();
        assert_untouched(&node.run(Hook::Ingress, &frame), &frame, Verdict::Drop, Reason::NoSourcePort);
    });
}

#[rstest]
fn no_flow_takes_a_port_at_which_a_socket_of_the_node_has_the_backends_packets(#[values(V4, V6)] family: Family) {
    let (service, request) = service(ClusterIp, family, UDP, &[(family.remote(), false)], family.client());
    let mut tables = Tables::with(&[service]);
    (tables.config.snat_first, tables.config.snat_last) = (20_000, 20_003);
    kernel::with(&tables, |node| {
        let sockets = [20_000, 20_001, 20_002].map(|port| {
            let socket = UdpSocket::bind((family.node(), port)).unwrap();
            socket.connect((family.remote(), 9376)).unwrap();
            socket
        });
        let frame = request.frame();
        assert_untouched(&node.run(Hook::Ingress, &frame), &frame, Verdict::Drop, Reason::NoSourcePort);
        drop(sockets);
        open(node, Hook::Ingress, &request);
    });
}

/// Not those of the link that the request has come in by.
#[rstest]
fn the_sockets_that_count_have_the_address_of_the_link_that_the_request_leaves_by(
    #[values(Hook::Xdp, Hook::Ingress)] hook: Hook,
    #[values(V4, V6)] family: Family,
) {
    let (service, request) = service(ClusterIp, family, UDP, &[(family.narrow(), false)], family.client());
    let mut tables = Tables::with(&[service]);
    (tables.config.snat_first, tables.config.snat_last) = (20_000, 20_003);
    let bind = |address: IpAddr| [20_000, 20_001, 20_002].map(|port| UdpSocket::bind((address, port)).unwrap());
    kernel::with(&tables, |node| {
        let frame = request.frame();
        let leaving = bind(family.of("198.18.0.1", "2001:db8:18::1"));
        let refused = node.run(hook, &frame);
        assert!(!refused.moved.contains_key("flow_opened"), "{:?}", refused.moved);
        drop(leaving);
        let _coming = bind(family.node());
        let opened = node.run(hook, &frame);
        assert!(opened.moved.contains_key("flow_opened"), "{:?}", opened.moved);
    });
}

#[test]
fn rejections_are_limited() {
    let (service, request) = service(ClusterIp, V4, TCP, &[], V4.client());
    // A reset has no answer that would take its place, but counts as one.
    let request = request.flags(RST);
    on(&[service], |node| {
        let moved = node.flood(Hook::Ingress, &request.frame(), 20_000);
        let (rejected, limited) = (moved["no_backend"], moved["reject_limited"]);
        assert_eq!(rejected + limited, 20_000);
        assert!(rejected >= 1_342 && limited > 0, "{moved:?}");
    });
}
