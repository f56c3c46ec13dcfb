//! Packets, made by etherparse: its headers and its checksums. SCTP's is the crate crc32c's.
use std::net::IpAddr;
use std::ops::Range;

use etherparse::checksum::Sum16BitWords;
use etherparse::{IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, TcpHeader, UdpHeader};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

/// RFC 9293, 3.1.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// SCTP's chunk types (RFC 9260, 3.2).
pub const DATA: u8 = 0;
pub const INIT: u8 = 1;
pub const INIT_ACK: u8 = 2;
pub const ABORT: u8 = 6;
pub const SHUTDOWN: u8 = 7;

/// Destination and source of the frames that come in.
pub const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0xfe];
pub const LINK: usize = 14;

/// IPv6's extension headers (RFC 8200, 4; RFC 4302).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extension {
    HopByHop,
    Routing,
    Destination,
    Authentication,
    /// A fragment header on a whole datagram (RFC 6946).
    Atomic,
    /// A destination header of this many bytes, a multiple of 8.
    Long(usize),
}

impl Extension {
    pub const fn number(self) -> u8 {
        match self {
            Extension::HopByHop => 0,
            Extension::Routing => 43,
            Extension::Atomic => 44,
            Extension::Authentication => 51,
            Extension::Destination | Extension::Long(_) => 60,
        }
    }

    /// `next`: the number of the header behind.
    pub fn bytes(self, next: u8) -> Vec<u8> {
        match self {
            // Six bytes of padding (PadN).
            Extension::HopByHop | Extension::Destination => vec![next, 0, 1, 4, 0, 0, 0, 0],
            // Of an experimental type (RFC 4727), no segments left.
            Extension::Routing => vec![next, 0, 253, 0, 0, 0, 0, 0],
            Extension::Atomic => vec![next, 0, 0, 0, 0, 0, 0, 7],
            // 24 bytes: 6 words, less 2.
            Extension::Authentication => [&[next, 4, 0, 0][..], &[7; 20]].concat(),
            Extension::Long(length) => [&[next, (length / 8 - 1) as u8][..], &vec![0; length - 2]].concat(),
        }
    }
}

/// A TCP, UDP or SCTP packet. Ports in host byte order.
#[derive(Clone, PartialEq, Debug)]
pub struct Packet {
    pub macs: [u8; 12],
    pub src: IpAddr,
    pub dst: IpAddr,
    pub sport: u16,
    pub dport: u16,
    pub protocol: u8,
    /// TCP's control bits; the type of SCTP's only chunk.
    pub flags: u8,
    pub seq: u32,
    pub ack: u32,
    pub hop_limit: u8,
    pub payload: Vec<u8>,
    /// Of IPv4, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// Of IPv6.
    pub extensions: Vec<Extension>,
    /// Of the datagram.
    pub id: u16,
    /// Only these bytes of the transport segment.
    pub piece: Option<Range<usize>>,
    /// 0 stands in a UDP header without one.
    pub has_checksum: bool,
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The checksum of what has the pseudo header of RFC 9293, 3.1 or RFC 8200, 8.1.
pub(crate) fn with_pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    Sum16BitWords::new()
        .add_slice(&octets(src))
        .add_slice(&octets(dst))
        .add_2bytes([0, protocol])
        .add_2bytes((segment.len() as u16).to_be_bytes())
        .add_slice(segment)
        .ones_complement()
        .to_be()
}

impl Packet {
    pub fn new(protocol: u8, src: IpAddr, sport: u16, dst: IpAddr, dport: u16) -> Self {
        Packet {
            macs: MACS,
            src,
            dst,
            sport,
            dport,
            protocol,
            flags: match protocol {
                TCP => SYN,
                SCTP => INIT,
                _ => 0,
            },
            seq: 9,
            ack: 5,
            hop_limit: 64,
            payload: b"twelve bytes".to_vec(),
            options: Vec::new(),
            extensions: Vec::new(),
            id: 77,
            piece: None,
            has_checksum: true,
        }
    }

