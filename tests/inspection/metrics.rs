//! `/metrics` of an agent at work.
use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use svc_agent::traffic;
use svc_lab::client::Options;
use svc_lab::topology::{CLIENT, NODES, OUTSIDE};
use svc_tests::cluster::{Cluster, all_backends, eventually, http_get_path};

use super::flow_cells;
use super::trace::cluster;

/// Samples by name and labels, as they are written.
fn samples(cluster: &Cluster) -> BTreeMap<String, f64> {
    let answer = http_get_path(&cluster.lab, NODES[0].name, "127.0.0.1:10249", "/metrics").unwrap();
    let page = answer.split_once("\r\n\r\n").unwrap().1;
    let samples = page.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.into(), value.parse().unwrap()))
        .collect()
}

/// A sample's name and labels: of the port `http`.
fn sample(metric: &str, service: &str, more: &str) -> String {
    format!(
        "{metric}{{namespace=\"default\",service=\"{service}\",port=\"http\",protocol=\"TCP\",ip_family=\"IPv4\"{more}}}"
    )
}

fn connections(service: &str) -> String {
    sample("svc_service_connections_total", service, "")
}

fn bytes(service: &str, direction: &str) -> String {
    sample("svc_service_bytes_total", service, &format!(",direction=\"{direction}\""))
}

/// What is counted is counted once a second at most.
const WITHIN: Duration = Duration::from_secs(20);

#[test]
fn each_connection_is_counted_for_its_service_whoever_opens_it() {
    let cluster = cluster();
    let count = |service: &str| samples(&cluster).get(&connections(service)).copied().unwrap_or(0.0);
    let three = Options { requests: Some(3), ..Options::to("http://10.96.0.92/") };
    for (host, expected) in [(OUTSIDE, 3.0), (CLIENT, 6.0), (NODES[0].name, 9.0)] {
        assert_eq!(cluster.lab.tally(host, &three).unwrap().answered(), 3);
        let deadline = Instant::now() + WITHIN;
        while count("far") < expected && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(count("far"), expected, "{host}");
    }
    let unserved = Options { requests: Some(1), ..Options::to("http://10.96.0.93/") };
    assert_eq!(cluster.lab.tally(CLIENT, &unserved).unwrap().failed(), 1);
    thread::sleep(Duration::from_millis(1100));
    assert_eq!((count("empty"), count("far")), (0.0, 9.0), "what nobody serves is no connection");
}

#[test]
fn bytes_are_counted_by_service_and_direction_where_that_is_wanted() {
    let cluster = Cluster::with_arguments(&["--count-bytes"]);
    let bytes = |samples: &BTreeMap<String, f64>, direction: &str| {
        samples.get(&bytes("hostnames-nodeport", direction)).copied().unwrap_or_default()
    };
    let ten = Options { requests: Some(10), ..Options::to("http://172.31.0.11:30080/") };
    assert_eq!(cluster.lab.tally(OUTSIDE, &ten).unwrap().answered(), 10);
    // From the first look on.
    let before = samples(&cluster);
    assert_eq!(cluster.lab.tally(OUTSIDE, &ten).unwrap().answered(), 10);
    // A request's segments and headers, ten times, and a second's packets of others at most.
    let after = eventually("ten requests' bytes", || {
        let now = samples(&cluster);
        let since = |direction: &str| bytes(&now, direction) - bytes(&before, direction);
        (since("to_backend") > 4_000.0 && since("from_backend") > 4_000.0).then_some(now)
    });
    assert!(bytes(&after, "to_backend") < 40_000.0, "{}", bytes(&after, "to_backend"));

    let plain = Cluster::with_manifests();
    assert_eq!(plain.lab.tally(OUTSIDE, &ten).unwrap().answered(), 10);
    assert!(!samples(&plain).keys().any(|name| name.starts_with("svc_service_bytes_total")));
}

/// A restart with other arguments makes the map anew.
#[test]
fn counting_bytes_begins_and_ends_with_a_restart() {
    let mut cluster = Cluster::with_manifests();
    let node = &NODES[0];
    let is_counted = |cluster: &Cluster| traffic::read(&cluster.lab.bpffs(node.name).join("maps")).unwrap().is_some();
    for (arguments, counted) in [(&[][..], false), (&["--count-bytes"], true), (&[], false)] {
        cluster.stop_agent(node);
        cluster.start_agent_with(node, arguments);
        assert_eq!(is_counted(&cluster), counted, "{arguments:?}");
        cluster.expect_balanced(OUTSIDE, &Options::to("http://172.31.0.11:30080/"), &all_backends());
    }
}

#[test]
fn flows_are_counted_by_state_and_maps_by_their_entries() {
    let cluster = cluster();
    let before = samples(&cluster);
    let load = cluster.long_connection(OUTSIDE, "http://172.31.0.11:30080/");
    let established = "svc_flows{state=\"established\"}";
    let deadline = Instant::now() + WITHIN;
    while samples(&cluster)[established] <= before[established] {
        assert!(Instant::now() < deadline, "no flow is established");
        thread::sleep(Duration::from_millis(50));
    }
    let after = samples(&cluster);
    load.finish().unwrap();
    assert!(after["svc_map_entries{map=\"flows\"}"] >= 2.0);
    assert_eq!(after["svc_map_max_entries{map=\"flows\"}"], f64::from(flow_cells()));
    for map in ["frontends", "services", "backends", "backend_sets", "addresses", "uplinks", "cidrs"] {
        let (entries, most) = (
            after[&format!("svc_map_entries{{map=\"{map}\"}}")],
            after[&format!("svc_map_max_entries{{map=\"{map}\"}}")],
        );
        assert!(0.0 < entries && entries < most, "{map}: {entries} of {most}");
    }
    assert_eq!(after["svc_watch_lag_seconds"], 0.0);
}
