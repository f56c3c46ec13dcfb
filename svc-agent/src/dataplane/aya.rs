//! The kernel's own maps and programs.
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use aya::{EbpfLoader, util::nr_cpus};
use svc_common::map::{
    Backend, BackendSlot, CONFIG_HOST_SOCKETS_ONLY, CidrFlags, CidrKey, Config, Counter, SourceRangeKey, Uplink, pin,
};
use svc_common::{Addr, Reason};

use super::{ApplyError, Dataplane, Op, ReadCounters, Settings, SocketLb, State};
use crate::attach::{self, PodPrograms};
use crate::host;
use crate::sys::{self, Plain};

/// The kernel part, as build.rs left it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/svc.o"));

/// Names of the maps in the object, and of their pins.
const MAPS: [(&str, &str); 14] = [
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
];

/// The kernel part, loaded and attached. Dropping it detaches nothing: links and maps are pinned.
#[derive(Debug)]
pub struct Aya {
    frontends: OwnedFd,
    sets: OwnedFd,
    backends: OwnedFd,
    addresses: OwnedFd,
    services: OwnedFd,
    source_ranges: OwnedFd,
    cidrs: OwnedFd,
    uplinks: OwnedFd,
    config: OwnedFd,
    /// The first uplink's.
    uplink: Uplink,
    source_range_room: u32,
    counters: Arc<OwnedFd>,
    /// What a deleted set is replaced by: deleting an element of an array of maps waits for a grace period each time, a
    /// batch of updates only once.
    empty: OwnedFd,
}

/// Loads the programs over the pinned maps, or over new ones, and attaches them, or puts them in the place of those that
/// are attached. Those of pods' interfaces are for the caller to attach.
///
/// # Errors
/// One sentence: what is missing on this machine, or what the kernel refused.
pub fn open(settings: &Settings) -> anyhow::Result<(Aya, PodPrograms)> {
    let uplinks = &settings.uplinks;
    let cgroup = host::cgroup(settings.cgroup.as_deref())?;
    host::check_kernel()?;
    let maps = settings.bpffs.join("maps");
    host::prepare_bpffs(&settings.bpffs)?;

    let flow_sets = settings.flow_table_size.max(64).next_power_of_two();
    let paths: Vec<_> = MAPS.iter().map(|(name, pin)| (*name, maps.join(pin))).collect();
    let mut loader = EbpfLoader::new();
    // The kernel's own types, megabytes of them, are only for programs that look into its structures.
    loader.btf(None);
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    let sizes = [
        ("FRONTENDS", settings.max_services * 2),
        ("BACKEND_SETS", settings.max_services * 2),
        ("BACKENDS", settings.max_backends),
        ("ADDRESSES", settings.max_services + 1024),
        ("SERVICES", settings.max_services),
        ("FLOWS", flow_sets),
    ];
    for (name, wanted) in sizes {
        let path = &paths.iter().find(|(map, _)| *map == name).expect("every sized map is listed").1;
        loader.map_max_entries(name, pinned_size(path, name, wanted)?);
    }
    let mut ebpf = loader.load(OBJECT).with_context(|| {
        format!(
            "the kernel part was not loaded; if {} holds maps of another version, `svc-agent cleanup` removes them",
            maps.display()
        )
    })?;

    let open_map = |name: &str| {
        sys::open_pin(&maps.join(name))
            .with_context(|| format!("the map {name} is not pinned under {}", maps.display()))
    };
    let config = open_map(pin::CONFIG)?;
    let first = uplinks.first().context("no uplink is given")?;
    let first_index = host::interface_index(first)?;
    let place = (first_index, host::link_address(first)?);
    configure(settings, place, config.as_fd(), open_map(pin::FLOWS)?.as_fd()).context("writing the map config")?;
    let interfaces = host::interface_addresses()?;
    let uplink_map = open_map(pin::UPLINKS)?;
    for (index, uplink) in &interfaces {
        sys::update(uplink_map.as_fd(), index, uplink).context("writing the map uplinks")?;
    }
    let none = Uplink { v4: Addr::ANY_V4, v6: Addr::ANY_V6 };
    let source_ranges = open_map(pin::SOURCE_RANGES)?;
    let aya = Aya {
        frontends: open_map(pin::FRONTENDS)?,
        sets: open_map(pin::BACKEND_SETS)?,
        backends: open_map(pin::BACKENDS)?,
        addresses: open_map(pin::ADDRESSES)?,
        services: open_map(pin::SERVICES)?,
        source_range_room: sys::map_info(source_ranges.as_fd())?.max_entries,
        source_ranges,
        cidrs: open_map(pin::CIDRS)?,
        uplinks: uplink_map,
        config,
        uplink: interfaces.get(&first_index).copied().unwrap_or(none),
        counters: Arc::new(open_map(pin::COUNTERS)?),
        empty: sys::create_inner_array(&[BackendSlot::header(0)]).context("making an empty backend set")?,
    };
    let links = settings.bpffs.join("links");
    // Packets first, sockets last: a socket that is pointed at a backend needs nothing of the others.
    attach::uplinks(&mut ebpf, &links, uplinks, settings.xdp)?;
    match settings.socket_lb {
        SocketLb::On | SocketLb::Host => attach::sockets(&mut ebpf, &links, &cgroup)?,
        SocketLb::Off => attach::no_sockets(&links)?,
    }
    attach::bind_protection(&mut ebpf, &links, &cgroup, settings.bind_protection)?;
    #[cfg(feature = "kernel-log")]
    crate::kernel_log::forward(&mut ebpf)?;
    let pods = PodPrograms::load(ebpf, links)?;
    // Loading took far more memory than is needed from here on; glibc's heap does not shrink by itself.
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number.
    unsafe {
        libc::malloc_trim(0)
    };
    Ok((aya, pods))
}

