//! A node: one tree of processes in network, mount, PID, UTS, IPC and cgroup namespaces of its own, below its own directory of
//! every cgroup hierarchy.
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use serde_json::json;

use crate::network::{DNS, NODES, addresses, pod_cidrs};
use crate::programs::{self, CNI_PLUGINS, RUNC};
use crate::state::Cluster;
use crate::{hierarchies, image};

/// Over each of these the node has an overlay: no mount point is made on the machine's own file system, where removing it
/// would take the mount away in every namespace.
const OVERLAYS: [&str; 5] = ["/etc", "/opt", "/usr/lib", "/var/lib", "/var/log"];
/// Kept outside of the overlays, on which containerd could not make its own.
const STATE: [&str; 5] =
    ["/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/log/pods", "/var/log/containers"];
/// What a kubelet sets on a machine of its own. Here it finds them set, and the machine's are left alone.
const TUNABLES: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const PATIENCE: Duration = Duration::from_secs(300);

/// Starts a node, whose kubelet registers with the API server once that is there.
pub(crate) fn start(cluster: &Cluster, node: &str) -> Result<()> {
    let directory = cluster.node_directory(node);
    fs::create_dir_all(&directory)?;
    write_configuration(cluster, node)?;
    let mut cgroups = Vec::new();
    for hierarchy in hierarchies::all()? {
        cgroups.push(hierarchy.create(&cluster.cgroup(node))?);
    }
    let paths: Vec<_> = cgroups.iter().map(|path| path.display().to_string()).collect();
    fs::write(directory.join("cgroups"), paths.join("\n"))?;

    let log = File::create(cluster.log(node, "init"))?;
    let namespace = cluster.namespace(node).path();
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", namespace.display()))
        .args(["unshare", "--mount", "--uts", "--ipc", "--cgroup", "--pid", "--fork", "--kill-child"])
        .arg(std::env::current_exe()?)
        .args(["--name", cluster.name(), "init", node])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    hierarchies::join(&mut command, cgroups)?;
    let unshare = command.spawn().context("cannot start nsenter and unshare (util-linux)")?.id();
    let deadline = Instant::now() + PATIENCE;
    let ready = directory.join("ready");
    while !ready.exists() {
        if Instant::now() > deadline || !Path::new(&format!("/proc/{unshare}/exe")).exists() {
            let log = fs::read_to_string(cluster.log(node, "init")).unwrap_or_default();
            bail!("the node {node} does not start: {}", log.trim());
        }
        thread::sleep(Duration::from_millis(20));
    }
    let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
    fs::write(directory.join("pid"), children.trim())?;
    Ok(())
}

