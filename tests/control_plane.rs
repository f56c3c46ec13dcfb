//! Services of a real kube-apiserver.
use std::thread;
use std::time::Duration;

use serde_json::json;
use svc_agent::source::decode;
use svc_agent::source::encoding::{ACCEPT, Encoding, Event, Frames, ListReader};
use svc_agent::source::wire::{self, Object, Status};
use svc_lab::agent::inspect;
use svc_lab::client::Options;
use svc_lab::control_plane::Identity;
use svc_lab::topology::{CLIENT, CONTROL_PLANE, NODES, OUTSIDE};
use svc_tests::cluster::{
    CLUSTER_IP, Cluster, REFUSED, all_backends, assert_right, eventually, http_get, http_get_path, service,
};

const NODE_PORT: &str = "http://172.31.0.12:30080/";

#[test]
fn every_backend_answers_on_every_path() {
    let cluster = Cluster::with_control_plane();
    for (host, target) in [
        (CLIENT, CLUSTER_IP),
        (CLIENT, "http://[fd00:10:96::80]/"),
        (CLIENT, "udp://10.96.0.7:7"),
        ("node-a", CLUSTER_IP),
        ("node-a", "http://127.0.0.1:30080/"),
        (OUTSIDE, "http://172.31.0.11:30080/"),
        (OUTSIDE, "http://[fd00:31::12]:30080/"),
        (OUTSIDE, CLUSTER_IP),
        (OUTSIDE, "udp://172.31.0.11:30007"),
    ] {
        cluster.expect_balanced(host, &Options::to(target), &all_backends());
    }
}

#[test]
fn services_and_backends_come_and_go_under_load() {
    let mut cluster = Cluster::with_control_plane();
    let loads = [cluster.load(CLIENT, CLUSTER_IP), cluster.load(OUTSIDE, NODE_PORT)];
    cluster.change(|manifests| {
        manifests.set_ready("b1", false);
        service("later", "10.96.0.90", &["a1", "b2"]).into_iter().for_each(|object| manifests.put(object));
    });
    cluster.expect_soon(CLIENT, "http://10.96.0.90/", &["a1", "b2"]);
    cluster.expect_soon(CLIENT, CLUSTER_IP, &["a1", "a2", "b2"]);
    cluster.expect_soon(OUTSIDE, NODE_PORT, &["a1", "a2", "b2"]);

    cluster.change(|manifests| {
        manifests.set_ready("b1", true);
        manifests.remove("EndpointSlice", "later-ipv4");
    });
    cluster.expect_soon(CLIENT, CLUSTER_IP, &all_backends());
    cluster.expect_failure_soon(CLIENT, &Options::to("http://10.96.0.90/"), REFUSED);
    for load in loads {
        let failed: Vec<_> = load.finish().unwrap().into_iter().filter(|outcome| outcome.error.is_some()).collect();
        assert!(failed.is_empty(), "{failed:?}");
    }
}

#[test]
fn a_health_check_port_tells_whether_its_node_has_an_endpoint() {
    let mut cluster = Cluster::with_control_plane();
    let edge = |pods: &[&str]| {
        let [mut service, slice] = service("edge", "10.96.0.91", pods);
        let spec = service["spec"].as_object_mut().unwrap();
        spec.insert("type".to_owned(), "LoadBalancer".into());
        spec.insert("externalTrafficPolicy".to_owned(), "Local".into());
        spec.insert("healthCheckNodePort".to_owned(), 32_100.into());
        [service, slice]
    };
    let expect = |cluster: &Cluster, node: &str, status: &str, weight: u32| {
        eventually(&format!("{node} answers {status}"), || {
            let answer = http_get(&cluster.lab, OUTSIDE, node).unwrap_or_default().to_lowercase();
            let right = answer.starts_with(&format!("http/1.1 {status} "))
                && answer.contains(&format!("x-load-balancing-endpoint-weight: {weight}\r\n"))
                && answer.contains(&format!("\"localendpoints\": {weight},"));
            right.then_some(())
        });
    };
    cluster.change(|manifests| edge(&["a1", "a2"]).into_iter().for_each(|object| manifests.put(object)));
    expect(&cluster, "172.31.0.11:32100", "200", 2);
    expect(&cluster, "172.31.0.12:32100", "503", 0);
    assert_eq!(http_get(&cluster.lab, OUTSIDE, "[fd00:31::11]:32100"), None, "the Service has no IPv6");
    cluster.change(|manifests| edge(&["b1"]).into_iter().for_each(|object| manifests.put(object)));
    expect(&cluster, "172.31.0.11:32100", "503", 0);
    expect(&cluster, "172.31.0.12:32100", "200", 1);
    cluster.change(|manifests| manifests.remove("Service", "edge"));
    eventually("nobody answers", || http_get(&cluster.lab, OUTSIDE, "172.31.0.12:32100").is_none().then_some(()));
}

