//! The one owner of the state: takes events, plans what they touch, writes it to the kernel. Events that arrive while the
//! kernel is being written go together in the next write.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use svc_common::Addr;
use svc_common::map::{CONFIG_DETECT_PODS, CONFIG_MASQUERADE_ALL, Uplink};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::apply::{Applier, backoff};
use crate::cidrs::{self, PodDetector};
use crate::dataplane::{ApplyError, Dataplane, State};
use crate::desired::{Desired, Limits};
use crate::notes::{Note, Notes};
use crate::object::{Node, ObjectName};
use crate::plan::{NodePortAddresses, Plan, Warning, node_addresses, plan};
use crate::service_health::Checks;
use crate::source::Event;
use crate::status::{Status, Sync};
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
    /// The first uplink's addresses: the node's own while its Node object names none that it has.
    pub uplink: Uplink,
    pub limits: Limits,
}

/// Who is told of more than the kernel's state; by default nobody.
#[derive(Debug)]
pub struct Outlets {
    pub health_checks: watch::Sender<Checks>,
    pub notes: Notes,
}

impl Default for Outlets {
    fn default() -> Self {
        Outlets { health_checks: watch::Sender::new(Checks::default()), notes: Notes::default() }
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
    synced: bool,
    status: Arc<Status>,
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
            synced: false,
            status,
        }
    }

    pub fn with_outlets(self, outlets: Outlets) -> Self {
        Reconciler { outlets, ..self }
    }

    pub fn take(&mut self, event: Event) {
        if let Event::Node(node) = &event {
            // A load balancer must not be sent away by the mere lack of a Node object.
            self.status.set_node_eligible(node.as_ref().is_none_or(|node| node.eligible));
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
                if let Some(desired) = &mut self.desired {
                    desired.settle();
                    self.status.synced(Sync {
                        took: started.elapsed(),
                        operations: *ops,
                        services: self.store.service_count(),
                        frontends: desired.state().frontends.len(),
                        backends: desired.live_backends(),
                    });
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
            }
            Err(_) => self.status.sync_failed(),
        }
        result
    }

    fn plan_and_apply(&mut self) -> Result<usize, ApplyError> {
        if self.desired.is_none() {
            let restored = Desired::restore(self.applier.realised()?, self.config.limits);
            self.applier.touch_everything(restored.state());
            self.desired = Some(restored);
        }
        let Some(desired) = &mut self.desired else { return Ok(0) };
        let mut changes = self.store.take_changes();
        if changes.node {
            let addresses = node_addresses(self.store.addresses(), self.store.node(), &self.config.nodeport_addresses);
            info!(addresses = %list(&addresses), "node ports answer on");
            self.health_checks.addresses = match &self.config.nodeport_addresses {
                NodePortAddresses::All => None,
                _ => Some(addresses.iter().copied().map(IpAddr::from).collect()),
            };
            let local = self.store.addresses().iter().map(|address| Addr::from(*address)).collect();
            desired.set_node_addresses(addresses, local);
        }
        if changes.node || changes.service_cidrs {
            let pods = self.config.pods.ranges(self.store.node());
            let services: Vec<_> = self.store.service_cidrs().flat_map(|object| object.cidrs.clone()).collect();
            for object in self.store.service_cidrs() {
                object.faults.iter().for_each(|fault| warn!(service_cidr = %object.name, "{fault}"));
            }
            let detects = if pods.is_empty() { 0 } else { CONFIG_DETECT_PODS };
            let masquerades = if self.config.masquerade_all { CONFIG_MASQUERADE_ALL } else { 0 };
            let node = own_addresses(self.store.addresses(), self.store.node(), self.config.uplink);
            desired.set_cidrs(cidrs::map(&pods, &services));
            desired.set_settings(detects | masquerades, node);
        }
        changes.services.extend(desired.take_starved());
        let zone = self.store.node().and_then(|node| node.zone.as_deref());
        let addresses = self.store.node().map(|node| node.primary.as_slice()).unwrap_or_default();
        let here = Here { node: &self.config.node_name, zone, addresses };
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
                self.outlets.notes.send(Note { service: name.clone(), reason, text: texts.join("; ") });
            }
        }
        let touched = desired.take_touched();
        self.applier.apply(desired.state(), touched)
    }

    /// What should be in the kernel; none before the first reconciliation.
    pub fn wanted(&self) -> Option<&State> {
        self.desired.as_ref().map(Desired::state)
    }

    pub fn dataplane(&self) -> &D {
        self.applier.dataplane()
    }

    /// Takes events until nobody sends any more. Blocks: it wants a thread of its own, whose waiting `runtime` does.
    pub fn run(mut self, runtime: &Handle, mut events: mpsc::Receiver<Event>) {
        let mut failures: u32 = 0;
        loop {
            let wait = if failures > 0 {
                Some(backoff(failures))
            } else if self.desired.as_ref().is_some_and(Desired::is_starved) {
                Some(Duration::ZERO)
            } else {
                None
            };
            let first = runtime.block_on(async {
                match wait {
                    Some(wait) => tokio::time::timeout(wait, events.recv()).await,
                    None => Ok(events.recv().await),
                }
            });
            match first {
                Ok(None) => return,
                Ok(Some(event)) => self.take(event),
                Err(_elapsed) => {}
            }
            while let Ok(event) = events.try_recv() {
                self.take(event);
            }
            match self.reconcile() {
                Ok(_) => {
                    if failures > 0 {
                        info!(attempts = failures, "the kernel takes changes again");
                    }
                    failures = 0;
                }
                Err(error) => {
                    if failures == 0 {
                        warn!("the kernel refused a change, retrying: {error}");
                    }
                    failures = failures.saturating_add(1);
                }
            }
        }
    }
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
