//! `svc-agent trace` on a node of the lab: what it says of each kind of end, and that asking changes nothing.
use std::collections::BTreeSet;

use serde_json::{Value, json};
use svc_agent::inspect::{Flow, Pins};
use svc_lab::client::Options;
use svc_lab::topology::{CLIENT, NODES, OUTSIDE};
use svc_tests::cluster::{Cluster, all_backends, service};

use super::json as ask;

const POD: &str = "10.244.1.10";
const OUT: &str = "172.31.0.99";
const NODE_PORT: &str = "172.31.0.11:30080";

fn balancer(name: &str, cluster_ip: &str, ip: &str, pods: &[&str], spec: &[(&str, Value)]) -> [Value; 2] {
    let [mut service, slice] = service(name, cluster_ip, pods);
    service["spec"]["type"] = "LoadBalancer".into();
    service["status"]["loadBalancer"]["ingress"] = json!([{ "ip": ip }]);
    for (field, value) in spec {
        service["spec"][*field] = value.clone();
    }
    [service, slice]
}

/// With a Service for each kind of end.
pub(super) fn cluster() -> Cluster {
    let mut cluster = Cluster::with_manifests();
    let [mut sticky, sticky_slice] = service("sticky", "10.96.0.95", &all_backends());
    sticky["spec"]["sessionAffinity"] = "ClientIP".into();
    let cidr = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.0/16"] },
    });
    cluster.change(|manifests| {
        let services = [
            service("near", "10.96.0.91", &["a1"]),
            service("far", "10.96.0.92", &["b1"]),
            service("empty", "10.96.0.93", &[]),
            balancer("local", "10.96.0.94", "192.0.2.94", &["b1"], &[("externalTrafficPolicy", "Local".into())]),
            balancer(
                "edge",
                "10.96.0.96",
                "192.0.2.96",
                &["a1"],
                &[("loadBalancerSourceRanges", ["198.51.100.0/24"][..].into())],
            ),
            [sticky, sticky_slice],
        ];
        services.into_iter().flatten().chain([cidr]).for_each(|object| manifests.put(object));
    });
    cluster.expect_soon(CLIENT, "http://10.96.0.91/", &["a1"]);
    cluster
}

fn trace(cluster: &Cluster, words: &[&str]) -> Value {
    let (code, answer) = ask(cluster, &[&["trace"], words].concat());
    assert_eq!(code, 0, "{answer}");
    answer
}

#[test]
fn each_kind_of_end_is_told_with_its_reason() {
    let cluster = cluster();
    for (protocol, source, destination, from, verdict, reason) in [
        ("tcp", OUT, "10.96.0.91:80", "network", "forwarded", "flow_hit"),
        ("tcp", OUT, "10.96.0.92:80", "network", "forwarded", "flow_hit"),
        ("tcp", POD, "10.96.0.92:80", "pod", "forwarded", "flow_hit"),
        ("tcp", "172.31.0.11", "10.96.0.92:80", "node", "forwarded", "flow_hit"),
        ("udp", "fd00:31::99", "[fd00:31::11]:30007", "network", "forwarded", "flow_hit"),
        ("tcp", OUT, "10.96.0.93:80", "network", "rejected", "no_backend"),
        ("tcp", OUT, "192.0.2.94:80", "network", "dropped", "no_local_backend"),
        ("tcp", POD, "192.0.2.94:80", "pod", "forwarded", "flow_hit"),
        ("tcp", OUT, "192.0.2.96:80", "network", "dropped", "source_range"),
        ("tcp", "198.51.100.7", "192.0.2.96:80", "network", "forwarded", "flow_hit"),
        ("tcp", OUT, "10.96.0.91:81", "network", "rejected", "unknown_port"),
        ("tcp", OUT, "10.96.77.77:80", "network", "dropped", "unallocated_address"),
        ("tcp", OUT, "203.0.113.1:80", "network", "passed", "not_service"),
        ("sctp", OUT, NODE_PORT, "network", "passed", "not_service"),
    ] {
        let answer = trace(&cluster, &[protocol, source, "->", destination]);
        let packet = &answer["packet"];
        let told = (&answer["from"], &packet["verdict"], &packet["reason"]);
        assert_eq!(
            told,
            (&from.into(), &verdict.into(), &reason.into()),
            "{protocol} {source} {destination}: {answer}"
        );
    }
}

