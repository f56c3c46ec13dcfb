//! What the kernel has and what it should have to the operations between them, in an order that is safe at every step.
use std::collections::BTreeMap;
use std::sync::Arc;

use svc_common::Addr;
use svc_common::map::{
    AddressFlags, Backend, BackendSlot, CidrFlags, CidrKey, Config, Frontend, FrontendKey, SourceRangeKey, Uplink,
};

use crate::dataplane::packed_name::PackedName;
use crate::dataplane::{Op, Part, State};

/// Entries that may differ from what is wanted, as the kernel has them: none where it has no such entry. Any other entry is
/// known to be as wanted.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Before {
    pub frontends: BTreeMap<FrontendKey, Option<Frontend>>,
    pub sets: BTreeMap<u32, Option<Arc<[BackendSlot]>>>,
    pub backends: BTreeMap<u32, Option<Backend>>,
    pub addresses: BTreeMap<Addr, Option<AddressFlags>>,
    pub services: BTreeMap<u32, Option<PackedName>>,
    /// Whether it is there.
    pub source_ranges: BTreeMap<SourceRangeKey, bool>,
    pub cidrs: BTreeMap<CidrKey, Option<CidrFlags>>,
    pub uplinks: BTreeMap<u32, Option<Uplink>>,
    pub config: Option<Config>,
}

impl Before {
    /// Every entry that either of the two has.
    pub fn everything(actual: &State, wanted: &State) -> Self {
        Before {
            frontends: all(&actual.frontends, &wanted.frontends),
            sets: all(&actual.sets, &wanted.sets),
            backends: all(&actual.backends, &wanted.backends),
            addresses: all(&actual.addresses, &wanted.addresses),
            services: all(&actual.services, &wanted.services),
            source_ranges: actual
                .source_ranges
                .union(&wanted.source_ranges)
                .map(|key| (*key, actual.source_ranges.contains(key)))
                .collect(),
            cidrs: all(&actual.cidrs, &wanted.cidrs),
            uplinks: all(&actual.uplinks, &wanted.uplinks),
            config: Some(actual.config),
        }
    }

    /// Entries of `part` in which the two differ. A set that is gone may be there as an empty one.
    pub fn differences(part: &Part, actual: &State, wanted: &State) -> Self {
        let mut before = Before::default();
        match part {
            Part::Frontends => before.frontends = differing(&actual.frontends, &wanted.frontends),
            Part::Sets(ids) => {
                let differs = |id: &&u32| match (actual.sets.get(id), wanted.sets.get(id)) {
                    (Some(set), None) => !set.is_empty(),
                    (actual, wanted) => actual != wanted,
                };
                before.sets = ids.iter().filter(differs).map(|id| (*id, actual.sets.get(id).cloned())).collect();
            }
            Part::Backends(ids) => {
                let differs = |id: &u32| actual.backends.get(id) != wanted.backends.get(id);
                let ids = ids.clone().filter(differs);
                before.backends = ids.map(|id| (id, actual.backends.get(&id).copied())).collect();
            }
            Part::Addresses => before.addresses = differing(&actual.addresses, &wanted.addresses),
            Part::Services => before.services = differing(&actual.services, &wanted.services),
            Part::SourceRanges => {
                let ranges = actual.source_ranges.symmetric_difference(&wanted.source_ranges);
                before.source_ranges = ranges.map(|key| (*key, actual.source_ranges.contains(key))).collect();
            }
            Part::Cidrs => before.cidrs = differing(&actual.cidrs, &wanted.cidrs),
            Part::Config => before.config = Some(actual.config).filter(|config| *config != wanted.config),
            Part::Uplinks => before.uplinks = differing(&actual.uplinks, &wanted.uplinks),
        }
        before
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many entries these are.
    pub fn len(&self) -> usize {
        self.frontends.len()
            + self.sets.len()
            + self.backends.len()
            + self.addresses.len()
            + self.services.len()
            + self.source_ranges.len()
            + self.cidrs.len()
            + self.uplinks.len()
            + usize::from(self.config.is_some())
    }
}

fn all<K: Ord + Copy, V: Clone>(actual: &BTreeMap<K, V>, wanted: &BTreeMap<K, V>) -> BTreeMap<K, Option<V>> {
    actual.keys().chain(wanted.keys()).map(|key| (*key, actual.get(key).cloned())).collect()
}

fn differing<K: Ord + Copy, V: Clone + PartialEq>(
    actual: &BTreeMap<K, V>,
    wanted: &BTreeMap<K, V>,
) -> BTreeMap<K, Option<V>> {
    let mut entries = all(actual, wanted);
    entries.retain(|key, old| old.as_ref() != wanted.get(key));
    entries
}

/// Entries that are to be there and are not so yet.
fn put<'a, K: Ord, V: PartialEq>(
    before: &'a BTreeMap<K, Option<V>>,
    wanted: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    before.iter().filter_map(|(key, old)| Some((key, wanted.get(key).filter(|new| old.as_ref() != Some(new))?)))
}

