//! Live frames through a node, without a network card: an XDP program makes them and redirects them into a veth, the node's end
//! of it takes them in by NAPI on a core of its own, and the far end counts and drops what comes out again. The figure is the
//! CPU time of the node's NAPI thread.
use std::ffi::CString;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use svc_agent::sys::{self, Plain};
use svc_common::checksum;
use svc_dataplane::packet::{TCP, UDP};
use svc_lab::netns::Netns;
use svc_tests::test_run::{bpf, run_live};

use crate::packets::Bench;
use crate::template::{AGE_SHIFT, AGES, BACKENDS, LIVE_WORDS, Live, at};

// SAFETY: integers without padding.
unsafe impl Plain for Live {}

/// Bytes of a frame, without the card's own four.
const FRAME: usize = LIVE_WORDS * 8;
const FIRST_PORT: u16 = 32_768;
/// Frames of one call, whose end takes the kernel as long as tens of thousands of them.
const PIECE: u32 = 1 << 18;
/// Frames that are sent on together: half of what a veth's queue holds. With fewer, a quick node goes to sleep after each batch.
const BATCH: u32 = 128;
/// Between two frames that are to be alone on their way.
const ALONE: Duration = Duration::from_micros(40);
/// That first packets are sent again where some were lost on their way in.
const TRIES: u32 = 5;
/// How long a piece may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// A network card's queue does not have its sender wake up whoever reads it: the far end looks by itself, every 40 us.
const SELDOM: [(&str, &str); 2] = [("napi_defer_hard_irqs", "100"), ("gro_flush_timeout", "40000")];

/// Where the frames are made and counted.
pub(crate) struct Far {
    /// See [`SELDOM`]; else at once.
    seldom: bool,
    namespace: Netns,
    bench: Bench,
}

/// A veth between a node and the far end.
pub(crate) struct Wire {
    /// The far end's name and index.
    far: String,
    far_index: u32,
    /// The node's.
    pub(crate) name: String,
    index: u32,
    number: u8,
    node_thread: i32,
    _links: Vec<OwnedFd>,
}

/// Which packets a node gets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traffic {
    /// TCP or UDP.
    pub(crate) protocol: u8,
    /// TCP's.
    pub(crate) flags: u8,
    pub(crate) to: Ipv4Addr,
    pub(crate) port: u16,
    /// A power of two.
    pub(crate) flows: u32,
    /// The first flow, where they come one after the other; else they are drawn at random.
    pub(crate) from: Option<u32>,
    /// UDP only: each frame says when it was made.
    pub(crate) stamped: bool,
    /// Between two frames, where they come one after the other, and how many come then.
    pub(crate) pause: Duration,
    pub(crate) limit: u32,
}

/// What became of as many packets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// CPU time of the node for each packet that it took in.
    pub(crate) nanoseconds: f64,
    pub(crate) taken: u64,
    /// What the far end received, and what of that was to a backend.
    pub(crate) arrived: u64,
    pub(crate) forwarded: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Hook {
    Xdp,
    TcxIngress,
}

#[derive(Clone, Copy, Debug)]
struct Counts {
    taken: u64,
    arrived: [u64; 2],
    cpu: u64,
}

impl Far {
    /// `prefix`: of the names of namespaces that go with a lab. `seldom`: see [`SELDOM`].
    pub(crate) fn new(prefix: &str, seldom: bool) -> Result<Self> {
        ensure!(cpus() >= 2, "live frames need two CPUs: one makes them, the other is the node");
        let namespace = Netns::create(format!("{prefix}far"))?;
        Ok(Far { seldom, bench: namespace.inside(Bench::load)?, namespace })
    }