#[test]
fn a_forwarded_packet_is_told_with_its_backend_and_its_new_addresses() {
    let cluster = cluster();
    let near = trace(&cluster, &["tcp", OUT, "10.96.0.91:80"]);
    assert_eq!(near["service"]["name"], "near");
    assert_eq!(near["packet"]["backend"], json!({ "address": "10.244.1.11:9376", "local": true }));
    assert_eq!(near["packet"]["after"]["destination"], "10.244.1.11:9376");
    let far = trace(&cluster, &["tcp", OUT, "10.96.0.92:80"]);
    assert_eq!(far["packet"]["backend"], json!({ "address": "10.244.2.11:9376", "local": false }));
    let source = far["packet"]["after"]["source"].as_str().unwrap();
    assert!(source.starts_with("172.31.0.11:"), "what is sent on takes the node's address: {source}");
}

#[test]
fn a_pod_of_another_node_is_told_the_policy_for_clients_outside() {
    let answer = trace(&cluster(), &["tcp", "10.244.2.77", "192.0.2.94:80", "--from", "network"]);
    assert_eq!(answer["packet"]["reason"], "no_local_backend", "{answer}");
    assert_eq!((&answer["service"]["policy"], &answer["service"]["backends"]), (&"Local".into(), &json!([])));
}

#[test]
fn a_socket_is_told_what_its_packets_would_not_say() {
    let cluster = cluster();
    for (source, destination, verdict, reason) in [
        (POD, "10.96.0.91:80", "connected", "socket_connected"),
        (POD, "10.96.0.93:80", "refused", "no_backend"),
        (POD, "10.96.0.91:81", "refused", "unknown_port"),
        (POD, "192.0.2.96:80", "left", "source_range"),
        ("127.0.0.1", "127.0.0.1:30080", "connected", "socket_connected"),
    ] {
        let answer = trace(&cluster, &["tcp", source, destination]);
        assert_eq!(answer["socket"], json!({ "verdict": verdict, "reason": reason }), "{source} {destination}");
    }
    assert_eq!(trace(&cluster, &["tcp", OUT, "10.96.0.91:80"])["socket"], Value::Null);
}

/// Flows, what was counted, who stays where, and the pins.
fn in_use(cluster: &Cluster) -> (BTreeSet<String>, Vec<u64>, BTreeSet<String>, BTreeSet<String>) {
    let directory = cluster.lab.bpffs(NODES[0].name);
    let pins = Pins::open(&directory).unwrap();
    let flow = |flow: &Flow| format!("{} {} {}", flow.client, flow.frontend, flow.backend);
    let files = ["maps", "links"].map(|kind| std::fs::read_dir(directory.join(kind)).unwrap());
    (
        pins.flows().unwrap().iter().map(flow).collect(),
        pins.counters().unwrap().iter().map(|(_, counter)| counter.packets).collect(),
        pins.affinity().unwrap().iter().map(|entry| format!("{entry:?}")).collect(),
        files.into_iter().flatten().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect(),
    )
}

#[test]
fn asking_changes_nothing() {
    let cluster = cluster();
    cluster.expect_soon(OUTSIDE, &format!("http://{NODE_PORT}/"), &all_backends());
    flow_to(&cluster, "http://10.96.0.95/", "10.96.0.95:80");
    let before = in_use(&cluster);
    assert!(!before.0.is_empty() && !before.2.is_empty());
    for destination in [NODE_PORT, "10.96.0.92:80", "10.96.0.93:80", "10.96.0.95:80", "192.0.2.96:80"] {
        trace(&cluster, &["tcp", OUT, destination]);
    }
    assert_eq!(in_use(&cluster), before);
}

/// The flow from outside to this frontend.
fn flow_to(cluster: &Cluster, target: &str, frontend: &str) -> Flow {
    cluster.lab.tally(OUTSIDE, &Options { requests: Some(1), ..Options::to(target) }).unwrap();
    let flows = Pins::open(&cluster.lab.bpffs(NODES[0].name)).unwrap().flows().unwrap();
    flows.into_iter().find(|flow| flow.frontend == frontend).expect("a flow of the client")
}

#[test]
fn a_client_with_affinity_is_told_its_backend() {
    let cluster = cluster();
    let flow = flow_to(&cluster, "http://10.96.0.95/", "10.96.0.95:80");
    for _ in 0..8 {
        let answer = trace(&cluster, &["tcp", OUT, "10.96.0.95:80"]);
        assert_eq!(answer["packet"]["flow"], "new");
        assert_eq!(answer["packet"]["backend"]["address"], flow.backend);
        assert_eq!(answer["service"]["affineTo"], flow.backend);
    }
}

#[test]
fn a_flow_that_is_under_way_is_told_with_its_backend() {
    let cluster = cluster();
    let flow = flow_to(&cluster, "udp://172.31.0.11:30007", "172.31.0.11:30007");
    for _ in 0..8 {
        let answer = trace(&cluster, &["udp", &flow.client, "172.31.0.11:30007"]);
        assert_eq!(answer["packet"]["flow"], "known");
        assert_eq!(answer["packet"]["backend"]["address"], flow.backend);
    }
}
