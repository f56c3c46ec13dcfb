//! A packet's addresses, ports and TCP flags.
use svc_common::map::{TCP, UDP};
use svc_common::{Addr, Reason};

use crate::family::{ETHERNET, Family, V4, V6};
use crate::packet::Packet;

/// Ports in network byte order.
#[derive(Clone, Copy, Default, Debug)]
pub struct Headers {
    pub v4: bool,
    pub src: Addr,
    pub dst: Addr,
    pub sport: u16,
    pub dport: u16,
    pub protocol: u8,
    /// RFC 9293's control bits, `TCP_*`; 0 for UDP.
    pub flags: u8,
}

pub const TCP_FIN: u8 = 1;
pub const TCP_SYN: u8 = 1 << 1;
pub const TCP_RST: u8 = 1 << 2;
pub const TCP_ACK: u8 = 1 << 4;

impl Headers {
    /// The first packet of a TCP connection.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }
}

/// Where the transport checksum stands from the transport header's start.
#[inline(always)]
pub const fn checksum_offset(protocol: u8) -> usize {
    if protocol == TCP { 16 } else { 6 }
}

/// # Errors
/// [`Reason::NotService`] where the packet is none that a Service could have, [`Reason::Truncated`],
/// [`Reason::Unsupported`].
#[inline(always)]
pub fn parse<P: Packet>(packet: &P) -> Result<Headers, Reason> {
    let ethertype: u16 = packet.get(ETHERNET - 2)?;
    if ethertype == V4::ETHERTYPE {
        parse_as::<P, V4>(packet)
    } else if ethertype == V6::ETHERTYPE {
        parse_as::<P, V6>(packet)
    } else {
        Err(Reason::NotService)
    }
}

#[inline(always)]
fn parse_as<P: Packet, F: Family>(packet: &P) -> Result<Headers, Reason> {
    let protocol: u8 = packet.get(F::PROTOCOL)?;
    if protocol != TCP && protocol != UDP {
        return Err(Reason::NotService);
    }
    F::check(packet)?;
    let (src, dst) = F::addresses(packet)?;
    let [sport, dport] = packet.get::<[u16; 2]>(F::L4)?;
    // The whole transport header has to be there before anything is changed.
    let flags = if protocol == TCP {
        packet.get::<u16>(F::L4 + 18)?;
        packet.get(F::L4 + 13)?
    } else {
        packet.get::<u16>(F::L4 + 6)?;
        0
    };
    Ok(Headers { v4: F::IS_V4, src, dst, sport, dport, protocol, flags })
}
