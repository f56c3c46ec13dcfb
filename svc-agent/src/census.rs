//! What the kernel part has written by itself, counted when somebody asks for metrics: flows by state, how full the maps are
//! that it fills, and the connections of each Service port.
use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use anyhow::Context as _;
use svc_common::flow::{Snapshot, State};
use svc_common::map::{
    Affinity, AffinityKey, Backend, FragmentKey, FragmentPorts, ServiceName, SocketKey, SocketPeer, Traffic, pin,
};

use crate::plan::PortName;
use crate::sweep;
use crate::sys::{self, Plain};
use crate::traffic::{self, Totals};

/// Entries that are read at once.
const BATCH: usize = 4096;

/// The maps that may be full.
const SIZED: [&str; 11] = [
    pin::FRONTENDS,
    pin::BACKEND_SETS,
    pin::BACKENDS,
    pin::ADDRESSES,
    pin::SERVICES,
    pin::UPLINKS,
    pin::SOURCE_RANGES,
    pin::CIDRS,
    pin::SOCKETS,
    pin::AFFINITY,
    pin::FRAGMENTS,
];

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Census {
    /// Those that live, each once, by [`State`].
    pub flows: [usize; 4],
    /// Entries of the maps that the kernel part writes, the flow table's cells among them.
    pub entries: BTreeMap<&'static str, usize>,
    /// What each map has room for.
    pub max_entries: BTreeMap<&'static str, usize>,
    /// Of ports that had connections, and of which the names are to be told.
    pub ports: Vec<PortCounts>,
    pub counts_bytes: bool,
    /// Service ports that had connections and are not among them.
    pub left_out: usize,
}

#[derive(Clone, PartialEq, Debug)]
pub struct PortCounts {
    pub name: PortName,
    /// Since its id was given to it.
    pub connections: u64,
    /// Since the first look.
    pub traffic: Traffic,
}

impl Census {
    pub const STATES: [State; 4] = [State::New, State::Established, State::Closing, State::Closed];

    /// `maps`: where they are pinned.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn take(maps: &Path, told: &mut Told, totals: &mut Totals) -> anyhow::Result<Self> {
        let open = |name: &str| sys::open_pin(&maps.join(name)).with_context(|| format!("cannot open the map {name}"));
        let mut census = Census::default();
        let mut used = 0;
        let cells = sweep::each_cell(maps, false, |cell, now, limits| {
            // SAFETY: a cell of the table, which the kernel may write.
            let Some(cell) = (unsafe { Snapshot::read(cell, now, limits) }).filter(|cell| !cell.expired) else {
                return;
            };
            used += 1;
            if !cell.reverse {
                census.flows[cell.state as usize] += 1;
            }
        })?;
        census.entries.insert(pin::FLOWS, used);
        census.max_entries.insert(pin::FLOWS, cells);
        for name in SIZED {
            let map = open(name)?;
            census.max_entries.insert(name, sys::map_info(map.as_fd())?.max_entries as usize);
            let used = match name {
                pin::SOCKETS => count::<SocketKey, SocketPeer>(&map)?,
                pin::AFFINITY => count::<AffinityKey, Affinity>(&map)?,
                pin::FRAGMENTS => count::<FragmentKey, FragmentPorts>(&map)?,
                // The agent knows.
                _ => continue,
            };
            census.entries.insert(name, used);
        }

        let services = open(pin::SERVICES)?;
        let name = |id: u32| sys::lookup::<u32, ServiceName>(services.as_fd(), &id).ok();
        let counts = sys::batch_entries::<u32, u64>(open(pin::CONNECTIONS)?.as_fd(), BATCH, |count| *count > 0)?;
        let counts: BTreeMap<u32, u64> = counts.into_iter().collect();
        census.left_out = told.choose(&counts, name);
        let traffic = traffic::read(maps)?;
        census.counts_bytes = traffic.is_some();
        if let Some(traffic) = traffic {
            let backends = open(pin::BACKENDS)?;
            totals.add(traffic, |backend| {
                let service = sys::lookup::<u32, Backend>(backends.as_fd(), &backend).ok()?.service;
                Some((service, name(service)?))
            });
        }
        let of_port = |(id, name): (&u32, &ServiceName)| {
            Some(PortCounts {
                name: PortName::from_map(name)?,
                connections: *counts.get(id)?,
                traffic: totals.of(*id, name),
            })
        };
        census.ports = told.ports.iter().filter_map(of_port).collect();
        Ok(census)
    }
}

/// How many entries a hash map has; none is kept.
fn count<K: Plain, V: Plain>(map: &OwnedFd) -> anyhow::Result<usize> {
    let seen = Cell::new(0);
    sys::batch_entries::<K, V>(map.as_fd(), BATCH, |_| {
        seen.set(seen.get() + 1);
        false
    })?;
    Ok(seen.get())
}

/// The Service ports whose connections are told, as many as there may be. One that was told goes on being told as long as it is
/// there, since a series that comes and goes counts wrong.
#[derive(Clone, Debug, Default)]
pub struct Told {
    most: usize,
    /// By service id.
    ports: BTreeMap<u32, ServiceName>,
}

impl Told {
    pub fn new(most: usize) -> Self {
        Told { most, ports: BTreeMap::new() }
    }

    /// Where there is room, the ports with the most connections are added. Returns how many are left out.
    fn choose(&mut self, counts: &BTreeMap<u32, u64>, name: impl Fn(u32) -> Option<ServiceName>) -> usize {
        // An id may be another Service's by now.
        self.ports.retain(|id, known| counts.contains_key(id) && name(*id).as_ref() == Some(known));
        let others: BTreeSet<(Reverse<u64>, u32)> = counts
            .iter()
            .filter(|(id, _)| !self.ports.contains_key(id))
            .map(|(id, count)| (Reverse(*count), *id))
            .collect();
        let mut left_out = 0;
        for (_, id) in others {
            if self.ports.len() >= self.most {
                left_out += 1;
            } else if let Some(name) = name(id) {
                self.ports.insert(id, name);
            }
        }
        left_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{Family, ObjectName, Protocol};

    fn name(id: u32) -> Option<ServiceName> {
        let port = PortName {
            service: ObjectName::new("default", &format!("s{id}")),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        };
        (id < 10).then(|| port.to_map(80).unwrap())
    }

    fn ids(told: &Told) -> Vec<u32> {
        told.ports.keys().copied().collect()
    }

    #[test]
    fn the_busiest_ports_are_told_and_go_on_being_told() {
        let mut told = Told::new(2);
        assert_eq!(told.choose(&[(1, 5), (2, 9), (3, 7)].into(), name), 1);
        assert_eq!(ids(&told), [2, 3]);
        assert_eq!(told.choose(&[(1, 500), (2, 9), (3, 7)].into(), name), 1);
        assert_eq!(ids(&told), [2, 3]);
    }

    #[test]
    fn a_port_that_is_gone_makes_room() {
        let mut told = Told::new(1);
        told.choose(&[(1, 5)].into(), name);
        assert_eq!(told.choose(&[(1, 6), (2, 1)].into(), |id| name(id + 1)), 1, "the id is another Service's");
        assert_eq!(ids(&told), [1]);
        assert_eq!(told.ports[&1], name(2).unwrap());
        assert_eq!(told.choose(&[(2, 1)].into(), name), 0);
        assert_eq!(ids(&told), [2]);
    }

    #[test]
    fn what_has_no_name_is_not_told() {
        let mut told = Told::new(2);
        assert_eq!(told.choose(&[(77, 5)].into(), name), 0);
        assert_eq!(ids(&told), Vec::<u32>::new());
    }
}