/// The size that the map has to be loaded with: that of the pinned one, where there is one.
fn pinned_size(path: &Path, name: &str, wanted: u32) -> anyhow::Result<u32> {
    let map = match sys::open_pin(path) {
        Ok(map) => map,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(wanted),
        Err(error) => return Err(error).with_context(|| format!("opening the pin {}", path.display())),
    };
    let size = sys::map_info(map.as_fd())?.max_entries;
    if size != wanted {
        tracing::warn!(map = name, size, wanted, "the pinned map keeps its size until `svc-agent cleanup`");
    }
    Ok(size)
}

/// The flow table's seed is as old as the table: with another one no flow would be found again.
fn configure(
    settings: &Settings,
    (uplink, uplink_mac): (u32, [u16; 3]),
    config: BorrowedFd<'_>,
    flows: BorrowedFd<'_>,
) -> anyhow::Result<()> {
    let old: Config = sys::lookup(config, &0u32)?;
    let (snat_first, snat_last) = host::snat_ports()?;
    let new = Config {
        host_netns: host::netns_cookie()?,
        flow_seed: if old.flow_sets == 0 { host::random()? } else { old.flow_seed },
        flow_sets: sys::map_info(flows)?.max_entries,
        snat_first,
        snat_last,
        // The reconciler knows the others once it has its objects.
        flags: old.flags & !CONFIG_HOST_SOCKETS_ONLY
            | if settings.socket_lb == SocketLb::Host { CONFIG_HOST_SOCKETS_ONLY } else { 0 },
        uplink,
        uplink_mac,
        pad: 0,
        idle_limits: svc_common::flow::IdleLimits::new(&settings.timeouts),
    };
    Ok(sys::update(config, &0u32, &new)?)
}

const SETS_AT_ONCE: usize = 500;
/// The node's own addresses' place in `uplinks`.
const NODE: u32 = 0;

/// How many operations were carried out, what was tried then, and what the kernel said.
type Failure = (usize, String, io::Error);

impl Aya {
    /// The addresses of the first uplink.
    pub fn uplink(&self) -> Uplink {
        self.uplink
    }

    /// How many source ranges the kernel takes.
    pub fn source_range_room(&self) -> u32 {
        self.source_range_room
    }

    fn put_flags(&self, flags: u32) -> io::Result<()> {
        let config: Config = sys::lookup(self.config.as_fd(), &0u32)?;
        let flags = config.flags & CONFIG_HOST_SOCKETS_ONLY | flags;
        sys::update(self.config.as_fd(), &0u32, &Config { flags, ..config })
    }

    fn put_sets(&self, sets: &[(u32, Vec<BackendSlot>)]) -> Result<(), Failure> {
        // Each set is a file descriptor until it stands in the outer map, and those are limited.
        for (number, chunk) in sets.chunks(SETS_AT_ONCE).enumerate() {
            self.put_sets_at_once(chunk).map_err(|(done, what, error)| (number * SETS_AT_ONCE + done, what, error))?;
        }
        Ok(())
    }

