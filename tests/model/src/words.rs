//! Packets and Services in words.
use svc_dataplane::packet::{TCP, UDP};
use svc_dataplane::tables::Service;

use crate::seen::{Piece, read};

/// As many bytes of what has no name are shown.
const LONGEST: usize = 80;

/// What a frame is, on one line.
pub fn frame(frame: &[u8]) -> String {
    let length = frame.len();
    let seen = match read(frame) {
        Ok(seen) => seen,
        Err(why) => return format!("{length} bytes, {why:?}: {:02x?}", &frame[..length.min(LONGEST)]),
    };
    let mut text = format!("{} {}:{} -> ", name(seen.protocol), seen.ends.src, seen.ends.sport);
    text += &format!("{}:{}", seen.ends.dst, seen.ends.dport);
    if seen.quoted.is_some() {
        text = format!("ICMP error {} -> {} about a packet whose reply would be {text}", seen.src, seen.dst);
    }
    let flags = [(seen.flags.syn, "SYN"), (seen.flags.ack, "ACK"), (seen.flags.fin, "FIN"), (seen.flags.rst, "RST")];
    for (_, flag) in flags.iter().filter(|(is_set, _)| *is_set) {
        text += &format!(" {flag}");
    }
    match seen.piece {
        Piece::Whole => (),
        Piece::First => text += &format!(", first piece of datagram {}", seen.id),
        Piece::Later => text += &format!(", later piece of datagram {} (without ports)", seen.id),
    }
    if seen.has_more_headers {
        text += ", with options or extension headers";
    }
    text + &format!(", hop limit {}, {length} bytes", seen.hop_limit)
}

pub(crate) fn service(service: &Service) -> String {
    let protocol = name(service.protocol);
    let Service { id, kind, address, port, .. } = service;
    let mut text = format!("Service {id}: {kind:?} {address}:{port} {protocol} ->");
    for (to, port, local) in &service.backends {
        text += &format!(" {to}:{port}{}", if *local { " (here)" } else { "" });
    }
    if service.backends.is_empty() {
        text += " nothing";
    }
    for (is_set, policy) in [
        (service.internal_local, "internalTrafficPolicy Local"),
        (service.external_local, "externalTrafficPolicy Local"),
    ] {
        if is_set {
            text += &format!(", {policy}");
        }
    }
    if let Some(ranges) = &service.source_ranges {
        let ranges: Vec<_> = ranges.iter().map(|(base, length)| format!("{base}/{length}")).collect();
        text += &format!(", for [{}] only", ranges.join(" "));
    }
    if service.affinity_seconds > 0 {
        text += &format!(", affinity for {} s", service.affinity_seconds);
    }
    text
}

fn name(protocol: u8) -> &'static str {
    match protocol {
        TCP => "TCP",
        UDP => "UDP",
        _ => "SCTP",
    }
}

/// Where two frames differ, a line for each run of bytes.
pub(crate) fn differences(expected: &[u8], got: &[u8]) -> String {
    let mut text = String::new();
    if expected.len() != got.len() {
        text += &format!("\n  {} bytes instead of {}", got.len(), expected.len());
    }
    let differs = |at: usize| expected.get(at) != got.get(at);
    let end = expected.len().min(got.len());
    let mut at = 0;
    while at < end {
        if !differs(at) {
            at += 1;
            continue;
        }
        let start = at;
        while at < end && differs(at) {
            at += 1;
        }
        text += &format!("\n  bytes {start}..{at}: {:02x?} instead of {:02x?}", &got[start..at], &expected[start..at]);
    }
    text
}
