//! Everything the sources said, in one place, and which Services that touches.
//!
//! There may be tens of thousands of objects, so they stand outside the maps, whose nodes are half empty, and names that
//! many of them have are in memory once.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use crate::object::{Family, Node, ObjectName, Service, ServiceCidr, Slice};
use crate::source::{Event, Interfaces, Kind};

#[derive(Default, Debug)]
pub struct Store {
    services: BTreeMap<ObjectName, Box<Service>>,
    /// By slice name.
    slices: BTreeMap<ObjectName, Box<Slice>>,
    /// A Service's name and one of its slices' (in the same namespace).
    slices_of: BTreeSet<(ObjectName, Arc<str>)>,
    node: Option<Node>,
    /// By name.
    service_cidrs: BTreeMap<Arc<str>, ServiceCidr>,
    interfaces: Interfaces,
    synced: BTreeSet<Kind>,
    changes: Changes,
    names: Names,
}

/// What must be planned again.
#[derive(Default, Debug, PartialEq)]
pub struct Changes {
    pub services: BTreeSet<ObjectName>,
    /// The Node or the node's interfaces changed.
    pub node: bool,
    /// ServiceCIDRs changed.
    pub service_cidrs: bool,
    /// When what led to changes of endpoints happened.
    pub triggers: Vec<(Family, SystemTime)>,
}

