//! Answering a packet that goes no further: a connection that no backend takes with a reset (RFC 9293, 3.5.2), other such
//! packets with ICMP's port unreachable (RFC 792, RFC 4443); what came too far or is too large as a router does. A client
//! kernel inside connect() acts on a reset at once.
use svc_common::checksum::fold;
use svc_common::map::TCP;
use svc_common::{Addr, Reason};

use crate::family::{ETHERNET, Family, V4, V6};
use crate::forward::Hop;
use crate::packet::{Packet, Resize};
use crate::parse::{FRAGMENT_LATER, Headers, ICMP_V4, ICMP_V6, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, checksum_offset};

const HOP_LIMIT: u8 = 64;
const TCP_HEADER: usize = 20;
const ICMP_HEADER: usize = 8;

/// Turns the packet into its refusal, to be sent back by the link it came from. `reason`: [`Reason::TooBig`] and
/// [`Reason::HopLimit`] are a router's errors, every other one is a rejection.
///
/// # Errors
/// [`Reason::NotService`] where none is due: a reset, an ICMP error and all pieces of a datagram but the first are not
/// answered (RFC 1122, 3.2.2), nor are packets with options or extension headers; [`Reason::Truncated`],
/// [`Reason::HelperFailed`]: the packet is spoilt then.
#[inline(always)]
pub fn reject<P: Resize>(packet: &mut P, headers: &Headers, hop: &Hop, reason: Reason) -> Result<(), Reason> {
    if headers.is_icmp_error() || headers.fragment == FRAGMENT_LATER {
        return Err(Reason::NotService);
    }
    if headers.v4 {
        reject_of::<P, V4>(packet, headers, hop, reason)
    } else {
        reject_of::<P, V6>(packet, headers, hop, reason)
    }
}

