//! What the agent says of itself: read by health and metrics, written by the sources and the reconciler.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::histogram::Histogram;
use crate::object::Family;

/// A reconciliation that went through.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Sync {
    pub took: Duration,
    pub operations: usize,
    pub services: usize,
    pub frontends: usize,
    pub backends: usize,
    pub without_local: WithoutLocal,
    /// How many entries each map has that the agent writes, by its name.
    pub entries: [(&'static str, usize); 8],
}

/// Service ports of policy Local that have endpoints, but none on this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WithoutLocal {
    /// internalTrafficPolicy, IPv4 first.
    pub internal: [usize; 2],
    /// externalTrafficPolicy, IPv4 first.
    pub external: [usize; 2],
}

/// A look at whether somebody else has changed what is in the kernel.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Resync {
    pub took: Duration,
    /// Entries by the name of their map; those of a map without any are left out.
    pub repaired: BTreeMap<&'static str, usize>,
}

#[derive(Debug)]
pub struct Status {
    health_timeout: Duration,
    node_eligible: AtomicBool,
    connected: AtomicBool,
    failures: AtomicU64,
    sockets_terminated: AtomicU64,
    progress: Mutex<Progress>,
    repairs: Mutex<Repairs>,
    input: Mutex<Input>,
    asked: Mutex<Asked>,
    requests: Mutex<Requests>,
}

/// What the reconciliations so far came to.
#[derive(Clone, PartialEq, Debug)]
pub struct Progress {
    /// None until the first full sync is in the kernel.
    pub last: Option<(SystemTime, Sync)>,
    pub syncs: Histogram,
    pub operations: u64,
    /// Since when the kernel has refused changes; none while it takes them.
    pub failing_since: Option<SystemTime>,
}

/// What the looks at the kernel so far came to.
#[derive(Clone, PartialEq, Debug)]
pub struct Repairs {
    pub resyncs: Histogram,
    /// Entries by the name of their map, and `links`.
    pub repaired: BTreeMap<&'static str, u64>,
}

/// What the sources have said, and what of it is not in force yet.
#[derive(Clone, PartialEq, Debug)]
pub struct Input {
    pub services: u64,
    pub services_pending: u64,
    pub slices: u64,
    pub slices_pending: u64,
    pub last: Option<SystemTime>,
    /// Since when the oldest change waits that is not in force; none while all are.
    pub waiting_since: Option<SystemTime>,
    /// When a watch last told of an object, by kind.
    pub events: BTreeMap<&'static str, SystemTime>,
    /// From an endpoint's change in the cluster to its being in force here, IPv4 first.
    pub programming: [Histogram; 2],
}

/// Answers to questions about health, by HTTP status.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Asked {
    pub healthz: BTreeMap<u16, u64>,
    pub livez: BTreeMap<u16, u64>,
}

/// Requests to the API servers.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Requests {
    /// By method, host and HTTP status, which is `<error>` where there was no answer.
    pub count: BTreeMap<(String, String, String), u64>,
    /// Until the answer's beginning, by method and host.
    pub durations: BTreeMap<(String, String), Histogram>,
}

/// Of the default sync period.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(60);

/// Upper bounds of the histograms of syncs, in seconds.
const SYNCS: [f64; 12] = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];
/// Of client-go's histogram of requests.
const REQUESTS: [f64; 12] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];

/// Of kube-proxy's histogram of network programming: 0.25 and 0.5 s, each second to 59, each 5 s to 115, each 30 s to 300.
fn programming() -> Histogram {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    Histogram::new([0.25, 0.5].into_iter().chain(seconds.map(f64::from)))
}

