//! The reconciler's own thread, and the source that every agent has.
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use svc_agent::cidrs::PodDetector;
use svc_agent::dataplane::fake::Fake;
use svc_agent::desired::Limits;
use svc_agent::plan::NodePortAddresses;
use svc_agent::reconcile::{Config, Pace, Reconciler};
use svc_agent::source::{Event, Interfaces, addresses};
use svc_agent::status::Status;
use svc_common::Addr;
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
    let expected = Addr::from("192.0.2.9".parse::<std::net::IpAddr>().unwrap());
    assert_eq!(kernel.lock().unwrap().state.addresses.keys().copied().collect::<Vec<_>>(), [expected]);
}
