//! The kernel's own maps and programs.
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use aya::{EbpfLoader, util::nr_cpus};
use svc_common::Reason;
use svc_common::flow::IdleLimits;
use svc_common::map::{
    Backend, BackendSlot, CONFIG_COUNT_BYTES, CONFIG_HOST_SOCKETS_ONLY, Config, Counter, SourceRangeKey, pin,
};

use super::packed_name::PackedName;
use super::{ApplyError, Dataplane, Op, Part, ReadCounters, Settings, SocketLb, State};
use crate::attach::{self, BIND_HOOKS, Interfaces, Programs, SOCKET_HOOKS, SocketHooks};
use crate::desired::Limits;
use crate::host;
use crate::memory;
use crate::reconcile::NODE_ADDRESSES;
use crate::sys::{self, Plain};

/// The kernel part, as build.rs left it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/svc.o"));

/// Names of the maps in the object, and of their pins.
pub const MAPS: [(&str, &str); 21] = [
    ("FRONTENDS", pin::FRONTENDS),
    ("BACKEND_SETS", pin::BACKEND_SETS),
    ("BACKENDS", pin::BACKENDS),
    ("ADDRESSES", pin::ADDRESSES),
    ("SERVICES", pin::SERVICES),
    ("UPLINKS", pin::UPLINKS),
    ("CONFIG", pin::CONFIG),
    ("FLOWS", pin::FLOWS),
    ("SOCKETS", pin::SOCKETS),
    ("COUNTERS", pin::COUNTERS),
    ("SOURCE_RANGES", pin::SOURCE_RANGES),
    ("CIDRS", pin::CIDRS),
    ("AFFINITY", pin::AFFINITY),
    ("FRAGMENTS", pin::FRAGMENTS),
    ("HOP_LEASE", pin::HOP_LEASE),
    ("EPOCH", pin::EPOCH),
    ("MONITORS", pin::MONITORS),
    ("EVENTS", pin::EVENTS),
    ("EVENTS_TOLD", pin::EVENTS_TOLD),
    ("CONNECTIONS", pin::CONNECTIONS),
    ("TRAFFIC", pin::TRAFFIC),
];

/// The kernel part, loaded and attached. Dropping it detaches nothing: links and maps are pinned.
#[derive(Debug)]
pub struct Aya {
    frontends: OwnedFd,
    sets: OwnedFd,
    backends: OwnedFd,
    addresses: OwnedFd,
    services: OwnedFd,
    connections: OwnedFd,
    source_ranges: OwnedFd,
    cidrs: OwnedFd,
    uplinks: OwnedFd,
    config: OwnedFd,
    epoch: Epoch,
    /// What the configuration says, beside what the reconciler knows.
    base: Config,
    limits: Limits,
    counters: Arc<OwnedFd>,
    /// What a deleted set is replaced by: deleting an element of an array of maps waits for a grace period each time, a
    /// batch of updates only once.
    empty: OwnedFd,
}

/// However few flows there is room for: each core keeps some free places of an LRU map to itself.
const LEAST_SOCKETS: u32 = 1 << 14;

