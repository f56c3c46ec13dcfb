//! What the agent has to know of its machine, and what it cannot do without.
use std::fs::{self, File};
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use aya::util::KernelVersion;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

/// The oldest on which the tests run.
const OLDEST_KERNEL: (u8, u8) = (6, 1);
/// The first that does not wait for each entry of a map of maps.
pub const QUICK_KERNEL: (u8, u8) = (6, 8);

/// # Errors
/// Where the kernel is too old.
pub fn check_kernel() -> anyhow::Result<()> {
    let (major, minor) = OLDEST_KERNEL;
    let version = KernelVersion::current().context("asking for the kernel's version")?;
    ensure!(
        version >= KernelVersion::new(major, minor, 0),
        "this kernel is too old: svc-agent needs Linux {major}.{minor} or newer"
    );
    Ok(())
}

/// Whether an entry of a map of maps is looked up, and in a batch written, at once. Before [`QUICK_KERNEL`] the kernel waits for a grace
/// period each time, ten milliseconds or more, in a batch for each entry.
pub fn looks_up_inner_maps_at_once() -> bool {
    let (major, minor) = QUICK_KERNEL;
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(major, minor, 0))
}

/// A set of capabilities(7), by their numbers' bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities(pub u64);

impl Capabilities {
    pub const NET_ADMIN: Self = Capabilities(1 << 12);
    pub const SYS_PTRACE: Self = Capabilities(1 << 19);
    pub const SYS_ADMIN: Self = Capabilities(1 << 21);
    pub const PERFMON: Self = Capabilities(1 << 38);
    pub const BPF: Self = Capabilities(1 << 39);

    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// NET_ADMIN, BPF, and PERFMON, without which the verifier takes no program that keeps pointers on its stack; or
    /// SYS_ADMIN in the place of these two, for which it stood before Linux 5.8.
    pub const fn may_run(self) -> bool {
        let loads = self.has(Self::BPF) && self.has(Self::PERFMON);
        self.has(Self::NET_ADMIN) && (loads || self.has(Self::SYS_ADMIN))
    }
}

/// This process' effective ones.
///
/// # Errors
/// Where they cannot be read.
pub fn capabilities() -> anyhow::Result<Capabilities> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.map(Capabilities).context("/proc/self/status has no CapEff")
}

/// The cgroup v2 directory whose processes are served, of [`cgroup_directory`].
///
/// # Errors
/// Where there is none.
pub fn cgroup(wanted: Option<&Path>) -> anyhow::Result<File> {
    let path = cgroup_directory(wanted)?;
    File::open(&path).with_context(|| format!("opening {}", path.display()))
}

/// `wanted`, or the root of the hierarchy that is mounted below it, as on hosts that have version 1 as well; without `wanted`
/// wherever cgroup v2 is mounted.
///
/// # Errors
/// Where there is none.
pub fn cgroup_directory(wanted: Option<&Path>) -> anyhow::Result<PathBuf> {
    const REMEDY: &str = "name a directory of cgroup v2, which `findmnt -t cgroup2` finds";
    let Some(path) = wanted else {
        return cgroup2_mount(Path::new("/"))?.context(
            "cgroup v2 is not mounted: `mount -t cgroup2 none /sys/fs/cgroup`, or say where it is with --cgroup",
        );
    };
    let named = |what: &str| format!("--cgroup {}{what}: {REMEDY}", path.display());
    if is_cgroup2(path).with_context(|| named(""))? {
        return Ok(path.to_owned());
    }
    cgroup2_mount(path)?.with_context(|| named(" is not in a cgroup v2 hierarchy"))
}

/// How many processors are online.
pub fn online_cpus() -> u32 {
    // SAFETY: no pointers.
    let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    u32::try_from(online).unwrap_or(1).max(1)
}

/// Whether the directory is one of cgroup v2.
///
/// # Errors
/// Where it cannot be looked at.
pub fn is_cgroup2(path: &Path) -> nix::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Whether the directory is in a BPF file system.
///
/// # Errors
/// Where it cannot be looked at.
pub fn is_bpffs(path: &Path) -> nix::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == BPF_FS_MAGIC)
}

/// Where cgroup v2 is mounted, at `directory` or below.
///
/// # Errors
/// Where the mount table cannot be read.
pub fn cgroup2_mount(directory: &Path) -> anyhow::Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading the mount table")?;
    Ok(find_cgroup2(&mounts, directory))
}

fn find_cgroup2(mounts: &str, directory: &Path) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = Path::new(fields.next()?);
        (fields.next()? == "cgroup2" && path.starts_with(directory)).then(|| path.to_owned())
    })
}

