//! `svc-agent run`: wires the sources to the reconciler and that to the kernel.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use ipnet::IpNet;
use svc_common::map::MAX_BACKEND_ID;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::cidrs::PodDetector;
use crate::dataplane::{Dataplane as _, Settings, SocketLb, XdpMode, aya};
use crate::notes::Notes;
use crate::plan::NodePortAddresses;
use crate::pods::{PodInterfaces, Pods};
use crate::reconcile::{Config, Outlets, Pace, Reconciler};
use crate::source::{addresses, kubernetes, manifests};
use crate::status::Status;
use crate::{health, host, metrics, notes, serve, service_health, sweep};

/// Events that wait for the reconciler, beyond which sources wait.
const EVENTS: usize = 256;
/// For the write that is under way when the agent is told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Watch the API server that this file names [default: the pod's service account].
    #[arg(long, value_name = "PATH", conflicts_with = "manifests")]
    kubeconfig: Option<PathBuf>,

    /// Serve the manifests in this directory, without any API server.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,

    /// The API server's own address, instead of the one configured.
    #[arg(long, value_name = "URL", conflicts_with = "manifests")]
    api_server: Option<String>,

    /// This node's name [default: the host's name].
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,

    /// The cgroup v2 directory whose processes are served [default: the root].
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    /// Where maps, programs and links are pinned.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/svc")]
    bpffs: PathBuf,

    /// An interface to the network [default: those that carry the node's addresses].
    #[arg(long = "uplink", value_name = "IFACE")]
    uplinks: Vec<String>,

    /// The fast path in front of the complete one.
    #[arg(long, value_enum, default_value_t = XdpMode::Auto)]
    xdp: XdpMode,

    /// Whose sockets are pointed at backends when they connect.
    #[arg(long, value_enum, default_value_t = SocketLb::On)]
    socket_lb: SocketLb,

    /// Refuse the node's own processes ports that are NodePorts: they would get no connection there.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    node_port_bind_protection: bool,

    /// The interfaces of pods, for what sockets do not show: `auto`, `none`, or patterns such as veth*,cali*.
    #[arg(long, value_name = "PATTERN", default_value = "auto")]
    pod_interfaces: PodInterfaces,

    /// Pod addresses of the whole cluster, as CIDRs.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cluster_cidr: Vec<IpNet>,

    /// By what the cluster's pods are told from other clients.
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    detect_local_mode: DetectLocalMode,

    /// With --detect-local-mode BridgeInterface: the bridge that pods are behind.
    #[arg(long, value_name = "IFACE", required_if_eq("detect_local_mode", "BridgeInterface"))]
    pod_bridge_interface: Option<String>,

    /// With --detect-local-mode InterfaceNamePrefix: how the names of pods' interfaces begin.
    #[arg(long, value_name = "PREFIX", required_if_eq("detect_local_mode", "InterfaceNamePrefix"))]
    pod_interface_name_prefix: Option<String>,

    /// Give every connection to a ClusterIP an address of this node as its source.
    #[arg(long)]
    masquerade_all: bool,

    /// Where node ports answer: CIDRs, or `primary` [default: all addresses of the node].
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    nodeport_addresses: NodePortAddresses,

    /// Where /healthz and /livez are served.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:10256")]
    healthz_bind_address: SocketAddr,

    /// Where /metrics is served.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:10249")]
    metrics_bind_address: SocketAddr,

    /// How many flows the kernel keeps track of at a time.
    #[arg(long, value_name = "N", default_value_t = 262_144, value_parser = clap::value_parser!(u32).range(64..=1 << 28))]
    flow_table_size: u32,

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

    /// The least time between two writes to the kernel: what changes meanwhile goes together in the next one.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration)]
    min_sync_period: Duration,

    /// How often the kernel's maps and links are compared with what they should be, and repaired.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    sync_period: Duration,
}

/// As Go writes it: 30s, 1m30s, 500ms.
fn duration(text: &str) -> Result<Duration, String> {
    let duration: kube::core::Duration = text.parse().map_err(|error| format!("{error}: say it as 30s or 1m30s"))?;
    if duration.is_negative() { Err("it is negative".to_owned()) } else { Ok(duration.into()) }
}

/// Kube-proxy's names.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
enum DetectLocalMode {
    /// Their addresses, given by --cluster-cidr.
    #[default]
    #[value(name = "ClusterCIDR")]
    ClusterCidr,
    /// The addresses that the Node object has for its pods.
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// The interface that they come in by, given by --pod-bridge-interface.
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// The interface that they come in by, whose name begins with --pod-interface-name-prefix.
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}

fn pod_detector(args: &Args) -> PodDetector {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let detector = match args.detect_local_mode {
        DetectLocalMode::ClusterCidr if args.cluster_cidr.is_empty() => PodDetector::None,
        DetectLocalMode::ClusterCidr => PodDetector::ClusterCidr(args.cluster_cidr.clone()),
        DetectLocalMode::NodeCidr => PodDetector::NodeCidr,
        DetectLocalMode::BridgeInterface => PodDetector::BridgeInterface(text(&args.pod_bridge_interface)),
        DetectLocalMode::InterfaceNamePrefix => PodDetector::InterfaceNamePrefix(text(&args.pod_interface_name_prefix)),
    };
    if matches!(detector, PodDetector::BridgeInterface(_) | PodDetector::InterfaceNamePrefix(_)) {
        warn!("--detect-local-mode {:?}: pods cannot be told by interface: none is", args.detect_local_mode);
    }
    detector
}