/// Loads the programs over the pinned maps, or over new ones, and attaches them, or puts them in the place of those that
/// are attached. Those of pods' interfaces are for the caller to attach.
///
/// # Errors
/// One sentence: what is missing on this machine, or what the kernel refused.
pub fn open(settings: &Settings) -> anyhow::Result<(Aya, Programs)> {
    let cgroup = host::cgroup(settings.cgroup.as_deref())?;
    host::check_kernel()?;
    let maps = settings.bpffs.join("maps");
    host::prepare_bpffs(&settings.bpffs)?;
    check_pins(&maps)?;

    let flow_sets = settings.flow_table_size.max(64).next_power_of_two();
    let paths: Vec<_> = MAPS.iter().map(|(name, pin)| (*name, maps.join(pin))).collect();
    let mut loader = EbpfLoader::new();
    // The kernel's own types, megabytes of them, are only for programs that look into its structures.
    loader.btf(None);
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    let sizes = [
        ("FRONTENDS", settings.max_frontends),
        ("BACKEND_SETS", (settings.max_services + 1) * 2),
        ("BACKENDS", settings.max_backends + 1),
        ("ADDRESSES", settings.max_services + NODE_ADDRESSES as u32),
        ("SERVICES", settings.max_services),
        ("CONNECTIONS", settings.max_services + 1),
        ("FLOWS", flow_sets),
        // As a node has more cores, it has more of both.
        ("SOCKETS", (flow_sets / 2).max(LEAST_SOCKETS)),
    ];
    for (name, wanted) in sizes {
        let path = &paths.iter().find(|(map, _)| *map == name).expect("every sized map is listed").1;
        let size = pinned_size(path)?.unwrap_or(wanted);
        if size != wanted {
            tracing::warn!(map = name, size, wanted, "the pinned map keeps its size until `svc-agent cleanup`");
        }
        loader.map_max_entries(name, size);
    }
    let counted = if settings.count_bytes { settings.max_backends + 1 } else { 1 };
    let path = maps.join(pin::TRAFFIC);
    if pinned_size(&path)?.is_some_and(|size| size != counted) {
        // Nothing but counts is lost with the old one.
        fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
    }
    loader.map_max_entries("TRAFFIC", counted);
    let ebpf = loader.load(OBJECT).context("the kernel part was not loaded")?;

    let open_map = |name: &str| {
        sys::open_pin(&maps.join(name))
            .with_context(|| format!("the map {name} is not pinned under {}", maps.display()))
    };
    let config = open_map(pin::CONFIG)?;
    let mut epoch = Epoch::new(open_map(pin::EPOCH)?).context("reading the map epoch")?;
    epoch.end().context("writing the map epoch")?;
    let base = configure(settings, config.as_fd(), open_map(pin::FLOWS)?.as_fd()).context("writing the map config")?;
    epoch.begin().context("writing the map epoch")?;
    let (frontends, addresses, source_ranges) =
        (open_map(pin::FRONTENDS)?, open_map(pin::ADDRESSES)?, open_map(pin::SOURCE_RANGES)?);
    let (services, backends) = (open_map(pin::SERVICES)?, open_map(pin::BACKENDS)?);
    let connections = open_map(pin::CONNECTIONS)?;
    let size = |map: &OwnedFd| sys::map_info(map.as_fd()).map(|info| info.max_entries);
    let sets = open_map(pin::BACKEND_SETS)?;
    // A pinned map may be smaller than the settings want it. Id 0 is nobody's.
    let limits = Limits {
        services: size(&services)?.min(size(&sets)? / 2 - 1).min(size(&connections)? - 1).min(settings.max_services),
        backends: (size(&backends)? - 1).min(settings.max_backends),
        source_ranges: size(&source_ranges)?,
        frontends: size(&frontends)?.min(settings.max_frontends),
        addresses: size(&addresses)?.saturating_sub(NODE_ADDRESSES as u32),
    };
    let aya = Aya {
        frontends,
        sets,
        backends,
        addresses,
        services,
        connections,
        source_ranges,
        cidrs: open_map(pin::CIDRS)?,
        uplinks: open_map(pin::UPLINKS)?,
        config,
        epoch,
        base,
        limits,
        counters: Arc::new(open_map(pin::COUNTERS)?),
        empty: sys::create_inner_array(&[BackendSlot::header(0)]).context("making an empty backend set")?,
    };
    let mut wanted = Vec::new();
    if settings.socket_lb != SocketLb::Off {
        wanted.extend(SOCKET_HOOKS);
    }
    if settings.bind_protection {
        wanted.extend(BIND_HOOKS);
    }
    #[cfg(feature = "kernel-log")]
    let mut ebpf = crate::kernel_log::forward(ebpf)?;
    #[cfg(not(feature = "kernel-log"))]
    let mut ebpf = ebpf;
    attach::load(&mut ebpf, &settings.uplinks, settings.xdp, &wanted)?;
    let interfaces = Interfaces::new(&mut ebpf, &settings.bpffs, settings.tc)?;
    let sockets = SocketHooks { cgroup, wanted };
    let programs = Programs::attach(ebpf, interfaces, &settings.uplinks, settings.xdp, sockets)?;
    // Loading took far more memory than is needed from here on.
    memory::give_back();
    Ok((aya, programs))
}

