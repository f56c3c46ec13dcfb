//! `svc-agent run`: wires the sources to the reconciler and that to the kernel.
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use ipnet::IpNet;
use serde_json::json;
use svc_common::flow::Timeouts;
use svc_common::map::MAX_BACKEND_ID;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::cidrs::{DetectLocalMode, PodDetector};
use crate::dataplane::{Dataplane as _, Settings, SocketLb, TcMode, XdpMode, aya};
use crate::inspect::{MAPS, Pins};
use crate::kube_proxy_config::{
    self, EXTERNAL_IPS_GATE, FLOW_TABLE_SIZES, HEALTHZ_PORT, KubeProxyConfig, METRICS_PORT, default_flow_table_size,
};
use crate::metrics::Exporter;
use crate::netns::Places;
use crate::notes::{Note, Notes};
use crate::object::ObjectName;
use crate::plan::NodePortAddresses;
use crate::pods::{PodInterfaces, Pods};
use crate::reconcile::{Config, Outlets, Pace, Reconciler};
use crate::source::servers::{Access, Servers};
use crate::source::{self, addresses, kubernetes, manifests};
use crate::stale_sockets::Departures;
use crate::status::Status;
use crate::{
    go_duration, health, host, memory, metrics, next_hops, notes, serve, service_health, stale_sockets, sweep,
};

/// Events that wait for the reconciler, beyond which sources wait.
const EVENTS: usize = 256;
/// Between two looks at whether the configuration file has changed.
const CONFIG_EVERY: Duration = Duration::from_secs(5);
/// For the write that is under way when the agent is told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(clap::Args, Debug)]
pub struct Args {
    /// A configuration file of kube-proxy's (KubeProxyConfiguration); flags have precedence.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    /// Watch the API server that this file names [default: the pod's service account].
    #[arg(long, value_name = "PATH", conflicts_with = "manifests")]
    kubeconfig: Option<PathBuf>,

    /// Serve the manifests in this directory, without any API server.
    #[arg(long, value_name = "DIR")]
    pub(super) manifests: Option<PathBuf>,

    /// An API server's own address, instead of the one configured; several are tried in turn.
    #[arg(long, value_name = "URL", conflicts_with = "manifests")]
    api_server: Vec<String>,

    /// This node's name [default: the host's name].
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,

    /// The cgroup v2 directory whose processes are served [default: the root].
    #[arg(long, value_name = "PATH")]
    pub(super) cgroup: Option<PathBuf>,

    /// Where maps, programs and links are pinned.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/svc")]
    pub(super) bpffs: PathBuf,

    /// An interface to the network [default: network cards, those with a default route, and tunnels].
    #[arg(long = "uplink", value_name = "IFACE")]
    pub(super) uplinks: Vec<String>,

    /// The fast path in front of the complete one.
    #[arg(long, value_enum, default_value_t = XdpMode::Auto)]
    xdp: XdpMode,

    /// How the programs are attached to interfaces.
    #[arg(long, value_enum, default_value_t = TcMode::Auto)]
    pub(super) tc: TcMode,

    /// Whose sockets are pointed at backends when they connect.
    #[arg(long, value_enum, default_value_t = SocketLb::On)]
    socket_lb: SocketLb,

    /// Refuse the node's own processes ports that are NodePorts: they would get no connection there.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    node_port_bind_protection: bool,

