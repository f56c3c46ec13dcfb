//! Manifests in, the kernel's maps out. `cargo insta review` accepts a change.
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use svc_agent::cidrs::PodDetector;
use svc_agent::dataplane::dump::dump;
use svc_agent::dataplane::fake::Fake;
use svc_agent::desired::Limits;
use svc_agent::plan::NodePortAddresses;
use svc_agent::reconcile::{Config, Pace, Reconciler};
use svc_agent::source::{Event, Interfaces, Link, manifests};
use svc_agent::status::Status;
use svc_common::Addr;
use svc_common::map::Uplink;

/// What node-a's kernel gets of the file.
fn maps_of(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    let (objects, _) = manifests::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
    let config = Config {
        node_name: "node-a".to_owned(),
        nodeport_addresses: NodePortAddresses::All,
        pods: PodDetector::NodeCidr,
        masquerade_all: false,
        external_ips: true,
        take_over: false,
        limits: Limits { services: 100, backends: 100, source_ranges: 100, frontends: 100, addresses: 100 },
        pace: Pace::default(),
    };
    let uplink = Uplink { v4: Addr::ANY_V4, v6: "fd00:7::1".parse::<IpAddr>().unwrap().into() };
    let interfaces = Interfaces {
        addresses: vec!["192.168.7.1".parse().unwrap(), "fd00:7::1".parse().unwrap()],
        sources: [(2, uplink)].into(),
        uplink: Some(Link { index: 2, address: [0; 3] }),
    };
    let mut reconciler = Reconciler::new(config, Fake::default(), Arc::new(Status::default()));
    for event in [
        Event::Services(objects.services),
        Event::Slices(objects.slices),
        Event::Node(objects.nodes.first().cloned()),
        Event::ServiceCidrs(objects.service_cidrs),
        Event::Interfaces(interfaces),
    ] {
        reconciler.take(event);
    }
    reconciler.reconcile().unwrap();
    dump(&reconciler.dataplane().state)
}

#[test]
fn a_dual_stack_service_with_a_node_port() {
    insta::assert_snapshot!(maps_of("dual-stack.yaml"));
}

#[test]
fn external_frontends_and_local_policies() {
    insta::assert_snapshot!(maps_of("policies.yaml"));
}

#[test]
fn what_must_not_be_served_costs_the_rest_nothing() {
    insta::assert_snapshot!(maps_of("odd-ones.yaml"));
}