impl Store {
    /// A whole list of every kind has arrived.
    pub fn is_ready(&self) -> bool {
        self.synced.len() == Kind::ALL.len()
    }

    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name).map(Box::as_ref)
    }

    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    pub fn slices_of<'a>(&'a self, service: &ObjectName) -> impl Iterator<Item = &'a Slice> {
        let of = service.clone();
        let names = self.slices_of.range((service.clone(), Arc::default())..).take_while(move |(name, _)| *name == of);
        names.filter_map(|(service, slice)| self.slices.get(&service.sibling(slice)).map(Box::as_ref))
    }

    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    pub fn service_cidrs(&self) -> impl Iterator<Item = &ServiceCidr> {
        self.service_cidrs.values()
    }

    pub fn interfaces(&self) -> &Interfaces {
        &self.interfaces
    }

    pub fn take(&mut self, event: Event) {
        match event {
            Event::Services(list) => {
                let listed: BTreeSet<ObjectName> = list.iter().map(|service| service.name.clone()).collect();
                let gone: Vec<_> = self.services.keys().filter(|name| !listed.contains(*name)).cloned().collect();
                for name in gone {
                    self.delete_service(&name);
                }
                for service in list {
                    self.put_service(service);
                }
                self.synced.insert(Kind::Service);
            }
            Event::PutService(service) => self.put_service(service),
            Event::DeleteService(name) => self.delete_service(&name),
            Event::Slices(list) => {
                let listed: BTreeSet<ObjectName> = list.iter().map(|slice| slice.name.clone()).collect();
                let gone: Vec<_> = self.slices.keys().filter(|name| !listed.contains(*name)).cloned().collect();
                for name in gone {
                    self.delete_slice(&name);
                }
                for slice in list {
                    self.put_slice(slice);
                }
                self.synced.insert(Kind::EndpointSlice);
            }
            Event::PutSlice(slice) => self.put_slice(slice),
            Event::DeleteSlice(name) => self.delete_slice(&name),
            Event::Node(node) => self.put_node(node),
            Event::ServiceCidrs(list) => {
                let cidrs = list.into_iter().map(|cidr| (Arc::clone(&cidr.name), cidr)).collect();
                self.changes.service_cidrs |= self.service_cidrs != cidrs;
                self.service_cidrs = cidrs;
                self.synced.insert(Kind::ServiceCidr);
            }
            Event::PutServiceCidr(cidr) => {
                self.changes.service_cidrs |= self.service_cidrs.get(&cidr.name) != Some(&cidr);
                self.service_cidrs.insert(Arc::clone(&cidr.name), cidr);
            }
            Event::DeleteServiceCidr(name) => self.changes.service_cidrs |= self.service_cidrs.remove(&name).is_some(),
            Event::Interfaces(interfaces) => {
                if self.interfaces != interfaces || !self.synced.contains(&Kind::Interface) {
                    self.interfaces = interfaces;
                    self.changes.node = true;
                }
                self.synced.insert(Kind::Interface);
            }
        }
    }

    /// Copies all that lists have brought, so that nothing of it is left between what was freed since ([`memory::apart`]).
    ///
    /// [`memory::apart`]: crate::memory::apart
    pub fn repack(&mut self) {
        let mut names = Names::default();
        let services = self.services.values().map(|service| {
            let mut service = service.clone();
            names.copy(&mut service.name.namespace);
            service.name.name = Arc::from(&*service.name.name);
            service.ports.iter_mut().for_each(|port| names.copy(&mut port.name));
            (service.name.clone(), service)
        });
        let services: BTreeMap<ObjectName, Box<Service>> = services.collect();
        let slices = self.slices.values().map(|slice| {
            let mut slice = slice.clone();
            names.copy(&mut slice.name.namespace);
            slice.name.name = Arc::from(&*slice.name.name);
            let known = services.get_key_value(&slice.name.sibling(&slice.service));
            slice.service = known.map_or_else(|| Arc::from(&*slice.service), |(name, _)| Arc::clone(&name.name));
            slice.names_of_many().for_each(|name| names.copy(name));
            (slice.name.clone(), slice)
        });
        self.slices = slices.collect();
        let of = self.slices.values().map(|slice| (slice.name.sibling(&slice.service), Arc::clone(&slice.name.name)));
        self.slices_of = of.collect();
        self.services = services;
        self.names = names;
    }

    /// The store's own copy of a Service's name, where it has one.
    pub fn known(&self, service: &ObjectName) -> ObjectName {
        self.services.get_key_value(service).map_or_else(|| service.clone(), |(name, _)| name.clone())
    }

    /// The store's own copy of a name that many objects have, where it has one.
    pub fn known_name(&self, name: &Arc<str>) -> Arc<str> {
        Arc::clone(self.names.known.get(name).unwrap_or(name))
    }

    fn put_service(&mut self, mut service: Service) {
        if self.service(&service.name) != Some(&service) {
            service.shrink_to_fit();
            self.names.share(&mut service.name.namespace);
            service.ports.iter_mut().for_each(|port| self.names.share(&mut port.name));
            self.changes.services.insert(service.name.clone());
            self.services.insert(service.name.clone(), Box::new(service));
        }
    }

    fn delete_service(&mut self, name: &ObjectName) {
        if self.services.remove(name).is_some() {
            self.changes.services.insert(name.clone());
        }
    }

    fn put_slice(&mut self, mut slice: Slice) {
        if self.slices.get(&slice.name).is_some_and(|old| old.says_the_same(&slice)) {
            return;
        }
        self.delete_slice(&slice.name);
        let family = slice.endpoints.first().map_or(Family::V4, |endpoint| Family::of(endpoint.address));
        self.changes.triggers.extend(slice.triggered.map(|time| (family, time)));
        self.names.share(&mut slice.name.namespace);
        slice.names_of_many().for_each(|name| self.names.share(name));
        let service = self.known(&slice.name.sibling(&slice.service));
        slice.service = Arc::clone(&service.name);
        self.changes.services.insert(service.clone());
        self.slices_of.insert((service, Arc::clone(&slice.name.name)));
        self.slices.insert(slice.name.clone(), Box::new(slice));
    }

    fn delete_slice(&mut self, name: &ObjectName) {
        if let Some(slice) = self.slices.remove(name) {
            let service = slice.name.sibling(&slice.service);
            self.slices_of.remove(&(service.clone(), slice.name.name));
            self.changes.services.insert(service);
        }
    }

    fn put_node(&mut self, node: Option<Node>) {
        let zone = |node: &Option<Node>| node.as_ref().and_then(|node| node.zone.clone());
        let primary = |node: &Option<Node>| node.as_ref().map(|node| node.primary.clone()).unwrap_or_default();
        if zone(&self.node) != zone(&node) {
            self.changes.services.extend(self.services.keys().cloned());
        } else if primary(&self.node) != primary(&node) {
            // Source ranges that hold the node's address hold the load balancer's as well.
            let ranged = self.services.values().filter(|service| !service.source_ranges.is_empty());
            self.changes.services.extend(ranged.map(|service| service.name.clone()));
        }
        if self.node != node || !self.synced.contains(&Kind::Node) {
            self.node = node;
            self.changes.node = true;
        }
        self.synced.insert(Kind::Node);
    }
}

