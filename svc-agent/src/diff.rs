//! What the kernel has and what it should have to the operations between them, in an order that is safe at every step.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use svc_common::Addr;
use svc_common::map::{CidrKey, FrontendKey, SourceRangeKey};

use crate::dataplane::{Op, Part, State};

/// Entries that may differ. Any other entry is known to be equal.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Touched {
    pub frontends: BTreeSet<FrontendKey>,
    pub sets: BTreeSet<u32>,
    pub backends: BTreeSet<u32>,
    pub addresses: BTreeSet<Addr>,
    pub services: BTreeSet<u32>,
    pub source_ranges: BTreeSet<SourceRangeKey>,
    pub cidrs: BTreeSet<CidrKey>,
    pub uplinks: BTreeSet<u32>,
    pub config: bool,
}

impl Touched {
    /// Every entry that either of the two has.
    pub fn everything(realised: &State, wanted: &State) -> Self {
        Touched {
            frontends: realised.frontends.keys().chain(wanted.frontends.keys()).copied().collect(),
            sets: realised.sets.keys().chain(wanted.sets.keys()).copied().collect(),
            backends: realised.backends.keys().chain(wanted.backends.keys()).copied().collect(),
            addresses: realised.addresses.keys().chain(wanted.addresses.keys()).copied().collect(),
            services: realised.services.keys().chain(wanted.services.keys()).copied().collect(),
            source_ranges: realised.source_ranges.union(&wanted.source_ranges).copied().collect(),
            cidrs: realised.cidrs.keys().chain(wanted.cidrs.keys()).copied().collect(),
            uplinks: realised.uplinks.keys().chain(wanted.uplinks.keys()).copied().collect(),
            config: true,
        }
    }

