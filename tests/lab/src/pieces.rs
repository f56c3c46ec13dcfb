//! A UDP datagram that is sent in pieces, in any order (RFC 791, RFC 8200 4.5), as a network may deliver it.
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};
use svc_common::checksum;

use crate::topology::{self, Lab};

const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
/// Of the transport bytes, all pieces but the last: a multiple of 8, as offsets count.
const PIECE: usize = 1000;

/// Sends `payload` from one host's address to `target`, its pieces in this order, and gives what is answered.
///
/// # Errors
/// Where it cannot be sent, and where nothing comes back within a second.
pub fn exchange(lab: &Lab, host: &str, target: SocketAddr, payload: &[u8], order: &[usize]) -> Result<Vec<u8>> {
    let own = topology::addresses(host)?.into_iter().find(|own| own.is_ipv4() == target.is_ipv4());
    let own = own.context("the host has no address of this family")?;
    lab.namespace(host)?.inside(|| {
        let socket = UdpSocket::bind(SocketAddr::new(own, 0))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let raw = Socket::new(Domain::for_address(target), Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        let from = socket.local_addr()?;
        let datagram = datagram(from, target, payload);
        let pieces: Vec<&[u8]> = datagram.chunks(PIECE).collect();
        for index in order {
            let more = index + 1 < pieces.len();
            let packet = packet(from, target.ip(), pieces[*index], index * PIECE, more);
            // A raw socket has no ports (raw(7), and IPv6's wants none).
            raw.send_to(&packet, &SocketAddr::new(target.ip(), 0).into()).context("cannot send a piece")?;
        }
        let mut answer = vec![0; 65_536];
        let (length, from) = socket.recv_from(&mut answer).context("no answer")?;
        anyhow::ensure!(from == target, "answered by {from}");
        answer.truncate(length);
        Ok(answer)
    })
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

fn datagram(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let header = [from.port().to_be_bytes(), to.port().to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    let mut datagram = [&header[..], payload].concat();
    let pseudo = [octets(from.ip()), octets(to.ip()), vec![0, UDP], length.to_be_bytes().to_vec()].concat();
    let checksum = match !checksum::fold(checksum::sum(&pseudo) + checksum::sum(&datagram)) {
        0 => 0xffff,
        checksum => checksum,
    };
    datagram[6..8].copy_from_slice(&checksum.to_ne_bytes());
    datagram
}

/// The datagram's identification is the sender's port: no other under way has it.
fn packet(from: SocketAddr, to: IpAddr, piece: &[u8], offset: usize, more: bool) -> Vec<u8> {
    let (from, id) = (from.ip(), from.port().to_be_bytes());
    let headers = if from.is_ipv4() {
        let position = (offset / 8) as u16 | if more { 1 << 13 } else { 0 };
        let length = (20 + piece.len()) as u16;
        // The kernel fills in the checksum (raw(7)).
        [&[0x45, 0][..], &length.to_be_bytes(), &id, &position.to_be_bytes(), &[64, UDP, 0, 0]].concat()
    } else {
        let length = (8 + piece.len()) as u16;
        [&[0x60, 0, 0, 0][..], &length.to_be_bytes(), &[FRAGMENT, 64]].concat()
    };
    let mut packet = [headers, octets(from), octets(to)].concat();
    if from.is_ipv6() {
        let position = offset as u16 | u16::from(more);
        packet.extend([&[UDP, 0][..], &position.to_be_bytes(), &[0, 0], &id].concat());
    }
    packet.extend(piece);
    packet
}