#[inline(always)]
fn reject_of<P: Resize, F: Family>(packet: &mut P, headers: &Headers, hop: &Hop, reason: Reason) -> Result<(), Reason> {
    if headers.l4 as usize != F::L4 {
        return Err(Reason::NotService);
    }
    let error = |v4: (u8, u8), v6: (u8, u8)| if F::IS_V4 { v4 } else { v6 };
    match reason {
        Reason::TooBig => icmp::<P, F>(packet, headers, error((3, 4), (2, 0)), hop.mtu),
        Reason::HopLimit => icmp::<P, F>(packet, headers, error((11, 0), (3, 0)), 0),
        _ if headers.protocol != TCP => icmp::<P, F>(packet, headers, error((3, 3), (1, 4)), 0),
        _ if headers.flags & TCP_RST == 0 => reset::<P, F>(packet, headers),
        _ => Err(Reason::NotService),
    }
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn reset<P: Resize, F: Family>(packet: &mut P, headers: &Headers) -> Result<(), Reason> {
    let [seq, ack] = packet.get::<[u32; 2]>(F::L4 + 4)?;
    let data_offset = packet.get::<u8>(F::L4 + 12)? >> 4;
    let header = data_offset as u32 * 4;
    let segment = if F::IS_V4 {
        (u16::from_be(packet.get(ETHERNET + 2)?) as u32).wrapping_sub(F::HEADER as u32)
    } else {
        u16::from_be(packet.get(ETHERNET + 4)?) as u32
    };
    let (seq, ack, flags) = if headers.flags & TCP_ACK != 0 {
        (ack, 0, TCP_RST)
    } else {
        let counted = (headers.flags & TCP_SYN != 0) as u32 + (headers.flags & TCP_FIN != 0) as u32;
        let end = u32::from_be(seq).wrapping_add(segment).wrapping_sub(header).wrapping_add(counted);
        (0, end.to_be(), TCP_RST | TCP_ACK)
    };
    let words = [
        headers.dport,
        headers.sport,
        seq as u16,
        (seq >> 16) as u16,
        ack as u16,
        (ack >> 16) as u16,
        u16::from_ne_bytes([(TCP_HEADER as u8 / 4) << 4, flags]),
        0,
        0,
        0,
    ];
    packet.resize((F::L4 + TCP_HEADER) as u32)?;
    turn_around::<P, F>(packet, headers, TCP, TCP_HEADER as u16)?;
    packet.set(F::L4, words)?;
    let pseudo = pseudo_header(headers.src, headers.dst, TCP, TCP_HEADER as u16);
    let mut sum = pseudo;
    for word in words {
        sum += word as u64;
    }
    packet.set_l4_checksum(F::L4 + checksum_offset(TCP), fold(pseudo), !fold(sum))?;
    Ok(())
}

/// An ICMP error about the packet; `mtu` is told where the packet is too big for the next link (RFC 1191, RFC 8201).
#[cfg_attr(target_arch = "bpf", inline(never))]
fn icmp<P: Resize, F: Family>(
    packet: &mut P,
    headers: &Headers,
    (kind, code): (u8, u8),
    mtu: u16,
) -> Result<(), Reason> {
    // The network header and 8 bytes more: what RFC 792 asks for, and all that a socket is found by.
    let quoted = F::HEADER + 8;
    let length = (ICMP_HEADER + quoted) as u16;
    packet.resize((F::L4 + ICMP_HEADER + quoted) as u32)?;
    let head = u16::from_ne_bytes([kind, code]);
    let mtu = mtu.to_be();
    let mut sum = head as u64 + mtu as u64;
    let mut i = 0;
    while i < quoted {
        let word: u16 = packet.get(ETHERNET + i)?;
        packet.set(F::L4 + ICMP_HEADER + i, word)?;
        sum += word as u64;
        i += 2;
    }
    if F::IS_V4 {
        turn_around::<P, F>(packet, headers, ICMP_V4, length)?;
        packet.set(F::L4, [head, !fold(sum), 0, mtu])
    } else {
        turn_around::<P, F>(packet, headers, ICMP_V6, length)?;
        let pseudo = pseudo_header(headers.src, headers.dst, ICMP_V6, length);
        if mtu != 0 {
            return packet.set(F::L4, [head, !fold(sum + pseudo), 0, mtu]);
        }
        // Where the sender had left UDP's checksum to its network card, the next card will store the complement of what it
        // sums up from here, without a pseudo header, 6 bytes from here: in a field that ICMPv6 does not use. The sum
        // is right with and without that if the pseudo header's own sum stands there until then. (For ICMP, which
        // has no pseudo header, the same rule gives 0.)
        let unused = fold(pseudo);
        packet.set(F::L4, [head, !fold(sum + pseudo + unused as u64), 0, unused])
    }
}

/// The link and network headers of an answer to `headers`, with `length` bytes to follow.
#[inline(always)]
fn turn_around<P: Packet, F: Family>(
    packet: &mut P,
    headers: &Headers,
    protocol: u8,
    length: u16,
) -> Result<(), Reason> {
    let [d0, d1, d2, s0, s1, s2] = packet.get::<[u16; 6]>(0)?;
    packet.set(0, [s0, s1, s2, d0, d1, d2])?;
    if F::IS_V4 {
        let (src, dst) = (headers.dst.0[3], headers.src.0[3]);
        let mut words = [
            u16::from_ne_bytes([0x45, 0]),
            (F::HEADER as u16 + length).to_be(),
            0,
            0x4000u16.to_be(),
            u16::from_ne_bytes([HOP_LIMIT, protocol]),
            0,
            src as u16,
            (src >> 16) as u16,
            dst as u16,
            (dst >> 16) as u16,
        ];
        let mut sum = 0;
        for word in words {
            sum += word as u64;
        }
        words[5] = !fold(sum);
        packet.set(ETHERNET, words)
    } else {
        packet.set(
            ETHERNET,
            [u16::from_ne_bytes([0x60, 0]), 0, length.to_be(), u16::from_ne_bytes([protocol, HOP_LIMIT])],
        )?;
        F::set_addresses(packet, headers.dst, headers.src)
    }
}

/// RFC 9293, 3.1 and RFC 8200, 8.1; an address's mapped prefix would count, so IPv4's is left out.
#[inline(always)]
fn pseudo_header(a: Addr, b: Addr, protocol: u8, length: u16) -> u64 {
    let mut sum = (protocol as u16).to_be() as u64 + length.to_be() as u64;
    let mut i = if a.is_v4() { 3 } else { 0 };
    while i < 4 {
        sum += (a.0[i] & 0xffff) as u64 + (a.0[i] >> 16) as u64 + (b.0[i] & 0xffff) as u64 + (b.0[i] >> 16) as u64;
        i += 1;
    }
    sum
}
