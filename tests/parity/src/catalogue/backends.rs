//! Which backends a Service has.
use serde_json::json;
use svc_lab::topology::{CLIENT, OUTSIDE, PORT};

use super::{A, B, Build, EVERYONE, NODE_PORTS, Scenario};
use crate::objects::{ready, slices, slices_with_ports, with_node_port};
use crate::probe::{ALL, MIXED, Over, To, probes};

pub(super) const SCENARIOS: &[Build] = &[
    |n| {
        let objects = [vec![with_node_port("one", n, json!({}))], slices("one", &[ready("a1")])].concat();
        let to = [To::ClusterIp, To::NodePort(A), To::NodePort(B)];
        Scenario::new("one", objects, probes(n, EVERYONE, ALL, &to))
    },
    |n| {
        let objects = [vec![with_node_port("two", n, json!({}))], slices("two", &[ready("a1"), ready("b1")])].concat();
        Scenario::new("two", objects, probes(n, EVERYONE, MIXED, &[To::ClusterIp, To::NodePort(B)]))
    },
    |n| {
        let backends = ["a1", "a2", "b1", "b2"].map(ready);
        let objects = [vec![with_node_port("four", n, json!({}))], slices("four", &backends)].concat();
        Scenario::new("four", objects, probes(n, &[CLIENT, "a1", B, OUTSIDE], ALL, &[To::ClusterIp, To::NodePort(A)]))
    },
    |n| {
        let objects = vec![with_node_port("no-slice", n, json!({}))];
        let to = [To::ClusterIp, To::NodePort(A)];
        Scenario::new("no-slice", objects, probes(n, EVERYONE, ALL, &to))
    },
    |n| {
        let objects = [vec![with_node_port("no-endpoints", n, json!({}))], slices("no-endpoints", &[])].concat();
        Scenario::new(
            "no-endpoints",
            objects,
            probes(n, &[CLIENT, A, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(B)]),
        )
    },
    |n| {
        let backends = [ready("a1").unready(), ready("b1").unready()];
        let objects = [vec![with_node_port("unready", n, json!({}))], slices("unready", &backends)].concat();
        Scenario::new("unready", objects, probes(n, &[CLIENT, A, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]))
    },
    |n| {
        let backends = [ready("a1"), ready("a2").unready(), ready("b1"), ready("b2").unready()];
        let objects = [vec![with_node_port("some-unready", n, json!({}))], slices("some-unready", &backends)].concat();
        Scenario::new(
            "some-unready",
            objects,
            probes(n, &[CLIENT, B, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]),
        )
    },
    |n| {
        let gone = ready("b2").conditions(false, false, true);
        let backends = [ready("a1").terminating(), ready("b1").terminating(), gone];
        let objects = [vec![with_node_port("terminating", n, json!({}))], slices("terminating", &backends)].concat();
        Scenario::new("terminating", objects, probes(n, &[CLIENT, A, OUTSIDE], ALL, &[To::ClusterIp, To::NodePort(B)]))
    },
    |n| {
        let backends = [ready("a1").terminating(), ready("b1"), ready("b2").terminating()];
        let objects = [vec![with_node_port("ready-first", n, json!({}))], slices("ready-first", &backends)].concat();
        Scenario::new("ready-first", objects, probes(n, &[CLIENT, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]))
    },
    // The controller calls such endpoints ready, even while they terminate.
    |n| {
        let service = with_node_port("publish-not-ready", n, json!({ "publishNotReadyAddresses": true }));
        let backends = [ready("a1").conditions(true, false, false), ready("b1").conditions(true, false, true)];
        let objects = [vec![service], slices("publish-not-ready", &backends)].concat();
        Scenario::new(
            "publish-not-ready",
            objects,
            probes(n, &[CLIENT, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]),
        )
    },
    |n| {
        let ports = json!([
            { "name": "http", "protocol": "TCP", "port": PORT }, { "name": "echo", "protocol": "UDP", "port": PORT },
        ]);
        let slice = |suffix, backends: &[_]| slices_with_ports("several-slices", suffix, &ports, backends);
        let service = with_node_port("several-slices", n, json!({}));
        let objects =
            [vec![service], slice("-one", &[ready("a1"), ready("b1")]), slice("-two", &[ready("b1"), ready("b2")])];
        Scenario::new(
            "several-slices",
            objects.concat(),
            probes(n, &[CLIENT, OUTSIDE], ALL, &[To::ClusterIp, To::NodePort(A)]),
        )
    },
    // One number, two protocols, and a backend for each.
    |n| {
        let port = |name: &str, protocol: &str| json!([{ "name": name, "protocol": protocol, "port": PORT }]);
        let objects = [
            vec![with_node_port("by-protocol", n, json!({}))],
            slices_with_ports("by-protocol", "-tcp", &port("http", "TCP"), &[ready("a1")]),
            slices_with_ports("by-protocol", "-udp", &port("echo", "UDP"), &[ready("b1")]),
        ];
        Scenario::new(
            "by-protocol",
            objects.concat(),
            probes(n, &[CLIENT, A, OUTSIDE], ALL, &[To::ClusterIp, To::NodePort(B)]),
        )
    },
    |n| {
        let ports = json!([
            { "name": "other", "protocol": "TCP", "port": PORT }, { "name": "echo", "protocol": "TCP", "port": PORT },
        ]);
        let service = with_node_port("other-port-names", n, json!({}));
        let objects = [vec![service], slices_with_ports("other-port-names", "", &ports, &[ready("a1")])].concat();
        Scenario::new(
            "other-port-names",
            objects,
            probes(n, &[CLIENT, OUTSIDE], ALL, &[To::ClusterIp, To::NodePort(A)]),
        )
    },
    |n| {
        let objects =
            [vec![with_node_port("outside-backend", n, json!({}))], slices("outside-backend", &[ready(OUTSIDE)])];
        let from = [CLIENT, A, B, OUTSIDE];
        Scenario::new(
            "outside-backend",
            objects.concat(),
            probes(n, &from, ALL, &[To::ClusterIp, To::NodePort(A), To::NodePort(B)]),
        )
    },
    |n| {
        let objects = [
            vec![with_node_port("mixed-backends", n, json!({}))],
            slices("mixed-backends", &[ready("b1"), ready(OUTSIDE)]),
        ];
        Scenario::new(
            "mixed-backends",
            objects.concat(),
            probes(n, &[CLIENT, B, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(B)]),
        )
    },
    // Only the backend asks itself.
    |n| {
        let objects = [vec![with_node_port("hairpin", n, json!({}))], slices("hairpin", &[ready("b2")])].concat();
        Scenario::new("hairpin", objects, probes(n, &["b2"], ALL, &[&[To::ClusterIp][..], NODE_PORTS].concat()))
    },
    |n| {
        let objects = [vec![with_node_port("one-family", n, json!({}))], slices("one-family", &[ready("a1")])].concat();
        let objects: Vec<_> = objects.into_iter().filter(|object| object["addressType"] != "IPv6").collect();
        Scenario::new(
            "one-family",
            objects,
            probes(n, &[CLIENT, OUTSIDE], &[Over::Tcp4, Over::Tcp6, Over::Udp6], &[To::ClusterIp, To::NodePort(A)]),
        )
    },
];