#[test]
fn users_learn_of_a_conflict_by_an_event_on_the_younger_service() {
    let mut cluster = Cluster::with_control_plane();
    let claiming = |name: &str, cluster_ip: &str| {
        let [mut service, _] = service(name, cluster_ip, &[]);
        service["spec"]["externalIPs"] = ["192.0.2.90"].into();
        service
    };
    cluster.change(|manifests| manifests.put(claiming("older", "10.96.0.92")));
    // Creation times have seconds.
    thread::sleep(Duration::from_millis(1100));
    cluster.change(|manifests| manifests.put(claiming("younger", "10.96.0.93")));
    let events = |cluster: &mut Cluster, service: &str| {
        let (control_plane, lab) = cluster.control_plane();
        control_plane.events(lab, service).unwrap()
    };
    eventually("an event", || (!events(&mut cluster, "younger").is_empty()).then_some(()));
    // The other node says the same within that time.
    thread::sleep(Duration::from_millis(500));
    let told = events(&mut cluster, "younger");
    let [(reason, note)] = &told[..] else { panic!("one, whatever the number of nodes: {told:?}") };
    assert_eq!(reason, "ServiceAddressConflict");
    assert!(note.contains("192.0.2.90 port 80") && note.contains("default/older"), "{note}");
    assert_eq!(events(&mut cluster, "older"), []);
}

