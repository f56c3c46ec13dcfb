//! Where a veth is no network card, and an XDP program sees the difference.
//!
//! - Checksums of what it sends are left to be filled in by a device that never comes: a peer's XDP program would see packets
//!   as they are on no wire.
//! - What native XDP sends out by it again is thrown away, unless its peer polls: has a program of its own, or GRO on.
use std::ffi::{c_int, c_void};
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

use crate::netns::Netns;

const SIOCETHTOOL: u64 = 0x8946;
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_SGRO: u32 = 0x2c;

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Computes checksums before sending, by every veth of this namespace.
pub fn checksum_before_sending(namespace: &Netns) -> Result<()> {
    set(namespace, ETHTOOL_STXCSUM, 0).context("cannot turn off the checksum offload")
}

/// Takes what a peer's native XDP sends, by every veth of this namespace.
pub fn receive_from_xdp(namespace: &Netns) -> Result<()> {
    set(namespace, ETHTOOL_SGRO, 1).context("cannot turn on GRO")
}

fn set(namespace: &Netns, command: u32, data: u32) -> Result<()> {
    namespace.inside(|| {
        let table = fs::read_to_string("/proc/thread-self/net/dev").context("cannot list the interfaces")?;
        // Two lines of headings.
        for line in table.lines().skip(2) {
            let name = line.split(':').next().unwrap_or_default().trim();
            if !["lo", "br0"].contains(&name) {
                set_of(name, command, data).with_context(|| name.to_owned())?;
            }
        }
        Ok(())
    })
}

fn set_of(interface: &str, command: u32, data: u32) -> Result<()> {
    let socket = datagram_socket()?;
    let mut value = EthtoolValue { command, data };
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
