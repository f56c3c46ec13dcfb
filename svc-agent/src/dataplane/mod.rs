//! The kernel's maps, as the agent sees them: a state that can be read, and operations on it. `aya` is the real one.
pub mod aya;
pub mod dump;
pub mod fake;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use svc_common::flow::Timeouts;
use svc_common::map::{
    AddressFlags, Backend, BackendSlot, CidrFlags, CidrKey, Counter, Frontend, FrontendKey, ServiceName,
    SourceRangeKey, Uplink,
};
use svc_common::{Addr, Reason};

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
    pub source_ranges: BTreeSet<SourceRangeKey>,
    pub cidrs: BTreeMap<CidrKey, CidrFlags>,
    /// `CONFIG_*`.
    pub flags: u32,
    /// The node's own addresses: index 0 of `uplinks`.
    pub node: Uplink,
}

impl State {
    /// What the kernel's maps hold after the operation.
    pub fn carry_out(&mut self, op: &Op) {
        match op {
            Op::PutBackend(id, backend) => drop(self.backends.insert(*id, *backend)),
            Op::PutSet(id, set) => drop(self.sets.insert(*id, set.clone())),
            Op::PutService(id, name) => drop(self.services.insert(*id, *name)),
            Op::PutSourceRange(key) => drop(self.source_ranges.insert(*key)),
            Op::PutCidr(key, flags) => drop(self.cidrs.insert(*key, *flags)),
            Op::PutFlags(flags) => self.flags = *flags,
            Op::PutNode(node) => self.node = *node,
            Op::PutAddress(addr, flags) => drop(self.addresses.insert(*addr, *flags)),
            Op::PutFrontend(key, frontend) => drop(self.frontends.insert(*key, *frontend)),
            Op::DeleteFrontend(key) => drop(self.frontends.remove(key)),
            Op::DeleteSourceRange(key) => drop(self.source_ranges.remove(key)),
            Op::DeleteCidr(key) => drop(self.cidrs.remove(key)),
            Op::DeleteAddress(addr) => drop(self.addresses.remove(addr)),
            Op::DeleteService(id) => drop(self.services.remove(id)),
            Op::DeleteSet(id) => drop(self.sets.remove(id)),
            Op::DeleteBackend(id) => drop(self.backends.remove(id)),
        }
    }
}

/// One change of one entry. Each is idempotent: putting what is there and deleting what is absent both succeed.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    PutBackend(u32, Backend),
    PutSet(u32, Vec<BackendSlot>),
    PutService(u32, ServiceName),
    PutSourceRange(SourceRangeKey),
    PutCidr(CidrKey, CidrFlags),
    /// Of the configuration.
    PutFlags(u32),
    PutNode(Uplink),
    PutAddress(Addr, AddressFlags),
    PutFrontend(FrontendKey, Frontend),
    DeleteFrontend(FrontendKey),
    DeleteSourceRange(SourceRangeKey),
    DeleteCidr(CidrKey),
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

/// Reads the counters, each summed over the CPUs; from any thread.
pub type ReadCounters = dyn Fn() -> Vec<(Reason, Counter)> + Send + Sync;

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

    /// For metrics; none where nothing is counted.
    fn counters(&self) -> Option<Box<ReadCounters>> {
        None
    }
}

/// How the kernel part is set up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The cgroup v2 directory whose processes are served; none: the root of the mounted hierarchy.
    pub cgroup: Option<PathBuf>,
    /// Directory of the pins.
    pub bpffs: PathBuf,
    /// Interface names.
    pub uplinks: Vec<String>,
    pub xdp: XdpMode,
    pub socket_lb: SocketLb,
    /// Of NodePorts, from sockets of the node.
    pub bind_protection: bool,
    /// In flows.
    pub flow_table_size: u32,
    /// In service ids: one a Service port and address family.
    pub max_services: u32,
    /// In backend ids.
    pub max_backends: u32,
    pub timeouts: Timeouts,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum XdpMode {
    /// Native where the driver gains from it, else none: tcx alone does the work.
    #[default]
    Auto,
    Native,
    Generic,
    Off,
}

/// Whose sockets are pointed at backends, so that none of their packets needs a translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum SocketLb {
    /// The node's own and its pods'.
    #[default]
    On,
    /// The node's own only: pods' traffic is translated packet by packet, as service meshes and virtual machines need it.
    Host,
    /// Nobody's.
    Off,
}
