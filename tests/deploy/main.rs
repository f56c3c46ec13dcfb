//! What is in deploy/, sent to a real kube-apiserver and run in the lab as a kubelet would run it.
mod chart;
mod image;
mod installed;
mod policies;
mod procedures;
mod prometheus;
mod render;
mod takeover;
mod uninstall;

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use svc_lab::client::Options;
use svc_lab::load::Load;
use svc_lab::topology::{CLIENT, NODES, OUTSIDE};
use svc_tests::cluster::{CLUSTER_IP, Cluster, PATIENCE, all_backends, http_get_path, service};

use installed::{Installed, all, find};
use render::kustomize;

#[test]
fn the_daemonset_serves_as_the_manifests_start_it() {
    let installed = Installed::new(kustomize("kustomize/base"));
    for (host, target) in [
        (CLIENT, CLUSTER_IP),
        (CLIENT, "udp://10.96.0.7:7"),
        ("node-a", CLUSTER_IP),
        (OUTSIDE, "http://172.31.0.11:30080/"),
        (OUTSIDE, "http://[fd00:31::12]:30080/"),
        (OUTSIDE, CLUSTER_IP),
    ] {
        installed.cluster.expect_balanced(host, &Options::to(target), &all_backends());
    }
    for container in &installed.containers {
        let log = container.log().unwrap();
        assert!(!log.contains("WARN") && log.contains("https://172.31.0.2:6443"), "{log}");
    }
}

/// All that the role allows is asked for, and nothing else is.
#[test]
fn the_role_has_exactly_what_the_agent_asks_of_the_api_server() {
    let mut installed = Installed::new(kustomize("kustomize/base"));
    installed.cluster.change(|manifests| {
        for (name, cluster_ip) in [("older", "10.96.0.92"), ("younger", "10.96.0.93")] {
            let [mut service, _] = service(name, cluster_ip, &[]);
            service["spec"]["externalIPs"] = ["192.0.2.90"].into();
            manifests.put(service);
        }
    });
    let role = find(&installed.objects, "ClusterRole")["rules"].clone();
    let allowed: BTreeSet<_> = all(&role)
        .flat_map(|rule| all(&rule["resources"]).map(move |resource| (rule, resource)))
        .flat_map(|(rule, resource)| all(&rule["verbs"]).map(move |verb| [verb, &rule["apiGroups"][0], resource]))
        .map(|words| words.map(|word| word.as_str().unwrap().to_owned()))
        .collect();
    let deadline = Instant::now() + PATIENCE;
    let (control_plane, _) = installed.cluster.control_plane();
    loop {
        let requests = control_plane.requests().unwrap();
        let asked: BTreeSet<_> =
            requests.iter().map(|[verb, group, resource, _]| [verb, group, resource].map(String::clone)).collect();
        let refused: Vec<_> =
            requests.iter().filter(|[.., code]| !["200", "201", "409"].contains(&code.as_str())).collect();
        assert!(refused.is_empty(), "{refused:?}");
        assert!(asked.is_subset(&allowed), "asked: {asked:?}, allowed: {allowed:?}");
        if asked == allowed {
            return;
        }
        let unused: Vec<_> = allowed.difference(&asked).collect();
        assert!(Instant::now() < deadline, "allowed, and never asked for: {unused:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// One node after the other, as maxUnavailable 1 has it.
#[test]
fn a_rolling_upgrade_loses_no_request_and_no_connection() {
    let mut installed = Installed::new(kustomize("kustomize/base"));
    let node_port = "http://172.31.0.12:30080/";
    let cluster = &installed.cluster;
    let loads = [
        cluster.load(CLIENT, CLUSTER_IP),
        cluster.load(OUTSIDE, node_port),
        cluster.long_connection(CLIENT, CLUSTER_IP),
        cluster.long_connection(OUTSIDE, node_port),
    ];
    thread::sleep(Duration::from_millis(300));
    for node in &NODES {
        installed.containers.remove(0).stop().unwrap();
        let container = installed.start(node);
        installed.containers.push(container);
    }
    installed.cluster.change(|manifests| manifests.set_ready("a1", false));
    installed.cluster.expect_soon(CLIENT, CLUSTER_IP, &["a2", "b1", "b2"]);
    expect_no_failure(loads);
}

#[test]
fn a_pods_connected_udp_socket_is_terminated_by_what_the_daemonset_mounts() {
    let mut installed = Installed::new(kustomize("kustomize/base"));
    assert!(moves_from_a_backend_that_has_left(&mut installed.cluster));
}

#[test]
fn kubeadms_configmap_of_kube_proxy_is_configuration_enough() {
    let installed = Installed::new(render::helm(&["--set", "kubeProxyConfigMap=kube-proxy"]).unwrap());
    installed.cluster.expect_balanced(CLIENT, &Options::to(CLUSTER_IP), &all_backends());
    let configz = http_get_path(&installed.cluster.lab, "node-a", "127.0.0.1:10249", "/configz").unwrap();
    assert!(configz.contains(r#""clusterCIDR":"10.244.0.0/16,fd00:10:244::/56""#), "{configz}");
}

#[test]
fn the_api_server_takes_every_kustomization() {
    let mut cluster = Cluster::without_agents();
    let (control_plane, lab) = cluster.control_plane();
    for directory in ["kustomize/base", "kind", "uninstall", "give-back", "kube-proxy"] {
        let arguments = ["apply", "--dry-run=server", "--validate=strict", "-k", &installed::path(directory)];
        let told = control_plane.kubectl(lab, &arguments).unwrap();
        assert!(
            told.contains("daemonset.apps/") && told.lines().all(|line| line.ends_with("(server dry run)")),
            "{told}"
        );
    }
}

/// It says so, too.
#[test]
fn with_least_privilege_all_is_served_and_pods_udp_sockets_are_left_alone() {
    let mut installed = Installed::new(least_privilege());
    for (host, target) in [(CLIENT, CLUSTER_IP), ("node-a", CLUSTER_IP), (OUTSIDE, "http://172.31.0.12:30080/")] {
        installed.cluster.expect_balanced(host, &Options::to(target), &all_backends());
    }
    assert!(!moves_from_a_backend_that_has_left(&mut installed.cluster));
    assert!(installed.containers[0].log().unwrap().contains("WARN"), "{}", installed.containers[0].log_tail());
}

/// The base with the component, as a user's own kustomization combines them.
fn least_privilege() -> Vec<Value> {
    render::kustomization(&json!({ "resources": ["base"], "components": ["least-privilege"] }))
}

/// Whether a connected UDP socket of a pod is with another backend a second after its own has left.
fn moves_from_a_backend_that_has_left(cluster: &mut Cluster) -> bool {
    let socket = cluster.long_connection(CLIENT, "udp://10.96.0.7:7");
    thread::sleep(Duration::from_millis(300));
    let first = socket.take()[0].backend.clone().unwrap();
    cluster.change(|manifests| manifests.remove_pod(&first));
    thread::sleep(Duration::from_secs(1));
    let last = socket.finish().unwrap().last().unwrap().backend.clone();
    last.is_some_and(|last| last != first)
}

#[track_caller]
fn expect_no_failure(loads: impl IntoIterator<Item = Load>) {
    for load in loads {
        let outcomes = load.finish().unwrap();
        let failed: Vec<_> = outcomes.iter().filter(|outcome| outcome.error.is_some()).collect();
        assert!(failed.is_empty() && outcomes.len() > 10, "{} of {}: {failed:?}", failed.len(), outcomes.len());
    }
}