/// A command in all namespaces and cgroups of a node.
pub(crate) fn command(cluster: &Cluster, node: &str, program: &str) -> Result<Command> {
    let directory = cluster.node_directory(node);
    let pid = fs::read_to_string(directory.join("pid"))
        .with_context(|| format!("there is no node {node}, but {}", NODES.join(", ")))?;
    let mut command = Command::new("nsenter");
    command
        .args(["--target", &pid, "--net", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--wd=/", "--", program]);
    let cgroups = fs::read_to_string(directory.join("cgroups"))?;
    hierarchies::join(&mut command, cgroups.lines().map(PathBuf::from).collect())?;
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:/usr/sbin:/sbin:{path}", programs::directory()?.display()));
    Ok(command)
}

/// A shell on a node, or another command.
pub(crate) fn shell(cluster: &Cluster, node: &str, words: &[String]) -> Result<()> {
    cluster.require_up()?;
    let shell = std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".into());
    let mut words = words.iter();
    let program = words.next().unwrap_or(&shell);
    Err(command(cluster, node, program)?.args(words).exec()).context("cannot start nsenter")
}

/// Puts images into a node's store.
pub(crate) fn import(cluster: &Cluster, node: &str, archives: &[PathBuf]) -> Result<()> {
    for archive in archives {
        let mut ctr = command(cluster, node, "ctr")?;
        ctr.args(["--namespace", "k8s.io", "images", "import", "--local"]).arg(archive);
        let output = ctr.stdin(Stdio::null()).output().context("cannot start nsenter")?;
        if !output.status.success() {
            let told = String::from_utf8_lossy(&output.stderr);
            bail!("{node} does not take {}: {}", archive.display(), told.trim());
        }
    }
    Ok(())
}

fn write_configuration(cluster: &Cluster, node: &str) -> Result<()> {
    let directory = cluster.node_directory(node);
    let ranges = pod_cidrs(node).map(|subnet| json!([{ "subnet": subnet }]));
    let network = json!({
        "cniVersion": "0.4.0", "name": "svc", "plugins": [
            { "type": "ptp", "ipMasq": false, "mtu": 1500, "ipam": {
                "type": "host-local", "dataDir": "/run/cni-ipam-state",
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }], "ranges": ranges,
            } },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    });
    fs::write(directory.join("network.conflist"), network.to_string())?;
    fs::write(directory.join("containerd.toml"), containerd_configuration())?;
    let authority = cluster.directory().join("pki/ca.crt");
    let kubelet = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": { "enabled": false }, "webhook": { "enabled": true }, "x509": { "clientCAFile": authority },
        },
        "authorization": { "mode": "Webhook" },
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD_SOCKET}"),
        "cgroupDriver": "cgroupfs", "cgroupRoot": "/", "failCgroupV1": false, "failSwapOn": false,
        "protectKernelDefaults": true, "maxOpenFiles": 20000,
        "clusterDNS": [DNS], "clusterDomain": "cluster.local", "resolvConf": "/etc/resolv.conf",
        // The machine's disk may be as full as it is.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "100Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
            "imagefs.available": "0%", "imagefs.inodesFree": "0%",
        },
        "nodeStatusUpdateFrequency": "5s", "rotateCertificates": false,
    });
    fs::write(directory.join("kubelet.json"), kubelet.to_string())?;
    let (v4, _) = addresses(node);
    fs::write(directory.join("hosts"), format!("127.0.0.1 localhost\n::1 localhost\n{v4} {node}\n"))?;
    // No name server but the cluster's own.
    fs::write(directory.join("resolv.conf"), "")?;
    Ok(())
}

fn containerd_configuration() -> String {
    let sandbox = image::PAUSE;
    // A machine of which this is a part may not let it lower an oom_score_adj. An overlay that is not volatile writes the
    // machine's whole file system to disk when it is unmounted.
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{sandbox}"
[plugins.'io.containerd.snapshotter.v1.overlayfs']
  mount_options = ["volatile"]
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = "runc"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = "{RUNC}"
  SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["{CNI_PLUGINS}"]
  conf_dir = "/etc/cni/net.d"
"#
    )
}

/// The first process of a node: makes its file systems, keeps containerd and kubelet running, and reaps orphans.
pub(crate) fn init(cluster: &Cluster, node: &str) -> Result<()> {
    let directory = cluster.node_directory(node);
    fs::write("/proc/sys/kernel/hostname", node)?;
    mount_file_systems(&directory)?;
    fs::create_dir_all("/etc/kubernetes")?;
    fs::copy(cluster.kubeconfig(node), "/etc/kubernetes/kubelet.conf")?;
    fs::create_dir_all("/etc/cni/net.d")?;
    fs::copy(directory.join("network.conflist"), "/etc/cni/net.d/10-svc.conflist")?;
    for (setting, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
    ] {
        fs::write(Path::new("/proc/sys/net").join(setting), value)?;
    }
    let built = programs::directory()?;
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", built.display());

    let mut containerd = Command::new(built.join("containerd"));
    containerd.arg("--config").arg(directory.join("containerd.toml")).env("PATH", &path);
    let mut kubelet = Command::new(built.join("kubelet"));
    let (v4, v6) = addresses(node);
    kubelet
        .arg("--config")
        .arg(directory.join("kubelet.json"))
        .args(["--kubeconfig", "/etc/kubernetes/kubelet.conf", "--hostname-override", node])
        .arg(format!("--node-ip={v4},{v6}"))
        .arg("--v=2")
        .env("PATH", &path);
    let mut kept = vec![Kept::start(cluster, node, "containerd", containerd)?];
    let deadline = Instant::now() + PATIENCE;
    while std::os::unix::net::UnixStream::connect(CONTAINERD_SOCKET).is_err() {
        if Instant::now() > deadline {
            bail!("containerd does not answer");
        }
        thread::sleep(Duration::from_millis(20));
    }
    kept.push(Kept::start(cluster, node, "kubelet", kubelet)?);
    fs::write(directory.join("ready"), "")?;
    loop {
        let mut status = 0;
        // SAFETY: the status is written to.
        let ended = unsafe { libc::wait(&raw mut status) };
        for program in kept.iter_mut().filter(|program| program.pid.cast_signed() == ended) {
            println!("{} ended with {status:#x}", program.name);
            thread::sleep(Duration::from_secs(1));
            program.restart()?;
        }
    }
}

