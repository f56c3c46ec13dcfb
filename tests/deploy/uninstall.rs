//! What `kubectl apply -k deploy/uninstall` leaves of svc on a node.
use std::fs;
use std::process::Command;

use rstest::rstest;
use svc_lab::client::Options;
use svc_lab::topology::{CLIENT, NODES};
use svc_tests::cluster::CLUSTER_IP;

use crate::installed::{Installed, find};
use crate::render::{helm, kustomize};

/// The programs on a node's interfaces, as the kernel lists them, and what is pinned.
fn left(installed: &Installed, node: &str) -> Vec<String> {
    let lab = &installed.cluster.lab;
    let namespace = lab.namespace(node).unwrap();
    let shell = |script: &str| {
        let net = format!("--net={}", namespace.path().display());
        let output = Command::new("nsenter").args([&net, "sh", "-c", script]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let filters = shell("for dev in $(ls /sys/class/net); do tc qdisc show dev $dev clsact; done; ip -d link show");
    let mut left: Vec<String> = filters
        .lines()
        .filter(|line| line.contains("clsact") || line.contains("xdp") || line.contains("prog "))
        .map(str::to_owned)
        .collect();
    let pins = fs::read_dir(lab.bpffs(node)).unwrap();
    left.extend(pins.map(|pin| pin.unwrap().path().display().to_string()));
    left
}

#[rstest]
#[case::tcx("tcx")]
#[case::clsact("clsact")]
fn nothing_is_pinned_or_attached_after_the_uninstall(#[case] tc: &str) {
    let mut installed = Installed::new(helm(&["--set", &format!("tc={tc},xdp=generic")]).unwrap());
    for node in &NODES {
        assert!(left(&installed, node.name).len() > 1, "{:?}", left(&installed, node.name));
    }
    installed.containers.drain(..).for_each(|container| container.stop().unwrap());
    let daemon_set = find(&kustomize("uninstall"), "DaemonSet").clone();
    for node in &NODES {
        let told = installed.initialise(node, &daemon_set);
        assert!(told.contains("removed /sys/fs/bpf/svc"), "{told}");
        assert_eq!(left(&installed, node.name), Vec::<String>::new());
    }
    let request = Options { timeout_ms: 500, ..Options::to(CLUSTER_IP) };
    for host in [CLIENT, "node-a"] {
        assert_eq!(
            installed.cluster.lab.tally(host, &request).unwrap().answered(),
            0,
            "a socket of {host} is still served"
        );
    }
    assert!(installed.initialise(&NODES[0], &daemon_set).contains("nothing to remove"));
}
