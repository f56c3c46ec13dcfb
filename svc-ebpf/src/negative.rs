//! The negative cache: what was found to be no Service's, and to have no flow, is known again by its addresses and ports. It
//! spares most of a node's packets all that follows, at each hook that they pass.
//!
//! An entry holds for one epoch of its ports. The agent ends the epochs of all ports before it changes what is a Service's, and
//! whoever opens a flow ends those of the ports that the flow's replies have, and of what the flow makes its own
//! ([`crate::open::is_shadowed`]).
use svc_common::Addr;
use svc_common::map::{CONFIG_TAKE_OVER, TCP, UDP};

use crate::family::{ETHERNET, Family, V4, V6};
use crate::open::is_given_out;
use crate::packet::Packet;
use crate::parse::{Headers, TCP_ACK, TCP_SYN};
use crate::tables::Tables;

/// How many epochs of ports there are side by side.
pub const EPOCHS: u32 = 4096;

#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Entry {
    epoch: u64,
    /// Source and destination, as they stand in the packet; of IPv4 one word each.
    addrs: [u32; 8],
    /// Source and destination.
    ports: u32,
    /// The protocol, the family's ethertype, and [`NO_SYN`].
    kind: u32,
}
const _: () = assert!(size_of::<Entry>() == 48);

/// The native word of RFC 791's second: more fragments, and the offset.
const FRAGMENT: u32 = 0x3fffu32.to_be();

/// In an entry's kind: says nothing of a connection's first packet, which a flow may shadow ([`crate::open::is_shadowed`]).
const NO_SYN: u32 = 1 << 8;

#[inline(always)]
const fn kind<F: Family>(protocol: u32) -> u32 {
    (F::ETHERTYPE as u32) << 16 | protocol & 0xff
}

/// Knuth's multiplicative hash: its high bits are the good ones.
#[inline(always)]
const fn hash(src: u32, dst: u32, ports: u32) -> u32 {
    (src ^ dst.rotate_left(13) ^ ports.rotate_left(7)).wrapping_mul(0x9E37_79B1)
}

/// Whether this packet is no Service's, as one before it was found to be. False of all that has IP options, extension headers or
/// is a fragment.
#[inline(always)]
pub fn is_known<P: Packet, T: Tables>(packet: &P, tables: &T) -> bool {
    match packet.get::<u16>(ETHERNET - 2) {
        Ok(V4::ETHERTYPE) => is_known_v4(packet, tables),
        Ok(V6::ETHERTYPE) => is_known_v6(packet, tables),
        _ => false,
    }
}

#[inline(always)]
fn is_known_v4<P: Packet, T: Tables>(packet: &P, tables: &T) -> bool {
    let Ok([start, fragment, protocol, src, dst, ports]) = packet.get::<[u32; 6]>(ETHERNET) else { return false };
    if start.to_le() & 0xff != 0x45 || fragment & FRAGMENT != 0 {
        return false;
    }
    let entry = tables.negative(hash(src, dst, ports));
    if entry.is_null() {
        return false;
    }
    // SAFETY: null, or an entry of the cache that nobody else writes meanwhile.
    let entry = unsafe { &*entry };
    entry.addrs[0] == src
        && entry.addrs[1] == dst
        && holds::<P, T, V4>(packet, tables, entry, protocol.to_le() >> 8, ports)
}

#[inline(always)]
fn is_known_v6<P: Packet, T: Tables>(packet: &P, tables: &T) -> bool {
    let Ok(next) = packet.get::<u8>(V6::PROTOCOL) else { return false };
    let Ok([a, b, c, d, e, f, g, h, ports]) = packet.get::<[u32; 9]>(ETHERNET + 8) else { return false };
    let entry = tables.negative(hash(Addr([a, b, c, d]).folded(), Addr([e, f, g, h]).folded(), ports));
    if entry.is_null() {
        return false;
    }
    // SAFETY: as above.
    let entry = unsafe { &*entry };
    entry.addrs == [a, b, c, d, e, f, g, h] && holds::<P, T, V6>(packet, tables, entry, next as u32, ports)
}

/// Whether an entry with a packet's addresses is that packet's, and of this epoch.
#[inline(always)]
fn holds<P: Packet, T: Tables, F: Family>(packet: &P, tables: &T, entry: &Entry, protocol: u32, ports: u32) -> bool {
    entry.ports == ports
        && entry.kind & !NO_SYN == kind::<F>(protocol)
        && is_meant::<P, F>(packet, entry.kind)
        && entry.epoch == tables.epoch(place(ports))
}

/// Whether all of the transport header is there, and the entry says something of such a packet.
#[inline(always)]
fn is_meant<P: Packet, F: Family>(packet: &P, kind: u32) -> bool {
    if kind as u8 == UDP {
        return packet.get::<u16>(F::L4 + 6).is_ok();
    }
    let (Ok(flags), Ok(_)) = (packet.get::<u8>(F::L4 + 13), packet.get::<u16>(F::L4 + 18)) else { return false };
    kind & NO_SYN == 0 || flags & (TCP_SYN | TCP_ACK) != TCP_SYN
}

/// Where the epoch of these ports is found, in the packet's order or the other.
#[inline(always)]
const fn place(ports: u32) -> u32 {
    (ports ^ ports >> 16) % EPOCHS
}

/// The epoch of a packet's ports, and of those of a packet the other way; 0 where there is none.
#[inline(always)]
pub fn epoch<T: Tables>(tables: &T, sport: u16, dport: u16) -> u64 {
    tables.epoch(place((sport ^ dport) as u32))
}

/// Ends the epoch of these ports: a flow has them now.
#[inline(always)]
pub fn end<T: Tables>(tables: &T, sport: u16, dport: u16) {
    tables.end_epoch(place((sport ^ dport) as u32));
}

/// Makes an entry of a packet that was found to be no Service's, if it is nothing but its addresses and ports that say so.
/// `epoch`: what it was before anything was looked up.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn keep<T: Tables>(tables: &T, headers: &Headers, epoch: u64) {
    let Headers { v4, protocol, src, dst, sport, dport, .. } = *headers;
    let start = if v4 { V4::L4 } else { V6::L4 };
    let is_plain = headers.fragment == 0 && headers.l4 as usize == start && (protocol == TCP || protocol == UDP);
    if epoch == 0 || !is_plain || !headers.may_open() || tables.config().flags & CONFIG_TAKE_OVER != 0 {
        return;
    }
    let may_be_shadowed = is_given_out(tables, sport);
    if may_be_shadowed && protocol == UDP {
        return;
    }
    let ports = u32::from_ne_bytes({
        let ([a, b], [c, d]) = (sport.to_ne_bytes(), dport.to_ne_bytes());
        [a, b, c, d]
    });
    let (addrs, hash, kind) = if v4 {
        let (src, dst) = (src.0[3], dst.0[3]);
        ([src, dst, 0, 0, 0, 0, 0, 0], hash(src, dst, ports), kind::<V4>(protocol as u32))
    } else {
        let ([a, b, c, d], [e, f, g, h]) = (src.0, dst.0);
        ([a, b, c, d, e, f, g, h], hash(src.folded(), dst.folded(), ports), kind::<V6>(protocol as u32))
    };
    let kind = if may_be_shadowed { kind | NO_SYN } else { kind };
    let entry = tables.negative(hash);
    if !entry.is_null() {
        // SAFETY: as above.
        unsafe { *entry = Entry { epoch, addrs, ports, kind } };
    }
}
