//! A packet's addresses, ports and what else decides its way.
use svc_common::map::{FragmentKey, FragmentPorts, SCTP, TCP, UDP};
use svc_common::{Addr, Reason};

use crate::family::{ETHERNET, Family, V4, V6};
use crate::packet::Packet;
use crate::tables::Tables;

/// What is known of a packet. Of an ICMP error it is told as if the packet that the error is about came back: its
/// destination is `src`, so that both find the same flow.
///
/// Ports in network byte order.
#[derive(Clone, Copy, Default, Debug)]
pub struct Headers {
    pub v4: bool,
    pub protocol: u8,
    /// RFC 9293's control bits, `TCP_*`; SCTP's chunks in the same terms; 0 for UDP.
    pub flags: u8,
    /// `FRAGMENT_*`; 0 for a whole datagram.
    pub fragment: u8,
    pub src: Addr,
    pub dst: Addr,
    pub sport: u16,
    pub dport: u16,
    /// Where the transport header starts, from the frame's start.
    pub l4: u16,
    /// Of an ICMP error: where the quoted packet's network header starts. 0 otherwise.
    pub quoted: u16,
    /// Of an ICMP error: where its own header starts.
    pub icmp: u16,
    /// Of a fragment: its datagram's identification, as it stands in the packet.
    pub id: u32,
    pub from: From,
}

/// Where a packet is met.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum From {
    /// Coming in by an interface to the network.
    #[default]
    Network,
    /// Coming from a pod of this node.
    Pod,
    /// About to leave for the network, without having been translated.
    Host,
}

pub const FRAGMENT_FIRST: u8 = 1;
/// It has no transport header.
pub const FRAGMENT_LATER: u8 = 2;

pub const TCP_FIN: u8 = 1;
pub const TCP_SYN: u8 = 1 << 1;
pub const TCP_RST: u8 = 1 << 2;
pub const TCP_ACK: u8 = 1 << 4;

/// RFC 9260, 3.2.
const SCTP_INIT: u8 = 1;
const SCTP_ABORT: u8 = 6;
const SCTP_SHUTDOWN: u8 = 7;
const SCTP_SHUTDOWN_ACK: u8 = 8;
const SCTP_SHUTDOWN_COMPLETE: u8 = 14;

pub const ICMP_V4: u8 = 1;
pub const ICMP_V6: u8 = 58;

impl Headers {
    /// The first packet of a connection, for protocols that have such.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    #[inline(always)]
    pub const fn is_icmp_error(&self) -> bool {
        self.quoted != 0
    }

    /// Of a fragment: its datagram's.
    #[inline(always)]
    pub const fn fragment_key(&self) -> FragmentKey {
        let Headers { src, dst, id, protocol, .. } = *self;
        FragmentKey { src, dst, id, protocol, pad: [0; 3] }
    }

    /// A UDP datagram, or the first packet of a connection.
    #[inline(always)]
    pub const fn may_open(&self) -> bool {
        !self.is_icmp_error() && (self.protocol == UDP || self.flags & TCP_RST == 0)
    }
}

/// Where the transport checksum stands from the transport header's start.
#[inline(always)]
pub const fn checksum_offset(protocol: u8) -> usize {
    match protocol {
        TCP => 16,
        UDP => 6,
        _ => 8,
    }
}

/// Offsets have these bits; the mask lets the verifier know.
const OFFSET_MASK: u16 = 0x1ff;

/// An offset that was noted in [`Headers`].
#[inline(always)]
pub(crate) const fn offset(noted: u16) -> usize {
    (noted & OFFSET_MASK) as usize
}

/// Where the packet's transport header starts: for a packet without options a constant.
#[inline(always)]
pub fn l4<P: Packet, F: Family>(headers: &Headers) -> usize {
    if P::PLAIN { F::L4 } else { offset(headers.l4) }
}

/// # Errors
/// [`Reason::NotService`] where the packet is none that a Service could have, [`Reason::Truncated`],
/// [`Reason::Unsupported`], [`Reason::FragmentUnknown`].
#[inline(always)]
pub fn parse<P: Packet, T: Tables>(packet: &P, tables: &T, headers: &mut Headers) -> Result<(), Reason> {
    let ethertype: u16 = packet.get(ETHERNET - 2)?;
    headers.quoted = 0;
    headers.fragment = 0;
    if ethertype == V4::ETHERTYPE {
        headers.v4 = true;
        parse_v4(packet, tables, headers)
    } else if ethertype == V6::ETHERTYPE {
        headers.v4 = false;
        parse_v6(packet, tables, headers)
    } else {
        Err(Reason::NotService)
    }
}

