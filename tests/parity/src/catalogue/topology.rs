//! Hints, by zone and by node. Each node is in a zone of its own.
use serde_json::json;
use svc_lab::topology::{CLIENT, OUTSIDE};

use super::{A, B, Build, EVERYONE, NODE_PORTS, Scenario};
use crate::objects::{Endpoint, ready, slices, with_node_port};
use crate::probe::{ALL, MIXED, To, probes};

fn scenario(name: &'static str, n: u8, backends: &[Endpoint]) -> Scenario {
    let objects = [vec![with_node_port(name, n, json!({}))], slices(name, backends)].concat();
    let to = [&[To::ClusterIp][..], NODE_PORTS].concat();
    Scenario::new(name, objects, probes(n, &[CLIENT, "b1", B, OUTSIDE], MIXED, &to))
}

pub(super) const SCENARIOS: &[Build] = &[
    |n| {
        let backends = [ready("a1").for_zone("zone-a"), ready("a2").for_zone("zone-b"), ready("b1").for_zone("zone-b")];
        let objects = [vec![with_node_port("zone-hints", n, json!({}))], slices("zone-hints", &backends)].concat();
        let to = [&[To::ClusterIp][..], NODE_PORTS].concat();
        Scenario::new("zone-hints", objects, probes(n, EVERYONE, ALL, &to))
    },
    |n| {
        let backends = [ready("a1").for_node(A), ready("a2").for_node(B), ready("b1").for_node(B)];
        scenario("node-hints", n, &backends)
    },
    |n| {
        let backends = [ready("a1").for_zone("zone-a"), ready("a2"), ready("b1").for_zone("zone-b")];
        scenario("one-without-hint", n, &backends)
    },
    |n| scenario("hints-for-zone-a", n, &[ready("a1").for_zone("zone-a"), ready("a2").for_zone("zone-a")]),
    |n| {
        let backends = [ready("a1").for_node(A).for_zone("zone-a"), ready("b1").for_node(A).for_zone("zone-b")];
        scenario("node-hints-then-zone", n, &backends)
    },
    // Terminating endpoints have no say, and do not serve here.
    |n| {
        let backends = [ready("a1").for_zone("zone-a"), ready("a2").terminating(), ready("b1").for_zone("zone-b")];
        scenario("hints-and-terminating", n, &backends)
    },
    |n| {
        let backends = [ready("a1").for_zone("zone-b"), ready("b1").for_zone("zone-a")];
        let spec = json!({ "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local" });
        let objects = [vec![with_node_port("hints-and-local", n, spec)], slices("hints-and-local", &backends)].concat();
        let to = [&[To::ClusterIp][..], NODE_PORTS].concat();
        Scenario::new("hints-and-local", objects, probes(n, &[CLIENT, B, OUTSIDE], MIXED, &to))
    },
];
