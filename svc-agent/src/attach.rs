//! Attaching the programs by pinned links. Where a link is there already, the program behind it is replaced and traffic
//! sees no gap; nothing is ever detached here but what the settings no longer want.
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode as AyaXdpMode,
};

use crate::dataplane::XdpMode;
use crate::host;
use crate::inspect::map::Link;
use crate::sys;

/// Names of the socket hooks, and of their pins.
pub const SOCKET_HOOKS: [&str; 8] =
    ["connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6", "getpeername4", "getpeername6"];

/// Those that protect NodePorts from the node's own processes.
pub const BIND_HOOKS: [&str; 2] = ["bind4", "bind6"];

/// The cgroup whose processes are served, and the hooks that are wanted there.
pub struct SocketHooks {
    pub cgroup: File,
    pub wanted: Vec<&'static str>,
}

/// The two directions of an uplink, each a program and the beginning of its links' pins.
const UPLINK_DIRECTIONS: [(&str, TcAttachType); 2] =
    [("ingress", TcAttachType::Ingress), ("egress", TcAttachType::Egress)];

/// The programs in the kernel, and where they belong.
pub struct Programs {
    ebpf: Ebpf,
    links: PathBuf,
    uplinks: Vec<String>,
    xdp: XdpMode,
    sockets: SocketHooks,
    /// Uplinks whose driver has an XDP program.
    with_xdp: BTreeSet<String>,
}

/// The two directions of a pod's interface, each a program and the beginning of its links' pins.
const POD_DIRECTIONS: [(&str, TcAttachType); 2] =
    [("pod_ingress", TcAttachType::Ingress), ("pod_egress", TcAttachType::Egress)];

impl Programs {
    /// Attaches to the uplinks and to the cgroup. Those of pods' interfaces are loaded, to be attached as those come.
    ///
    /// # Errors
    /// The program, the place and what the kernel said.
    pub fn attach(
        mut ebpf: Ebpf,
        links: PathBuf,
        uplinks: Vec<String>,
        xdp: XdpMode,
        sockets: SocketHooks,
    ) -> anyhow::Result<Self> {
        let mut with_xdp = BTreeSet::new();
        // Packets first, sockets last: a socket that is pointed at a backend needs nothing of the others.
        for uplink in &uplinks {
            for (direction, kind) in UPLINK_DIRECTIONS {
                tcx(&mut ebpf, &links, uplink, direction, kind)?;
            }
            if attach_xdp(&mut ebpf, &links, uplink, xdp)? {
                with_xdp.insert(uplink.clone());
            }
        }
        for hook in SOCKET_HOOKS.into_iter().chain(BIND_HOOKS) {
            if sockets.wanted.contains(&hook) {
                socket_hook(&mut ebpf, &links, &sockets.cgroup, hook)?;
            } else {
                remove_pin(&links.join(hook))?;
            }
        }
        for (direction, _) in POD_DIRECTIONS {
            classifier(&mut ebpf, direction)?;
        }
        Ok(Programs { ebpf, links, uplinks, xdp, sockets, with_xdp })
    }

    /// # Errors
    /// The program, the place and what the kernel said.
    pub fn attach_pod(&mut self, interface: &str) -> anyhow::Result<()> {
        POD_DIRECTIONS
            .iter()
            .try_for_each(|(direction, kind)| tcx(&mut self.ebpf, &self.links, interface, direction, *kind))
    }

    /// Attaches again what somebody else has detached, or what went with an interface that is back. Returns the pins of
    /// what was attached, or why it could not be.
    pub fn repair(&mut self) -> Vec<(String, anyhow::Result<()>)> {
        let mut results = Vec::new();
        let Programs { ebpf, links, uplinks, xdp, sockets, with_xdp } = self;
        for uplink in uplinks.iter().filter(|uplink| host::exists(uplink)) {
            for (direction, kind) in UPLINK_DIRECTIONS {
                let name = pin_name(direction, uplink);
                if !is_attached(ebpf, links, &name, direction) {
                    results.push((name, tcx(ebpf, links, uplink, direction, kind)));
                }
            }
            let name = pin_name("xdp", uplink);
            if with_xdp.contains(uplink) && !is_attached(ebpf, links, &name, "xdp") {
                results.push((name, attach_xdp(ebpf, links, uplink, *xdp).map(drop)));
            }
        }
        for hook in &sockets.wanted {
            if !is_attached(ebpf, links, hook, hook) {
                results.push(((*hook).to_owned(), socket_hook(ebpf, links, &sockets.cgroup, hook)));
            }
        }
        results
    }

    /// [`Programs::repair`] for a pod's interface.
    pub fn repair_pod(&mut self, interface: &str) -> Vec<(String, anyhow::Result<()>)> {
        let Programs { ebpf, links, .. } = self;
        let directions =
            POD_DIRECTIONS.into_iter().map(|(direction, kind)| (pin_name(direction, interface), direction, kind));
        directions
            .filter_map(|(name, direction, kind)| {
                let is_attached = is_attached(ebpf, links, &name, direction);
                (!is_attached).then(|| (name, tcx(ebpf, links, interface, direction, kind)))
            })
            .collect()
    }

