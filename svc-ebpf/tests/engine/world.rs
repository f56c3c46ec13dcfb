//! Packets and tables in memory.
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use svc_common::checksum::{Diff, fold, sum};
use svc_common::flow::{IdleLimits, Sets};
use svc_common::map::{
    AddressFlags, Affinity, AffinityKey, BACKEND_LOCAL, BackendSlot, CidrFlags, Config, FragmentKey, FragmentPorts,
    Frontend, FrontendKey, TCP, UDP, Uplink, cluster_set, local_set,
};
use svc_common::{Addr, Reason};
use svc_ebpf::family::Family;
use svc_ebpf::forward::{Hop, source};
use svc_ebpf::negative;
use svc_ebpf::packet::{Packet, Peer, Pod};
use svc_ebpf::parse::{From, Headers};
use svc_ebpf::tables::{BackendSet, Tables};
use svc_ebpf::wire::{self, Next, Scratch};

pub(crate) fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Frame {
    pub(crate) bytes: Vec<u8>,
    /// Ports that sockets of the node have, in host byte order.
    pub(crate) sockets: std::ops::Range<u16>,
}

impl Frame {
    fn new(src: &str, dst: &str, protocol: u8, segment: &[u8]) -> Self {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        let length = (20 + segment.len()) as u16;
        bytes.extend([0x45, 0]);
        bytes.extend(length.to_be_bytes());
        bytes.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
        for text in [src, dst] {
            bytes.extend(text.parse::<std::net::Ipv4Addr>().unwrap().octets());
        }
        bytes.extend(segment);
        let mut frame = Frame { bytes, sockets: 0..0 };
        let header = !fold(sum(&frame.bytes[14..34]));
        frame.bytes[24..26].copy_from_slice(&header.to_ne_bytes());
        let at = if protocol == TCP { 50 } else { 40 };
        let full = !fold(frame.transport_sum());
        frame.bytes[at..at + 2].copy_from_slice(&full.to_ne_bytes());
        frame
    }

    pub(crate) fn tcp(src: &str, sport: u16, dst: &str, dport: u16, flags: u8) -> Self {
        let mut segment = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
        segment.extend([0, 0, 0, 9, 0, 0, 0, 0, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        segment.extend(b"hello!");
        Frame::new(src, dst, TCP, &segment)
    }

    pub(crate) fn udp(src: &str, sport: u16, dst: &str, dport: u16) -> Self {
        let mut segment = [sport.to_be_bytes(), dport.to_be_bytes(), 14u16.to_be_bytes(), [0, 0]].concat();
        segment.extend(b"hello!");
        Frame::new(src, dst, UDP, &segment)
    }

    fn transport_sum(&self) -> u64 {
        let segment = &self.bytes[34..];
        sum(&self.bytes[26..34]) + sum(&[0, self.bytes[23]]) + sum(&(segment.len() as u16).to_be_bytes()) + sum(segment)
    }

    pub(crate) fn checksums_are_right(&self) -> bool {
        fold(sum(&self.bytes[14..34])) == 0xffff && fold(self.transport_sum()) == 0xffff
    }

    pub(crate) fn endpoints(&self) -> (String, u16, String, u16) {
        let ip = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&self.bytes[at..at + 4]).unwrap()).to_string();
        let port = |at: usize| u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]]);
        (ip(26), port(34), ip(30), port(36))
    }

    pub(crate) fn hop_limit(&self) -> u8 {
        self.bytes[22]
    }

    pub(crate) fn set_hop_limit(&mut self, limit: u8) {
        self.bytes[22] = limit;
        self.bytes[24..26].fill(0);
        let header = !fold(sum(&self.bytes[14..34]));
        self.bytes[24..26].copy_from_slice(&header.to_ne_bytes());
    }
}

impl Packet for Frame {
    const PLAIN: bool = false;

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
        2
    }

    fn has_socket(&self, _: u8, _: Peer, local: Peer) -> bool {
        self.sockets.contains(&u16::from_be(local.port))
    }

    fn patch_l4<F: Family>(&mut self, offset: usize, addresses: Diff, ports: Diff, udp: bool) -> Result<(), Reason> {
        let field: u16 = self.get(offset)?;
        if udp && field == 0 {
            return Ok(());
        }
        self.set(offset, Diff(addresses.0 + ports.0).apply(field))
    }

    fn route<T: Tables>(&self, tables: &T, _: &Headers, dst: &Addr, hop: &mut Hop) -> Result<(), Reason> {
        *hop = Hop { ifindex: 2, macs: [1, 2, 3, 4, 5, 6], mtu: 0, source: source(tables, dst.is_v4(), 2) };
        Ok(())
    }
}

