//! What docs/operations.md recommends against advisories, on a real API server.
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use svc_tests::cluster::{Cluster, service};

/// The indented block of the document that begins with this line.
fn block(first: &str) -> String {
    let document = include_str!("../../docs/operations.md");
    let lines = document.lines().skip_while(|line| line.trim() != first).map_while(|line| line.strip_prefix("    "));
    lines.collect::<Vec<_>>().join("\n")
}

/// What the API server says to a Service with this external address.
fn propose(cluster: &mut Cluster, external_ip: &str) -> Result<String, String> {
    let [mut service, _] = service("proposed", "10.96.0.66", &[]);
    service["spec"]["externalIPs"] = [external_ip].into();
    let (control_plane, lab) = cluster.control_plane();
    let file = lab.directory().join("proposed.json");
    fs::write(&file, service.to_string()).unwrap();
    // Of externalIPs the API server warns in any case.
    let arguments = ["create", "--warnings-as-errors=false", "--dry-run=server", "-f", file.to_str().unwrap()];
    control_plane.kubectl(lab, &arguments).map_err(|error| format!("{error:#}"))
}

#[test]
fn cve_2020_8554_the_documents_policy_lets_external_ips_be_of_its_range_only() {
    let mut cluster = Cluster::without_agents();
    propose(&mut cluster, "172.31.0.99").unwrap();
    let policy = block("apiVersion: admissionregistration.k8s.io/v1");
    assert!(policy.contains("kind: ValidatingAdmissionPolicyBinding"), "{policy}");
    let (control_plane, lab) = cluster.control_plane();
    let file = lab.directory().join("policy.yaml");
    fs::write(&file, policy).unwrap();
    control_plane.kubectl(lab, &["apply", "--validate=strict", "-f", file.to_str().unwrap()]).unwrap();
    // The API server learns of its own policies by a watch.
    let deadline = Instant::now() + Duration::from_secs(30);
    let refusal = loop {
        match propose(&mut cluster, "172.31.0.99") {
            Err(refusal) => break refusal,
            Ok(_) => assert!(Instant::now() < deadline, "the policy is not in force"),
        }
        thread::sleep(Duration::from_millis(100));
    };
    assert!(refusal.contains("externalIPs have to be in 192.0.2.0/24"), "{refusal}");
    propose(&mut cluster, "192.0.2.7").unwrap();
}