    /// Connects a node, which routes clients and backends there. Numbers are not used twice.
    pub(crate) fn plug(&self, node: &Netns, number: u8) -> Result<Wire> {
        // In the names of the threads by which the interfaces are served, other runs' must not be met.
        let names = ["n", "f"].map(|end| format!("{end}{number}p{}", std::process::id()));
        let [near, far] = &names;
        let [near_mac, far_mac] = [1, 2].map(|end| mac(number, end).map(|byte| format!("{byte:02x}")).join(":"));
        self.namespace.ip(&format!(
            "link add {far} address {far_mac} numrxqueues 1 numtxqueues 1 type veth \
             peer name {near} address {near_mac} numrxqueues 1 numtxqueues 1 netns {}\n",
            node.name()
        ))?;
        for (namespace, name) in [(node, near), (&self.namespace, far)] {
            namespace.sysctl(&[
                (&format!("ipv6/conf/{name}/disable_ipv6"), "1"),
                ("ipv4/conf/all/rp_filter", "0"),
                (&format!("ipv4/conf/{name}/rp_filter"), "0"),
            ])?;
        }
        let [a, b] = BACKENDS;
        let gateway = Ipv4Addr::new(10, 77, number, 2);
        node.sysctl(&[("ipv4/ip_forward", "1")])?;
        node.ip(&format!(
            "addr add 10.77.{number}.1/24 dev {near}\n\
             link set {near} up\n\
             neigh replace {gateway} lladdr {far_mac} dev {near} nud permanent\n",
        ))?;
        self.namespace.ip(&format!("link set {far} up\n"))?;
        let (index, far_index) = (index_of(node, near)?, index_of(&self.namespace, far)?);
        // Without it the node's end has no NAPI of its own.
        node.inside(|| generic_receive_offload(near))?;
        let arrive = self.program("arrive")?;
        let link = self.namespace.inside(|| Ok(attach(arrive, far_index, Hook::Xdp)?))?;
        let node_thread = threaded(node, near, &[])?;
        let far_thread = threaded(&self.namespace, far, if self.seldom { &SELDOM } else { &[] })?;
        for (thread, cpu) in [(node_thread, cpus() - 1), (far_thread, 0)] {
            run_on(thread, cpu, 2)?;
        }
        node.ip(&format!(
            "route replace 198.18.0.0/15 via {gateway} dev {near}\n\
             route replace {a}.{b}.0.0/16 via {gateway} dev {near}\n"
        ))?;
        Ok(Wire { far: far.clone(), far_index, name: near.clone(), index, number, node_thread, _links: vec![link] })
    }

    /// Puts one of the floors on the node's end.
    pub(crate) fn attach(&self, node: &Netns, wire: &mut Wire, program: &str, hook: Hook) -> Result<()> {
        let program = self.program(program)?;
        let index = wire.index;
        wire._links.push(node.inside(|| Ok(attach(program, index, hook)?))?);
        Ok(())
    }

