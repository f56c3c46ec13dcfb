//! What the kernel should have, all Services together: kept up to date one Service at a time, with ids given out and
//! claims on one address settled.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use svc_common::Addr;
use svc_common::map::{
    ADDRESS_CLUSTER_IP, ADDRESS_EXTERNAL, ADDRESS_LOCAL, ADDRESS_NODE, AddressFlags, BACKEND_LOCAL, Backend,
    BackendSlot, CidrFlags, CidrKey, Config, FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_LOCAL, FRONTEND_INTERNAL_LOCAL,
    FRONTEND_KIND, FRONTEND_NODE_PORT, Frontend, FrontendKey, SourceRangeKey, Uplink, cluster_set, local_set,
};

use crate::dataplane::State;
use crate::dataplane::packed_name::PackedName;
use crate::diff::Before;
use crate::ids::Pool;
use crate::memory::repack;
use crate::notes::Reason;
use crate::object::{Family, ObjectName};
use crate::plan::{Plan, PortName, PortPlan, Target, Warning};
use crate::status::WithoutLocal;
use crate::store::Store;

/// How many entries the kernel's maps have room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Ids.
    pub services: u32,
    /// Ids.
    pub backends: u32,
    pub source_ranges: u32,
    pub frontends: u32,
    /// Of Services; the node's own have room beside them.
    pub addresses: u32,
}

/// What a Service may not get enough of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Resource {
    Services,
    Backends,
    SourceRanges,
    Frontends,
    Addresses,
}

/// What a backend id stands for: service id, address, port in network byte order, protocol number. An endpoint that leaves
/// one of its Services is dead to that one's flows, and to no other's.
type BackendKey = (u32, Addr, u16, u8);

#[derive(Debug)]
pub struct Desired {
    limits: Limits,
    state: State,
    /// What changed since it was last asked for; none at first, where everything did.
    before: Option<Before>,
    services: Pool<PortName>,
    backends: Pool<BackendKey>,
    placed: BTreeMap<ObjectName, Placed>,
    /// Who claims a frontend that more than one Service claims.
    contested: BTreeMap<FrontendKey, BTreeSet<ObjectName>>,
    /// How many Services have this address, as a ClusterIP or as an external one.
    service_addresses: BTreeMap<(Addr, AddressFlags), u32>,
    /// Where NodePorts answer.
    node_addresses: BTreeSet<Addr>,
    /// All that this node has.
    local_addresses: BTreeSet<Addr>,
    /// Services that did not get all they need.
    starved: BTreeMap<Resource, BTreeSet<ObjectName>>,
    /// No longer wanted, and yet in the kernel until the next write is through.
    leaving: Leaving,
    live_backends: usize,
    without_local: WithoutLocal,
}

#[derive(Debug, Default)]
struct Leaving {
    frontends: BTreeSet<FrontendKey>,
    addresses: BTreeSet<Addr>,
    source_ranges: BTreeSet<SourceRangeKey>,
}

/// One Service's share, to take it back again.
#[derive(Clone, Debug, Default)]
struct Placed {
    created: i64,
    /// Service ids.
    ports: Vec<u32>,
    source_ranges: BTreeSet<SourceRangeKey>,
    frontends: Vec<(FrontendKey, Frontend)>,
    /// Ascending and without duplicates.
    addresses: Vec<(Addr, AddressFlags)>,
    without_local: WithoutLocal,
}

