//! What the kernel has, read from the pins: works with or without an agent that runs, and changes nothing.
pub mod agent;
pub mod details;
pub mod map;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use serde::Serialize;
use svc_common::flow::{self, Snapshot};
use svc_common::map::{
    ADDRESS_NODE, AddressFlags, Affinity, AffinityKey, Backend, BackendSlot, CidrFlags, CidrKey, Config, Counter,
    FragmentKey, FragmentPorts, Frontend, FrontendKey, ServiceName, SocketKey, SocketPeer, SourceRangeKey, Traffic,
    Uplink, cluster_set, local_set, pin,
};
use svc_common::{Addr, Reason};

use crate::attach::{BIND_HOOKS, SOCKET_HOOKS};
use crate::dataplane::State;
use crate::dataplane::dump::address_and_port;
use crate::dataplane::packed_name::PackedName;
use crate::filters::{self, Filters};
use crate::host;
use crate::object::{ObjectName, Protocol};
use crate::plan::PortName;
use crate::sys::Plain;
use crate::traffic;
use map::{Link, Map};

/// The directories of the pins, in the order in which they are taken away: nothing runs without its maps.
pub const DIRECTORIES: [&str; 4] = ["links", filters::DIRECTORY, "programs", "maps"];
const LINKS: &str = DIRECTORIES[0];
pub const MAPS: &str = DIRECTORIES[3];

/// One flow that the uplink's programs keep track of, as seen by its client.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// Namespace and name; none where the frontend is no more.
    pub service: Option<String>,
    pub port_name: Option<String>,
    pub protocol: String,
    pub client: String,
    pub frontend: String,
    pub backend: String,
    /// What the backend sees as its client, where that is not the client; `*` for an address of this node.
    pub source: Option<String>,
    pub state: &'static str,
    pub idle_seconds: u64,
    pub backend_id: u32,
}