    fn put_sets_at_once(&self, sets: &[(u32, Vec<BackendSlot>)]) -> Result<(), Failure> {
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
        put(&self.sets, pin::BACKEND_SETS, &keys, &values)
    }
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
        fn named<T>(name: &str, result: io::Result<T>) -> Result<T, ApplyError> {
            result.map_err(|source| ApplyError { what: format!("reading the map {name}"), done: 0, source })
        }
        let services: BTreeMap<_, _> = named(pin::SERVICES, sys::entries(self.services.as_fd()))?.into_iter().collect();
        let mut sets = BTreeMap::new();
        for (id, map) in named(pin::BACKEND_SETS, sys::array_entries::<u32>(self.sets.as_fd(), |_| true))? {
            let Ok(inner) = sys::map_by_id(map) else { continue };
            let Ok(slots) = sys::array_entries::<BackendSlot>(inner.as_fd(), |_| true) else { continue };
            let count = slots.first().map_or(0, |(_, header)| header.id as usize);
            if count > 0 || services.contains_key(&(id / 2)) {
                sets.insert(id, slots.into_iter().skip(1).take(count).map(|(_, slot)| slot).collect());
            }
        }
        let backends = sys::array_entries(self.backends.as_fd(), |backend| *backend != Backend::default());
        Ok(State {
            frontends: named(pin::FRONTENDS, sys::entries(self.frontends.as_fd()))?.into_iter().collect(),
            sets,
            backends: named(pin::BACKENDS, backends)?.into_iter().collect(),
            addresses: named(pin::ADDRESSES, sys::entries(self.addresses.as_fd()))?.into_iter().collect(),
            services,
            source_ranges: named(pin::SOURCE_RANGES, sys::entries::<SourceRangeKey, u32>(self.source_ranges.as_fd()))?
                .into_iter()
                .map(|(key, _)| key)
                .collect(),
            cidrs: named(pin::CIDRS, sys::entries::<CidrKey, CidrFlags>(self.cidrs.as_fd()))?.into_iter().collect(),
            flags: named(pin::CONFIG, sys::lookup::<_, Config>(self.config.as_fd(), &0u32))?.flags
                & !CONFIG_HOST_SOCKETS_ONLY,
            node: match sys::lookup(self.uplinks.as_fd(), &NODE) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Uplink::default(),
                node => named(pin::UPLINKS, node)?,
            },
        })
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        let mut done = 0;
        for run in ops.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            let result = match &run[0] {
                Op::PutBackend(..) => {
                    let (keys, values): (Vec<_>, Vec<_>) = pairs!(run, Op::PutBackend).into_iter().unzip();
                    put(&self.backends, pin::BACKENDS, &keys, &values)
                }
                Op::PutSet(..) => self.put_sets(&pairs!(run, Op::PutSet)),
                Op::PutService(..) => {
                    let (keys, values): (Vec<_>, Vec<_>) = pairs!(run, Op::PutService).into_iter().unzip();
                    put(&self.services, pin::SERVICES, &keys, &values)
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
                Op::PutFlags(flags) => {
                    self.put_flags(*flags).map_err(|error| (0, "writing the map config".to_owned(), error))
                }
                Op::PutNode(node) => put(&self.uplinks, pin::UPLINKS, &[NODE], &[*node]),
                Op::DeleteSourceRange(_) => {
                    delete(&self.source_ranges, pin::SOURCE_RANGES, &keys!(run, Op::DeleteSourceRange))
                }
                Op::DeleteCidr(_) => delete(&self.cidrs, pin::CIDRS, &keys!(run, Op::DeleteCidr)),
                Op::DeleteFrontend(_) => delete(&self.frontends, pin::FRONTENDS, &keys!(run, Op::DeleteFrontend)),
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

    fn counters(&self) -> Option<Box<ReadCounters>> {
        let map = Arc::clone(&self.counters);
        let cpus = nr_cpus().ok()?;
        Some(Box::new(move || {
            Reason::ALL.iter().map(|reason| (*reason, read_counter(map.as_fd(), *reason, cpus))).collect()
        }))
    }
}

fn read_counter(map: BorrowedFd<'_>, reason: Reason, cpus: usize) -> Counter {
    let values = sys::lookup_per_cpu::<u32, Counter>(map, &(reason as u32), cpus).unwrap_or_default();
    values.iter().fold(Counter::default(), |sum, value| Counter {
        packets: sum.packets + value.packets,
        bytes: sum.bytes + value.bytes,
    })
}
