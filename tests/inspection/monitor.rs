//! `svc-agent monitor` on a node of the lab: each kind of event with its names, and filters.
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use svc_lab::agent::ask;
use svc_lab::binaries;
use svc_lab::client::Options;
use svc_lab::process::Process;
use svc_lab::topology::{CLIENT, NODES, OUTSIDE};
use svc_tests::cluster::Cluster;

use super::trace::cluster;

const WITHIN: Duration = Duration::from_secs(30);

/// A monitor on the first node.
struct Monitor {
    process: Process,
    out: PathBuf,
}

impl Monitor {
    /// Returns once it listens.
    fn start(cluster: &Cluster, name: &str, arguments: &[&str]) -> Self {
        let (out, file) = cluster.lab.log(&format!("{name}.json")).unwrap();
        let (err, errors) = cluster.lab.log(&format!("{name}.err")).unwrap();
        let mut command = Command::new(binaries::agent().unwrap());
        command.args(["monitor", "-o", "json"]).args(arguments).arg("--bpffs").arg(cluster.lab.bpffs(NODES[0].name));
        command.stdin(Stdio::null()).stdout(file).stderr(errors);
        let process = cluster.lab.spawn(NODES[0].name, command).unwrap();
        let mut monitor = Monitor { process, out };
        let deadline = Instant::now() + WITHIN;
        while !fs::read_to_string(&err).unwrap().contains("Ctrl-C ends it") {
            assert!(monitor.process.ended().is_none() && Instant::now() < deadline, "it does not listen: {err:?}");
            thread::sleep(Duration::from_millis(10));
        }
        monitor
    }