    /// Terminate connected UDP sockets whose backend has left, so that their owners connect anew.
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, default_value_t = true)]
    terminate_udp_sockets: bool,

    /// Where named network namespaces are, whose sockets are terminated like those of processes.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "/run/netns,/var/run/netns")]
    netns_dirs: Vec<PathBuf>,

    /// The interfaces of pods, for what sockets do not show: `auto`, `none`, or patterns such as veth*,cali*.
    #[arg(long, value_name = "PATTERN", default_value = "auto")]
    pod_interfaces: PodInterfaces,

    /// Pod addresses of the whole cluster, as CIDRs.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cluster_cidr: Vec<IpNet>,

    /// By what the cluster's pods are told from other clients [default: ClusterCIDR].
    #[arg(long, value_name = "MODE", value_enum)]
    detect_local_mode: Option<DetectLocalMode>,

    /// With --detect-local-mode BridgeInterface: the bridge that pods are behind.
    #[arg(long, value_name = "IFACE")]
    pod_bridge_interface: Option<String>,

    /// With --detect-local-mode InterfaceNamePrefix: how the names of pods' interfaces begin.
    #[arg(long, value_name = "PREFIX")]
    pod_interface_name_prefix: Option<String>,

    /// Give every connection to a ClusterIP an address of this node as its source.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    masquerade_all: Option<bool>,

    /// Serve Services' externalIPs; false where their authors are not trusted with addresses [default: true].
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set)]
    external_ips: Option<bool>,

    /// Leave connections alone that began before: while kube-proxy's are under way.
    #[arg(long)]
    take_over: bool,

    /// Where node ports answer: CIDRs, or `primary` [default: all addresses of the node].
    #[arg(long, value_name = "LIST")]
    nodeport_addresses: Option<NodePortAddresses>,

    /// Where /healthz and /livez are served [default: 0.0.0.0:10256].
    #[arg(long, value_name = "ADDRESS")]
    pub(super) healthz_bind_address: Option<SocketAddr>,

    /// Where /metrics is served [default: 127.0.0.1:10249].
    #[arg(long, value_name = "ADDRESS")]
    pub(super) metrics_bind_address: Option<SocketAddr>,

    /// Of how many Service ports, each address family counted for itself, /metrics tells the connections: a series each.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    max_service_metrics: u32,

    /// Count the bytes to and from each backend, for /metrics and `svc-agent top`. Each translated packet takes a little
    /// longer, and each CPU 16 bytes for each of --max-backends. Sockets that are pointed at their backend are not counted.
    #[arg(long)]
    count_bytes: bool,

    /// How many flows the kernel keeps track of at a time, at 256 bytes each, and half as many sockets, at 128 [default: 32768 a
    /// core, from 131072 to 1048576].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(FLOW_TABLE_SIZES))]
    flow_table_size: Option<u32>,

    /// How many Service ports, each address family counted for itself.
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_services: u32,

    /// How many backends.
    #[arg(long, value_name = "N", default_value_t = 262_144,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_BACKEND_ID)))]
    max_backends: u32,

    #[command(flatten)]
    timeouts: super::timeouts::TimeoutArgs,

    /// How many addresses of Services, each port and protocol counted for itself [default: twice --max-services].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 25))]
    max_frontends: Option<u32>,

    /// The least time between two writes to the kernel: what changes meanwhile goes together in the next one [default:
    /// 0s].
    #[arg(long, value_name = "DURATION", value_parser = go_duration::parse)]
    min_sync_period: Option<Duration>,

    /// How often the kernel's maps and links are compared with what they should be, and repaired [default: 30s].
    #[arg(long, value_name = "DURATION", value_parser = go_duration::parse)]
    sync_period: Option<Duration>,
}

/// What flags and the configuration file say together, flags first, and else the defaults.
pub(crate) struct Effective {
    pub(super) node_name: String,
    pub(super) healthz_bind_address: SocketAddr,
    pub(super) metrics_bind_address: SocketAddr,
    cluster_cidr: Vec<IpNet>,
    detect_local_mode: DetectLocalMode,
    bridge_interface: Option<String>,
    interface_name_prefix: Option<String>,
    masquerade_all: bool,
    external_ips: bool,
    nodeport_addresses: NodePortAddresses,
    min_sync_period: Duration,
    sync_period: Duration,
    pub(super) kubeconfig: Option<PathBuf>,
    timeouts: Timeouts,
    flow_table_size: u32,
}

