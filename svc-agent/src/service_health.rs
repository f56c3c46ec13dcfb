//! A Service's healthCheckNodePort: tells load balancers whether this node has an endpoint of its own, in kube-proxy's
//! words. Each family has a listener of its own, which counts that family's endpoints.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::{Response, StatusCode};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use crate::notes::{Note, Notes, Reason};
use crate::object::{Family, ObjectName};
use crate::status::Status;
use crate::{health, serve};

/// Ports that could not be had are asked for again this often.
const RETRY: Duration = Duration::from_secs(30);
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What one Service's port is to say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Check {
    /// The Service's.
    pub uid: Box<str>,
    /// Host byte order.
    pub port: u16,
    /// Ready endpoints on this node, by address, of each family that the Service has.
    pub endpoints: BTreeMap<Family, usize>,
}

/// All of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Checks {
    pub services: BTreeMap<ObjectName, Check>,
    /// Where to listen; none: everywhere.
    pub addresses: Option<BTreeSet<IpAddr>>,
}

/// One Service's port in one family.
type Key = (ObjectName, Family);

struct Open {
    places: BTreeSet<SocketAddr>,
    endpoints: Arc<AtomicUsize>,
    servers: Vec<AbortHandle>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.servers.iter().for_each(AbortHandle::abort);
    }
}

/// Serves what is wanted until nobody wants anything any more.
pub async fn run(mut wanted: watch::Receiver<Checks>, node_name: &str, status: Arc<Status>, notes: Notes) {
    let mut open: BTreeMap<Key, Open> = BTreeMap::new();
    // What was last said of a port that cannot be had, to say it once.
    let mut refused: BTreeMap<Key, String> = BTreeMap::new();
    loop {
        let checks = wanted.borrow_and_update().clone();
        let places = places(&checks);
        open.retain(|key, port| places.get(key).is_some_and(|(places, _)| *places == port.places));
        refused.retain(|key, _| places.contains_key(key));
        for (key, (places, endpoints)) in places {
            if let Some(port) = open.get(&key) {
                port.endpoints.store(endpoints, Relaxed);
                continue;
            }
            let (service, family) = &key;
            match listen(service, places, endpoints, &status) {
                Ok(port) => {
                    debug!(%service, %family, "health check port opened");
                    refused.remove(&key);
                    open.insert(key, port);
                }
                Err((place, error)) => {
                    let text = format!(
                        "node {node_name} failed to start healthcheck {service:?} on {place}: {error}",
                        service = service.to_string()
                    );
                    if refused.get(&key) != Some(&text) {
                        warn!(%service, "{text}");
                        notes.send(Note {
                            service: service.clone(),
                            uid: checks.services.get(service).map(|check| check.uid.clone()).unwrap_or_default(),
                            reason: Reason::HealthCheckFailed,
                            text: text.clone(),
                        });
                        refused.insert(key, text);
                    }
                }
            }
        }
        let change = async {
            if refused.is_empty() {
                return wanted.changed().await;
            }
            tokio::time::timeout(RETRY, wanted.changed()).await.unwrap_or(Ok(()))
        };
        if change.await.is_err() {
            return;
        }
    }
}

/// Where each port listens, and how many endpoints it has to tell of.
fn places(checks: &Checks) -> BTreeMap<Key, (BTreeSet<SocketAddr>, usize)> {
    let mut places = BTreeMap::new();
    for (service, check) in &checks.services {
        for (family, endpoints) in &check.endpoints {
            let everywhere = match family {
                Family::V4 => IpAddr::from(Ipv4Addr::UNSPECIFIED),
                Family::V6 => IpAddr::from(Ipv6Addr::UNSPECIFIED),
            };
            let addresses = match &checks.addresses {
                None => BTreeSet::from([everywhere]),
                Some(some) => some.iter().copied().filter(|address| Family::of(*address) == *family).collect(),
            };
            let sockets = addresses.into_iter().map(|address| SocketAddr::new(address, check.port)).collect();
            places.insert((service.clone(), *family), (sockets, *endpoints));
        }
    }
    places
}

/// All of the places, or none of them.
fn listen(
    service: &ObjectName,
    places: BTreeSet<SocketAddr>,
    endpoints: usize,
    status: &Arc<Status>,
) -> Result<Open, (SocketAddr, std::io::Error)> {
    let mut listeners = Vec::new();
    for place in &places {
        listeners.push(bind(*place).map_err(|error| (*place, error))?);
    }
    let endpoints = Arc::new(AtomicUsize::new(endpoints));
    let servers = listeners.into_iter().map(|listener| {
        let (service, endpoints, status) = (service.clone(), Arc::clone(&endpoints), Arc::clone(status));
        let respond =
            move || answer(&service, endpoints.load(Relaxed), health::proxy_is_healthy(&status, SystemTime::now()));
        tokio::spawn(serve::serve_all(listener, move |_| std::future::ready(respond()))).abort_handle()
    });
    Ok(Open { servers: servers.collect(), endpoints, places })
}

/// An IPv6 socket takes no IPv4: that is the other family's.
fn bind(place: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(place), Type::STREAM, Some(Protocol::TCP))?;
    if place.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&place.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