#[inline(always)]
fn parse_v4<P: Packet, T: Tables>(packet: &P, tables: &T, headers: &mut Headers) -> Result<(), Reason> {
    headers.protocol = packet.get(V4::PROTOCOL)?;
    if !is_carried(headers.protocol) && (P::PLAIN || headers.protocol != ICMP_V4) {
        return Err(Reason::NotService);
    }
    (headers.src, headers.dst) = V4::addresses(packet)?;
    let version_and_length: u8 = packet.get(ETHERNET)?;
    // RFC 791: more fragments, and the offset in units of 8 bytes.
    let fragment = u16::from_be(packet.get(ETHERNET + 6)?) & 0x3fff;
    headers.l4 = (ETHERNET + V4::HEADER) as u16;
    if version_and_length != 0x45 || fragment != 0 {
        let length = (version_and_length & 0xf) as u16 * 4;
        if P::PLAIN || version_and_length >> 4 != 4 || length < V4::HEADER as u16 {
            return Err(Reason::Unsupported);
        }
        headers.l4 = ETHERNET as u16 + length;
        if fragment != 0 {
            headers.fragment = if fragment & 0x1fff == 0 { FRAGMENT_FIRST } else { FRAGMENT_LATER };
            return parse_fragment::<P, T, V4>(packet, tables, headers, packet.get::<u16>(ETHERNET + 4)? as u32);
        }
    }
    if headers.protocol == ICMP_V4 {
        return parse_icmp::<P, V4>(packet, headers);
    }
    parse_transport::<P, V4>(packet, headers)
}

/// RFC 8200, 4.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// More extension headers than this are not followed.
const EXTENSIONS: u32 = 5;

#[inline(always)]
fn parse_v6<P: Packet, T: Tables>(packet: &P, tables: &T, headers: &mut Headers) -> Result<(), Reason> {
    headers.protocol = packet.get(V6::PROTOCOL)?;
    headers.l4 = V6::L4 as u16;
    if P::PLAIN && !is_carried(headers.protocol) {
        return Err(Reason::NotService);
    }
    (headers.src, headers.dst) = V6::addresses(packet)?;
    not_mapped(headers)?;
    if !P::PLAIN {
        let mut i = 0;
        while i < EXTENSIONS {
            let at = offset(headers.l4);
            let length = match headers.protocol {
                HOP_BY_HOP | ROUTING | DESTINATION => (packet.get::<u8>(at + 1)? as u16 + 1) * 8,
                AUTHENTICATION => (packet.get::<u8>(at + 1)? as u16 + 2) * 4,
                FRAGMENT => {
                    let position = u16::from_be(packet.get(at + 2)?);
                    headers.protocol = packet.get(at)?;
                    if at as u16 > OFFSET_MASK - 8 {
                        return Err(Reason::Unsupported);
                    }
                    headers.l4 = at as u16 + 8;
                    // An "atomic" fragment is whole (RFC 6946).
                    if position & !6 == 0 {
                        i += 1;
                        continue;
                    }
                    headers.fragment = if position & !7 == 0 { FRAGMENT_FIRST } else { FRAGMENT_LATER };
                    return parse_fragment::<P, T, V6>(packet, tables, headers, packet.get(at + 4)?);
                }
                _ => break,
            };
            headers.protocol = packet.get(at)?;
            if length > OFFSET_MASK - at as u16 {
                return Err(Reason::Unsupported);
            }
            headers.l4 = at as u16 + length;
            i += 1;
        }
    }
    if !P::PLAIN && headers.protocol == ICMP_V6 {
        return parse_icmp::<P, V6>(packet, headers);
    }
    if !P::PLAIN && !is_carried(headers.protocol) {
        return Err(Reason::NotService);
    }
    parse_transport::<P, V6>(packet, headers)
}

/// IPv4's addresses in an IPv6 header, which no host sends, are none of an IPv4 Service's.
#[inline(always)]
fn not_mapped(headers: &Headers) -> Result<(), Reason> {
    if headers.src.is_v4() || headers.dst.is_v4() { Err(Reason::NotService) } else { Ok(()) }
}