impl Effective {
    pub(crate) fn new(args: &Args, file: KubeProxyConfig) -> anyhow::Result<Self> {
        let name = |name: Option<String>| name.map(|name| name.trim().to_lowercase()).filter(|name| !name.is_empty());
        let node_name = name(args.node_name.clone()).or_else(|| name(file.hostname_override)).or_else(host_name);
        let pace = Pace::default();
        let timeouts = args.timeouts.timeouts(&file.timeouts)?;
        let effective = Effective {
            node_name: node_name.context("--node-name is not given, and the host has no name")?,
            healthz_bind_address: args
                .healthz_bind_address
                .or(file.healthz_bind_address)
                .unwrap_or((Ipv4Addr::UNSPECIFIED, HEALTHZ_PORT).into()),
            metrics_bind_address: args
                .metrics_bind_address
                .or(file.metrics_bind_address)
                .unwrap_or((Ipv4Addr::LOCALHOST, METRICS_PORT).into()),
            cluster_cidr: if args.cluster_cidr.is_empty() { file.cluster_cidr } else { args.cluster_cidr.clone() },
            detect_local_mode: args.detect_local_mode.or(file.detect_local_mode).unwrap_or_default(),
            bridge_interface: args.pod_bridge_interface.clone().or(file.bridge_interface),
            interface_name_prefix: args.pod_interface_name_prefix.clone().or(file.interface_name_prefix),
            masquerade_all: args.masquerade_all.or(file.masquerade_all).unwrap_or_default(),
            external_ips: args.external_ips.or(file.external_ips).unwrap_or(true),
            nodeport_addresses: args.nodeport_addresses.clone().or(file.nodeport_addresses).unwrap_or_default(),
            min_sync_period: args.min_sync_period.or(file.min_sync_period).unwrap_or(pace.min_sync_period),
            sync_period: args.sync_period.or(file.sync_period).unwrap_or(pace.sync_period),
            kubeconfig: args.kubeconfig.clone().or(file.kubeconfig.filter(|_| args.manifests.is_none())),
            timeouts,
            flow_table_size: args
                .flow_table_size
                .or(file.flow_table_size)
                .unwrap_or_else(|| default_flow_table_size(host::online_cpus())),
        };
        ensure!(
            effective.sync_period > Duration::ZERO && effective.min_sync_period <= effective.sync_period,
            "--sync-period must be longer than nothing, and no shorter than --min-sync-period"
        );
        Ok(effective)
    }

    /// As kube-proxy's /configz has it.
    pub(crate) fn configz(&self) -> String {
        let list = |items: &[IpNet]| items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        // As Go writes it.
        let duration = |duration: Duration| match duration {
            Duration::ZERO => "0s".to_owned(),
            other => kube::core::Duration::from(other).to_string(),
        };
        let seconds = |seconds: u32| duration(Duration::from_secs(seconds.into()));
        json!({ "kubeproxy.config.k8s.io": {
            "kind": "KubeProxyConfiguration",
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "featureGates": { EXTERNAL_IPS_GATE: self.external_ips },
            "clientConnection": { "kubeconfig": self.kubeconfig.clone().unwrap_or_default() },
            "hostnameOverride": self.node_name,
            "healthzBindAddress": self.healthz_bind_address,
            "metricsBindAddress": self.metrics_bind_address,
            "mode": metrics::PROXY_MODE,
            metrics::PROXY_MODE: {
                "masqueradeAll": self.masquerade_all,
                "syncPeriod": duration(self.sync_period),
                "minSyncPeriod": duration(self.min_sync_period),
            },
            "conntrack": {
                "tcpEstablishedTimeout": seconds(self.timeouts.tcp_established),
                "tcpCloseWaitTimeout": seconds(self.timeouts.tcp_closing),
                "udpTimeout": seconds(self.timeouts.udp),
                "udpStreamTimeout": seconds(self.timeouts.udp_stream),
            },
            "detectLocalMode": self.detect_local_mode.label(),
            "detectLocal": {
                "bridgeInterface": self.bridge_interface.clone().unwrap_or_default(),
                "interfaceNamePrefix": self.interface_name_prefix.clone().unwrap_or_default(),
            },
            "clusterCIDR": list(&self.cluster_cidr),
            "nodePortAddresses": self.nodeport_addresses,
        } })
        .to_string()
    }

    pub(crate) fn pod_detector(&self) -> anyhow::Result<PodDetector> {
        let mode = self.detect_local_mode;
        let needed = |text: &Option<String>, flag: &str| {
            text.clone().with_context(|| format!("--detect-local-mode {} needs {flag}", mode.label()))
        };
        let detector = match mode {
            DetectLocalMode::ClusterCidr if self.cluster_cidr.is_empty() => PodDetector::None,
            DetectLocalMode::ClusterCidr => PodDetector::ClusterCidr(self.cluster_cidr.clone()),
            DetectLocalMode::NodeCidr => PodDetector::NodeCidr,
            DetectLocalMode::BridgeInterface => {
                PodDetector::BridgeInterface(needed(&self.bridge_interface, "--pod-bridge-interface")?)
            }
            DetectLocalMode::InterfaceNamePrefix => {
                PodDetector::InterfaceNamePrefix(needed(&self.interface_name_prefix, "--pod-interface-name-prefix")?)
            }
        };
        if matches!(detector, PodDetector::BridgeInterface(_) | PodDetector::InterfaceNamePrefix(_)) {
            warn!("--detect-local-mode {}: every interface of --pod-interfaces counts as a pod's", mode.label());
        }
        Ok(detector)
    }
}

