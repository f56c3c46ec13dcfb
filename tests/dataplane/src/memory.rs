//! The engine over memory: what the kernel part's programs do, without a kernel.
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use svc_common::checksum::Diff;
use svc_common::flow::{Sets, TICK_SHIFT};
use svc_common::map::{
    AddressFlags, Affinity, AffinityKey, BackendSlot, CidrFlags, Config, FragmentKey, FragmentPorts, Frontend,
    FrontendKey, Uplink,
};
use svc_common::{Addr, Reason};
use svc_ebpf::family::{ETHERNET, Family};
use svc_ebpf::forward::{Hop, source};
use svc_ebpf::negative;
use svc_ebpf::packet::{Packet, Peer, Pod, Resize};
use svc_ebpf::parse::{From, Headers};
use svc_ebpf::tables::{BackendSet, Tables};
use svc_ebpf::wire::{self, Next, Scratch};
use svc_ebpf::{reject, ticks};

use crate::socket::Socket;
use crate::{Hook, Outcome, Verdict, net};

/// A packet in memory. `PLAIN`: as XDP has it.
struct Frame<'a, const PLAIN: bool> {
    bytes: Vec<u8>,
    interface: u32,
    sockets: &'a [Socket],
}

impl<const PLAIN: bool> Packet for Frame<'_, PLAIN> {
    const PLAIN: bool = PLAIN;

    fn get<T: Pod>(&self, offset: usize) -> Result<T, Reason> {
        let bytes = self.bytes.get(offset..offset + size_of::<T>()).ok_or(Reason::Truncated)?;
        // SAFETY: as many bytes as `T` has, and it takes any.
        Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn set<T: Pod>(&mut self, offset: usize, value: T) -> Result<(), Reason> {
        let bytes = self.bytes.get_mut(offset..offset + size_of::<T>()).ok_or(Reason::Truncated)?;
        // SAFETY: as above.
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
        Ok(())
    }

    fn size(&self) -> u32 {
        self.bytes.len() as u32
    }

    fn ifindex(&self) -> u32 {
        self.interface
    }

    fn has_socket(&self, protocol: u8, remote: Peer, local: Peer) -> bool {
        let [remote, local] = [remote, local].map(|peer| (peer.addr.into(), u16::from_be(peer.port)));
        self.sockets.iter().any(|socket| socket.gets(protocol, remote, local))
    }

    fn patch_l4<F: Family>(&mut self, offset: usize, addresses: Diff, ports: Diff, udp: bool) -> Result<(), Reason> {
        let field: u16 = self.get(offset)?;
        if udp && field == 0 {
            return Ok(());
        }
        let patched = Diff(addresses.0 + ports.0).apply(field);
        self.set(offset, if udp && patched == 0 { 0xffff } else { patched })
    }

    fn route<T: Tables>(&self, tables: &T, _: &Headers, dst: &Addr, hop: &mut Hop) -> Result<(), Reason> {
        hop.ifindex = self.interface;
        let dst = IpAddr::from(*dst);
        let route = net::route(dst).ok_or(Reason::NoRoute)?;
        let mtu = net::interface(route.interface).mtu;
        if self.bytes.len() - ETHERNET > usize::from(mtu) {
            hop.mtu = mtu;
            return Err(Reason::TooBig);
        }
        let mut macs = [0; 6];
        if let Some(bytes) = net::macs(route, dst) {
            for (word, pair) in macs.iter_mut().zip(bytes.chunks_exact(2)) {
                *word = u16::from_ne_bytes([pair[0], pair[1]]);
            }
        }
        *hop = Hop { ifindex: route.interface, macs, mtu: 0, source: source(tables, dst.is_ipv4(), route.interface) };
        // In front of the stack only what leaves by the link it came from, with a neighbour that is known.
        if PLAIN && (!hop.is_resolved() || hop.ifindex != self.interface) { Err(Reason::NoRoute) } else { Ok(()) }
    }
}

impl Resize for Frame<'_, false> {
    fn resize(&mut self, len: u32) -> Result<(), Reason> {
        self.bytes.resize(len as usize, 0);
        Ok(())
    }

    fn set_l4_checksum(&mut self, offset: usize, _: u16, full: u16) -> Result<(), Reason> {
        self.set(offset, full)
    }
}

pub struct Slots(Vec<BackendSlot>);

impl BackendSet for Slots {
    fn slot(&self, index: u32) -> Option<BackendSlot> {
        self.0.get(index as usize).copied()
    }
}

/// Binary logarithm of the negative cache's size.
const NEGATIVE_SHIFT: u32 = 10;

