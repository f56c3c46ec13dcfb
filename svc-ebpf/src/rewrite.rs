//! New addresses and ports for a packet, checksums included.
use svc_common::checksum::Diff;
use svc_common::map::{SCTP, UDP};
use svc_common::{Addr, Reason, crc32c};

use crate::family::{ETHERNET, Family};
use crate::packet::Packet;
use crate::parse::{FRAGMENT_LATER, Headers, checksum_offset, l4, offset};

/// Ports in network byte order.
#[derive(Clone, Copy, Debug)]
pub struct Endpoints {
    pub src: Addr,
    pub sport: u16,
    pub dst: Addr,
    pub dport: u16,
}

/// # Errors
/// [`Reason::Truncated`], [`Reason::HelperFailed`], and [`Reason::Unsupported`] for a piece of an SCTP packet whose port
/// changes: its checksum covers pieces that are not here. The packet is unchanged then unless a helper failed half-way.
// A function of its own in the kernel, whose stack is short.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn rewrite<P: Packet, F: Family>(packet: &mut P, from: &Headers, to: &Endpoints) -> Result<(), Reason> {
    let addresses = F::diff(F::diff(Diff::default(), from.src, to.src), from.dst, to.dst);
    let ports = Diff::default().word(from.sport, to.sport).word(from.dport, to.dport);
    let at = l4::<P, F>(from);
    if from.protocol == SCTP {
        patch_sctp::<P, F>(packet, from, to, at)?;
    }
    if let Some(checksum) = F::L3_CHECKSUM {
        packet.patch_l3(checksum, addresses)?;
    }
    if from.fragment != FRAGMENT_LATER {
        if from.protocol != SCTP {
            packet.patch_l4::<F>(at + checksum_offset(from.protocol), addresses, ports, from.protocol == UDP)?;
        }
        packet.set(at, [to.sport, to.dport])?;
    }
    F::set_addresses(packet, to.src, to.dst)
}

/// SCTP's checksum covers its ports but no addresses (RFC 9260, 6.8).
#[inline(always)]
fn patch_sctp<P: Packet, F: Family>(packet: &mut P, from: &Headers, to: &Endpoints, at: usize) -> Result<(), Reason> {
    let word = |sport: u16, dport: u16| sport as u32 | (dport as u32) << 16;
    let difference = word(from.sport, from.dport) ^ word(to.sport, to.dport);
    if difference == 0 {
        return Ok(());
    }
    if from.fragment != 0 {
        return Err(Reason::Unsupported);
    }
    let length = u16::from_be(packet.get(F::LENGTH)?) as u32 + F::LENGTH_FROM as u32;
    let checksum: u32 = packet.get(at + checksum_offset(SCTP))?;
    packet.set(at + checksum_offset(SCTP), patched(checksum, difference, length.wrapping_sub(at as u32)))
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn patched(checksum: u32, difference: u32, length: u32) -> u32 {
    crc32c::patch(checksum, difference, length)
}

/// Rewrites an ICMP error whose quoted packet is `from` on its way back: the quoted packet becomes the one that the
/// error's receiver has sent, and the error is addressed to that receiver (RFC 5508, 4.2). The quoted transport checksum is
/// brought up to date for UDP; TCP's need not be quoted at all.
///
/// # Errors
/// [`Reason::Truncated`], [`Reason::HelperFailed`].
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn rewrite_error<P: Packet, F: Family>(packet: &mut P, from: &Headers, to: &Endpoints) -> Result<(), Reason> {
    let (inner, at, icmp) = (offset(from.quoted), offset(from.l4), offset(from.icmp));
    let inner_addresses = F::diff(F::diff(Diff::default(), from.dst, to.dst), from.src, to.src);
    let mut inside = Diff(inner_addresses.0).word(from.dport, to.dport).word(from.sport, to.sport);
    if let Some(checksum) = F::L3_CHECKSUM {
        let field = inner + checksum - ETHERNET;
        let old: u16 = packet.get(field)?;
        let new = inner_addresses.apply(old);
        packet.set(field, new)?;
        inside = inside.word(old, new);
    }
    if from.protocol == UDP {
        let old: u16 = packet.get(at + 6)?;
        if old != 0 {
            let ports = inner_addresses.word(from.dport, to.dport).word(from.sport, to.sport);
            let new = ports.apply(old);
            let new = if new == 0 { 0xffff } else { new };
            packet.set(at + 6, new)?;
            inside = inside.word(old, new);
        }
    }
    packet.set(at, [to.dport, to.sport])?;
    F::set_addresses_at(packet, inner, to.dst, to.src)?;

    let (src, dst) = F::addresses(packet)?;
    // The sender of the error is hidden where that of the packets is.
    let new_src = if to.src == from.src { src } else { to.src };
    let outer = F::diff(F::diff(Diff::default(), src, new_src), dst, to.dst);
    if let Some(checksum) = F::L3_CHECKSUM {
        packet.patch_l3(checksum, outer)?;
    } else {
        // ICMPv6 has a pseudo header (RFC 4443, 2.3).
        inside = Diff(inside.0 + outer.0);
    }
    F::set_addresses(packet, new_src, to.dst)?;
    // An error's checksum is computed by whoever makes it, never left to a network card: so it is patched where it stands.
    let old: u16 = packet.get(icmp + 2)?;
    packet.set(icmp + 2, inside.apply(old))
}
