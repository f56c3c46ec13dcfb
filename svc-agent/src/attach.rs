//! Attaching the programs by pinned links, and by filters where the kernel has no links for interfaces' two sides. Where a
//! link or a filter is there already, the program behind it is replaced and traffic sees no gap; nothing is ever detached
//! here but what the settings no longer want.
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::Context as _;
use aya::Ebpf;
use aya::maps::HashMap;
use aya::programs::links::FdLink;
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, LinkOrder, Program, ProgramError, SchedClassifier, TcAttachType, Xdp,
    XdpMode as AyaXdpMode,
};
use nix::net::if_::if_nametoindex;

use crate::dataplane::{TcMode, XdpMode};
use crate::filters::Filters;
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

/// One direction of an interface.
#[derive(Clone, Copy)]
struct Direction {
    /// The beginning of its links' pins.
    pin: &'static str,
    program: &'static str,
    kind: TcAttachType,
}

const fn direction(pin: &'static str, program: &'static str, kind: TcAttachType) -> Direction {
    Direction { pin, program, kind }
}

const INGRESS: Direction = direction("ingress", "ingress", TcAttachType::Ingress);
const EGRESS: Direction = direction("egress", "egress", TcAttachType::Egress);
const POD_DIRECTIONS: [Direction; 2] = [
    direction("pod_ingress", "pod_ingress", TcAttachType::Ingress),
    direction("pod_egress", "pod_egress", TcAttachType::Egress),
];

fn uplink_directions(uplink: &str) -> [Direction; 2] {
    if host::has_link_header(uplink) {
        [INGRESS, EGRESS]
    } else {
        [Direction { program: "bare_ingress", ..INGRESS }, Direction { program: "bare_egress", ..EGRESS }]
    }
}