/// The engine's tables, of [`crate::tables::Tables`].
pub struct Memory {
    tables: crate::tables::Tables,
    sets: HashMap<u32, Slots>,
    flows: Sets,
    sockets: Vec<Socket>,
    affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    fragments: RefCell<HashMap<FragmentKey, FragmentPorts>>,
    negative: Box<[Cell<negative::Entry>]>,
    epoch: Cell<u64>,
    port_epochs: Box<[Cell<u32>]>,
    counters: RefCell<BTreeMap<&'static str, u64>>,
    random: Cell<u64>,
    turn: Cell<u32>,
    seconds: Cell<u32>,
    /// Rejections that were sent, and in which tick.
    rejects: Cell<(u32, u32)>,
}

impl Memory {
    /// `seed`: of what the engine chooses at random.
    pub fn new(tables: crate::tables::Tables, seed: u64) -> Self {
        let mut memory = Memory {
            flows: Sets::new(tables.config.flow_sets as usize, tables.config.flow_seed),
            tables: crate::tables::Tables::default(),
            sets: HashMap::new(),
            sockets: Vec::new(),
            affinity: RefCell::default(),
            fragments: RefCell::default(),
            negative: vec![Cell::default(); 1 << NEGATIVE_SHIFT].into(),
            epoch: Cell::new(1),
            port_epochs: vec![Cell::default(); negative::EPOCHS as usize].into(),
            counters: RefCell::default(),
            random: Cell::new(seed),
            turn: Cell::new(0),
            seconds: Cell::new(1000),
            rejects: Cell::default(),
        };
        memory.set_tables(tables);
        memory
    }

    /// Other Services; flows stay.
    pub fn set_tables(&mut self, tables: crate::tables::Tables) {
        let with_header = |slots: &Vec<BackendSlot>| {
            Slots([BackendSlot::header(slots.len() as u32)].into_iter().chain(slots.iter().copied()).collect())
        };
        self.sets = tables.sets.iter().map(|(id, slots)| (*id, with_header(slots))).collect();
        self.tables = tables;
        self.epoch.set(self.epoch.get() + 1);
    }

    /// The node has these sockets from here on.
    pub fn set_sockets(&mut self, sockets: Vec<Socket>) {
        self.sockets = sockets;
    }

    /// Lets this many seconds go by.
    pub fn wait(&self, seconds: u32) {
        self.seconds.set(self.seconds.get() + seconds);
    }

    /// Frees the flows that are over, as the agent does every minute.
    pub fn sweep(&self) {
        self.flows.sweep(self.now());
    }

    pub fn run(&self, hook: Hook, frame: &[u8]) -> Outcome {
        self.counters.borrow_mut().clear();
        let interface = match hook {
            Hook::Xdp | Hook::Ingress | Hook::Egress => net::UPLINK,
            Hook::PodIngress | Hook::PodEgress => net::POD,
        };
        let (bytes, sockets) = (frame.to_vec(), &self.sockets[..]);
        let (verdict, frame) = if hook == Hook::Xdp {
            self.xdp(Frame { bytes, interface, sockets })
        } else {
            self.tc(hook, Frame { bytes, interface, sockets })
        };
        Outcome { verdict, frame, moved: self.counters.take() }
    }

    fn xdp(&self, mut frame: Frame<'_, true>) -> (Verdict, Vec<u8>) {
        if negative::is_known(&frame, self) {
            return (Verdict::Next, frame.bytes);
        }
        let mut scratch = Scratch::default();
        scratch.headers.from = From::Network;
        let next =
            wire::ingress(&frame, self, &mut scratch).and_then(|()| wire::translate(&mut frame, self, &mut scratch));
        let verdict = if next == Ok(Next::Send) { Verdict::Redirect } else { Verdict::Next };
        (verdict, frame.bytes)
    }

    fn tc(&self, hook: Hook, mut frame: Frame<'_, false>) -> (Verdict, Vec<u8>) {
        if negative::is_known(&frame, self) {
            return (Verdict::Next, frame.bytes);
        }
        let mut scratch = Scratch::default();
        let found = match hook {
            Hook::Egress | Hook::PodEgress => wire::egress(&frame, self, &mut scratch, hook == Hook::Egress),
            Hook::PodIngress => {
                scratch.headers.from = From::Pod;
                wire::ingress(&frame, self, &mut scratch)
            }
            Hook::Ingress | Hook::Xdp => {
                scratch.headers.from = From::Network;
                wire::ingress(&frame, self, &mut scratch)
            }
        };
        let next = found.and_then(|()| wire::translate(&mut frame, self, &mut scratch));
        let verdict = match next {
            Ok(Next::Stack) => Verdict::Next,
            Ok(Next::Send | Next::Reenter) => Verdict::Redirect,
            Err(reason) => self.refuse(&mut frame, &scratch, reason),
        };
        (verdict, frame.bytes)
    }

