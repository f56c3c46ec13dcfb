//! The one owner of the state: takes events, plans what they touch, writes it to the kernel. Events that arrive while the
//! kernel is being written go together in the next write.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use svc_common::Addr;
use svc_common::map::{
    self, CONFIG_DETECT_PODS_V4, CONFIG_DETECT_PODS_V6, CONFIG_MASQUERADE_ALL, CONFIG_TAKE_OVER, UDP, Uplink, pin,
};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout_at;
use tracing::{debug, info, warn};

use crate::apply::{Applier, backoff};
use crate::cidrs::{self, PodDetector};
use crate::dataplane::{ApplyError, Dataplane, NODE, Part, State};
use crate::desired::{Desired, Limits};
use crate::memory;
use crate::notes::{Note, Notes};
use crate::object::{Family, Node, ObjectName};
use crate::plan::{NodePortAddresses, Plan, Warning, node_addresses, plan};
use crate::service_health::Checks;
use crate::source::{Event, Interfaces};
use crate::stale_sockets::Departures;
use crate::status::{Resync, Status, Sync};
use crate::store::Store;
use crate::topology::Here;

/// What a plan depends on beside the objects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The agent's node; empty where it has no name, and so no local endpoints.
    pub node_name: String,
    pub nodeport_addresses: NodePortAddresses,
    pub pods: PodDetector,
    /// Every connection to a ClusterIP takes an address of the node as its source.
    pub masquerade_all: bool,
    /// Services' externalIPs count.
    pub external_ips: bool,
    /// Connections that are under way already are left alone.
    pub take_over: bool,
    pub limits: Limits,
    pub pace: Pace,
}

/// When the kernel is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// Between the beginnings of two writes; what arrives meanwhile goes together in the next one.
    pub min_sync_period: Duration,
    /// Between two looks at whether somebody else has changed the kernel's maps.
    pub sync_period: Duration,
}

impl Default for Pace {
    /// Kube-proxy's, but for the pause between two writes, of which there is none.
    fn default() -> Self {
        Pace { min_sync_period: Duration::ZERO, sync_period: Duration::from_secs(30) }
    }
}

/// The node's addresses beside those of Services, as many as the kernel has room for.
pub const NODE_ADDRESSES: usize = 1024;
/// Entries of the kernel's map of interfaces, of which one is the node's own.
const UPLINKS: usize = 256;

/// Who is told of more than the kernel's state; by default nobody.
#[derive(Debug)]
pub struct Outlets {
    pub health_checks: watch::Sender<Checks>,
    pub notes: Notes,
    pub departures: Departures,
}

impl Default for Outlets {
    fn default() -> Self {
        Outlets {
            health_checks: watch::Sender::new(Checks::default()),
            notes: Notes::default(),
            departures: Departures::default(),
        }
    }
}

#[derive(Debug)]
pub struct Reconciler<D> {
    config: Config,
    store: Store,
    /// None until the kernel's state has been read for its ids.
    desired: Option<Desired>,
    applier: Applier<D>,
    /// What was last said of a Service, to say it once.
    warned: BTreeMap<ObjectName, Vec<Warning>>,
    health_checks: Checks,
    outlets: Outlets,
    /// What was last said to be left out, to say it once.
    left_out: LeftOut,
    /// A UDP backend has left, or may have while no agent ran, of which nobody was told.
    departed: bool,
    /// A list has been read, which took far more memory than is kept of it.
    listed: bool,
    synced: bool,
    started: SystemTime,
    /// Of changes that are not in force yet.
    triggers: Vec<(Family, SystemTime)>,
    status: Arc<Status>,
}

/// What the kernel's maps have no room for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct LeftOut {
    cidrs: Vec<IpNet>,
    addresses: Vec<IpAddr>,
    interfaces: usize,
}

/// A look at all that is in the kernel, a part at a time.
struct Sweep {
    parts: std::vec::IntoIter<Part>,
    resync: Resync,
}