/// How full the flow table is. A flow has a cell for each direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowTable {
    pub cells: usize,
    /// With a flow that lives.
    pub used: usize,
    /// With a flow that was idle for too long; as good as free.
    pub expired: usize,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Size {
    pub map: &'static str,
    pub entries: usize,
    pub max_entries: usize,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Hook {
    pub name: String,
    pub attached: bool,
    /// `cgroup`, `xdp`, `tcx` or `clsact`.
    pub by: &'static str,
    pub link_id: Option<u32>,
    pub program_id: Option<u32>,
}

#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// # Errors
    /// Where nothing is pinned there, or the directory may not be read.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        let shown = directory.display();
        match names_in(&directory.join(MAPS)) {
            Ok(names) if !names.is_empty() => Ok(Pins { directory: directory.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                anyhow::bail!("cannot read {shown}: that needs root: try sudo")
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot read {shown}"))
            }
            _ => anyhow::bail!("nothing is pinned under {shown}: is svc-agent running with --bpffs {shown}?"),
        }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// # Errors
    /// Where a map cannot be read.
    pub fn state(&self) -> anyhow::Result<State> {
        let names = self.names()?;
        let mut sets = self.sets(names.services.keys().copied())?;
        // What was once a set stays an empty one.
        sets.retain(|set, slots| !slots.is_empty() || names.services.contains_key(&(set / 2)));
        Ok(State {
            sets,
            source_ranges: self
                .trie_entries::<SourceRangeKey, u32>(pin::SOURCE_RANGES)?
                .into_iter()
                .map(|(key, _)| key)
                .collect(),
            cidrs: self.trie_entries::<CidrKey, CidrFlags>(pin::CIDRS)?.into_iter().collect(),
            uplinks: self.entries::<u32, Uplink>(pin::UPLINKS)?.into_iter().collect(),
            ..names
        })
    }

    /// What addresses are known by name by: all but backend sets, source ranges, CIDRs and uplinks.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn names(&self) -> anyhow::Result<State> {
        let names: Vec<(u32, ServiceName)> = self.entries(pin::SERVICES)?;
        Ok(State {
            frontends: self.entries::<FrontendKey, Frontend>(pin::FRONTENDS)?.into_iter().collect(),
            backends: self.backends()?.into_iter().collect(),
            addresses: self.entries::<Addr, AddressFlags>(pin::ADDRESSES)?.into_iter().collect(),
            services: names.iter().map(|(id, name)| (*id, PackedName::from(name))).collect(),
            config: self.config()?,
            ..State::default()
        })
    }

    fn config(&self) -> anyhow::Result<Config> {
        self.map(pin::CONFIG)?.lookup(0).with_context(|| unreadable(pin::CONFIG))
    }

    /// The backends that clients of this Service's port may be sent to, whatever its policies.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn backends_of(&self, service: &ObjectName, port: &str) -> anyhow::Result<Vec<SocketAddr>> {
        let names: Vec<(u32, ServiceName)> = self.entries(pin::SERVICES)?;
        let is_it = |name: &ServiceName| {
            PortName::from_map(name).is_some_and(|name| name.service == *service && &*name.port == port)
        };
        let outer = self.map(pin::BACKEND_SETS)?;
        let mut backends = Vec::new();
        for (id, _) in names.iter().filter(|(_, name)| is_it(name)) {
            let set = cluster_set(*id);
            let Ok(map) = outer.lookup(set) else { continue };
            let slots = read_set(&outer, set, map).with_context(|| unreadable(pin::BACKEND_SETS))?;
            backends.extend(
                slots
                    .iter()
                    .flat_map(|slots| &**slots)
                    .map(|slot| SocketAddr::new(slot.addr.into(), u16::from_be(slot.port))),
            );
        }
        Ok(backends)
    }

    /// The flows that live, each once.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn flows(&self) -> anyhow::Result<Vec<Flow>> {
        self.flows_of(&self.state()?)
    }

    /// As [`Pins::flows`], where `state` was read already.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn flows_of(&self, state: &State) -> anyhow::Result<Vec<Flow>> {
        let uplinks: Vec<Uplink> = state.uplinks.values().copied().collect();
        let mut flows = Vec::new();
        self.each_cell(|cell| {
            if !cell.reverse && !cell.expired {
                flows.push(flow_of(&cell, state, &uplinks));
            }
        })?;
        flows.sort();
        Ok(flows)
    }

    /// # Errors
    /// Where the flow table cannot be read.
    pub fn flow_table(&self) -> anyhow::Result<FlowTable> {
        let (mut used, mut expired) = (0, 0);
        let cells = self.each_cell(|cell| if cell.expired { expired += 1 } else { used += 1 })?;
        Ok(FlowTable { cells, used, expired })
    }

    /// Each summed over the CPUs.
    ///
    /// # Errors
    /// Where the counters cannot be read.
    pub fn counters(&self) -> anyhow::Result<Vec<(Reason, Counter)>> {
        let cpus = aya::util::nr_cpus()
            .map_err(|(path, error)| anyhow::Error::new(error).context(format!("cannot read {path}")))?;
        let counters = self.map(pin::COUNTERS)?;
        let read = |reason: &Reason| {
            let of_cpus: Vec<Counter> = counters.lookup_per_cpu(*reason as u32, cpus)?;
            let sum = of_cpus.iter().fold(Counter::default(), |sum, cpu| Counter {
                packets: sum.packets + cpu.packets,
                bytes: sum.bytes + cpu.bytes,
            });
            Ok((*reason, sum))
        };
        Reason::ALL.iter().map(read).collect::<io::Result<_>>().with_context(|| unreadable(pin::COUNTERS))
    }

    /// Flows opened and sockets pointed at a backend, by service id.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn connections(&self) -> anyhow::Result<Vec<(u32, u64)>> {
        self.entries(pin::CONNECTIONS)
    }

    /// Bytes to and from each backend that had any, by its id; none where they are not counted.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn traffic(&self) -> anyhow::Result<Option<BTreeMap<u32, Traffic>>> {
        traffic::read(&self.directory.join(MAPS))
    }

    /// Which clients stay with which backends.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn affinity(&self) -> anyhow::Result<Vec<(AffinityKey, Affinity)>> {
        self.entries(pin::AFFINITY)
    }

    /// The flow table as it stands, by sets; `see` is called with some thousands of them at a time.
    ///
    /// # Errors
    /// Where the map cannot be read, or those of `see`.
    pub fn copy_flows(&self, mut see: impl FnMut(u32, &[flow::Set]) -> anyhow::Result<()>) -> anyhow::Result<()> {
        const SETS: usize = 4096;
        let pages = self.map(pin::FLOWS)?.pages::<flow::Set>().with_context(|| unreadable(pin::FLOWS))?;
        let mut sets = pages.iter().map(|set| {
            // SAFETY: the set is in the mapped pages, which live until this function's end; no reference is made.
            flow::Set(std::array::from_fn(|way| unsafe { flow::copy(&raw const (*set).0[way]) }))
        });
        let mut first = 0;
        loop {
            let some: Vec<flow::Set> = sets.by_ref().take(SETS).collect();
            if some.is_empty() {
                return Ok(());
            }
            see(first, &some)?;
            first += some.len() as u32;
        }
    }

    /// Where the maps are pinned.
    pub fn maps(&self) -> PathBuf {
        self.directory.join(MAPS)
    }

    /// How much of each map that can be full is used.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn sizes(&self, state: &State) -> anyhow::Result<Vec<Size>> {
        let size = |map: &'static str, entries: usize| -> anyhow::Result<Size> {
            Ok(Size { map, entries, max_entries: self.map(map)?.max_entries as usize })
        };
        Ok(vec![
            size(pin::FRONTENDS, state.frontends.len())?,
            size(pin::SERVICES, state.services.len())?,
            size(pin::BACKEND_SETS, state.sets.len())?,
            size(pin::BACKENDS, state.backends.values().filter(|backend| backend.live != 0).count())?,
            size(pin::ADDRESSES, state.addresses.len())?,
            size(pin::SOURCE_RANGES, state.source_ranges.len())?,
            size(pin::CIDRS, state.cidrs.len())?,
            size(pin::UPLINKS, state.uplinks.len())?,
            size(pin::SOCKETS, self.entries::<SocketKey, SocketPeer>(pin::SOCKETS)?.len())?,
            size(pin::AFFINITY, self.entries::<AffinityKey, Affinity>(pin::AFFINITY)?.len())?,
            size(pin::FRAGMENTS, self.entries::<FragmentKey, FragmentPorts>(pin::FRAGMENTS)?.len())?,
        ])
    }

    /// The socket hooks, there or not, then the interfaces': links, then filters.
    ///
    /// # Errors
    /// Where the links' directory cannot be read.
    pub fn hooks(&self) -> anyhow::Result<Vec<Hook>> {
        let directory = self.directory.join(LINKS);
        let pinned = match names_in(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            names => names.with_context(|| format!("cannot read {}", directory.display()))?,
        };
        let of_interfaces = pinned.iter().filter(|name| !SOCKET_HOOKS.contains(&name.as_str()));
        let names = SOCKET_HOOKS.iter().map(|name| (*name).to_owned()).chain(of_interfaces.cloned());
        let mut hooks: Vec<Hook> = names
            .map(|name| {
                let by = link_kind(&name);
                match Link::open(&directory.join(&name)) {
                    Ok(Link { id, program, attached }) => {
                        Hook { name, attached, by, link_id: Some(id), program_id: Some(program) }
                    }
                    Err(_) => Hook { name, attached: false, by, link_id: None, program_id: None },
                }
            })
            .collect();
        let filters = Filters::open(&self.directory)?;
        for name in filters.records()? {
            let program_id = filters.program(&name).context("cannot read an interface's filters")?;
            hooks.push(Hook { name, attached: program_id.is_some(), by: "clsact", link_id: None, program_id });
        }
        Ok(hooks)
    }

    fn map(&self, name: &str) -> anyhow::Result<Map> {
        Map::open(&self.directory.join(MAPS).join(name)).with_context(|| unreadable(name))
    }

    fn entries<K: Plain, V: Plain>(&self, name: &str) -> anyhow::Result<Vec<(K, V)>> {
        self.map(name)?.entries().with_context(|| unreadable(name))
    }

    fn trie_entries<K: Plain, V: Plain>(&self, name: &str) -> anyhow::Result<Vec<(K, V)>> {
        self.map(name)?.trie_entries().with_context(|| unreadable(name))
    }

    /// The ids that stand for something.
    fn backends(&self) -> anyhow::Result<Vec<(u32, Backend)>> {
        let mut backends: Vec<(u32, Backend)> = self.entries(pin::BACKENDS)?;
        backends.retain(|(_, backend)| *backend != Backend::default());
        Ok(backends)
    }

    /// Those of these services, and maybe others.
    fn sets(&self, services: impl Iterator<Item = u32>) -> anyhow::Result<BTreeMap<u32, Arc<[BackendSlot]>>> {
        let outer = self.map(pin::BACKEND_SETS)?;
        let look_up = |set: u32| match outer.lookup(set) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            id => Some(id.map(|id| (set, id))),
        };
        let ids: io::Result<Vec<(u32, u32)>> = if host::looks_up_inner_maps_at_once() {
            outer.entries()
        } else {
            services.flat_map(|service| [cluster_set(service), local_set(service)]).filter_map(look_up).collect()
        };
        let ids = ids.with_context(|| unreadable(pin::BACKEND_SETS))?;
        ids.into_iter()
            .filter_map(|(set, id)| read_set(&outer, set, id).transpose().map(|slots| Ok((set, slots?))))
            .collect::<io::Result<_>>()
            .map_err(|error| match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    anyhow::anyhow!("{}: that needs root, or the capability SYS_ADMIN", unreadable(pin::BACKEND_SETS))
                }
                _ => anyhow::Error::new(error).context(unreadable(pin::BACKEND_SETS)),
            })
    }

    /// Returns how many cells there are, the free ones included.
    fn each_cell(&self, mut see: impl FnMut(Snapshot)) -> anyhow::Result<usize> {
        let pages = self.map(pin::FLOWS)?.pages::<flow::Set>().with_context(|| unreadable(pin::FLOWS))?;
        let limits = self.config()?.idle_limits;
        let mut cells = 0;
        for set in pages.iter() {
            let now = host::flow_tick();
            for way in 0..flow::WAYS {
                cells += 1;
                // SAFETY: the set is in the mapped pages, which live until this function's end; no reference is made.
                let cell = unsafe { Snapshot::read(&raw const (*set).0[way], now, &limits) };
                if let Some(cell) = cell {
                    see(cell);
                }
            }
        }
        Ok(cells)
    }
}

