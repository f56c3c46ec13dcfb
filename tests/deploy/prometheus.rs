//! What Prometheus' own tool says of what the agent tells, and of the alerts.
use std::io::Write as _;
use std::process::{Command, Stdio};

use svc_lab::client::Options;
use svc_lab::control_plane::promtool_binary;
use svc_lab::topology::{NODES, OUTSIDE};
use svc_tests::cluster::{Cluster, all_backends, http_get_path, service};

use crate::installed::path;

/// The exit code of `promtool check metrics`, and what it complains of.
fn check_metrics(page: &str) -> (Option<i32>, Vec<String>) {
    let mut command = Command::new(promtool_binary().unwrap());
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = command.spawn().unwrap();
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap().lines().map(str::to_owned).collect())
}

#[test]
fn promtool_reads_every_metric_and_minds_only_names_that_are_kube_proxys() {
    let mut cluster = Cluster::with_control_plane();
    let another = service("another", "10.96.0.95", &["a1"]);
    cluster.change(|manifests| another.into_iter().for_each(|object| manifests.put(object)));
    cluster.expect_soon(OUTSIDE, "http://10.96.0.95/", &["a1"]);
    cluster.expect_balanced(OUTSIDE, &Options::to("udp://172.31.0.11:30007"), &all_backends());
    let answer = http_get_path(&cluster.lab, NODES[0].name, "127.0.0.1:10249", "/metrics").unwrap();
    let page = answer.split_once("\r\n\r\n").unwrap().1;
    for name in ["svc_service_connections_total{", "svc_flows{", "svc_watch_last_event_timestamp_seconds{"] {
        assert!(page.contains(name), "{name} in\n{page}");
    }
    let (_, complaints) = check_metrics(page);
    let ours: Vec<&String> = complaints.iter().filter(|line| !line.starts_with("kubeproxy_")).collect();
    assert_eq!(ours, Vec::<&String>::new());
    // That it would complain.
    assert_eq!(check_metrics("svc_flows{state=\"new\"} many\n").0, Some(1));
}

#[test]
fn promtool_takes_every_alert() {
    let mut command = Command::new(promtool_binary().unwrap());
    let output = command.args(["check", "rules", "--lint-fatal", &path("grafana/alerts.yaml")]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
