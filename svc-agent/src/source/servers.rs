//! The way to the API servers: which there are, in which order they are tried, and a client that is made anew, from files
//! read again, where the way breaks.
//!
//! Never through the ClusterIP that the agent itself is to serve, where there is another way. In this order:
//! 1. `--api-server`, each in turn;
//! 2. the server of the kubeconfig;
//! 3. in a pod with a service account: the server in the kubelet's kubeconfig, where that is mounted; the endpoints of the
//!    Service default/kubernetes, which are the API servers themselves, as the kernel still has them from before or as the
//!    API tells them; and last that Service's ClusterIP.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::future::BoxFuture;
use hyper::{Request, Response, Uri};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::util::option_layer;
use tower::{BoxError, Service, ServiceBuilder};
use tracing::{info, warn};

use crate::status::Status;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that says nothing for this long is given up; a watch has a bookmark about once a minute.
const READ_TIMEOUT: Duration = Duration::from_secs(100);
/// A peer that vanished without a word is noticed after idle + interval * retries.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_RETRIES: u32 = 3;

/// Where kubelets keep their kubeconfig: kubeadm's place, and that of some managed clusters.
const KUBELET_KUBECONFIGS: [&str; 2] = ["/etc/kubernetes/kubelet.conf", "/var/lib/kubelet/kubeconfig"];

/// Who the agent is to the API server, and how it was told of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Access {
    /// None: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// `--api-server`.
    pub urls: Vec<String>,
    /// The API servers as the kernel has them, from an earlier run.
    pub remembered: Vec<SocketAddr>,
}

/// An API server's address.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Server {
    url: Uri,
    /// Whom its certificate has to name, where that is not the URL's host.
    name: Option<String>,
}

#[derive(Debug)]
struct Known {
    /// The service account's own idea, a ClusterIP; none where the servers were given.
    cluster_ip: Option<Uri>,
    servers: Vec<Server>,
    current: usize,
}

/// The servers, and a client of one of them.
pub struct Servers {
    access: Access,
    known: Mutex<Known>,
    client: Arc<RwLock<Client>>,
    status: Arc<Status>,
}

impl Servers {
    /// # Errors
    /// Where the configuration cannot be read or does not make a client. No server need answer.
    pub async fn new(access: Access, status: Arc<Status>) -> anyhow::Result<Arc<Self>> {
        let config = access.config().await?;
        let kubelet = KUBELET_KUBECONFIGS.iter().find_map(|path| server_of(Path::new(path)));
        let (servers, cluster_ip) = servers(&access, &config.cluster_url, kubelet)?;
        let first = &servers[0];
        if cluster_ip.as_ref() == Some(&first.url) {
            warn!(
                server = %first.url,
                "the API server is reached through a Service until its own addresses are known, and nobody else may be \
                 serving that Service: give them by --api-server, or mount {}",
                KUBELET_KUBECONFIGS[0]
            );
        }
        let client = client(&with_server(config, first)).context("cannot make a client of the API server")?;
        info!(server = %first.url, others = servers.len() - 1, "watching the API server");
        let known = Mutex::new(Known { cluster_ip, servers, current: 0 });
        Ok(Arc::new(Servers { access, known, client: Arc::new(RwLock::new(client)), status }))
    }

    /// A client of whichever server is in use at the time of a request.
    pub fn client(self: &Arc<Self>) -> Client {
        ClientBuilder::new(Switch(Arc::clone(self)), "default").build()
    }

    /// How many there are to try.
    pub fn count(&self) -> usize {
        self.known().servers.len()
    }

    /// Goes on with the next server.
    pub async fn next(&self) {
        {
            let mut known = self.known();
            known.current = (known.current + 1) % known.servers.len();
        }
        self.renew().await;
    }

    /// Reads credentials again, which may have been replaced.
    pub async fn renew(&self) {
        let server = {
            let known = self.known();
            known.servers[known.current].clone()
        };
        // Files that are being replaced may not fit together for a moment: the old ones may do until then.
        let made = self.access.config().await.and_then(|config| Ok(client(&with_server(config, &server))?));
        match made {
            Ok(client) => *self.client.write().unwrap_or_else(PoisonError::into_inner) = client,
            Err(error) => warn!("cannot make a new client of the API server: {error:#}"),
        }
    }