/// Makes the directories of the pins.
///
/// # Errors
/// Where the place is not on a bpffs, or may not be written.
pub fn prepare_bpffs(path: &Path) -> anyhow::Result<()> {
    for directory in [path.join("maps"), path.join("links")] {
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    }
    if !is_bpffs(path).with_context(|| format!("--bpffs {}", path.display()))? {
        for directory in [path.join("maps"), path.join("links"), path.to_owned()] {
            // Best effort: only what was made here and is empty.
            let _ = fs::remove_dir(directory);
        }
        bail!(
            "--bpffs {} is not on a BPF file system: `mount -t bpf bpf /sys/fs/bpf`, or name a directory on one",
            path.display()
        );
    }
    Ok(())
}

/// Whether there is an interface of this name.
pub fn exists(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}

/// The interfaces to serve: `wanted`, or those that lead out of the node, by a default route or a network card, and after them
/// the tunnels, which lead to other nodes' pods and to clients.
///
/// # Errors
/// Where one does not exist, or none is found.
pub fn uplinks(wanted: &[String]) -> anyhow::Result<Vec<String>> {
    for name in wanted {
        ensure!(exists(name), "--uplink {name}: there is no such interface; `ip link` lists those that are");
    }
    if !wanted.is_empty() {
        return Ok(wanted.to_vec());
    }
    let mut found: Vec<String> = interface_names()?.into_iter().filter(|name| is_hardware(name)).collect();
    found.extend(default_route_interfaces());
    found.sort();
    found.dedup();
    found.retain(|name| exists(name));
    ensure!(!found.is_empty(), "no interface with an address leads out of this node: name one with --uplink");
    let tunnels = interface_names()?.into_iter().filter(|name| is_served_tunnel(name) && !found.contains(name));
    Ok(found.iter().cloned().chain(tunnels).collect())
}

/// Whether the interface has a bus: a card, real or lent by a hypervisor, and no veth, bridge or tunnel.
pub fn is_hardware(name: &str) -> bool {
    // A bridge says "N/A", and a tunnel of a user's process its kind.
    driver(name).is_some_and(|(_, bus)| !["", "N/A", "tun", "tap"].contains(&bus.as_str()))
}

/// Whether the interface is a tunnel that is served where no uplink is named.
fn is_served_tunnel(name: &str) -> bool {
    // Those without link headers that nobody uses (tunl0, sit0) are down.
    is_ethernet_tunnel(name)
        || (tunnel_headers(name).is_some() && interface_flags(name).contains(InterfaceFlags::IFF_UP))
}

/// Whether the interface is a tunnel whose packets have link headers.
fn is_ethernet_tunnel(name: &str) -> bool {
    driver(name).is_some_and(|(driver, _)| driver == "vxlan" || driver == "geneve")
}

/// Of a tunnel: how many bytes it puts around a packet at least; 0 where that is not known. None for other interfaces.
pub fn tunnel_headers(name: &str) -> Option<u32> {
    // In the link header's place a GRE tunnel without a remote end of its own has the outer headers, which are not followed.
    let has_remote_end = || interface_flags(name).contains(InterfaceFlags::IFF_POINTOPOINT);
    match link_type(name)? {
        libc::ARPHRD_TUNNEL | libc::ARPHRD_SIT => Some(20),
        libc::ARPHRD_IPGRE => has_remote_end().then_some(24),
        libc::ARPHRD_TUNNEL6 => Some(40),
        ARPHRD_IP6GRE => has_remote_end().then_some(44),
        libc::ARPHRD_NONE => Some(0),
        _ => is_ethernet_tunnel(name).then_some(50),
    }
}

const ARPHRD_IP6GRE: u16 = 823;
const ARPHRD_RAWIP: u16 = 519;

/// Whether the interface's packets start with a link header: the kernel takes none off before it sends them there
/// (dev_is_mac_header_xmit) otherwise.
pub fn has_link_header(name: &str) -> bool {
    !matches!(
        link_type(name),
        Some(
            libc::ARPHRD_TUNNEL
                | libc::ARPHRD_TUNNEL6
                | libc::ARPHRD_SIT
                | libc::ARPHRD_IPGRE
                | ARPHRD_IP6GRE
                | libc::ARPHRD_NONE
                | ARPHRD_RAWIP
                | libc::ARPHRD_PPP
        )
    )
}