impl Default for Status {
    fn default() -> Self {
        Status {
            health_timeout: HEALTH_TIMEOUT,
            node_eligible: AtomicBool::new(true),
            connected: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            progress: Mutex::new(Progress {
                last: None,
                syncs: Histogram::new(SYNCS),
                operations: 0,
                failing_since: None,
            }),
            repairs: Mutex::new(Repairs { resyncs: Histogram::new(SYNCS), repaired: BTreeMap::new() }),
            input: Mutex::new(Input {
                services: 0,
                services_pending: 0,
                slices: 0,
                slices_pending: 0,
                last: None,
                waiting_since: None,
                events: BTreeMap::new(),
                programming: [programming(), programming()],
            }),
            asked: Mutex::default(),
            requests: Mutex::default(),
            sockets_terminated: AtomicU64::new(0),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Status {
    /// The kernel may refuse changes for two sync periods before that is ill health (kube-proxy's healthTimeout).
    pub fn new(sync_period: Duration) -> Self {
        Status { health_timeout: sync_period * 2, ..Status::default() }
    }

    pub fn health_timeout(&self) -> Duration {
        self.health_timeout
    }

    /// All that was queued is in force.
    pub fn synced(&self, sync: Sync) {
        let mut progress = lock(&self.progress);
        progress.last = Some((SystemTime::now(), sync));
        progress.syncs.observe(sync.took);
        progress.operations += sync.operations as u64;
        progress.failing_since = None;
        drop(progress);
        let mut input = lock(&self.input);
        (input.services_pending, input.slices_pending) = (0, 0);
        input.waiting_since = None;
    }

    pub fn sync_failed(&self) {
        self.failures.fetch_add(1, Relaxed);
        lock(&self.progress).failing_since.get_or_insert_with(SystemTime::now);
    }

    /// The kernel has what it should have, since a look at all of it said so.
    pub fn resynced(&self, resync: &Resync) {
        if let Some((time, _)) = &mut lock(&self.progress).last {
            *time = SystemTime::now();
        }
        let mut repairs = lock(&self.repairs);
        repairs.resyncs.observe(resync.took);
        for (map, entries) in &resync.repaired {
            *repairs.repaired.entry(map).or_default() += *entries as u64;
        }
    }

    /// So many programs were attached again.
    pub fn links_repaired(&self, count: usize) {
        *lock(&self.repairs).repaired.entry("links").or_default() += count as u64;
    }

    /// A source has told of so many Services and EndpointSlices.
    pub fn queued(&self, services: usize, slices: usize) {
        let mut input = lock(&self.input);
        input.services += services as u64;
        input.services_pending += services as u64;
        input.slices += slices as u64;
        input.slices_pending += slices as u64;
        let now = SystemTime::now();
        input.last = Some(now);
        input.waiting_since.get_or_insert(now);
    }

    /// A watch has told of an object of this kind.
    pub fn heard(&self, kind: &'static str) {
        lock(&self.input).events.insert(kind, SystemTime::now());
    }

    /// An endpoint's change is in force, so long after it happened.
    pub fn programmed(&self, family: Family, latency: Duration) {
        lock(&self.input).programming[usize::from(family == Family::V6)].observe(latency);
    }

    /// Somebody asked for the health of the node or, `live`, of the agent alone.
    pub fn asked(&self, live: bool, code: u16) {
        let mut asked = lock(&self.asked);
        let answers = if live { &mut asked.livez } else { &mut asked.healthz };
        *answers.entry(code).or_default() += 1;
    }

    /// An API server was asked for something; no code: it did not answer.
    pub fn requested(&self, method: &str, host: &str, code: Option<u16>, took: Duration) {
        let (method, host) = (method.to_owned(), host.to_owned());
        let code = code.map_or_else(|| "<error>".to_owned(), |code| code.to_string());
        let mut requests = lock(&self.requests);
        *requests.count.entry((method.clone(), host.clone(), code)).or_default() += 1;
        requests.durations.entry((method, host)).or_insert_with(|| Histogram::new(REQUESTS)).observe(took);
    }

    pub fn progress(&self) -> Progress {
        lock(&self.progress).clone()
    }

    pub fn repairs(&self) -> Repairs {
        lock(&self.repairs).clone()
    }

    pub fn input(&self) -> Input {
        lock(&self.input).clone()
    }

    pub fn answers(&self) -> Asked {
        lock(&self.asked).clone()
    }

    pub fn requests(&self) -> Requests {
        lock(&self.requests).clone()
    }

    pub fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    /// That many more UDP sockets were terminated.
    pub fn sockets_terminated(&self, more: u64) {
        self.sockets_terminated.fetch_add(more, Relaxed);
    }

    pub fn all_sockets_terminated(&self) -> u64 {
        self.sockets_terminated.load(Relaxed)
    }

    /// Whether the source of objects can be reached.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Relaxed);
    }

    pub fn connected(&self) -> bool {
        self.connected.load(Relaxed)
    }

    /// Whether load balancers may send traffic to this node.
    pub fn set_node_eligible(&self, eligible: bool) {
        self.node_eligible.store(eligible, Relaxed);
    }

    pub fn node_eligible(&self) -> bool {
        self.node_eligible.load(Relaxed)
    }
}