fn link_kind(name: &str) -> &'static str {
    if SOCKET_HOOKS.contains(&name) || BIND_HOOKS.contains(&name) {
        "cgroup"
    } else if name.starts_with("xdp-") {
        "xdp"
    } else {
        "tcx"
    }
}

fn unreadable(map: &str) -> String {
    format!("cannot read the map {map}")
}

fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = std::fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// None where the set was taken away meanwhile.
fn read_set(outer: &Map, set: u32, mut id: u32) -> io::Result<Option<Arc<[BackendSlot]>>> {
    let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
    // The agent may swap the set between its id's reading and its opening.
    for _ in 0..8 {
        match Map::by_id(id) {
            Ok(inner) => {
                let slots: Vec<(u32, BackendSlot)> = inner.entries()?;
                let count = slots.first().map_or(0, |(_, header)| header.id as usize);
                return Ok(Some(slots.into_iter().skip(1).take(count).map(|(_, slot)| slot).collect()));
            }
            Err(error) if gone(&error) => match outer.lookup(set) {
                Ok(other) => id = other,
                Err(error) if gone(&error) => return Ok(None),
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// `cell` is a forward one.
pub fn flow_of(cell: &Snapshot, state: &State, uplinks: &[Uplink]) -> Flow {
    let text = |addr: Addr, port: u16| address_and_port(addr, port.to_be());
    let name = frontend_at(state, cell.dst, cell.dst_port.to_be(), cell.protocol)
        .and_then(|frontend| state.port_name(frontend.service));
    let source = if cell.masqueraded {
        Some(match node_source(cell.dst.is_v4(), uplinks) {
            Some(addr) => text(addr, cell.second_port),
            None => format!("*:{}", cell.second_port),
        })
    } else {
        (cell.second_port != cell.src_port).then(|| text(cell.src, cell.second_port))
    };
    Flow {
        service: name.as_ref().map(|name| name.service.to_string()),
        port_name: name.map(|name| name.port.to_string()).filter(|port| !port.is_empty()),
        protocol: protocol_text(cell.protocol),
        client: text(cell.src, cell.src_port),
        frontend: text(cell.dst, cell.dst_port),
        backend: text(cell.to, cell.to_port),
        source,
        state: cell.state.label(),
        idle_seconds: (u64::from(cell.idle_ticks) << flow::TICK_SHIFT) / 1_000_000_000,
        backend_id: cell.backend,
    }
}

fn protocol_text(protocol: u8) -> String {
    Protocol::from_number(protocol).map_or_else(|| protocol.to_string(), |protocol| protocol.to_string())
}

/// Protocol, address and port.
pub fn backend_text(backend: &Backend) -> String {
    format!("{} {}", protocol_text(backend.protocol), address_and_port(backend.addr, backend.port.to_be()))
}

/// The frontend that answers there. `port` in network byte order.
pub fn frontend_at(state: &State, addr: Addr, port: u16, protocol: u8) -> Option<&Frontend> {
    let at = |addr| state.frontends.get(&FrontendKey::new(addr, port, protocol));
    let node_port = || {
        let answers = addr.is_loopback() || state.addresses.get(&addr)? & ADDRESS_NODE != 0;
        if answers { at(addr.any()) } else { None }
    };
    at(addr).or_else(node_port)
}

/// The address that traffic forwarded by this node has, where the uplinks leave no choice: a cell does not say.
fn node_source(v4: bool, uplinks: &[Uplink]) -> Option<Addr> {
    let addresses = uplinks.iter().map(|uplink| if v4 { uplink.v4 } else { uplink.v6 });
    let mut addresses: Vec<Addr> = addresses.filter(|addr| *addr != addr.any()).collect();
    addresses.sort();
    addresses.dedup();
    match addresses[..] {
        [only] => Some(only),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use std::net::IpAddr;
    use svc_common::flow::State as FlowState;
    use svc_common::map::{FRONTEND_NODE_PORT, TCP};

    use crate::object::{Family, ObjectName};

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn cell() -> Snapshot {
        Snapshot {
            protocol: TCP,
            reverse: false,
            masqueraded: true,
            src: addr("192.0.2.9"),
            src_port: 40_000,
            dst: addr("192.168.7.1"),
            dst_port: 30_080,
            to: addr("10.1.0.1"),
            to_port: 8080,
            second_port: 61_000,
            backend: 3,
            state: FlowState::Established,
            idle_ticks: 10,
            expired: false,
        }
    }

    fn state() -> State {
        let mut state = State::default();
        let name = PortName {
            service: ObjectName::new("default", "web"),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        };
        state.services.insert(7, (&name.to_map(80).unwrap()).into());
        let key = FrontendKey::new(Addr::ANY_V4, 30_080u16.to_be(), TCP);
        state.frontends.insert(key, Frontend { service: 7, flags: FRONTEND_NODE_PORT, affinity_seconds: 0 });
        state.addresses.insert(addr("192.168.7.1"), ADDRESS_NODE);
        state
    }

    #[test]
    fn a_flow_to_a_node_port_names_its_service() {
        let uplink = Uplink { v4: addr("192.168.7.1"), v6: Addr::ANY_V6 };
        let flow = flow_of(&cell(), &state(), &[uplink]);
        let expected = Flow {
            service: Some("default/web".to_owned()),
            port_name: Some("http".to_owned()),
            protocol: "TCP".to_owned(),
            client: "192.0.2.9:40000".to_owned(),
            frontend: "192.168.7.1:30080".to_owned(),
            backend: "10.1.0.1:8080".to_owned(),
            source: Some("192.168.7.1:61000".to_owned()),
            state: "established",
            idle_seconds: 21,
            backend_id: 3,
        };
        assert_eq!(flow, expected);
    }

    #[test]
    fn a_flow_to_another_machine_s_address_is_none_of_a_node_port_s() {
        let cell = Snapshot { dst: addr("192.168.7.99"), ..cell() };
        assert_eq!(flow_of(&cell, &state(), &[]).service, None);
    }

    #[rstest]
    #[case::masqueraded_by_one_of_several(true, 61_000, Some("*:61000"))]
    #[case::as_it_came(false, 40_000, None)]
    #[case::by_another_port(false, 61_000, Some("192.0.2.9:61000"))]
    fn the_source_is_told_where_it_changed(
        #[case] masqueraded: bool,
        #[case] second_port: u16,
        #[case] source: Option<&str>,
    ) {
        let uplinks = ["192.168.7.1", "192.168.8.1"].map(|v4| Uplink { v4: addr(v4), v6: Addr::ANY_V6 });
        let cell = Snapshot { masqueraded, second_port, ..cell() };
        assert_eq!(flow_of(&cell, &state(), &uplinks).source.as_deref(), source);
    }

    #[test]
    fn a_directory_without_pins_is_told_so() {
        let empty = tempfile::tempdir().unwrap();
        let error = Pins::open(empty.path()).unwrap_err().to_string();
        assert!(error.starts_with("nothing is pinned under "), "{error}");
    }
}
