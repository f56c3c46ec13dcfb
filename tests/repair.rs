//! What somebody else breaks in the kernel, and what changes on the node, between hosts that are network namespaces.
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rstest::rstest;
use svc_agent::dataplane::State;
use svc_agent::host::monotonic_nanoseconds;
use svc_agent::inspect::Pins;
use svc_agent::inspect::map::Link;
use svc_agent::sys::{self, Plain};
use svc_common::Addr;
use svc_common::map::{
    ADDRESS_NODE, AddressFlags, Backend, BackendSlot, CidrKey, Config, Frontend, FrontendKey, HopLease, ServiceName,
    SourceRangeKey, Uplink, pin,
};
use svc_lab::client::Options;
use svc_lab::topology::{CLIENT, NODES, OUTSIDE};
use svc_tests::cluster::{CLUSTER_IP, Cluster, all_backends, eventually, http_get_path, service};

const NODE_PORT: &str = "http://172.31.0.11:30080/";

/// Its agents look after the kernel's maps twice a second; one of its Services has source ranges.
fn cluster() -> Cluster {
    let mut cluster = Cluster::with_arguments(&["--sync-period", "500ms"]);
    let [mut edge, slice] = service("edge", "10.96.0.90", &["a1", "b2"]);
    edge["spec"]["type"] = "LoadBalancer".into();
    edge["spec"]["loadBalancerSourceRanges"] = ["172.31.0.0/24", "198.51.100.0/24"][..].into();
    edge["status"]["loadBalancer"]["ingress"] = serde_json::json!([{ "ip": "192.0.2.90" }]);
    cluster.change(|manifests| [edge, slice].into_iter().for_each(|object| manifests.put(object)));
    eventually("source ranges in the kernel", || (!state(&cluster).source_ranges.is_empty()).then_some(()));
    cluster
}

fn pins(cluster: &Cluster, kind: &str) -> PathBuf {
    cluster.lab.bpffs(NODES[0].name).join(kind)
}

fn state(cluster: &Cluster) -> State {
    Pins::open(&cluster.lab.bpffs(NODES[0].name)).unwrap().state().unwrap()
}

fn map(cluster: &Cluster, name: &str) -> OwnedFd {
    sys::open_pin(&pins(cluster, "maps").join(name)).unwrap()
}

fn empty_hash<K: Plain, V: Plain>(cluster: &Cluster, name: &str) {
    let map = map(cluster, name);
    let entries = sys::batch_entries::<K, V>(map.as_fd(), 1024, |_| true).unwrap();
    assert!(!entries.is_empty(), "{name} was empty in the first place");
    entries.iter().for_each(|(key, _)| sys::delete(map.as_fd(), key).unwrap());
}

fn empty_trie<K: Plain>(cluster: &Cluster, name: &str) {
    let map = map(cluster, name);
    let entries = sys::entries::<K, u32>(map.as_fd()).unwrap();
    assert!(!entries.is_empty(), "{name} was empty in the first place");
    entries.iter().for_each(|(key, _)| sys::delete(map.as_fd(), key).unwrap());
}

fn forget_frontends(cluster: &Cluster) {
    empty_hash::<FrontendKey, Frontend>(cluster, pin::FRONTENDS);
}

fn add_a_frontend(cluster: &Cluster) {
    let key = FrontendKey::new(Addr::v4(7), 7, 6);
    let frontend = Frontend { service: 1, flags: 0, affinity_seconds: 0 };
    sys::update(map(cluster, pin::FRONTENDS).as_fd(), &key, &frontend).unwrap();
}

fn empty_the_sets(cluster: &Cluster) {
    let empty = sys::create_inner_array(&[BackendSlot::header(0)]).unwrap();
    for id in state(cluster).sets.keys() {
        sys::update(map(cluster, pin::BACKEND_SETS).as_fd(), id, &(empty.as_raw_fd() as u32)).unwrap();
    }
}