    fn program(&self, name: &str) -> Result<BorrowedFd<'_>> {
        Ok(self.bench.program(name)?.as_fd())
    }

    /// Sends so many frames through the node, as fast as it takes them in.
    pub(crate) fn measure(&self, wire: &Wire, traffic: &Traffic, packets: u64) -> Result<Sample> {
        self.generate(wire, traffic, |run| {
            let before = self.settled(wire)?;
            let deadline = Instant::now() + PATIENCE;
            while self.taken(wire)? - before.taken < packets {
                run(PIECE)?;
                ensure!(Instant::now() < deadline, "the node takes in fewer than {packets} packets in {PATIENCE:?}");
            }
            let after = self.settled(wire)?;
            let taken = after.taken - before.taken;
            Ok(Sample {
                nanoseconds: (after.cpu - before.cpu) as f64 / taken as f64,
                taken,
                arrived: after.arrived[0] - before.arrived[0],
                forwarded: after.arrived[1] - before.arrived[1],
            })
        })
    }

    /// Sends each of the flows' first packet, one after the other so that none is lost on its way in.
    pub(crate) fn open(&self, wire: &Wire, traffic: &Traffic, pause: Duration) -> Result<()> {
        let traffic = Traffic { from: Some(0), pause, limit: traffic.flows, ..*traffic };
        let flows = f64::from(traffic.flows);
        // Of the flows, as many are not open as each pass so far has lost.
        let mut missing = flows;
        for _ in 0..TRIES {
            let taken = self.send_paced(wire, &traffic)? as f64;
            missing *= 1.0 - (taken / flows).min(1.0);
            if missing < 1.0 {
                return Ok(());
            }
        }
        bail!("the node does not take in all of {} flows' first packets", traffic.flows)
    }

    /// Sends the first packet of each of as many flows, each alone on its way, and says how long each took from its making to the
    /// far end, in nanoseconds and in order. What was lost is left out.
    pub(crate) fn ages(&self, wire: &Wire, traffic: &Traffic, packets: u32) -> Result<Vec<u32>> {
        let traffic = Traffic { stamped: true, pause: ALONE, limit: packets, ..*traffic };
        for age in 0..AGES {
            sys::update(self.bench.map("AGE"), &age, &0u64)?;
        }
        self.send_paced(wire, &traffic)?;
        let counts = sys::array_range::<u64>(self.bench.map("AGE"), 0..AGES)?;
        Ok(counts.into_iter().flat_map(|(age, count)| vec![age << AGE_SHIFT; count as usize]).collect())
    }

    /// How many were taken in.
    fn send_paced(&self, wire: &Wire, traffic: &Traffic) -> Result<u64> {
        self.generate(wire, traffic, |run| {
            let before = self.settled(wire)?;
            let deadline = Instant::now() + PATIENCE;
            while sys::lookup::<u32, u32>(self.bench.map("TURN"), &0)? < traffic.limit {
                run(PIECE)?;
                ensure!(Instant::now() < deadline, "{} frames take longer than {PATIENCE:?}", traffic.limit);
            }
            Ok(self.settled(wire)?.taken - before.taken)
        })
    }

    /// On a thread on the first core that gives way to the far end only: a node that waits for packets pays for its waking up.
    fn generate<T: Send>(
        &self,
        wire: &Wire,
        traffic: &Traffic,
        work: impl FnOnce(&dyn Fn(u32) -> Result<()>) -> Result<T> + Send,
    ) -> Result<T> {
        let (frame, template) = (traffic.frame(wire), traffic.template(wire));
        sys::update(self.bench.map("LIVE"), &0u32, &template)?;
        sys::update(self.bench.map("TURN"), &0u32, &0u32)?;
        let program = self.program("generate_live")?;
        self.namespace.inside(|| {
            run_on(0, 0, 1)?;
            let batch = if traffic.pause.is_zero() { BATCH } else { 1 };
            work(&|frames| Ok(run_live(program, &frame, frames, batch)?))
        })
    }

    /// The calling thread is in the far end's namespace, as where [`Far::generate`] runs its work.
    fn taken(&self, wire: &Wire) -> Result<u64> {
        let table = fs::read_to_string("/proc/thread-self/net/dev")?;
        let line = table.lines().find_map(|line| line.trim().strip_prefix(&wire.far)?.strip_prefix(':'));
        // Eight columns of what was received, then the packets that were sent, which are those that the peer took in.
        let packets = line.and_then(|line| line.split_whitespace().nth(9)?.parse().ok());
        packets.with_context(|| format!("no interface {}", wire.far))
    }

    /// Once nothing is on its way any more.
    fn settled(&self, wire: &Wire) -> Result<Counts> {
        let mut before = self.counts(wire)?;
        loop {
            thread::sleep(Duration::from_millis(2));
            let now = self.counts(wire)?;
            if (now.cpu, now.arrived) == (before.cpu, before.arrived) {
                return Ok(now);
            }
            before = now;
        }
    }

    fn counts(&self, wire: &Wire) -> Result<Counts> {
        let arrived = |index: u32| sys::lookup::<u32, u64>(self.bench.map("ARRIVED"), &index);
        let text = fs::read_to_string(format!("/proc/{}/schedstat", wire.node_thread))?;
        let cpu = text.split(' ').next().and_then(|text| text.parse().ok()).context("no CPU time in schedstat")?;
        Ok(Counts { taken: self.taken(wire)?, arrived: [arrived(0)?, arrived(1)?], cpu })
    }
}

impl Wire {
    /// The node's address there, which it gives to what it sends out.
    pub(crate) fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 1)
    }
}