/// 200 where there is an endpoint and the kernel is up to date, else 503. Whether the node is about to be deleted does not
/// matter here, but only to /healthz.
fn answer(service: &ObjectName, endpoints: usize, healthy: bool) -> Response<Full<Bytes>> {
    let ObjectName { namespace, name } = service;
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
    );
    let mut response = Response::new(Full::from(body));
    if endpoints == 0 || !healthy {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response.headers_mut().insert(WEIGHT, HeaderValue::from(endpoints));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use rstest::rstest;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;
    use crate::status::Sync;

    #[rstest]
    #[case::some(2, true, 200)]
    #[case::none(0, true, 503)]
    #[case::ill(2, false, 503)]
    #[tokio::test]
    async fn the_answer_is_kube_proxys(#[case] endpoints: usize, #[case] healthy: bool, #[case] code: u16) {
        let response = answer(&ObjectName::new("shop", "edge"), endpoints, healthy);
        assert_eq!(response.status().as_u16(), code);
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("content-type"), "application/json");
        assert_eq!(header("x-content-type-options"), "nosniff");
        assert_eq!(header("x-load-balancing-endpoint-weight"), endpoints.to_string());
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let expected = format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"edge\"\n\t}},\n\
             \t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
        );
        assert_eq!(body, expected);
    }

    #[test]
    fn each_family_listens_on_its_own_addresses() {
        let check =
            Check { uid: "u1".into(), port: 32000, endpoints: BTreeMap::from([(Family::V4, 1), (Family::V6, 2)]) };
        let services = BTreeMap::from([(ObjectName::new("a", "b"), check)]);
        let texts = |addresses: Option<BTreeSet<IpAddr>>| -> Vec<(Vec<String>, usize)> {
            let places = places(&Checks { services: services.clone(), addresses });
            places
                .into_values()
                .map(|(places, count)| (places.iter().map(ToString::to_string).collect(), count))
                .collect()
        };
        assert_eq!(texts(None), [(vec!["0.0.0.0:32000".to_owned()], 1), (vec!["[::]:32000".to_owned()], 2)]);
        let some = ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|text| text.parse().unwrap());
        let [v4, v6] = [&["192.0.2.1:32000", "192.0.2.2:32000"][..], &["[2001:db8::1]:32000"]]
            .map(|list| list.iter().map(|text| (*text).to_owned()).collect());
        assert_eq!(texts(Some(some.into())), [(v4, 1), (v6, 2)]);
        assert_eq!(texts(Some(BTreeSet::new())), [(vec![], 1), (vec![], 2)]);
    }

    async fn ask(port: u16) -> std::io::Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream
            .write_all(b"POST /whatever HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    async fn expect(port: u16, begin: Option<&str>) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        loop {
            let answer = ask(port).await.ok();
            let right = match (&answer, begin) {
                (Some(answer), Some(begin)) => answer.starts_with(begin),
                (answer, begin) => answer.is_none() && begin.is_none(),
            };
            if right {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "expected {begin:?}: {answer:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn checks(port: u16, endpoints: usize) -> Checks {
        let check = Check { uid: "u1".into(), port, endpoints: BTreeMap::from([(Family::V4, endpoints)]) };
        let services = BTreeMap::from([(ObjectName::new("shop", "edge"), check)]);
        Checks { services, addresses: Some(BTreeSet::from([Ipv4Addr::LOCALHOST.into()])) }
    }

    fn free_port() -> u16 {
        std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
    }

    #[tokio::test]
    async fn a_port_follows_its_service_and_answers_whatever_the_request() {
        let status = Arc::new(Status::default());
        status.synced(Sync::default());
        let (wanted, inbox) = watch::channel(Checks::default());
        tokio::spawn(run(inbox, "node-a", status, Notes::default()));
        let (first, second) = (free_port(), free_port());
        for (checks, port, begin) in [
            (checks(first, 1), first, Some("HTTP/1.1 200 ")),
            (checks(first, 0), first, Some("HTTP/1.1 503 ")),
            (checks(second, 3), second, Some("HTTP/1.1 200 ")),
            (checks(second, 3), first, None),
            (Checks::default(), second, None),
        ] {
            wanted.send_replace(checks);
            expect(port, begin).await;
        }
    }

    #[tokio::test]
    async fn a_port_that_somebody_else_has_is_told_once_and_taken_when_it_is_free() {
        let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let (wanted, inbox) = watch::channel(checks(port, 1));
        let (notes, mut told) = Notes::channel();
        tokio::spawn(run(inbox, "node-a", Arc::new(Status::default()), notes));
        let note = tokio::time::timeout(Duration::from_secs(5), told.recv()).await.unwrap().unwrap();
        assert_eq!((note.service.to_string().as_str(), note.reason), ("shop/edge", Reason::HealthCheckFailed));
        assert!(note.text.contains(&format!("127.0.0.1:{port}")), "{}", note.text);
        wanted.send_replace(checks(port, 2));
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(taken);
        wanted.send_replace(checks(port, 3));
        expect(port, Some("HTTP/1.1 503 ")).await;
        assert!(told.try_recv().is_err());
    }
}
