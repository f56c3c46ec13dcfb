//! Services of a folder of manifests, between hosts that are network namespaces: real clients, real servers.
use std::fs;
use std::io::Read as _;
use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rstest::rstest;
use svc_lab::agent::inspect;
use svc_lab::client::Options;
use svc_lab::flood::Flood;
use svc_lab::load::Load;
use svc_lab::pieces;
use svc_lab::topology::{BACKENDS, BARE_MTU, Bare, CLIENT, NODES, Network, OUTSIDE, PORT, Pod, TUNNELLED};
use svc_tests::cluster::{
    CLUSTER_IP, Cluster, NODE_PORT, REFUSED, all_backends, assert_right, becomes_right, eventually, service,
};

const NODE_A: &str = "node-a";

type Start = fn() -> Cluster;

#[rstest]
#[case::pod_to_cluster_ip(CLIENT, CLUSTER_IP)]
#[case::pod_to_cluster_ip_v6(CLIENT, "http://[fd00:10:96::80]/")]
#[case::pod_to_its_own_service("a1", CLUSTER_IP)]
#[case::pod_to_its_own_service_v6("a1", "http://[fd00:10:96::80]/")]
#[case::pod_to_its_own_node_port(CLIENT, "http://172.31.0.11:30080/")]
#[case::pod_to_another_node_port(CLIENT, "http://172.31.0.12:30080/")]
#[case::pod_to_another_node_port_v6(CLIENT, "http://[fd00:31::12]:30080/")]
#[case::node_to_cluster_ip(NODE_A, CLUSTER_IP)]
#[case::node_to_cluster_ip_v6(NODE_A, "http://[fd00:10:96::80]/")]
#[case::node_to_localhost_node_port(NODE_A, "http://127.0.0.1:30080/")]
#[case::node_to_its_own_node_port(NODE_A, "http://172.31.0.11:30080/")]
#[case::node_to_its_own_node_port_v6(NODE_A, "http://[fd00:31::11]:30080/")]
#[case::node_to_another_node_port(NODE_A, "http://172.31.0.12:30080/")]
#[case::outside_to_one_node_port(OUTSIDE, "http://172.31.0.11:30080/")]
#[case::outside_to_one_node_port_v6(OUTSIDE, "http://[fd00:31::11]:30080/")]
#[case::outside_to_the_other_node_port(OUTSIDE, "http://172.31.0.12:30080/")]
#[case::outside_to_the_other_node_port_v6(OUTSIDE, "http://[fd00:31::12]:30080/")]
#[case::outside_to_cluster_ip(OUTSIDE, CLUSTER_IP)]
#[case::outside_to_cluster_ip_v6(OUTSIDE, "http://[fd00:10:96::80]/")]
#[case::large_answer_to_a_pod(CLIENT, "http://10.96.0.80/bytes?n=300000")]
#[case::large_answer_to_the_outside(OUTSIDE, "http://172.31.0.11:30080/bytes?n=300000")]
#[case::large_answer_to_the_outside_v6(OUTSIDE, "http://[fd00:31::11]:30080/bytes?n=300000")]
#[case::udp_pod_to_cluster_ip(CLIENT, "udp://10.96.0.7:7")]
#[case::udp_pod_to_cluster_ip_v6(CLIENT, "udp://[fd00:10:96::7]:7")]
#[case::udp_node_to_localhost_node_port(NODE_A, "udp://127.0.0.1:30007")]
#[case::udp_outside_to_one_node_port(OUTSIDE, "udp://172.31.0.11:30007")]
#[case::udp_outside_to_the_other_node_port_v6(OUTSIDE, "udp://[fd00:31::12]:30007")]
#[case::udp_outside_to_cluster_ip(OUTSIDE, "udp://10.96.0.7:7")]
fn every_backend_answers(#[case] host: &str, #[case] target: &str) {
    Cluster::with_manifests().expect_balanced(host, &Options::to(target), &all_backends());
}

/// Pods' packets instead of their sockets.
#[rstest]
#[case::pod_to_cluster_ip(CLIENT, CLUSTER_IP)]
#[case::pod_to_cluster_ip_v6(CLIENT, "http://[fd00:10:96::80]/")]
#[case::pod_to_its_own_service("a1", CLUSTER_IP)]
#[case::pod_to_its_own_service_v6("a1", "http://[fd00:10:96::80]/")]
#[case::pod_to_its_own_node_port(CLIENT, "http://172.31.0.11:30080/")]
#[case::pod_to_its_own_node_port_v6(CLIENT, "http://[fd00:31::11]:30080/")]
#[case::pod_to_another_node_port(CLIENT, "http://172.31.0.12:30080/")]
#[case::pod_to_another_node_port_v6(CLIENT, "http://[fd00:31::12]:30080/")]
#[case::large_answer_to_a_pod(CLIENT, "http://10.96.0.80/bytes?n=300000")]
#[case::large_answer_to_a_pod_v6(CLIENT, "http://[fd00:10:96::80]/bytes?n=300000")]
#[case::udp_pod_to_cluster_ip(CLIENT, "udp://10.96.0.7:7")]
#[case::udp_pod_to_cluster_ip_v6(CLIENT, "udp://[fd00:10:96::7]:7")]
#[case::udp_pod_to_its_own_service("a1", "udp://10.96.0.7:7")]
#[case::node_to_localhost_node_port(NODE_A, "http://127.0.0.1:30080/")]
#[case::node_to_cluster_ip(NODE_A, CLUSTER_IP)]
#[case::outside_to_one_node_port(OUTSIDE, "http://172.31.0.11:30080/")]
fn every_backend_answers_with_only_the_nodes_sockets_translated(#[case] host: &str, #[case] target: &str) {
    Cluster::with_arguments(&["--socket-lb", "host"]).expect_balanced(host, &Options::to(target), &all_backends());
}

