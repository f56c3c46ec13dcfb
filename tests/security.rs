//! What advisories about Services warn of, tried with real packets, and what the agent shows to the outside
//! (docs/operations.md, Security).
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::thread;

use rstest::rstest;
use serde_json::{Value, json};
use svc_lab::agent::ask;
use svc_lab::client::Options;
use svc_lab::load::Tally;
use svc_lab::topology::{CLIENT, NODES, OUTSIDE, PORT};
use svc_tests::cluster::{CLUSTER_IP, Cluster, REFUSED, all_backends, endpoint, service, service_of};
use svc_tests::operations::table;

const NODE_A: &str = NODES[0].name;
/// A host outside the cluster that somebody would like to be taken for.
const VICTIM: &str = "172.31.0.99";

fn put(cluster: &mut Cluster, objects: impl IntoIterator<Item = Value>) {
    cluster.change(|manifests| objects.into_iter().for_each(|object| manifests.put(object)));
}

/// A cluster whose pods reach a server outside of it, by its own address.
fn with_victim(arguments: &'static [&'static str]) -> Cluster {
    let mut cluster = Cluster::with_arguments(arguments);
    cluster.lab.start_server(OUTSIDE).unwrap();
    let route = |node: &svc_lab::topology::Node| format!("route add {} via {}\n", node.pod_cidrs()[0], node.v4());
    cluster.lab.namespace(OUTSIDE).unwrap().ip(&NODES.iter().map(route).collect::<String>()).unwrap();
    for host in [CLIENT, NODE_A] {
        cluster.expect_soon(host, &victim(), &[OUTSIDE]);
    }
    cluster
}

fn victim() -> String {
    format!("http://{VICTIM}:{PORT}/")
}

/// A Service of one pod that has the victim's address and port.
fn claim(of: &str) -> [Value; 2] {
    let [mut claim, slice] = service("claim", "10.96.0.66", &["b2"]);
    claim["spec"]["ports"][0]["port"] = PORT.into();
    match of {
        "externalIPs" => claim["spec"]["externalIPs"] = json!([VICTIM]),
        _ => {
            claim["spec"]["type"] = "LoadBalancer".into();
            claim["status"]["loadBalancer"]["ingress"] = json!([{ "ip": VICTIM }]);
        }
    }
    [claim, slice]
}

/// As kube-proxy does: whoever may write the field has the address.
#[rstest]
#[case("externalIPs")]
#[case("status.loadBalancer")]
fn cve_2020_8554_an_external_address_is_whose_service_says_so(#[case] of: &str) {
    let mut cluster = with_victim(&[]);
    put(&mut cluster, claim(of));
    for host in [CLIENT, NODE_A] {
        cluster.expect_soon(host, &victim(), &["b2"]);
    }
}

#[test]
fn cve_2020_8554_external_ips_take_nothing_where_they_are_not_served() {
    let mut cluster = with_victim(&["--external-ips", "false"]);
    put(&mut cluster, claim("externalIPs"));
    // What else the Service has is served.
    cluster.expect_soon(CLIENT, &format!("http://10.96.0.66:{PORT}/"), &["b2"]);
    for host in [CLIENT, NODE_A] {
        cluster.expect_balanced(host, &Options::to(victim()), &[OUTSIDE]);
    }
}

#[test]
fn cve_2020_8554_kube_proxys_file_turns_external_ips_off() {
    let mut cluster = with_victim(&[]);
    put(&mut cluster, claim("externalIPs"));
    cluster.expect_soon(NODE_A, &victim(), &["b2"]);
    let file = cluster.lab.directory().join("kube-proxy.yaml");
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                featureGates: { AllowServiceExternalIPs: false }\n";
    fs::write(&file, text).unwrap();
    cluster.stop_agent(&NODES[0]);
    cluster.start_agent_with(&NODES[0], &["--config", file.to_str().unwrap()]);
    cluster.expect_soon(NODE_A, &victim(), &[OUTSIDE]);
}

/// The older Service, with a lesser name: it loses all the same, since a ClusterIP goes first.
#[rstest]
#[case(CLIENT)]
#[case(NODE_A)]
#[case(OUTSIDE)]
fn cve_2020_8554_no_external_address_takes_another_services_cluster_ip(#[case] host: &str) {
    let mut cluster = Cluster::with_manifests();
    let [mut thief, slice] = service("a-thief", "10.96.0.66", &["b2"]);
    thief["metadata"]["creationTimestamp"] = "2000-01-01T00:00:00Z".into();
    thief["spec"]["externalIPs"] = json!(["10.96.0.80"]);
    put(&mut cluster, [thief, slice]);
    cluster.expect_soon(host, "http://10.96.0.66/", &["b2"]);
    cluster.expect_balanced(host, &Options::to(CLUSTER_IP), &all_backends());
}

