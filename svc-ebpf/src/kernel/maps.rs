//! Every map, and the engine's tables made of them. Sizes are defaults: the agent sets them when it loads the programs.
use aya_ebpf::bindings::{BPF_F_INNER_MAP, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::lpm_trie::Key as LpmKey;
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use aya_ebpf::macros::btf_map;
use svc_common::map::{
    AddressFlags, Affinity, AffinityKey, Backend, BackendSlot, CONFIG_COUNT_BYTES, CidrFlags, CidrKey, Config, Counter,
    FragmentKey, FragmentPorts, Frontend, FrontendKey, MAX_CIDRS, ServiceName, SocketKey, SocketPeer, SourceRangeKey,
    Traffic, Uplink,
};
use svc_common::select::take_turn;
use svc_common::{Addr, Reason, flow};
use svc_ebpf::negative;
use svc_ebpf::open::{Opened, SourcePort, Trial};
use svc_ebpf::parse::Headers;
use svc_ebpf::socket::Request;
use svc_ebpf::tables::{BackendSet, Sockets, Tables};
use svc_ebpf::ticks;
use svc_ebpf::visit::Visit;
use svc_ebpf::wire::Scratch;

use super::{global, monitor};

/// Of words: before Linux 6.2 an array whose values are known to be a struct is not of the same kind as one whose values' type is
/// unknown, and the latter is what the agent puts into `BACKEND_SETS`.
type Slots = Array<[u32; size_of::<BackendSlot>() / 4], 1, { BPF_F_INNER_MAP as usize }>;

/// What only the agent writes takes memory as it is needed, in this map and in others.
const AS_NEEDED: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
static FRONTENDS: HashMap<FrontendKey, Frontend, 65536, AS_NEEDED> = HashMap::new();
#[btf_map]
static BACKEND_SETS: ArrayOfMaps<Slots, 131072> = ArrayOfMaps::new();
#[btf_map]
pub(super) static BACKENDS: Array<Backend, 262144> = Array::new();
#[btf_map]
static ADDRESSES: HashMap<Addr, AddressFlags, 65536, AS_NEEDED> = HashMap::new();
/// Only inspection and a restarted agent read it.
#[btf_map]
static SERVICES: HashMap<u32, ServiceName, 65536, AS_NEEDED> = HashMap::new();
#[btf_map]
static UPLINKS: HashMap<u32, Uplink, 256> = HashMap::new();
#[btf_map]
static CONFIG: Array<Config, 1> = Array::new();
#[btf_map]
static FLOWS: Array<flow::Set, 65536, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static SOCKETS: LruHashMap<SocketKey, SocketPeer, 131072> = LruHashMap::new();
/// The key of [`SourceRangeKey`] is the trie's own form of it; so for `CIDRS`.
#[btf_map]
static SOURCE_RANGES: LpmTrie<[u32; 5], u32, 65536> = LpmTrie::new();
const _: () = assert!(size_of::<LpmKey<[u32; 5]>>() == size_of::<SourceRangeKey>());
#[btf_map]
static CIDRS: LpmTrie<[u32; 4], CidrFlags, MAX_CIDRS> = LpmTrie::new();
const _: () = assert!(size_of::<LpmKey<[u32; 4]>>() == size_of::<CidrKey>());
#[btf_map]
static AFFINITY: LruHashMap<AffinityKey, Affinity, 65536> = LruHashMap::new();
#[btf_map]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, 8192> = LruHashMap::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counter, 32> = PerCpuArray::new();
const _: () = assert!(Reason::ALL.len() <= 32);
/// Of one value only where nothing is counted.
#[btf_map]
static TRAFFIC: PerCpuArray<Traffic, 1> = PerCpuArray::new();
#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 3> = PerCpuArray::new();
#[btf_map]
static TURN: Array<u32, 1> = Array::new();
#[btf_map]
static NEGATIVE: PerCpuArray<[negative::Entry; 512], 2> = PerCpuArray::new();
#[btf_map]
static EPOCH: Array<u32, 1> = Array::new();
#[btf_map]
static PORT_EPOCHS: Array<[u32; negative::EPOCHS as usize], 1> = Array::new();
#[btf_map]
static CROWDED: PerCpuArray<u32, 1> = PerCpuArray::new();
#[btf_map]
static REJECTS: PerCpuArray<Rejects, 1> = PerCpuArray::new();

/// Rejections that this CPU has sent in a tick.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rejects {
    tick: u32,
    sent: u32,
}

/// Whether one more rejection may be sent: a flood of packets to be rejected must not become a flood of answers.
#[inline(always)]
pub(super) fn may_reject() -> bool {
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let Some(rejects) = REJECTS.get_ptr_mut(0) else { return false };
    // SAFETY: this CPU's own.
    let rejects = unsafe { &mut *rejects };
    ticks::has_room(&mut rejects.tick, &mut rejects.sent, now)
}

