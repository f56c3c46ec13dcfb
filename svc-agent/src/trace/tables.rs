//! The engine's tables, of what was read from the kernel's: for what a socket hook would say, which cannot be run on a
//! packet.
use std::cell::RefCell;
use std::collections::BTreeMap;

use svc_common::flow::Sets;
use svc_common::map::{
    AddressFlags, Affinity, AffinityKey, BackendSlot, CidrFlags, Config, FragmentKey, FragmentPorts, Frontend,
    FrontendKey, SocketKey, SocketPeer, Uplink,
};
use svc_common::{Addr, Reason};
use svc_ebpf::tables::{BackendSet, Sockets, Tables};

use crate::dataplane::State;

pub struct Slots(Vec<BackendSlot>);

impl BackendSet for Slots {
    fn slot(&self, index: u32) -> Option<BackendSlot> {
        self.0.get(index as usize).copied()
    }
}

/// A node's tables at one moment; what the engine writes is forgotten.
pub struct Known<'a> {
    state: &'a State,
    sets: BTreeMap<u32, Slots>,
    affinity: RefCell<BTreeMap<(u32, Addr), Affinity>>,
    flows: Sets,
    /// Of CLOCK_MONOTONIC.
    seconds: u32,
}

impl<'a> Known<'a> {
    pub fn new(state: &'a State, affinity: &[(AffinityKey, Affinity)], seconds: u32) -> Self {
        let sets = state.sets.iter().map(|(id, slots)| {
            let header = BackendSlot::header(slots.len() as u32);
            (*id, Slots([header].into_iter().chain(slots.iter().copied()).collect()))
        });
        let affinity = affinity.iter().map(|(key, value)| ((key.service, key.client), *value)).collect();
        Known { state, sets: sets.collect(), affinity: RefCell::new(affinity), flows: Sets::new(1, 0), seconds }
    }
}

/// `length` in bits of the v4-mapped form.
fn is_in(addr: Addr, range: Addr, length: u32) -> bool {
    let bits = |addr: Addr| addr.0.iter().fold(0u128, |bits, word| bits << 32 | u128::from(u32::from_be(*word)));
    length == 0 || (bits(addr) ^ bits(range)) >> (128 - length) == 0
}

impl Tables for Known<'_> {
    type Set = Slots;
    type Flows = Sets;

    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.state.frontends.get(key).copied()
    }

    fn backend_set(&self, id: u32) -> Option<&Slots> {
        self.sets.get(&id)
    }

    fn is_live(&self, backend: u32) -> bool {
        self.state.backends.get(&backend).is_some_and(|backend| backend.live != 0)
    }

    fn address(&self, addr: &Addr) -> AddressFlags {
        self.state.addresses.get(addr).copied().unwrap_or(0)
    }

    fn cidr(&self, addr: Addr) -> CidrFlags {
        let around = self.state.cidrs.iter().filter(|(key, _)| is_in(addr, key.addr, key.prefix_len));
        around.max_by_key(|(key, _)| key.prefix_len).map_or(0, |(_, flags)| *flags)
    }

    fn is_admitted(&self, service: u32, addr: Addr) -> bool {
        let mut ranges = self.state.source_ranges.iter().filter(|range| range.service == service);
        ranges.any(|range| is_in(addr, range.addr, range.prefix_len - 32))
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.affinity.borrow().get(&(key.service, key.client)).copied()
    }

    fn set_affinity(&self, key: &AffinityKey, affinity: Affinity) {
        self.affinity.borrow_mut().insert((key.service, key.client), affinity);
    }

    fn fragment(&self, _: &FragmentKey) -> Option<FragmentPorts> {
        None
    }

    fn set_fragment(&self, _: &FragmentKey, _: FragmentPorts) {}

    fn uplink(&self, ifindex: u32) -> Option<Uplink> {
        self.state.uplinks.get(&ifindex).copied()
    }

    fn config(&self) -> Config {
        self.state.config
    }

    fn flows(&self) -> &Sets {
        &self.flows
    }

    fn count(&self, _: Reason, _: u32) {}

    fn now(&self) -> u16 {
        crate::host::flow_tick()
    }

    fn seconds(&self) -> u32 {
        self.seconds
    }

    fn random(&self) -> u32 {
        0
    }

    fn turn(&self) -> u32 {
        0
    }
}

impl Sockets for Known<'_> {
    fn peer(&self, _: &SocketKey) -> Option<SocketPeer> {
        None
    }

    fn set_peer(&self, _: &SocketKey, _: &SocketPeer) {}
}
