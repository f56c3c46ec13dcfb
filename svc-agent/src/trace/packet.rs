//! The first packet of a connection, and what has become of it.
use std::net::{IpAddr, SocketAddr};

use anyhow::Context as _;
use etherparse::{IpHeaders, IpNumber, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TransportSlice};
use serde::Serialize;

use crate::object::Protocol;

/// As a host sends it that has not been through a router.
const HOP_LIMIT: u8 = 64;
/// Of Ethernet; nobody looks at them here.
const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1]);
/// RFC 9260, 3.3.2, behind the common header: one chunk INIT of 20 bytes.
const SCTP_INIT: [u8; 20] = [1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1];

/// Where a packet comes from and where it goes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Ends {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// The frame that opens a connection. Both ends are of one family.
///
/// # Errors
/// Where they are not.
pub fn first(protocol: Protocol, ends: Ends) -> anyhow::Result<Vec<u8>> {
    let link = PacketBuilder::ethernet2(MACS.0, MACS.1);
    let step: PacketBuilderStep<IpHeaders> = match (ends.source.ip(), ends.destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => link.ipv4(source.octets(), destination.octets(), HOP_LIMIT),
        (IpAddr::V6(source), IpAddr::V6(destination)) => link.ipv6(source.octets(), destination.octets(), HOP_LIMIT),
        _ => anyhow::bail!("{} and {} are not of one family", ends.source.ip(), ends.destination.ip()),
    };
    let (sport, dport) = (ends.source.port(), ends.destination.port());
    let mut frame = Vec::new();
    match protocol {
        Protocol::Tcp => step.tcp(sport, dport, 1, 64_240).syn().write(&mut frame, &[]),
        Protocol::Udp => step.udp(sport, dport).write(&mut frame, b"svc-agent trace"),
        Protocol::Sctp => {
            let mut segment = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
            // Its checksum is patched by differences, so that any will do.
            segment.extend([0; 8]);
            segment.extend(SCTP_INIT);
            step.write(&mut frame, IpNumber::SCTP, &segment)
        }
    }
    .context("making a packet")?;
    Ok(frame)
}

/// The ends that the frame has now, where it still is of a protocol with ports.
pub fn ends(frame: &[u8]) -> Option<Ends> {
    let sliced = SlicedPacket::from_ethernet(frame).ok()?;
    let (source, destination, payload) = match sliced.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            (IpAddr::from(ip.header().source_addr()), IpAddr::from(ip.header().destination_addr()), ip.payload())
        }
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into(), ip.payload()),
        NetSlice::Arp(_) => return None,
    };
    let is_icmp = matches!(sliced.transport, Some(TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_)));
    let port = |at: usize| Some(u16::from_be_bytes(payload.payload.get(at..at + 2)?.try_into().ok()?));
    if is_icmp {
        return None;
    }
    Some(Ends { source: SocketAddr::new(source, port(0)?), destination: SocketAddr::new(destination, port(2)?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    fn what_was_made_is_read_back(
        #[values(Protocol::Tcp, Protocol::Udp, Protocol::Sctp)] protocol: Protocol,
        #[values(("192.0.2.1:40000", "10.96.0.10:53"), ("[2001:db8::1]:40000", "[fd00::a]:53"))] (from, to): (
            &str,
            &str,
        ),
    ) {
        let wanted = Ends { source: from.parse().unwrap(), destination: to.parse().unwrap() };
        assert_eq!(ends(&first(protocol, wanted).unwrap()), Some(wanted));
    }

    #[test]
    fn two_families_make_no_packet() {
        let ends = Ends { source: "192.0.2.1:1".parse().unwrap(), destination: "[::1]:2".parse().unwrap() };
        assert!(first(Protocol::Tcp, ends).unwrap_err().to_string().contains("not of one family"));
    }
}
