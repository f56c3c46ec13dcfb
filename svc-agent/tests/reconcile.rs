//! The reconciler's own thread, and the source that every agent has.
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use svc_agent::cidrs::PodDetector;
use svc_agent::dataplane::fake::Fake;
use svc_agent::desired::Limits;
use svc_agent::object::{Condition, Endpoint, Node, ObjectName, Slice};
use svc_agent::plan::NodePortAddresses;
use svc_agent::reconcile::{Config, Outlets, Pace, Reconciler};
use svc_agent::source::{Event, Interfaces, addresses, manifests};
use svc_agent::stale_sockets::Departures;
use svc_agent::status::Status;
use svc_common::Addr;
use svc_common::map::{CONFIG_DETECT_PODS_V4, CONFIG_DETECT_PODS_V6};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

type Shared = Arc<Mutex<Fake>>;

fn config(pace: Pace) -> Config {
    Config {
        node_name: "a".to_owned(),
        nodeport_addresses: NodePortAddresses::All,
        pods: PodDetector::None,
        masquerade_all: false,
        external_ips: true,
        take_over: false,
        limits: Limits { services: 10, backends: 10, source_ranges: 100, frontends: 100, addresses: 100 },
        pace,
    }
}

fn of_addresses(texts: &[&str]) -> Event {
    let addresses = texts.iter().map(|text| text.parse().unwrap()).collect();
    Event::Interfaces(Interfaces { addresses, ..Interfaces::default() })
}

/// Every source has spoken.
async fn tell_everything(events: &mpsc::Sender<Event>, addresses: &[&str]) {
    for event in [
        Event::Services(vec![]),
        Event::Slices(vec![]),
        Event::Node(None),
        Event::ServiceCidrs(vec![]),
        of_addresses(addresses),
    ] {
        events.send(event).await.unwrap();
    }
}

async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(5), "waited for {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_refused_write_is_tried_again_without_a_new_event_and_the_thread_ends_with_its_sources() {
    let kernel = Shared::default();
    kernel.lock().unwrap().read_faults = 2;
    kernel.lock().unwrap().faults = vec![1, 0];
    let status = Arc::new(Status::default());
    let reconciler = Reconciler::new(config(Pace::default()), Arc::clone(&kernel), Arc::clone(&status));
    let (events, inbox) = mpsc::channel(4);
    let runtime = Handle::current();
    let thread = std::thread::spawn(move || reconciler.run(&runtime, inbox));
    tell_everything(&events, &["192.0.2.1", "192.0.2.2", "192.0.2.3"]).await;
    wait_for("the addresses in the kernel", || kernel.lock().unwrap().state.addresses.len() == 3).await;
    wait_for("the sync to be known", || status.progress().last.is_some()).await;
    assert_eq!(status.failures(), 4);

    drop(events);
    wait_for("the thread's end", || thread.is_finished()).await;
    thread.join().unwrap();
}

#[tokio::test]
async fn the_nodes_addresses_are_sent_at_once() {
    let (events, mut inbox) = mpsc::channel(4);
    tokio::spawn(addresses::run(events, "lo"));
    let event = timeout(Duration::from_secs(5), inbox.recv()).await.expect("no list came");
    assert!(matches!(event, Some(Event::Interfaces(_))), "{event:?}");
}

#[tokio::test]
async fn what_somebody_else_changes_is_back_after_a_sync_period() {
    let kernel = Shared::default();
    let status = Arc::new(Status::default());
    let pace = Pace { sync_period: Duration::from_millis(50), ..Pace::default() };
    let reconciler = Reconciler::new(config(pace), Arc::clone(&kernel), Arc::clone(&status));
    let (events, inbox) = mpsc::channel(4);
    let runtime = Handle::current();
    std::thread::spawn(move || reconciler.run(&runtime, inbox));
    tell_everything(&events, &["192.0.2.1", "192.0.2.2"]).await;
    wait_for("the first sync", || status.progress().last.is_some()).await;
    let right = kernel.lock().unwrap().state.clone();
    {
        let mut kernel = kernel.lock().unwrap();
        kernel.state.addresses.clear();
        kernel.state.config.flow_seed = 7;
    }
    wait_for("the repair", || kernel.lock().unwrap().state == right).await;
    wait_for("the count", || status.repairs().repaired.len() == 2).await;
    assert_eq!(status.repairs().repaired, [("addresses", 2), ("config", 1)].into());

    let written = kernel.lock().unwrap().log.len();
    let looks = status.repairs().resyncs.count;
    wait_for("more looks", || status.repairs().resyncs.count > looks + 2).await;
    assert_eq!(kernel.lock().unwrap().log.len(), written);
}

