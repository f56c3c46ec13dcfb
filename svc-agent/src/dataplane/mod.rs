//! The kernel's maps, as the agent sees them: a state that can be read, and operations on it. `aya` is the real one.
use std::collections::BTreeMap;

use svc_common::Addr;
use svc_common::map::{AddressFlags, Backend, BackendSlot, Frontend, FrontendKey, ServiceName};

/// What is in the kernel, or should be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// By set id ([`svc_common::map::cluster_set`], [`svc_common::map::local_set`]); without the header slot.
    pub sets: BTreeMap<u32, Vec<BackendSlot>>,
    /// By backend id.
    pub backends: BTreeMap<u32, Backend>,
    pub addresses: BTreeMap<Addr, AddressFlags>,
    /// By service id.
    pub services: BTreeMap<u32, ServiceName>,
}

/// One change of one entry. Each is idempotent: putting what is there and deleting what is absent both succeed.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    PutBackend(u32, Backend),
    PutSet(u32, Vec<BackendSlot>),
    PutService(u32, ServiceName),
    PutAddress(Addr, AddressFlags),
    PutFrontend(FrontendKey, Frontend),
    DeleteFrontend(FrontendKey),
    DeleteAddress(Addr),
    DeleteService(u32),
    DeleteSet(u32),
    DeleteBackend(u32),
}

/// Why the kernel did not take an operation. `done` operations before it were carried out.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct ApplyError {
    /// The map, the entry and what was tried with it.
    pub what: String,
    pub done: usize,
    #[source]
    pub source: std::io::Error,
}

pub trait Dataplane: Send {
    /// What is in the kernel now. Where a backend set cannot be read back it is left out, and so written again.
    ///
    /// # Errors
    /// Where a map cannot be read.
    fn read(&mut self) -> Result<State, ApplyError>;

    /// Carries the operations out in their order; runs of one kind go to the kernel as one batch.
    ///
    /// # Errors
    /// At the first operation that the kernel refuses; calling again with the same operations is safe.
    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError>;
}
