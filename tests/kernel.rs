//! The kernel part's programs in a network namespace of their own, over tables that a test writes itself: no agent and no
//! other host. Nothing is pinned or attached, so that nothing is left behind.
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{MapData, RingBuf};
use aya::programs::Program;
use aya::util::nr_cpus;
use aya::{Ebpf, EbpfLoader};
use svc_agent::dataplane::aya::OBJECT;
use svc_agent::sys::{self, Plain};
use svc_agent::traffic;
use svc_common::map::{
    AddressFlags, Affinity, AffinityKey, BackendSlot, CidrFlags, CidrKey, Counter, EVENTS_SIZE, Event, FragmentKey,
    FragmentPorts, Frontend, FrontendKey, HopLease, Monitor, SourceRangeKey, Told, Traffic, local_set,
};
use svc_common::{Addr, Reason};
use svc_dataplane::packet::TCP;
use svc_dataplane::socket::Socket;
use svc_dataplane::tables::Tables;
use svc_dataplane::{Hook, Outcome, Verdict, net};
use svc_model::case::Case;
use svc_model::run::{self, Clock, Subject, Tally};

use crate::test_run::{self, Context, Ran};

pub struct Kernel {
    ebpf: Ebpf,
    namespace: fs::File,
    sizes: Sizes,
    /// As many sets may have flows.
    used_sets: u32,
    /// As they are in the kernel.
    backend_sets: BTreeMap<u32, Vec<BackendSlot>>,
    counted: BTreeMap<&'static str, u64>,
    /// Of what is known of next hops.
    generation: u32,
    /// The agent's, for the negative cache.
    epoch: u32,
    sockets: Vec<socket2::Socket>,
}

/// Who is told of events.
pub struct Listener {
    ring: RingBuf<MapData>,
    lost_before: u64,
}

/// Entries that the maps have room for.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub flow_sets: u32,
    pub services: u32,
    pub backends: u32,
}

/// As much as a test may ask for.
pub const SIZES: Sizes = Sizes { flow_sets: 1 << 15, services: 500, backends: 4096 };

static KERNEL: Mutex<Option<Kernel>> = Mutex::new(None);