#[tokio::test]
async fn changes_within_a_minimal_sync_period_go_together_and_the_first_does_not_wait() {
    let kernel = Shared::default();
    let status = Arc::new(Status::default());
    let min = Duration::from_millis(500);
    let reconciler = Reconciler::new(
        config(Pace { min_sync_period: min, ..Pace::default() }),
        Arc::clone(&kernel),
        Arc::clone(&status),
    );
    let (events, inbox) = mpsc::channel(4);
    let runtime = Handle::current();
    std::thread::spawn(move || reconciler.run(&runtime, inbox));
    let begin = Instant::now();
    tell_everything(&events, &["192.0.2.1"]).await;
    wait_for("the first sync", || status.progress().syncs.count == 1).await;
    assert!(begin.elapsed() < min / 2, "the first change waited {:?}", begin.elapsed());
    for last in 2..10 {
        events.send(of_addresses(&[&format!("192.0.2.{last}")])).await.unwrap();
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(status.progress().syncs.count, 1);
    wait_for("the second sync", || status.progress().syncs.count == 2).await;
    assert!(begin.elapsed() >= min, "the second write came after {:?}", begin.elapsed());
    let expected = Addr::from("192.0.2.9".parse::<IpAddr>().unwrap());
    assert_eq!(kernel.lock().unwrap().state.addresses.keys().copied().collect::<Vec<_>>(), [expected]);
}

#[test]
fn a_change_of_endpoints_is_timed_from_its_cause_and_the_nodes_eligibility_is_what_was_last_known() {
    let status = Arc::new(Status::default());
    let mut reconciler = Reconciler::new(config(Pace::default()), Shared::default(), Arc::clone(&status));
    status.set_node_eligible(false);
    let slice = |seconds_ago: u64, name: &str, address: &str| Slice {
        name: ObjectName::new("default", name),
        triggered: SystemTime::now().checked_sub(Duration::from_secs(seconds_ago)),
        service: "web".into(),
        ports: vec![],
        endpoints: vec![Endpoint {
            address: address.parse().unwrap(),
            node: None,
            condition: Condition::READY,
            hints: None,
        }],
        faults: vec![],
    };
    for event in [
        Event::Services(vec![]),
        // Before the agent was there.
        Event::Slices(vec![slice(60, "old", "10.1.0.1")]),
        Event::Node(None),
        Event::ServiceCidrs(vec![]),
        Event::Interfaces(Interfaces::default()),
    ] {
        reconciler.take(event);
    }
    reconciler.reconcile().unwrap();
    assert!(!status.node_eligible(), "no Node was seen");
    reconciler.take(Event::PutSlice(slice(0, "new", "fd00::1")));
    // Says nothing new.
    reconciler.take(Event::PutSlice(slice(0, "new", "fd00::1")));
    reconciler.take(Event::Node(Some(Node { eligible: true, ..Node::default() })));
    reconciler.take(Event::Node(None));
    assert_eq!((status.input().slices, status.input().slices_pending), (3, 2));
    reconciler.reconcile().unwrap();
    let input = status.input();
    assert_eq!([input.programming[0].count, input.programming[1].count], [0, 1]);
    assert_eq!((input.slices, input.slices_pending), (3, 0));
    assert!(status.node_eligible(), "it is what it was last");
}

#[test]
fn pods_ranges_follow_the_node_and_count_for_their_own_family() {
    let config = Config { pods: PodDetector::NodeCidr, ..config(Pace::default()) };
    let mut reconciler = Reconciler::new(config, Fake::default(), Arc::new(Status::default()));
    for event in [
        Event::Services(vec![]),
        Event::Slices(vec![]),
        Event::Node(None),
        Event::ServiceCidrs(vec![]),
        Event::Interfaces(Interfaces::default()),
    ] {
        reconciler.take(event);
    }
    for (ranges, flags) in [
        (&[][..], 0),
        (&["10.244.1.0/24"], CONFIG_DETECT_PODS_V4),
        (&["10.244.7.0/24", "fd00:1::/64"], CONFIG_DETECT_PODS_V4 | CONFIG_DETECT_PODS_V6),
        (&["fd00:1::/64"], CONFIG_DETECT_PODS_V6),
    ] {
        let pod_cidrs = ranges.iter().map(|range| range.parse().unwrap()).collect();
        reconciler.take(Event::Node(Some(Node { pod_cidrs, ..Node::default() })));
        reconciler.reconcile().unwrap();
        let kernel = &reconciler.dataplane().state;
        assert_eq!(kernel.config.flags, flags, "{ranges:?}");
        let known: Vec<String> = kernel.cidrs.keys().map(|key| IpAddr::from(key.addr).to_string()).collect();
        let wanted: Vec<&str> = ranges.iter().map(|range| range.split('/').next().unwrap()).collect();
        assert_eq!(known.len(), wanted.len(), "{known:?}");
        assert!(wanted.iter().all(|wanted| known.iter().any(|known| known == wanted)), "{known:?} for {ranges:?}");
    }
}

/// A Service of one port, whose endpoints are these.
fn slices(protocol: &str, endpoints: &[&str]) -> Event {
    let slice = format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, \
          metadata: {{name: s, namespace: default, labels: {{kubernetes.io/service-name: s}}}}, \
          ports: [{{port: 53, protocol: {protocol}}}], endpoints: [{}]}}",
        endpoints.iter().map(|address| format!("{{addresses: [{address}]}}")).collect::<Vec<_>>().join(", ")
    );
    Event::Slices(manifests::parse(&slice).unwrap().0.slices)
}