/// The file of --config, and its text.
pub(super) fn read_config(path: &Path) -> anyhow::Result<(KubeProxyConfig, String)> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--config {}", path.display()))?;
    let (config, warnings) = kube_proxy_config::parse(&text).with_context(|| format!("--config {}", path.display()))?;
    for warning in warnings {
        warn!(file = %path.display(), "no effect: {warning}");
    }
    Ok((config, text))
}

/// Returns when the file's text is another one. As with kube-proxy, a restart is what brings it into force.
async fn changed(config: Option<(PathBuf, String)>) {
    let Some((path, text)) = config else { return std::future::pending().await };
    loop {
        tokio::time::sleep(CONFIG_EVERY).await;
        // A file that is being replaced may be away for a moment.
        if std::fs::read_to_string(&path).is_ok_and(|now| now != text) {
            return;
        }
    }
}

/// Returns at SIGTERM or SIGINT; the kernel part stays attached.
///
/// # Errors
/// Where something the agent needs is missing at the start, or a source breaks for good.
pub fn run(args: Args) -> anyhow::Result<()> {
    require_privilege()?;
    memory::keep_little_free();
    // One thread waits for the network, one writes to the kernel: that is all there is to do.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .build()
        .context("cannot start")?;
    let result = runtime.block_on(serve(args));
    runtime.shutdown_background();
    result
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let (file, config_text) = match &args.config {
        Some(path) => read_config(path).map(|(config, text)| (config, Some((path.clone(), text))))?,
        None => Default::default(),
    };
    let oom_score_adj = file.oom_score_adj;
    let effective = Effective::new(&args, file)?;
    let pods = effective.pod_detector()?;
    let node_name = effective.node_name.clone();
    if let Some(score) = oom_score_adj {
        std::fs::write("/proc/self/oom_score_adj", score.to_string()).context("setting oomScoreAdj")?;
    }
    let status = Arc::new(Status::new(effective.sync_period));
    let healthz = serve::bind("--healthz-bind-address", effective.healthz_bind_address).await?;
    let metrics = serve::bind("--metrics-bind-address", effective.metrics_bind_address).await?;
    // A folder or a client that cannot be had is told before the kernel is touched.
    if let Some(path) = &effective.kubeconfig {
        std::fs::File::open(path).with_context(|| format!("--kubeconfig {}", path.display()))?;
    }
    let source = match &args.manifests {
        Some(directory) => {
            std::fs::read_dir(directory).with_context(|| format!("--manifests {}", directory.display()))?;
            Source::Manifests(directory.clone())
        }
        None => Source::Kubernetes(Servers::new(access(&args, &effective), Arc::clone(&status)).await?),
    };

    // As for kube-proxy: not before the Node object has been seen, where there is to be one.
    status.set_node_eligible(matches!(source, Source::Manifests(_)));
    info!(version = env!("CARGO_PKG_VERSION"), node = node_name, "starting");
    let uplinks = host::uplinks(&args.uplinks)?;
    let first_uplink = uplinks[0].clone();
    let (events, inbox) = mpsc::channel(EVENTS);
    let (notes, told) = match &source {
        Source::Kubernetes(_) => Notes::channel(),
        Source::Manifests(_) => (Notes::default(), mpsc::channel(1).1),
    };
    // The objects are read while the kernel looks through the programs.
    let objects = tokio::spawn(follow(source, node_name.clone(), events.clone(), Arc::clone(&status), told));
    let settings = Settings {
        cgroup: args.cgroup,
        bpffs: args.bpffs.clone(),
        uplinks,
        xdp: args.xdp,
        tc: args.tc,
        socket_lb: args.socket_lb,
        bind_protection: args.node_port_bind_protection,
        flow_table_size: effective.flow_table_size,
        max_services: args.max_services,
        max_backends: args.max_backends,
        timeouts: effective.timeouts,
        max_frontends: args.max_frontends.unwrap_or(args.max_services * 2),
        count_bytes: args.count_bytes,
    };
    let opened = tokio::task::spawn_blocking(move || aya::open(&settings)).await;
    let (dataplane, programs) = opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    let places = (args.socket_lb == SocketLb::On).then(|| Places { proc: "/proc".into(), named: args.netns_dirs });
    let departures = if args.terminate_udp_sockets && args.socket_lb != SocketLb::Off {
        stale_sockets::start(&args.bpffs, places, Arc::clone(&status))?
    } else {
        Departures::default()
    };
    let maps = args.bpffs.join(MAPS);
    tokio::spawn(next_hops::run(maps.clone()));
    tokio::spawn(sweep::run(args.bpffs));

    let more_uplinks = args.uplinks.is_empty();
    let pod_interfaces =
        Pods::start(args.pod_interfaces, more_uplinks, programs, effective.sync_period, Arc::clone(&status)).await?;

    let health_status = Arc::clone(&status);
    tokio::spawn(serve::serve(healthz, move |path| {
        std::future::ready(health::answer(&path, &health_status, SystemTime::now()))
    }));
    let (exporter_status, counters) = (Arc::clone(&status), dataplane.counters());
    let exporter =
        Exporter::new(exporter_status, counters, maps, effective.configz(), args.max_service_metrics as usize);
    let exporter = Arc::new(exporter);
    tokio::spawn(serve::serve(metrics, move |path| Arc::clone(&exporter).answer(path)));

    let config = Config {
        node_name: node_name.clone(),
        nodeport_addresses: effective.nodeport_addresses.clone(),
        pods,
        masquerade_all: effective.masquerade_all,
        external_ips: effective.external_ips,
        take_over: args.take_over,
        limits: dataplane.limits(),
        pace: Pace { min_sync_period: effective.min_sync_period, sync_period: effective.sync_period },
    };
    let (health_checks, wanted_checks) = watch::channel(service_health::Checks::default());
    let reconciler = Reconciler::new(config, dataplane, Arc::clone(&status)).with_outlets(Outlets {
        health_checks,
        notes: notes.clone(),
        departures,
    });
    let check_name = node_name.clone();
    let check_status = Arc::clone(&status);
    tokio::spawn(async move { service_health::run(wanted_checks, &check_name, check_status, notes).await });
    let runtime = tokio::runtime::Handle::current();
    let (stopped, mut has_stopped) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("reconcile".to_owned())
        .spawn(move || {
            reconciler.run(&runtime, inbox);
            let _ = stopped.send(());
        })
        .context("cannot start a thread")?;

    let sources = async {
        let objects = async { objects.await.context("the task that follows the objects ended")? };
        tokio::try_join!(objects, addresses::run(events.clone(), &first_uplink), pod_interfaces.follow())
    };
    tokio::select! {
        result = sources => {
            result?;
            anyhow::bail!("the sources ended, which they never should")
        }
        () = changed(config_text) => anyhow::bail!("the file of --config has changed: stopping, to be started with the new one"),
        _ = &mut has_stopped => anyhow::bail!("the reconciler stopped, which it never should"),
        _ = terminate.recv() => info!("SIGTERM: stopping; what is in the kernel stays in force"),
        _ = interrupt.recv() => info!("SIGINT: stopping; what is in the kernel stays in force"),
    }
    drop(events);
    let _ = tokio::time::timeout(STOP_TIMEOUT, has_stopped).await;
    Ok(())
}

