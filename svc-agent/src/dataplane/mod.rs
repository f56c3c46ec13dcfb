//! The kernel's maps, as the agent sees them: a state that can be read, and operations on it. `aya` is the real one.
pub mod apart;
pub mod aya;
pub mod dump;
pub mod fake;
pub mod packed_name;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use svc_common::flow::Timeouts;
use svc_common::map::{
    AddressFlags, Backend, BackendSlot, CidrFlags, CidrKey, Config, Counter, Frontend, FrontendKey, SourceRangeKey,
    Uplink, pin,
};
use svc_common::{Addr, Reason};

use crate::plan::PortName;
use packed_name::PackedName;

/// What is in the kernel, or should be. Two states that agree, as these do most of the time, share what is large.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// By set id ([`svc_common::map::cluster_set`], [`svc_common::map::local_set`]); without the header slot.
    pub sets: BTreeMap<u32, Arc<[BackendSlot]>>,
    /// By backend id.
    pub backends: BTreeMap<u32, Backend>,
    pub addresses: BTreeMap<Addr, AddressFlags>,
    /// By service id.
    pub services: BTreeMap<u32, PackedName>,
    pub source_ranges: BTreeSet<SourceRangeKey>,
    pub cidrs: BTreeMap<CidrKey, CidrFlags>,
    pub config: Config,
    /// By interface index; [`NODE`] has the node's own addresses.
    pub uplinks: BTreeMap<u32, Uplink>,
}

/// The node's own addresses' place in `uplinks`.
pub const NODE: u32 = 0;

/// A share of what is in the kernel, little enough to be read between two changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
    Frontends,
    /// These sets, by their ids.
    Sets(Vec<u32>),
    /// Those with an id in this range.
    Backends(Range<u32>),
    Addresses,
    Services,
    SourceRanges,
    Cidrs,
    Config,
    Uplinks,
}

impl Part {
    /// The name of its map.
    pub const fn map(&self) -> &'static str {
        match self {
            Part::Frontends => pin::FRONTENDS,
            Part::Sets(_) => pin::BACKEND_SETS,
            Part::Backends(_) => pin::BACKENDS,
            Part::Addresses => pin::ADDRESSES,
            Part::Services => pin::SERVICES,
            Part::SourceRanges => pin::SOURCE_RANGES,
            Part::Cidrs => pin::CIDRS,
            Part::Config => pin::CONFIG,
            Part::Uplinks => pin::UPLINKS,
        }
    }

    /// All that `state` has, what is referred to before what refers to it.
    pub fn all_of(state: &State) -> Vec<Part> {
        const SETS: usize = 512;
        const BACKENDS: usize = 4096;
        let ids: Vec<u32> = state.sets.keys().copied().collect();
        let sets = ids.chunks(SETS).map(|ids| Part::Sets(ids.to_vec()));
        let end = state.backends.last_key_value().map_or(0, |(id, _)| id + 1);
        let backends = (0..end).step_by(BACKENDS).map(|first| Part::Backends(first..end.min(first + BACKENDS as u32)));
        backends
            .chain(sets)
            .chain([
                Part::Services,
                Part::SourceRanges,
                Part::Cidrs,
                Part::Config,
                Part::Uplinks,
                Part::Addresses,
                Part::Frontends,
            ])
            .collect()
    }
}

impl State {
    /// The backends of a set; none where there is no such set.
    pub fn backend_set(&self, id: u32) -> &[BackendSlot] {
        self.sets.get(&id).map_or(&[], |set| set)
    }

    /// What a service id stands for.
    pub fn port_name(&self, service: u32) -> Option<PortName> {
        PortName::from_map(&self.services.get(&service)?.unpack())
    }

    /// What all service ids stand for.
    pub fn port_names(&self) -> impl Iterator<Item = (u32, PortName)> {
        self.services.iter().filter_map(|(id, name)| Some((*id, PortName::from_map(&name.unpack())?)))
    }

    /// What the kernel's maps hold after the operation.
    pub fn carry_out(&mut self, op: &Op) {
        match op {
            Op::PutBackend(id, backend) => drop(self.backends.insert(*id, *backend)),
            Op::PutSet(id, set) => drop(self.sets.insert(*id, Arc::clone(set))),
            Op::PutService(id, name) => drop(self.services.insert(*id, name.clone())),
            Op::PutSourceRange(key) => drop(self.source_ranges.insert(*key)),
            Op::PutCidr(key, flags) => drop(self.cidrs.insert(*key, *flags)),
            Op::PutConfig(config) => self.config = *config,
            Op::PutUplink(index, uplink) => drop(self.uplinks.insert(*index, *uplink)),
            Op::PutAddress(addr, flags) => drop(self.addresses.insert(*addr, *flags)),
            Op::PutFrontend(key, frontend) => drop(self.frontends.insert(*key, *frontend)),
            Op::DeleteFrontend(key) => drop(self.frontends.remove(key)),
            Op::DeleteSourceRange(key) => drop(self.source_ranges.remove(key)),
            Op::DeleteCidr(key) => drop(self.cidrs.remove(key)),
            Op::DeleteUplink(index) => drop(self.uplinks.remove(index)),
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
    PutSet(u32, Arc<[BackendSlot]>),
    PutService(u32, PackedName),
    PutSourceRange(SourceRangeKey),
    PutCidr(CidrKey, CidrFlags),
    PutConfig(Config),
    PutUplink(u32, Uplink),
    PutAddress(Addr, AddressFlags),
    PutFrontend(FrontendKey, Frontend),
    DeleteFrontend(FrontendKey),
    DeleteSourceRange(SourceRangeKey),
    DeleteCidr(CidrKey),
    DeleteUplink(u32),
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

    /// What is in the kernel of this part now; of all others nothing, or anything. A set that has no service and no
    /// backend may be left out.
    ///
    /// # Errors
    /// Where a map cannot be read.
    fn read_part(&mut self, part: &Part) -> Result<State, ApplyError>;

    /// What the configuration says beside what the objects decide: everything but the flags, and of those some.
    fn config(&self) -> Config {
        Config::default()
    }

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
    pub tc: TcMode,
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
    /// In addresses with port and protocol.
    pub max_frontends: u32,
    /// Of each backend.
    pub count_bytes: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum XdpMode {
    /// Native where the driver gains from it, else none: tc alone does the work.
    #[default]
    Auto,
    Native,
    Generic,
    Off,
}

/// How the programs stand at interfaces, behind XDP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum TcMode {
    /// By tcx where the kernel has it.
    #[default]
    Auto,
    /// By links (Linux 6.6).
    Tcx,
    /// By filters on a clsact qdisc.
    Clsact,
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
