//! What the agent says of itself: read by health and metrics, written by the sources and the reconciler.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// A reconciliation that went through.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sync {
    pub took: Duration,
    pub operations: usize,
    pub services: usize,
    pub frontends: usize,
    pub backends: usize,
}

#[derive(Debug)]
pub struct Status {
    node_eligible: AtomicBool,
    connected: AtomicBool,
    failures: AtomicU64,
    progress: Mutex<Progress>,
}

/// What the reconciliations so far came to.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Progress {
    /// None until the first full sync is in the kernel.
    pub last: Option<(SystemTime, Sync)>,
    pub count: u64,
    pub operations: u64,
    /// Upper bounds as in [`BUCKETS`], cumulative.
    pub buckets: [u64; BUCKETS.len()],
    pub total: Duration,
    /// Since when the kernel has refused changes; none while it takes them.
    pub failing_since: Option<SystemTime>,
}

/// Upper bounds of the sync durations' histogram, in seconds.
pub const BUCKETS: [f64; 12] = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

impl Default for Status {
    fn default() -> Self {
        Status {
            node_eligible: AtomicBool::new(true),
            connected: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            progress: Mutex::default(),
        }
    }
}

impl Status {
    pub fn synced(&self, sync: Sync) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.last = Some((SystemTime::now(), sync));
        progress.count += 1;
        progress.operations += sync.operations as u64;
        progress.total += sync.took;
        progress.failing_since = None;
        for (bucket, bound) in progress.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(sync.took.as_secs_f64() <= bound);
        }
    }

    pub fn sync_failed(&self) {
        self.failures.fetch_add(1, Relaxed);
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.failing_since.get_or_insert_with(SystemTime::now);
    }

    pub fn progress(&self) -> Progress {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
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