fn remove_the_sets(cluster: &Cluster) {
    for id in state(cluster).sets.keys() {
        sys::delete(map(cluster, pin::BACKEND_SETS).as_fd(), id).unwrap();
    }
}

fn kill_the_backends(cluster: &Cluster) {
    for id in state(cluster).backends.keys() {
        sys::update(map(cluster, pin::BACKENDS).as_fd(), id, &Backend::default()).unwrap();
    }
}

fn forget_addresses(cluster: &Cluster) {
    empty_hash::<Addr, AddressFlags>(cluster, pin::ADDRESSES);
}

fn claim_an_address(cluster: &Cluster) {
    sys::update(map(cluster, pin::ADDRESSES).as_fd(), &Addr::v4(7), &ADDRESS_NODE).unwrap();
}

fn forget_source_ranges(cluster: &Cluster) {
    empty_trie::<SourceRangeKey>(cluster, pin::SOURCE_RANGES);
}

fn forget_cidrs(cluster: &Cluster) {
    empty_trie::<CidrKey>(cluster, pin::CIDRS);
}

fn forget_names(cluster: &Cluster) {
    empty_hash::<u32, ServiceName>(cluster, pin::SERVICES);
}

fn forget_uplinks(cluster: &Cluster) {
    empty_hash::<u32, Uplink>(cluster, pin::UPLINKS);
}

fn change_the_configuration(cluster: &Cluster) {
    let map = map(cluster, pin::CONFIG);
    let config: Config = sys::lookup(map.as_fd(), &0u32).unwrap();
    let other = Config { flags: !config.flags, snat_first: 5, uplink: 0, flow_seed: 7, ..config };
    sys::update(map.as_fd(), &0u32, &other).unwrap();
}

#[rstest]
#[case::frontends(forget_frontends, "frontends")]
#[case::foreign_frontends(add_a_frontend, "frontends")]
#[case::sets(empty_the_sets, "backend_sets")]
#[case::missing_sets(remove_the_sets, "backend_sets")]
#[case::backends(kill_the_backends, "backends")]
#[case::addresses(forget_addresses, "addresses")]
#[case::foreign_addresses(claim_an_address, "addresses")]
#[case::source_ranges(forget_source_ranges, "source_ranges")]
#[case::cidrs(forget_cidrs, "cidrs")]
#[case::names(forget_names, "services")]
#[case::uplinks(forget_uplinks, "uplinks")]
#[case::configuration(change_the_configuration, "config")]
fn what_somebody_changes_in_a_map_is_put_right_and_counted(#[case] damage: fn(&Cluster), #[case] map: &str) {
    let cluster = cluster();
    let right = state(&cluster);
    damage(&cluster);
    eventually("the map is as it was", || (state(&cluster) == right).then_some(()));
    let counted = format!("svc_repairs_total{{map=\"{map}\"}} ");
    eventually("the repair is counted", || {
        let metrics = http_get_path(&cluster.lab, NODES[0].name, "127.0.0.1:10249", "/metrics")?;
        metrics.contains(&counted).then_some(())
    });
    cluster.expect_balanced(OUTSIDE, &Options::to(NODE_PORT), &all_backends());
    cluster.expect_balanced(CLIENT, &Options::to(CLUSTER_IP), &all_backends());
}

fn detach(link: &Path) {
    sys::link_detach(sys::open_pin(link).unwrap().as_fd()).unwrap();
}

fn unpin(link: &Path) {
    std::fs::remove_file(link).unwrap();
}

fn links(cluster: &Cluster) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(pins(cluster, "links")).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn all_attached(links: &[PathBuf]) -> Option<()> {
    links.iter().all(|path| Link::open(path).is_ok_and(|link| link.attached)).then_some(())
}

#[rstest]
#[case::detached(detach)]
#[case::unpinned(unpin)]
fn a_program_that_somebody_detaches_is_attached_again(#[case] damage: fn(&Path)) {
    let cluster = cluster();
    let links = links(&cluster);
    // Sockets, the uplink and pods' interfaces.
    assert!(links.len() > 10, "{links:?}");
    links.iter().for_each(|path| damage(path));
    eventually("all links are there again", || all_attached(&links));
    cluster.expect_balanced(OUTSIDE, &Options::to(NODE_PORT), &all_backends());
    cluster.expect_balanced(CLIENT, &Options::to(CLUSTER_IP), &all_backends());
}