enum Source {
    Manifests(PathBuf),
    Kubernetes(Arc<Servers>),
}

/// Sends what the objects say, and tells the API server what `told` brings.
async fn follow(
    source: Source,
    node_name: String,
    events: source::Sender,
    status: Arc<Status>,
    told: mpsc::Receiver<Note>,
) -> anyhow::Result<()> {
    match source {
        Source::Manifests(directory) => manifests::run(&directory, &node_name, events, status).await,
        Source::Kubernetes(servers) => {
            let (client, name) = (servers.client(), node_name.clone());
            tokio::spawn(async move { notes::run(client, &name, told).await });
            kubernetes::run(servers, &node_name, events, status).await;
            Ok(())
        }
    }
}

fn access(args: &Args, effective: &Effective) -> Access {
    let kubernetes = ObjectName::new("default", "kubernetes");
    let remembered = Pins::open(&args.bpffs).and_then(|pins| pins.backends_of(&kubernetes, "https"));
    Access {
        kubeconfig: effective.kubeconfig.clone(),
        urls: args.api_server.clone(),
        // Nothing is pinned before the first run.
        remembered: remembered.unwrap_or_default(),
    }
}

pub(super) fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_lowercase()).filter(|name| !name.is_empty())
}

fn require_privilege() -> anyhow::Result<()> {
    ensure!(
        host::capabilities()?.may_run(),
        "run needs root, or the capabilities NET_ADMIN, BPF and PERFMON: try sudo"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn effective(flags: &[&str], file: KubeProxyConfig) -> anyhow::Result<Effective> {
        let cli = Cli::try_parse_from(["svc-agent", "run", "--node-name", "a"].iter().chain(flags)).unwrap();
        let Command::Run(args) = cli.command else { panic!("another subcommand") };
        Effective::new(&args, file)
    }

    fn file() -> KubeProxyConfig {
        KubeProxyConfig {
            kubeconfig: Some("/file".into()),
            hostname_override: Some("of-file".to_owned()),
            healthz_bind_address: Some("192.0.2.1:1".parse().unwrap()),
            cluster_cidr: vec!["10.1.0.0/16".parse().unwrap()],
            detect_local_mode: Some(DetectLocalMode::NodeCidr),
            nodeport_addresses: Some(NodePortAddresses::Primary),
            masquerade_all: Some(true),
            min_sync_period: Some(Duration::from_secs(1)),
            sync_period: Some(Duration::from_secs(10)),
            ..KubeProxyConfig::default()
        }
    }

    fn in_force(effective: &Effective) -> serde_json::Value {
        let all: serde_json::Value = serde_json::from_str(&effective.configz()).unwrap();
        all["kubeproxy.config.k8s.io"].clone()
    }

    #[test]
    fn without_flag_and_file_the_defaults_are_kube_proxys_but_for_the_pause_between_writes() {
        let config = in_force(&effective(&[], KubeProxyConfig::default()).unwrap());
        for (field, value) in [
            ("/healthzBindAddress", json!("0.0.0.0:10256")),
            ("/metricsBindAddress", json!("127.0.0.1:10249")),
            ("/detectLocalMode", json!("ClusterCIDR")),
            ("/nodePortAddresses", json!([])),
            ("/ebpf/masqueradeAll", json!(false)),
            ("/ebpf/syncPeriod", json!("30s")),
            ("/ebpf/minSyncPeriod", json!("0s")),
        ] {
            assert_eq!(config.pointer(field), Some(&value), "{field}");
        }
    }

    #[test]
    fn the_file_counts_where_no_flag_is_given() {
        let config = in_force(&effective(&[], file()).unwrap());
        for (field, value) in [
            ("/clientConnection/kubeconfig", json!("/file")),
            ("/healthzBindAddress", json!("192.0.2.1:1")),
            ("/clusterCIDR", json!("10.1.0.0/16")),
            ("/detectLocalMode", json!("NodeCIDR")),
            ("/nodePortAddresses", json!(["primary"])),
            ("/ebpf/masqueradeAll", json!(true)),
            ("/ebpf/syncPeriod", json!("10s")),
            ("/ebpf/minSyncPeriod", json!("1s")),
        ] {
            assert_eq!(config.pointer(field), Some(&value), "{field}");
        }
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let flags = [
            "--kubeconfig=/flag",
            "--healthz-bind-address=192.0.2.2:2",
            "--cluster-cidr=10.2.0.0/16,fd00::/64",
            "--detect-local-mode=ClusterCIDR",
            "--nodeport-addresses=",
            "--masquerade-all=false",
            "--sync-period=1m",
            "--min-sync-period=0s",
        ];
        let config = in_force(&effective(&flags, file()).unwrap());
        for (field, value) in [
            ("/clientConnection/kubeconfig", json!("/flag")),
            ("/hostnameOverride", json!("a")),
            ("/healthzBindAddress", json!("192.0.2.2:2")),
            ("/clusterCIDR", json!("10.2.0.0/16,fd00::/64")),
            ("/detectLocalMode", json!("ClusterCIDR")),
            ("/nodePortAddresses", json!([])),
            ("/ebpf/masqueradeAll", json!(false)),
            ("/ebpf/minSyncPeriod", json!("0s")),
        ] {
            assert_eq!(config.pointer(field), Some(&value), "{field}");
        }
    }

    #[test]
    fn a_pace_that_cannot_be_is_refused() {
        assert!(effective(&["--sync-period=0s"], KubeProxyConfig::default()).is_err());
        assert!(effective(&["--sync-period=1s", "--min-sync-period=2s"], KubeProxyConfig::default()).is_err());
    }

    #[test]
    fn a_detector_by_interface_needs_the_interface() {
        let by_bridge = |flags: &[&str]| {
            let flags = [&["--detect-local-mode=BridgeInterface"], flags].concat();
            effective(&flags, KubeProxyConfig::default()).unwrap().pod_detector()
        };
        assert!(by_bridge(&[]).unwrap_err().to_string().contains("--pod-bridge-interface"));
        let detector = by_bridge(&["--pod-bridge-interface=cni0"]).unwrap();
        assert_eq!(detector, PodDetector::BridgeInterface("cni0".to_owned()));
    }
}
