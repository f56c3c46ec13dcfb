//! Where a veth is no network card, and an XDP program sees the difference.
//!
//! - Checksums of what it sends are left to be filled in by a device that never comes: a peer's XDP program would see packets
//!   as they are on no wire.
//! - What native XDP sends out by it again is not received before something else comes, unless the peer has an XDP program
//!   of its own.
use std::ffi::{CString, c_int, c_void};
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

use crate::netns::Netns;

const SIOCETHTOOL: u64 = 0x8946;
const ETHTOOL_STXCSUM: u32 = 0x17;

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Computes checksums before sending, by every veth of this namespace.
pub fn checksum_before_sending(namespace: &Netns) -> Result<()> {
    namespace.inside(|| {
        interfaces()?.iter().try_for_each(|name| {
            turn_off(name).with_context(|| format!("cannot turn off the checksum offload of {name}"))
        })
    })
}

/// Takes what a peer's native XDP sends, by every veth of this namespace, for as long as the links are kept.
pub fn receive_from_xdp(namespace: &Netns) -> Result<Vec<OwnedFd>> {
    let program = passing_program().context("cannot load an XDP program that passes everything")?;
    namespace.inside(|| {
        interfaces()?
            .iter()
            .map(|name| attach(&program, name).with_context(|| format!("cannot attach an XDP program to {name}")))
            .collect()
    })
}

/// The veths of the current namespace.
fn interfaces() -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/thread-self/net/dev").context("cannot list the interfaces")?;
    // Two lines of headings.
    let names = table.lines().skip(2).map(|line| line.split(':').next().unwrap_or_default().trim().to_owned());
    Ok(names.filter(|name| !["lo", "br0"].contains(&name.as_str())).collect())
}

fn bpf<T>(command: c_int, attributes: &mut T) -> std::io::Result<OwnedFd> {
    // SAFETY: the attributes are laid out as the command wants them, and what they point to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    let descriptor = check(result as c_int)?;
    // SAFETY: it was just opened, and no one else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn passing_program() -> std::io::Result<OwnedFd> {
    /// The beginning of bpf(2)'s attributes for BPF_PROG_LOAD.
    #[repr(C)]
    struct Attributes {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
    }
    const PROG_LOAD: c_int = 5;
    const BPF_PROG_TYPE_XDP: u32 = 6;
    // r0 = XDP_PASS; exit
    let instructions: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 2, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    bpf(
        PROG_LOAD,
        &mut Attributes {
            kind: BPF_PROG_TYPE_XDP,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"Dual MIT/GPL".as_ptr() as u64,
        },
    )
}

fn attach(program: &OwnedFd, interface: &str) -> Result<OwnedFd> {
    const LINK_CREATE: c_int = 28;
    const BPF_XDP: u32 = 37;
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    let name = CString::new(interface)?;
    // SAFETY: a name that ends in zero.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    // The program, the interface, the hook and the flags.
    Ok(bpf(LINK_CREATE, &mut [program.as_raw_fd() as u32, index, BPF_XDP, XDP_FLAGS_DRV_MODE])?)
}

fn turn_off(interface: &str) -> Result<()> {
    let socket = datagram_socket()?;
    let mut value = EthtoolValue { command: ETHTOOL_STXCSUM, data: 0 };
    // SAFETY: an ifreq of zeros is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *target = byte.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let argument: *mut c_void = (&raw mut request).cast();
    // SAFETY: the request and the value that it points to outlive the call, and are what this ioctl takes.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, argument) };
    check(result)?;
    Ok(())
}

fn datagram_socket() -> Result<OwnedFd> {
    // SAFETY: it takes numbers only.
    let descriptor = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: it was just opened, and no one else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn check(result: c_int) -> std::io::Result<c_int> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}