/// A program that is started again when it ends.
struct Kept {
    name: &'static str,
    command: Command,
    pid: u32,
    pid_file: PathBuf,
}

impl Kept {
    fn start(cluster: &Cluster, node: &str, name: &'static str, mut command: Command) -> Result<Self> {
        let log = File::options().append(true).create(true).open(cluster.log(node, name))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let pid_file = cluster.node_directory(node).join(format!("{name}.pid"));
        let mut kept = Kept { name, command, pid: 0, pid_file };
        kept.restart()?;
        Ok(kept)
    }

    fn restart(&mut self) -> Result<()> {
        self.pid = self.command.spawn().with_context(|| format!("cannot start {}", self.name))?.id();
        fs::write(&self.pid_file, self.pid.to_string())?;
        Ok(())
    }
}

fn mount_file_systems(directory: &Path) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    file_system("proc", "/proc".as_ref(), None)?;
    // The network namespace's own /sys, with the cgroups below this node's.
    let sys = directory.join("sys");
    fs::create_dir(&sys)?;
    file_system("sysfs", &sys, None)?;
    let cgroups = sys.join("fs/cgroup");
    file_system("tmpfs", &cgroups, Some("mode=755"))?;
    for hierarchy in hierarchies::all()? {
        hierarchy.mount(&cgroups)?;
    }
    file_system("bpf", &sys.join("fs/bpf"), None)?;
    mount(Some(&sys), "/sys", none, MsFlags::MS_MOVE, none).context("cannot move the node's /sys")?;

    for (index, (tunable, value)) in TUNABLES.iter().enumerate() {
        let file = directory.join(format!("tunable-{index}"));
        fs::write(&file, format!("{value}\n"))?;
        bind(&file, &Path::new("/proc/sys").join(tunable))?;
    }
    for target in OVERLAYS {
        let own = directory.join("overlay").join(target.trim_start_matches('/'));
        let (upper, work) = (own.join("upper"), own.join("work"));
        fs::create_dir_all(&upper)?;
        fs::create_dir_all(&work)?;
        let options = format!("lowerdir={target},upperdir={},workdir={},volatile", upper.display(), work.display());
        file_system("overlay", target.as_ref(), Some(&options))?;
    }
    for target in STATE {
        let own = directory.join("state").join(target.trim_start_matches('/'));
        fs::create_dir_all(&own)?;
        fs::create_dir_all(target)?;
        bind(&own, target.as_ref())?;
    }
    // Every distribution's kernel has it, and kube-proxy's pods mount it.
    fs::create_dir_all("/lib/modules")?;
    file_system("tmpfs", "/run".as_ref(), Some("mode=755"))?;
    for target in ["/run/netns", "/run/lock"] {
        fs::create_dir(target)?;
    }
    for name in ["hosts", "resolv.conf"] {
        let target = Path::new("/etc").join(name);
        // It may be a link to what /run had.
        let _ = fs::remove_file(&target);
        fs::copy(directory.join(name), target)?;
    }
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none)?;
    Ok(())
}

fn file_system(kind: &str, target: &Path, options: Option<&str>) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("cannot mount {kind} at {}", target.display()))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    let none = None::<&str>;
    mount(Some(source), target, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("cannot bind {} to {}", source.display(), target.display()))
}