/// Nobody's sockets: the node's own connections are translated where they leave by the uplink.
#[rstest]
#[case::pod_to_cluster_ip(CLIENT, CLUSTER_IP)]
#[case::node_to_cluster_ip(NODE_A, CLUSTER_IP)]
#[case::node_to_cluster_ip_v6(NODE_A, "http://[fd00:10:96::80]/")]
#[case::udp_node_to_cluster_ip(NODE_A, "udp://10.96.0.7:7")]
#[case::large_answer_to_the_node(NODE_A, "http://10.96.0.80/bytes?n=300000")]
#[case::outside_to_the_other_node_port(OUTSIDE, "http://172.31.0.12:30080/")]
fn every_backend_answers_with_no_socket_translated(#[case] host: &str, #[case] target: &str) {
    Cluster::with_arguments(&["--socket-lb", "off"]).expect_balanced(host, &Options::to(target), &all_backends());
}

/// In a cluster each, for where it takes minutes to load the programs. First the packets of pods and the sockets of nodes, then
/// the sockets of pods and XDP.
#[rstest]
#[case::with_only_the_nodes_sockets_translated(|| Cluster::with_arguments(&["--socket-lb", "host"]))]
#[case::behind_xdp(Cluster::with_generic_xdp)]
fn every_backend_answers_whoever_asks(#[case] cluster: Start) {
    let cluster = cluster();
    for (host, target) in [
        (CLIENT, CLUSTER_IP),
        (CLIENT, "http://[fd00:10:96::80]/"),
        (CLIENT, "udp://10.96.0.7:7"),
        (NODE_A, "http://127.0.0.1:30080/"),
        (NODE_A, "http://[fd00:10:96::80]/"),
        (OUTSIDE, "http://172.31.0.11:30080/bytes?n=100000"),
        (OUTSIDE, "http://[fd00:31::12]:30080/"),
        (OUTSIDE, "udp://172.31.0.12:30007"),
    ] {
        cluster.expect_balanced(host, &Options::to(target), &all_backends());
    }
}

#[test]
fn source_ranges_are_in_the_kernel_and_follow_their_service() {
    let mut cluster = Cluster::with_manifests();
    let restricted = |ranges: &[&str]| {
        let [mut service, slice] = service("edge", "10.96.0.90", &["a1", "b2"]);
        service["spec"]["type"] = "LoadBalancer".into();
        service["spec"]["loadBalancerSourceRanges"] = ranges.into();
        service["status"]["loadBalancer"]["ingress"] = serde_json::json!([{ "ip": "192.0.2.90" }]);
        [service, slice]
    };
    let sources = |cluster: &Cluster| -> Vec<(String, Vec<String>)> {
        let rows = inspect(&cluster.lab, &NODES[0], &["services", "--output", "json"]).unwrap();
        let rows: serde_json::Value = serde_json::from_str(&rows).unwrap();
        let of_edge = rows.as_array().unwrap().iter().filter(|row| row["name"] == "edge");
        let ranges = |row: &serde_json::Value| serde_json::from_value(row["sourceRanges"].clone()).unwrap();
        of_edge.map(|row| (row["kind"].as_str().unwrap().to_owned(), ranges(row))).collect()
    };
    let expect = |cluster: &Cluster, ranges: &[&str]| {
        let ranges: Vec<String> = ranges.iter().map(|range| (*range).to_owned()).collect();
        let expected = [("ClusterIP".to_owned(), vec![]), ("LoadBalancer".to_owned(), ranges)];
        eventually(&format!("{expected:?}"), || (sources(cluster) == expected).then_some(()));
    };
    for (given, wanted) in [
        (&["198.51.100.0/24", "2001:db8::/32"][..], &["198.51.100.0/24"][..]),
        (&["198.51.100.0/25", "203.0.113.7/32"], &["198.51.100.0/25", "203.0.113.7/32"]),
        (&["198.51.100.0/24", "0.0.0.0/0"], &[]),
    ] {
        cluster.change(|manifests| restricted(given).into_iter().for_each(|object| manifests.put(object)));
        expect(&cluster, wanted);
        cluster.kill_agent(&NODES[0]);
        cluster.start_agent(&NODES[0]);
        expect(&cluster, wanted);
    }
}

#[rstest]
#[case::outside_to_one_node_port("http://172.31.0.11:30080/bytes?n=100000")]
#[case::outside_to_the_other_node_port_v6("http://[fd00:31::12]:30080/bytes?n=100000")]
#[case::outside_to_cluster_ip(CLUSTER_IP)]
#[case::udp_outside_to_one_node_port("udp://172.31.0.11:30007")]
#[case::udp_outside_to_the_other_node_port_v6("udp://[fd00:31::12]:30007")]
fn every_backend_answers_behind_xdp(
    #[values(Cluster::with_generic_xdp, Cluster::with_native_xdp)] cluster: Start,
    #[case] target: &str,
) {
    cluster().expect_balanced(OUTSIDE, &Options::to(target), &all_backends());
}

/// The last one serves more interfaces than it should: a packet passes two of them on its way out.
#[rstest]
#[case::sockets(&[])]
#[case::packets(&["--socket-lb", "host"])]
#[case::stacked(&["--socket-lb", "host", "--uplink", "eth0", "--uplink", "vxlan0", "--uplink", "cni0"])]
fn every_backend_answers_behind_bridges_and_tunnels(#[case] arguments: &'static [&'static str]) {
    let cluster = Cluster::with_overlay(arguments);
    for (host, target) in [
        (CLIENT, CLUSTER_IP),
        (CLIENT, "http://[fd00:10:96::80]/"),
        ("a1", CLUSTER_IP),
        (CLIENT, "http://172.31.0.12:30080/"),
        (CLIENT, "udp://10.96.0.7:7"),
        (NODE_A, CLUSTER_IP),
        (NODE_A, "http://127.0.0.1:30080/"),
        (OUTSIDE, "http://172.31.0.11:30080/"),
        (OUTSIDE, "http://[fd00:31::11]:30080/"),
        (OUTSIDE, "http://172.31.0.11:30080/bytes?n=300000"),
        (OUTSIDE, "http://[fd00:10:96::80]/"),
        (OUTSIDE, "udp://172.31.0.12:30007"),
    ] {
        println!("{host} -> {target}");
        cluster.expect_balanced(host, &Options::to(target), &all_backends());
    }
}

