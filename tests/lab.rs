//! The lab itself, without any Service: what the other tests stand on.
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rstest::rstest;
use svc_lab::client::Options;
use svc_lab::load::Load;
use svc_lab::topology::{BACKENDS, CLIENT, Lab, NODES, OUTSIDE, PORT, Pod};
use svc_lab::{binaries, claim};

type Target = fn(&Pod) -> String;

#[rstest]
#[case::ipv4(|pod: &Pod| format!("http://{}:{PORT}/", pod.v4()))]
#[case::ipv6(|pod: &Pod| format!("http://[{}]:{PORT}/", pod.v6()))]
#[case::large_answer(|pod: &Pod| format!("http://{}:{PORT}/bytes?n=2000000", pod.v4()))]
#[case::udp(|pod: &Pod| format!("udp://{}:{PORT}", pod.v4()))]
#[case::udp_ipv6(|pod: &Pod| format!("udp://[{}]:{PORT}", pod.v6()))]
fn every_pod_is_reached(#[case] target: Target) {
    let lab = Lab::new().unwrap();
    for host in [CLIENT, NODES[0].name, "b2"] {
        for pod in &BACKENDS {
            let request = Options { requests: Some(5), ..Options::to(target(pod)) };
            let tally = lab.tally(host, &request).unwrap();
            assert!(tally.failed() == 0 && tally.names() == [pod.name], "{host} -> {}: {tally}", request.target);
        }
    }
}

#[test]
fn the_outside_reaches_nodes_and_no_pod() {
    let lab = Lab::new().unwrap();
    let pod =
        Options { requests: Some(1), timeout_ms: 500, ..Options::to(format!("http://{}:{PORT}/", BACKENDS[0].v4())) };
    assert_eq!(lab.tally(OUTSIDE, &pod).unwrap().answered(), 0);
    // Refused by the node itself: it is there.
    let node = Options { requests: Some(1), ..Options::to(format!("http://{}:{PORT}/", NODES[1].v4())) };
    assert_eq!(lab.request(OUTSIDE, &node).unwrap()[0].error.as_deref(), Some("connect: ConnectionRefused"));
}

#[test]
fn pods_are_reached_with_checksums_computed_before_sending() {
    let lab = Lab::new().unwrap();
    lab.checksum_before_sending().unwrap();
    let request =
        Options { requests: Some(5), ..Options::to(format!("http://{}:{PORT}/bytes?n=100000", BACKENDS[2].v4())) };
    assert_eq!(lab.tally(CLIENT, &request).unwrap().answered(), 5);
}

#[test]
fn labs_made_and_removed_at_once_do_not_sweep_each_other() {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    claim::Claim::new().unwrap();
                }
            });
        }
    });
}

#[test]
fn one_connection_carries_many_requests() {
    let lab = Lab::new().unwrap();
    let target = format!("http://{}:{PORT}/", BACKENDS[2].v4());
    let load = Load::start(&lab, CLIENT, &Options { rate: Some(50), keep_alive: true, ..Options::to(target) }).unwrap();
    thread::sleep(Duration::from_millis(300));
    let outcomes = load.finish().unwrap();
    assert!(outcomes.len() > 5, "only {} requests", outcomes.len());
    assert!(outcomes.iter().all(|outcome| outcome.peer == outcomes[0].peer && outcome.error.is_none()));
}

/// The demonstration is such an owner, killed while its processes run.
#[test]
fn a_killed_owner_leaves_no_process_and_the_next_lab_removes_the_rest() {
    let before = claim::running().unwrap();
    let mut owner = Command::new(binaries::lab().unwrap())
        .args(["demo", "--once", "--requests", "1000000"])
        .env("SVC_AGENT", "/bin/sleep")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let own = |id: &String| id.starts_with(&format!("{}.", owner.id()));
    let deadline = Instant::now() + Duration::from_secs(10);
    let id = loop {
        if let Some(id) = claim::running().unwrap().into_iter().find(own) {
            break id;
        }
        assert!(Instant::now() < deadline, "no lab appeared beside {before:?}");
        thread::sleep(Duration::from_millis(2));
    };
    owner.kill().unwrap();
    owner.wait().unwrap();
    // A command that it had just started, such as one that makes a namespace, comes to its end.
    thread::sleep(Duration::from_millis(500));

    // Another lab's sweep may be at it already.
    let deadline = Instant::now() + Duration::from_secs(10);
    claim::sweep().unwrap();
    while claim::running().unwrap().contains(&id) {
        assert!(Instant::now() < deadline, "{id} is still there");
        thread::sleep(Duration::from_millis(20));
        claim::sweep().unwrap();
    }
    assert!(!claim::cgroup_directory(&id).unwrap().exists());
    let namespaces = std::fs::read_dir(svc_lab::netns::DIRECTORY).unwrap();
    let prefix = claim::namespace_prefix(&id);
    let left: Vec<_> = namespaces.flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(&prefix)), "{left:?}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&format!("svc-lab/{id}/")), "{mounts}");
}
