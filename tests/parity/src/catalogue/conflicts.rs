//! Two Services that claim one external address and port. They have it one after the other, so that one of them is older:
//! the first one's backend is a1, the second one's b1.
use serde_json::{Value, json};
use svc_lab::topology::{CLIENT, OUTSIDE};

use super::{A, Build, SECOND, Scenario};
use crate::objects::{cluster_ip, external_ips, load_balancer, ready, slices};
use crate::probe::{ALL, MIXED, Probe, To, probes};

const ASKING: &[&str] = &[CLIENT, A, OUTSIDE];

/// Created in this year, where nobody else says when.
fn born(mut service: Value, year: u16) -> Value {
    service["metadata"]["creationTimestamp"] = format!("{year}-01-01T00:00:00Z").into();
    service
}

/// Of the address that both claim, and of what is each one's own.
fn asked(n: u8, to: To, contested: bool) -> Vec<Probe> {
    let shared = probes(n, ASKING, ALL, &[to]).into_iter();
    let second = probes(n + SECOND, ASKING, MIXED, &[To::ClusterIp]).into_iter().map(Probe::of_second);
    shared
        .map(|probe| if contested { probe.by_chance() } else { probe })
        .chain(probes(n, ASKING, MIXED, &[To::ClusterIp]))
        .chain(second)
        .collect()
}

/// The second comes, and the first goes.
fn contest(name: &'static str, n: u8, to: To, [first, second]: [Vec<Value>; 2]) -> Scenario {
    Scenario::new(name, first.clone(), asked(n, to, false))
        .then([first, second.clone()].concat(), asked(n, to, true))
        .then(second, asked(n, to, false))
}

/// `names`: the older one's, then the younger one's.
fn with_external_ip(names: [&'static str; 2], n: u8) -> [Vec<Value>; 2] {
    let service = |index: usize, number: u8, backend: &'static str| {
        let service = cluster_ip(names[index], number, json!({ "externalIPs": external_ips(n) }));
        [vec![born(service, 2024 + index as u16)], slices(names[index], &[ready(backend)])].concat()
    };
    [service(0, n, "a1"), service(1, n + SECOND, "b1")]
}

/// As [`with_external_ip`].
fn with_load_balancer(names: [&'static str; 2], n: u8) -> [Vec<Value>; 2] {
    let service = |index: usize, number: u8, backend: &'static str| {
        let mut service = load_balancer(names[index], number, "VIP", json!({}));
        service["status"] = load_balancer(names[index], n, "VIP", json!({}))["status"].clone();
        [vec![born(service, 2024 + index as u16)], slices(names[index], &[ready(backend)])].concat()
    };
    [service(0, n, "a1"), service(1, n + SECOND, "b1")]
}

pub(super) const SCENARIOS: &[Build] = &[
    |n| {
        let name = "contested-external-ip";
        contest(name, n, To::ExternalIp, with_external_ip(["contested-external-1", "contested-external-2"], n))
    },
    |n| {
        let name = "contested-external-ip-names-reversed";
        contest(name, n, To::ExternalIp, with_external_ip(["contested-external-4", "contested-external-3"], n))
    },
    |n| {
        let name = "contested-load-balancer";
        contest(name, n, To::LoadBalancer(A), with_load_balancer(["contested-balancer-1", "contested-balancer-2"], n))
    },
    |n| {
        let name = "contested-load-balancer-names-reversed";
        contest(name, n, To::LoadBalancer(A), with_load_balancer(["contested-balancer-4", "contested-balancer-3"], n))
    },
];