#[rstest]
#[case::vxlan(Network::Overlay)]
#[case::tun(Network::Bare(Bare::Tun))]
#[case::ipip_and_sit(Network::Bare(Bare::Kernel))]
fn a_tunnel_that_comes_after_the_agent_is_served(#[case] network: Network) {
    let Some(cluster) = Cluster::with_late_tunnels(network) else {
        println!("this kernel has no such tunnels");
        return;
    };
    for node in &NODES {
        eventually("the tunnel is served", || {
            cluster.agent_log(node).contains("an interface to the network has appeared").then_some(())
        });
    }
    for target in [
        "http://172.31.0.11:30080/",
        "http://[fd00:31::12]:30080/",
        "http://172.31.0.12:30080/bytes?n=300000",
        "udp://172.31.0.11:30007",
    ] {
        println!("{target}");
        cluster.expect_balanced(OUTSIDE, &Options::to(target), &all_backends());
    }
}

/// In a cluster for all, since it takes minutes to load the programs somewhere; what the kernel has none of is left out.
#[rstest]
#[case::tun(Bare::Tun, &[])]
#[case::tun_with_only_the_nodes_sockets_translated(Bare::Tun, &["--socket-lb", "host"])]
#[case::tun_by_filters(Bare::Tun, &["--tc", "clsact"])]
#[case::ipip_sit_and_gre(Bare::Kernel, &["--socket-lb", "host"])]
fn links_without_headers_are_served(#[case] kind: Bare, #[case] arguments: &'static [&'static str]) {
    let Some(mut cluster) = Cluster::with_bare_links(kind, arguments) else {
        println!("this kernel has no such tunnels");
        return;
    };
    let [(node_v4, node_v6), _] = TUNNELLED;
    for (host, target) in [
        (OUTSIDE, "http://172.31.0.11:30080/".to_owned()),
        (OUTSIDE, "http://[fd00:31::12]:30080/".to_owned()),
        (OUTSIDE, "http://172.31.0.11:30080/bytes?n=300000".to_owned()),
        (OUTSIDE, "http://[fd00:31::11]:30080/bytes?n=300000".to_owned()),
        (OUTSIDE, "udp://172.31.0.12:30007".to_owned()),
        (OUTSIDE, "udp://[fd00:31::11]:30007".to_owned()),
        (OUTSIDE, format!("http://{node_v4}:30080/bytes?n=300000")),
        (OUTSIDE, format!("http://[{node_v6}]:30080/bytes?n=300000")),
        (OUTSIDE, format!("udp://{node_v4}:30007")),
        (OUTSIDE, format!("udp://[{node_v6}]:30007")),
        (CLIENT, CLUSTER_IP.to_owned()),
        (CLIENT, "http://[fd00:10:96::80]/".to_owned()),
        (CLIENT, "udp://10.96.0.7:7".to_owned()),
        (NODE_A, CLUSTER_IP.to_owned()),
    ] {
        println!("{host} -> {target}");
        cluster.expect_balanced(host, &Options::to(target), &all_backends());
    }

    // By either way in, to either node's backends: pieces that overtake the first, and what is too large for the next link.
    for backend in ["a1", "b1"] {
        cluster.change(|manifests| {
            *manifests = svc_lab::manifests::Manifests::hostnames().unwrap();
            all_backends().into_iter().filter(|pod| *pod != backend).for_each(|pod| manifests.remove_pod(pod));
        });
        for target in [format!("{node_v4}:30007"), format!("[{node_v6}]:30007"), "172.31.0.11:30007".to_owned()] {
            println!("{target} -> {backend}");
            cluster.expect_soon(OUTSIDE, &format!("udp://{target}"), &[backend]);
            let target: SocketAddr = target.parse().unwrap();
            let payload: Vec<u8> = (0..2500).map(|n| (n % 251) as u8).collect();
            for order in [[0, 1, 2], [2, 1, 0]] {
                let answer = pieces::exchange(&cluster.lab, OUTSIDE, target, &payload, &order);
                let answer = answer.unwrap_or_else(|error| panic!("{order:?}: {error:#}"));
                assert!(answer.starts_with(backend.as_bytes()) && answer.ends_with(&payload), "{order:?}");
            }
            if backend == "b1" {
                assert_eq!(path_mtu(&cluster, OUTSIDE, target), i32::from(BARE_MTU));
            }
        }
    }

    cluster.change(|manifests| manifests.remove_pod("b1"));
    for host in [node_v4.to_string(), format!("[{node_v6}]")] {
        cluster.expect_failure_soon(OUTSIDE, &Options::to(format!("http://{host}:30080/")), REFUSED);
        let datagram = Options::to(format!("udp://{host}:30007"));
        cluster.expect_failure_soon(OUTSIDE, &datagram, "receive: ConnectionRefused");
    }
}

