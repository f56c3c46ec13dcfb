//! What a monitor is told of packets, and that nothing is written where nobody listens.
use svc_common::map::{EVENT_FROM_NETWORK, EVENT_FROM_POD, EVENTS_SIZE, Event};
use svc_common::{Addr, Reason};
use svc_dataplane::packet::{Packet, TCP, UDP};
use svc_dataplane::tables::Kind::{ClusterIp, LoadBalancer};
use svc_dataplane::tables::Service;
use svc_dataplane::{Hook, net};
use svc_tests::kernel::Kernel;

use crate::stage::{Family, V4, V6, on, open, service};

const ALWAYS: u64 = u64::MAX;
const ALL: u32 = u32::MAX;

/// Events that this frame at this hook leads to.
fn told(node: &mut Kernel, until: u64, reasons: u32, hook: Hook, frame: &[u8]) -> Vec<Event> {
    let listener = node.listen(until, reasons);
    node.run(hook, frame);
    let (events, lost) = node.told(listener);
    assert_eq!(lost, 0);
    events
}

fn restricted(family: Family) -> (Service, Packet) {
    let (service, request) = service(LoadBalancer, family, TCP, &[(family.local(), true)], family.client());
    (Service { source_ranges: Some(Vec::new()), ..service }, request)
}

/// An event is this packet's.
#[track_caller]
fn assert_of(event: &Event, request: &Packet, reason: Reason, from: u8, interface: u32) {
    assert_eq!(Reason::from_index(event.reason), Some(reason));
    let addresses = (Addr::from(request.src), Addr::from(request.dst));
    assert_eq!((event.src, event.dst), addresses);
    let ports = (request.sport.to_be(), request.dport.to_be());
    assert_eq!((event.src_port, event.dst_port, event.protocol), (ports.0, ports.1, request.protocol));
    assert_eq!((event.from, event.interface, event.netns), (from, interface, 0));
    assert_eq!(event.bytes as usize, request.frame().len());
}

#[test]
fn a_new_flow_is_told_once_with_its_backend_and_counted_for_its_service() {
    for family in [V4, V6] {
        for (backend, masqueraded) in [((family.local(), true), 0), ((family.remote(), false), 1)] {
            let (service, request) = service(ClusterIp, family, UDP, &[backend], family.client());
            let id = service.id;
            on(&[service], |node| {
                let before = node.connections(id);
                let listener = node.listen(ALWAYS, ALL);
                let seen = open(node, Hook::Ingress, &request);
                node.run(Hook::Ingress, &request.frame());
                let (events, _) = node.told(listener);
                assert_eq!(events.len(), 1, "{events:?}");
                assert_of(&events[0], &request, Reason::FlowOpened, EVENT_FROM_NETWORK, net::UPLINK);
                assert_eq!((events[0].to, events[0].to_port), (seen.dst.into(), seen.dport.to_be()));
                assert_eq!((events[0].second_port, events[0].masqueraded), (seen.sport.to_be(), masqueraded));
                assert_ne!(events[0].backend, 0);
                assert_eq!(node.connections(id) - before, 1);
            });
        }
    }
}

#[test]
fn drops_and_rejects_are_told_as_the_packet_came() {
    for family in [V4, V6] {
        let (edge, refused) = restricted(family);
        on(&[edge], |node| {
            let events = told(node, ALWAYS, ALL, Hook::Ingress, &refused.frame());
            assert_eq!(events.len(), 1);
            assert_of(&events[0], &refused, Reason::SourceRange, EVENT_FROM_NETWORK, net::UPLINK);
            assert_eq!((events[0].backend, events[0].to_port), (0, 0));
        });
        let (empty, unserved) = service(ClusterIp, family, TCP, &[], family.pod());
        on(&[empty], |node| {
            let events = told(node, ALWAYS, ALL, Hook::PodIngress, &unserved.frame());
            assert_eq!(events.len(), 1);
            // A reset is shorter than what it answers.
            assert_of(&events[0], &unserved, Reason::NoBackend, EVENT_FROM_POD, net::POD);
        });
    }
}

#[test]
fn nobody_is_told_who_does_not_listen_or_not_any_more_or_not_for_that() {
    let (edge, refused) = restricted(V4);
    on(&[edge], |node| {
        for (until, reasons) in [(0, ALL), (1, ALL), (ALWAYS, !Reason::SourceRange.bit()), (ALWAYS, 0)] {
            assert_eq!(told(node, until, reasons, Hook::Ingress, &refused.frame()), [], "{until} {reasons:x}");
        }
        assert_eq!(told(node, ALWAYS, Reason::SourceRange.bit(), Hook::Ingress, &refused.frame()).len(), 1);
    });
}

#[test]
fn of_a_flood_some_is_told_and_the_rest_is_counted() {
    /// More than a buffer has room for, which nobody reads meanwhile.
    const FLOOD: u32 = 20_000;
    /// Each with a header of 8 bytes.
    const ROOM: usize = EVENTS_SIZE / (size_of::<Event>() + 8);
    let (edge, refused) = restricted(V4);
    on(&[edge], |node| {
        let listener = node.listen(ALWAYS, ALL);
        let moved = node.flood(Hook::Ingress, &refused.frame(), FLOOD);
        let (events, lost) = node.told(listener);
        assert_eq!(moved["source_range"], u64::from(FLOOD));
        assert_eq!(events.len() as u64 + lost, u64::from(FLOOD));
        assert!((1342..=ROOM).contains(&events.len()), "{} were told", events.len());
    });
}