pub(crate) struct Slots(Vec<BackendSlot>);

impl BackendSet for Slots {
    fn slot(&self, index: u32) -> Option<BackendSlot> {
        self.0.get(index as usize).copied()
    }
}

pub(crate) struct World {
    frontends: HashMap<FrontendKey, Frontend>,
    sets: HashMap<u32, Slots>,
    ids: BTreeMap<Addr, u32>,
    live: HashMap<u32, bool>,
    addresses: HashMap<Addr, AddressFlags>,
    pub(crate) cidrs: Vec<(Addr, u32, CidrFlags)>,
    pub(crate) ranges: Vec<(u32, Addr, u32)>,
    affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    fragments: RefCell<HashMap<FragmentKey, FragmentPorts>>,
    negative: Cell<negative::Entry>,
    epoch: Cell<u64>,
    port_epochs: Box<[Cell<u32>]>,
    pub(crate) flags: u32,
    /// Of services to come.
    pub(crate) affinity_seconds: u32,
    pub(crate) seconds: Cell<u32>,
    flows: Sets,
    counters: RefCell<BTreeMap<u32, u64>>,
    random: Cell<u64>,
    pub(crate) ticks: Cell<u16>,
    turn: Cell<u32>,
}

impl Default for World {
    fn default() -> Self {
        World {
            frontends: HashMap::new(),
            sets: HashMap::new(),
            ids: BTreeMap::new(),
            live: HashMap::new(),
            addresses: HashMap::new(),
            cidrs: Vec::new(),
            ranges: Vec::new(),
            affinity: RefCell::default(),
            fragments: RefCell::default(),
            negative: Cell::default(),
            epoch: Cell::new(1),
            port_epochs: vec![Cell::default(); negative::EPOCHS as usize].into(),
            flags: 0,
            affinity_seconds: 0,
            seconds: Cell::new(1000),
            flows: Sets::new(1 << 14, 0x1234_5678_9abc_def1),
            counters: RefCell::default(),
            random: Cell::new(1),
            ticks: Cell::new(7),
            turn: Cell::new(0),
        }
    }
}

impl World {
    pub(crate) fn address(&mut self, text: &str, flags: AddressFlags) {
        self.addresses.insert(addr(text), flags);
    }

    /// Backends on port 9376: their addresses, and whether they are on this node.
    pub(crate) fn service(
        &mut self,
        id: u32,
        frontend: &str,
        port: u16,
        protocol: u8,
        flags: u32,
        backends: &[(&str, bool)],
    ) {
        let slots: Vec<_> = backends
            .iter()
            .map(|(text, local)| {
                let next = self.ids.len() as u32 + 1;
                let id = *self.ids.entry(addr(text)).or_insert(next);
                self.live.insert(id, true);
                let flags = if *local { BACKEND_LOCAL } else { 0 };
                BackendSlot { addr: addr(text), port: 9376u16.to_be(), flags, id }
            })
            .collect();
        let set = |slots: Vec<BackendSlot>| {
            Slots([BackendSlot::header(slots.len() as u32)].into_iter().chain(slots).collect())
        };
        let local = slots.iter().copied().filter(|slot| slot.flags & BACKEND_LOCAL != 0).collect();
        self.sets.insert(cluster_set(id), set(slots));
        self.sets.insert(local_set(id), set(local));
        let key = FrontendKey::new(addr(frontend), port.to_be(), protocol);
        let affinity_seconds = self.affinity_seconds;
        self.frontends.insert(key, Frontend { service: id, flags, affinity_seconds });
    }

    pub(crate) fn kill(&mut self, backend: &str) {
        self.live.insert(self.ids[&addr(backend)], false);
    }

    /// From the network.
    pub(crate) fn ingress(&self, frame: &mut impl Packet) -> Result<Next, Reason> {
        self.come_in(frame, From::Network)
    }

    pub(crate) fn pod_ingress(&self, frame: &mut impl Packet) -> Result<Next, Reason> {
        self.come_in(frame, From::Pod)
    }

    fn come_in(&self, frame: &mut impl Packet, from: From) -> Result<Next, Reason> {
        let mut scratch = Scratch::default();
        scratch.headers.from = from;
        wire::ingress(frame, self, &mut scratch)?;
        wire::translate(frame, self, &mut scratch)
    }

