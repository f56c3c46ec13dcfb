//! Watches of the Kubernetes API: Services, EndpointSlices, ServiceCIDRs and the agent's own Node.
//!
//! After an outage of the API server the watches go on from the last resourceVersion that they saw; a new list is read
//! only where the server no longer knows that version. While it is away, one request a second asks for it, on behalf of
//! all watches.
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::{Client, Resource};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::list_watch::{Change, Error, ListWatch, Selector};
use super::servers::Servers;
use super::wire::{self, Object};
use super::{Closed, Event, Kind, Sender, decode, send};
use crate::object::{Node, ObjectName, Protocol, Service, ServiceCidr, Slice};
use crate::status::Status;

/// Between two attempts at a server that is away: short enough to be back in force 2 s after it.
const PROBE_EVERY: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// A server that has just started forbids everything until its authorizer has read the roles: what it forbids is asked
/// again at this pace, this often.
const AUTHORIZER_EVERY: Duration = Duration::from_millis(250);
const AUTHORIZER_TRIES: u32 = 20;
/// Between two attempts at objects that the API does not have.
const ABSENT_EVERY: Duration = Duration::from_secs(60);
/// A server that answers, and yet fails so often in a row, is left for another.
const ANOTHER_AFTER: u32 = 3;
/// Between two attempts that the server still forbids.
const FORBIDDEN_EVERY: Duration = Duration::from_secs(30);

/// Watches until nobody listens any more.
pub async fn run(servers: Arc<Servers>, node_name: &str, events: Sender, status: Arc<Status>) {
    let gate = Gate::new(servers, status);
    let without = |label: &str| Selector { labels: Some(format!("!{label}")), ..Selector::default() };
    let own = Selector { fields: Some(format!("metadata.name={node_name}")), ..Selector::default() };
    // Each ends with the others, when the agent stops.
    let _: Result<_, Closed> = tokio::try_join!(
        watch::<wire::Service>(without(decode::OTHER_PROXY_LABEL), &gate, &events),
        watch::<wire::EndpointSlice>(without(decode::HEADLESS_LABEL), &gate, &events),
        watch::<wire::Node>(own, &gate, &events),
        watch::<wire::ServiceCidr>(Selector::default(), &gate, &events),
    );
}

/// An object of the API that we watch.
trait Watched: Object {
    /// What the API has it as.
    type Api: Resource<DynamicType = ()>;
    /// What is kept of it.
    type Item;
    const KIND: Kind;
    /// Whether the agent can do without, where the API has no such objects or does not let it see them.
    const OPTIONAL: bool = false;

    /// The API servers that it tells of.
    fn servers(_item: &Self::Item) -> Option<Vec<SocketAddr>> {
        None
    }

    /// None where it is not for us.
    fn keep(&self) -> Option<Self::Item>;
    fn list(items: Vec<Self::Item>) -> Event;
    fn put(item: Self::Item) -> Event;
    fn delete(name: ObjectName) -> Event;
}

impl Watched for wire::Service {
    type Api = core::Service;
    type Item = Service;
    const KIND: Kind = Kind::Service;

    fn keep(&self) -> Option<Service> {
        Some(decode::service(self))
    }

    fn list(items: Vec<Service>) -> Event {
        Event::Services(items)
    }

    fn put(item: Service) -> Event {
        Event::PutService(item)
    }

    fn delete(name: ObjectName) -> Event {
        Event::DeleteService(name)
    }
}

impl Watched for wire::EndpointSlice {
    type Api = discovery::EndpointSlice;
    type Item = Slice;
    const KIND: Kind = Kind::EndpointSlice;

    fn servers(item: &Slice) -> Option<Vec<SocketAddr>> {
        api_servers(item)
    }

    fn keep(&self) -> Option<Slice> {
        decode::slice(self)
    }

    fn list(items: Vec<Slice>) -> Event {
        Event::Slices(items)
    }

    fn put(item: Slice) -> Event {
        Event::PutSlice(item)
    }

    fn delete(name: ObjectName) -> Event {
        Event::DeleteSlice(name)
    }
}

impl Watched for wire::Node {
    type Api = core::Node;
    type Item = Node;
    const KIND: Kind = Kind::Node;

    fn keep(&self) -> Option<Node> {
        Some(decode::node(self))
    }

    fn list(mut items: Vec<Node>) -> Event {
        Event::Node(items.pop())
    }

    fn put(item: Node) -> Event {
        Event::Node(Some(item))
    }

    fn delete(_name: ObjectName) -> Event {
        Event::Node(None)
    }
}

impl Watched for wire::ServiceCidr {
    type Api = networking::ServiceCIDR;
    type Item = ServiceCidr;
    const KIND: Kind = Kind::ServiceCidr;
    const OPTIONAL: bool = true;

    fn keep(&self) -> Option<ServiceCidr> {
        Some(decode::service_cidr(self))
    }

    fn list(items: Vec<ServiceCidr>) -> Event {
        Event::ServiceCidrs(items)
    }

    fn put(item: ServiceCidr) -> Event {
        Event::PutServiceCidr(item)
    }

    fn delete(name: ObjectName) -> Event {
        Event::DeleteServiceCidr(name.name)
    }
}

