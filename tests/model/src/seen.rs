//! What a frame says, as far as the rules look at it.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use svc_dataplane::check::Ends;
use svc_dataplane::packet::{ABORT, ACK, FIN, ICMP, ICMPV6, INIT, LINK, RST, SCTP, SHUTDOWN, SYN, TCP, UDP};

use crate::refusal::Why;

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Flags {
    pub(crate) syn: bool,
    pub(crate) ack: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Piece {
    Whole,
    First,
    /// Without a transport header.
    Later,
}

/// Of an ICMP error: the packet that it is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Quoted {
    /// Where its network header starts.
    pub(crate) at: usize,
    /// Where its transport header starts.
    pub(crate) l4: usize,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Seen {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) hop_limit: u8,
    /// Whose flow it belongs to: of an ICMP error, the quoted packet's.
    pub(crate) protocol: u8,
    /// As it belongs to a flow: of an ICMP error, as if the quoted packet came back. The ports of later pieces are not here.
    pub(crate) ends: Ends,
    pub(crate) piece: Piece,
    /// Of a datagram in pieces.
    pub(crate) id: u32,
    /// Where the transport header starts.
    pub(crate) l4: usize,
    /// There are IPv4 options or IPv6 extension headers.
    pub(crate) has_more_headers: bool,
    pub(crate) flags: Flags,
    pub(crate) quoted: Option<Quoted>,
}

impl Seen {
    pub(crate) fn is_v4(&self) -> bool {
        self.src.is_ipv4()
    }

    /// The first packet of a connection that has a handshake.
    pub(crate) fn is_syn(&self) -> bool {
        self.flags.syn && !self.flags.ack
    }

    /// Done in front of the stack; all else is left to it.
    pub(crate) fn is_plain(&self) -> bool {
        !self.has_more_headers && self.piece == Piece::Whole && self.quoted.is_none()
    }
}

/// Headers that end behind this byte of the frame are not followed.
const FURTHEST: usize = 511;
/// Nor are more extension headers than this.
const EXTENSIONS: usize = 5;

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn need(&self, end: usize) -> Result<(), Why> {
        if self.0.len() < end { Err(Why::Truncated) } else { Ok(()) }
    }

    fn u8(&self, at: usize) -> Result<u8, Why> {
        self.0.get(at).copied().ok_or(Why::Truncated)
    }

    fn u16(&self, at: usize) -> Result<u16, Why> {
        self.need(at + 2)?;
        Ok(u16::from_be_bytes([self.0[at], self.0[at + 1]]))
    }

    fn u32(&self, at: usize) -> Result<u32, Why> {
        Ok(u32::from(self.u16(at)?) << 16 | u32::from(self.u16(at + 2)?))
    }

    fn v4(&self, at: usize) -> Result<IpAddr, Why> {
        Ok(Ipv4Addr::from_bits(self.u32(at)?).into())
    }

    fn v6(&self, at: usize) -> Result<Ipv6Addr, Why> {
        self.need(at + 16)?;
        let octets: [u8; 16] = self.0[at..at + 16].try_into().expect("16 bytes");
        Ok(octets.into())
    }
}

fn is_carried(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP)
}

/// # Errors
/// [`Why::NotService`], [`Why::Truncated`], [`Why::Unsupported`].
pub(crate) fn read(frame: &[u8]) -> Result<Seen, Why> {
    let bytes = Bytes(frame);
    match bytes.u16(12)? {
        0x0800 => read_v4(&bytes),
        0x86dd => read_v6(&bytes),
        _ => Err(Why::NotService),
    }
}

fn ends(src: IpAddr, dst: IpAddr) -> Ends {
    Ends { src, sport: 0, dst, dport: 0 }
}

fn read_v4(bytes: &Bytes<'_>) -> Result<Seen, Why> {
    let protocol = bytes.u8(LINK + 9)?;
    if !is_carried(protocol) && protocol != ICMP {
        return Err(Why::NotService);
    }
    let (src, dst) = (bytes.v4(LINK + 12)?, bytes.v4(LINK + 16)?);
    let version_and_length = bytes.u8(LINK)?;
    let header = usize::from(version_and_length & 15) * 4;
    if version_and_length >> 4 != 4 || header < 20 {
        return Err(Why::Unsupported);
    }
    let fragment = bytes.u16(LINK + 6)?;
    let (more, position) = (fragment & 0x2000 != 0, fragment & 0x1fff);
    let seen = Seen {
        src,
        dst,
        hop_limit: bytes.u8(LINK + 8)?,
        protocol,
        ends: ends(src, dst),
        piece: piece(more, position),
        id: u32::from(bytes.u16(LINK + 4)?),
        l4: LINK + header,
        has_more_headers: header != 20,
        flags: Flags::default(),
        quoted: None,
    };
    read_rest(bytes, seen)
}

