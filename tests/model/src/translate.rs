//! Other addresses and ports for a packet, and all its checksums computed anew.
use std::net::IpAddr;
use std::ops::Range;

use svc_dataplane::check::Ends;
use svc_dataplane::packet::{ICMPV6, LINK, SCTP, TCP, UDP};

use crate::seen::{Piece, Seen};

/// What came of it.
pub(crate) struct Translated {
    pub(crate) frame: Vec<u8>,
    /// Checksums that were wrong before, and are wrong by as much now: in these 0 and 0xffff mean the same.
    pub(crate) wrong: Vec<usize>,
    /// What nobody can tell: SCTP's checksum, where the packet says that it ends before its chunks begin.
    pub(crate) anything: Range<usize>,
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// RFC 9293, 3.1; RFC 8200, 8.1.
pub(crate) fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    [octets(src), octets(dst), vec![0, protocol], (length as u16).to_be_bytes().to_vec()].concat()
}

/// The one's-complement sum; each part but the last has an even number of bytes.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut total: u64 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            total += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// The checksum of what has zeros in the checksum's place.
pub(crate) fn inverted_sum(parts: &[&[u8]]) -> u16 {
    !sum(parts)
}

impl Translated {
    fn set_address(&mut self, at: usize, address: IpAddr) {
        let bytes = octets(address);
        self.frame[at..at + bytes.len()].copy_from_slice(&bytes);
    }

    fn set_port(&mut self, at: usize, port: u16) {
        self.frame[at..at + 2].copy_from_slice(&port.to_be_bytes());
    }

    /// Of the network header that starts at `at`, whose length is in its first byte for IPv4.
    fn set_addresses(&mut self, at: usize, src: IpAddr, dst: IpAddr) {
        let (first, second) = if src.is_ipv4() { (at + 12, at + 16) } else { (at + 8, at + 24) };
        self.set_address(first, src);
        self.set_address(second, dst);
    }