/// What a set of the flow table is made of, for the map.
#[derive(Clone, Copy)]
struct FlowSet(#[expect(dead_code, reason = "only its size matters")] [u64; 32]);
// SAFETY: integers.
unsafe impl Plain for FlowSet {}

/// Of a piece of a datagram that waits for the first one: the datagram and an index.
#[derive(Clone, Copy, PartialEq)]
struct PieceKey([u32; 11]);
// SAFETY: integers.
unsafe impl Plain for PieceKey {}

/// Its length and bytes.
#[derive(Clone, Copy)]
struct Piece(#[expect(dead_code, reason = "only its size matters")] [u32; 2305]);
// SAFETY: integers.
unsafe impl Plain for Piece {}

/// Runs `test` on a node with these tables and no flows, inside its network namespace. One runs at a time.
///
/// # Panics
/// Where `test` does, or where the kernel refuses something.
pub fn with<T: Send>(tables: &Tables, test: impl FnOnce(&mut Kernel) -> T + Send) -> T {
    aside(|| inside(tables, test))
}

/// As [`with`], on a node of its own, with maps of these sizes.
///
/// # Panics
/// As [`with`].
pub fn with_sizes<T: Send>(sizes: Sizes, tables: &Tables, test: impl FnOnce(&mut Kernel) -> T + Send) -> T {
    aside(|| {
        let mut kernel = Kernel::new(sizes);
        kernel.forget();
        kernel.routes_changed();
        kernel.set_tables(tables);
        test(&mut kernel)
    })
}

/// On a thread of its own: a caller's network namespace stays what it was.
fn aside<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    let result = thread::scope(|scope| scope.spawn(run).join());
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn inside<T>(tables: &Tables, test: impl FnOnce(&mut Kernel) -> T) -> T {
    // A test that failed leaves nothing that the next one does not overwrite.
    let mut guard = KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
    let kernel = match guard.as_mut() {
        Some(kernel) => {
            kernel.enter();
            kernel
        }
        None => guard.insert(Kernel::new(SIZES)),
    };
    kernel.forget();
    kernel.routes_changed();
    kernel.used_sets = 0;
    kernel.set_tables(tables);
    test(kernel)
}

impl Kernel {
    /// Of the calling thread, which is in the node's network namespace from here on.
    fn new(sizes: Sizes) -> Self {
        // SAFETY: flags only; the thread is a test's own.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "a new network namespace needs root");
        let namespace = fs::File::open("/proc/thread-self/ns/net").unwrap();
        interfaces();
        let mut loader = EbpfLoader::new();
        loader.btf(None).map_max_entries("FLOWS", sizes.flow_sets).map_max_entries("BACKENDS", sizes.backends);
        loader.map_max_entries("BACKEND_SETS", local_set(sizes.services) + 1).map_max_entries("SOCKETS", 1024);
        loader.map_max_entries("FRONTENDS", 2 * sizes.services).map_max_entries("ADDRESSES", 2 * sizes.services);
        loader.map_max_entries("TRAFFIC", sizes.backends);
        let mut ebpf = loader.load(OBJECT).unwrap();
        for hook in Hook::ALL {
            match ebpf.program_mut(hook.program()).unwrap() {
                Program::Xdp(program) => program.load().unwrap(),
                Program::SchedClassifier(program) => program.load().unwrap(),
                other => panic!("{hook:?} is of an unknown type, {:?}", other.prog_type()),
            }
        }
        Kernel {
            ebpf,
            namespace,
            sizes,
            used_sets: 0,
            backend_sets: BTreeMap::new(),
            counted: BTreeMap::new(),
            generation: 0,
            epoch: 0,
            sockets: Vec::new(),
        }
    }

    fn enter(&self) {
        // SAFETY: a descriptor of our own.
        assert_eq!(unsafe { libc::setns(self.namespace.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
    }

    fn map(&self, name: &str) -> BorrowedFd<'_> {
        let map: &MapData = match self.ebpf.map(name).unwrap() {
            aya::maps::Map::Array(map)
            | aya::maps::Map::ArrayOfMaps(map)
            | aya::maps::Map::HashMap(map)
            | aya::maps::Map::LpmTrie(map)
            | aya::maps::Map::LruHashMap(map)
            | aya::maps::Map::PerCpuArray(map) => map,
            other => panic!("{name} is of an unknown type: {other:?}"),
        };
        map.fd().as_fd()
    }

    fn replace<K: Plain + PartialEq, V: Plain>(&self, name: &str, wanted: &[(K, V)]) {
        let info = sys::map_info(self.map(name)).unwrap();
        let sizes = (size_of::<K>(), size_of::<V>());
        assert_eq!((info.key_size as usize, info.value_size as usize), sizes, "{name}");
        for (key, _) in sys::entries::<K, V>(self.map(name)).unwrap() {
            if !wanted.iter().any(|(other, _)| *other == key) {
                sys::delete(self.map(name), &key).unwrap();
            }
        }
        for (key, value) in wanted {
            sys::update(self.map(name), key, value).unwrap();
        }
    }

    /// Other Services; flows stay.
    pub fn set_tables(&mut self, tables: &Tables) {
        self.slip_in(tables);
        self.epoch += 2;
        sys::update(self.map("EPOCH"), &0u32, &self.epoch).unwrap();
    }

    /// As [`Kernel::set_tables`], but nothing tells the programs that what they have found to be no Service's may be one's now.
    pub fn slip_in(&mut self, tables: &Tables) {
        assert!(tables.config.flow_sets <= self.sizes.flow_sets);
        self.used_sets = self.used_sets.max(tables.config.flow_sets);
        for (id, backend) in &tables.backends {
            sys::update(self.map("BACKENDS"), id, backend).unwrap();
        }
        // A write waits until nobody reads the old set any more: 8 ms for any number of them.
        let changed = tables.sets.iter().filter(|(id, slots)| self.backend_sets.get(id) != Some(*slots));
        let changed: Vec<_> = changed.collect();
        // A descriptor for each, until it is in the map.
        for sets in changed.chunks(256) {
            let create = |(id, slots): &(&u32, &Vec<BackendSlot>)| {
                let header = BackendSlot::header(slots.len() as u32);
                let slots: Vec<_> = [header].into_iter().chain(slots.iter().copied()).collect();
                (**id, sys::create_inner_array(&slots).unwrap())
            };
            let (ids, created): (Vec<_>, Vec<_>) = sets.iter().map(create).unzip();
            let descriptors: Vec<_> = created.iter().map(|set| set.as_raw_fd() as u32).collect();
            sys::update_batch(self.map("BACKEND_SETS"), &ids, &descriptors).unwrap();
        }
        self.backend_sets.extend(tables.sets.clone());
        let addresses: Vec<(Addr, AddressFlags)> = tables.addresses.iter().map(|(key, value)| (*key, *value)).collect();
        self.replace("ADDRESSES", &addresses);
        let frontends: Vec<(FrontendKey, Frontend)> =
            tables.frontends.iter().map(|(key, value)| (*key, *value)).collect();
        self.replace("FRONTENDS", &frontends);
        let ranges: Vec<(SourceRangeKey, u32)> = tables.source_ranges.iter().map(|key| (*key, 1)).collect();
        self.replace("SOURCE_RANGES", &ranges);
        let cidrs: Vec<(CidrKey, CidrFlags)> = tables.cidrs.iter().map(|(key, value)| (*key, *value)).collect();
        self.replace("CIDRS", &cidrs);
        let uplinks: Vec<_> = tables.uplinks.iter().map(|(key, value)| (*key, *value)).collect();
        self.replace("UPLINKS", &uplinks);
        sys::update(self.map("CONFIG"), &0u32, &tables.config).unwrap();
    }

    /// All flows, what clients are known by, pieces of datagrams, and sockets.
    pub fn forget(&mut self) {
        self.sockets.clear();
        let indices: Vec<u32> = (0..self.used_sets).collect();
        for indices in indices.chunks(1 << 13) {
            sys::update_batch(self.map("FLOWS"), indices, &vec![FlowSet([0; 32]); indices.len()]).unwrap();
        }
        self.replace::<AffinityKey, Affinity>("AFFINITY", &[]);
        self.replace::<FragmentKey, FragmentPorts>("FRAGMENTS", &[]);
        self.replace::<PieceKey, Piece>("PIECES_KEPT", &[]);
        self.counted = self.counters();
    }

    /// Tells the programs that next hops they know may be others now, and that they may keep those that they learn.
    pub fn routes_changed(&mut self) {
        self.generation += 1;
        self.lend(HopLease { until: u64::MAX, generation: self.generation, pad: 0 });
    }

    /// From here on no next hop is kept.
    pub fn keep_no_hops(&mut self) {
        self.lend(HopLease::default());
    }

    fn lend(&self, lease: HopLease) {
        sys::update(self.map("HOP_LEASE"), &0u32, &lease).unwrap();
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let cpus = nr_cpus().unwrap();
        let total = |reason: &Reason| {
            let values = sys::lookup_per_cpu::<u32, Counter>(self.map("COUNTERS"), &(*reason as u32), cpus).unwrap();
            values.iter().map(|counter| counter.packets).sum()
        };
        Reason::ALL.iter().map(|reason| (reason.label(), total(reason))).collect()
    }

    /// What becomes of a frame at this hook.
    pub fn run(&mut self, hook: Hook, frame: &[u8]) -> Outcome {
        self.run_segments(hook, frame, 0, 0)
    }

    /// As [`Kernel::run`], of a packet that stands for `segments` of `size` bytes of payload each (GSO).
    pub fn run_segments(&mut self, hook: Hook, frame: &[u8], segments: u32, segment_size: u32) -> Outcome {
        let ran = self.pass(hook, frame, Context { segments, segment_size, ..Context::default() });
        // linux/bpf.h: TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT; XDP_PASS, XDP_TX.
        let verdict = match (hook == Hook::Xdp, ran.verdict) {
            (false, u32::MAX) | (true, 2) => Verdict::Next,
            (false, 2) => Verdict::Drop,
            (false, 7) | (true, 3) => Verdict::Redirect,
            other => panic!("{hook:?}: the verdict {other:?}"),
        };
        Outcome { verdict, frame: ran.packet, moved: self.moved() }
    }

    /// A frame that stays as it is, over and over on one CPU; how far each counter moved.
    pub fn flood(&mut self, hook: Hook, frame: &[u8], times: u32) -> BTreeMap<&'static str, u64> {
        // Of what is limited by time others have used nothing up, nor are they to find it so.
        const LONGER_THAN_A_TICK: Duration = Duration::from_millis(200);
        thread::sleep(LONGER_THAN_A_TICK);
        self.pass(hook, frame, Context { repeat: times, ..Context::default() });
        thread::sleep(LONGER_THAN_A_TICK);
        self.moved()
    }

    fn pass(&self, hook: Hook, frame: &[u8], context: Context) -> Ran {
        let interface = match hook {
            Hook::Xdp | Hook::Ingress | Hook::Egress => net::UPLINK,
            Hook::PodIngress | Hook::PodEgress => net::POD,
        };
        let context = Context { xdp: hook == Hook::Xdp, interface, ..context };
        test_run::run(self.program(hook), context, frame)
            .unwrap_or_else(|error| panic!("{hook:?}, {} bytes: {error}", frame.len()))
    }

    /// # Panics
    /// Never: all are loaded.
    pub fn program(&self, hook: Hook) -> BorrowedFd<'_> {
        match self.ebpf.program(hook.program()).unwrap() {
            Program::Xdp(program) => program.fd().unwrap().as_fd(),
            Program::SchedClassifier(program) => program.fd().unwrap().as_fd(),
            other => panic!("{hook:?} is of an unknown type, {:?}", other.prog_type()),
        }
    }

    /// As `svc-agent monitor` does it: from here on, and `until` then in nanoseconds of CLOCK_MONOTONIC, these reasons' events are
    /// told, [`svc_common::Reason::bit`]s.
    pub fn listen(&mut self, until: u64, reasons: u32) -> Listener {
        let ring = sys::create_ring_buffer(EVENTS_SIZE as u32).unwrap();
        sys::update(self.map("EVENTS"), &0u32, &(ring.as_raw_fd() as u32)).unwrap();
        sys::update(self.map("MONITORS"), &0u32, &Monitor { until, reasons, pad: 0 }).unwrap();
        let ring = aya::maps::Map::RingBuf(MapData::from_fd(ring).unwrap());
        Listener { ring: ring.try_into().unwrap(), lost_before: self.lost() }
    }

    fn lost(&self) -> u64 {
        let told: Vec<Told> = sys::lookup_per_cpu(self.map("EVENTS_TOLD"), &0u32, nr_cpus().unwrap()).unwrap();
        told.iter().map(|told| told.lost).sum()
    }

    /// What was told, and how many events were left out; nobody listens any more.
    pub fn told(&mut self, mut listener: Listener) -> (Vec<Event>, u64) {
        sys::update(self.map("MONITORS"), &0u32, &Monitor::default()).unwrap();
        let mut events = Vec::new();
        while let Some(item) = listener.ring.next() {
            assert_eq!(item.len(), size_of::<Event>());
            // SAFETY: of this size, and any bytes are an event.
            events.push(unsafe { item.as_ptr().cast::<Event>().read_unaligned() });
        }
        (events, self.lost() - listener.lost_before)
    }

    /// Flows opened and sockets pointed at a backend, by service id.
    pub fn connections(&self, service: u32) -> u64 {
        sys::lookup(self.map("CONNECTIONS"), &service).unwrap()
    }

    /// Bytes to and from a backend, by its id.
    pub fn traffic(&self, backend: u32) -> Traffic {
        let values = sys::lookup_per_cpu(self.map("TRAFFIC"), &backend, nr_cpus().unwrap()).unwrap();
        values.iter().fold(Traffic::default(), |sum, cpu| traffic::plus(&sum, cpu))
    }

    /// How far each counter has moved since it was last asked for.
    pub fn moved(&mut self) -> BTreeMap<&'static str, u64> {
        let now = self.counters();
        let moved = now.iter().map(|(label, count)| (*label, count - self.counted[label]));
        let moved = moved.filter(|(_, count)| *count > 0).collect();
        self.counted = now;
        moved
    }
}

/// A case beside the model. No time goes by in it but what it takes.
///
/// # Errors
/// As [`svc_model::run::check`].
pub fn check(case: &Case, tally: &mut Tally) -> Result<(), String> {
    with(&case.world.tables(), |node| run::check(case, node, tally))
}

impl Subject for Kernel {
    const KEEPS_PIECES: bool = true;
    /// Several times what all processors send while it takes.
    const FLOOD: u32 = 20_000;

    fn clock(&self) -> Clock {
        Clock::Runs { cpus: nr_cpus().unwrap() as u32 }
    }

    fn flood(&mut self, hook: Hook, frame: &[u8], times: u32) -> (BTreeMap<&'static str, u64>, Duration) {
        let start = Instant::now();
        (Kernel::flood(self, hook, frame, times), start.elapsed())
    }

    fn set_sockets(&mut self, sockets: &[Socket]) {
        // A port is free once more before another one is to have it.
        self.sockets.clear();
        self.sockets = sockets.iter().map(open_socket).collect();
    }

    fn run(&mut self, hook: Hook, frame: &[u8]) -> Outcome {
        Kernel::run(self, hook, frame)
    }

    fn set_tables(&mut self, tables: &Tables) {
        Kernel::set_tables(self, tables);
    }

    fn wait(&mut self, seconds: u32) {
        assert_eq!(seconds, 0, "the kernel's clock cannot be put forward");
    }
}

fn open_socket(socket: &Socket) -> socket2::Socket {
    let Socket { protocol, local, peer } = *socket;
    let family = socket2::Domain::for_address(local.into());
    let kind = if protocol == TCP { socket2::Type::STREAM } else { socket2::Type::DGRAM };
    let opened = socket2::Socket::new(family, kind, None).unwrap();
    if local.0.is_ipv6() {
        opened.set_only_v6(true).unwrap();
    }
    opened.bind(&SocketAddr::from(local).into()).unwrap();
    match peer {
        Some(peer) => {
            // Nobody is there to answer TCP's: it goes on connecting.
            opened.set_nonblocking(true).unwrap();
            let connected = opened.connect(&SocketAddr::from(peer).into());
            assert!(connected.is_ok() || protocol == TCP, "{socket:?}: {connected:?}");
        }
        None if protocol == TCP => opened.listen(1).unwrap(),
        None => (),
    }
    opened
}

/// What comes in by an interface, from here on.
pub struct Tap(OwnedFd);

impl Tap {
    /// # Panics
    /// Where the kernel refuses.
    pub fn new(interface: u32) -> Self {
        const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();
        let wait = libc::timeval { tv_sec: 2, tv_usec: 0 };
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ALL,
            sll_ifindex: interface as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: a new descriptor of our own, and buffers that outlive the calls.
        unsafe {
            let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(ALL));
            assert!(socket >= 0, "{}", io::Error::last_os_error());
            let size = size_of_val(&wait) as u32;
            let set = libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const wait).cast(), size);
            assert_eq!(set, 0, "{}", io::Error::last_os_error());
            let size = size_of_val(&address) as u32;
            assert_eq!(libc::bind(socket, (&raw const address).cast(), size), 0, "{}", io::Error::last_os_error());
            Tap(OwnedFd::from_raw_fd(socket))
        }
    }

    /// The next frame from this host, if any comes in the next seconds.
    pub fn frame_from(&self, source: IpAddr) -> Option<Vec<u8>> {
        let mut buffer = [0u8; 2048];
        loop {
            // SAFETY: the buffer is as long as is said.
            let length = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let frame = &buffer[..usize::try_from(length).ok()?];
            let is_ip = matches!(frame[12..14], [8, 0] | [0x86, 0xdd]);
            if is_ip && svc_dataplane::check::view(frame).src == source {
                return Some(frame.to_vec());
            }
        }
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The network of [`net`], in the thread's namespace.
fn interfaces() {
    for (setting, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/all/accept_dad", "0"),
    ] {
        fs::write(format!("/proc/sys/net/{setting}"), value).unwrap();
    }
    let mac = |bytes: [u8; 6]| bytes.map(|byte| format!("{byte:02x}")).join(":");
    for interface in &net::INTERFACES {
        let (index, name) = (interface.index, interface.name);
        ip(&format!(
            "link add {name} index {index} mtu {} address {} type veth peer name {name}-peer",
            interface.mtu,
            mac(interface.mac)
        ));
        ip(&format!("link set {name}-peer up"));
        ip(&format!("link set {name} up"));
        for address in interface.addresses {
            ip(&format!("address add {address} dev {name}{}", if address.contains(':') { " nodad" } else { "" }));
        }
    }
    let mut known = Vec::new();
    for route in &net::ROUTES {
        let name = net::interface(route.interface).name;
        match route.gateway {
            Some(gateway) => {
                ip(&format!("route add {} via {gateway} dev {name}", route.prefix));
                if let Some(last) = route.neighbour {
                    known.push((gateway, name, net::neighbour_mac(route.interface, last)));
                }
            }
            None => ip(&format!("route add {} dev {name}", route.prefix)),
        }
    }
    for pod in net::PODS {
        let route = net::route(pod.parse::<IpAddr>().unwrap()).unwrap();
        known.push((pod, net::interface(net::POD).name, net::neighbour_mac(net::POD, route.neighbour.unwrap())));
    }
    for (address, name, bytes) in known {
        ip(&format!("neighbour replace {address} lladdr {} dev {name} nud permanent", mac(bytes)));
    }
}
