//! Packets read and judged by etherparse and crc32c.
use std::net::IpAddr;

use etherparse::checksum::Sum16BitWords;
use etherparse::{Ipv4Header, LaxNetSlice, LaxSlicedPacket};

use crate::packet::{ICMP, ICMPV6, SCTP, TCP, UDP, with_pseudo_header};

/// Ports in host byte order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ends {
    pub src: IpAddr,
    pub sport: u16,
    pub dst: IpAddr,
    pub dport: u16,
}

/// What a frame holds.
#[derive(Clone, PartialEq, Debug)]
pub struct View<'a> {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub hop_limit: u8,
    /// Behind all extension headers.
    pub protocol: u8,
    pub is_fragment: bool,
    /// Behind the network header and its extensions, as long as the packet says that it is.
    pub segment: &'a [u8],
}

impl View<'_> {
    /// # Panics
    /// Where there are no ports.
    pub fn ends(&self) -> Ends {
        let port = |at: usize| u16::from_be_bytes([self.segment[at], self.segment[at + 1]]);
        Ends { src: self.src, sport: port(0), dst: self.dst, dport: port(2) }
    }
}

/// # Panics
/// Where the frame is no IP packet.
pub fn view(frame: &[u8]) -> View<'_> {
    let packet = LaxSlicedPacket::from_ethernet(frame).expect("an Ethernet frame");
    match packet.net.expect("an IP packet") {
        LaxNetSlice::Ipv4(packet) => View {
            src: packet.header().source_addr().into(),
            dst: packet.header().destination_addr().into(),
            hop_limit: packet.header().ttl(),
            protocol: packet.payload().ip_number.0,
            is_fragment: packet.payload().fragmented,
            segment: packet.payload().payload,
        },
        LaxNetSlice::Ipv6(packet) => View {
            src: packet.header().source_addr().into(),
            dst: packet.header().destination_addr().into(),
            hop_limit: packet.header().hop_limit(),
            protocol: packet.payload().ip_number.0,
            is_fragment: packet.payload().fragmented,
            segment: packet.payload().payload,
        },
        other => panic!("neither IPv4 nor IPv6: {other:?}"),
    }
}

/// Whether all checksums of the frame are right: the network header's, the transport's, an ICMP message's and those of the
/// packet that it quotes, as far as that is there whole.
///
/// # Errors
/// Which one is wrong.
pub fn checksums(frame: &[u8]) -> Result<(), String> {
    let packet = view(frame);
    if packet.src.is_ipv4() {
        let (header, _) = Ipv4Header::from_slice(&frame[14..]).map_err(|error| error.to_string())?;
        if header.header_checksum != header.calc_header_checksum() {
            return Err(format!("the network header's checksum is {:#06x}", header.header_checksum));
        }
    }
    if packet.is_fragment { Ok(()) } else { segment(&packet) }
}

fn segment(packet: &View<'_>) -> Result<(), String> {
    let View { src, dst, protocol, segment, .. } = *packet;
    let is_right = match protocol {
        UDP if segment.len() >= 8 && segment[6..8] == [0, 0] => src.is_ipv4(),
        TCP | UDP | ICMPV6 => with_pseudo_header(src, dst, protocol, segment) == 0,
        ICMP => Sum16BitWords::new().add_slice(segment).ones_complement() == 0,
        SCTP => {
            let zeroed = [&segment[..8], &[0; 4], &segment[12..]].concat();
            crc32c::crc32c(&zeroed).to_le_bytes() == segment[8..12]
        }
        _ => true,
    };
    if !is_right {
        return Err(format!("the checksum of protocol {protocol} is wrong"));
    }
    let is_error = match protocol {
        ICMP => matches!(segment[0], 3 | 4 | 11 | 12),
        ICMPV6 => segment[0] < 128,
        _ => false,
    };
    if is_error { quoted(src.is_ipv4(), &segment[8..]) } else { Ok(()) }
}

fn quoted(v4: bool, packet: &[u8]) -> Result<(), String> {
    if v4 {
        let (header, _) = Ipv4Header::from_slice(packet).map_err(|error| error.to_string())?;
        if header.header_checksum != header.calc_header_checksum() {
            return Err("the quoted network header's checksum is wrong".to_owned());
        }
    }
    let ethertype: [u8; 2] = if v4 { [8, 0] } else { [0x86, 0xdd] };
    let frame = [&[0; 12][..], &ethertype, packet].concat();
    let inner = view(&frame);
    let whole = inner.protocol == UDP
        && inner.segment.len() >= 8
        && inner.segment.len() == usize::from(u16::from_be_bytes([inner.segment[4], inner.segment[5]]));
    if whole && !inner.is_fragment { segment(&inner).map_err(|error| format!("quoted: {error}")) } else { Ok(()) }
}
