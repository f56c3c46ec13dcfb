//! Watches of the Kubernetes API: Services, EndpointSlices, ServiceCIDRs and the agent's own Node.
//!
//! After an outage of the API server the watches go on from the last resourceVersion that they saw; a new list is read
//! only where the server no longer knows that version. While it is away, one request a second asks for it, on behalf of
//! all watches.
use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::api::Api;
use kube::runtime::watcher;
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::servers::Servers;
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
    let client = servers.client();
    let gate = Gate::new(servers, status);
    let without = |label: &str| watcher::Config::default().labels(&format!("!{label}"));
    let own = watcher::Config::default().fields(&format!("metadata.name={node_name}"));
    // Each ends with the others, when the agent stops.
    let _: Result<_, Closed> = tokio::try_join!(
        watch::<core::Service>(Api::all(client.clone()), without(decode::OTHER_PROXY_LABEL), &gate, &events),
        watch::<discovery::EndpointSlice>(Api::all(client.clone()), without(decode::HEADLESS_LABEL), &gate, &events),
        watch::<core::Node>(Api::all(client.clone()), own, &gate, &events),
        watch::<networking::ServiceCIDR>(Api::all(client), watcher::Config::default(), &gate, &events),
    );
}

/// An object of the API that we watch.
trait Watched: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static {
    /// What is kept of it.
    type Item;
    const KIND: Kind;
    /// Whether the agent can do without, where the API has no such objects or does not let it see them.
    const OPTIONAL: bool = false;

    /// The API servers that it tells of.
    fn servers(&self) -> Option<Vec<SocketAddr>> {
        None
    }

    /// None where it is not for us.
    fn decode(&self) -> Option<Self::Item>;
    fn list(items: Vec<Self::Item>) -> Event;
    fn put(item: Self::Item) -> Event;
    fn delete(name: ObjectName) -> Event;
}

impl Watched for core::Service {
    type Item = Service;
    const KIND: Kind = Kind::Service;

    fn decode(&self) -> Option<Service> {
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

impl Watched for discovery::EndpointSlice {
    type Item = Slice;
    const KIND: Kind = Kind::EndpointSlice;

    fn servers(&self) -> Option<Vec<SocketAddr>> {
        api_servers(&decode::slice(self)?)
    }

    fn decode(&self) -> Option<Slice> {
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

impl Watched for core::Node {
    type Item = Node;
    const KIND: Kind = Kind::Node;

    fn decode(&self) -> Option<Node> {
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

impl Watched for networking::ServiceCIDR {
    type Item = ServiceCidr;
    const KIND: Kind = Kind::ServiceCidr;
    const OPTIONAL: bool = true;

    fn decode(&self) -> Option<ServiceCidr> {
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

async fn watch<K: Watched>(api: Api<K>, config: watcher::Config, gate: &Gate, events: &Sender) -> Result<(), Closed> {
    let mut stream = pin!(watcher(api, config));
    let mut list = Vec::new();
    let mut failures = 0;
    let mut listed = false;
    while let Some(item) = stream.next().await {
        match item {
            Ok(event) => match event {
                watcher::Event::Init => list.clear(),
                watcher::Event::InitApply(object) => {
                    gate.learn(object.servers()).await;
                    list.extend(object.decode());
                }
                watcher::Event::InitDone => {
                    failures = 0;
                    listed = true;
                    gate.reached();
                    send(events, K::list(std::mem::take(&mut list))).await?;
                }
                watcher::Event::Apply(object) => {
                    failures = 0;
                    gate.heard(K::KIND);
                    gate.learn(object.servers()).await;
                    let event = match object.decode() {
                        Some(item) => K::put(item),
                        None => K::delete(decode::object_name(object.meta())),
                    };
                    send(events, event).await?;
                }
                watcher::Event::Delete(object) => {
                    failures = 0;
                    gate.heard(K::KIND);
                    send(events, K::delete(decode::object_name(object.meta()))).await?;
                }
            },
            Err(error) => {
                failures += 1;
                let absent = code(&error) == Some(404);
                if K::OPTIONAL && (absent || is_forbidden(&error) && failures > AUTHORIZER_TRIES) {
                    if listed {
                        // What was known stays, as of any other kind.
                    } else {
                        info!(kind = %K::kind(&()), "going on without: {}", chain(&error));
                        send(events, K::list(Vec::new())).await?;
                        listed = true;
                    }
                    sleep(gate.jittered(ABSENT_EVERY)).await;
                    continue;
                }
                gate.retry(&K::kind(&()), &error, failures).await;
            }
        }
    }
    Ok(())
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
    async fn retry(&self, kind: &str, error: &watcher::Error, failures: u32) {
        if matches!(error, watcher::Error::WatchError(status) if status.code == 410) {
            return;
        }
        if code(error) == Some(401) {
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

fn is_forbidden(error: &watcher::Error) -> bool {
    matches!(code(error), Some(401 | 403))
}

/// The HTTP status that the server answered with.
fn code(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status.code),
        _ => None,
    }
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
