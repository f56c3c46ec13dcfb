//! `svc-agent check` on a node of the lab.
use serde_json::Value;
use svc_lab::topology::NODES;
use svc_tests::cluster::Cluster;

use super::json;

/// The exit code, and the lines that are not ok: what was checked, and the remedy.
fn check(cluster: &Cluster) -> (i32, Vec<(String, String)>) {
    let directory = cluster.lab.directory().join("manifests");
    let (code, lines) = json(cluster, &["check", "--uplink", "eth0", "--manifests", directory.to_str().unwrap()]);
    let text = |line: &Value, field: &str| line[field].as_str().unwrap().to_owned();
    let lines = lines.as_array().unwrap().iter().filter(|line| line["result"] != "ok");
    (code, lines.map(|line| (text(line, "check"), text(line, "remedy"))).collect())
}

#[test]
fn a_node_that_is_served_is_fit() {
    assert_eq!(check(&Cluster::with_manifests()), (0, vec![]));
}

#[test]
fn what_loses_traffic_fails_and_is_mended_by_its_remedy() {
    let cluster = Cluster::with_manifests();
    let namespace = cluster.lab.namespace(NODES[0].name).unwrap();
    namespace.sysctl(&[("ipv4/ip_forward", "0")]).unwrap();
    let remedy = "sysctl -w net.ipv4.ip_forward=1".to_owned();
    assert_eq!(check(&cluster), (1, vec![("forwarding".to_owned(), remedy)]));
    namespace.sysctl(&[("ipv4/ip_forward", "1")]).unwrap();
    assert_eq!(check(&cluster), (0, vec![]));
}

#[test]
fn what_kube_proxy_has_left_is_a_warning() {
    let cluster = Cluster::with_manifests();
    cluster.lab.namespace(NODES[0].name).unwrap().ip("link add kube-ipvs0 type bridge\n").unwrap();
    let (code, lines) = check(&cluster);
    assert_eq!((code, lines[0].0.as_str()), (0, "kube_proxy_rules"), "{lines:?}");
}