/// One a hook, since a packet leaving may interrupt nothing but another hook's.
#[derive(Clone, Copy)]
pub(super) enum Hook {
    Xdp = 0,
    Ingress = 1,
    Egress = 2,
}

#[inline(always)]
pub(super) fn scratch<'a>(hook: Hook) -> Option<&'a mut Scratch> {
    // SAFETY: this CPU's own, and one hook's programs do not interrupt each other.
    SCRATCH.get_ptr_mut(hook as u32).map(|scratch| unsafe { &mut *scratch })
}

pub(super) struct Maps;
pub(super) struct Flows;
#[repr(transparent)]
pub(super) struct Set(Slots);

impl BackendSet for Set {
    #[inline(always)]
    fn slot(&self, index: u32) -> Option<BackendSlot> {
        // SAFETY: the agent's, of this size; any bytes are a slot.
        self.0.get(index).map(|words| unsafe { &*words.as_ptr().cast::<BackendSlot>() }).copied()
    }
}

impl flow::Memory for Flows {
    #[inline(always)]
    fn set(&self, index: u32) -> *mut flow::Set {
        let Some(config) = CONFIG.get(0) else { return core::ptr::null_mut() };
        FLOWS.get_ptr_mut(index & config.flow_sets.wrapping_sub(1)).unwrap_or(core::ptr::null_mut())
    }

    #[inline(always)]
    fn seed(&self) -> u64 {
        CONFIG.get(0).map_or(0, |config| config.flow_seed)
    }

    #[inline(always)]
    fn idle_limits(&self) -> *const flow::IdleLimits {
        CONFIG.get(0).map_or(core::ptr::null(), |config| &raw const config.idle_limits)
    }

    #[inline(always)]
    fn crowded(&self) -> *mut u32 {
        CROWDED.get_ptr_mut(0).unwrap_or(core::ptr::null_mut())
    }

    #[inline(always)]
    fn put(&self, entry: &flow::Entry, now: u16, room: flow::Room) -> flow::Added {
        global::put(entry, now, room)
    }

    #[inline(always)]
    fn count(&self, key: &flow::Key) -> u32 {
        global::count(key)
    }

    #[inline(always)]
    unsafe fn victim(&self, set: *const flow::Set, now: u16) -> u32 {
        global::victim(set, now)
    }

    #[inline(always)]
    fn make_room(&self, entry: &flow::Entry, now: u16) {
        global::make_room(entry, now);
    }

    #[inline(always)]
    fn sync(&self, key: &flow::Key, hit: &flow::Hit, now: u16) -> bool {
        global::sync(key, hit, now)
    }

    #[inline(always)]
    fn close(&self, key: &flow::Key, hit: &flow::Hit) {
        global::close(key, hit);
    }

    #[inline(always)]
    fn vacancy(&self, key: &flow::Key, now: u16) -> flow::Vacancy {
        global::vacancy(key, now)
    }

    #[inline(always)]
    fn remove(&self, key: &flow::Key) {
        global::remove(key);
    }
}