    /// To the network.
    pub(crate) fn egress(&self, frame: &mut impl Packet) -> Result<Next, Reason> {
        self.go_out(frame, true)
    }

    pub(crate) fn pod_egress(&self, frame: &mut impl Packet) -> Result<Next, Reason> {
        self.go_out(frame, false)
    }

    fn go_out(&self, frame: &mut impl Packet, host: bool) -> Result<Next, Reason> {
        let mut scratch = Scratch::default();
        wire::egress(frame, self, &mut scratch, host)?;
        wire::translate(frame, self, &mut scratch)
    }

    /// Whether the packet is known to be no Service's.
    pub(crate) fn is_known(&self, frame: &Frame) -> bool {
        negative::is_known(frame, self)
    }

    /// The agent has written.
    pub(crate) fn end_epochs(&self) {
        self.epoch.set(self.epoch.get() + 1);
    }

    /// That it is no Service's is found out where it comes in from the network.
    pub(crate) fn meet(&self, frame: &Frame) {
        assert_eq!(wire::ingress(frame, self, &mut Scratch::default()), Err(Reason::NotService));
    }

    pub(crate) fn counts(&self) -> Vec<(Reason, u64)> {
        let counters = self.counters.borrow();
        counters.iter().map(|(index, count)| (Reason::from_index(*index).unwrap(), *count)).collect()
    }
}

/// `len` in bits of the v4-mapped form.
fn in_range(addr: Addr, range: Addr, len: u32) -> bool {
    let bits = |addr: Addr| {
        let [a, b] = addr.pairs();
        u128::from_be_bytes([a.to_ne_bytes(), b.to_ne_bytes()].concat().try_into().unwrap())
    };
    let shift = 128 - len;
    len == 0 || bits(addr) >> shift == bits(range) >> shift
}

impl Tables for World {
    type Set = Slots;
    type Flows = Sets;

    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.frontends.get(key).copied()
    }

    fn backend_set(&self, id: u32) -> Option<&Slots> {
        self.sets.get(&id)
    }

    fn is_live(&self, backend: u32) -> bool {
        self.live.get(&backend) == Some(&true)
    }

    fn address(&self, addr: &Addr) -> AddressFlags {
        self.addresses.get(addr).copied().unwrap_or(0)
    }

    fn cidr(&self, addr: Addr) -> CidrFlags {
        let inside = self.cidrs.iter().filter(|(range, len, _)| in_range(addr, *range, *len));
        inside.max_by_key(|(_, len, _)| *len).map_or(0, |(_, _, flags)| *flags)
    }

    fn is_admitted(&self, service: u32, addr: Addr) -> bool {
        self.ranges.iter().any(|(of, range, len)| *of == service && in_range(addr, *range, *len))
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

    fn seconds(&self) -> u32 {
        self.seconds.get()
    }

    fn uplink(&self, _: u32) -> Option<Uplink> {
        Some(Uplink { v4: addr("192.0.2.1"), v6: addr("2001:db8::1") })
    }

    fn config(&self) -> Config {
        Config {
            host_netns: 1,
            flow_seed: 0,
            flow_sets: 16,
            snat_first: 15_000,
            snat_last: 29_999,
            flags: self.flags,
            uplink: 2,
            uplink_mac: [9, 9, 9],
            pad: 0,
            idle_limits: IdleLimits::default(),
        }
    }

    fn flows(&self) -> &Sets {
        &self.flows
    }

    fn count(&self, reason: Reason, _: u32) {
        *self.counters.borrow_mut().entry(reason as u32).or_default() += 1;
    }

    fn epoch(&self, place: u32) -> u64 {
        self.epoch.get() << 32 | u64::from(self.port_epochs[place as usize].get())
    }

    fn end_epoch(&self, place: u32) {
        let epoch = &self.port_epochs[place as usize];
        epoch.set(epoch.get() + 1);
    }

    /// One place for all.
    fn negative(&self, _: u32) -> *mut negative::Entry {
        self.negative.as_ptr()
    }

    fn now(&self) -> u16 {
        self.ticks.get()
    }

    fn turn(&self) -> u32 {
        self.turn.replace(self.turn.get().wrapping_add(1))
    }

    fn random(&self) -> u32 {
        // splitmix64.
        let state = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(state);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) as u32
    }
}