/// The names of the interface's driver and of its place on a bus. Asked by ioctl and not of sysfs, which may be another
/// network namespace's.
fn driver(name: &str) -> Option<(String, String)> {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    const ETHTOOL_GDRVINFO: u32 = 3;
    /// struct ethtool_drvinfo of linux/ethtool.h.
    #[repr(C)]
    struct DriverInfo {
        command: u32,
        texts: [[u8; 32]; 3],
        bus: [u8; 32],
        rest: [u8; 64],
    }
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        data: *mut DriverInfo,
        rest: [u8; 16],
    }
    let socket = std::net::UdpSocket::bind(("0.0.0.0", 0)).ok()?;
    let mut info = DriverInfo { command: ETHTOOL_GDRVINFO, texts: [[0; 32]; 3], bus: [0; 32], rest: [0; 64] };
    let mut request = Request { name: [0; 16], data: &raw mut info, rest: [0; 16] };
    if name.len() >= request.name.len() {
        return None;
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the request is laid out as the kernel wants it, with room for all of its answer.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) };
    let text =
        |bytes: &[u8]| String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
    (result == 0).then(|| (text(&info.texts[0]), text(&info.bus)))
}

/// The largest packet that the interface takes, without its link header; none where it is not told.
pub fn mtu(name: &str) -> Option<u32> {
    // SAFETY: the answer's field of this question.
    ask(name, libc::SIOCGIFMTU).map(|answer| unsafe { answer.ifr_ifru.ifru_mtu }.cast_unsigned())
}

/// ARPHRD_* of linux/if_arp.h.
fn link_type(name: &str) -> Option<u16> {
    // SAFETY: as above.
    ask(name, libc::SIOCGIFHWADDR).map(|answer| unsafe { answer.ifr_ifru.ifru_hwaddr }.sa_family)
}

fn interface_flags(name: &str) -> InterfaceFlags {
    // SAFETY: as above.
    let flags = ask(name, libc::SIOCGIFFLAGS).map_or(0, |answer| unsafe { answer.ifr_ifru.ifru_flags });
    InterfaceFlags::from_bits_truncate(flags.into())
}

/// What the kernel says of an interface, by ioctl; see netdevice(7).
fn ask(name: &str, what: libc::c_ulong) -> Option<libc::ifreq> {
    let socket = std::net::UdpSocket::bind(("0.0.0.0", 0)).ok()?;
    // SAFETY: all zeros is a value of this plain struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the request is the kernel's own struct.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), what as _, &raw mut request) };
    (result == 0).then_some(request)
}

fn interface_names() -> anyhow::Result<Vec<String>> {
    let mut names: Vec<_> = getifaddrs()
        .context("asking for the interfaces")?
        .filter(|entry| !entry.flags.contains(InterfaceFlags::IFF_LOOPBACK) && entry.address.is_some())
        .map(|entry| entry.interface_name)
        .collect();
    names.sort();
    names.dedup();
    Ok(names)
}

fn default_route_interfaces() -> Vec<String> {
    let v4 = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let v6 = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    let v4 = v4.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        default.then(|| fields[0].to_owned())
    });
    let v6 = v6.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let default = fields.first()?.bytes().all(|b| b == b'0') && fields.get(1) == Some(&"00");
        (default && fields.last() != Some(&"lo")).then(|| (*fields.last().expect("not empty")).to_owned())
    });
    v4.chain(v6).collect()
}

/// NodePorts' default range (kube-apiserver's --service-node-port-range).
const NODE_PORTS: (u16, u16) = (30_000, 32_767);
/// Below are the ports that a backend may take for a privileged client's.
const LOWEST_SNAT_PORT: u16 = 1_024;

/// Fewer would not do: connections to one backend would soon be turned away.
const FEWEST_SNAT_PORTS: u32 = 1_024;

/// Source ports for forwarded traffic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourcePorts {
    pub first: u16,
    pub last: u16,
    /// First and last of net.ipv4.ip_local_port_range, where sockets of the node may have some of these ports as well.
    pub shared_with: Option<(u16, u16)>,
}

/// The widest range that neither the node's own sockets nor NodePorts use. Ports that the kernel keeps from sockets
/// (net.ipv4.ip_local_reserved_ports) are nobody's. Where too few are left, sockets may have some of them.
///
/// # Errors
/// Where the kernel's settings cannot be read.
pub fn source_ports() -> anyhow::Result<SourcePorts> {
    let read = |name: &str| {
        let path = Path::new("/proc/sys/net/ipv4").join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    let text = read("ip_local_port_range")?;
    let mut numbers = text.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(first)), Some(Ok(last))) = (numbers.next(), numbers.next()) else {
        bail!("net.ipv4.ip_local_port_range is {text:?}")
    };
    let reserved = port_ranges(&read("ip_local_reserved_ports")?);
    if let Some((first, last)) = widest_gap(&without((first, last), &reserved)) {
        return Ok(SourcePorts { first, last, shared_with: None });
    }
    let ports = widest_gap(&[]).expect("all but NodePorts are enough");
    Ok(SourcePorts { first: ports.0, last: ports.1, shared_with: Some((first, last)) })
}