/// Loads the programs that these settings take, several at a time: the kernel's verifier has a while to do for each.
///
/// # Errors
/// The program, and what the kernel said.
pub fn load(ebpf: &mut Ebpf, uplinks: &[String], xdp: XdpMode, hooks: &[&str]) -> anyhow::Result<()> {
    // Each takes some of the memory that the agent may have.
    const AT_A_TIME: usize = 4;
    let pods = POD_DIRECTIONS.map(|direction| direction.program);
    let names = pods.into_iter().chain(hooks.iter().copied()).map(|name| format!("svc_{name}"));
    let wanted: BTreeSet<String> =
        uplinks.iter().flat_map(|uplink| uplink_programs(uplink, xdp)).chain(names).collect();
    let mut programs: Vec<_> = ebpf.programs_mut().filter(|(name, _)| wanted.contains(*name)).collect();
    // Taken from the end: those that take long go first.
    programs.sort_by_key(|(_, program)| !matches!(program, Program::CgroupSockAddr(_)));
    let threads = thread::available_parallelism().map_or(1, usize::from).min(AT_A_TIME);
    let programs = Mutex::new(programs);
    let work = || {
        loop {
            let next = programs.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some((name, program)) = next else { return Ok(()) };
            load_program(program).with_context(|| format!("loading {name}"))?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn uplink_programs(uplink: &str, xdp: XdpMode) -> Vec<String> {
    let programs = uplink_directions(uplink).map(|direction| format!("svc_{}", direction.program));
    programs.into_iter().chain(wanted_xdp(uplink, xdp).map(|_| XDP.to_owned())).collect()
}

/// # Errors
/// What the verifier says.
pub fn load_program(program: &mut Program) -> anyhow::Result<()> {
    match program {
        Program::Xdp(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
    .map_err(refusal)
}

/// Why a program was not loaded, in one line: the verifier's log, which has thousands, is for `-vv`.
fn refusal(error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError { io_error, verifier_log } = error else { return error.into() };
    let log = verifier_log.to_string();
    tracing::debug!("the verifier's log:\n{log}");
    // Behind what it objects to stand figures.
    let last = log.lines().rev().find(|line| {
        !(line.is_empty()
            || ["processed ", "stack depth", "verification time"].iter().any(|figures| line.starts_with(figures)))
    });
    match last {
        Some(last) => anyhow::anyhow!("{io_error}: {last}"),
        None => io_error.into(),
    }
}

/// The kernel part's own list of interfaces without link headers.
const BARE_LINKS: &str = "BARE_LINKS";

/// How programs stand at interfaces' two sides.
pub struct Interfaces {
    links: PathBuf,
    filters: Filters,
    tcx: bool,
}

impl Interfaces {
    /// # Errors
    /// Where tcx is wanted and the kernel has none.
    pub fn new(ebpf: &mut Ebpf, bpffs: &Path, mode: TcMode) -> anyhow::Result<Self> {
        let tcx = mode != TcMode::Clsact && sys::has_tcx(classifier(ebpf, POD_DIRECTIONS[0].program)?.fd()?.as_fd());
        anyhow::ensure!(tcx || mode != TcMode::Tcx, "--tc tcx: this kernel has no tcx, which came with Linux 6.6");
        if !tcx {
            tracing::info!("attaching to interfaces by filters on a clsact qdisc");
        }
        Ok(Interfaces { links: bpffs.join("links"), filters: Filters::open(bpffs)?, tcx })
    }

    /// The new way first, then the other one away: in between a packet meets both programs, and what the second does to it
    /// is undone for its reply.
    fn attach(&self, ebpf: &mut Ebpf, interface: &str, direction: Direction) -> anyhow::Result<()> {
        let name = pin_name(direction.pin, interface);
        if self.tcx {
            tcx(ebpf, &self.links, interface, direction)?;
            self.filters.remove(&name)
        } else {
            self.filters.put(&name, classifier(ebpf, direction.program)?.fd()?.as_fd())?;
            remove_pin(&self.links.join(&name))
        }
    }

    fn attach_uplink(&self, ebpf: &mut Ebpf, uplink: &str, direction: Direction) -> anyhow::Result<()> {
        if !host::has_link_header(uplink) {
            let index = if_nametoindex(uplink).with_context(|| format!("the interface {uplink}"))?;
            let map = ebpf.map_mut(BARE_LINKS).with_context(|| format!("no map {BARE_LINKS}"))?;
            let mut links: HashMap<_, u32, u32> = HashMap::try_from(map)?;
            links.insert(index, 1, 0).with_context(|| format!("writing the map {BARE_LINKS}"))?;
        }
        self.attach(ebpf, uplink, direction)
    }

    /// Whether the program in the kernel at this place, which has this pin or record, is ours.
    fn is_attached(&self, ebpf: &Ebpf, name: &str, program: &str) -> bool {
        if self.tcx {
            return is_attached(ebpf, &self.links, name, program);
        }
        let there = self.filters.program(name).ok().flatten();
        there.is_some() && there == loaded(ebpf, program)
    }

    /// Names of pins and of filters' records.
    fn names(&self) -> anyhow::Result<Vec<String>> {
        let mut names = self.filters.records()?;
        let links = std::fs::read_dir(&self.links).with_context(|| format!("reading {}", self.links.display()))?;
        for entry in links {
            let entry = entry.with_context(|| format!("reading {}", self.links.display()))?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    fn remove(&self, name: &str) -> anyhow::Result<()> {
        remove_pin(&self.links.join(name))?;
        self.filters.remove(name)
    }
}

/// The programs in the kernel, and where they belong.
pub struct Programs {
    ebpf: Ebpf,
    interfaces: Interfaces,
    uplinks: Vec<String>,
    xdp: XdpMode,
    sockets: SocketHooks,
    /// Uplinks whose driver has an XDP program.
    with_xdp: BTreeSet<String>,
}

impl Programs {
    /// Attaches what [`load`] has loaded to the uplinks and to the cgroup; to pods' interfaces as those come.
    ///
    /// # Errors
    /// The program, the place and what the kernel said.
    pub fn attach(
        ebpf: Ebpf,
        interfaces: Interfaces,
        uplinks: &[String],
        xdp: XdpMode,
        sockets: SocketHooks,
    ) -> anyhow::Result<Self> {
        let (with_xdp, served) = (BTreeSet::new(), Vec::new());
        let mut programs = Programs { ebpf, interfaces, uplinks: served, xdp, sockets, with_xdp };
        // Packets first, sockets last: a socket that is pointed at a backend needs nothing of the others.
        for uplink in uplinks {
            programs.attach_uplink(uplink)?;
        }
        let Programs { ebpf, interfaces, sockets, .. } = &mut programs;
        for hook in SOCKET_HOOKS.into_iter().chain(BIND_HOOKS) {
            if sockets.wanted.contains(&hook) {
                socket_hook(ebpf, &interfaces.links, &sockets.cgroup, hook)?;
            } else {
                remove_pin(&interfaces.links.join(hook))?;
            }
        }
        Ok(programs)
    }

    /// Attaches to an uplink, and loads for it what [`load`] had no use for.
    ///
    /// # Errors
    /// The program, the place and what the kernel said.
    pub fn attach_uplink(&mut self, uplink: &str) -> anyhow::Result<()> {
        let Programs { ebpf, interfaces, xdp, .. } = self;
        for name in uplink_programs(uplink, *xdp) {
            let program = ebpf.program_mut(&name).with_context(|| format!("no program {name}"))?;
            if program.fd().is_err() {
                load_program(program).with_context(|| format!("loading {name}"))?;
            }
        }
        for direction in uplink_directions(uplink) {
            interfaces.attach_uplink(ebpf, uplink, direction)?;
        }
        if attach_xdp(ebpf, &interfaces.links, uplink, *xdp)? {
            self.with_xdp.insert(uplink.to_owned());
        }
        self.uplinks.push(uplink.to_owned());
        Ok(())
    }

    /// The uplinks that are served.
    pub fn uplinks(&self) -> &[String] {
        &self.uplinks
    }

    /// # Errors
    /// The program, the place and what the kernel said.
    pub fn attach_pod(&mut self, interface: &str) -> anyhow::Result<()> {
        POD_DIRECTIONS
            .into_iter()
            .try_for_each(|direction| self.interfaces.attach(&mut self.ebpf, interface, direction))
    }

    /// Attaches again what somebody else has detached, or what went with an interface that is back. Returns the pins of
    /// what was attached, or why it could not be.
    pub fn repair(&mut self) -> Vec<(String, anyhow::Result<()>)> {
        let mut results = Vec::new();
        let Programs { ebpf, interfaces, uplinks, xdp, sockets, with_xdp } = self;
        for uplink in uplinks.iter().filter(|uplink| host::exists(uplink)) {
            for direction in uplink_directions(uplink) {
                let name = pin_name(direction.pin, uplink);
                if !interfaces.is_attached(ebpf, &name, direction.program) {
                    results.push((name, interfaces.attach_uplink(ebpf, uplink, direction)));
                }
            }
            let name = pin_name("xdp", uplink);
            if with_xdp.contains(uplink) && !is_attached(ebpf, &interfaces.links, &name, "xdp") {
                results.push((name, attach_xdp(ebpf, &interfaces.links, uplink, *xdp).map(drop)));
            }
        }
        for hook in &sockets.wanted {
            if !is_attached(ebpf, &interfaces.links, hook, hook) {
                results.push(((*hook).to_owned(), socket_hook(ebpf, &interfaces.links, &sockets.cgroup, hook)));
            }
        }
        results
    }

    /// [`Programs::repair`] for a pod's interface.
    pub fn repair_pod(&mut self, interface: &str) -> Vec<(String, anyhow::Result<()>)> {
        let Programs { ebpf, interfaces, .. } = self;
        POD_DIRECTIONS
            .into_iter()
            .map(|direction| (pin_name(direction.pin, interface), direction))
            .filter_map(|(name, direction)| {
                let is_attached = interfaces.is_attached(ebpf, &name, direction.program);
                (!is_attached).then(|| (name, interfaces.attach(ebpf, interface, direction)))
            })
            .collect()
    }

    /// Removes what is attached to interfaces that are not among these.
    ///
    /// # Errors
    /// Where the directory of the links cannot be read, or a pin not be removed.
    pub fn forget_all_but(&self, interfaces: &BTreeSet<&str>) -> anyhow::Result<()> {
        let kept: BTreeSet<String> = POD_DIRECTIONS
            .iter()
            .flat_map(|direction| interfaces.iter().map(move |interface| pin_name(direction.pin, interface)))
            .collect();
        for name in self.interfaces.names()? {
            let pods = POD_DIRECTIONS.iter().any(|direction| name.starts_with(&format!("{}-", direction.pin)));
            if pods && !kept.contains(&name) {
                self.interfaces.remove(&name)?;
            }
        }
        Ok(())
    }
}

/// Whether the link of this pin runs the program.
fn is_attached(ebpf: &Ebpf, links: &Path, pin: &str, program: &str) -> bool {
    let (Some(wanted), Ok(link)) = (loaded(ebpf, program), Link::open(&links.join(pin))) else { return false };
    link.attached && link.program == wanted
}

/// The program's id in the kernel.
fn loaded(ebpf: &Ebpf, program: &str) -> Option<u32> {
    ebpf.program(&format!("svc_{program}")).and_then(|program| program.info().ok()).map(|info| info.id())
}

/// A name on bpffs has no dot; an interface's name, which may, has no colon.
fn pin_name(hook: &str, interface: &str) -> String {
    format!("{hook}-{}", interface.replace('.', ":"))
}

/// The program and the interface of a pin that [`pin_name`] names; none for a socket hook.
pub fn place(pin: &str) -> Option<(&str, String)> {
    let (hook, interface) = pin.split_once('-')?;
    Some((hook, interface.replace(':', ".")))
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
    let path = links.join(hook);
    if take_over(&path, program.fd()?.as_fd())? {
        return Ok(());
    }
    // A link always leaves room for others, and takes no flag that says so.
    let id =
        program.attach(cgroup, CgroupAttachMode::Single).with_context(|| format!("attaching {name} to the cgroup"))?;
    pin(program.take_link(id)?.try_into()?, &path)
}

fn tcx(ebpf: &mut Ebpf, links: &Path, interface: &str, direction: Direction) -> anyhow::Result<()> {
    let program = classifier(ebpf, direction.program)?;
    let path = links.join(pin_name(direction.pin, interface));
    if take_over(&path, program.fd()?.as_fd())? {
        return Ok(());
    }
    let id = program
        .attach_with_options(interface, direction.kind, TcAttachOptions::TcxOrder(LinkOrder::default()))
        .with_context(|| format!("attaching svc_{} to {interface}", direction.program))?;
    let link: SchedClassifierLink = program.take_link(id)?;
    pin(link.try_into()?, &path)
}

/// The loaded program.
fn classifier<'a>(ebpf: &'a mut Ebpf, program: &str) -> anyhow::Result<&'a mut SchedClassifier> {
    let name = format!("svc_{program}");
    Ok(ebpf.program_mut(&name).with_context(|| format!("no program {name}"))?.try_into()?)
}

const XDP: &str = "svc_xdp";

/// None: without.
fn wanted_xdp(uplink: &str, mode: XdpMode) -> Option<AyaXdpMode> {
    match mode {
        _ if !host::has_link_header(uplink) => None,
        XdpMode::Off => None,
        XdpMode::Generic => Some(AyaXdpMode::Skb),
        XdpMode::Native => Some(AyaXdpMode::Driver),
        // A virtual interface pays more for native XDP than it gains (design figures in docs/architecture.md).
        XdpMode::Auto => host::is_hardware(uplink).then_some(AyaXdpMode::Driver),
    }
}

/// Returns whether there is an XDP program then.
fn attach_xdp(ebpf: &mut Ebpf, links: &Path, uplink: &str, mode: XdpMode) -> anyhow::Result<bool> {
    let path = links.join(pin_name("xdp", uplink));
    let Some(wanted) = wanted_xdp(uplink, mode) else {
        if mode != XdpMode::Off && !host::has_link_header(uplink) {
            tracing::info!(uplink, "no link headers here, and no XDP: tc does the work alone");
        }
        return remove_pin(&path).map(|()| false);
    };
    let program: &mut Xdp = ebpf.program_mut(XDP).with_context(|| format!("no program {XDP}"))?.try_into()?;
    if take_over(&path, program.fd()?.as_fd())? {
        return Ok(true);
    }
    match program.attach(uplink, wanted) {
        Ok(id) => pin(program.take_link(id)?.try_into()?, &path).map(|()| true),
        Err(error) if mode == XdpMode::Auto => {
            tracing::info!(uplink, %error, "no native XDP here: tc does the work alone");
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| format!("attaching {XDP} to {uplink}")),
    }
}