#[test]
fn looking_after_the_maps_writes_nothing_and_costs_no_request() {
    let mut cluster = Cluster::with_arguments(&["--sync-period", "1ms"]);
    let loads = [cluster.load(CLIENT, CLUSTER_IP), cluster.load(OUTSIDE, NODE_PORT)];
    for _ in 0..5 {
        cluster.change(|manifests| manifests.set_ready("b1", false));
        thread::sleep(Duration::from_millis(200));
        cluster.change(|manifests| manifests.set_ready("b1", true));
        thread::sleep(Duration::from_millis(200));
    }
    for load in loads {
        let failed: Vec<_> = load.finish().unwrap().into_iter().filter(|outcome| outcome.error.is_some()).collect();
        assert!(failed.is_empty(), "{failed:?}");
    }
    let metrics = http_get_path(&cluster.lab, NODES[0].name, "127.0.0.1:10249", "/metrics").unwrap();
    let samples: Vec<_> = metrics.lines().filter(|line| line.starts_with("svc_repairs_total{")).collect();
    assert!(samples.is_empty(), "{samples:?}");
    let looks = metrics.lines().find_map(|line| line.strip_prefix("svc_resync_duration_seconds_count "));
    assert!(looks.unwrap().parse::<u32>().unwrap() > 20, "{looks:?}");
}

#[test]
fn node_ports_and_forwarded_traffic_follow_the_nodes_address() {
    let cluster = Cluster::with_manifests();
    let node = cluster.lab.namespace("node-b").unwrap();
    node.sysctl(&[("ipv4/conf/eth0/promote_secondaries", "1")]).unwrap();
    node.ip("addr add 172.31.0.62/24 dev eth0\naddr add fd00:31::62/64 dev eth0 nodad\n").unwrap();
    let other = "http://172.31.0.62:30080/";
    // The backends of the other node see this node's address, which has to be one that it has.
    cluster.expect_soon(OUTSIDE, other, &all_backends());
    node.ip("addr del 172.31.0.12/24 dev eth0\naddr del fd00:31::12/64 dev eth0\n").unwrap();
    cluster.expect_soon(OUTSIDE, other, &all_backends());
    cluster.expect_soon(OUTSIDE, "http://[fd00:31::62]:30080/", &all_backends());
}

fn lease(cluster: &Cluster) -> HopLease {
    sys::lookup(map(cluster, pin::HOP_LEASE).as_fd(), &0u32).unwrap()
}

#[track_caller]
fn lent_anew(cluster: &Cluster, old: u32) -> u32 {
    eventually("next hops may be kept again", || {
        let lease = lease(cluster);
        (lease.generation != old && lease.until > monotonic_nanoseconds()).then_some(lease.generation)
    })
}

#[rstest]
#[case::neighbour("neigh replace 172.31.0.12 lladdr 02:00:00:00:00:77 dev eth0 nud permanent\n")]
#[case::route("route replace 10.244.2.0/24 via 172.31.0.1\n")]
#[case::address("addr add 172.31.0.62/24 dev eth0\n")]
#[case::link("link set eth0 mtu 1400\n")]
fn next_hops_that_are_kept_are_forgotten_with_each_change(#[case] change: &str) {
    let cluster = Cluster::with_manifests();
    let node = cluster.lab.namespace(NODES[0].name).unwrap();
    let old = lent_anew(&cluster, 0);
    node.ip(change).unwrap();
    lent_anew(&cluster, old);
}