    /// Removes the links of interfaces that are not among these.
    ///
    /// # Errors
    /// Where the directory of the links cannot be read, or a pin not be removed.
    pub fn forget_all_but(&self, interfaces: &BTreeSet<&str>) -> anyhow::Result<()> {
        let kept: BTreeSet<String> = POD_DIRECTIONS
            .iter()
            .flat_map(|(direction, _)| interfaces.iter().map(move |interface| pin_name(direction, interface)))
            .collect();
        let directory = std::fs::read_dir(&self.links).with_context(|| format!("reading {}", self.links.display()))?;
        for entry in directory {
            let name = entry.with_context(|| format!("reading {}", self.links.display()))?.file_name();
            let name = name.to_string_lossy();
            let pods = POD_DIRECTIONS.iter().any(|(direction, _)| name.starts_with(&format!("{direction}-")));
            if pods && !kept.contains(&*name) {
                remove_pin(&self.links.join(&*name))?;
            }
        }
        Ok(())
    }
}

/// Whether the link of this pin runs the program.
fn is_attached(ebpf: &Ebpf, links: &Path, pin: &str, program: &str) -> bool {
    let wanted = ebpf.program(&format!("svc_{program}")).and_then(|program| program.info().ok());
    let (Some(wanted), Ok(link)) = (wanted, Link::open(&links.join(pin))) else { return false };
    link.attached && link.program == wanted.id()
}

/// A name on bpffs has no dot; an interface's name, which may, has no colon.
fn pin_name(hook: &str, interface: &str) -> String {
    format!("{hook}-{}", interface.replace('.', ":"))
}

fn remove_pin(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing the link {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// True where the link pinned at `path` runs `program` now. A link whose interface or cgroup has gone is removed.
fn take_over(path: &Path, program: BorrowedFd<'_>) -> anyhow::Result<bool> {
    let link = match sys::open_pin(path) {
        Ok(link) => link,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("opening the link {}", path.display())),
    };
    match sys::link_update(link.as_fd(), program) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
            std::fs::remove_file(path).with_context(|| format!("removing the dead link {}", path.display()))?;
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| format!("replacing the program of the link {}", path.display())),
    }
}

fn pin(link: FdLink, path: &Path) -> anyhow::Result<()> {
    link.pin(path).map(drop).with_context(|| format!("pinning the link {}", path.display()))
}

fn socket_hook(ebpf: &mut Ebpf, links: &Path, cgroup: &File, hook: &str) -> anyhow::Result<()> {
    let name = format!("svc_{hook}");
    let program: &mut CgroupSockAddr =
        ebpf.program_mut(&name).with_context(|| format!("no program {name}"))?.try_into()?;
    if program.fd().is_err() {
        program.load().with_context(|| format!("loading {name}"))?;
    }
    let path = links.join(hook);
    if take_over(&path, program.fd()?.as_fd())? {
        return Ok(());
    }
    // A link always leaves room for others, and takes no flag that says so.
    let id =
        program.attach(cgroup, CgroupAttachMode::Single).with_context(|| format!("attaching {name} to the cgroup"))?;
    pin(program.take_link(id)?.try_into()?, &path)
}

fn tcx(ebpf: &mut Ebpf, links: &Path, uplink: &str, direction: &str, kind: TcAttachType) -> anyhow::Result<()> {
    let program = classifier(ebpf, direction)?;
    let path = links.join(pin_name(direction, uplink));
    if take_over(&path, program.fd()?.as_fd())? {
        return Ok(());
    }
    let id = program
        .attach_with_options(uplink, kind, TcAttachOptions::TcxOrder(LinkOrder::default()))
        .with_context(|| format!("attaching svc_{direction} to {uplink}"))?;
    let link: SchedClassifierLink = program.take_link(id)?;
    pin(link.try_into()?, &path)
}

/// The loaded program.
fn classifier<'a>(ebpf: &'a mut Ebpf, direction: &str) -> anyhow::Result<&'a mut SchedClassifier> {
    let name = format!("svc_{direction}");
    let program: &mut SchedClassifier =
        ebpf.program_mut(&name).with_context(|| format!("no program {name}"))?.try_into()?;
    if program.fd().is_err() {
        program.load().with_context(|| format!("loading {name}"))?;
    }
    Ok(program)
}

/// Returns whether there is an XDP program then.
fn attach_xdp(ebpf: &mut Ebpf, links: &Path, uplink: &str, mode: XdpMode) -> anyhow::Result<bool> {
    let path = links.join(pin_name("xdp", uplink));
    let wanted = match mode {
        XdpMode::Off => None,
        XdpMode::Generic => Some(AyaXdpMode::Skb),
        XdpMode::Native => Some(AyaXdpMode::Driver),
        // A virtual interface pays more for native XDP than it gains (design figures in docs/architecture.md).
        XdpMode::Auto => host::is_hardware(uplink).then_some(AyaXdpMode::Driver),
    };
    let Some(wanted) = wanted else { return remove_pin(&path).map(|()| false) };
    let name = "svc_xdp";
    let program: &mut Xdp = ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
    if program.fd().is_err() {
        program.load().with_context(|| format!("loading {name}"))?;
    }
    if take_over(&path, program.fd()?.as_fd())? {
        return Ok(true);
    }
    match program.attach(uplink, wanted) {
        Ok(id) => pin(program.take_link(id)?.try_into()?, &path).map(|()| true),
        Err(error) if mode == XdpMode::Auto => {
            tracing::info!(uplink, %error, "no native XDP here: tcx does the work alone");
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| format!("attaching {name} to {uplink}")),
    }
}