fn one(cluster: &Cluster, host: &str, target: &str) -> Tally {
    let request = Options { requests: Some(1), timeout_ms: 500, ..Options::to(target) };
    cluster.lab.tally(host, &request).unwrap()
}

/// What a neighbour needs to send packets for 127.0.0.1 to the first node.
fn aim_at_loopback(cluster: &Cluster) {
    let neighbour = cluster.lab.namespace(OUTSIDE).unwrap();
    neighbour.sysctl(&[("ipv4/conf/all/route_localnet", "1"), ("ipv4/conf/all/rp_filter", "0")]).unwrap();
    neighbour.ip(&format!("addr del 127.0.0.1/8 dev lo\nroute add 127.0.0.0/8 via {}\n", NODES[0].v4())).unwrap();
}

fn set_route_localnet(cluster: &Cluster, value: &str) {
    cluster.lab.namespace(NODE_A).unwrap().sysctl(&[("ipv4/conf/all/route_localnet", value)]).unwrap();
}

/// The node's settings of this name, by interface.
fn settings(cluster: &Cluster, name: &str) -> Vec<(String, String)> {
    let read = || {
        let interfaces = fs::read_dir("/proc/sys/net/ipv4/conf")?;
        let mut settings = Vec::new();
        for interface in interfaces {
            let path = interface?.path();
            let value = fs::read_to_string(path.join(name))?.trim().to_owned();
            settings.push((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), value));
        }
        Ok(settings)
    };
    cluster.lab.namespace(NODE_A).unwrap().inside(read).unwrap()
}

/// Answers every connection, until the test ends.
fn serve_on_loopback(cluster: &Cluster, port: u16) {
    let bind = || Ok(TcpListener::bind(("127.0.0.1", port))?);
    let listener = cluster.lab.namespace(NODE_A).unwrap().inside(bind).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nx-pod: loopback\r\nx-peer: 0.0.0.0:0\r\ncontent-length: 0\r\n\r\n");
        }
    });
}

#[test]
fn cve_2020_8558_what_listens_on_loopback_is_out_of_its_neighbours_reach() {
    const SECRET: u16 = 9;
    let cluster = Cluster::with_manifests();
    let target = format!("http://127.0.0.1:{SECRET}/");
    serve_on_loopback(&cluster, SECRET);
    aim_at_loopback(&cluster);
    assert_eq!(one(&cluster, NODE_A, &target).names(), ["loopback"]);
    // Node ports answer on loopback all the same, and to the node alone.
    assert_eq!(one(&cluster, NODE_A, "http://127.0.0.1:30080/").answered(), 1);
    let on: Vec<_> = settings(&cluster, "route_localnet").into_iter().filter(|(_, value)| value != "0").collect();
    assert_eq!(on, []);
    assert_eq!(one(&cluster, OUTSIDE, &target).answered(), 0);

    // The packets are such as would get there, and it is that setting that they need.
    set_route_localnet(&cluster, "1");
    assert_eq!(one(&cluster, OUTSIDE, &target).names(), ["loopback"]);
}

#[test]
fn cve_2020_8558_a_node_port_at_loopback_is_not_for_neighbours_whatever_the_settings() {
    let cluster = Cluster::with_manifests();
    aim_at_loopback(&cluster);
    set_route_localnet(&cluster, "1");
    assert_eq!(one(&cluster, OUTSIDE, "http://127.0.0.1:30080/").answered(), 0);
}

