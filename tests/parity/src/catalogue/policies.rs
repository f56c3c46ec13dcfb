//! Traffic policies, source ranges and affinity.
use serde_json::{Value, json};
use svc_lab::topology::{CLIENT, OUTSIDE};

use super::{A, B, Build, EVERYONE, LOAD_BALANCERS, NODE_PORTS, Scenario};
use crate::objects::{cluster_ip, external_ips, load_balancer, ready, slices, with_node_port};
use crate::probe::{ALL, MIXED, Over, Probe, To, probes};

const THREE: &[Over] = &[Over::Tcp4, Over::Tcp6, Over::Udp4];

fn internal_local() -> Value {
    json!({ "internalTrafficPolicy": "Local" })
}

fn external_local() -> Value {
    json!({ "externalTrafficPolicy": "Local" })
}

fn ranges(ranges: &[&str]) -> Value {
    json!({ "loadBalancerSourceRanges": ranges })
}

fn affinity() -> Value {
    json!({ "sessionAffinity": "ClientIP", "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 600 } } })
}

fn sticky(probes: Vec<Probe>) -> Vec<Probe> {
    probes.into_iter().map(Probe::sticky).collect()
}

const FOUR: [&str; 4] = ["a1", "a2", "b1", "b2"];

pub(super) const SCENARIOS: &[Build] = &[
    |n| {
        let service = with_node_port("internal-local", n, internal_local());
        let objects = [vec![service], slices("internal-local", &FOUR.map(ready))].concat();
        Scenario::new("internal-local", objects, probes(n, EVERYONE, ALL, &[To::ClusterIp, To::NodePort(B)]))
    },
    |n| {
        let service = with_node_port("internal-local-away", n, internal_local());
        let objects = [vec![service], slices("internal-local-away", &[ready("b1")])].concat();
        Scenario::new("internal-local-away", objects, probes(n, EVERYONE, THREE, &[To::ClusterIp, To::NodePort(A)]))
    },
    |n| {
        let objects =
            [vec![cluster_ip("internal-local-empty", n, internal_local())], slices("internal-local-empty", &[])];
        Scenario::new(
            "internal-local-empty",
            objects.concat(),
            probes(n, &[CLIENT, A, OUTSIDE], MIXED, &[To::ClusterIp]),
        )
    },
    |n| {
        let backends = [ready("a1").terminating(), ready("b1")];
        let service = cluster_ip("internal-local-terminating", n, internal_local());
        let objects = [vec![service], slices("internal-local-terminating", &backends)].concat();
        Scenario::new(
            "internal-local-terminating",
            objects,
            probes(n, &[CLIENT, A, B, OUTSIDE], MIXED, &[To::ClusterIp]),
        )
    },
    |n| {
        let service = load_balancer("external-local", n, "VIP", external_local());
        let objects = [vec![service], slices("external-local", &FOUR.map(ready))].concat();
        let to = [NODE_PORTS, LOAD_BALANCERS, &[To::ClusterIp]].concat();
        Scenario::new("external-local", objects, probes(n, EVERYONE, THREE, &to))
    },
    |n| {
        let service = load_balancer("external-local-away", n, "VIP", external_local());
        let objects = [vec![service], slices("external-local-away", &[ready("b1")])].concat();
        let to = [NODE_PORTS, LOAD_BALANCERS, &[To::ClusterIp]].concat();
        Scenario::new("external-local-away", objects, probes(n, EVERYONE, THREE, &to))
    },
    |n| {
        let service = load_balancer("external-local-empty", n, "VIP", external_local());
        let objects = [vec![service], slices("external-local-empty", &[])].concat();
        let to = [To::NodePort(A), To::LoadBalancer(A)];
        Scenario::new("external-local-empty", objects, probes(n, &[CLIENT, A, OUTSIDE], MIXED, &to))
    },
    |n| {
        let backends = [ready("a1").terminating(), ready("b1")];
        let service = load_balancer("external-local-terminating", n, "VIP", external_local());
        let objects = [vec![service], slices("external-local-terminating", &backends)].concat();
        let to = [NODE_PORTS, LOAD_BALANCERS].concat();
        Scenario::new("external-local-terminating", objects, probes(n, &[CLIENT, OUTSIDE], MIXED, &to))
    },
    |n| {
        let mut spec = external_local();
        spec["externalIPs"] = json!(external_ips(n));
        let service = with_node_port("external-local-external-ip", n, spec);
        let objects = [vec![service], slices("external-local-external-ip", &[ready("a2"), ready("b1")])].concat();
        Scenario::new("external-local-external-ip", objects, probes(n, EVERYONE, MIXED, &[To::ExternalIp]))
    },
    |n| {
        let spec = json!({ "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local" });
        let objects =
            [vec![load_balancer("both-local", n, "VIP", spec)], slices("both-local", &[ready("a1")])].concat();
        let to = [NODE_PORTS, LOAD_BALANCERS, &[To::ClusterIp]].concat();
        Scenario::new("both-local", objects, probes(n, &[CLIENT, "b1", B, OUTSIDE], MIXED, &to))
    },
    |n| {
        let service = load_balancer("ranges-outside", n, "VIP", ranges(&["172.31.0.99/32", "fd00:31::99/128"]));
        let objects = [vec![service], slices("ranges-outside", &[ready("a1"), ready("b1")])].concat();
        let to = [LOAD_BALANCERS, &[To::NodePort(A), To::ClusterIp]].concat();
        Scenario::new("ranges-outside", objects, probes(n, EVERYONE, THREE, &to))
    },
    |n| {
        let service = load_balancer("ranges-nobody", n, "VIP", ranges(&["203.0.113.128/25", "2001:db8:ffff::/48"]));
        let objects = [vec![service], slices("ranges-nobody", &[ready("a1"), ready("b1")])].concat();
        let to = [LOAD_BALANCERS, &[To::NodePort(B), To::ClusterIp]].concat();
        Scenario::new("ranges-nobody", objects, probes(n, EVERYONE, MIXED, &to))
    },
    |n| {
        let service = load_balancer("ranges-pods", n, "VIP", ranges(&["10.244.0.0/16", "fd00:10:244::/56"]));
        let objects = [vec![service], slices("ranges-pods", &[ready("a1"), ready("b1")])].concat();
        Scenario::new("ranges-pods", objects, probes(n, EVERYONE, MIXED, &[To::LoadBalancer(A)]))
    },
    |n| {
        let service = load_balancer("ranges-nodes", n, "VIP", ranges(&["172.31.0.0/26", "fd00:31::/122"]));
        let objects = [vec![service], slices("ranges-nodes", &[ready("a1"), ready("b1")])].concat();
        Scenario::new("ranges-nodes", objects, probes(n, EVERYONE, MIXED, &[To::LoadBalancer(A)]))
    },
    // A list that names one family shuts out the other.
    |n| {
        let service = load_balancer("ranges-one-family", n, "VIP", ranges(&["0.0.0.0/0"]));
        let objects = [vec![service], slices("ranges-one-family", &[ready("a1"), ready("b1")])].concat();
        Scenario::new("ranges-one-family", objects, probes(n, &[CLIENT, A, OUTSIDE], ALL, &[To::LoadBalancer(A)]))
    },
    |n| {
        let mut spec = ranges(&["172.31.0.99/32", "fd00:31::99/128"]);
        spec["externalTrafficPolicy"] = "Local".into();
        let service = load_balancer("ranges-external-local", n, "VIP", spec);
        let objects = [vec![service], slices("ranges-external-local", &[ready("a1")])].concat();
        Scenario::new("ranges-external-local", objects, probes(n, &[CLIENT, A, OUTSIDE], MIXED, LOAD_BALANCERS))
    },
    |n| {
        let objects =
            [vec![load_balancer("affinity", n, "VIP", affinity())], slices("affinity", &["a1", "a2", "b2"].map(ready))]
                .concat();
        let to = [To::ClusterIp, To::NodePort(A), To::NodePort(B), To::LoadBalancer(A)];
        Scenario::new("affinity", objects, sticky(probes(n, &[CLIENT, "b1", A, OUTSIDE], THREE, &to)))
    },
    |n| {
        let mut spec = affinity();
        spec["externalTrafficPolicy"] = "Local".into();
        spec["internalTrafficPolicy"] = "Local".into();
        let objects =
            [vec![load_balancer("affinity-local", n, "VIP", spec)], slices("affinity-local", &FOUR.map(ready))];
        let to = [To::ClusterIp, To::NodePort(A), To::LoadBalancer(A)];
        Scenario::new("affinity-local", objects.concat(), sticky(probes(n, &[CLIENT, A, OUTSIDE], MIXED, &to)))
    },
    // The client's backend goes: it is given another one.
    |n| {
        let objects = |backends: &[&'static str]| {
            let backends: Vec<_> = backends.iter().copied().map(ready).collect();
            [vec![with_node_port("affinity-moves", n, affinity())], slices("affinity-moves", &backends)].concat()
        };
        let asked = || probes(n, &[CLIENT, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]);
        Scenario::new("affinity-moves", objects(&["a1"]), asked()).then(objects(&["b1", "b2"]), sticky(asked()))
    },
];
