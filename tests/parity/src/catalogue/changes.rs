//! Objects that change.
use serde_json::{Value, json};
use svc_lab::topology::{CLIENT, OUTSIDE};

use super::{A, B, Build, NODE_PORTS, SECOND, Scenario};
use crate::objects::{cluster_ip, external_ips, load_balancer, ready, slices, with_node_port};
use crate::probe::{ALL, MIXED, Over, Probe, To, probes};

/// Of the flows that last: ports that neither kernel nor proxy gives out.
const PORT_OF_A_FLOW: u16 = 61_007;
const UDP: &[Over] = &[Over::Udp4, Over::Udp6];
const EITHER: &[To] = &[To::ClusterIp, To::NodePort(A), To::NodePort(B)];

fn objects(name: &str, n: u8, backends: &[&'static str]) -> Vec<Value> {
    let backends: Vec<_> = backends.iter().copied().map(ready).collect();
    [vec![with_node_port(name, n, json!({}))], slices(name, &backends)].concat()
}

/// One datagram after another from the same port to each target. IPv4 and IPv6 share ports, so each has its own.
fn one_flow(n: u8, from: &[&'static str], to: &[To]) -> Vec<Probe> {
    let targets = to.iter().flat_map(|to| UDP.iter().map(move |over| (*to, *over)));
    let ports = PORT_OF_A_FLOW + 10 * u16::from(n)..;
    let each = targets.zip(ports).flat_map(|((to, over), port)| {
        probes(n, from, &[over], &[to]).into_iter().map(move |probe| probe.one_flow(port))
    });
    each.collect()
}

pub(super) const SCENARIOS: &[Build] = &[
    |n| {
        let asked = || probes(n, &[CLIENT, A, OUTSIDE], MIXED, EITHER);
        Scenario::new("backend-leaves", objects("backend-leaves", n, &["a1", "b1"]), asked())
            .then(objects("backend-leaves", n, &["b1"]), asked())
            .then(objects("backend-leaves", n, &["a1", "b1"]), asked())
    },
    |n| {
        let asked = || probes(n, &[CLIENT, A, OUTSIDE], MIXED, EITHER);
        Scenario::new("deleted", objects("deleted", n, &["a1"]), asked()).then([], asked())
    },
    |n| {
        let asked = || probes(n, &[CLIENT, A, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]);
        Scenario::new("last-backend-leaves", objects("last-backend-leaves", n, &["a1"]), asked())
            .then(objects("last-backend-leaves", n, &[]), asked())
            .then(objects("last-backend-leaves", n, &["b2"]), asked())
    },
    // The same name, another address and another port.
    |n| {
        let asked = |n| probes(n, &[CLIENT, A, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]);
        let both = || {
            let other = asked(n + SECOND).into_iter().map(|probe| probe.of_second());
            asked(n).into_iter().chain(other).collect()
        };
        Scenario::new("made-again", objects("made-again", n, &["a1"]), both())
            .then([], both())
            .then(objects("made-again", n + SECOND, &["b1"]), both())
    },
    |n| {
        let asked = || probes(n, &[CLIENT, A, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(B), To::LoadBalancer(B)]);
        let backends = || slices("changes-type", &[ready("a1"), ready("b1")]);
        Scenario::new("changes-type", [vec![cluster_ip("changes-type", n, json!({}))], backends()].concat(), asked())
            .then([vec![load_balancer("changes-type", n, "VIP", json!({}))], backends()].concat(), asked())
            .then([vec![cluster_ip("changes-type", n, json!({}))], backends()].concat(), asked())
    },
    |n| {
        let asked = || probes(n, &[CLIENT, A, OUTSIDE], MIXED, &[To::ExternalIp]);
        let with = json!({ "externalIPs": external_ips(n) });
        let backends = || slices("external-ip-goes", &[ready("a1")]);
        Scenario::new("external-ip-goes", [vec![cluster_ip("external-ip-goes", n, with)], backends()].concat(), asked())
            .then([vec![cluster_ip("external-ip-goes", n, json!({}))], backends()].concat(), asked())
    },
    |n| {
        let asked = || probes(n, &[CLIENT, "b1", OUTSIDE], MIXED, EITHER);
        let backends = || slices("policy-changes", &[ready("b1"), ready("b2")]);
        let local = json!({ "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local" });
        Scenario::new(
            "policy-changes",
            [vec![with_node_port("policy-changes", n, json!({}))], backends()].concat(),
            asked(),
        )
        .then([vec![with_node_port("policy-changes", n, local)], backends()].concat(), asked())
        .then([vec![with_node_port("policy-changes", n, json!({}))], backends()].concat(), asked())
    },
    |n| {
        let name = "starts-terminating";
        let asked = || probes(n, &[CLIENT, OUTSIDE], ALL, &[To::ClusterIp, To::NodePort(A)]);
        let leaving = [vec![with_node_port(name, n, json!({}))], slices(name, &[ready("a1").terminating()])].concat();
        let replaced = slices(name, &[ready("a1").terminating(), ready("b1")]);
        Scenario::new(name, leaving, asked())
            .then([vec![with_node_port(name, n, json!({}))], replaced].concat(), asked())
    },
    // A UDP flow follows its Service, whatever it remembers.
    |n| {
        let asked = || one_flow(n, &[CLIENT, A, "b2", OUTSIDE], EITHER);
        Scenario::new("udp-backend-changes", objects("udp-backend-changes", n, &["a1"]), asked())
            .then(objects("udp-backend-changes", n, &["b1"]), asked())
            .then(objects("udp-backend-changes", n, &[]), asked())
    },
    |n| {
        let asked = || one_flow(n, &[CLIENT, A, OUTSIDE], EITHER);
        Scenario::new("udp-first-backend", objects("udp-first-backend", n, &[]), asked())
            .then(objects("udp-first-backend", n, &["a1"]), asked())
    },
    |n| {
        let asked = || one_flow(n, &[CLIENT, OUTSIDE], &[To::ClusterIp, To::NodePort(A)]);
        Scenario::new("udp-service-comes", [], asked())
            .then(objects("udp-service-comes", n, &["b1"]), asked())
            .then([], asked())
    },
    |n| {
        let asked = || probes(n, &[CLIENT, OUTSIDE], ALL, NODE_PORTS);
        Scenario::new("unserved", [], asked())
    },
];