/// Whether the maps that are pinned under `maps` are such as the object has. Those that are missing are made at the next
/// start.
///
/// # Errors
/// Where one is another version's: which, and what is different.
pub fn check_pins(maps: &Path) -> anyhow::Result<()> {
    let object = aya_obj::Object::parse(OBJECT).context("reading the kernel part")?;
    for (name, pin) in MAPS {
        let own = object.maps.get(name).with_context(|| format!("the kernel part has no map {name}"))?;
        let path = maps.join(pin);
        let pinned = match sys::open_pin(&path) {
            Ok(map) => sys::map_info(map.as_fd())?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("opening the pin {}", path.display())),
        };
        let shape = |kind: u32, key: u32, value: u32| format!("of kind {kind} with entries of {key} + {value} bytes");
        let (found, wanted) = (
            shape(pinned.kind, pinned.key_size, pinned.value_size),
            shape(own.map_type(), own.key_size(), own.value_size()),
        );
        anyhow::ensure!(
            found == wanted,
            "{} is of another version of svc-agent: a map {found}, where this version has one {wanted}; `svc-agent cleanup` \
             removes what that version has pinned",
            path.display()
        );
    }
    Ok(())
}

/// How many entries the pinned map has room for, where there is one.
fn pinned_size(path: &Path) -> anyhow::Result<Option<u32>> {
    match sys::open_pin(path) {
        Ok(map) => Ok(Some(sys::map_info(map.as_fd())?.max_entries)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("opening the pin {}", path.display())),
    }
}

/// Writes what the kernel part has to know from its first packet on, and returns what of it stays. The flow table's seed
/// is as old as the table: with another one no flow would be found again.
fn configure(settings: &Settings, config: BorrowedFd<'_>, flows: BorrowedFd<'_>) -> anyhow::Result<Config> {
    let old: Config = sys::lookup(config, &0u32)?;
    let ports = host::source_ports()?;
    let (snat_first, snat_last) = (ports.first, ports.last);
    if let Some((first, last)) = ports.shared_with {
        tracing::warn!(
            local_ports = %format!("{first}-{last}"),
            source_ports = %format!("{snat_first}-{snat_last}"),
            "net.ipv4.ip_local_port_range leaves too few source ports for forwarded traffic: it shares some with the node's \
             sockets, which may lose replies; keep some from them, as in `sysctl \
             net.ipv4.ip_local_reserved_ports={snat_first}-{snat_last}`",
        );
    }
    let base = Config {
        host_netns: host::netns_cookie()?,
        flow_seed: if old.flow_sets == 0 { host::random()? } else { old.flow_seed },
        flow_sets: sys::map_info(flows)?.max_entries,
        snat_first,
        snat_last,
        flags: if settings.socket_lb == SocketLb::Host { CONFIG_HOST_SOCKETS_ONLY } else { 0 }
            | if settings.count_bytes { CONFIG_COUNT_BYTES } else { 0 },
        idle_limits: IdleLimits::new(&settings.timeouts),
        ..Config::default()
    };
    // The reconciler knows the rest once it has its objects.
    let flags = old.flags & !(CONFIG_HOST_SOCKETS_ONLY | CONFIG_COUNT_BYTES) | base.flags;
    sys::update(config, &0u32, &Config { flags, uplink: old.uplink, uplink_mac: old.uplink_mac, ..base })?;
    Ok(base)
}