impl Traffic {
    /// UDP to a NodePort or straight to a backend.
    pub(crate) fn udp(to: Ipv4Addr, port: u16, flows: u32) -> Self {
        Traffic {
            protocol: UDP,
            flags: 0,
            to,
            port,
            flows,
            from: None,
            stamped: false,
            pause: Duration::ZERO,
            limit: 0,
        }
    }

    fn template(&self, wire: &Wire) -> Live {
        let words = self.frame(wire);
        let word = |index: usize| u64::from_ne_bytes(words[index * 8..][..8].try_into().expect("eight bytes"));
        Live {
            header: std::array::from_fn(word),
            mask: self.flows - 1,
            in_turn: self.from.is_some().into(),
            first: self.from.unwrap_or_default(),
            first_port: FIRST_PORT.into(),
            interface: wire.far_index,
            stamped: self.stamped.into(),
            pause: self.pause.as_nanos() as u32,
            limit: self.limit,
        }
    }

    /// Of the flow 0.
    fn frame(&self, wire: &Wire) -> [u8; FRAME] {
        const NETWORK: usize = 14;
        const TRANSPORT: usize = NETWORK + 20;
        let mut frame = [0; FRAME];
        frame[..6].copy_from_slice(&mac(wire.number, 1));
        frame[6..12].copy_from_slice(&mac(wire.number, 2));
        frame[12..14].copy_from_slice(&[8, 0]);
        let length = (FRAME - NETWORK) as u8;
        frame[NETWORK..][..12].copy_from_slice(&[0x45, 0, 0, length, 0, 0, 0, 0, 64, self.protocol, 0, 0]);
        frame[26..28].copy_from_slice(&[198, 18]);
        frame[30..34].copy_from_slice(&self.to.octets());
        let mut put = |at: u32, value: u16| frame[at as usize..][..2].copy_from_slice(&value.to_be_bytes());
        put(at::IDENTIFICATION, !0);
        put(at::ADDRESS, 0);
        put(at::PORT, FIRST_PORT);
        put(36, self.port);
        put(at::ADDRESS_COMPLEMENT, !0);
        put(at::PORT_COMPLEMENT, !FIRST_PORT);
        let field = if self.protocol == TCP {
            // Sequence and acknowledgement numbers, the header's length, flags and window.
            frame[38..50].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1, 0x50, self.flags, 0xff, 0xff]);
            50
        } else {
            put(38, (FRAME - TRANSPORT) as u16);
            put(at::STAMP + 4, !0);
            put(at::STAMP + 6, !0);
            40
        };
        let header = !checksum::fold(checksum::sum(&frame[NETWORK..TRANSPORT]));
        frame[24..26].copy_from_slice(&header.to_ne_bytes());
        let pseudo = [0, self.protocol, 0, (FRAME - TRANSPORT) as u8];
        let sum = checksum::sum(&frame[26..]) + checksum::sum(&pseudo);
        let transport = !checksum::fold(sum);
        frame[field..field + 2].copy_from_slice(&transport.to_ne_bytes());
        frame
    }
}

/// Of a wire's near (1) or far (2) end.
fn mac(number: u8, end: u8) -> [u8; 6] {
    [2, 0x77, 0, 0, number, end]
}

pub(crate) fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn index_of(namespace: &Netns, name: &str) -> Result<u32> {
    let name = CString::new(name)?;
    // SAFETY: a name that ends in zero.
    let index = namespace.inside(|| Ok(unsafe { libc::if_nametoindex(name.as_ptr()) }))?;
    ensure!(index != 0, "no interface {name:?}");
    Ok(index)
}

/// Natively.
fn attach(program: BorrowedFd<'_>, interface: u32, hook: Hook) -> io::Result<OwnedFd> {
    const LINK_CREATE: i64 = 28;
    const BPF_XDP: u32 = 37;
    const BPF_TCX_INGRESS: u32 = 46;
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    let (kind, flags) = if hook == Hook::Xdp { (BPF_XDP, XDP_FLAGS_DRV_MODE) } else { (BPF_TCX_INGRESS, 0) };
    // The program, the interface, the hook, the flags; nothing that the new one is to stand before or behind.
    let link = bpf(LINK_CREATE, &mut [program.as_raw_fd() as u32, interface, kind, flags, 0, 0, 0, 0])?;
    // SAFETY: it was just opened, and no one else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(link as i32) })
}