#[test]
fn cve_2020_8558_check_tells_of_what_kube_proxy_left_open() {
    let cluster = Cluster::with_manifests();
    let line = |cluster: &Cluster| {
        let output = ask(&cluster.lab, &NODES[0], &["check", "--uplink", "eth0", "-o", "json"]).unwrap();
        let lines: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let line = lines.iter().find(|line| line["check"] == "route_localnet").unwrap();
        ["result", "remedy"].map(|field| line[field].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(line(&cluster), ["ok", ""]);
    set_route_localnet(&cluster, "1");
    assert_eq!(line(&cluster), ["warning", "sysctl -w net.ipv4.conf.all.route_localnet=0"]);
}

fn slice_of(kind: &str, address: &str) -> [Value; 2] {
    let family = if kind == "IPv4" { "10.96.0.66" } else { "fd00:10:96::66" };
    let [service, mut slice] = service_of("inward", family, &[endpoint(address, &NODES[0])]);
    slice["addressType"] = kind.into();
    [service, slice]
}

/// Each of these leads to a server on the node, if anybody sends there.
#[rstest]
#[case::ipv4("IPv4", "http://10.96.0.66/", "172.31.0.11", &["127.0.0.1", "169.254.169.254", "0.0.0.0"])]
#[case::ipv6(
    "IPv6", "http://[fd00:10:96::66]/", "fd00:31::11",
    &["::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "fe80::1"]
)]
fn cve_2021_25737_no_endpoint_leads_into_the_node(
    #[case] kind: &str,
    #[case] target: &str,
    #[case] reachable: &str,
    #[case] refused: &[&str],
) {
    let mut cluster = Cluster::with_manifests();
    cluster.lab.start_server(NODE_A).unwrap();
    let addresses = "addr add 169.254.169.254/32 dev lo\naddr add fe80::1/128 dev lo\n";
    cluster.lab.namespace(NODE_A).unwrap().ip(addresses).unwrap();
    for address in refused {
        put(&mut cluster, slice_of(kind, reachable));
        cluster.expect_soon(NODE_A, target, &[NODE_A]);
        put(&mut cluster, slice_of(kind, address));
        for host in [CLIENT, NODE_A, OUTSIDE] {
            println!("{address} from {host}");
            cluster.expect_failure_soon(host, &Options::to(target), REFUSED);
        }
    }
}

#[test]
fn cve_2021_25737_the_endpoints_beside_it_are_served() {
    let mut cluster = Cluster::with_manifests();
    let endpoints = [endpoint("127.0.0.1", &NODES[0]), endpoint("10.244.2.11", &NODES[1])];
    put(&mut cluster, service_of("inward", "10.96.0.66", &endpoints));
    cluster.expect_soon(CLIENT, "http://10.96.0.66/", &["b1"]);
}

#[test]
fn cve_2021_25740_a_slice_adds_nothing_to_another_namespaces_service() {
    let mut cluster = Cluster::with_manifests();
    let [_, mut slice] = service("hostnames", "10.96.0.80", &["b2"]);
    slice["metadata"]["namespace"] = "tenant".into();
    slice["metadata"]["name"] = "foreign".into();
    slice["endpoints"][0]["addresses"] = json!([NODES[0].v4()]);
    cluster.lab.start_server(NODE_A).unwrap();
    // Written after it, and so in force after it.
    put(&mut cluster, [slice]);
    put(&mut cluster, service("later", "10.96.0.90", &["a1"]));
    cluster.expect_soon(CLIENT, "http://10.96.0.90/", &["a1"]);
    cluster.expect_balanced(CLIENT, &Options::to(CLUSTER_IP), &all_backends());
}

/// As kube-proxy does: whoever may write slices says where a Service leads, other namespaces' pods included.
#[test]
fn cve_2021_25740_a_service_leads_where_its_own_namespaces_slices_say() {
    let mut cluster = Cluster::with_manifests();
    let [mut service, mut slice] = service("forward", "10.96.0.66", &["a1"]);
    for object in [&mut service, &mut slice] {
        object["metadata"]["namespace"] = "tenant".into();
    }
    service["spec"]["type"] = "LoadBalancer".into();
    service["spec"]["ports"][0]["nodePort"] = 30_066.into();
    put(&mut cluster, [service, slice]);
    cluster.expect_soon(OUTSIDE, "http://172.31.0.12:30066/", &["a1"]);
}

/// A process's sockets that anybody could send to: protocol and local address as the kernel writes them, or a name.
fn open_sockets(pid: u32) -> BTreeSet<String> {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let inodes: BTreeSet<String> = descriptors
        .filter_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?;
            Some(target.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').to_owned())
        })
        .collect();
    assert!(!inodes.is_empty(), "the agent has no sockets at all");
    let mut found = BTreeSet::new();
    for table in ["tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6"] {
        for line in read(table).lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Of TCP only listeners (state 0A): all else is somebody's connection.
            let open = !table.starts_with("tcp") || fields[3] == "0A";
            if open && inodes.contains(fields[9]) {
                found.insert(format!("{table} {}", fields[1]));
            }
        }
    }
    for line in read("packet").lines().skip(1) {
        let inode = line.split_whitespace().last().unwrap();
        if inodes.contains(inode) {
            found.insert("packet".to_owned());
        }
    }
    for line in read("unix").lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // Named, or listening (__SO_ACCEPTCON).
        if inodes.contains(fields[6]) && (fields.len() > 7 || fields[3] == "00010000") {
            found.insert(format!("unix {}", fields.get(7).unwrap_or(&"without a name")));
        }
    }
    found
}

/// A documented address as the kernel writes it: 0.0.0.0:10256, [::]:N.
fn as_the_kernel_writes_it(address: &str) -> String {
    match address.parse().unwrap_or_else(|error| panic!("{address}: {error}")) {
        std::net::SocketAddr::V4(v4) => {
            format!("tcp {:08X}:{:04X}", u32::from_ne_bytes(v4.ip().octets()), v4.port())
        }
        std::net::SocketAddr::V6(v6) => format!("tcp6 {:032X}:{:04X}", u128::from(*v6.ip()), v6.port()),
    }
}