/// As the kernel writes them: `1,2,10-20`.
fn port_ranges(text: &str) -> Vec<(u16, u16)> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
    };
    text.trim().split(',').filter_map(range).collect()
}

/// What is left of a range.
fn without(range: (u16, u16), holes: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let mut holes = holes.to_vec();
    holes.sort_unstable();
    let (mut from, last) = (u32::from(range.0), u32::from(range.1));
    let mut left = Vec::new();
    for (a, b) in holes.into_iter().map(|(a, b)| (u32::from(a), u32::from(b))).chain([(0x1_0000, 0x1_0000)]) {
        if a > from && from <= last {
            left.push((from as u16, (a - 1).min(last) as u16));
        }
        from = from.max(b + 1);
    }
    left
}

/// None where it has too few ports.
fn widest_gap(taken: &[(u16, u16)]) -> Option<(u16, u16)> {
    let mut taken = [taken, &[NODE_PORTS, (0, LOWEST_SNAT_PORT - 1)]].concat();
    taken.sort_unstable();
    let gaps = without((0, u16::MAX), &taken);
    let width = |(first, last): (u16, u16)| u32::from(last - first) + 1;
    // The first of several that are as wide.
    gaps.into_iter().rev().max_by_key(|gap| width(*gap)).filter(|gap| width(*gap) >= FEWEST_SNAT_PORTS)
}

/// The network namespace's cookie (SO_NETNS_COOKIE, Linux 5.14).
///
/// # Errors
/// What the kernel says.
pub fn netns_cookie() -> anyhow::Result<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0))
        .or_else(|_| std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)))
        .context("making a socket on the loopback address")?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option is a 64-bit number.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("asking for the network namespace's cookie");
    }
    Ok(cookie)
}

/// 64 secret bits.
///
/// # Errors
/// Where the kernel gives none.
pub fn random() -> anyhow::Result<u64> {
    use std::io::Read as _;
    let mut bytes = [0; 8];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).context("reading /dev/urandom")?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Of CLOCK_MONOTONIC, by which affinity goes.
pub fn monotonic_seconds() -> u32 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(0, |time| time.tv_sec() as u32)
}

/// Of CLOCK_MONOTONIC, by which leases to the kernel part go.
pub fn monotonic_nanoseconds() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    time.map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// The flow table's clock ([`svc_common::flow::TICK_SHIFT`]).
pub fn flow_tick() -> u16 {
    (monotonic_nanoseconds() >> svc_common::flow::TICK_SHIFT) as u16
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::{find_cgroup2, port_ranges, widest_gap, without};

    #[rstest]
    #[case::anywhere("/", Some("/sys/fs/cgroup/unified"))]
    #[case::below_the_one_asked_for("/host/cgroup", Some("/host/cgroup/unified"))]
    #[case::nowhere_below_it("/host/cgroups", None)]
    fn cgroup_v2_is_found_below_a_directory(#[case] directory: &str, #[case] expected: Option<&str>) {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup2 /host/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find_cgroup2(mounts, directory.as_ref()).as_deref(), expected.map(std::path::Path::new));
    }

    #[rstest]
    #[case::default((32_768, 60_999), "", Some((1_024, 29_999)))]
    #[case::all((1_024, 65_535), "", None)]
    #[case::almost_all((1_024, 65_000), "", None)]
    #[case::all_but_reserved_ones((1_024, 65_535), "1,40000-49999,50000", Some((40_000, 50_000)))]
    #[case::reserved_in_pieces((1_024, 65_535), "8080,2000-4000,3000-5000", Some((2_000, 5_000)))]
    #[case::from_ten_thousand((10_000, 50_000), "", Some((50_001, 65_535)))]
    #[case::low((1_024, 20_000), "\n", Some((32_768, 65_535)))]
    fn source_ports_are_nobody_elses(
        #[case] local: (u16, u16),
        #[case] reserved: &str,
        #[case] expected: Option<(u16, u16)>,
    ) {
        assert_eq!(widest_gap(&without(local, &port_ranges(reserved))), expected);
    }

    #[test]
    fn without_any_choice_all_but_node_ports_will_do() {
        assert_eq!(widest_gap(&[]), Some((32_768, 65_535)));
    }
}