/// What a datagram that fills the first link is told to be too large for.
#[track_caller]
fn path_mtu(cluster: &Cluster, host: &str, target: SocketAddr) -> i32 {
    const ASK: [(i32, i32, i32); 2] = [
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_MTU),
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_MTU),
    ];
    let (level, discover, mtu) = ASK[usize::from(target.is_ipv6())];
    let told = cluster.lab.namespace(host).unwrap().inside(|| {
        let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect(target)?;
        let set = |value: i32| {
            // SAFETY: the option is a number.
            unsafe { libc::setsockopt(socket.as_raw_fd(), level, discover, (&raw const value).cast(), 4) }
        };
        assert_eq!(set(libc::IP_PMTUDISC_DO), 0, "{}", std::io::Error::last_os_error());
        let get = || {
            let (mut value, mut length) = (0i32, 4);
            // SAFETY: the option is a number.
            unsafe { libc::getsockopt(socket.as_raw_fd(), level, mtu, (&raw mut value).cast(), &raw mut length) };
            value
        };
        let first = get();
        let _ = socket.send(&vec![0; first as usize - 48]);
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while get() == first && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        Ok(get())
    });
    told.unwrap()
}

#[rstest]
#[case::ipv4("udp://10.96.0.7:7")]
#[case::ipv6("udp://[fd00:10:96::7]:7")]
fn an_unconnected_socket_is_answered_from_the_address_it_sent_to(#[case] target: &str) {
    let request = Options { unconnected: true, ..Options::to(target) };
    Cluster::with_manifests().expect_balanced(CLIENT, &request, &all_backends());
}

#[rstest]
#[case::pod(CLIENT, CLUSTER_IP, REFUSED)]
#[case::pod_v6(CLIENT, "http://[fd00:10:96::80]/", REFUSED)]
#[case::node(NODE_A, "http://127.0.0.1:30080/", REFUSED)]
#[case::outside(OUTSIDE, "http://172.31.0.11:30080/", REFUSED)]
#[case::outside_v6(OUTSIDE, "http://[fd00:31::12]:30080/", REFUSED)]
#[case::outside_udp(OUTSIDE, "udp://172.31.0.11:30007", "receive: ConnectionRefused")]
#[case::outside_udp_v6(OUTSIDE, "udp://[fd00:31::11]:30007", "receive: ConnectionRefused")]
fn without_a_ready_backend_a_client_is_refused(#[case] host: &str, #[case] target: &str, #[case] reason: &str) {
    let mut cluster = Cluster::with_manifests();
    cluster.change(|manifests| all_backends().into_iter().for_each(|pod| manifests.set_ready(pod, false)));
    cluster.expect_failure_soon(host, &Options::to(target), reason);
}

#[rstest]
#[case::pod(CLIENT, "http://10.96.0.80:81/")]
#[case::pod_v6(CLIENT, "http://[fd00:10:96::80]:81/")]
#[case::node(NODE_A, "http://10.96.0.80:81/")]
#[case::outside(OUTSIDE, "http://10.96.0.80:81/")]
#[case::outside_v6(OUTSIDE, "http://[fd00:10:96::80]:81/")]
fn an_unknown_port_of_a_cluster_ip_is_refused(#[case] host: &str, #[case] target: &str) {
    Cluster::with_manifests().expect_failure(host, &Options::to(target), REFUSED);
}

#[rstest]
#[case::pod(CLIENT, CLUSTER_IP)]
#[case::outside(OUTSIDE, "http://172.31.0.11:30080/")]
fn a_backend_leaves_and_returns_under_load(#[case] host: &str, #[case] target: &str) {
    let mut cluster = Cluster::with_manifests();
    let load = cluster.load(host, target);
    thread::sleep(Duration::from_millis(500));
    assert_right(&load.tally(), &all_backends());

    cluster.change(|manifests| manifests.remove_pod("b1"));
    becomes_right(&load, &["a1", "a2", "b2"]);

    cluster.change(|manifests| *manifests = svc_lab::manifests::Manifests::hostnames().unwrap());
    becomes_right(&load, &all_backends());
}

#[rstest]
#[case::pod(CLIENT, CLUSTER_IP)]
#[case::outside_local(OUTSIDE, "http://172.31.0.11:30080/")]
#[case::outside_remote(OUTSIDE, "http://172.31.0.12:30080/")]
fn a_long_connection_stays_with_a_backend_that_left(#[case] host: &str, #[case] target: &str) {
    let mut cluster = Cluster::with_manifests();
    // Enough that every backend has one.
    let connections: Vec<Load> = (0..12).map(|_| cluster.long_connection(host, target)).collect();
    thread::sleep(Duration::from_millis(500));
    cluster.change(|manifests| {
        manifests.remove_pod("a1");
        manifests.remove_pod("b1");
    });
    cluster.expect_soon(host, target, &["a2", "b2"]);
    thread::sleep(Duration::from_millis(500));
    for connection in connections {
        let outcomes = connection.finish().unwrap();
        assert!(outcomes.len() > 20, "only {} requests", outcomes.len());
        let first = &outcomes[0];
        let same = |outcome: &&_| -> bool {
            let outcome: &svc_lab::client::Outcome = outcome;
            outcome.error.is_none() && outcome.peer == first.peer && outcome.backend == first.backend
        };
        assert!(outcomes.iter().all(|outcome| same(&outcome)), "{first:?} became {:?}", outcomes.last());
    }
}

/// What a connected UDP socket is told when it is terminated.
const TERMINATED: [&str; 2] = ["wait: ConnectionAborted", "receive: ConnectionAborted"];

/// Connected UDP sockets, a datagram on each every 20 ms, and the pod that the first one is at.
fn connected_sockets(cluster: &Cluster, host: &str, target: &str) -> (Vec<Load>, &'static Pod) {
    let sockets: Vec<_> = (0..8).map(|_| cluster.long_connection(host, target)).collect();
    thread::sleep(Duration::from_millis(500));
    let backend = sockets[0].take()[0].backend.clone().unwrap();
    (sockets, BACKENDS.iter().find(|pod| pod.name == backend).unwrap())
}