/// What of the kernel part's negative cache holds: see [`pin::EPOCH`].
#[derive(Debug)]
struct Epoch {
    map: OwnedFd,
    number: u32,
}

impl Epoch {
    fn new(map: OwnedFd) -> io::Result<Self> {
        let number = sys::lookup(map.as_fd(), &0u32)?;
        Ok(Epoch { map, number })
    }

    /// From here on nothing holds.
    fn end(&mut self) -> io::Result<()> {
        self.write(self.number | 1)
    }

    fn begin(&mut self) -> io::Result<()> {
        // After all numbers comes the first one that stands for an epoch.
        self.write((self.number | 1).checked_add(1).unwrap_or(2))
    }

    fn write(&mut self, number: u32) -> io::Result<()> {
        sys::update(self.map.as_fd(), &0u32, &number)?;
        self.number = number;
        Ok(())
    }
}

/// Whether what is no Service's may be one's after this operation.
fn ends_epoch(op: &Op) -> bool {
    match op {
        Op::PutAddress(..)
        | Op::PutFrontend(..)
        | Op::PutCidr(..)
        | Op::PutConfig(..)
        | Op::DeleteAddress(..)
        | Op::DeleteFrontend(..)
        | Op::DeleteCidr(..) => true,
        Op::PutBackend(..)
        | Op::PutSet(..)
        | Op::PutService(..)
        | Op::PutSourceRange(..)
        | Op::PutUplink(..)
        | Op::DeleteSourceRange(..)
        | Op::DeleteUplink(..)
        | Op::DeleteService(..)
        | Op::DeleteSet(..)
        | Op::DeleteBackend(..) => false,
    }
}

const SETS_AT_ONCE: usize = 500;
/// Threads that write backend sets where the kernel waits for each.
const WRITERS: usize = 32;
/// Entries that are read at once.
const BATCH: usize = 4096;

/// How many operations were carried out, what was tried then, and what the kernel said.
type Failure = (usize, String, io::Error);