fn services(protocol: &str) -> Event {
    let service = format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: s, namespace: default}}, \
          spec: {{clusterIP: 10.96.0.10, ports: [{{port: 53, protocol: {protocol}}}]}}}}"
    );
    Event::Services(manifests::parse(&service).unwrap().0.services)
}

/// A reconciler that has synced once with two endpoints, and what it tells of departures.
fn synced(protocol: &str) -> (Reconciler<Shared>, Shared, std::sync::mpsc::Receiver<()>) {
    let kernel = Shared::default();
    let (departures, told) = Departures::channel();
    let mut reconciler = Reconciler::new(config(Pace::default()), Arc::clone(&kernel), Arc::default())
        .with_outlets(Outlets { departures, ..Outlets::default() });
    let both = slices(protocol, &["10.244.1.2", "10.244.1.3"]);
    for event in [
        services(protocol),
        both,
        Event::Node(None),
        Event::ServiceCidrs(vec![]),
        Event::Interfaces(Interfaces::default()),
    ] {
        assert!(told.try_recv().is_err(), "before the kernel has it");
        reconciler.take(event);
        reconciler.reconcile().unwrap();
    }
    assert!(told.try_recv().is_ok(), "backends may have left while no agent ran");
    (reconciler, kernel, told)
}

#[test]
fn that_a_udp_backend_left_is_told_once_the_kernel_has_it() {
    let (mut reconciler, kernel, told) = synced("UDP");
    reconciler.take(slices("UDP", &["10.244.1.3", "10.244.1.4"]));
    kernel.lock().unwrap().faults = vec![0];
    reconciler.reconcile().unwrap_err();
    assert!(told.try_recv().is_err());
    reconciler.reconcile().unwrap();
    assert!(told.try_recv().is_ok());
    reconciler.take(slices("UDP", &["10.244.1.3", "10.244.1.4", "10.244.1.5"]));
    reconciler.reconcile().unwrap();
    assert!(told.try_recv().is_err(), "one has only come");
    reconciler.take(Event::Services(vec![]));
    reconciler.reconcile().unwrap();
    assert!(told.try_recv().is_ok(), "they have left with their Service");
}

#[test]
fn that_a_tcp_backend_left_is_not_told() {
    let (mut reconciler, _, told) = synced("TCP");
    reconciler.take(slices("TCP", &["10.244.1.3"]));
    assert!(reconciler.reconcile().unwrap() > 0);
    assert!(told.try_recv().is_err());
}
