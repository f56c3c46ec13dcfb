//! No reason without a packet that moves it.
use std::collections::BTreeMap;
use std::net::IpAddr;

use svc_common::Reason;
use svc_dataplane::packet::{Packet, RST, TCP, UDP};
use svc_dataplane::tables::Kind::{ClusterIp, LoadBalancer, NodePort};
use svc_dataplane::tables::{Service, Tables};
use svc_dataplane::{Hook, net};
use svc_tests::kernel;

use crate::stage::{V4, answer, open, service};

type Moved = BTreeMap<&'static str, u64>;

/// One packet to this Service and node.
fn after(tables: &Tables, request: &Packet) -> Moved {
    kernel::with(tables, |node| node.run(Hook::Ingress, &request.frame()).moved)
}

fn cluster_ip(protocol: u8, backends: &[(IpAddr, bool)]) -> (Service, Packet) {
    service(ClusterIp, V4, protocol, backends, V4.client())
}

/// The counters after what moves this one; `None`: no packet does.
fn moved_by_a_packet(reason: Reason) -> Option<Moved> {
    let here = [(V4.local(), true)];
    let elsewhere = [(V4.remote(), false)];
    let (local, to_local) = cluster_ip(UDP, &here);
    let (remote, to_remote) = cluster_ip(UDP, &elsewhere);
    let (empty, to_empty) = cluster_ip(UDP, &[]);
    Some(match reason {
        // Not counted, of sockets, and what no packet is made for.
        Reason::NotService
        | Reason::SocketConnected
        | Reason::SocketDatagram
        | Reason::SocketRefused
        | Reason::BindRefused
        | Reason::HelperFailed => return None,
        Reason::FlowHit | Reason::FlowOpened => after(&Tables::with(&[local]), &to_local),
        Reason::Reply => kernel::with(&Tables::with(&[local]), |node| {
            let seen = open(node, Hook::Ingress, &to_local);
            node.run(Hook::Egress, &answer(&to_local, seen).frame()).moved
        }),
        Reason::NoBackend => after(&Tables::with(&[empty]), &to_empty),
        Reason::UnknownPort => after(&Tables::with(&[local]), &Packet { dport: 81, ..to_local }),
        Reason::NoLocalBackend => {
            let (service, request) = service(NodePort, V4, TCP, &elsewhere, V4.client());
            after(&Tables::with(&[Service { external_local: true, ..service }]), &request)
        }
        Reason::SourceRange => {
            let (service, request) = service(LoadBalancer, V4, TCP, &here, V4.client());
            after(&Tables::with(&[Service { source_ranges: Some(Vec::new()), ..service }]), &request)
        }
        Reason::UnallocatedAddress => after(&Tables::default(), &to_local),
        Reason::RejectLimited => {
            let (empty, request) = cluster_ip(TCP, &[]);
            let reset = request.flags(RST).frame();
            kernel::with(&Tables::with(&[empty]), |node| node.flood(Hook::Ingress, &reset, 20_000))
        }
        Reason::FlowTableFull => {
            let mut tables = Tables::with(&[local]);
            tables.config.flow_sets = 1;
            kernel::with(&tables, |node| {
                for sport in [40_001, 40_002] {
                    let request = Packet { sport, ..to_local.clone() };
                    let seen = open(node, Hook::Ingress, &request);
                    node.run(Hook::Egress, &answer(&request, seen).frame());
                    node.run(Hook::Ingress, &request.frame());
                }
                node.run(Hook::Ingress, &to_local.frame()).moved
            })
        }
        Reason::NoSourcePort => {
            let mut tables = Tables::with(&[remote]);
            (tables.config.snat_first, tables.config.snat_last) = (20_000, 20_001);
            kernel::with(&tables, |node| {
                let request = Packet { sport: 40_001, ..to_remote.clone() };
                let seen = open(node, Hook::Ingress, &request);
                node.run(Hook::Ingress, &answer(&request, seen).frame());
                node.run(Hook::Ingress, &request.frame());
                node.run(Hook::Ingress, &to_remote.frame()).moved
            })
        }
        Reason::NoRoute => {
            let (service, request) = cluster_ip(UDP, &[("100.64.0.1".parse().unwrap(), false)]);
            after(&Tables::with(&[service]), &request)
        }
        Reason::HopLimit => after(&Tables::with(&[remote]), &to_remote.hop_limit(1)),
        Reason::TooBig => {
            let (service, request) = cluster_ip(UDP, &[(V4.narrow(), false)]);
            after(&Tables::with(&[service]), &Packet { payload: vec![7; usize::from(net::NARROW_MTU)], ..request })
        }
        Reason::Truncated => {
            let frame = to_local.frame();
            let short = &frame[..frame.len() - to_local.payload.len() - 1];
            kernel::with(&Tables::with(&[local]), |node| node.run(Hook::Ingress, short).moved)
        }
        Reason::Unsupported => {
            let mut frame = to_local.frame();
            frame[svc_dataplane::packet::LINK] = 0x44;
            kernel::with(&Tables::with(&[local]), |node| node.run(Hook::Ingress, &frame).moved)
        }
        Reason::FragmentUnknown => {
            let [_, second] = Packet { dst: "198.51.100.99".parse().unwrap(), ..to_local }.pieces(8);
            after(&Tables::with(&[local]), &second)
        }
        Reason::FragmentKept => {
            let [_, second] = to_local.pieces(8);
            after(&Tables::with(&[local]), &second)
        }
    })
}

#[test]
fn every_reason_that_a_packet_can_have_is_counted() {
    for reason in Reason::ALL {
        if let Some(moved) = moved_by_a_packet(*reason) {
            assert!(moved.contains_key(reason.label()), "{}: {moved:?}", reason.label());
        }
    }
}
