//! Flows that end, and what comes after.
use rstest::rstest;
use svc_common::Reason;
use svc_dataplane::Hook;
use svc_dataplane::packet::{ABORT, ACK, DATA, FIN, Packet, RST, SCTP, SHUTDOWN, SYN, TCP, UDP};
use svc_dataplane::tables::Kind::{ClusterIp, NodePort};
use svc_dataplane::tables::{Service, Tables};
use svc_tests::kernel::Kernel;

use crate::stage::{Family, HIT, OPENED, REPLY, V4, V6, answer, assert_reset, assert_told, ends, on, open, service};

fn run(node: &mut Kernel, hook: Hook, packet: &Packet, expected: &[Reason]) {
    let outcome = node.run(hook, &packet.frame());
    assert!(outcome.moved_only(expected), "{packet:?}: {:?}", outcome.moved);
}

/// A flow that both sides know of.
fn established(node: &mut Kernel, request: &Packet) -> Packet {
    let reply = answer(request, open(node, Hook::Ingress, request));
    run(node, Hook::Egress, &reply, REPLY);
    run(node, Hook::Ingress, &goes_on(request), HIT);
    reply
}

/// Another packet of the same connection.
fn goes_on(request: &Packet) -> Packet {
    request.clone().flags(if request.protocol == TCP { ACK } else { DATA })
}

/// Flags by protocol: of the client's last packet and the backend's.
#[rstest]
#[case::both_sides_end(TCP, Some(FIN | ACK), Some(FIN | ACK))]
#[case::the_client_resets(TCP, Some(RST | ACK), None)]
#[case::the_backend_resets(TCP, None, Some(RST))]
#[case::both_sides_of_sctp_end(SCTP, Some(SHUTDOWN), Some(8))]
#[case::the_client_aborts(SCTP, Some(ABORT), None)]
#[case::the_backend_aborts(SCTP, None, Some(ABORT))]
fn a_new_connection_on_an_ended_one_is_a_new_flow(
    #[case] protocol: u8,
    #[case] client: Option<u8>,
    #[case] backend: Option<u8>,
    #[values(V4, V6)] family: Family,
) {
    let (service, request) = service(NodePort, family, protocol, &[(family.local(), true)], family.client());
    on(&[service], |node| {
        let reply = established(node, &request);
        if let Some(flags) = client {
            run(node, Hook::Ingress, &request.clone().flags(flags), HIT);
        }
        if let Some(flags) = backend {
            run(node, Hook::Egress, &reply.clone().flags(flags), REPLY);
        }
        run(node, Hook::Ingress, &goes_on(&request), HIT);
        run(node, Hook::Egress, &reply, REPLY);
        run(node, Hook::Ingress, &request, OPENED);
        run(node, Hook::Ingress, &goes_on(&request), HIT);
    });
}

#[rstest]
#[case::nobody_ends(None, None)]
#[case::only_the_client_ends(Some(FIN | ACK), None)]
#[case::only_the_backend_ends(None, Some(FIN | ACK))]
fn a_syn_on_a_living_flow_opens_none(
    #[case] client: Option<u8>,
    #[case] backend: Option<u8>,
    #[values(V4, V6)] family: Family,
) {
    let (service, request) = service(NodePort, family, TCP, &[(family.local(), true)], family.client());
    on(&[service], |node| {
        let reply = established(node, &request);
        if let Some(flags) = client {
            run(node, Hook::Ingress, &request.clone().flags(flags), HIT);
        }
        if let Some(flags) = backend {
            run(node, Hook::Egress, &reply.clone().flags(flags), REPLY);
        }
        run(node, Hook::Ingress, &request, HIT);
    });
}

#[rstest]
#[case::acknowledgment(ACK)]
#[case::fin(FIN | ACK)]
#[case::syn_and_ack(SYN | ACK)]
fn a_connection_that_is_met_half_way_is_opened(#[case] flags: u8, #[values(V4, V6)] family: Family) {
    let (service, request) = service(ClusterIp, family, TCP, &[(family.local(), true)], family.client());
    on(&[service], |node| run(node, Hook::Ingress, &request.clone().flags(flags), OPENED));
}

/// Runs `test` with the request of an established flow to `family.local()`, after that has left its Service to `others`, and
/// with the reply.
fn when_its_backend_leaves(
    protocol: u8,
    family: Family,
    others: &[(std::net::IpAddr, bool)],
    test: impl FnOnce(&mut Kernel, &Packet, &Packet) + Send,
) {
    let (service, request) = service(NodePort, family, protocol, &[(family.local(), true)], family.client());
    let Service { id, kind, address, port, .. } = service;
    let other = Service::new(id, kind, address, port, protocol, others);
    let mut tables = Tables::with(&[service]);
    svc_tests::kernel::with(&tables.clone(), |node| {
        let reply = established(node, &request);
        tables.put(&other);
        node.set_tables(&tables);
        test(node, &request, &reply);
    });
}

#[rstest]
fn when_its_backend_leaves_a_udp_flow_goes_to_another(#[values(V4, V6)] family: Family) {
    when_its_backend_leaves(UDP, family, &[(family.remote(), false)], |node, request, _| {
        let outcome = node.run(Hook::Ingress, &request.frame());
        assert!(outcome.moved_only(OPENED), "{:?}", outcome.moved);
        assert_eq!(ends(&outcome).dst, family.remote());
    });
}

#[rstest]
fn when_its_last_backend_leaves_a_udp_flow_is_rejected(#[values(V4, V6)] family: Family) {
    when_its_backend_leaves(UDP, family, &[], |node, request, _| {
        let kind = if family == V4 { (3, 3) } else { (1, 4) };
        assert_told(&node.run(Hook::Ingress, &request.frame()), &[Reason::NoBackend], request, kind, None);
    });
}

#[rstest]
fn when_its_backend_leaves_a_connection_stays_and_a_new_one_goes_to_another(
    #[values(TCP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
) {
    when_its_backend_leaves(protocol, family, &[(family.remote(), false)], |node, request, reply| {
        let outcome = node.run(Hook::Ingress, &goes_on(request).frame());
        assert!(outcome.moved_only(HIT), "{:?}", outcome.moved);
        assert_eq!(ends(&outcome).dst, family.local());
        run(node, Hook::Egress, reply, REPLY);

        let outcome = node.run(Hook::Ingress, &request.frame());
        assert!(outcome.moved_only(OPENED), "{:?}", outcome.moved);
        assert_eq!(ends(&outcome).dst, family.remote());
    });
}

#[rstest]
fn when_its_last_backend_leaves_a_tcp_connection_stays_and_a_new_one_is_reset(#[values(V4, V6)] family: Family) {
    when_its_backend_leaves(TCP, family, &[], |node, request, _| {
        run(node, Hook::Ingress, &goes_on(request), HIT);
        assert_reset(&node.run(Hook::Ingress, &request.frame()), Reason::NoBackend, request, 0, Some(22));
    });
}

#[rstest]
fn a_client_with_affinity_stays_with_its_backend(#[values(TCP, UDP)] protocol: u8, #[values(V4, V6)] family: Family) {
    let backends = [(family.local(), true), (family.remote(), false), (family.narrow(), false)];
    let (service, request) = service(NodePort, family, protocol, &backends, family.client());
    let service = Service { affinity_seconds: 100, ..service };
    on(&[service], |node| {
        let first = open(node, Hook::Ingress, &request).dst;
        for sport in 41_000..41_020 {
            assert_eq!(open(node, Hook::Ingress, &Packet { sport, ..request.clone() }).dst, first);
        }
    });
}
