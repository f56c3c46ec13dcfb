//! What the agent says of itself: read by health and metrics, written by the sources and the reconciler.
use std::collections::BTreeMap;
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

/// A look at whether somebody else has changed what is in the kernel.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Resync {
    pub took: Duration,
    /// Entries by the name of their map; those of a map without any are left out.
    pub repaired: BTreeMap<&'static str, usize>,
}

#[derive(Debug)]
pub struct Status {
    node_eligible: AtomicBool,
    connected: AtomicBool,
    failures: AtomicU64,
    progress: Mutex<Progress>,
    repairs: Mutex<Repairs>,
}

/// What the looks at the kernel so far came to.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Repairs {
    pub resyncs: Histogram,
    /// Entries by the name of their map, and `links`.
    pub repaired: BTreeMap<&'static str, u64>,
}

/// How long things took.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Histogram {
    pub count: u64,
    /// Upper bounds as in [`BUCKETS`], cumulative.
    pub buckets: [u64; BUCKETS.len()],
    pub total: Duration,
}

impl Histogram {
    fn observe(&mut self, took: Duration) {
        self.count += 1;
        self.total += took;
        for (bucket, bound) in self.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(took.as_secs_f64() <= bound);
        }
    }
}

/// What the reconciliations so far came to.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Progress {
    /// None until the first full sync is in the kernel.
    pub last: Option<(SystemTime, Sync)>,
    pub syncs: Histogram,
    pub operations: u64,
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
            repairs: Mutex::default(),
        }
    }
}

impl Status {
    pub fn synced(&self, sync: Sync) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.last = Some((SystemTime::now(), sync));
        progress.syncs.observe(sync.took);
        progress.operations += sync.operations as u64;
        progress.failing_since = None;
    }

    /// The kernel has what it should have, since a look at all of it said so.
    pub fn resynced(&self, resync: &Resync) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((time, _)) = &mut progress.last {
            *time = SystemTime::now();
        }
        drop(progress);
        let mut repairs = self.repairs.lock().unwrap_or_else(PoisonError::into_inner);
        repairs.resyncs.observe(resync.took);
        for (map, entries) in &resync.repaired {
            *repairs.repaired.entry(map).or_default() += *entries as u64;
        }
    }

    /// So many programs were attached again.
    pub fn links_repaired(&self, count: usize) {
        let mut repairs = self.repairs.lock().unwrap_or_else(PoisonError::into_inner);
        *repairs.repaired.entry("links").or_default() += count as u64;
    }

    pub fn repairs(&self) -> Repairs {
        self.repairs.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