fn piece(more: bool, position: u16) -> Piece {
    match (more, position) {
        (false, 0) => Piece::Whole,
        (true, 0) => Piece::First,
        _ => Piece::Later,
    }
}

fn read_v6(bytes: &Bytes<'_>) -> Result<Seen, Why> {
    let mut protocol = bytes.u8(LINK + 6)?;
    let (src, dst) = (bytes.v6(LINK + 8)?, bytes.v6(LINK + 24)?);
    let (mut l4, mut id, mut part) = (LINK + 40, 0, Piece::Whole);
    for _ in 0..EXTENSIONS {
        let length = match protocol {
            0 | 43 | 60 => (usize::from(bytes.u8(l4 + 1)?) + 1) * 8,
            51 => (usize::from(bytes.u8(l4 + 1)?) + 2) * 4,
            44 => {
                let position = bytes.u16(l4 + 2)?;
                part = piece(position & 1 != 0, position >> 3);
                8
            }
            _ => break,
        };
        protocol = bytes.u8(l4)?;
        l4 += length;
        if l4 > FURTHEST {
            return Err(Why::Unsupported);
        }
        if part != Piece::Whole {
            id = bytes.u32(l4 - 4)?;
            break;
        }
    }
    let (src, dst) = (IpAddr::from(src), IpAddr::from(dst));
    let seen = Seen {
        src,
        dst,
        hop_limit: bytes.u8(LINK + 7)?,
        protocol,
        ends: ends(src, dst),
        piece: part,
        id,
        l4,
        has_more_headers: l4 != LINK + 40,
        flags: Flags::default(),
        quoted: None,
    };
    read_rest(bytes, seen)
}

fn read_rest(bytes: &Bytes<'_>, seen: Seen) -> Result<Seen, Why> {
    let icmp = if seen.is_v4() { ICMP } else { ICMPV6 };
    if seen.protocol == icmp && seen.piece == Piece::Whole {
        return read_error(bytes, &seen);
    }
    if !is_carried(seen.protocol) {
        return Err(Why::NotService);
    }
    if seen.piece == Piece::Later {
        return Ok(seen);
    }
    let l4 = seen.l4;
    let (sport, dport) = (bytes.u16(l4)?, bytes.u16(l4 + 2)?);
    let flags = match seen.protocol {
        TCP => {
            bytes.need(l4 + 20)?;
            let bits = bytes.u8(l4 + 13)?;
            let has = |bit: u8| bits & bit != 0;
            Flags { syn: has(SYN), ack: has(ACK), fin: has(FIN), rst: has(RST) }
        }
        UDP => {
            bytes.need(l4 + 8)?;
            Flags::default()
        }
        // The first chunk's type.
        _ => match bytes.u8(l4 + 12)? {
            INIT => Flags { syn: true, ..Flags::default() },
            ABORT => Flags { ack: true, rst: true, ..Flags::default() },
            // SHUTDOWN ACK and SHUTDOWN COMPLETE.
            SHUTDOWN | 8 | 14 => Flags { ack: true, fin: true, ..Flags::default() },
            _ => Flags { ack: true, ..Flags::default() },
        },
    };
    Ok(Seen { ends: Ends { sport, dport, ..seen.ends }, flags, ..seen })
}

/// An error that quotes a packet's first piece, up to its ports.
fn read_error(bytes: &Bytes<'_>, seen: &Seen) -> Result<Seen, Why> {
    let kind = bytes.u8(seen.l4)?;
    let is_error = if seen.is_v4() { matches!(kind, 3 | 4 | 11 | 12) } else { kind < 128 };
    if !is_error {
        return Err(Why::NotService);
    }
    let at = seen.l4 + 8;
    let (protocol, src, dst, l4): (u8, IpAddr, IpAddr, usize) = if seen.is_v4() {
        let version_and_length = bytes.u8(at)?;
        let header = usize::from(version_and_length & 15) * 4;
        if version_and_length >> 4 != 4 || header < 20 || bytes.u16(at + 6)? & 0x1fff != 0 {
            return Err(Why::NotService);
        }
        (bytes.u8(at + 9)?, bytes.v4(at + 12)?, bytes.v4(at + 16)?, at + header)
    } else {
        if at + 40 > FURTHEST {
            return Err(Why::Unsupported);
        }
        (bytes.u8(at + 6)?, bytes.v6(at + 8)?.into(), bytes.v6(at + 24)?.into(), at + 40)
    };
    if !is_carried(protocol) {
        return Err(Why::NotService);
    }
    bytes.need(l4 + 8)?;
    let ends = Ends { src: dst, sport: bytes.u16(l4 + 2)?, dst: src, dport: bytes.u16(l4)? };
    Ok(Seen { protocol, ends, quoted: Some(Quoted { at, l4 }), ..seen.clone() })
}
