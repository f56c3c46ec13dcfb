//! Connected UDP sockets of a network namespace, listed and ended by netlink (sock_diag(7)).
use std::io;

use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;
use rtnetlink::sys::{Socket, SocketAddr};
use svc_common::Addr;

/// The kernel's own limit for a part of a list (netlink_recvmsg, netlink_dump).
const RECEIVE: usize = 32 * 1024;

/// A UDP socket that is connected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UdpSocket {
    family: u8,
    id: SocketId,
}

impl UdpSocket {
    /// As the kernel part has it (bpf_get_socket_cookie); two words, the lower one first.
    pub fn cookie(&self) -> u64 {
        let [a, b, c, d, e, f, g, h] = self.id.cookie;
        u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32
    }

    /// What it is connected to; the port in network byte order.
    pub fn peer(&self) -> (Addr, u16) {
        (self.id.destination_address.into(), self.id.destination_port.to_be())
    }
}

/// A netlink socket, in the network namespace of the thread that opened it.
pub struct SockDiag {
    socket: Socket,
    buffer: Vec<u8>,
}

impl SockDiag {
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Self> {
        let socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(SockDiag { socket, buffer: Vec::with_capacity(RECEIVE) })
    }

    /// The connected UDP sockets, of both families, that are wanted.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn connected_udp(&mut self, wanted: impl Fn(&UdpSocket) -> bool) -> io::Result<Vec<UdpSocket>> {
        let mut found = Vec::new();
        for (family, id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let request = SockDiagMessage::InetRequest(request(family, id));
            self.socket.send(&encode(request, NLM_F_DUMP), 0)?;
            loop {
                let part = decode(self.receive()?)?;
                found.extend(part.sockets.into_iter().filter(&wanted));
                if part.last {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Ends the socket: its owner gets ECONNABORTED, and may connect it again.
    ///
    /// # Errors
    /// `NotFound` where it is gone or connected to something else, EOPNOTSUPP where the kernel is built without
    /// CONFIG_INET_DIAG_DESTROY, EPERM without CAP_NET_ADMIN in the network namespace.
    pub fn destroy(&mut self, socket: &UdpSocket) -> io::Result<()> {
        let request = SockDiagMessage::InetRequest(request(socket.family, socket.id.clone()));
        self.socket.send(&encode(SockDiagDestroy::new(request), NLM_F_ACK), 0)?;
        decode(self.receive()?).map(drop)
    }

    fn receive(&mut self) -> io::Result<&[u8]> {
        self.buffer.clear();
        self.socket.recv(&mut self.buffer, 0)?;
        Ok(&self.buffer)
    }
}

const fn request(family: u8, socket_id: SocketId) -> InetRequest {
    // A UDP socket has TCP's name for being connected.
    let states = StateFlags::ESTABLISHED;
    InetRequest { family, protocol: IPPROTO_UDP, extensions: ExtensionFlags::empty(), states, socket_id }
}

fn encode<T: NetlinkSerializable + Into<NetlinkPayload<T>>>(message: T, flags: u16) -> Vec<u8> {
    let mut message = NetlinkMessage::new(NetlinkHeader::default(), message.into());
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// One datagram of an answer.
#[derive(Default, PartialEq, Debug)]
struct Part {
    sockets: Vec<UdpSocket>,
    /// Nothing more follows.
    last: bool,
}

/// # Errors
/// What the kernel answered, or that it is no answer.
fn decode(mut bytes: &[u8]) -> io::Result<Part> {
    let mut part = Part::default();
    while !bytes.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(bytes).map_err(io::Error::other)?;
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                part.sockets.push(UdpSocket { family: response.header.family, id: response.header.socket_id });
            }
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            NetlinkPayload::Done(done) if done.code < 0 => return Err(io::Error::from_raw_os_error(-done.code)),
            NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => part.last = true,
            _ => {}
        }
        // Messages start at multiples of four (NLMSG_ALIGN).
        let length = (message.header.length as usize).next_multiple_of(4);
        bytes = bytes.get(length..).unwrap_or_default();
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// inet_diag.h: a message header, inet_diag_msg, and the attribute that every socket has (INET_DIAG_SHUTDOWN).
    fn listed(family: u8, source: [u8; 16], destination: [u8; 16]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(96u32.to_ne_bytes());
        bytes.extend(20u16.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([family, 1, 0, 0]);
        bytes.extend(40_000u16.to_be_bytes());
        bytes.extend(53u16.to_be_bytes());
        bytes.extend(source);
        bytes.extend(destination);
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend(0x89ab_cdefu32.to_ne_bytes());
        bytes.extend(0x0123_4567u32.to_ne_bytes());
        bytes.extend([0; 20]);
        bytes.extend([5u16.to_ne_bytes(), 8u16.to_ne_bytes()].concat());
        bytes.extend([0; 4]);
        bytes
    }

    fn v4(address: [u8; 4]) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&address);
        bytes
    }

    fn mapped(address: [u8; 4]) -> [u8; 16] {
        std::net::Ipv4Addr::from(address).to_ipv6_mapped().octets()
    }

    fn end(kind: u16, code: i32) -> Vec<u8> {
        let mut bytes = 20u32.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(code.to_ne_bytes());
        bytes
    }

    const ERROR: u16 = 2;
    const DONE: u16 = 3;

    #[test]
    fn a_list_is_of_connected_udp_sockets() {
        let bytes = encode(SockDiagMessage::InetRequest(request(AF_INET6, SocketId::new_v6())), NLM_F_DUMP);
        let mut expected = 72u32.to_ne_bytes().to_vec();
        // SOCK_DIAG_BY_FAMILY; NLM_F_REQUEST, NLM_F_ROOT and NLM_F_MATCH.
        expected.extend([20u16.to_ne_bytes(), 0x301u16.to_ne_bytes()].concat());
        expected.extend([0; 8]);
        expected.extend([10, 17, 0, 0]);
        expected.extend((1u32 << 1).to_ne_bytes());
        expected.extend([0; 48]);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn what_is_ended_is_what_was_listed() {
        let message = listed(AF_INET, v4([10, 0, 0, 1]), v4([10, 0, 0, 2]));
        let socket = decode(&message).unwrap().sockets.remove(0);
        let request = SockDiagMessage::InetRequest(request(socket.family, socket.id));
        let bytes = encode(SockDiagDestroy::new(request), NLM_F_ACK);
        // SOCK_DESTROY; NLM_F_REQUEST and NLM_F_ACK.
        assert_eq!(bytes[4..8], [21u16.to_ne_bytes(), 5u16.to_ne_bytes()].concat());
        assert_eq!(bytes[24..72], message[20..68], "inet_diag_sockid");
    }

    #[test]
    fn a_socket_has_its_peer_and_its_cookie() {
        let peer = "10.0.0.2".parse::<std::net::IpAddr>().unwrap().into();
        for message in [
            listed(AF_INET, v4([10, 0, 0, 1]), v4([10, 0, 0, 2])),
            listed(AF_INET6, mapped([10, 0, 0, 1]), mapped([10, 0, 0, 2])),
        ] {
            let part = decode(&message).unwrap();
            assert!(!part.last);
            let [socket] = &part.sockets[..] else { panic!("one socket of {part:?}") };
            assert_eq!(socket.peer(), (peer, 53u16.to_be()));
            assert_eq!(socket.cookie(), 0x0123_4567_89ab_cdef);
        }
    }

    #[test]
    fn a_list_goes_on_until_it_is_done() {
        let socket = listed(AF_INET, v4([10, 0, 0, 1]), v4([10, 0, 0, 2]));
        let part = decode(&[socket.clone(), socket.clone()].concat()).unwrap();
        assert_eq!((part.sockets.len(), part.last), (2, false));
        let part = decode(&[socket, end(DONE, 0)].concat()).unwrap();
        assert_eq!((part.sockets.len(), part.last), (1, true));
    }

    #[test]
    fn the_kernels_errors_are_told() {
        for kind in [ERROR, DONE] {
            assert_eq!(decode(&end(kind, -libc::ENOENT)).unwrap_err().kind(), io::ErrorKind::NotFound);
        }
        assert_eq!(decode(&end(ERROR, 0)).unwrap(), Part { sockets: Vec::new(), last: true });
        let short = &listed(AF_INET, v4([10, 0, 0, 1]), v4([10, 0, 0, 2]))[..40];
        assert!(decode(short).is_err());
    }

    #[test]
    fn a_socket_of_this_process_is_found() {
        let server = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let [connected, other] = [0; 2].map(|_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        connected.connect(server.local_addr().unwrap()).unwrap();
        let port = server.local_addr().unwrap().port().to_be();
        let found = SockDiag::open().unwrap().connected_udp(|socket| socket.peer().1 == port).unwrap();
        let ports: Vec<u16> = found.iter().map(|socket| socket.id.source_port).collect();
        assert_eq!(ports, [connected.local_addr().unwrap().port()]);
        drop(other);
    }
}