/// Those at `pod` fail once, and are with others from then on. All others stay where they are.
#[track_caller]
fn expect_terminated(sockets: Vec<Load>, pod: &Pod) {
    let mut outcomes = vec![Vec::new(); sockets.len()];
    eventually(&format!("no socket is at {}", pod.name), || {
        // Longer than a socket waits for an answer.
        thread::sleep(Duration::from_secs(1));
        let news: Vec<_> = sockets.iter().map(Load::take).collect();
        let at_pod = news.iter().flatten().any(|outcome| outcome.backend.as_deref() == Some(pod.name));
        let all_answered = news.iter().all(|news| news.last().is_some_and(|outcome| outcome.error.is_none()));
        outcomes.iter_mut().zip(news).for_each(|(all, news)| all.extend(news));
        (!at_pod && all_answered).then_some(())
    });
    let mut terminated = 0;
    for (socket, mut outcomes) in sockets.into_iter().zip(outcomes) {
        outcomes.extend(socket.finish().unwrap());
        let first = outcomes[0].backend.as_deref().unwrap();
        let of_first = outcomes.iter().take_while(|outcome| outcome.backend.as_deref() == Some(first)).count();
        let rest = &outcomes[of_first..];
        if first != pod.name {
            assert!(rest.is_empty(), "a socket at {first}: {rest:?}");
            continue;
        }
        terminated += 1;
        let [failure, rest @ ..] = rest else { panic!("a socket stays at {first}") };
        assert!(TERMINATED.contains(&failure.error.as_deref().unwrap_or_default()), "{failure:?}");
        let elsewhere = rest.iter().filter(|outcome| outcome.backend.as_deref().is_some_and(|other| other != first));
        assert!(!rest.is_empty() && elsewhere.count() == rest.len(), "{rest:?}");
    }
    assert!(terminated > 0);
}

/// They all stay where they are.
#[track_caller]
fn expect_untouched(sockets: Vec<Load>) {
    thread::sleep(Duration::from_secs(1));
    for socket in sockets {
        let outcomes = socket.finish().unwrap();
        let first = &outcomes[0].backend;
        let elsewhere: Vec<_> = outcomes.iter().filter(|outcome| outcome.backend != *first).collect();
        assert!(first.is_some() && elsewhere.is_empty(), "{elsewhere:?}");
    }
}

const UDP_CLUSTER_IP: &str = "udp://10.96.0.7:7";

#[rstest]
#[case::pod(CLIENT, UDP_CLUSTER_IP)]
#[case::pod_v6(CLIENT, "udp://[fd00:10:96::7]:7")]
#[case::pod_v4_mapped(CLIENT, "udp://[::ffff:10.96.0.7]:7")]
#[case::node(NODE_A, UDP_CLUSTER_IP)]
#[case::node_to_its_own_node_port_v6(NODE_A, "udp://[fd00:31::11]:30007")]
#[case::node_to_localhost_node_port(NODE_A, "udp://127.0.0.1:30007")]
fn a_connected_udp_socket_whose_backend_left_is_terminated(#[case] host: &str, #[case] target: &str) {
    let mut cluster = Cluster::with_manifests();
    let (sockets, pod) = connected_sockets(&cluster, host, target);
    cluster.change(|manifests| manifests.remove_pod(pod.name));
    expect_terminated(sockets, pod);
}

#[rstest]
#[case::the_nodes_own(&["--socket-lb", "host"], NODE_A)]
#[case::by_its_process_alone(&["--netns-dirs", "/nonexistent"], CLIENT)]
fn a_connected_udp_socket_is_terminated_with(#[case] arguments: &'static [&'static str], #[case] host: &str) {
    let mut cluster = Cluster::with_arguments(arguments);
    let (sockets, pod) = connected_sockets(&cluster, host, UDP_CLUSTER_IP);
    cluster.change(|manifests| manifests.remove_pod(pod.name));
    expect_terminated(sockets, pod);
}

#[rstest]
#[case::pod(CLIENT)]
#[case::node(NODE_A)]
fn a_connected_udp_socket_whose_backend_left_while_no_agent_ran_is_terminated(#[case] host: &str) {
    let mut cluster = Cluster::with_manifests();
    let (sockets, pod) = connected_sockets(&cluster, host, UDP_CLUSTER_IP);
    cluster.kill_agent(&NODES[0]);
    cluster.change(|manifests| manifests.remove_pod(pod.name));
    thread::sleep(Duration::from_millis(500));
    cluster.start_agent(&NODES[0]);
    expect_terminated(sockets, pod);
}

#[rstest]
#[case::pod(CLIENT)]
#[case::node(NODE_A)]
fn a_udp_socket_that_is_connected_to_a_pods_own_address_is_left_alone(#[case] host: &str) {
    let mut cluster = Cluster::with_manifests();
    let (sockets, pod) = connected_sockets(&cluster, host, UDP_CLUSTER_IP);
    let direct = cluster.long_connection(host, &format!("udp://{}:{PORT}", pod.v4()));
    thread::sleep(Duration::from_millis(200));
    cluster.change(|manifests| manifests.remove_pod(pod.name));
    expect_terminated(sockets, pod);
    expect_untouched(vec![direct]);
}

#[test]
fn a_connected_udp_socket_whose_backend_left_and_returned_while_no_agent_ran_is_left_alone() {
    let mut cluster = Cluster::with_manifests();
    let (sockets, pod) = connected_sockets(&cluster, CLIENT, UDP_CLUSTER_IP);
    cluster.kill_agent(&NODES[0]);
    cluster.change(|manifests| manifests.remove_pod(pod.name));
    cluster.change(|manifests| *manifests = svc_lab::manifests::Manifests::hostnames().unwrap());
    cluster.start_agent(&NODES[0]);
    expect_untouched(sockets);
}