    /// Writes the checksum at `field` over `now`, which is `before` as it is now. A wrong one is as wrong as before.
    fn sum_anew(&mut self, field: usize, before: u16, now: impl Fn(&[u8]) -> u16) {
        self.frame[field..field + 2].fill(0);
        let rest = now(&self.frame);
        let checksum = if before == 0xffff {
            !rest
        } else {
            self.wrong.push(field);
            sum(&[&before.to_be_bytes(), &(!rest).to_be_bytes()])
        };
        self.frame[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }

    /// IPv4's own checksum, of the header at `at`.
    fn sum_header_anew(&mut self, at: usize, before: &[u8]) {
        let range = at..at + usize::from(before[at] & 15) * 4;
        let old = sum(&[&before[range.clone()]]);
        self.sum_anew(at + 10, old, |frame| sum(&[&frame[range.clone()]]));
    }
}

/// Where the packet says that it ends.
fn said_end(frame: &[u8], seen: &Seen) -> usize {
    let field = |at: usize| usize::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    if seen.is_v4() { LINK + field(LINK + 2) } else { LINK + 40 + field(LINK + 4) }
}

/// Where its transport segment ends: as the packet says, if that can be.
fn end_of_segment(frame: &[u8], seen: &Seen) -> usize {
    let said = said_end(frame, seen);
    let least = match (seen.quoted, seen.protocol) {
        (Some(quoted), _) => quoted.l4 + 8,
        (None, TCP) => seen.l4 + 20,
        (None, UDP) => seen.l4 + 8,
        (None, _) => seen.l4 + 12,
    };
    if said >= least && said <= frame.len() { said } else { frame.len() }
}

/// The packet with the ends `to` instead of its own; of an ICMP error it is the quoted packet that gets them, the other way
/// round, and the error goes where that came from (RFC 5508, 4.2).
pub(crate) fn translate(frame: &[u8], seen: &Seen, to: Ends) -> Translated {
    let mut new = Translated { frame: frame.to_vec(), wrong: Vec::new(), anything: 0..0 };
    match seen.quoted {
        None => translate_packet(&mut new, frame, seen, to),
        Some(_) => translate_error(&mut new, frame, seen, to),
    }
    new
}

fn translate_packet(new: &mut Translated, before: &[u8], seen: &Seen, to: Ends) {
    new.set_addresses(LINK, to.src, to.dst);
    if seen.is_v4() {
        new.sum_header_anew(LINK, before);
    }
    if seen.piece == Piece::Later {
        return;
    }
    let (l4, end) = (seen.l4, end_of_segment(before, seen));
    new.set_port(l4, to.sport);
    new.set_port(l4 + 2, to.dport);
    if seen.protocol == SCTP {
        return sctp_anew(new, before, seen, end);
    }
    let field = l4 + if seen.protocol == UDP { 6 } else { 16 };
    if seen.protocol == UDP && before[field..field + 2] == [0, 0] {
        return;
    }
    let pseudo = |src, dst| pseudo_header(src, dst, seen.protocol, end - l4);
    let old = sum(&[&pseudo(seen.src, seen.dst), &before[l4..end]]);
    new.sum_anew(field, old, |frame| sum(&[&pseudo(to.src, to.dst), &frame[l4..end]]));
    if seen.protocol == UDP && new.frame[field..field + 2] == [0, 0] {
        new.frame[field..field + 2].fill(0xff);
    }
}

/// CRC32c over the segment, with zeros in the checksum's place (RFC 9260, 6.8). Where not all of the segment is there, the rest
/// may be anything, since the same is on both sides.
fn sctp_anew(new: &mut Translated, before: &[u8], seen: &Seen, end: usize) {
    let l4 = seen.l4;
    let said = said_end(before, seen);
    if said < l4 + 12 {
        new.anything = l4 + 8..l4 + 12;
        return;
    }
    let missing = vec![0; said.saturating_sub(end)];
    let crc = |frame: &[u8]| crc32c::crc32c(&[&frame[l4..l4 + 8], &[0; 4], &frame[l4 + 12..end], &missing].concat());
    let wrong = u32::from_le_bytes(before[l4 + 8..l4 + 12].try_into().expect("4 bytes")) ^ crc(before);
    let checksum = crc(&new.frame) ^ wrong;
    new.frame[l4 + 8..l4 + 12].copy_from_slice(&checksum.to_le_bytes());
}

fn translate_error(new: &mut Translated, before: &[u8], seen: &Seen, to: Ends) {
    let quoted = seen.quoted.expect("an error");
    let end = end_of_segment(before, seen);
    // What is quoted went the other way.
    new.set_addresses(quoted.at, to.dst, to.src);
    if seen.is_v4() {
        new.sum_header_anew(quoted.at, before);
    }
    new.set_port(quoted.l4, to.dport);
    new.set_port(quoted.l4 + 2, to.sport);
    // Only UDP's checksum stands in the 8 bytes that are always quoted.
    let field = quoted.l4 + 6;
    if seen.protocol == UDP && before[field..field + 2] != [0, 0] {
        let length = usize::from(u16::from_be_bytes([before[field - 2], before[field - 1]]));
        let pseudo = |src, dst| pseudo_header(src, dst, UDP, length);
        let old = sum(&[&pseudo(seen.ends.dst, seen.ends.src), &before[quoted.l4..]]);
        new.sum_anew(field, old, |frame| sum(&[&pseudo(to.dst, to.src), &frame[quoted.l4..]]));
        if new.frame[field..field + 2] == [0, 0] {
            new.frame[field..field + 2].fill(0xff);
        }
    }
    // Whoever sends the error is hidden where the sender of packets is.
    let src = if to.src == seen.ends.src { seen.src } else { to.src };
    new.set_addresses(LINK, src, to.dst);
    let field = seen.l4 + 2;
    if seen.is_v4() {
        new.sum_header_anew(LINK, before);
        let old = sum(&[&before[seen.l4..end]]);
        new.sum_anew(field, old, |frame| sum(&[&frame[seen.l4..end]]));
    } else {
        let pseudo = |src, dst| pseudo_header(src, dst, ICMPV6, end - seen.l4);
        let old = sum(&[&pseudo(seen.src, seen.dst), &before[seen.l4..end]]);
        new.sum_anew(field, old, |frame| sum(&[&pseudo(src, to.dst), &frame[seen.l4..end]]));
    }
}

/// One hop fewer, as a router does it.
pub(crate) fn hop(new: &mut Translated, v4: bool) {
    let before = new.frame.clone();
    if v4 {
        new.frame[LINK + 8] -= 1;
        new.sum_header_anew(LINK, &before);
    } else {
        new.frame[LINK + 7] -= 1;
    }
}