impl Aya {
    /// How much the kernel's maps have room for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// None where there is none, or it cannot be read.
    ///
    /// # Errors
    /// Where CAP_SYS_ADMIN is missing, without which the kernel opens no map by its id.
    fn read_set(&self, map: u32) -> io::Result<Option<Arc<[BackendSlot]>>> {
        const SLOTS: usize = 64;
        let inner = match sys::map_by_id(map) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
            inner => inner.ok(),
        };
        let read = |inner: OwnedFd| sys::batch_entries::<u32, BackendSlot>(inner.as_fd(), SLOTS, |_| true).ok();
        Ok(inner.and_then(read).map(|slots| {
            let count = slots.first().map_or(0, |(_, header)| header.id as usize);
            slots.into_iter().skip(1).take(count).map(|(_, slot)| slot).collect()
        }))
    }

    /// # Errors
    /// Unsupported where that would take the kernel too long.
    fn read_sets(&self, ids: &[u32]) -> io::Result<BTreeMap<u32, Arc<[BackendSlot]>>> {
        if !host::looks_up_inner_maps_at_once() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut sets = BTreeMap::new();
        for id in ids {
            match sys::lookup(self.sets.as_fd(), id) {
                Ok(map) => drop(self.read_set(map)?.map(|set| sets.insert(*id, set))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sets)
    }

    /// Those that can be read, and soon enough: the others are written anew.
    fn read_all_sets(&self) -> io::Result<BTreeMap<u32, Arc<[BackendSlot]>>> {
        if !host::looks_up_inner_maps_at_once() {
            return Ok(BTreeMap::new());
        }
        let maps = sys::batch_entries::<u32, u32>(self.sets.as_fd(), BATCH, |_| true)?;
        Ok(maps.into_iter().filter_map(|(id, map)| Some((id, self.read_set(map).ok()??))).collect())
    }

    fn read_into(&self, part: &Part, state: &mut State) -> io::Result<()> {
        fn hash<K: Plain + Ord, V: Plain>(map: &OwnedFd) -> io::Result<BTreeMap<K, V>> {
            Ok(sys::batch_entries(map.as_fd(), BATCH, |_| true)?.into_iter().collect())
        }
        match part {
            Part::Frontends => state.frontends = hash(&self.frontends)?,
            Part::Sets(ids) => state.sets = self.read_sets(ids)?,
            Part::Backends(ids) => {
                state.backends = sys::array_range(self.backends.as_fd(), ids.clone())?.into_iter().collect();
                state.backends.retain(|_, backend| is_used(backend));
            }
            Part::Addresses => state.addresses = hash(&self.addresses)?,
            Part::Services => {
                let names = sys::batch_entries(self.services.as_fd(), BATCH, |_| true)?;
                state.services = names.iter().map(|(id, name)| (*id, PackedName::from(name))).collect();
            }
            Part::SourceRanges => {
                let ranges = sys::entries::<SourceRangeKey, u32>(self.source_ranges.as_fd())?;
                state.source_ranges = ranges.into_iter().map(|(key, _)| key).collect();
            }
            Part::Cidrs => state.cidrs = sys::entries(self.cidrs.as_fd())?.into_iter().collect(),
            Part::Config => state.config = sys::lookup(self.config.as_fd(), &0u32)?,
            Part::Uplinks => state.uplinks = hash(&self.uplinks)?,
        }
        Ok(())
    }

    fn put_sets(&self, sets: &[(u32, Arc<[BackendSlot]>)]) -> Result<(), Failure> {
        // Each set is a file descriptor until it stands in the outer map, and those are limited.
        for (number, chunk) in sets.chunks(SETS_AT_ONCE).enumerate() {
            self.put_sets_at_once(chunk).map_err(|(done, what, error)| (number * SETS_AT_ONCE + done, what, error))?;
        }
        Ok(())
    }

    fn put_sets_at_once(&self, sets: &[(u32, Arc<[BackendSlot]>)]) -> Result<(), Failure> {
        let mut inner = Vec::with_capacity(sets.len());
        for (id, backends) in sets {
            let slots: Vec<_> =
                [BackendSlot::header(backends.len() as u32)].into_iter().chain(backends.iter().copied()).collect();
            match sys::create_inner_array(&slots) {
                Ok(map) => inner.push(map),
                // What was made so far is not in the outer map yet.
                Err(error) => return Err((0, format!("making backend set {id}"), error)),
            }
        }
        let keys: Vec<_> = sets.iter().map(|(id, _)| *id).collect();
        let values: Vec<_> = inner.iter().map(|map| map.as_raw_fd() as u32).collect();
        if host::looks_up_inner_maps_at_once() {
            return put(&self.sets, pin::BACKEND_SETS, &keys, &values);
        }
        // The kernel waits for each, and those that wait at the same time wait together.
        let share = keys.len().div_ceil(WRITERS).max(1);
        std::thread::scope(|scope| {
            let shares = keys.chunks(share).zip(values.chunks(share));
            let writers: Vec<_> =
                shares.map(|(keys, values)| scope.spawn(|| put(&self.sets, pin::BACKEND_SETS, keys, values))).collect();
            writers.into_iter().try_for_each(|writer| {
                let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                // Of the other writers' nothing is known.
                written.map_err(|(_, what, error)| (0, what, error))
            })
        })
    }
}

fn is_used(backend: &Backend) -> bool {
    *backend != Backend::default()
}

fn unreadable(part: &Part, source: io::Error) -> ApplyError {
    ApplyError { what: format!("reading the map {}", part.map()), done: 0, source }
}

fn put<K: Plain + std::fmt::Debug, V: Plain>(
    map: &OwnedFd,
    name: &str,
    keys: &[K],
    values: &[V],
) -> Result<(), Failure> {
    sys::update_batch(map.as_fd(), keys, values)
        .map_err(|(done, error)| (done, format!("writing {:?} to the map {name}", keys[done]), error))
}

fn put_trie<K: Plain + std::fmt::Debug, V: Plain>(
    map: &OwnedFd,
    name: &str,
    keys: &[K],
    values: &[V],
) -> Result<(), Failure> {
    sys::update_trie(map.as_fd(), keys, values)
        .map_err(|(done, error)| (done, format!("writing {:?} to the map {name}", keys[done]), error))
}

fn delete<K: Plain + std::fmt::Debug>(map: &OwnedFd, name: &str, keys: &[K]) -> Result<(), Failure> {
    for (done, key) in keys.iter().enumerate() {
        sys::delete(map.as_fd(), key)
            .map_err(|error| (done, format!("deleting {key:?} from the map {name}"), error))?;
    }
    Ok(())
}

macro_rules! pairs {
    ($run:expr, $variant:path) => {
        $run.iter()
            .map(|op| match op {
                $variant(key, value) => (key.clone(), value.clone()),
                _ => unreachable!("a run is of one kind"),
            })
            .collect::<Vec<_>>()
    };
}

macro_rules! keys {
    ($run:expr, $variant:path) => {
        $run.iter()
            .map(|op| match op {
                $variant(key) => *key,
                _ => unreachable!("a run is of one kind"),
            })
            .collect::<Vec<_>>()
    };
}

impl Dataplane for Aya {
    fn read(&mut self) -> Result<State, ApplyError> {
        let mut state = State::default();
        for part in Part::all_of(&state) {
            self.read_into(&part, &mut state).map_err(|source| unreadable(&part, source))?;
        }
        state.backends = sys::batch_entries(self.backends.as_fd(), BATCH, is_used)
            .map_err(|source| unreadable(&Part::Backends(0..0), source))?
            .into_iter()
            .collect();
        let sets = self.read_all_sets().map_err(|source| unreadable(&Part::Sets(Vec::new()), source))?;
        // What was once a set stays an empty one.
        let is_there = |id: &u32, set: &[BackendSlot]| !set.is_empty() || state.services.contains_key(&(id / 2));
        state.sets = sets.into_iter().filter(|(id, set)| is_there(id, set)).collect();
        Ok(state)
    }

    fn read_part(&mut self, part: &Part) -> Result<State, ApplyError> {
        let mut state = State::default();
        self.read_into(part, &mut state).map_err(|source| unreadable(part, source))?;
        Ok(state)
    }

    fn config(&self) -> Config {
        self.base
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        let unwritable =
            |done: usize| move |source| ApplyError { what: format!("writing the map {}", pin::EPOCH), done, source };
        if !ops.iter().any(ends_epoch) {
            return self.carry_out(ops);
        }
        self.epoch.end().map_err(unwritable(0))?;
        let carried_out = self.carry_out(ops);
        let done = carried_out.as_ref().map_or_else(|error| error.done, |()| ops.len());
        self.epoch.begin().map_err(unwritable(done))?;
        carried_out
    }

    fn counters(&self) -> Option<Box<ReadCounters>> {
        let map = Arc::clone(&self.counters);
        let cpus = nr_cpus().ok()?;
        Some(Box::new(move || {
            Reason::ALL.iter().map(|reason| (*reason, read_counter(map.as_fd(), *reason, cpus))).collect()
        }))
    }
}

impl Aya {
    fn carry_out(&self, ops: &[Op]) -> Result<(), ApplyError> {
        let mut done = 0;
        for run in ops.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            let result = match &run[0] {
                Op::PutBackend(..) => {
                    let (keys, values): (Vec<_>, Vec<_>) = pairs!(run, Op::PutBackend).into_iter().unzip();
                    put(&self.backends, pin::BACKENDS, &keys, &values)
                }
                Op::PutSet(..) => self.put_sets(&pairs!(run, Op::PutSet)),
                Op::PutService(..) => {
                    let (keys, values): (Vec<_>, Vec<_>) =
                        pairs!(run, Op::PutService).into_iter().map(|(id, name)| (id, name.unpack())).unzip();
                    // What was counted under an id is not this Service's. Its frontends come later.
                    put(&self.connections, pin::CONNECTIONS, &keys, &vec![0u64; keys.len()])
                        .and_then(|()| put(&self.services, pin::SERVICES, &keys, &values))
                }
                Op::PutAddress(..) => {
                    let (keys, values): (Vec<_>, Vec<_>) = pairs!(run, Op::PutAddress).into_iter().unzip();
                    put(&self.addresses, pin::ADDRESSES, &keys, &values)
                }
                Op::PutFrontend(..) => {
                    let (keys, values): (Vec<_>, Vec<_>) = pairs!(run, Op::PutFrontend).into_iter().unzip();
                    put(&self.frontends, pin::FRONTENDS, &keys, &values)
                }
                Op::PutSourceRange(_) => {
                    let keys = keys!(run, Op::PutSourceRange);
                    put_trie(&self.source_ranges, pin::SOURCE_RANGES, &keys, &vec![1u32; keys.len()])
                }
                Op::PutCidr(..) => {
                    let (keys, values): (Vec<_>, Vec<_>) = pairs!(run, Op::PutCidr).into_iter().unzip();
                    put_trie(&self.cidrs, pin::CIDRS, &keys, &values)
                }
                Op::PutConfig(config) => put(&self.config, pin::CONFIG, &[0u32], &[*config]),
                Op::PutUplink(..) => {
                    let (keys, values): (Vec<_>, Vec<_>) = pairs!(run, Op::PutUplink).into_iter().unzip();
                    put(&self.uplinks, pin::UPLINKS, &keys, &values)
                }
                Op::DeleteSourceRange(_) => {
                    delete(&self.source_ranges, pin::SOURCE_RANGES, &keys!(run, Op::DeleteSourceRange))
                }
                Op::DeleteCidr(_) => delete(&self.cidrs, pin::CIDRS, &keys!(run, Op::DeleteCidr)),
                Op::DeleteFrontend(_) => delete(&self.frontends, pin::FRONTENDS, &keys!(run, Op::DeleteFrontend)),
                Op::DeleteUplink(_) => delete(&self.uplinks, pin::UPLINKS, &keys!(run, Op::DeleteUplink)),
                Op::DeleteAddress(_) => delete(&self.addresses, pin::ADDRESSES, &keys!(run, Op::DeleteAddress)),
                Op::DeleteService(_) => delete(&self.services, pin::SERVICES, &keys!(run, Op::DeleteService)),
                Op::DeleteSet(_) => {
                    let keys = keys!(run, Op::DeleteSet);
                    put(&self.sets, pin::BACKEND_SETS, &keys, &vec![self.empty.as_raw_fd() as u32; keys.len()])
                }
                Op::DeleteBackend(_) => {
                    let keys = keys!(run, Op::DeleteBackend);
                    put(&self.backends, pin::BACKENDS, &keys, &vec![Backend::default(); keys.len()])
                }
            };
            result.map_err(|(within, what, source)| ApplyError { what, done: done + within, source })?;
            done += run.len();
        }
        Ok(())
    }
}

fn read_counter(map: BorrowedFd<'_>, reason: Reason, cpus: usize) -> Counter {
    let values = sys::lookup_per_cpu::<u32, Counter>(map, &(reason as u32), cpus).unwrap_or_default();
    values.iter().fold(Counter::default(), |sum, value| Counter {
        packets: sum.packets + value.packets,
        bytes: sum.bytes + value.bytes,
    })
}