/// Entries that are there and are not to be.
fn gone<'a, K: Ord, V>(before: &'a BTreeMap<K, Option<V>>, wanted: &'a BTreeMap<K, V>) -> impl Iterator<Item = &'a K> {
    before.iter().filter(|(key, old)| old.is_some() && !wanted.contains_key(key)).map(|(key, _)| key)
}

/// Whatever is referred to is there before what refers to it, and goes after it: new backends, sets, names, source ranges,
/// addresses and last frontends; then frontends go first, and backends die when no set holds them any more. Source ranges
/// go before their service's name, so that no service without a name has some.
pub fn diff(before: &Before, wanted: &State) -> Vec<Op> {
    let mut ops = Vec::new();
    let mut deaths = Vec::new();
    for (id, new) in put(&before.backends, &wanted.backends) {
        let op = Op::PutBackend(*id, *new);
        if new.live == 0 { deaths.push(op) } else { ops.push(op) }
    }
    deaths.extend(gone(&before.backends, &wanted.backends).map(|id| Op::DeleteBackend(*id)));
    ops.extend(put(&before.sets, &wanted.sets).map(|(id, new)| Op::PutSet(*id, Arc::clone(new))));
    ops.extend(put(&before.services, &wanted.services).map(|(id, new)| Op::PutService(*id, new.clone())));
    let ranges = || before.source_ranges.iter().map(|(key, was)| (*key, *was, wanted.source_ranges.contains(key)));
    ops.extend(ranges().filter(|(_, was, is)| !was && *is).map(|(key, ..)| Op::PutSourceRange(key)));
    ops.extend(put(&before.cidrs, &wanted.cidrs).map(|(key, new)| Op::PutCidr(*key, *new)));
    ops.extend(put(&before.uplinks, &wanted.uplinks).map(|(index, new)| Op::PutUplink(*index, *new)));
    if before.config.is_some_and(|config| config != wanted.config) {
        ops.push(Op::PutConfig(wanted.config));
    }
    ops.extend(put(&before.addresses, &wanted.addresses).map(|(addr, new)| Op::PutAddress(*addr, *new)));
    ops.extend(put(&before.frontends, &wanted.frontends).map(|(key, new)| Op::PutFrontend(*key, *new)));

    ops.extend(gone(&before.frontends, &wanted.frontends).map(|key| Op::DeleteFrontend(*key)));
    ops.extend(ranges().filter(|(_, was, is)| *was && !is).map(|(key, ..)| Op::DeleteSourceRange(key)));
    ops.extend(gone(&before.cidrs, &wanted.cidrs).map(|key| Op::DeleteCidr(*key)));
    ops.extend(gone(&before.uplinks, &wanted.uplinks).map(|index| Op::DeleteUplink(*index)));
    ops.extend(gone(&before.addresses, &wanted.addresses).map(|addr| Op::DeleteAddress(*addr)));
    ops.extend(gone(&before.services, &wanted.services).map(|id| Op::DeleteService(*id)));
    ops.extend(gone(&before.sets, &wanted.sets).map(|id| Op::DeleteSet(*id)));
    ops.extend(deaths);
    ops
}