#[test]
fn traffic_outlives_the_api_server_and_its_return_is_noticed() {
    let mut cluster = Cluster::with_control_plane();
    let load = cluster.load(CLIENT, CLUSTER_IP);
    let (control_plane, _) = cluster.control_plane();
    control_plane.kill_api_server();
    thread::sleep(Duration::from_secs(5));
    assert_right(&load.tally(), &all_backends());

    let (control_plane, lab) = cluster.control_plane();
    control_plane.start_api_server(lab).unwrap();
    cluster.change(|manifests| manifests.remove_pod("a2"));
    cluster.expect_soon(CLIENT, CLUSTER_IP, &["a1", "b1", "b2"]);
    cluster.expect_soon(OUTSIDE, NODE_PORT, &["a1", "b1", "b2"]);
    let failed: Vec<_> = load.finish().unwrap().into_iter().filter(|outcome| outcome.error.is_some()).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

/// One port that nobody listens at, and two addresses of one server, of which the first falls silent.
#[test]
fn another_api_server_is_found_where_one_is_away_or_falls_silent() {
    let mut cluster = Cluster::with_two_addresses(&[
        "--api-server",
        "https://172.31.0.2:6444",
        "--api-server",
        "https://172.31.0.3:6443",
        "--api-server",
        "https://172.31.0.2:6443",
    ]);
    cluster.change(|manifests| manifests.set_ready("a1", false));
    cluster.expect_soon(CLIENT, CLUSTER_IP, &["a2", "b1", "b2"]);
    cluster.lab.namespace(CONTROL_PLANE).unwrap().ip("addr del 172.31.0.3/24 dev eth0\n").unwrap();
    cluster.change(|manifests| manifests.set_ready("a1", true));
    // Silence is noticed after 5 s.
    cluster.expect_soon(CLIENT, CLUSTER_IP, &all_backends());
    cluster.change(|manifests| manifests.set_ready("b2", false));
    cluster.expect_soon(CLIENT, CLUSTER_IP, &["a1", "a2", "b1"]);
}

#[test]
fn a_token_that_was_replaced_and_revoked_costs_no_change() {
    let mut cluster = Cluster::with_tokens(Identity::Configuration, &[]);
    let (control_plane, lab) = cluster.control_plane();
    control_plane.replace_token(lab).unwrap();
    // Watches that are open stay so; a server that starts anew asks for the token again.
    control_plane.kill_api_server();
    control_plane.start_api_server(lab).unwrap();
    cluster.change(|manifests| manifests.set_ready("a1", false));
    cluster.expect_soon(CLIENT, CLUSTER_IP, &["a2", "b1", "b2"]);
    cluster.expect_soon(OUTSIDE, NODE_PORT, &["a2", "b1", "b2"]);
}

/// Nobody but the agents serves the ClusterIP of default/kubernetes, so that the first one has to be told another way.
#[test]
fn an_agent_in_a_pod_goes_to_the_api_server_itself_and_finds_it_again() {
    let mut cluster = Cluster::with_tokens(Identity::Pod, &["--api-server", "https://172.31.0.2:6443"]);
    let node = &NODES[0];
    eventually("the kernel knows the API server", || {
        let text = inspect(&cluster.lab, node, &["backends", "default/kubernetes"]).unwrap();
        text.contains("172.31.0.2:6443").then_some(())
    });
    cluster.kill_agent(node);
    cluster.start_agent_with(node, &[]);
    cluster.change(|manifests| manifests.set_ready("a1", false));
    cluster.expect_soon(CLIENT, CLUSTER_IP, &["a2", "b1", "b2"]);
    let metrics = http_get_path(&cluster.lab, node.name, "127.0.0.1:10249", "/metrics").unwrap();
    let requests: Vec<_> = metrics.lines().filter(|line| line.starts_with("rest_client_requests_total{")).collect();
    let right = |line: &&str| line.contains("host=\"172.31.0.2:6443\"") && line.contains("code=\"200\"");
    assert!(!requests.is_empty() && requests.iter().all(right), "{requests:?}");
}

#[test]
fn what_changed_while_the_agents_were_dead_is_right_after_their_return() {
    let mut cluster = Cluster::with_control_plane();
    let load = cluster.load(CLIENT, CLUSTER_IP);
    for node in &NODES {
        cluster.kill_agent(node);
    }
    cluster.change(|manifests| {
        manifests.remove_pod("b1");
        service("later", "10.96.0.90", &["a1", "b2"]).into_iter().for_each(|object| manifests.put(object));
    });
    for node in &NODES {
        cluster.start_agent(node);
    }
    cluster.expect_soon(CLIENT, "http://10.96.0.90/", &["a1", "b2"]);
    cluster.expect_soon(CLIENT, CLUSTER_IP, &["a1", "a2", "b2"]);
    let failed: Vec<_> = load.finish().unwrap().into_iter().filter(|outcome| outcome.error.is_some()).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

const JSON: &str = "application/json";

/// What the agent keeps of the objects at `path`, read as protobuf and as JSON.
fn both<T: Object, I>(cluster: &mut Cluster, path: &str, keep: fn(&T) -> I) -> [Vec<I>; 2] {
    let (control_plane, lab) = cluster.control_plane();
    [(ACCEPT, Encoding::Protobuf), (JSON, Encoding::Json)].map(|(accept, encoding)| {
        let (kind, body) = control_plane.get(lab, path, accept).unwrap();
        assert_eq!(kind.contains("protobuf"), encoding == Encoding::Protobuf, "{kind}");
        let mut items = Vec::new();
        let mut reader = ListReader::new(encoding);
        let mut give = |object: Result<T, _>| items.push(keep(&object.unwrap()));
        reader.read(&body, &mut give).unwrap();
        assert!(reader.end(&mut give).unwrap().is_some_and(|version| !version.is_empty()));
        items
    })
}

/// Of each kind one that has every field that counts, one that has none, and one that has them null.
fn say_much(cluster: &mut Cluster) {
    cluster.change(|manifests| {
        let [mut full, _] = service("full", "10.96.0.94", &[]);
        let spec = full["spec"].as_object_mut().unwrap();
        spec.extend(
            json!({
                "type": "LoadBalancer", "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
                "healthCheckNodePort": 32_101, "externalIPs": ["192.0.2.1", "2001:db8::1"],
                "loadBalancerSourceRanges": ["198.51.100.0/24"], "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 600 } },
            })
            .as_object()
            .unwrap()
            .clone(),
        );
        full["status"] = json!({ "loadBalancer": { "ingress": [
            { "ip": "192.0.2.2", "ipMode": "VIP" }, { "ip": "192.0.2.3", "ipMode": "Proxy" }, { "hostname": "a" },
        ] } });
        let external = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "external", "namespace": "default" },
            "spec": { "type": "ExternalName", "externalName": "example.org" },
        });
        let slice = |name: &str, rest: serde_json::Value| {
            let mut slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {
                    "name": name, "namespace": "default", "labels": { "kubernetes.io/service-name": "full" },
                    "annotations": { "endpoints.kubernetes.io/last-change-trigger-time": "2024-01-01T00:00:00Z" },
                },
            });
            slice.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
            slice
        };
        let endpoints = json!([
            { "addresses": ["192.0.2.9"] },
            { "addresses": ["192.0.2.10"], "conditions": {} },
            { "addresses": ["192.0.2.11"], "conditions": { "ready": false, "serving": true, "terminating": true },
              "nodeName": "node-a", "zone": "z1",
              "hints": { "forZones": [{ "name": "z1" }], "forNodes": [{ "name": "node-a" }] } },
        ]);
        let ports = json!([{ "name": "", "port": 80 }, { "name": "all", "protocol": "UDP" }]);
        for object in [
            full,
            external,
            slice("full", json!({ "endpoints": endpoints, "ports": ports })),
            slice("none", json!({ "endpoints": [] })),
        ] {
            manifests.put(object);
        }
    });
}