/// Returns at SIGTERM or SIGINT; the kernel part stays attached.
///
/// # Errors
/// Where something the agent needs is missing at the start, or a source breaks for good.
pub fn run(args: Args) -> anyhow::Result<()> {
    require_privilege()?;
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
    let node_name = match &args.node_name {
        Some(name) if !name.trim().is_empty() => name.trim().to_lowercase(),
        _ => host_name().context("--node-name is not given, and the host has no name")?,
    };
    ensure!(
        args.sync_period > Duration::ZERO && args.min_sync_period <= args.sync_period,
        "--sync-period must be longer than nothing, and no shorter than --min-sync-period"
    );
    let status = Arc::new(Status::default());
    let healthz = serve::bind("--healthz-bind-address", args.healthz_bind_address).await?;
    let metrics = serve::bind("--metrics-bind-address", args.metrics_bind_address).await?;
    // A folder or a client that cannot be had is told before the kernel is touched.
    let source = match &args.manifests {
        Some(directory) => {
            std::fs::read_dir(directory).with_context(|| format!("--manifests {}", directory.display()))?;
            Source::Manifests(directory.clone())
        }
        None => Source::Kubernetes(kubernetes::connect(args.kubeconfig.as_deref(), args.api_server.as_deref()).await?),
    };

    let pods = pod_detector(&args);
    info!(version = env!("CARGO_PKG_VERSION"), node = node_name, "starting");
    let uplinks = host::uplinks(&args.uplinks)?;
    let first_uplink = uplinks[0].clone();
    let (dataplane, programs) = aya::open(&Settings {
        cgroup: args.cgroup,
        bpffs: args.bpffs.clone(),
        uplinks: uplinks.clone(),
        xdp: args.xdp,
        socket_lb: args.socket_lb,
        bind_protection: args.node_port_bind_protection,
        flow_table_size: args.flow_table_size,
        max_services: args.max_services,
        max_backends: args.max_backends,
        timeouts: args.timeouts.timeouts(),
        max_frontends: args.max_frontends.unwrap_or(args.max_services * 2),
    })?;
    tokio::spawn(sweep::run(args.bpffs));

    let pod_interfaces =
        Pods::start(args.pod_interfaces, uplinks, programs, args.sync_period, Arc::clone(&status)).await?;

    let health_status = Arc::clone(&status);
    tokio::spawn(serve::serve(healthz, move |path| health::answer(path, &health_status, SystemTime::now())));
    let (metrics_status, counters) = (Arc::clone(&status), dataplane.counters());
    tokio::spawn(serve::serve(metrics, move |path| metrics::answer(path, &metrics_status, counters.as_deref())));

    let (events, inbox) = mpsc::channel(EVENTS);
    let config = Config {
        node_name: node_name.clone(),
        nodeport_addresses: args.nodeport_addresses,
        pods,
        masquerade_all: args.masquerade_all,
        limits: dataplane.limits(),
        pace: Pace { min_sync_period: args.min_sync_period, sync_period: args.sync_period },
    };
    let (health_checks, wanted_checks) = watch::channel(service_health::Checks::default());
    let (notes, told) = match &source {
        Source::Kubernetes(_) => Notes::channel(),
        Source::Manifests(_) => (Notes::default(), mpsc::channel(1).1),
    };
    let reconciler = Reconciler::new(config, dataplane, Arc::clone(&status))
        .with_outlets(Outlets { health_checks, notes: notes.clone() });
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
        let objects = async {
            match source {
                Source::Manifests(directory) => {
                    manifests::run(&directory, &node_name, events.clone(), Arc::clone(&status)).await
                }
                Source::Kubernetes(client) => {
                    let (note_client, note_name) = (client.clone(), node_name.clone());
                    tokio::spawn(async move { notes::run(note_client, &note_name, told).await });
                    kubernetes::run(client, &node_name, events.clone(), Arc::clone(&status)).await;
                    Ok(())
                }
            }
        };
        tokio::try_join!(objects, addresses::run(events.clone(), &first_uplink), pod_interfaces.follow())
    };
    tokio::select! {
        result = sources => {
            result?;
            anyhow::bail!("the sources ended, which they never should")
        }
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
    Kubernetes(kube::Client),
}

fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_lowercase()).filter(|name| !name.is_empty())
}

/// CAP_NET_ADMIN and CAP_BPF, or CAP_SYS_ADMIN, which stood for the latter before Linux 5.8 (capabilities(7)).
fn require_privilege() -> anyhow::Result<()> {
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_ADMIN: u64 = 1 << 21;
    const BPF: u64 = 1 << 39;
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .context("/proc/self/status has no CapEff")?;
    if effective & NET_ADMIN == 0 || effective & (SYS_ADMIN | BPF) == 0 {
        anyhow::bail!("run needs root, or the capabilities NET_ADMIN and BPF: try sudo");
    }
    Ok(())
}