    pub fn extend(&mut self, other: Touched) {
        self.frontends.extend(other.frontends);
        self.sets.extend(other.sets);
        self.backends.extend(other.backends);
        self.addresses.extend(other.addresses);
        self.services.extend(other.services);
        self.source_ranges.extend(other.source_ranges);
        self.cidrs.extend(other.cidrs);
        self.uplinks.extend(other.uplinks);
        self.config |= other.config;
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Entries of `part` in which the two differ. A set that is gone may be there as an empty one.
    pub fn differences(part: &Part, actual: &State, known: &State) -> Self {
        let mut touched = Touched::default();
        match part {
            Part::Frontends => touched.frontends = differing(&actual.frontends, &known.frontends),
            Part::Sets(ids) => {
                let differs = |id: &&u32| match (actual.sets.get(id), known.sets.get(id)) {
                    (Some(set), None) => !set.is_empty(),
                    (actual, known) => actual != known,
                };
                touched.sets = ids.iter().filter(differs).copied().collect();
            }
            Part::Backends(ids) => {
                let differs = |id: &u32| actual.backends.get(id) != known.backends.get(id);
                touched.backends = ids.clone().filter(differs).collect();
            }
            Part::Addresses => touched.addresses = differing(&actual.addresses, &known.addresses),
            Part::Services => touched.services = differing(&actual.services, &known.services),
            Part::SourceRanges => {
                touched.source_ranges =
                    actual.source_ranges.symmetric_difference(&known.source_ranges).copied().collect();
            }
            Part::Cidrs => touched.cidrs = differing(&actual.cidrs, &known.cidrs),
            Part::Config => touched.config = actual.config != known.config,
            Part::Uplinks => touched.uplinks = differing(&actual.uplinks, &known.uplinks),
        }
        touched
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
            + usize::from(self.config)
    }
}

fn differing<K: Ord + Copy, V: PartialEq>(one: &BTreeMap<K, V>, other: &BTreeMap<K, V>) -> BTreeSet<K> {
    one.keys().chain(other.keys()).filter(|key| one.get(key) != other.get(key)).copied().collect()
}

/// Whatever is referred to is there before what refers to it, and goes after it: new backends, sets, names, source ranges,
/// addresses and last frontends; then frontends go first, and backends die when no set holds them any more. Source ranges
/// go before their service's name, so that no service without a name has some.
pub fn diff(realised: &State, wanted: &State, touched: &Touched) -> Vec<Op> {
    let mut ops = Vec::new();
    let mut deaths = Vec::new();
    for id in &touched.backends {
        match (realised.backends.get(id), wanted.backends.get(id)) {
            (old, Some(new)) if old != Some(new) => {
                let op = Op::PutBackend(*id, *new);
                if new.live == 0 { deaths.push(op) } else { ops.push(op) }
            }
            (Some(_), None) => deaths.push(Op::DeleteBackend(*id)),
            _ => {}
        }
    }
    for id in &touched.sets {
        if let Some(new) = wanted.sets.get(id).filter(|new| realised.sets.get(id) != Some(new)) {
            ops.push(Op::PutSet(*id, Arc::clone(new)));
        }
    }
    for id in &touched.services {
        if let Some(new) = wanted.services.get(id).filter(|new| realised.services.get(id) != Some(new)) {
            ops.push(Op::PutService(*id, Arc::clone(new)));
        }
    }
    let new = touched.source_ranges.iter().filter(|key| !realised.source_ranges.contains(key));
    ops.extend(new.filter(|key| wanted.source_ranges.contains(key)).map(|key| Op::PutSourceRange(*key)));
    for key in &touched.cidrs {
        if let Some(new) = wanted.cidrs.get(key).filter(|new| realised.cidrs.get(key) != Some(new)) {
            ops.push(Op::PutCidr(*key, *new));
        }
    }
    for index in &touched.uplinks {
        if let Some(new) = wanted.uplinks.get(index).filter(|new| realised.uplinks.get(index) != Some(new)) {
            ops.push(Op::PutUplink(*index, *new));
        }
    }
    if touched.config && realised.config != wanted.config {
        ops.push(Op::PutConfig(wanted.config));
    }
    for addr in &touched.addresses {
        if let Some(new) = wanted.addresses.get(addr).filter(|new| realised.addresses.get(addr) != Some(new)) {
            ops.push(Op::PutAddress(*addr, *new));
        }
    }
    for key in &touched.frontends {
        if let Some(new) = wanted.frontends.get(key).filter(|new| realised.frontends.get(key) != Some(new)) {
            ops.push(Op::PutFrontend(*key, *new));
        }
    }

    let gone = |key: &FrontendKey| realised.frontends.contains_key(key) && !wanted.frontends.contains_key(key);
    ops.extend(touched.frontends.iter().filter(|key| gone(key)).map(|key| Op::DeleteFrontend(*key)));
    let gone = |key: &SourceRangeKey| realised.source_ranges.contains(key) && !wanted.source_ranges.contains(key);
    ops.extend(touched.source_ranges.iter().filter(|key| gone(key)).map(|key| Op::DeleteSourceRange(*key)));
    let gone = |key: &CidrKey| realised.cidrs.contains_key(key) && !wanted.cidrs.contains_key(key);
    ops.extend(touched.cidrs.iter().filter(|key| gone(key)).map(|key| Op::DeleteCidr(*key)));
    let gone = |index: &u32| realised.uplinks.contains_key(index) && !wanted.uplinks.contains_key(index);
    ops.extend(touched.uplinks.iter().filter(|index| gone(index)).map(|index| Op::DeleteUplink(*index)));
    let gone = |addr: &Addr| realised.addresses.contains_key(addr) && !wanted.addresses.contains_key(addr);
    ops.extend(touched.addresses.iter().filter(|addr| gone(addr)).map(|addr| Op::DeleteAddress(*addr)));
    let gone = |id: &u32| realised.services.contains_key(id) && !wanted.services.contains_key(id);
    ops.extend(touched.services.iter().filter(|id| gone(id)).map(|id| Op::DeleteService(*id)));
    let gone = |id: &u32| realised.sets.contains_key(id) && !wanted.sets.contains_key(id);
    ops.extend(touched.sets.iter().filter(|id| gone(id)).map(|id| Op::DeleteSet(*id)));
    ops.extend(deaths);
    ops
}
