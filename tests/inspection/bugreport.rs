//! `svc-agent bugreport` on a node of the lab.
use std::fs::{self, File};
use std::io::Read as _;

use flate2::read::GzDecoder;
use svc_lab::agent::ask;
use svc_lab::topology::NODES;
use svc_tests::cluster::Cluster;

const TOKEN: &str = "a-token-that-nobody-may-see";

#[test]
fn a_bug_report_holds_what_it_lists_and_no_secret() {
    let cluster = Cluster::with_manifests();
    let path = |name: &str| cluster.lab.directory().join(name);
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: a\ncontexts: [{{ name: a, context: {{ cluster: a, user: a }} }}]\n\
         clusters: [{{ name: a, cluster: {{ server: 'https://192.0.2.1' }} }}]\nusers: [{{ name: a, user: {{ token: {TOKEN} }} }}]\n"
    );
    fs::write(path("kubeconfig"), kubeconfig).unwrap();
    let (kubeconfig, archive) = (path("kubeconfig"), path("report.tar.gz"));
    let arguments = ["bugreport", "-O", archive.to_str().unwrap(), "--kubeconfig", kubeconfig.to_str().unwrap()];
    let output = ask(&cluster.lab, &NODES[0], &arguments).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let mut files = Vec::new();
    let mut all = String::new();
    for entry in tar::Archive::new(GzDecoder::new(File::open(&archive).unwrap())).entries().unwrap() {
        let mut entry = entry.unwrap();
        files.push(entry.path().unwrap().file_name().unwrap().to_string_lossy().into_owned());
        entry.read_to_string(&mut all).unwrap();
    }
    let listed = String::from_utf8(output.stdout).unwrap();
    let listed: Vec<&str> = listed.lines().skip(1).map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(files, listed);
    assert!(all.contains("default/hostnames:http") && all.contains("the API server of"), "{all}");
    assert!(!all.contains(TOKEN));
    let path = std::env::var("PATH").unwrap();
    assert!(!all.contains(&path), "the environment is in it");

    let again = ask(&cluster.lab, &NODES[0], &arguments).unwrap();
    assert_eq!(again.status.code(), Some(1), "a report that exists is not overwritten");
}