    fn lines(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.out).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits until it has told an event with these fields.
    #[track_caller]
    fn expect(&self, fields: &Value) -> Value {
        let deadline = Instant::now() + WITHIN;
        loop {
            let lines = self.lines();
            let wanted = fields.as_object().unwrap();
            let found = lines.iter().find(|line| wanted.iter().all(|(field, value)| line[field] == *value));
            if let Some(found) = found {
                return found.clone();
            }
            assert!(Instant::now() < deadline, "no event {fields} among {lines:#?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ctrl-C, and what it has told.
    fn stop(mut self) -> Vec<Value> {
        self.process.signal(libc::SIGINT).unwrap();
        assert!(self.process.wait().unwrap().success());
        self.lines()
    }
}

/// A request, whatever becomes of it.
fn request(cluster: &Cluster, host: &str, target: &str) {
    let options = Options { requests: Some(1), timeout_ms: 300, ..Options::to(target) };
    cluster.lab.request(host, &options).unwrap();
}

/// With a way from outside to the Services' external addresses.
fn reachable() -> Cluster {
    let cluster = cluster();
    cluster.lab.namespace(OUTSIDE).unwrap().ip("route add 192.0.2.0/24 via 172.31.0.11\n").unwrap();
    cluster
}

#[test]
fn each_kind_is_told_with_the_names_of_service_and_backend() {
    let cluster = reachable();
    let monitor = Monitor::start(&cluster, "all", &[]);
    for (host, target, expected) in [
        (
            OUTSIDE,
            "http://10.96.0.91/",
            json!({
                "type": "new-flow", "reason": "flow_opened", "service": "default/near", "portName": "http",
                "protocol": "TCP", "frontend": "10.96.0.91:80", "backend": "10.244.1.11:9376", "from": "network",
                "socket": false, "interface": "eth0", "netns": null,
            }),
        ),
        (
            OUTSIDE,
            "http://10.96.0.93/",
            json!({
                "type": "reject", "reason": "no_backend", "service": "default/empty", "portName": "http", "backend": null,
                "from": "network", "socket": false,
            }),
        ),
        (
            OUTSIDE,
            "http://10.96.0.91:81/",
            json!({ "type": "reject", "reason": "unknown_port", "service": "default/near", "portName": null }),
        ),
        (
            OUTSIDE,
            "http://192.0.2.94/",
            json!({ "type": "drop", "reason": "no_local_backend", "service": "default/local", "frontend": "192.0.2.94:80" }),
        ),
        (OUTSIDE, "http://192.0.2.96/", json!({ "type": "drop", "reason": "source_range", "service": "default/edge" })),
        (
            OUTSIDE,
            "http://10.96.77.77/",
            json!({ "type": "drop", "reason": "unallocated_address", "service": null, "frontend": "10.96.77.77:80" }),
        ),
        (
            CLIENT,
            "http://10.96.0.92/",
            json!({
                "type": "new-flow", "reason": "socket_connected", "service": "default/far", "client": null,
                "backend": "10.244.2.11:9376", "from": "pod", "socket": true, "interface": null,
            }),
        ),
        (
            CLIENT,
            "http://10.96.0.93/",
            json!({ "type": "reject", "reason": "no_backend", "service": "default/empty", "from": "pod", "socket": true }),
        ),
        (
            NODES[0].name,
            "http://10.96.0.91/",
            json!({ "type": "new-flow", "reason": "socket_connected", "service": "default/near", "from": "node" }),
        ),
    ] {
        request(&cluster, host, target);
        let event = monitor.expect(&expected);
        if host == OUTSIDE {
            assert!(event["client"].as_str().unwrap().starts_with("172.31.0.99:"), "{event}");
        }
    }
    let times: Vec<String> = monitor.stop().iter().map(|line| line["time"].as_str().unwrap().to_owned()).collect();
    assert!(times.is_sorted() && times.iter().all(|time| time.ends_with('Z')), "{times:?}");
}

#[test]
fn only_what_is_asked_for_is_told() {
    let cluster = reachable();
    let field = |lines: &[Value], field: &str| -> Vec<String> {
        let mut values: Vec<String> = lines.iter().map(|line| line[field].as_str().unwrap_or("-").to_owned()).collect();
        values.sort();
        values.dedup();
        values
    };
    for (number, round) in [
        [
            (["--type", "drop"], "reason", "source_range"),
            (["--type", "reject"], "reason", "no_backend"),
            (["--reason", "no_backend"], "type", "reject"),
            (["--service", "near"], "service", "default/near"),
        ],
        [
            (["--service", "default/far"], "service", "default/far"),
            (["--address", "10.244.2.11"], "service", "default/far"),
            (["--address", "192.0.2.0/24"], "service", "default/edge"),
            (["-n", "default"], "service", "default/empty"),
        ],
    ]
    .into_iter()
    .enumerate()
    {
        let start = |(index, (arguments, ..)): (usize, &([&str; 2], &str, &str))| {
            Monitor::start(&cluster, &format!("monitor-{number}-{index}"), arguments)
        };
        let monitors: Vec<Monitor> = round.iter().enumerate().map(start).collect();
        for target in ["http://10.96.0.91/", "http://10.96.0.92/", "http://10.96.0.93/", "http://192.0.2.96/"] {
            request(&cluster, OUTSIDE, target);
        }
        for (monitor, (arguments, name, value)) in monitors.into_iter().zip(round) {
            monitor.expect(&json!({ name: value }));
            let lines = monitor.stop();
            if arguments[0] == "-n" {
                assert!(field(&lines, "service").iter().all(|service| service.starts_with("default/")), "{lines:?}");
            } else {
                assert_eq!(field(&lines, name), [value], "{arguments:?}");
            }
        }
    }
    let other = Monitor::start(&cluster, "other", &["-n", "other"]);
    let all = Monitor::start(&cluster, "all", &[]);
    request(&cluster, OUTSIDE, "http://10.96.0.93/");
    all.expect(&json!({ "reason": "no_backend" }));
    assert_eq!((other.stop(), all.stop().is_empty()), (vec![], false));
}

#[test]
fn it_ends_after_as_many_lines_or_as_long_as_it_is_told() {
    let cluster = cluster();
    let mut counted = Monitor::start(&cluster, "counted", &["--count", "2", "--type", "reject"]);
    for _ in 0..3 {
        request(&cluster, OUTSIDE, "http://10.96.0.93/");
    }
    assert!(counted.process.wait().unwrap().success());
    assert_eq!(counted.lines().len(), 2);
    let short = ask(&cluster.lab, &NODES[0], &["monitor", "--for", "100ms", "--reason", "no_route"]).unwrap();
    assert_eq!((short.status.code(), short.stdout), (Some(0), vec![]));
    let refused = ask(&cluster.lab, &NODES[0], &["monitor", "--reason", "flow_hit"]).unwrap();
    assert_eq!(refused.status.code(), Some(2), "no event has this reason");
}

#[test]
fn it_ends_when_nobody_reads_any_more() {
    let cluster = cluster();
    let mut command = Command::new(binaries::agent().unwrap());
    command.args(["monitor", "--reason", "no_route"]).arg("--bpffs").arg(cluster.lab.bpffs(NODES[0].name));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = cluster.lab.spawn(NODES[0].name, command).unwrap();
    drop(process.child().stdout.take());
    assert!(process.wait().unwrap().success());
}

#[test]
fn there_is_room_again_when_monitors_have_been_killed_and_the_agent_need_not_run() {
    let mut cluster = cluster();
    cluster.kill_agent(&NODES[0]);
    let monitors = (0..4).map(|index| Monitor::start(&cluster, &format!("monitor-{index}"), &[]));
    let mut monitors: Vec<Monitor> = monitors.collect();
    let fifth = ask(&cluster.lab, &NODES[0], &["monitor", "--for", "100ms"]).unwrap();
    assert_eq!(fifth.status.code(), Some(1));
    let why = String::from_utf8(fifth.stderr).unwrap();
    assert!(why.contains("4 monitors are open on this node already"), "{why}");
    for monitor in &mut monitors {
        monitor.process.kill();
    }
    let deadline = Instant::now() + WITHIN;
    while !ask(&cluster.lab, &NODES[0], &["monitor", "--for", "10ms"]).unwrap().status.success() {
        assert!(Instant::now() < deadline, "the dead are not forgotten");
        thread::sleep(Duration::from_millis(100));
    }
    let monitor = Monitor::start(&cluster, "after", &[]);
    request(&cluster, OUTSIDE, "http://10.96.0.93/");
    monitor.expect(&json!({ "service": "default/empty" }));
    monitor.stop();
}