impl Desired {
    /// Nothing is wanted yet, and what the kernel has keeps its ids.
    pub fn restore(realised: &State, limits: Limits) -> Self {
        let in_limits = |id: &u32| (1..=limits.backends).contains(id);
        let known: BTreeMap<u32, Backend> =
            realised.backends.iter().filter(|(id, _)| in_limits(id)).map(|(id, backend)| (*id, *backend)).collect();
        Desired {
            limits,
            services: Pool::restore(limits.services, realised.port_names()),
            backends: Pool::restore(limits.backends, known.iter().map(|(id, backend)| (*id, backend_key(backend)))),
            state: State {
                backends: known.into_iter().map(|(id, backend)| (id, Backend { live: 0, ..backend })).collect(),
                ..State::default()
            },
            before: None,
            placed: BTreeMap::new(),
            contested: BTreeMap::new(),
            service_addresses: BTreeMap::new(),
            node_addresses: BTreeSet::new(),
            local_addresses: BTreeSet::new(),
            starved: BTreeMap::new(),
            leaving: Leaving {
                frontends: realised.frontends.keys().copied().collect(),
                addresses: realised.addresses.keys().copied().collect(),
                source_ranges: realised.source_ranges.clone(),
            },
            live_backends: 0,
            without_local: WithoutLocal::default(),
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// Backends that some set holds.
    pub fn live_backends(&self) -> usize {
        self.live_backends
    }

    /// Of all Services.
    pub fn without_local(&self) -> WithoutLocal {
        self.without_local
    }

    /// What changed since the last call, as it was then; none at the first call, where everything may differ.
    pub fn take_before(&mut self) -> Option<Before> {
        self.before.replace(Before::default())
    }

    /// All of this is in the kernel: ids that were given back may go to others, and what is gone takes no room.
    pub fn settle(&mut self) {
        self.leaving = Leaving::default();
        self.services.settle();
        self.backends.settle();
    }

    /// Copies all that is large, so that nothing of it is left between what was freed since ([`memory::apart`]), with
    /// the store's names.
    ///
    /// [`memory::apart`]: crate::memory::apart
    pub fn repack(&mut self, store: &Store) {
        let State { frontends, sets, backends, addresses, services, .. } = &mut self.state;
        repack(frontends);
        *sets = sets.iter().map(|(id, set)| (*id, Arc::from(&**set))).collect();
        repack(backends);
        repack(addresses);
        repack(services);
        let renewed = |name: &PortName| PortName {
            service: store.known(&name.service),
            port: store.known_name(&name.port),
            ..name.clone()
        };
        self.services.repack(renewed);
        self.backends.repack(|key| *key);
        self.placed = self.placed.iter().map(|(name, placed)| (store.known(name), placed.clone())).collect();
        repack(&mut self.service_addresses);
    }

    /// Services that should be planned again, since what they lacked has come free.
    pub fn take_starved(&mut self) -> BTreeSet<ObjectName> {
        let free: Vec<Resource> = self.starved.keys().copied().filter(|resource| self.has_room(*resource)).collect();
        free.iter().filter_map(|resource| self.starved.remove(resource)).flatten().collect()
    }

    /// Some Service did not get all it needs, and there is some of it now.
    pub fn is_starved(&self) -> bool {
        self.starved.keys().any(|resource| self.has_room(*resource))
    }

    fn has_room(&self, resource: Resource) -> bool {
        let below = |used: usize, limit: u32| used < limit as usize;
        let Desired { limits, leaving, state, .. } = self;
        match resource {
            Resource::Services => self.services.has_room(),
            Resource::Backends => self.backends.has_room(),
            Resource::SourceRanges => {
                below(state.source_ranges.len() + leaving.source_ranges.len(), limits.source_ranges)
            }
            Resource::Frontends => below(state.frontends.len() + leaving.frontends.len(), limits.frontends),
            Resource::Addresses => below(self.service_address_count() + leaving.addresses.len(), limits.addresses),
        }
    }

    fn service_address_count(&self) -> usize {
        self.state.addresses.len().saturating_sub(self.local_addresses.len())
    }

    pub fn has(&self, service: &ObjectName) -> bool {
        self.placed.contains_key(service)
    }

    /// The sizes of a Service's sets for policy Cluster, together.
    pub fn backend_count(&self, service: &ObjectName) -> usize {
        let sets = self.placed.get(service).into_iter().flat_map(|placed| &placed.ports);
        sets.map(|id| self.state.backend_set(cluster_set(*id)).len()).sum()
    }

    /// Puts a Service's plan in the place of its last one. Returns a warning for each part of it that cannot be had.
    pub fn place(&mut self, service: &ObjectName, plan: &Plan) -> Vec<Warning> {
        let mut warnings = Vec::new();
        let old = self.placed.remove(service).unwrap_or_default();
        let old_backends = self.backends_of(&old);
        self.starved.retain(|_, services| {
            services.remove(service);
            !services.is_empty()
        });
        for key in &old.source_ranges {
            let was = self.state.source_ranges.remove(key);
            note(&mut self.before, |before| &mut before.source_ranges, *key, was);
            self.leaving.source_ranges.insert(*key);
        }

        let mut new = Placed { created: plan.created, without_local: without_local(plan), ..Placed::default() };
        self.count_without_local(old.without_local, new.without_local);
        let mut lacks = BTreeSet::new();
        for port in &plan.ports {
            self.place_port(port, &mut new, &mut warnings, &mut lacks);
        }
        new.ports.shrink_to_fit();
        new.frontends.shrink_to_fit();
        let external = new.frontends.iter().filter(|(_, frontend)| is_external(frontend)).map(|(key, _)| key.addr);
        let cluster_ips = plan.cluster_ips.iter().map(|addr| (*addr, ADDRESS_CLUSTER_IP));
        let addresses: BTreeSet<_> = external.map(|addr| (addr, ADDRESS_EXTERNAL)).chain(cluster_ips).collect();
        new.addresses = addresses.into_iter().collect();
        self.leave_out(&mut new, &mut warnings, &mut lacks);
        for lack in lacks {
            self.starved.entry(lack).or_default().insert(service.clone());
        }

        for address in &new.addresses {
            *self.service_addresses.entry(*address).or_default() += 1;
            self.set_address(address.0);
        }
        for address in &old.addresses {
            if let Some(count) = self.service_addresses.get_mut(address) {
                *count -= 1;
                if *count == 0 {
                    self.service_addresses.remove(address);
                }
            }
            self.set_address(address.0);
        }

        let keys: BTreeSet<FrontendKey> = old.frontends.iter().chain(&new.frontends).map(|(key, _)| *key).collect();
        let claimed: BTreeSet<FrontendKey> = new.frontends.iter().map(|(key, _)| *key).collect();
        let owners: Vec<(FrontendKey, Option<ObjectName>)> =
            keys.into_iter().map(|key| (key, self.owner(&key))).collect();
        if !new.ports.is_empty() || !new.addresses.is_empty() {
            self.placed.insert(service.clone(), new);
        }
        for (key, owner) in owners {
            if let Some(other) = self.settle_claims(key, owner, service, claimed.contains(&key)) {
                let (addr, port) = (key.addr, u16::from_be(key.port));
                let text = format!("{addr} port {port} is Service {other}'s, which is older").into();
                warnings.push(Warning { reason: Some(Reason::AddressConflict), text });
            }
        }

        for key in old_backends {
            if let Some(id) = self.backends.release(&key)
                && let Some(backend) = self.state.backends.get_mut(&id)
            {
                note(&mut self.before, |before| &mut before.backends, id, Some(*backend));
                backend.live = 0;
                self.live_backends -= 1;
            }
        }
        for id in old.ports {
            let Some(name) = self.state.port_name(id) else { continue };
            if self.services.release(&name).is_some() {
                let old = self.state.services.remove(&id);
                note(&mut self.before, |before| &mut before.services, id, old);
                self.set_set(cluster_set(id), None);
                self.set_set(local_set(id), None);
            }
        }
        warnings
    }

    /// Places one port, with as many of its backends as get an id.
    fn place_port(
        &mut self,
        port: &PortPlan,
        new: &mut Placed,
        warnings: &mut Vec<Warning>,
        lacks: &mut BTreeSet<Resource>,
    ) {
        let Ok(map_name) = port.name.to_map(port.port) else { return };
        let id = match self.services.hold(&port.name) {
            Ok(id) => id,
            Err(full) => {
                warnings.push(format!("port {:?} is not served: {full} (--max-services)", port.name.port).into());
                lacks.insert(Resource::Services);
                return;
            }
        };
        let mut ids: BTreeMap<(Addr, u16), u32> = BTreeMap::new();
        let mut missing = 0;
        let targets: BTreeSet<&Target> = port.cluster.iter().chain(port.local.iter().flatten()).collect();
        for target in targets {
            let (addr, number, protocol) = (target.addr, target.port, port.name.protocol.number());
            let Ok(backend) = self.backends.hold(&(id, addr, number, protocol)) else {
                missing += 1;
                continue;
            };
            let value = Backend { addr, port: number, protocol, live: 1, service: id };
            let old = self.state.backends.insert(backend, value);
            self.live_backends += usize::from(old.is_none_or(|old| old.live == 0));
            note(&mut self.before, |before| &mut before.backends, backend, old);
            ids.insert((addr, number), backend);
        }
        if missing > 0 {
            lacks.insert(Resource::Backends);
            warnings.push(
                format!("port {:?} lacks {missing} backends: all ids are taken (--max-backends)", port.name.port)
                    .into(),
            );
        }
        let slots = |targets: &[Target]| -> Arc<[BackendSlot]> {
            let slots = targets.iter().filter_map(|target| {
                let flags = if target.local { BACKEND_LOCAL } else { 0 };
                let id = *ids.get(&(target.addr, target.port))?;
                Some((id, BackendSlot { addr: target.addr, port: target.port, flags, id }))
            });
            slots.collect::<BTreeMap<_, _>>().into_values().collect()
        };
        let mut refused = 0;
        for (addr, len) in &port.source_ranges {
            let key = SourceRangeKey::new(id, *addr, *len);
            if !self.leaving.source_ranges.remove(&key) && !self.has_room(Resource::SourceRanges) {
                refused += 1;
                continue;
            }
            let is_new = self.state.source_ranges.insert(key);
            note(&mut self.before, |before| &mut before.source_ranges, key, !is_new);
            new.source_ranges.insert(key);
        }
        if refused > 0 {
            lacks.insert(Resource::SourceRanges);
            warnings.push(
                format!("port {:?} lacks {refused} source ranges: the kernel's map is full", port.name.port).into(),
            );
        }
        self.set_set(cluster_set(id), Some(slots(&port.cluster)));
        self.set_set(local_set(id), port.local.as_deref().map(slots));
        let old = self.state.services.insert(id, PackedName::from(&map_name));
        note(&mut self.before, |before| &mut before.services, id, old);
        new.ports.push(id);
        new.frontends.extend(port.frontends.iter().map(|frontend| {
            let value = Frontend { service: id, flags: frontend.flags, affinity_seconds: frontend.affinity_seconds };
            (frontend.key, value)
        }));
    }

    fn count_without_local(&mut self, old: WithoutLocal, new: WithoutLocal) {
        let all = &mut self.without_local;
        for family in 0..2 {
            all.internal[family] = all.internal[family] - old.internal[family] + new.internal[family];
            all.external[family] = all.external[family] - old.external[family] + new.external[family];
        }
    }

    /// Takes out of `new` what the kernel's maps have no room for: an address with all its ports, or a port of one.
    fn leave_out(&self, new: &mut Placed, warnings: &mut Vec<Warning>, lacks: &mut BTreeSet<Resource>) {
        let room = |used: usize, limit: u32| (limit as usize).saturating_sub(used);
        let used = self.service_address_count() + self.leaving.addresses.len();
        let mut left = room(used, self.limits.addresses);
        let in_kernel = |addr: &Addr| self.state.addresses.contains_key(addr) || self.leaving.addresses.contains(addr);
        let mut refused: BTreeSet<Addr> = BTreeSet::new();
        for addr in new.addresses.iter().map(|(addr, _)| *addr).collect::<BTreeSet<_>>() {
            if in_kernel(&addr) {
                continue;
            }
            match left.checked_sub(1) {
                Some(less) => left = less,
                None => drop(refused.insert(addr)),
            }
        }
        if !refused.is_empty() {
            lacks.insert(Resource::Addresses);
            new.addresses.retain(|(addr, _)| !refused.contains(addr));
            new.frontends.retain(|(key, _)| !refused.contains(&key.addr));
            let text = format!(
                "{} of its addresses are not served: the kernel's map is full (--max-frontends)",
                refused.len()
            );
            warnings.push(text.into());
        }

        let mut left = room(self.state.frontends.len() + self.leaving.frontends.len(), self.limits.frontends);
        let before = new.frontends.len();
        new.frontends.retain(|(key, _)| {
            if self.state.frontends.contains_key(key) || self.leaving.frontends.contains(key) {
                return true;
            }
            let fits = left > 0;
            left -= usize::from(fits);
            fits
        });
        let refused = before - new.frontends.len();
        if refused > 0 {
            lacks.insert(Resource::Frontends);
            let text = format!(
                "{refused} of its addresses and ports are not served: the kernel's map is full (--max-frontends)"
            );
            warnings.push(text.into());
        }
    }

    /// NodePorts answer on `node_ports` of the node's addresses, which are `local`.
    pub fn set_node_addresses(&mut self, node_ports: BTreeSet<Addr>, local: BTreeSet<Addr>) {
        let mut touched = std::mem::replace(&mut self.node_addresses, node_ports);
        touched.append(&mut std::mem::replace(&mut self.local_addresses, local));
        touched.extend(self.node_addresses.union(&self.local_addresses));
        for addr in touched {
            self.set_address(addr);
        }
    }

    pub fn set_cidrs(&mut self, cidrs: BTreeMap<CidrKey, CidrFlags>) {
        let old = std::mem::replace(&mut self.state.cidrs, cidrs);
        if let Some(before) = &mut self.before {
            note_all(&mut before.cidrs, &old, &self.state.cidrs);
        }
    }

    pub fn set_config(&mut self, config: Config) {
        if let Some(before) = &mut self.before {
            before.config.get_or_insert(self.state.config);
        }
        self.state.config = config;
    }

    /// By interface index.
    pub fn set_uplinks(&mut self, uplinks: BTreeMap<u32, Uplink>) {
        let old = std::mem::replace(&mut self.state.uplinks, uplinks);
        if let Some(before) = &mut self.before {
            note_all(&mut before.uplinks, &old, &self.state.uplinks);
        }
    }

    fn set_address(&mut self, addr: Addr) {
        let flag = |is: bool, flag: AddressFlags| if is { flag } else { 0 };
        let service = |kind: AddressFlags| flag(self.service_addresses.contains_key(&(addr, kind)), kind);
        let flags = service(ADDRESS_CLUSTER_IP)
            | service(ADDRESS_EXTERNAL)
            | flag(self.node_addresses.contains(&addr), ADDRESS_NODE)
            | flag(self.local_addresses.contains(&addr), ADDRESS_LOCAL);
        let old = if flags != 0 {
            self.leaving.addresses.remove(&addr);
            self.state.addresses.insert(addr, flags)
        } else {
            let old = self.state.addresses.remove(&addr);
            self.leaving.addresses.extend(old.map(|_| addr));
            old
        };
        note(&mut self.before, |before| &mut before.addresses, addr, old);
    }

    fn set_set(&mut self, id: u32, set: Option<Arc<[BackendSlot]>>) {
        let old = match set {
            Some(set) => self.state.sets.insert(id, set),
            None => self.state.sets.remove(&id),
        };
        note(&mut self.before, |before| &mut before.sets, id, old);
    }

    /// One key for each time that this Service holds a backend.
    fn backends_of(&self, placed: &Placed) -> Vec<BackendKey> {
        let mut keys = Vec::new();
        for id in &placed.ports {
            let sets = [cluster_set(*id), local_set(*id)].map(|set| self.state.backend_set(set));
            let unique: BTreeSet<(Addr, u16)> = sets.into_iter().flatten().map(|slot| (slot.addr, slot.port)).collect();
            let protocol = self.state.services.get(id).map_or(0, |name| name.unpack().protocol());
            keys.extend(unique.into_iter().map(|(addr, port)| (*id, addr, port, protocol)));
        }
        keys
    }

    /// The Service whose frontend stands in the state now.
    fn owner(&self, key: &FrontendKey) -> Option<ObjectName> {
        Some(self.state.port_name(self.state.frontends.get(key)?.service)?.service)
    }

    /// Gives a frontend to the first of those that claim it: a ClusterIP before any other kind, then the older Service,
    /// then the lesser name. Returns the Service that has it instead of `service`, where that one claims it.
    fn settle_claims(
        &mut self,
        key: FrontendKey,
        owner: Option<ObjectName>,
        service: &ObjectName,
        claims: bool,
    ) -> Option<ObjectName> {
        let mut claimers = self.contested.remove(&key).unwrap_or_else(|| owner.into_iter().collect());
        if claims {
            claimers.insert(service.clone());
        } else {
            claimers.remove(service);
        }
        let winner = claimers
            .iter()
            .filter_map(|name| {
                let placed = self.placed.get(name)?;
                let (_, frontend) = placed.frontends.iter().find(|(other, _)| *other == key)?;
                let cluster_ip = frontend.flags & FRONTEND_KIND == FRONTEND_CLUSTER_IP;
                Some(((!cluster_ip, placed.created, name), *frontend))
            })
            .min_by(|(one, _), (other, _)| one.cmp(other))
            .map(|((_, _, name), frontend)| (name.clone(), frontend));
        if claimers.len() > 1 {
            self.contested.insert(key, claimers);
        }
        let old = match &winner {
            Some((_, frontend)) => {
                self.leaving.frontends.remove(&key);
                self.state.frontends.insert(key, *frontend)
            }
            None => {
                let old = self.state.frontends.remove(&key);
                self.leaving.frontends.extend(old.map(|_| key));
                old
            }
        };
        note(&mut self.before, |before| &mut before.frontends, key, old);
        let (name, _) = winner?;
        (claims && name != *service).then_some(name)
    }
}

/// How an entry was at first.
fn note<K: Ord, V>(before: &mut Option<Before>, part: impl FnOnce(&mut Before) -> &mut BTreeMap<K, V>, key: K, old: V) {
    if let Some(before) = before {
        part(before).entry(key).or_insert(old);
    }
}

/// Every entry that either of the two has, as `old` has it.
fn note_all<K: Ord + Copy, V: Copy>(before: &mut BTreeMap<K, Option<V>>, old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) {
    for key in old.keys().chain(new.keys()) {
        before.entry(*key).or_insert_with(|| old.get(key).copied());
    }
}

/// Of one Service.
fn without_local(plan: &Plan) -> WithoutLocal {
    let mut counts = WithoutLocal::default();
    let is_without = |port: &&PortPlan| port.local.as_ref().is_some_and(Vec::is_empty) && !port.cluster.is_empty();
    for port in plan.ports.iter().filter(is_without) {
        let has = |flag: u32, cluster_ip: bool| {
            let mut frontends = port.frontends.iter();
            frontends.any(|it| it.flags & flag != 0 && (it.flags & FRONTEND_KIND == FRONTEND_CLUSTER_IP) == cluster_ip)
        };
        let family = usize::from(port.name.family == Family::V6);
        counts.internal[family] += usize::from(has(FRONTEND_INTERNAL_LOCAL, true));
        counts.external[family] += usize::from(has(FRONTEND_EXTERNAL_LOCAL, false));
    }
    counts
}

/// Has an address of its own that is no ClusterIP.
fn is_external(frontend: &Frontend) -> bool {
    !matches!(frontend.flags & FRONTEND_KIND, FRONTEND_CLUSTER_IP | FRONTEND_NODE_PORT)
}

fn backend_key(backend: &Backend) -> BackendKey {
    (backend.service, backend.addr, backend.port, backend.protocol)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use svc_common::map::{FRONTEND_EXTERNAL_IP, TCP};

    use super::*;
    use crate::object::Protocol;
    use crate::plan::FrontendPlan;

    const ROOM: Limits = Limits { services: 9, backends: 9, source_ranges: 9, frontends: 9, addresses: 9 };

    /// One port at a ClusterIP and at so many external addresses.
    fn plan(number: u32, external: u32) -> (ObjectName, Plan) {
        let name = ObjectName::new("default", &format!("s{number}"));
        let frontend = |addr: u32, flags: u32| FrontendPlan {
            key: FrontendKey::new(Addr::v4(addr), 80u16.to_be(), TCP),
            flags,
            affinity_seconds: 0,
        };
        let cluster_ip = frontend(number, FRONTEND_CLUSTER_IP);
        let others = (0..external).map(|other| frontend(number * 100 + other, FRONTEND_EXTERNAL_IP));
        let port = PortPlan {
            name: PortName { service: name.clone(), port: "".into(), protocol: Protocol::Tcp, family: Family::V4 },
            port: 80,
            frontends: [cluster_ip].into_iter().chain(others).collect(),
            source_ranges: BTreeSet::new(),
            cluster: vec![],
            local: None,
        };
        (name, Plan { ports: vec![port], cluster_ips: vec![Addr::v4(number)], ..Plan::default() })
    }

    fn place(desired: &mut Desired, number: u32, external: u32) -> Vec<String> {
        let (name, plan) = plan(number, external);
        desired.place(&name, &plan).iter().map(|warning| warning.text.to_string()).collect()
    }

    #[rstest]
    #[case::frontends(Limits { frontends: 4, ..ROOM }, "2 of its addresses and ports are not served")]
    #[case::addresses(Limits { addresses: 4, ..ROOM }, "2 of its addresses are not served")]
    fn what_has_no_room_is_told_costs_others_nothing_and_comes_when_there_is_some(
        #[case] limits: Limits,
        #[case] told: &str,
    ) {
        let mut desired = Desired::restore(&State::default(), limits);
        assert_eq!(place(&mut desired, 1, 0), Vec::<String>::new());
        let warnings = place(&mut desired, 2, 4);
        assert!(warnings.len() == 1 && warnings[0].starts_with(told), "{warnings:?}");
        assert!(warnings[0].contains("--max-frontends"), "{warnings:?}");
        assert_eq!(desired.state().frontends.len(), 4);
        assert!(!desired.is_starved());

        // The other's room is free once the kernel has forgotten it, and not before.
        let (name, _) = plan(1, 0);
        desired.place(&name, &Plan::default());
        assert!(!desired.is_starved());
        desired.settle();
        assert_eq!(desired.take_starved(), [plan(2, 4).0].into());
        let warnings = place(&mut desired, 2, 4);
        assert!(warnings.len() == 1 && warnings[0].starts_with('1'), "{warnings:?}");
        assert_eq!(desired.state().frontends.len(), 4);
    }
}