impl Tables for Maps {
    type Set = Set;
    type Flows = Flows;

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        // SAFETY: copied at once; a frontend replaced meanwhile is replaced whole, in a new element.
        unsafe { FRONTENDS.get(key) }.copied()
    }

    #[inline(always)]
    fn backend_set(&self, id: u32) -> Option<&Set> {
        // SAFETY: `Set` is transparent, and the set lives until the program ends, whoever swaps it.
        BACKEND_SETS.get(id).map(|set| unsafe { &*(set as *const Slots).cast() })
    }

    #[inline(always)]
    fn is_live(&self, backend: u32) -> bool {
        BACKENDS.get(backend).is_some_and(|backend| backend.live != 0)
    }

    #[inline(always)]
    fn address(&self, addr: &Addr) -> AddressFlags {
        // SAFETY: copied at once.
        unsafe { ADDRESSES.get(addr) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn cidr(&self, addr: Addr) -> CidrFlags {
        CIDRS.get(&LpmKey::new(128, addr.0)).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn is_admitted(&self, service: u32, addr: Addr) -> bool {
        let SourceRangeKey { prefix_len, service, addr: Addr(a) } = SourceRangeKey::new(service, addr, 128);
        SOURCE_RANGES.get(&LpmKey::new(prefix_len, [service, a[0], a[1], a[2], a[3]])).is_some()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: copied at once.
        unsafe { AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, affinity: Affinity) {
        // See `set_peer`.
        let _ = AFFINITY.insert(key, affinity, 0);
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        // SAFETY: copied at once.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn set_fragment(&self, key: &FragmentKey, ports: FragmentPorts) {
        // See `set_peer`.
        let _ = FRAGMENTS.insert(key, ports, 0);
    }

    #[inline(always)]
    fn uplink(&self, ifindex: u32) -> Option<Uplink> {
        // SAFETY: copied at once.
        unsafe { UPLINKS.get(&ifindex) }.copied()
    }

    #[inline(always)]
    fn config(&self) -> Config {
        CONFIG.get(0).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn flows(&self) -> &Flows {
        &Flows
    }

    #[inline(always)]
    fn count(&self, reason: Reason, bytes: u32) {
        #[cfg(feature = "log")]
        super::log::log(reason, bytes);
        if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own.
            unsafe {
                (*counter).packets += 1;
                (*counter).bytes += bytes as u64;
            }
        }
    }

    #[inline(always)]
    fn now(&self) -> u16 {
        // SAFETY: no arguments.
        (unsafe { bpf_ktime_get_coarse_ns() } >> flow::TICK_SHIFT) as u16
    }

    #[inline(always)]
    fn seconds(&self) -> u32 {
        // SAFETY: no arguments.
        (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn turn(&self) -> u32 {
        // SAFETY: the map's only value.
        TURN.get_ptr_mut(0).map_or(0, |turn| unsafe { take_turn(turn) })
    }

    #[inline(always)]
    fn opened(&self, headers: &Headers, hit: &flow::Hit, bytes: u32, ifindex: u32) {
        monitor::opened(headers, hit, bytes, ifindex);
    }

    #[inline(always)]
    fn epoch(&self, place: u32) -> u64 {
        let (Some(agent), Some(ports)) = (EPOCH.get_ptr(0), PORT_EPOCHS.get_ptr(0)) else { return 0 };
        // SAFETY: words that others write; `place` is within the value.
        let (agent, ports) = unsafe {
            (agent.read_volatile(), ports.cast::<u32>().add((place % negative::EPOCHS) as usize).read_volatile())
        };
        if agent & 1 != 0 { 0 } else { (agent as u64) << 32 | ports as u64 }
    }

    #[inline(always)]
    fn end_epoch(&self, place: u32) {
        if let Some(ports) = PORT_EPOCHS.get_ptr_mut(0) {
            // SAFETY: as above.
            unsafe { take_turn(ports.cast::<u32>().add((place % negative::EPOCHS) as usize)) };
        }
    }

    #[inline(always)]
    fn negative(&self, hash: u32) -> *mut negative::Entry {
        super::place(&NEGATIVE, hash).unwrap_or(core::ptr::null_mut())
    }

    #[inline(always)]
    fn carried(&self, hit: &flow::Hit, bytes: u32) {
        if CONFIG.get(0).is_none_or(|config| config.flags & CONFIG_COUNT_BYTES == 0) {
            return;
        }
        let Some(traffic) = TRAFFIC.get_ptr_mut(hit.backend) else { return };
        // SAFETY: this CPU's own.
        unsafe {
            if hit.is_reverse() {
                (*traffic).from_backend += bytes as u64;
            } else {
                (*traffic).to_backend += bytes as u64;
            }
        }
    }

    #[inline(always)]
    fn visit(&self, key: &flow::Key, headers: &Headers, hit: &mut flow::Hit, now: u16) -> Visit {
        global::visit(key, headers, hit, now)
    }

    #[inline(always)]
    fn open(&self, headers: &Headers, key: &flow::Key, hit: &mut flow::Hit) -> Result<(), Reason> {
        global::open(headers, key, hit)
    }

    #[inline(always)]
    fn source_port(&self, headers: &Headers, backend: &BackendSlot) -> SourcePort {
        global::source_port(headers, backend)
    }

    #[inline(always)]
    fn open_by(
        &self,
        headers: &Headers,
        key: &flow::Key,
        backend: &BackendSlot,
        hit: &mut flow::Hit,
        source: SourcePort,
    ) -> Opened {
        global::open_by(headers, key, backend, hit, source)
    }

    #[inline(always)]
    fn try_port(&self, headers: &Headers, backend: &BackendSlot, attempt: u32, half_open: bool) -> Trial {
        global::try_port(headers, backend, attempt, half_open)
    }
}

impl Sockets for Maps {
    #[inline(always)]
    fn peer(&self, key: &SocketKey) -> Option<SocketPeer> {
        // SAFETY: copied at once.
        unsafe { SOCKETS.get(key) }.copied()
    }

    #[inline(always)]
    fn set_peer(&self, key: &SocketKey, peer: &SocketPeer) {
        // An LRU map takes a newcomer always, but for a lock that is held by the very program that was interrupted.
        let _ = SOCKETS.insert(key, peer, 0);
    }

    #[inline(always)]
    fn pointed(&self, request: &Request, peer: &SocketPeer, reason: Reason) {
        monitor::pointed(request, peer, reason);
    }
}