/// By map.
fn entries(state: &State, backends: usize) -> [(&'static str, usize); 8] {
    [
        (pin::FRONTENDS, state.frontends.len()),
        (pin::BACKEND_SETS, state.sets.len()),
        (pin::BACKENDS, backends),
        (pin::ADDRESSES, state.addresses.len()),
        (pin::SERVICES, state.services.len()),
        (pin::UPLINKS, state.uplinks.len()),
        (pin::SOURCE_RANGES, state.source_ranges.len()),
        (pin::CIDRS, state.cidrs.len()),
    ]
}

impl<D: Dataplane> Reconciler<D> {
    pub fn new(config: Config, dataplane: D, status: Arc<Status>) -> Self {
        Reconciler {
            config,
            store: Store::default(),
            desired: None,
            applier: Applier::new(dataplane),
            warned: BTreeMap::new(),
            health_checks: Checks::default(),
            outlets: Outlets::default(),
            left_out: LeftOut::default(),
            departed: true,
            listed: false,
            synced: false,
            started: SystemTime::now(),
            triggers: Vec::new(),
            status,
        }
    }

    pub fn with_outlets(self, outlets: Outlets) -> Self {
        Reconciler { outlets, ..self }
    }

    pub fn take(&mut self, event: Event) {
        match &event {
            // Kube-proxy's rule: a Node that is gone is what it was last.
            Event::Node(Some(node)) => self.status.set_node_eligible(node.eligible),
            Event::Services(list) => {
                self.listed = true;
                self.status.queued(list.len(), 0);
            }
            Event::PutService(_) | Event::DeleteService(_) => self.status.queued(1, 0),
            Event::Slices(list) => {
                self.listed = true;
                self.status.queued(0, list.len());
            }
            Event::PutSlice(_) | Event::DeleteSlice(_) => self.status.queued(0, 1),
            _ => {}
        }
        self.store.take(event);
    }

    /// Brings the kernel up to date with all that was taken; nothing while a source has not had its say. Returns how many
    /// operations were written.
    ///
    /// # Errors
    /// Where the kernel refuses; calling again goes on from there.
    pub fn reconcile(&mut self) -> Result<usize, ApplyError> {
        if !self.store.is_ready() {
            return Ok(0);
        }
        let started = Instant::now();
        let result = self.plan_and_apply();
        match &result {
            Ok(ops) => {
                self.outlets.health_checks.send_if_modified(|checks| {
                    let differ = *checks != self.health_checks;
                    if differ {
                        checks.clone_from(&self.health_checks);
                    }
                    differ
                });
                if std::mem::take(&mut self.departed) {
                    self.outlets.departures.tell();
                }
                if let Some(desired) = &mut self.desired {
                    desired.settle();
                    self.status.synced(Sync {
                        took: started.elapsed(),
                        operations: *ops,
                        services: self.store.service_count(),
                        frontends: desired.state().frontends.len(),
                        backends: desired.live_backends(),
                        without_local: desired.without_local(),
                        entries: entries(desired.state(), desired.live_backends()),
                    });
                }
                for (family, time) in std::mem::take(&mut self.triggers) {
                    // What happened before is no measure of this agent.
                    if time > self.started {
                        self.status.programmed(family, time.elapsed().unwrap_or_default());
                    }
                }
                if !self.synced {
                    self.synced = true;
                    info!(
                        services = self.store.service_count(),
                        written = ops,
                        took_ms = started.elapsed().as_millis(),
                        "in force: the kernel has every Service"
                    );
                }
                if std::mem::take(&mut self.listed) {
                    let (store, desired) = (&mut self.store, &mut self.desired);
                    memory::apart(|| {
                        store.repack();
                        if let Some(desired) = desired {
                            desired.repack(store);
                        }
                    });
                    memory::give_back();
                }
            }
            Err(_) => self.status.sync_failed(),
        }
        result
    }

    fn plan_and_apply(&mut self) -> Result<usize, ApplyError> {
        if self.desired.is_none() {
            self.desired = Some(Desired::restore(self.applier.read()?, self.config.limits));
        }
        let Some(desired) = &mut self.desired else { return Ok(0) };
        let mut changes = self.store.take_changes();
        self.triggers.append(&mut changes.triggers);
        let mut left_out = self.left_out.clone();
        let interfaces = self.store.interfaces();
        if changes.node {
            let local = &interfaces.addresses[..interfaces.addresses.len().min(NODE_ADDRESSES)];
            left_out.addresses = interfaces.addresses[local.len()..].to_vec();
            let addresses = node_addresses(local, self.store.node(), &self.config.nodeport_addresses);
            info!(addresses = %list(&addresses), "node ports answer on");
            self.health_checks.addresses = match &self.config.nodeport_addresses {
                NodePortAddresses::All => None,
                _ => Some(addresses.iter().copied().map(IpAddr::from).collect()),
            };
            desired.set_node_addresses(addresses, local.iter().map(|address| Addr::from(*address)).collect());
            let (uplinks, others) = uplinks(interfaces, self.store.node());
            left_out.interfaces = others;
            desired.set_uplinks(uplinks);
        }
        if changes.node || changes.service_cidrs {
            let pods = self.config.pods.ranges(self.store.node());
            let services: Vec<_> = self.store.service_cidrs().flat_map(|object| object.cidrs.clone()).collect();
            for object in self.store.service_cidrs() {
                object.faults.iter().for_each(|fault| warn!(service_cidr = %object.name, "{fault}"));
            }
            let has = |v4: bool| pods.iter().any(|range| range.addr().is_ipv4() == v4);
            let flags = [
                (has(true), CONFIG_DETECT_PODS_V4),
                (has(false), CONFIG_DETECT_PODS_V6),
                (self.config.masquerade_all, CONFIG_MASQUERADE_ALL),
                (self.config.take_over, CONFIG_TAKE_OVER),
            ];
            let base = self.applier.dataplane().config();
            let (cidrs, others) = cidrs::map(&pods, &services);
            left_out.cidrs = others;
            desired.set_cidrs(cidrs);
            desired.set_config(map::Config {
                flags: flags.iter().filter(|(is, _)| *is).fold(base.flags, |all, (_, flag)| all | flag),
                uplink: interfaces.uplink.map_or(0, |uplink| uplink.index),
                uplink_mac: interfaces.uplink.map(|uplink| uplink.address).unwrap_or_default(),
                ..base
            });
        }
        left_out.tell(&self.left_out);
        self.left_out = left_out;
        changes.services.extend(desired.take_starved());
        let zone = self.store.node().and_then(|node| node.zone.as_deref());
        let addresses = self.store.node().map(|node| node.primary.as_slice()).unwrap_or_default();
        let here = Here { node: &self.config.node_name, zone, addresses, external_ips: self.config.external_ips };
        for name in changes.services {
            let planned = match self.store.service(&name) {
                Some(service) => plan(service, &self.store.slices_of(&name).collect::<Vec<_>>(), here),
                None => Plan::default(),
            };
            let (before, after) = (desired.backend_count(&name), backend_count(&planned));
            let is_new = !desired.has(&name);
            let mut warnings = desired.place(&name, &planned);
            warnings.extend(planned.warnings);
            match planned.health_check {
                Some(check) => drop(self.health_checks.services.insert(name.clone(), check)),
                None => drop(self.health_checks.services.remove(&name)),
            }
            if self.synced {
                match (is_new, desired.has(&name)) {
                    (true, true) => info!(service = %name, backends = after, "service added"),
                    (false, false) => info!(service = %name, "service removed"),
                    (false, true) if before + after == 0 => {
                        debug!(service = %name, "service changed, without backends");
                    }
                    (false, true) => info!(service = %name, "service changed: {before} -> {after} backends"),
                    (true, false) => {}
                }
            }
            warnings.sort();
            warnings.dedup();
            let old = if warnings.is_empty() {
                self.warned.remove(&name).unwrap_or_default()
            } else {
                self.warned.insert(name.clone(), warnings.clone()).unwrap_or_default()
            };
            let new = || warnings.iter().filter(|warning| !old.contains(warning));
            new().for_each(|warning| warn!(service = %name, "{}", warning.text));
            for reason in new().filter_map(|warning| warning.reason).collect::<BTreeSet<_>>() {
                let texts: Vec<&str> =
                    new().filter(|warning| warning.reason == Some(reason)).map(|warning| &*warning.text).collect();
                let uid = self.store.service(&name).map(|service| service.uid.clone()).unwrap_or_default();
                self.outlets.notes.send(Note { service: name.clone(), uid, reason, text: texts.join("; ") });
            }
        }
        let before = desired.take_before();
        let backends = &desired.state().backends;
        let has_left = |id| backends.get(id).is_some_and(|backend| backend.live == 0 && backend.protocol == UDP);
        self.departed |= before.iter().flat_map(|before| before.backends.keys()).any(has_left);
        self.applier.apply(desired.state(), before)
    }

    /// What should be in the kernel; none before the first reconciliation.
    pub fn wanted(&self) -> Option<&State> {
        self.desired.as_ref().map(Desired::state)
    }

    pub fn dataplane(&self) -> &D {
        self.applier.dataplane()
    }

    /// Reads the kernel's maps back, and repairs what somebody else has changed. Returns how many entries those were.
    ///
    /// # Errors
    /// Where a map cannot be read, or the kernel refuses; [`Reconciler::reconcile`] makes up for that.
    pub fn resync(&mut self) -> Result<usize, ApplyError> {
        let mut sweep = self.sweep();
        while !self.step(&mut sweep)? {}
        Ok(sweep.resync.repaired.values().sum())
    }

    fn sweep(&self) -> Sweep {
        let wanted = self.desired.as_ref().filter(|_| self.applier.is_in_step());
        let parts = wanted.map(|desired| Part::all_of(desired.state())).unwrap_or_default();
        Sweep { parts: parts.into_iter(), resync: Resync::default() }
    }

    /// Returns whether that was all.
    fn step(&mut self, sweep: &mut Sweep) -> Result<bool, ApplyError> {
        let started = Instant::now();
        let (Some(part), Some(desired)) = (sweep.parts.next(), &self.desired) else {
            for (map, entries) in &sweep.resync.repaired {
                warn!(map, entries, "somebody else changed the kernel's map: repaired");
            }
            self.status.resynced(&sweep.resync);
            return Ok(true);
        };
        let repaired = self.applier.repair(&part, desired.state())?;
        if repaired > 0 {
            *sweep.resync.repaired.entry(part.map()).or_default() += repaired;
        }
        sweep.resync.took += started.elapsed();
        Ok(false)
    }

    /// Takes events until nobody sends any more. Blocks: it wants a thread of its own, whose waiting `runtime` does.
    pub fn run(mut self, runtime: &Handle, mut events: mpsc::Receiver<Event>) {
        let Pace { min_sync_period, sync_period } = self.config.pace;
        let mut failures: u32 = 0;
        // Taken and not yet planned.
        let mut pending = false;
        let mut last = None;
        let mut next_sweep = Instant::now() + sync_period;
        let mut sweep: Option<Sweep> = None;
        loop {
            let is_starved = self.desired.as_ref().is_some_and(Desired::is_starved);
            let write = if pending || failures == 0 && is_starved {
                Some(last.map_or_else(Instant::now, |last: Instant| last + min_sync_period))
            } else if failures > 0 {
                Some(last.unwrap_or_else(Instant::now) + backoff(failures))
            } else {
                None
            };
            let look =
                (self.synced && failures == 0).then(|| if sweep.is_some() { Instant::now() } else { next_sweep });
            let event = runtime.block_on(async {
                match write.into_iter().chain(look).min() {
                    Some(until) => timeout_at(until.into(), events.recv()).await,
                    None => Ok(events.recv().await),
                }
            });
            match event {
                Ok(None) => return,
                Ok(Some(event)) => {
                    self.take(event);
                    pending = true;
                }
                Err(_elapsed) => {}
            }
            while let Ok(event) = events.try_recv() {
                self.take(event);
                pending = true;
            }

            let now = Instant::now();
            let is_due = match write {
                Some(write) => write <= now,
                None => pending && last.is_none_or(|last| last + min_sync_period <= now),
            };
            let result = if is_due {
                pending = false;
                // What the sources say first is one write, however long it takes them.
                last = self.store.is_ready().then_some(now);
                self.reconcile().map(|_| true)
            } else if look.is_some_and(|look| look <= now) {
                let mut current = sweep.take().unwrap_or_else(|| self.sweep());
                let done = self.step(&mut current);
                match done {
                    Ok(false) => sweep = Some(current),
                    Ok(true) | Err(_) => next_sweep = now + sync_period,
                }
                done.map(|_| false)
            } else {
                continue;
            };
            match result {
                Ok(wrote) => {
                    if wrote && failures > 0 {
                        info!(attempts = failures, "the kernel takes changes again");
                    }
                    failures = 0;
                }
                Err(error) => {
                    if failures == 0 {
                        warn!("the kernel refused a change, retrying: {error}");
                    }
                    last = Some(now);
                    failures = failures.saturating_add(1);
                }
            }
        }
    }
}

impl LeftOut {
    /// What was not said before.
    fn tell(&self, before: &LeftOut) {
        let new = |is: usize, differs: bool| is > 0 && differs;
        if new(self.cidrs.len(), self.cidrs != before.cidrs) {
            let (count, ranges) = (self.cidrs.len(), first(&self.cidrs));
            warn!(
                count,
                ranges,
                "more ranges of pods and ClusterIPs than the kernel's map cidrs has room for: some do not count"
            );
        }
        if new(self.addresses.len(), self.addresses != before.addresses) {
            let (count, addresses) = (self.addresses.len(), first(&self.addresses));
            warn!(
                count,
                addresses, "this node has more than {NODE_ADDRESSES} addresses: node ports do not answer on all"
            );
        }
        if new(self.interfaces, self.interfaces != before.interfaces) {
            let count = self.interfaces;
            warn!(
                count,
                "more interfaces have addresses than the kernel's map uplinks has room for: what leaves by these takes the node's own address"
            );
        }
    }
}

/// Enough of a list to know it by.
fn first<T: ToString>(list: &[T]) -> String {
    const SHOWN: usize = 16;
    let mut text = list.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join(" ");
    if list.len() > SHOWN {
        text.push_str(" ...");
    }
    text
}

/// The map of interfaces, and how many it has no room for: the first uplink and the oldest are in it.
fn uplinks(interfaces: &Interfaces, node: Option<&Node>) -> (BTreeMap<u32, Uplink>, usize) {
    let first = interfaces.uplink.and_then(|uplink| interfaces.sources.get_key_value(&uplink.index));
    let mut map: BTreeMap<u32, Uplink> = first.map(|(index, sources)| (*index, *sources)).into_iter().collect();
    for (index, sources) in &interfaces.sources {
        if map.len() < UPLINKS - 1 {
            map.insert(*index, *sources);
        }
    }
    let left_out = interfaces.sources.len() - map.len();
    let fallback = first.map_or(Uplink { v4: Addr::ANY_V4, v6: Addr::ANY_V6 }, |(_, sources)| *sources);
    map.insert(NODE, own_addresses(&interfaces.addresses, node, fallback));
    (map, left_out)
}

/// What the node sends from where an interface has no address of its own: the Node object's addresses, where this node has
/// them.
fn own_addresses(local: &[IpAddr], node: Option<&Node>, uplink: Uplink) -> Uplink {
    let primary = node.map(|node| node.primary.as_slice()).unwrap_or_default();
    let of = |v4: bool| primary.iter().find(|address| address.is_ipv4() == v4 && local.contains(address));
    Uplink {
        v4: of(true).map_or(uplink.v4, |address| Addr::from(*address)),
        v6: of(false).map_or(uplink.v6, |address| Addr::from(*address)),
    }
}

/// Different backends of all ports together.
fn backend_count(plan: &Plan) -> usize {
    plan.ports.iter().map(|port| port.cluster.len()).sum()
}

fn list(addresses: &BTreeSet<Addr>) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}
