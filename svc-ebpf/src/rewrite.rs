//! New addresses and ports for a packet, checksums included.
use svc_common::checksum::Diff;
use svc_common::map::UDP;
use svc_common::{Addr, Reason};

use crate::family::Family;
use crate::packet::Packet;
use crate::parse::{Headers, checksum_offset};

/// Ports in network byte order.
#[derive(Clone, Copy, Debug)]
pub struct Endpoints {
    pub src: Addr,
    pub sport: u16,
    pub dst: Addr,
    pub dport: u16,
}

/// # Errors
/// [`Reason::Truncated`], [`Reason::HelperFailed`].
// A function of its own in the kernel, whose stack is short.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn rewrite<P: Packet, F: Family>(packet: &mut P, from: &Headers, to: &Endpoints) -> Result<(), Reason> {
    let addresses = F::diff(F::diff(Diff::default(), from.src, to.src), from.dst, to.dst);
    let ports = Diff::default().word(from.sport, to.sport).word(from.dport, to.dport);
    if let Some(checksum) = F::L3_CHECKSUM {
        packet.patch_l3(checksum, addresses)?;
    }
    packet.patch_l4(F::L4 + checksum_offset(from.protocol), addresses, ports, from.protocol == UDP)?;
    F::set_addresses(packet, to.src, to.dst)?;
    packet.set(F::L4, [to.sport, to.dport])
}