#[test]
fn an_object_says_the_same_as_protobuf_and_as_json() {
    let mut cluster = Cluster::with_control_plane();
    say_much(&mut cluster);
    let [services, others] = both(&mut cluster, "/api/v1/services", decode::service);
    assert_eq!(services, others);
    assert!(services.iter().any(|service| service.affinity_seconds == 600 && service.created > 0), "{services:?}");
    assert!(services.iter().all(|service| service.faults.is_empty()), "{services:?}");
    let [slices, others] = both(&mut cluster, "/apis/discovery.k8s.io/v1/endpointslices", decode::slice);
    assert_eq!(slices, others);
    assert!(slices.iter().flatten().any(|slice| slice.triggered.is_some()), "{slices:?}");
    let [nodes, others] = both(&mut cluster, "/api/v1/nodes", decode::node);
    assert_eq!((nodes.len(), &nodes), (NODES.len(), &others));
    let [cidrs, others] = both(&mut cluster, "/apis/networking.k8s.io/v1/servicecidrs", decode::service_cidr);
    assert_eq!((cidrs.len(), &cidrs), (1, &others));
}

/// The events of a watch of Services that the server ends after a few seconds, read as protobuf and as JSON. Towards its end
/// there is a bookmark.
fn watched(cluster: &mut Cluster, version: &str) -> [Vec<Event<wire::Service>>; 2] {
    let path = format!("/api/v1/services?watch=1&timeoutSeconds=4&allowWatchBookmarks=true&resourceVersion={version}");
    let (control_plane, lab) = cluster.control_plane();
    [(ACCEPT, Encoding::Protobuf), (JSON, Encoding::Json)].map(|(accept, encoding)| {
        let (kind, body) = control_plane.get(lab, &path, accept).unwrap();
        assert_eq!(kind.contains("protobuf"), encoding == Encoding::Protobuf, "{kind}");
        let mut frames = Frames::new(encoding);
        frames.push(&body);
        std::iter::from_fn(|| frames.next_frame().unwrap()).map(|frame| encoding.event(&frame).unwrap()).collect()
    })
}

#[test]
fn a_watch_says_the_same_as_protobuf_and_as_json() {
    let mut cluster = Cluster::with_control_plane();
    say_much(&mut cluster);
    let [events, others] = watched(&mut cluster, "0").map(|events| {
        let (mut kept, mut is_marked) = (Vec::new(), false);
        for event in events {
            match event {
                Event::Put(object) => kept.push(decode::service(&object)),
                Event::Bookmark(object) => is_marked |= object.metadata.unwrap().resource_version.is_some(),
                other => panic!("{other:?}"),
            }
        }
        kept.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        (kept, is_marked)
    });
    assert_eq!(events, others);
    assert!(events.0.len() > 1 && events.1, "{events:?}");
}

#[test]
fn a_version_that_the_api_server_has_forgotten_is_told_as_protobuf_and_as_json() {
    let mut cluster = Cluster::with_control_plane();
    // It begins anew with what is there, and knows nothing of what was before.
    let (control_plane, lab) = cluster.control_plane();
    control_plane.kill_api_server();
    control_plane.start_api_server(lab).unwrap();
    for events in watched(&mut cluster, "1") {
        assert!(matches!(events[..], [Event::Error(Status { code: Some(410), .. })]), "{events:?}");
    }
}