fn generic_receive_offload(interface: &str) -> Result<()> {
    const SIOCETHTOOL: u64 = 0x8946;
    const ETHTOOL_SGRO: u32 = 0x2c;
    // SAFETY: it takes numbers only.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error()).context("cannot open a socket");
    }
    // SAFETY: it was just opened, and no one else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // struct ethtool_value.
    let mut value = [ETHTOOL_SGRO, 1];
    // SAFETY: an ifreq of zeros is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *target = byte.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request and the value that it points to outlive the call, and are what this ioctl takes.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot turn on GRO for {interface}"));
    }
    Ok(())
}

/// Gives the interface's NAPI a thread of its own, and these settings (/sys/class/net); says which.
fn threaded(namespace: &Netns, interface: &str, settings: &[(&str, &str)]) -> Result<i32> {
    namespace.inside(|| {
        // /sys shows the interfaces of the namespace that it was mounted in.
        let none = std::ptr::null();
        // SAFETY: flags only, and strings that end in zero; the thread ends with this closure, its mounts with it.
        let mounted = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()) == 0
                && libc::mount(c"sysfs".as_ptr(), c"/sys".as_ptr(), c"sysfs".as_ptr(), 0, none.cast()) == 0
        };
        if !mounted {
            return Err(io::Error::last_os_error()).context("cannot mount sysfs");
        }
        for (name, value) in settings.iter().chain(&[("threaded", "1")]) {
            fs::write(Path::new("/sys/class/net").join(interface).join(name), value)
                .with_context(|| format!("cannot set {name} of {interface}"))?;
        }
        Ok(())
    })?;
    let prefix = format!("napi/{interface}-");
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.starts_with(&prefix) {
            return entry.file_name().to_string_lossy().parse().context("the thread has no number");
        }
    }
    bail!("no thread {prefix}")
}

/// Keeps a thread, 0 being the calling one, on a core.
pub(crate) fn keep_on(thread: i32, cpu: usize) -> io::Result<()> {
    // SAFETY: a set of zeros is a valid one, and outlives the call.
    let kept = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(thread, size_of_val(&set), &raw const set) == 0
    };
    if kept { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives a thread, 0 being the calling one, a core, and precedence there over all that is not of a real-time class. Elsewise other
/// work would have its share of the core first, and a kernel that preempts lazily would let it go on until the next tick: most of
/// what is sent meanwhile would be lost.
fn run_on(thread: i32, cpu: usize, priority: libc::c_int) -> Result<()> {
    keep_on(thread, cpu).context("cannot place a thread")?;
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameters outlive the call.
    if unsafe { libc::sched_setscheduler(thread, libc::SCHED_FIFO, &raw const parameters) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot place a thread");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use svc_common::checksum;
    use svc_dataplane::packet::{ACK, TCP};

    use super::{Traffic, Wire};

    fn wire() -> Wire {
        let name = String::new();
        Wire { far: name.clone(), far_index: 1, name, index: 1, number: 3, node_thread: 0, _links: Vec::new() }
    }

    #[test]
    fn the_checksums_are_right_whatever_the_flow() {
        let udp = Traffic::udp([10, 78, 0, 1].into(), 30_080, 64);
        for traffic in [udp, Traffic { protocol: TCP, flags: ACK, ..udp }] {
            let mut frame = traffic.frame(&wire());
            for (address, port) in [(0u16, 32_768u16), (0x1234, 40_000)] {
                let fields = [(18, !address), (28, address), (34, port), (60, !address), (62, !port)];
                for (at, value) in fields {
                    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
                }
                assert_eq!(checksum::fold(checksum::sum(&frame[14..34])), 0xffff);
                let pseudo = checksum::sum(&[0, traffic.protocol, 0, 30]);
                assert_eq!(checksum::fold(checksum::sum(&frame[26..]) + pseudo), 0xffff);
            }
        }
    }
}