    pub fn is_v4(&self) -> bool {
        self.src.is_ipv4()
    }

    /// The same, with control bits or a chunk type of its own.
    pub fn flags(self, flags: u8) -> Self {
        Packet { flags, ..self }
    }

    pub fn hop_limit(self, hop_limit: u8) -> Self {
        Packet { hop_limit, ..self }
    }

    /// The answer to it, as its receiver sends it.
    pub fn reply(&self) -> Self {
        let flags = match self.protocol {
            TCP => SYN | ACK,
            SCTP => INIT_ACK,
            _ => 0,
        };
        Packet {
            flags,
            macs: MACS,
            hop_limit: 64,
            ..Packet::new(self.protocol, self.dst, self.dport, self.src, self.sport)
        }
    }

    /// The transport segment, whole.
    pub fn segment(&self) -> Vec<u8> {
        match self.protocol {
            TCP => self.tcp(),
            UDP => self.udp(),
            _ => self.sctp(),
        }
    }

    fn tcp(&self) -> Vec<u8> {
        let has = |bit: u8| self.flags & bit != 0;
        let mut header = TcpHeader::new(self.sport, self.dport, self.seq, 1024);
        header.acknowledgment_number = self.ack;
        (header.fin, header.syn, header.rst, header.ack) = (has(FIN), has(SYN), has(RST), has(ACK));
        header.psh = has(8);
        header.urg = has(32);
        let checksum = self.by_family(
            |src, dst| header.calc_checksum_ipv4_raw(src, dst, &self.payload),
            |src, dst| header.calc_checksum_ipv6_raw(src, dst, &self.payload),
        );
        header.checksum = checksum.unwrap();
        [&header.to_bytes()[..], &self.payload].concat()
    }

    /// What is to be had of both addresses, which are of one family.
    fn by_family<T>(&self, v4: impl FnOnce([u8; 4], [u8; 4]) -> T, v6: impl FnOnce([u8; 16], [u8; 16]) -> T) -> T {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => v4(src.octets(), dst.octets()),
            (IpAddr::V6(src), IpAddr::V6(dst)) => v6(src.octets(), dst.octets()),
            ends => panic!("two families: {ends:?}"),
        }
    }

    fn udp(&self) -> Vec<u8> {
        let length = (8 + self.payload.len()) as u16;
        let mut header = UdpHeader { source_port: self.sport, destination_port: self.dport, length, checksum: 0 };
        if self.has_checksum {
            let checksum = self.by_family(
                |src, dst| header.calc_checksum_ipv4_raw(src, dst, &self.payload),
                |src, dst| header.calc_checksum_ipv6_raw(src, dst, &self.payload),
            );
            header.checksum = checksum.unwrap();
        }
        [&header.to_bytes()[..], &self.payload].concat()
    }

    /// Ports, a verification tag and one chunk (RFC 9260, 3).
    fn sctp(&self) -> Vec<u8> {
        let mut bytes = [self.sport.to_be_bytes(), self.dport.to_be_bytes()].concat();
        bytes.extend(self.seq.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.flags, 0]);
        bytes.extend((4 + self.payload.len() as u16).to_be_bytes());
        bytes.extend(&self.payload);
        let checksum = crc32c::crc32c(&bytes);
        // The polynomial's bytes go out in the reverse of network order (RFC 9260, appendix A).
        bytes[8..12].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The packet from its network header on.
    pub fn network(&self) -> Vec<u8> {
        let segment = self.segment();
        let range = self.piece.clone().unwrap_or(0..segment.len());
        let more = range.end < segment.len();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let length = range.len() as u16;
                let mut header =
                    Ipv4Header::new(length, self.hop_limit, IpNumber(self.protocol), src.octets(), dst.octets())
                        .unwrap();
                header.identification = self.id;
                header.dont_fragment = self.piece.is_none();
                header.more_fragments = more;
                header.fragment_offset = IpFragOffset::try_new(range.start as u16 / 8).unwrap();
                header.options = Ipv4Options::try_from(&self.options[..]).unwrap();
                header.set_payload_len(range.len()).unwrap();
                header.header_checksum = header.calc_header_checksum();
                [&header.to_bytes()[..], &segment[range]].concat()
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut rest = segment[range.clone()].to_vec();
                let mut next = self.protocol;
                if self.piece.is_some() {
                    let position = range.start as u16 | u16::from(more);
                    let [a, b] = position.to_be_bytes();
                    let [c, d] = self.id.to_be_bytes();
                    rest = [&[next, 0, a, b, 0, 0, c, d][..], &rest].concat();
                    next = 44;
                }
                for extension in self.extensions.iter().rev() {
                    rest = [extension.bytes(next), rest].concat();
                    next = extension.number();
                }
                let header = Ipv6Header {
                    payload_length: rest.len() as u16,
                    next_header: IpNumber(next),
                    hop_limit: self.hop_limit,
                    source: src.octets(),
                    destination: dst.octets(),
                    ..Ipv6Header::default()
                };
                [&header.to_bytes()[..], &rest].concat()
            }
            ends => panic!("two families: {ends:?}"),
        }
    }

    pub fn frame(&self) -> Vec<u8> {
        framed(self.macs, self.is_v4(), &self.network())
    }

    /// Cut in two after `at` bytes of the segment, a multiple of 8.
    pub fn pieces(&self, at: usize) -> [Packet; 2] {
        let length = self.segment().len();
        assert!(at.is_multiple_of(8) && 0 < at && at < length, "{at} of {length}");
        [0..at, at..length].map(|range| Packet { piece: Some(range), ..self.clone() })
    }
}