#[test]
fn nothing_listens_but_what_the_document_says() {
    let mut cluster = Cluster::with_manifests();
    let [mut edge, slice] = service("edge", "10.96.0.91", &["a1"]);
    edge["spec"]["type"] = "LoadBalancer".into();
    edge["spec"]["externalTrafficPolicy"] = "Local".into();
    edge["spec"]["healthCheckNodePort"] = 32_100.into();
    edge["spec"]["clusterIPs"] = json!(["10.96.0.91", "fd00:10:96::91"]);
    put(&mut cluster, [edge, slice]);
    cluster.lab.wait_for_port(NODE_A, 32_100).unwrap();
    let rows = table("### What listens");
    let listed = rows.iter().map(|row| row[0].trim_matches('`').replace("healthCheckNodePort", "32100"));
    let documented: BTreeSet<String> = listed.map(|address| as_the_kernel_writes_it(&address)).collect();
    assert_eq!(open_sockets(cluster.agent_pid(&NODES[0])), documented);
}

/// What a terminal would obey, or what changes how other text looks.
fn obeyed(text: &str) -> Vec<char> {
    let turns = |character: char| matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().filter(|character| *character != '\n' && (character.is_control() || turns(*character))).collect()
}

#[test]
fn hostile_names_never_reach_a_terminal() {
    const HOSTILE: &str = "\u{1b}]0;x\u{7}\u{9b}2J\u{202e}\r\n";
    let mut cluster = Cluster::with_arguments(&["-v"]);
    let name = |name: &str| format!("{name}{HOSTILE}");
    let [mut service, mut slice] = service("hostile", "10.96.0.66", &["a1"]);
    let [mut rejected, _] = svc_tests::cluster::service("rejected", "10.96.0.67", &[]);
    service["metadata"]["name"] = name("web").into();
    slice["metadata"]["labels"]["kubernetes.io/service-name"] = name("web").into();
    for object in [&mut service, &mut slice] {
        object["metadata"]["namespace"] = name("team").into();
    }
    service["spec"]["ports"][0]["name"] = name("http").into();
    slice["ports"][0]["name"] = name("http").into();
    service["spec"]["sessionAffinity"] = "ClientIP".into();
    // Each is told in the log.
    service["spec"]["externalIPs"] = json!([name("192.0.2.1")]);
    slice["endpoints"].as_array_mut().unwrap().push(json!({ "addresses": [name("10.0.0.1")] }));
    rejected["metadata"]["name"] = "x".repeat(70).into();
    rejected["spec"]["ports"][0]["name"] = HOSTILE.into();
    // One that the agent attaches to.
    let pod = cluster.lab.namespace("a1").unwrap().name().to_owned();
    let link = format!("link add h\u{1b}[2J\u{7} type veth peer name eth9 netns {pod}\n");
    cluster.lab.namespace(NODE_A).unwrap().ip(&link).unwrap();
    put(&mut cluster, [service, slice, rejected]);
    cluster.expect_soon(OUTSIDE, "http://10.96.0.66/", &["a1"]);

    let manifests = cluster.lab.directory().join("manifests");
    let archive = cluster.lab.directory().join("report.tar.gz");
    let mut seen = 0;
    for arguments in [
        &["services"][..],
        &["backends"],
        &["flows"],
        &["affinity"],
        &["maps"],
        &["status", "--verbose"],
        &["trace", "tcp", "172.31.0.99", "10.96.0.66:80"],
        &["check", "--manifests", manifests.to_str().unwrap()],
        &["backends", &name("team/web")],
        &["bugreport", "-O", archive.to_str().unwrap()],
    ] {
        let table = &[][..];
        let formats =
            if arguments[0] == "bugreport" { &[table][..] } else { &[table, &["-o", "json"], &["-o", "yaml"]] };
        for format in formats {
            let output = ask(&cluster.lab, &NODES[0], &[arguments, format].concat()).unwrap();
            for text in [output.stdout, output.stderr] {
                let text = String::from_utf8(text).unwrap();
                assert_eq!(obeyed(&text), [], "{arguments:?} {format:?}: {text}");
                seen += text.matches("\\u001b]0;x").count();
            }
        }
    }
    assert!(seen > 10, "the name was shown {seen} times only");
    let log = cluster.agent_log(&NODES[0]);
    assert!(log.contains("]0;x"), "nothing was told of the Service: {log}");
    assert_eq!(obeyed(&log), [], "{log}");
    // A line end in a name would forge a line.
    assert!(log.lines().all(|line| line.starts_with("20")), "{log}");
}