async fn watch<T: Watched>(selector: Selector, gate: &Gate, events: &Sender) -> Result<(), Closed> {
    let kind = T::Api::kind(&());
    let mut changes = ListWatch::new::<T::Api>(gate.client.clone(), selector, T::keep);
    let mut failures = 0;
    let mut listed = false;
    loop {
        match changes.next().await {
            Ok(change) => {
                failures = 0;
                let event = match change {
                    Change::List(items) => {
                        listed = true;
                        gate.reached();
                        for item in &items {
                            gate.learn(T::servers(item)).await;
                        }
                        T::list(items)
                    }
                    Change::Put(item) => {
                        gate.heard(T::KIND);
                        gate.learn(T::servers(&item)).await;
                        T::put(item)
                    }
                    Change::Delete(name) => {
                        gate.heard(T::KIND);
                        T::delete(name)
                    }
                };
                send(events, event).await?;
            }
            Err(error) => {
                failures += 1;
                let absent = error.code() == Some(404);
                if T::OPTIONAL && (absent || is_forbidden(&error) && failures > AUTHORIZER_TRIES) {
                    if listed {
                        // What was known stays, as of any other kind.
                    } else {
                        info!(%kind, "going on without: {}", chain(&error));
                        send(events, T::list(Vec::new())).await?;
                        listed = true;
                    }
                    sleep(gate.jittered(ABSENT_EVERY)).await;
                    continue;
                }
                gate.retry(&kind, &error, failures).await;
            }
        }
    }
}

/// The API servers themselves are the endpoints of the Service default/kubernetes.
fn api_servers(slice: &Slice) -> Option<Vec<SocketAddr>> {
    if &*slice.service != "kubernetes" || &*slice.name.namespace != "default" {
        return None;
    }
    let port = slice.ports.iter().find(|port| &*port.name == "https" && port.protocol == Protocol::Tcp)?.port;
    let ready = slice.endpoints.iter().filter(|endpoint| endpoint.condition.ready);
    Some(ready.map(|endpoint| SocketAddr::new(endpoint.address, port)).collect())
}

/// Where watches wait that have failed.
struct Gate {
    servers: Arc<Servers>,
    client: Client,
    status: Arc<Status>,
    /// When the server last answered a probe. Held while probing, so that one watch asks for all.
    answered: Mutex<Option<Instant>>,
    jitter: RandomState,
}

impl Gate {
    fn new(servers: Arc<Servers>, status: Arc<Status>) -> Self {
        let client = servers.client();
        Gate { servers, client, status, answered: Mutex::new(None), jitter: RandomState::new() }
    }

    async fn learn(&self, servers: Option<Vec<SocketAddr>>) {
        if let Some(addresses) = servers {
            self.servers.learn(&addresses).await;
        }
    }

    /// Of a change: a list is what this agent asked for, and says nothing of its watch.
    fn heard(&self, kind: Kind) {
        self.status.heard(kind.label());
    }

    fn reached(&self) {
        self.status.set_connected(true);
    }

    /// Returns when the watch should try again; `failures` of it in a row have come to nothing.
    async fn retry(&self, kind: &str, error: &Error, failures: u32) {
        if error.is_gone() {
            return;
        }
        if error.code() == Some(401) {
            // A token or a certificate that was good may have been replaced.
            self.servers.renew().await;
        } else if failures == ANOTHER_AFTER && !is_forbidden(error) && self.servers.count() > 1 {
            self.servers.next().await;
        }
        let was_away = self.await_server(Instant::now()).await;
        if was_away || failures <= 1 {
            return;
        }
        // The server is there, and yet it will not do.
        let pause = match failures {
            _ if !is_forbidden(error) => PROBE_EVERY,
            0..=AUTHORIZER_TRIES => AUTHORIZER_EVERY,
            _ => PROBE_EVERY.saturating_mul(1 << (failures - AUTHORIZER_TRIES).min(10)).min(FORBIDDEN_EVERY),
        };
        if pause != AUTHORIZER_EVERY {
            warn!(%kind, failures, "watch failed: {}", chain(error));
        }
        sleep(self.jittered(pause)).await;
    }

    /// Returns once the server answers: whether it did not do so at first, or has answered another watch since `failed`.
    async fn await_server(&self, failed: Instant) -> bool {
        let mut answered = self.answered.lock().await;
        if answered.is_some_and(|answered| answered > failed) {
            return true;
        }
        let mut attempts: u32 = 0;
        while let Err(why) = self.probe().await {
            if attempts == 0 {
                warn!("API server lost, going on with what is known: {why}");
                self.status.set_connected(false);
            }
            attempts += 1;
            sleep(self.jittered(PROBE_EVERY)).await;
        }
        let now = Instant::now();
        if attempts > 0 {
            info!(server = %self.servers.url(), away_ms = now.duration_since(failed).as_millis(), attempts, "API server is back");
            self.status.set_connected(true);
        }
        *answered = Some(now);
        attempts > 0
    }

    /// Asks each server once, until one answers.
    async fn probe(&self) -> Result<(), String> {
        let mut first = None;
        for _ in 0..self.servers.count() {
            match self.ask().await {
                Ok(()) => return Ok(()),
                Err(why) => drop(first.get_or_insert_with(|| format!("{}: {why}", self.servers.url()))),
            }
            self.servers.next().await;
        }
        Err(first.unwrap_or_default())
    }

    /// Any answer will do: whether the watches may go on is for them to see.
    async fn ask(&self) -> Result<(), String> {
        match timeout(PROBE_TIMEOUT, self.client.apiserver_version()).await {
            Ok(Ok(_) | Err(kube::Error::Api(_) | kube::Error::SerdeError(_))) => Ok(()),
            Ok(Err(error)) => Err(chain(&error)),
            Err(_elapsed) => Err("no answer within a second".to_owned()),
        }
    }

    /// 75% to 100% of it.
    fn jittered(&self, pause: Duration) -> Duration {
        let random = self.jitter.hash_one(std::time::Instant::now());
        pause.mul_f64(0.75 + 0.25 * (random as f64 / u64::MAX as f64))
    }
}

fn is_forbidden(error: &Error) -> bool {
    matches!(error.code(), Some(401 | 403))
}

/// An error with its causes, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