    /// The endpoints of default/kubernetes are these. They take the place of the ClusterIP, which stays as the last resort.
    pub async fn learn(&self, addresses: &[SocketAddr]) {
        let is_through_service = {
            let mut known = self.known();
            let Some(cluster_ip) = known.cluster_ip.clone() else { return };
            let in_use = known.servers[known.current].clone();
            let mut servers: Vec<Server> = known
                .servers
                .iter()
                .filter(|server| server.name.is_none() && server.url != cluster_ip)
                .cloned()
                .collect();
            servers.extend(endpoints(addresses, &cluster_ip));
            servers.push(Server { url: cluster_ip.clone(), name: None });
            if servers == known.servers {
                return;
            }
            let place = servers.iter().position(|server| *server == in_use);
            let through_service = in_use.url == cluster_ip || place.is_none();
            known.current = if through_service { 0 } else { place.unwrap_or_default() };
            known.servers = servers;
            through_service && known.servers.len() > 1
        };
        if is_through_service {
            self.renew().await;
            info!(server = %self.url(), "going on with an API server's own address");
        }
    }

    /// Of the server in use.
    pub fn url(&self) -> Uri {
        let known = self.known();
        known.servers[known.current].url.clone()
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Access {
    async fn config(&self) -> anyhow::Result<Config> {
        let Some(path) = &self.kubeconfig else {
            return Config::incluster().map_err(|error| {
                anyhow::anyhow!(
                    "neither --kubeconfig nor --manifests is given, and this is no pod with a service account: {error}"
                )
            });
        };
        let read = async {
            let file = Kubeconfig::read_from(path)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await
        };
        read.await.with_context(|| format!("--kubeconfig {}", path.display()))
    }
}

/// All to try, in their order, and the ClusterIP among them. `configured` is the kubeconfig's or the service account's,
/// `kubelet` the kubelet's.
fn servers(access: &Access, configured: &Uri, kubelet: Option<Uri>) -> anyhow::Result<(Vec<Server>, Option<Uri>)> {
    let plain = |url: Uri| Server { url, name: None };
    if !access.urls.is_empty() {
        let parse = |text: &String| -> anyhow::Result<Server> {
            let url: Uri = text.parse().with_context(|| format!("--api-server {text}: not a URL"))?;
            anyhow::ensure!(
                url.scheme().is_some() && url.host().is_some(),
                "--api-server {text}: not a URL with a host"
            );
            Ok(plain(url))
        };
        return Ok((access.urls.iter().map(parse).collect::<anyhow::Result<_>>()?, None));
    }
    if access.kubeconfig.is_some() {
        return Ok((vec![plain(configured.clone())], None));
    }
    let mut servers: Vec<Server> = kubelet.filter(|url| url != configured).map(plain).into_iter().collect();
    servers.extend(endpoints(&access.remembered, configured));
    servers.push(plain(configured.clone()));
    Ok((servers, Some(configured.clone())))
}

/// Their certificates are only known to name the ClusterIP.
fn endpoints(addresses: &[SocketAddr], cluster_ip: &Uri) -> Vec<Server> {
    let name = cluster_ip.host().map(|host| host.trim_matches(['[', ']']).to_owned());
    let url = |address: &SocketAddr| format!("https://{address}").parse().ok();
    addresses.iter().filter_map(url).map(|url| Server { url, name: name.clone() }).collect()
}

/// The server that a kubeconfig names; none where there is no such file.
fn server_of(path: &Path) -> Option<Uri> {
    let file = Kubeconfig::read_from(path).ok()?;
    let current = file.current_context.as_ref()?;
    let context = file.contexts.iter().find(|context| context.name == *current)?.context.as_ref()?;
    let cluster = file.clusters.iter().find(|cluster| cluster.name == context.cluster)?.cluster.as_ref()?;
    cluster.server.as_ref()?.parse().ok()
}

fn with_server(mut config: Config, server: &Server) -> Config {
    config.cluster_url = server.url.clone();
    config.tls_server_name = server.name.clone().or(config.tls_server_name);
    config
}

fn client(config: &Config) -> kube::Result<Client> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(KEEPALIVE_IDLE));
    tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    tcp.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
    // Data that nobody acknowledges stops the keepalive probes, and has a limit of its own.
    tcp.set_tcp_user_timeout(Some(KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_RETRIES));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_read_timeout(Some(READ_TIMEOUT));
    connector.set_write_timeout(Some(READ_TIMEOUT));
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .layer(option_layer(config.auth_layer()?))
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(ClientBuilder::new(service, config.default_namespace.clone()).build())
}

/// Hands each request to the client of now, and counts it.
#[derive(Clone)]
struct Switch(Arc<Servers>);