#[test]
fn a_connected_udp_socket_is_left_alone_where_that_is_wanted() {
    let mut cluster = Cluster::with_arguments(&["--terminate-udp-sockets", "false"]);
    let (sockets, pod) = connected_sockets(&cluster, CLIENT, UDP_CLUSTER_IP);
    cluster.change(|manifests| manifests.remove_pod(pod.name));
    expect_untouched(sockets);
}

#[test]
fn no_request_fails_while_the_agents_are_killed_and_what_changed_meanwhile_is_right_after_their_return() {
    let mut cluster = Cluster::with_manifests();
    let node_port = format!("http://{}:{NODE_PORT}/", NODES[1].v4());
    let loads = [cluster.load(CLIENT, CLUSTER_IP), cluster.load(OUTSIDE, &node_port)];
    let connections = [cluster.long_connection(CLIENT, CLUSTER_IP), cluster.long_connection(OUTSIDE, &node_port)];
    thread::sleep(Duration::from_millis(300));
    for node in &NODES {
        cluster.kill_agent(node);
    }
    cluster.change(|manifests| {
        manifests.remove_pod("b1");
        service("later", "10.96.0.90", &["a1", "b2"]).into_iter().for_each(|object| manifests.put(object));
    });
    thread::sleep(Duration::from_secs(1));
    for load in &loads {
        assert_right(&load.tally(), &all_backends());
    }
    for node in &NODES {
        cluster.start_agent(node);
    }
    cluster.expect_soon(CLIENT, "http://10.96.0.90/", &["a1", "b2"]);
    cluster.expect_soon(CLIENT, CLUSTER_IP, &["a1", "a2", "b2"]);
    cluster.expect_soon(OUTSIDE, &node_port, &["a1", "a2", "b2"]);
    for load in loads.into_iter().chain(connections) {
        let failed: Vec<_> = load.finish().unwrap().into_iter().filter(|outcome| outcome.error.is_some()).collect();
        assert!(failed.is_empty(), "{failed:?}");
    }
}

#[rstest]
#[case::tcx(Cluster::with_manifests)]
#[case::clsact(Cluster::with_clsact)]
#[case::generic_xdp(Cluster::with_generic_xdp)]
#[case::native_xdp(Cluster::with_native_xdp)]
fn an_orderly_restart_costs_no_request(#[case] cluster: Start) {
    let mut cluster = cluster();
    let node_port = format!("http://{}:{NODE_PORT}/", NODES[0].v4());
    let loads = [cluster.load(CLIENT, CLUSTER_IP), cluster.load(OUTSIDE, &node_port)];
    for _ in 0..3 {
        for node in &NODES {
            cluster.stop_agent(node);
            cluster.start_agent(node);
        }
    }
    for load in loads {
        let failed: Vec<_> = load.finish().unwrap().into_iter().filter(|outcome| outcome.error.is_some()).collect();
        assert!(failed.is_empty(), "{failed:?}");
    }
}

/// A tenth of the source ports and more are given to flows of the outside's clients, of each protocol.
fn forward_flows(cluster: &Cluster) {
    let many = |target: &str| Options { requests: Some(6000), concurrency: 8, ..Options::to(target) };
    for target in ["udp://172.31.0.11:30007", "http://172.31.0.11:30080/"] {
        let tally = cluster.lab.tally(OUTSIDE, &many(target)).unwrap();
        assert_eq!(tally.failed(), 0, "{tally}");
    }
}

const SOURCE_PORTS: std::ops::RangeInclusive<u16> = 1024..=22_000;

#[rstest]
#[case::udp("udp://10.96.0.7:7")]
#[case::tcp(CLUSTER_IP)]
#[case::directly("udp://10.244.2.11:9376")]
fn a_socket_of_the_node_whose_port_a_flow_has_gets_its_replies(#[case] target: &str) {
    let cluster = Cluster::with_manifests();
    forward_flows(&cluster);
    let request =
        Options { requests: Some(300), source_ports: Some(SOURCE_PORTS), timeout_ms: 500, ..Options::to(target) };
    let tally = cluster.lab.tally(NODE_A, &request).unwrap();
    assert_eq!(tally.failed(), 0, "{tally}");
}

