//! svc in the place of a kube-proxy that is at work, and kube-proxy in svc's, as docs/operations.md says it is done.
use std::process::Command;
use std::thread;
use std::time::Duration;

use rstest::rstest;
use svc_lab::kube_proxy::{KubeProxy, Mode};
use svc_lab::load::Load;
use svc_lab::topology::{CLIENT, NODES, OUTSIDE};
use svc_tests::cluster::{CLUSTER_IP, Cluster, all_backends, eventually};

use crate::expect_no_failure;
use crate::installed::{Installed, find};
use crate::render::{helm, kustomize};

const NODE_PORT: &str = "http://172.31.0.12:30080/";

fn connections(cluster: &Cluster) -> [Load; 4] {
    let connections = [CLIENT, OUTSIDE].map(|host| {
        let target = if host == CLIENT { CLUSTER_IP } else { NODE_PORT };
        [cluster.long_connection(host, target), cluster.long_connection(host, target)]
    });
    thread::sleep(Duration::from_millis(300));
    let [[a, b], [c, d]] = connections;
    [a, b, c, d]
}

fn kube_proxies(cluster: &mut Cluster, mode: Mode) -> Vec<KubeProxy> {
    let (control_plane, lab) = cluster.control_plane();
    NODES.iter().map(|node| KubeProxy::start(lab, node, control_plane, mode, &[]).unwrap()).collect()
}

/// What this script says on each node.
fn on_nodes<'a>(cluster: &'a Cluster, script: &'a str) -> impl Iterator<Item = String> + 'a {
    NODES.iter().map(move |node| {
        let namespace = cluster.lab.namespace(node.name).unwrap().path();
        let net = format!("--net={}", namespace.display());
        let output = Command::new("nsenter").args([&net, "sh", "-c", script]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    })
}

/// As the rules of a network plugin, which masquerade what leaves the cluster, keep the kernel's connection tracking at work
/// whether kube-proxy is there or not.
const NETWORK_PLUGIN: &str = "nft -f - <<END
    table inet plugin {
        chain prerouting { type nat hook prerouting priority dstnat; }
        chain postrouting { type nat hook postrouting priority srcnat; }
    }
END";

/// All rules, whoever's.
const LIST: &str = "nft list ruleset; iptables-legacy-save 2>&1; true";

/// Those of kube-proxy's rules that are left.
fn rules(cluster: &Cluster) -> String {
    let lines: Vec<String> =
        on_nodes(cluster, LIST).flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
    lines.into_iter().filter(|line| line.contains("KUBE-SVC") || line.contains("table ip kube-proxy")).collect()
}

#[rstest]
#[case::nftables(Mode::Nftables)]
#[case::iptables(Mode::Iptables)]
fn taking_over_and_giving_back_lose_no_request_and_no_connection(#[case] mode: Mode) {
    let mut cluster = Cluster::without_agents();
    assert_eq!(on_nodes(&cluster, NETWORK_PLUGIN).count(), NODES.len());
    let kube_proxies_before = kube_proxies(&mut cluster, mode);
    // It is healthy a little before its rules are there.
    for (host, target) in [(CLIENT, CLUSTER_IP), (OUTSIDE, NODE_PORT)] {
        cluster.expect_soon(host, target, &all_backends());
    }
    let loads = [cluster.load(CLIENT, CLUSTER_IP), cluster.load(OUTSIDE, NODE_PORT)];
    let old = connections(&cluster);
    assert_ne!(rules(&cluster), "");

    drop(kube_proxies_before);
    let mut installed = Installed::on(cluster, helm(&["--set", "takeOver=true"]).unwrap());
    thread::sleep(Duration::from_millis(500));
    expect_no_failure(old);
    for node in &NODES {
        KubeProxy::cleanup(&installed.cluster.lab, node).unwrap();
    }
    assert_eq!(rules(&installed.cluster), "");
    installed.cluster.change(|manifests| manifests.set_ready("a1", false));
    installed.cluster.expect_soon(OUTSIDE, NODE_PORT, &["a2", "b1", "b2"]);
    installed.cluster.change(|manifests| manifests.set_ready("a1", true));
    installed.cluster.expect_soon(OUTSIDE, NODE_PORT, &all_backends());

    let old = connections(&installed.cluster);
    installed.containers.drain(..).for_each(|container| container.stop().unwrap());
    let _kube_proxies = kube_proxies(&mut installed.cluster, mode);
    // As the document has it: it is healthy a little before its rules are there.
    eventually("kube-proxy's rules are on every node", || {
        on_nodes(&installed.cluster, LIST).all(|rules| rules.contains("30080")).then_some(())
    });
    let daemon_set = find(&kustomize("give-back"), "DaemonSet").clone();
    for node in &NODES {
        installed.initialise(node, &daemon_set);
    }
    thread::sleep(Duration::from_millis(500));
    installed.cluster.expect_soon(OUTSIDE, NODE_PORT, &all_backends());
    expect_no_failure(old);
    let daemon_set = find(&kustomize("uninstall"), "DaemonSet").clone();
    for node in &NODES {
        installed.initialise(node, &daemon_set);
    }
    thread::sleep(Duration::from_millis(300));
    expect_no_failure(loads);
}