/// Names that many objects have: of namespaces, ports, nodes and zones.
#[derive(Default, Debug)]
struct Names {
    known: BTreeSet<Arc<str>>,
    /// How many there were when those that nobody had any more were last thrown away.
    kept: usize,
}

impl Names {
    /// Puts a copy that is only known here in the place of an equal one.
    fn copy(&mut self, name: &mut Arc<str>) {
        let known = self.known.get(name).cloned().unwrap_or_else(|| {
            let copy: Arc<str> = Arc::from(&**name);
            self.known.insert(Arc::clone(&copy));
            copy
        });
        *name = known;
    }

    /// Puts the known name in the place of an equal one.
    fn share(&mut self, name: &mut Arc<str>) {
        if let Some(known) = self.known.get(name) {
            *name = Arc::clone(known);
            return;
        }
        if self.known.len() >= 2 * self.kept + 64 {
            self.known.retain(|name| Arc::strong_count(name) > 1);
            self.kept = self.known.len();
        }
        self.known.insert(Arc::clone(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(name: &str, service: &str) -> Slice {
        let name = ObjectName::new("default", name);
        Slice { name, triggered: None, service: service.into(), ports: vec![], endpoints: vec![], faults: vec![] }
    }

    fn dirty(store: &mut Store) -> Vec<String> {
        store.take_changes().services.iter().map(|name| name.name.to_string()).collect()
    }

    #[test]
    fn nothing_is_ready_before_every_kind_has_a_whole_list() {
        let mut store = Store::default();
        for event in [
            Event::Services(vec![]),
            Event::PutSlice(slice("s", "a")),
            Event::Node(None),
            Event::ServiceCidrs(vec![]),
            Event::Interfaces(Interfaces::default()),
        ] {
            store.take(event);
            assert!(!store.is_ready());
        }
        store.take(Event::Slices(vec![]));
        assert!(store.is_ready());
    }

    #[test]
    fn a_list_touches_only_what_differs_from_the_one_before() {
        let mut store = Store::default();
        store.take(Event::Slices(vec![slice("one", "a"), slice("two", "b"), slice("three", "c")]));
        assert_eq!(dirty(&mut store), ["a", "b", "c"]);
        store.take(Event::Slices(vec![slice("one", "a"), slice("two", "d")]));
        assert_eq!(dirty(&mut store), ["b", "c", "d"]);
    }

    #[test]
    fn a_slice_that_changes_its_service_touches_both() {
        let mut store = Store::default();
        store.take(Event::PutSlice(slice("one", "a")));
        dirty(&mut store);
        store.take(Event::PutSlice(slice("one", "b")));
        assert_eq!(dirty(&mut store), ["a", "b"]);
        assert_eq!(store.slices_of(&ObjectName::new("default", "a")).count(), 0);
        assert_eq!(store.slices_of(&ObjectName::new("default", "b")).count(), 1);
    }

    #[test]
    fn a_service_whose_name_begins_like_another_has_its_own_slices() {
        let mut store = Store::default();
        store.take(Event::Slices(vec![slice("one", "web"), slice("two", "web-2"), slice("three", "web")]));
        let names: Vec<_> =
            store.slices_of(&ObjectName::new("default", "web")).map(|slice| &*slice.name.name).collect();
        assert_eq!(names, ["one", "three"]);
    }
}