impl Service<Request<Body>> for Switch {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let servers = Arc::clone(&self.0);
        let client = servers.client.read().unwrap_or_else(PoisonError::into_inner).clone();
        let (method, url) = (request.method().clone(), servers.url());
        Box::pin(async move {
            let begin = Instant::now();
            let result = client.send(request).await;
            let code = result.as_ref().ok().map(|response| response.status().as_u16());
            let host = url.authority().map(|authority| authority.as_str()).unwrap_or_default();
            servers.status.requested(method.as_str(), host, code, begin.elapsed());
            result.map_err(BoxError::from)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn access(kubeconfig: bool, urls: &[&str], remembered: &[&str]) -> Access {
        Access {
            kubeconfig: kubeconfig.then(|| "/kubeconfig".into()),
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            remembered: remembered.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    const CLUSTER_IP: &str = "https://10.96.0.1/";
    const KUBELETS: Option<&str> = Some("https://control-plane:6443/");

    #[rstest]
    #[case::flags_win(access(false, &["https://a:1", "https://b:2"], &["192.0.2.1:6443"]), KUBELETS, &["https://a:1/", "https://b:2/"])]
    #[case::flags_win_over_a_kubeconfig(access(true, &["https://a:1"], &[]), None, &["https://a:1/"])]
    #[case::a_kubeconfig_has_one(access(true, &[], &["192.0.2.1:6443"]), KUBELETS, &[CLUSTER_IP])]
    #[case::the_service_is_the_last_resort(access(false, &[], &["192.0.2.1:6443", "[2001:db8::1]:6443"]), KUBELETS,
        &["https://control-plane:6443/", "https://192.0.2.1:6443/ as 10.96.0.1", "https://[2001:db8::1]:6443/ as 10.96.0.1", CLUSTER_IP])]
    #[case::the_service_alone(access(false, &[], &[]), None, &[CLUSTER_IP])]
    #[case::a_kubelet_that_uses_it_too(access(false, &[], &[]), Some(CLUSTER_IP), &[CLUSTER_IP])]
    fn servers_are_tried_in_this_order(#[case] access: Access, #[case] kubelet: Option<&str>, #[case] order: &[&str]) {
        let kubelet = kubelet.map(|url| url.parse().unwrap());
        let (servers, _) = servers(&access, &CLUSTER_IP.parse().unwrap(), kubelet).unwrap();
        assert_eq!(texts(&servers), order);
    }

    fn texts(servers: &[Server]) -> Vec<String> {
        let text = |server: &Server| match &server.name {
            Some(name) => format!("{} as {name}", server.url),
            None => server.url.to_string(),
        };
        servers.iter().map(text).collect()
    }

    #[rstest]
    #[case("10.0.0.1:6443")]
    #[case("not a url")]
    fn a_bad_url_is_told(#[case] url: &str) {
        let error = servers(&access(false, &[url], &[]), &CLUSTER_IP.parse().unwrap(), None).unwrap_err();
        assert!(error.to_string().contains(url), "{error}");
    }

    const KUBECONFIG: &str = "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
        contexts: [{ name: a, context: { cluster: b, user: c } }]\nusers: [{ name: c, user: {} }]\n\
        clusters: [{ name: b, cluster: { server: 'http://127.0.0.1:1' } }]\n";

    fn known(cluster_ip: Option<&str>, servers: Vec<Server>) -> Mutex<Known> {
        Mutex::new(Known { cluster_ip: cluster_ip.map(|url| url.parse().unwrap()), servers, current: 0 })
    }

    #[tokio::test]
    async fn the_api_servers_own_addresses_take_the_services_place_and_change_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        std::fs::write(&path, KUBECONFIG).unwrap();
        let mut servers =
            Servers::new(Access { kubeconfig: Some(path), ..Access::default() }, Arc::default()).await.unwrap();
        let through_service = vec![Server { url: CLUSTER_IP.parse().unwrap(), name: None }];
        Arc::get_mut(&mut servers).unwrap().known = known(Some(CLUSTER_IP), through_service);
        let mut expect = Vec::new();
        for (addresses, current) in [
            (&["192.0.2.1:6443", "192.0.2.2:6443"][..], "https://192.0.2.1:6443/"),
            (&["192.0.2.2:6443", "192.0.2.1:6443"], "https://192.0.2.1:6443/"),
            (&["192.0.2.3:6443"], "https://192.0.2.3:6443/"),
            (&[], CLUSTER_IP),
        ] {
            let list: Vec<SocketAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
            servers.learn(&list).await;
            assert_eq!(servers.url().to_string(), current);
            expect = addresses.iter().map(|address| format!("https://{address}/ as 10.96.0.1")).collect();
            expect.push(CLUSTER_IP.to_owned());
            assert_eq!(texts(&servers.known().servers), expect);
        }
        assert_eq!(expect, [CLUSTER_IP]);
    }

    #[tokio::test]
    async fn servers_that_were_given_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        std::fs::write(&path, KUBECONFIG).unwrap();
        let servers =
            Servers::new(Access { kubeconfig: Some(path), ..Access::default() }, Arc::default()).await.unwrap();
        servers.learn(&["192.0.2.1:6443".parse().unwrap()]).await;
        assert_eq!((servers.count(), servers.url().to_string().as_str()), (1, "http://127.0.0.1:1/"));
    }
}