fn framed(macs: [u8; 12], v4: bool, network: &[u8]) -> Vec<u8> {
    let ethertype: u16 = if v4 { 0x0800 } else { 0x86dd };
    [&macs[..], &ethertype.to_be_bytes(), network].concat()
}

/// An ICMP or ICMPv6 message about a packet (RFC 792; RFC 4443, 3).
#[derive(Clone, PartialEq, Debug)]
pub struct IcmpError {
    pub macs: [u8; 12],
    pub src: IpAddr,
    pub dst: IpAddr,
    pub kind: u8,
    pub code: u8,
    /// The second half of the header's second word; for IPv6 the same place, which is the MTU's lower half.
    pub mtu: u16,
    pub hop_limit: u8,
    /// From the network header on.
    pub quoted: Vec<u8>,
}

impl IcmpError {
    pub fn frame(&self) -> Vec<u8> {
        let mut message = vec![self.kind, self.code, 0, 0, 0, 0];
        message.extend(self.mtu.to_be_bytes());
        message.extend(&self.quoted);
        let checksum = match self.src {
            IpAddr::V4(_) => Sum16BitWords::new().add_slice(&message).ones_complement().to_be(),
            IpAddr::V6(_) => with_pseudo_header(self.src, self.dst, ICMPV6, &message),
        };
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        network_of(self.macs, self.src, self.dst, self.hop_limit, &message)
    }
}

/// A frame whose network packet carries this ICMP message.
pub fn network_of(macs: [u8; 12], src: IpAddr, dst: IpAddr, hop_limit: u8, message: &[u8]) -> Vec<u8> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header =
                Ipv4Header::new(message.len() as u16, hop_limit, IpNumber::ICMP, src.octets(), dst.octets()).unwrap();
            header.header_checksum = header.calc_header_checksum();
            framed(macs, true, &[&header.to_bytes()[..], message].concat())
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let header = Ipv6Header {
                payload_length: message.len() as u16,
                next_header: IpNumber::IPV6_ICMP,
                hop_limit,
                source: src.octets(),
                destination: dst.octets(),
                ..Ipv6Header::default()
            };
            framed(macs, false, &[&header.to_bytes()[..], message].concat())
        }
        ends => panic!("two families: {ends:?}"),
    }
}