/// Only the first piece of a datagram has its ports: they are noted for the others. An ICMP error in pieces is none that
/// anybody sends.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn parse_fragment<P: Packet, T: Tables, F: Family>(
    packet: &P,
    tables: &T,
    headers: &mut Headers,
    id: u32,
) -> Result<(), Reason> {
    if !is_carried(headers.protocol) {
        return Err(Reason::NotService);
    }
    headers.id = id;
    let key = headers.fragment_key();
    if headers.fragment == FRAGMENT_FIRST {
        parse_transport::<P, F>(packet, headers)?;
        tables.set_fragment(&key, FragmentPorts { sport: headers.sport, dport: headers.dport });
        return Ok(());
    }
    let ports = tables.fragment(&key).ok_or(Reason::FragmentUnknown)?;
    headers.sport = ports.sport;
    headers.dport = ports.dport;
    headers.flags = 0;
    Ok(())
}

#[inline(always)]
const fn is_carried(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP || protocol == SCTP
}

#[inline(always)]
fn parse_transport<P: Packet, F: Family>(packet: &P, headers: &mut Headers) -> Result<(), Reason> {
    let at = l4::<P, F>(headers);
    let [sport, dport] = packet.get::<[u16; 2]>(at)?;
    headers.sport = sport;
    headers.dport = dport;
    // The whole transport header has to be there before anything is changed.
    headers.flags = match headers.protocol {
        TCP => {
            packet.get::<u16>(at + 18)?;
            packet.get(at + 13)?
        }
        UDP => {
            packet.get::<u16>(at + 6)?;
            0
        }
        SCTP => match packet.get::<u8>(at + 12)? {
            SCTP_INIT => TCP_SYN,
            SCTP_ABORT => TCP_RST | TCP_ACK,
            SCTP_SHUTDOWN | SCTP_SHUTDOWN_ACK | SCTP_SHUTDOWN_COMPLETE => TCP_FIN | TCP_ACK,
            _ => TCP_ACK,
        },
        _ => return Err(Reason::NotService),
    };
    Ok(())
}

/// An error about a packet (RFC 792; RFC 4443, 3) belongs to that packet's flow; any other ICMP message to none.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn parse_icmp<P: Packet, F: Family>(packet: &P, headers: &mut Headers) -> Result<(), Reason> {
    let at = offset(headers.l4);
    let kind: u8 = packet.get(at)?;
    let is_error = if F::IS_V4 { matches!(kind, 3 | 4 | 11 | 12) } else { kind < 128 };
    if !is_error {
        return Err(Reason::NotService);
    }
    let inner = at + 8;
    if F::IS_V4 {
        let version_and_length: u8 = packet.get(inner)?;
        let fragment = u16::from_be(packet.get(inner + 6)?) & 0x1fff;
        let length = (version_and_length & 0xf) as u16 * 4;
        if version_and_length >> 4 != 4 || length < V4::HEADER as u16 || fragment != 0 {
            return Err(Reason::NotService);
        }
        headers.protocol = packet.get(inner + 9)?;
        let [src, dst] = packet.get::<[u32; 2]>(inner + 12)?;
        headers.src = Addr::v4(dst);
        headers.dst = Addr::v4(src);
        headers.l4 = inner as u16 + length;
    } else {
        if inner > OFFSET_MASK as usize - V6::HEADER {
            return Err(Reason::Unsupported);
        }
        headers.protocol = packet.get(inner + 6)?;
        headers.src = packet.get(inner + 24)?;
        headers.dst = packet.get(inner + 8)?;
        not_mapped(headers)?;
        headers.l4 = inner as u16 + V6::HEADER as u16;
    }
    if !is_carried(headers.protocol) {
        return Err(Reason::NotService);
    }
    // 8 bytes of the transport header are quoted at least.
    let quoted = offset(headers.l4);
    let [sport, dport] = packet.get::<[u16; 2]>(quoted)?;
    packet.get::<u16>(quoted + 6)?;
    headers.sport = dport;
    headers.dport = sport;
    headers.flags = 0;
    headers.icmp = at as u16;
    headers.quoted = inner as u16;
    Ok(())
}
