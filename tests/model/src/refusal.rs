//! Why a packet goes no further, or goes on as it came (docs/dataplane.md); and what its sender is told.
use std::net::IpAddr;

use etherparse::{IpNumber, Ipv4Header, Ipv6Header, TcpHeader};
use svc_dataplane::packet::{ICMP, ICMPV6, LINK, TCP};

use crate::seen::{Piece, Seen};
use crate::translate::{inverted_sum, pseudo_header};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Why {
    NotService,
    NoBackend,
    UnknownPort,
    NoLocalBackend,
    SourceRange,
    UnallocatedAddress,
    RejectLimited,
    FlowTableFull,
    NoSourcePort,
    NoRoute,
    HopLimit,
    /// What the next link takes.
    TooBig(u16),
    Truncated,
    Unsupported,
    FragmentUnknown,
    FragmentKept,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    PassedOn,
    Dropped,
    /// Dropped, and its sender is told.
    Rejected,
}

impl Why {
    /// Its counter, if there is one.
    pub(crate) fn label(self) -> Option<&'static str> {
        Some(match self {
            Why::NotService => return None,
            Why::NoBackend => "no_backend",
            Why::UnknownPort => "unknown_port",
            Why::NoLocalBackend => "no_local_backend",
            Why::SourceRange => "source_range",
            Why::UnallocatedAddress => "unallocated_address",
            Why::RejectLimited => "reject_limited",
            Why::FlowTableFull => "flow_table_full",
            Why::NoSourcePort => "no_source_port",
            Why::NoRoute => "no_route",
            Why::HopLimit => "hop_limit",
            Why::TooBig(_) => "too_big",
            Why::Truncated => "truncated",
            Why::Unsupported => "unsupported",
            Why::FragmentUnknown => "fragment_unknown",
            Why::FragmentKept => "fragment_kept",
        })
    }

    pub(crate) fn fate(self) -> Fate {
        match self {
            Why::NotService | Why::Truncated | Why::Unsupported | Why::FragmentUnknown => Fate::PassedOn,
            Why::NoBackend | Why::UnknownPort | Why::HopLimit | Why::TooBig(_) => Fate::Rejected,
            _ => Fate::Dropped,
        }
    }
}

/// What a rejected packet's sender gets; `None` where no answer is due. `actual`: what was sent, of which one field is taken:
/// ICMPv6's unused one, in which the pseudo header's sum may stand for the next network card.
pub(crate) fn answer(frame: &[u8], seen: &Seen, why: Why, actual: &[u8]) -> Option<Vec<u8>> {
    if seen.quoted.is_some() || seen.piece == Piece::Later || seen.has_more_headers {
        return None;
    }
    let v4 = seen.is_v4();
    let (kind, code, mtu) = match why {
        Why::TooBig(mtu) => {
            if v4 {
                (3, 4, mtu)
            } else {
                (2, 0, mtu)
            }
        }
        Why::HopLimit => {
            if v4 {
                (11, 0, 0)
            } else {
                (3, 0, 0)
            }
        }
        _ if seen.protocol == TCP => {
            return (!seen.flags.rst).then(|| turned(frame, seen, TCP, &reset(frame, seen)));
        }
        _ => {
            if v4 {
                (3, 3, 0)
            } else {
                (1, 4, 0)
            }
        }
    };
    let unused = match actual.get(LINK + 46..LINK + 48) {
        Some(&[a, b]) if !v4 && mtu == 0 => [a, b],
        _ => mtu.to_be_bytes(),
    };
    let quoted = &frame[LINK..seen.l4 + 8];
    let mut message = [&[kind, code, 0, 0, 0, 0][..], &unused, quoted].concat();
    let protocol = if v4 { ICMP } else { ICMPV6 };
    let pseudo = if v4 { Vec::new() } else { pseudo_header(seen.dst, seen.src, protocol, message.len()) };
    let checksum = inverted_sum(&[&pseudo, &message]);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    Some(turned(frame, seen, protocol, &message))
}

/// RFC 9293, 3.5.2: what makes the sender of this segment believe.
fn reset(frame: &[u8], seen: &Seen) -> Vec<u8> {
    let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().expect("4 bytes"));
    let half = |at: usize| u32::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    let segment = if seen.is_v4() { half(LINK + 2).wrapping_sub(20) } else { half(LINK + 4) };
    let header = u32::from(frame[seen.l4 + 12] >> 4) * 4;
    let payload = segment.wrapping_sub(header);
    let mut tcp = TcpHeader::new(seen.ends.dport, seen.ends.sport, 0, 0);
    tcp.rst = true;
    if seen.flags.ack {
        tcp.sequence_number = word(seen.l4 + 8);
    } else {
        let counted = u32::from(seen.flags.syn) + u32::from(seen.flags.fin);
        tcp.ack = true;
        tcp.acknowledgment_number = word(seen.l4 + 4).wrapping_add(payload).wrapping_add(counted);
    }
    let bytes = tcp.to_bytes();
    tcp.checksum = inverted_sum(&[&pseudo_header(seen.dst, seen.src, TCP, bytes.len()), &bytes]);
    tcp.to_bytes().to_vec()
}

/// Back by the link that it came from.
fn turned(frame: &[u8], seen: &Seen, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let network = match (seen.dst, seen.src) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let length = payload.len() as u16;
            let mut header =
                Ipv4Header::new(length, 64, IpNumber(protocol), src.octets(), dst.octets()).expect("a short packet");
            (header.identification, header.dont_fragment) = (0, true);
            header.header_checksum = header.calc_header_checksum();
            header.to_bytes().to_vec()
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let header = Ipv6Header {
                payload_length: payload.len() as u16,
                next_header: IpNumber(protocol),
                hop_limit: 64,
                source: src.octets(),
                destination: dst.octets(),
                ..Ipv6Header::default()
            };
            header.to_bytes().to_vec()
        }
        ends => panic!("two families: {ends:?}"),
    };
    [&frame[6..12], &frame[..6], &frame[12..14], &network, payload].concat()
}