#[test]
fn a_flow_takes_no_port_that_a_socket_of_the_node_has() {
    let cluster = Cluster::with_manifests();
    let busy = Options {
        rate: Some(600),
        concurrency: 600,
        keep_alive: true,
        source_ports: Some(SOURCE_PORTS),
        ..Options::to(CLUSTER_IP)
    };
    let connections = Load::start(&cluster.lab, NODE_A, &busy).unwrap();
    thread::sleep(Duration::from_millis(1500));
    forward_flows(&cluster);
    let failed: Vec<_> = connections.finish().unwrap().into_iter().filter(|outcome| outcome.error.is_some()).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[rstest]
#[case::to_a_backend_elsewhere(Cluster::with_manifests, &["b1"])]
#[case::to_all(Cluster::with_manifests, &["a1", "a2", "b1", "b2"])]
#[case::behind_xdp(Cluster::with_native_xdp, &["b1"])]
fn a_flood_of_connections_costs_nobody_elses(#[case] cluster: Start, #[case] pods: &[&str]) {
    let mut cluster = cluster();
    let node_port = format!("http://{}:{NODE_PORT}/", NODES[0].v4());
    cluster.change(|manifests| {
        all_backends().iter().filter(|pod| !pods.contains(pod)).for_each(|pod| manifests.remove_pod(pod));
    });
    cluster.expect_soon(OUTSIDE, &node_port, pods);
    let connection = cluster.long_connection(OUTSIDE, &node_port);
    let flood = Flood::start(&cluster.lab, OUTSIDE, SocketAddrV4::new(NODES[0].v4(), NODE_PORT), 28_000).unwrap();
    let load = cluster.load(OUTSIDE, &node_port);
    thread::sleep(Duration::from_secs(8));
    let outcomes: Vec<_> = [load, connection].into_iter().flat_map(|load| load.finish().unwrap()).collect();
    let sent = flood.finish();
    let late = outcomes.iter().filter(|outcome| outcome.error.is_some() || outcome.ms > 900.0).count();
    println!("{sent} SYNs beside {} requests, of which {late} failed or took a second", outcomes.len());
    assert!(outcomes.len() > 1000 && sent > 50_000);
    // Queues of the machine, full of SYNs, drop one of a thousand before it comes to us.
    assert!(late * 200 <= outcomes.len(), "{late} of {}", outcomes.len());
    assert_eq!(["no_source_port", "flow_table_full"].map(|reason| counter(&cluster, reason)), [0, 0]);
}

#[test]
fn what_has_outlived_its_limit_is_swept_from_the_flow_table() {
    let short = &["--conntrack-udp-timeout", "1s", "--conntrack-udp-timeout-stream", "1s"];
    let cluster = Cluster::with_arguments(short);
    let one = Options { requests: Some(1), ..Options::to("udp://172.31.0.11:30007") };
    assert_eq!(cluster.lab.tally(OUTSIDE, &one).unwrap().failed(), 0);
    let sweep = || svc_agent::sweep::sweep(&cluster.lab.bpffs(NODE_A)).unwrap();
    assert_eq!(sweep(), 0);
    thread::sleep(Duration::from_secs(7));
    assert_eq!([sweep(), sweep()], [2, 0]);
}

/// On the first node: how many packets had this end.
fn counter(cluster: &Cluster, reason: &str) -> u64 {
    let status = inspect(&cluster.lab, &NODES[0], &["status", "--output", "json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let row = status["counters"].as_array().unwrap().iter().find(|row| row["reason"] == reason);
    row.map_or(0, |row| row["packets"].as_u64().unwrap())
}

#[rstest]
fn a_datagram_in_pieces_arrives_whole(
    #[values("a1", "b1")] backend: &str,
    #[values((OUTSIDE, "172.31.0.11:30007"), (OUTSIDE, "[fd00:31::11]:30007"), (CLIENT, "10.96.0.7:7"), (CLIENT, "[fd00:10:96::7]:7"))]
    way: (&str, &str),
) {
    let mut cluster = Cluster::with_manifests();
    let others = all_backends().into_iter().filter(|pod| *pod != backend);
    cluster.change(|manifests| others.for_each(|pod| manifests.remove_pod(pod)));
    let (host, target) = way;
    cluster.expect_soon(host, &format!("udp://{target}"), &[backend]);
    let payload: Vec<u8> = (0..2500).map(|n| (n % 251) as u8).collect();
    for order in [[0, 1, 2], [1, 0, 2], [2, 1, 0], [1, 2, 0]] {
        let answer = pieces::exchange(&cluster.lab, host, target.parse().unwrap(), &payload, &order);
        let answer = answer.unwrap_or_else(|error| panic!("{order:?}: {error:#}"));
        assert!(answer.starts_with(backend.as_bytes()) && answer.ends_with(&payload), "{order:?}");
    }
    assert_eq!(counter(&cluster, "fragment_kept"), 5, "one, two and two pieces overtook the first");
}

#[test]
fn a_process_of_the_node_is_refused_a_node_port() {
    let node_ports = ["0.0.0.0:30080", "[::]:30080", "127.0.0.1:30080", "[::1]:30080", "172.31.0.11:30080"];
    let others = ["0.0.0.0:30081", "0.0.0.0:0", "127.0.0.1:8080", "[::1]:30007"];
    let cluster = Cluster::with_manifests();
    for address in node_ports {
        assert_eq!(bind(&cluster, NODE_A, address), "AddrInUse", "{address}");
    }
    for address in others {
        assert_eq!(bind(&cluster, NODE_A, address), "free", "{address}");
    }
    assert_eq!(bind(&cluster, CLIENT, node_ports[0]), "free", "a pod's ports are its own");

    let unprotected = Cluster::with_arguments(&["--node-port-bind-protection", "false"]);
    assert_eq!(bind(&unprotected, NODE_A, node_ports[0]), "free");
}

/// What becomes of a listener there.
fn bind(cluster: &Cluster, host: &str, address: &str) -> String {
    let mut command = Command::new(svc_lab::binaries::lab().unwrap());
    command.args(["bind", address]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = cluster.lab.spawn(host, command).unwrap();
    let mut text = String::new();
    process.child().stdout.take().unwrap().read_to_string(&mut text).unwrap();
    process.wait().unwrap();
    text.trim().to_owned()
}

/// Where the kernel has no tcx, or is told not to use it.
#[rstest]
#[case::pod_to_its_own_service("a1", CLUSTER_IP)]
#[case::outside_to_one_node_port(OUTSIDE, "http://172.31.0.11:30080/")]
#[case::outside_to_the_other_node_port_v6(OUTSIDE, "http://[fd00:31::12]:30080/")]
#[case::large_answer_to_the_outside(OUTSIDE, "http://172.31.0.11:30080/bytes?n=300000")]
fn every_backend_answers_by_filters_on_clsact(#[case] host: &str, #[case] target: &str) {
    Cluster::with_arguments(&["--tc", "clsact", "--socket-lb", "off"]).expect_balanced(
        host,
        &Options::to(target),
        &all_backends(),
    );
}

#[test]
fn another_way_to_attach_takes_over_without_a_lost_request() {
    let mut cluster = Cluster::with_manifests();
    let node_port = format!("http://{}:{NODE_PORT}/", NODES[0].v4());
    let loads = [cluster.load(CLIENT, CLUSTER_IP), cluster.load(OUTSIDE, &node_port)];
    let connection = cluster.long_connection(OUTSIDE, &node_port);
    for arguments in [&["--tc", "clsact"][..], &["--tc", "tcx"], &["--tc", "clsact", "--socket-lb", "host"], &[]] {
        cluster.agent_arguments = arguments;
        for node in &NODES {
            cluster.stop_agent(node);
            cluster.start_agent(node);
        }
        let by = if arguments.contains(&"clsact") { "clsact" } else { "tcx" };
        let status = inspect(&cluster.lab, &NODES[0], &["status"]).unwrap();
        let uplink: Vec<&str> = status.lines().filter(|line| line.contains("-eth0")).collect();
        assert!(uplink.len() == 2 && uplink.iter().all(|line| line.contains(by)), "{by}: {status}");
    }
    for load in loads.into_iter().chain([connection]) {
        let failed: Vec<_> = load.finish().unwrap().into_iter().filter(|outcome| outcome.error.is_some()).collect();
        assert!(failed.is_empty(), "{failed:?}");
    }
}

#[test]
fn somebody_elses_filter_outlives_ours() {
    let mut cluster = Cluster::with_clsact();
    let node = &NODES[0];
    let tc = |arguments: &[&str]| {
        let run = || Ok(Command::new("tc").args(arguments).output()?);
        let output = cluster.lab.namespace(node.name).unwrap().inside(run).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    tc(&["filter", "add", "dev", "eth0", "ingress", "pref", "7", "bpf", "bytecode", "1,6 0 0 0", "flowid", "1:1"]);
    inspect(&cluster.lab, node, &["cleanup"]).unwrap();
    let left = tc(&["filter", "show", "dev", "eth0", "ingress"]);
    assert!(left.contains("pref 7 bpf") && !left.contains("svc_"), "{left}");
    cluster.stop_agent(node);
}

#[test]
fn cleanup_removes_filters_and_the_qdisc_that_was_made_for_them() {
    let mut cluster = Cluster::with_clsact();
    let node = &NODES[0];
    let status = inspect(&cluster.lab, node, &["status"]).unwrap();
    assert!(status.contains("ingress-eth0") && status.contains("clsact"), "{status}");
    let has_qdisc = |cluster: &Cluster| {
        let inside = cluster.lab.namespace(node.name).unwrap().inside(|| {
            let qdiscs = Command::new("tc").args(["qdisc", "show", "dev", "eth0"]).output()?;
            Ok(String::from_utf8_lossy(&qdiscs.stdout).contains("clsact"))
        });
        inside.unwrap()
    };
    assert!(has_qdisc(&cluster));
    cluster.stop_agent(node);
    inspect(&cluster.lab, node, &["cleanup"]).unwrap();
    assert!(!has_qdisc(&cluster));
    cluster.expect_failure(OUTSIDE, &Options::to("http://172.31.0.11:30080/"), REFUSED);
}

#[test]
fn two_clusters_on_one_machine_do_not_meet() {
    let mut one = Cluster::with_manifests();
    let mut other = Cluster::with_manifests();
    one.change(|manifests| manifests.remove_pod("a1"));
    other.change(|manifests| manifests.remove_pod("b2"));
    one.expect_soon(CLIENT, CLUSTER_IP, &["a2", "b1", "b2"]);
    other.expect_soon(CLIENT, CLUSTER_IP, &["a1", "a2", "b1"]);
    drop(one);
    other.expect_balanced(CLIENT, &Options::to(CLUSTER_IP), &["a1", "a2", "b1"]);
    other.expect_balanced(OUTSIDE, &Options::to("http://172.31.0.11:30080/"), &["a1", "a2", "b1"]);
}

#[test]
fn cleanup_leaves_nothing_attached_and_nothing_pinned() {
    let mut cluster = Cluster::with_manifests();
    let node = &NODES[0];
    let bpffs = cluster.lab.bpffs(node.name);
    assert!(fs::read_dir(&bpffs).unwrap().next().is_some(), "nothing was pinned in the first place");
    cluster.stop_agent(node);
    cluster.expect_balanced(CLIENT, &Options::to(CLUSTER_IP), &all_backends());

    inspect(&cluster.lab, node, &["cleanup"]).unwrap();
    let left: Vec<_> = fs::read_dir(&bpffs).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "{left:?}");
    let unanswered = Options { requests: Some(2), timeout_ms: 300, ..Options::to(CLUSTER_IP) };
    assert_eq!(cluster.lab.tally(CLIENT, &unanswered).unwrap().answered(), 0);
    cluster.expect_failure(OUTSIDE, &Options::to("http://172.31.0.11:30080/"), REFUSED);
    // The other node is served as before.
    cluster.expect_balanced("b1", &Options::to(CLUSTER_IP), &all_backends());
}

#[rstest]
#[case::services(&["services"], "hostnames")]
#[case::backends(&["backends", "default/hostnames"], "10.244.2.11")]
#[case::status(&["status"], "")]
fn inspection_needs_no_agent(#[case] arguments: &[&str], #[case] expected: &str) {
    let mut cluster = Cluster::with_manifests();
    cluster.kill_agent(&NODES[0]);
    for format in ["table", "json", "yaml"] {
        let text = inspect(&cluster.lab, &NODES[0], &[arguments, &["-o", format]].concat()).unwrap();
        assert!(text.contains(expected), "{format}: {text}");
    }
}

#[test]
fn flows_are_shown_with_their_client_and_backend() {
    let cluster = Cluster::with_manifests();
    let connection = cluster.long_connection(OUTSIDE, "http://172.31.0.11:30080/");
    thread::sleep(Duration::from_millis(300));
    let backend = connection.take()[0].backend.clone().unwrap();
    let pod = BACKENDS.iter().find(|pod| pod.name == backend).unwrap();
    let text = inspect(&cluster.lab, &NODES[0], &["flows", "-o", "json"]).unwrap();
    for address in ["172.31.0.99", &pod.v4().to_string()] {
        assert!(text.contains(address), "no {address} in {text}");
    }
}
