//! The reconciler's own thread, and the source that every agent has.
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use svc_agent::cidrs::PodDetector;
use svc_agent::dataplane::fake::Fake;
use svc_agent::dataplane::{ApplyError, Dataplane, Op, State};
use svc_agent::desired::Limits;
use svc_agent::plan::NodePortAddresses;
use svc_agent::reconcile::{Config, Reconciler};
use svc_agent::source::{Event, addresses};
use svc_agent::status::Status;
use svc_common::map::Uplink;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// A fake that the test can look at while the reconciler has it.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Fake>>);

impl Dataplane for Shared {
    fn read(&mut self) -> Result<State, ApplyError> {
        self.0.lock().unwrap().read()
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        self.0.lock().unwrap().apply(ops)
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
    kernel.0.lock().unwrap().read_faults = 2;
    kernel.0.lock().unwrap().faults = vec![1, 0];
    let config = Config {
        node_name: "a".to_owned(),
        nodeport_addresses: NodePortAddresses::All,
        pods: PodDetector::None,
        masquerade_all: false,
        uplink: Uplink::default(),
        limits: Limits { services: 10, backends: 10, source_ranges: 100 },
    };
    let status = Arc::new(Status::default());
    let reconciler = Reconciler::new(config, kernel.clone(), Arc::clone(&status));
    let (events, inbox) = mpsc::channel(4);
    let runtime = Handle::current();
    let thread = std::thread::spawn(move || reconciler.run(&runtime, inbox));

    let addresses = ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|text| text.parse().unwrap());
    for event in [
        Event::Services(vec![]),
        Event::Slices(vec![]),
        Event::Node(None),
        Event::ServiceCidrs(vec![]),
        Event::Addresses(addresses.to_vec()),
    ] {
        events.send(event).await.unwrap();
    }
    wait_for("the addresses in the kernel", || kernel.0.lock().unwrap().state.addresses.len() == 3).await;
    wait_for("the sync to be known", || status.progress().last.is_some()).await;
    assert_eq!(status.failures(), 4);

    drop(events);
    wait_for("the thread's end", || thread.is_finished()).await;
    thread.join().unwrap();
}

#[tokio::test]
async fn the_nodes_addresses_are_sent_at_once() {
    let (events, mut inbox) = mpsc::channel(4);
    tokio::spawn(addresses::run(events));
    let event = timeout(Duration::from_secs(5), inbox.recv()).await.expect("no list came");
    assert!(matches!(event, Some(Event::Addresses(_))), "{event:?}");
}
