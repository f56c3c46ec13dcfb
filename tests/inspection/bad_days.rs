//! `svc-agent run` where something is wrong: one sentence that names what, and exit code 1.
use std::fs;

use rstest::rstest;
use svc_lab::agent::ask;
use svc_lab::topology::{Lab, NODES};
use svc_tests::cluster::Cluster;

/// The exit code and what stands on standard error, log lines left out.
fn start(lab: &Lab, arguments: &[&str]) -> (Option<i32>, String) {
    let cgroup = lab.cgroup(NODES[0].name).unwrap();
    let manifests = lab.directory();
    let usual =
        [("--cgroup", cgroup.to_str().unwrap()), ("--uplink", "eth0"), ("--manifests", manifests.to_str().unwrap())];
    let usual = usual.iter().filter(|(flag, _)| !arguments.contains(flag)).flat_map(|(flag, value)| [*flag, *value]);
    let all: Vec<&str> = ["run"].into_iter().chain(usual).chain(arguments.iter().copied()).collect();
    let output = ask(lab, &NODES[0], &all).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    let own = errors.lines().filter(|line| line.starts_with("svc-agent: ") || line.starts_with("error: "));
    (output.status.code(), own.collect::<Vec<_>>().join("\n"))
}

#[rstest]
#[case::no_cgroup(&["--cgroup", "/nowhere"], "svc-agent: --cgroup /nowhere: name a directory of cgroup v2")]
#[case::another_file_system(&["--cgroup", "/proc"], "svc-agent: --cgroup /proc is not in a cgroup v2 hierarchy: name a")]
#[case::no_interface(&["--uplink", "eth9"], "svc-agent: --uplink eth9: there is no such interface; `ip link`")]
#[case::no_manifests(&["--manifests", "/nowhere"], "svc-agent: --manifests /nowhere: No such file")]
#[case::no_file(&["--config", "/nowhere"], "svc-agent: --config /nowhere: No such file")]
#[case::not_an_address(&["--metrics-bind-address", "192.0.2.1:1"], "svc-agent: --metrics-bind-address 192.0.2.1:1: cannot")]
fn what_is_not_there_is_named_with_its_flag(#[case] arguments: &[&str], #[case] told: &str) {
    let lab = Lab::new().unwrap();
    let (code, errors) = start(&lab, arguments);
    assert!(errors.starts_with(told) && errors.lines().count() == 1, "{errors}");
    assert_eq!(code, Some(1));
    assert!(!lab.bpffs(NODES[0].name).join("maps").join("frontends").exists(), "nothing was pinned");
}

#[rstest]
#[case(&["--flow-table-size", "3"], "3 is not in 64..=268435456")]
#[case(&["--sync-period", "5"], "say it as 30s or 1m30s")]
#[case(&["--xdp", "fast"], "error: invalid value 'fast' for '--xdp <XDP>'")]
#[case(&["--cluster-cidr", "10.0.0.0/33"], "error: invalid value '10.0.0.0/33' for '--cluster-cidr <LIST>'")]
fn a_value_that_is_not_accepted_is_exit_code_2(#[case] arguments: &[&str], #[case] told: &str) {
    let (code, errors) = start(&Lab::new().unwrap(), arguments);
    assert!(errors.contains(told), "{errors}");
    assert_eq!(code, Some(2));
}

#[test]
fn a_port_that_is_taken_is_named_with_its_flag() {
    let cluster = Cluster::with_manifests();
    let (code, errors) = start(&cluster.lab, &[]);
    assert!(errors.starts_with("svc-agent: --healthz-bind-address 0.0.0.0:10256: cannot listen there"), "{errors}");
    assert_eq!(code, Some(1));
}

#[test]
fn pins_of_another_version_are_named_and_stay() {
    let mut cluster = Cluster::with_manifests();
    cluster.kill_agent(&NODES[0]);
    let maps = cluster.lab.bpffs(NODES[0].name).join("maps");
    // Another shape under the name.
    fs::remove_file(maps.join("frontends")).unwrap();
    fs::rename(maps.join("affinity"), maps.join("frontends")).unwrap();
    let (code, errors) = start(&cluster.lab, &[]);
    let named = format!("svc-agent: {} is of another version of svc-agent", maps.join("frontends").display());
    assert!(errors.starts_with(&named) && errors.contains("`svc-agent cleanup`"), "{errors}");
    assert_eq!(code, Some(1));
    assert!(maps.join("frontends").exists(), "whoever is served by them still is");
}