    fn refuse(&self, frame: &mut Frame<'_, false>, scratch: &Scratch, reason: Reason) -> Verdict {
        let verdict = match reason {
            Reason::NotService => return Verdict::Next,
            Reason::NoBackend | Reason::UnknownPort | Reason::TooBig | Reason::HopLimit => {
                if !self.may_reject() {
                    self.count(Reason::RejectLimited, frame.size());
                    return Verdict::Drop;
                }
                match reject::reject(frame, &scratch.headers, &scratch.hop, reason) {
                    Ok(()) => Verdict::Redirect,
                    Err(_) => Verdict::Drop,
                }
            }
            Reason::Truncated | Reason::Unsupported | Reason::FragmentUnknown => Verdict::Next,
            _ => Verdict::Drop,
        };
        self.count(reason, frame.size());
        verdict
    }

    fn may_reject(&self) -> bool {
        let (mut tick, mut sent) = self.rejects.get();
        let has_room = ticks::has_room(&mut tick, &mut sent, u64::from(self.seconds.get()) * 1_000_000_000);
        self.rejects.set((tick, sent));
        has_room
    }
}

/// `length` in bits of the v4-mapped form.
fn is_in(addr: Addr, range: Addr, length: u32) -> bool {
    let bits = |addr: Addr| addr.0.iter().fold(0u128, |bits, word| bits << 32 | u128::from(u32::from_be(*word)));
    length == 0 || (bits(addr) ^ bits(range)) >> (128 - length) == 0
}

impl Tables for Memory {
    type Set = Slots;
    type Flows = Sets;

    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.tables.frontends.get(key).copied()
    }

    fn backend_set(&self, id: u32) -> Option<&Slots> {
        self.sets.get(&id)
    }

    fn is_live(&self, backend: u32) -> bool {
        self.tables.backends.get(&backend).is_some_and(|backend| backend.live != 0)
    }

    fn address(&self, addr: &Addr) -> AddressFlags {
        self.tables.addresses.get(addr).copied().unwrap_or(0)
    }

    fn cidr(&self, addr: Addr) -> CidrFlags {
        let inside = self.tables.cidrs.iter().filter(|(key, _)| is_in(addr, key.addr, key.prefix_len));
        inside.max_by_key(|(key, _)| key.prefix_len).map_or(0, |(_, flags)| *flags)
    }

    fn is_admitted(&self, service: u32, addr: Addr) -> bool {
        let mut ranges = self.tables.source_ranges.iter();
        ranges.any(|range| range.service == service && is_in(addr, range.addr, range.prefix_len - 32))
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.affinity.borrow().get(key).copied()
    }

    fn set_affinity(&self, key: &AffinityKey, affinity: Affinity) {
        self.affinity.borrow_mut().insert(*key, affinity);
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.fragments.borrow().get(key).copied()
    }

    fn set_fragment(&self, key: &FragmentKey, ports: FragmentPorts) {
        self.fragments.borrow_mut().insert(*key, ports);
    }

    fn uplink(&self, ifindex: u32) -> Option<Uplink> {
        self.tables.uplinks.get(&ifindex).copied()
    }

    fn config(&self) -> Config {
        self.tables.config
    }

    fn flows(&self) -> &Sets {
        &self.flows
    }

    fn count(&self, reason: Reason, _: u32) {
        *self.counters.borrow_mut().entry(reason.label()).or_default() += 1;
    }

    fn epoch(&self, place: u32) -> u64 {
        self.epoch.get() << 32 | u64::from(self.port_epochs[place as usize].get())
    }

    fn end_epoch(&self, place: u32) {
        let epoch = &self.port_epochs[place as usize];
        epoch.set(epoch.get() + 1);
    }

    fn negative(&self, hash: u32) -> *mut negative::Entry {
        self.negative[(hash >> (32 - NEGATIVE_SHIFT)) as usize].as_ptr()
    }

    fn now(&self) -> u16 {
        ((u64::from(self.seconds.get()) * 1_000_000_000) >> TICK_SHIFT) as u16
    }

    fn seconds(&self) -> u32 {
        self.seconds.get()
    }

    fn turn(&self) -> u32 {
        self.turn.replace(self.turn.get().wrapping_add(1))
    }

    /// Splitmix64.
    fn random(&self) -> u32 {
        let state = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(state);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) >> 32) as u32
    }
}
