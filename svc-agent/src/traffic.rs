//! Bytes to and from backends, where `--count-bytes` has them counted.
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::Context as _;
use svc_common::map::{ServiceName, Traffic, pin};

use crate::sys;

/// Backends that are read at once.
const BATCH: usize = 1024;

/// What was counted so far of each backend that had any, by its id; none where nothing is counted. `maps`: where they are
/// pinned.
///
/// # Errors
/// Where the map cannot be read.
pub fn read(maps: &Path) -> anyhow::Result<Option<BTreeMap<u32, Traffic>>> {
    let path = maps.join(pin::TRAFFIC);
    let read = || -> io::Result<_> {
        let map = sys::open_pin(&path)?;
        if sys::map_info(map.as_fd())?.max_entries == 1 {
            return Ok(None);
        }
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        let mut counted = BTreeMap::new();
        sys::each_per_cpu(map.as_fd(), cpus, BATCH, |backend, of_cpus: &[Traffic]| {
            let sum = of_cpus.iter().fold(Traffic::default(), |sum, cpu| plus(&sum, cpu));
            if sum != Traffic::default() {
                counted.insert(backend, sum);
            }
        })?;
        Ok(Some(counted))
    };
    read().with_context(|| format!("cannot read the map {}", path.display()))
}

pub fn plus(one: &Traffic, other: &Traffic) -> Traffic {
    Traffic {
        to_backend: one.to_backend.wrapping_add(other.to_backend),
        from_backend: one.from_backend.wrapping_add(other.from_backend),
    }
}

/// What came between two looks. A count that has gone back was begun anew.
fn since(before: &Traffic, now: &Traffic) -> Traffic {
    let difference = |before: u64, now: u64| now.checked_sub(before).unwrap_or(now);
    Traffic {
        to_backend: difference(before.to_backend, now.to_backend),
        from_backend: difference(before.from_backend, now.from_backend),
    }
}

/// Between two looks at the map: what came in between, by backend id.
pub fn difference<'a>(
    before: &'a BTreeMap<u32, Traffic>,
    now: &'a BTreeMap<u32, Traffic>,
) -> impl Iterator<Item = (u32, Traffic)> + 'a {
    now.iter().map(|(id, now)| (*id, before.get(id).map_or(*now, |before| since(before, now))))
}

/// The traffic of each Service port since the first look: backends come and go, what they have carried stays.
#[derive(Debug, Default)]
pub struct Totals {
    last: Option<BTreeMap<u32, Traffic>>,
    /// By service id, and whose id it was.
    services: BTreeMap<u32, (ServiceName, Traffic)>,
}

impl Totals {
    /// `service`: whose backend it is, by id and name.
    pub fn add(&mut self, now: BTreeMap<u32, Traffic>, service: impl Fn(u32) -> Option<(u32, ServiceName)>) {
        if let Some(last) = &self.last {
            for (backend, traffic) in difference(last, &now).filter(|(_, traffic)| *traffic != Traffic::default()) {
                let Some((id, name)) = service(backend) else { continue };
                let total = self.services.entry(id).or_insert((name, Traffic::default()));
                if total.0 == name {
                    total.1 = plus(&total.1, &traffic);
                } else {
                    *total = (name, traffic);
                }
            }
        }
        self.last = Some(now);
    }

    /// Nothing where the id is another Service's.
    pub fn of(&self, id: u32, name: &ServiceName) -> Traffic {
        self.services.get(&id).filter(|(known, _)| known == name).map_or_else(Traffic::default, |(_, total)| *total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{Family, ObjectName, Protocol};
    use crate::plan::PortName;

    fn name(service: &str) -> ServiceName {
        let service = ObjectName::new("default", service);
        PortName { service, port: "http".into(), protocol: Protocol::Tcp, family: Family::V4 }.to_map(80).unwrap()
    }

    fn counted<const N: usize>(backends: [(u32, u64, u64); N]) -> BTreeMap<u32, Traffic> {
        backends.into_iter().map(|(id, to_backend, from_backend)| (id, Traffic { to_backend, from_backend })).collect()
    }

    #[test]
    fn a_services_total_outlives_its_backends_and_begins_with_the_first_look() {
        let mut totals = Totals::default();
        let web = |_| Some((7, name("web")));
        totals.add(counted([(1, 1000, 5000)]), web);
        assert_eq!(totals.of(7, &name("web")), Traffic::default());
        totals.add(counted([(1, 1100, 5200), (2, 10, 20)]), web);
        totals.add(counted([(2, 15, 20)]), web);
        assert_eq!(totals.of(7, &name("web")), Traffic { to_backend: 115, from_backend: 220 });
    }

    #[test]
    fn a_count_that_has_gone_back_was_begun_anew() {
        let (before, now) = (counted([(1, 1000, 5000)]), counted([(1, 30, 40)]));
        let between: Vec<_> = difference(&before, &now).collect();
        assert_eq!(between, [(1, Traffic { to_backend: 30, from_backend: 40 })]);
    }

    #[test]
    fn an_id_that_is_another_services_by_now_has_nothing_of_the_old_ones() {
        let mut totals = Totals::default();
        totals.add(counted([]), |_| None);
        totals.add(counted([(1, 100, 100)]), |_| Some((7, name("old"))));
        assert_eq!(totals.of(7, &name("new")), Traffic::default());
        totals.add(counted([(1, 101, 102)]), |_| Some((7, name("new"))));
        assert_eq!(totals.of(7, &name("new")), Traffic { to_backend: 1, from_backend: 2 });
        assert_eq!(totals.of(7, &name("old")), Traffic::default());
    }

    #[test]
    fn what_no_service_has_is_nobodys() {
        let mut totals = Totals::default();
        totals.add(counted([]), |_| None);
        totals.add(counted([(1, 100, 100)]), |_| None);
        assert_eq!(totals.of(7, &name("web")), Traffic::default());
    }
}