#[rstest]
#[case::a_rule_of_a_mark("rule add fwmark 7 table 100\n", "rule del fwmark 7 table 100\n")]
#[case::a_rule_of_a_source("rule add from 172.31.0.0/24 table 100\n", "rule del from 172.31.0.0/24 table 100\n")]
#[case::several_next_hops(
    "route add 192.0.2.0/24 nexthop via 172.31.0.1 nexthop via 172.31.0.12\n",
    "route del 192.0.2.0/24\n"
)]
fn no_next_hop_is_kept_where_packets_to_one_address_go_several_ways(#[case] add: &str, #[case] remove: &str) {
    let mut cluster = Cluster::with_manifests();
    let node = cluster.lab.namespace(NODES[0].name).unwrap();
    let old = lent_anew(&cluster, 0);
    node.ip(add).unwrap();
    let taken_back = || {
        let lease = lease(&cluster);
        (lease.until == 0 && lease.generation != old).then_some(lease.generation)
    };
    eventually("no next hop is kept", taken_back);
    // Longer than a lease, and than it takes to read all routes again.
    thread::sleep(Duration::from_secs(4));
    assert_eq!(lease(&cluster).until, 0);
    cluster.kill_agent(&NODES[0]);
    cluster.start_agent(&NODES[0]);
    assert_eq!(lease(&cluster).until, 0);
    let old = lease(&cluster).generation;
    cluster.lab.namespace(NODES[0].name).unwrap().ip(remove).unwrap();
    lent_anew(&cluster, old);
}

#[test]
fn no_next_hop_is_kept_once_the_agent_has_ended() {
    let mut cluster = Cluster::with_manifests();
    lent_anew(&cluster, 0);
    cluster.kill_agent(&NODES[0]);
    thread::sleep(Duration::from_millis(3_100));
    assert!(lease(&cluster).until <= monotonic_nanoseconds());
}

fn epoch(cluster: &Cluster) -> u32 {
    sys::lookup(map(cluster, pin::EPOCH).as_fd(), &0u32).unwrap()
}

#[track_caller]
fn begun_anew(cluster: &Cluster, old: u32) -> u32 {
    eventually("another epoch", || Some(epoch(cluster)).filter(|epoch| *epoch > old && epoch % 2 == 0))
}

#[test]
fn what_is_no_services_is_found_out_anew_with_each_frontend_and_with_no_endpoint() {
    let mut cluster = Cluster::with_manifests();
    let url = "http://10.96.0.90/";
    let old = begun_anew(&cluster, 0);
    cluster.change(|manifests| {
        service("late", "10.96.0.90", &["a1"]).into_iter().for_each(|object| manifests.put(object));
    });
    cluster.expect_soon("node-a", url, &["a1"]);
    let old = begun_anew(&cluster, old);
    let [_, slice] = service("late", "10.96.0.90", &["a1", "b2"]);
    cluster.change(|manifests| manifests.put(slice));
    cluster.expect_soon("node-a", url, &["a1", "b2"]);
    assert_eq!(epoch(&cluster), old);
    cluster.kill_agent(&NODES[0]);
    cluster.start_agent(&NODES[0]);
    begun_anew(&cluster, old);
}

#[test]
fn an_uplink_that_is_made_anew_is_served_again() {
    let cluster = Cluster::with_manifests();
    let before = links(&cluster);
    let node = cluster.lab.namespace("node-a").unwrap();
    let lan = cluster.lab.namespace("lan").unwrap();
    lan.ip("link del node-a\n").unwrap();
    thread::sleep(Duration::from_millis(200));
    let plug =
        format!("link add node-a type veth peer name eth0 netns {}\nlink set node-a master br0 up\n", node.name());
    lan.ip(&plug).unwrap();
    node.ip("addr add 172.31.0.11/24 dev eth0\naddr add fd00:31::11/64 dev eth0 nodad\nlink set eth0 up\n\
         route add default via 172.31.0.1\nroute add 10.244.2.0/24 via 172.31.0.12\n")
        .unwrap();
    cluster.expect_soon(OUTSIDE, NODE_PORT, &all_backends());
    cluster.expect_soon("node-a", CLUSTER_IP, &all_backends());
    all_attached(&before).expect("every link is there again");
}
