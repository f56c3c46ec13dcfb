//! What a generator chooses: Services, connections, and what happens one after the other.
use std::fmt;
use std::net::IpAddr;

use svc_dataplane::Hook;
use svc_dataplane::check::Ends;
use svc_dataplane::packet::{
    ABORT, ACK, DATA, Extension, FIN, INIT, IcmpError, LINK, MACS, Packet, RST, SCTP, SHUTDOWN, SYN, TCP,
};

use crate::words;
use crate::world::World;

#[derive(Clone, Debug)]
pub struct Case {
    pub world: World,
    pub connections: Vec<Connection>,
    pub steps: Vec<Step>,
}

/// Who talks to whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// Where its requests are met first.
    pub hook: Hook,
    pub protocol: u8,
    pub client: IpAddr,
    pub sport: SourcePort,
    pub to: (IpAddr, u16),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourcePort {
    Fixed(u16),
    /// The one that the backend saw of this connection.
    GivenTo(usize),
}

#[derive(Clone, Debug)]
pub enum Step {
    Send {
        connection: usize,
        what: What,
        shape: Shape,
        hook: Option<Hook>,
    },
    /// So many connections more, like this one but for the source port, each of which gets so far.
    Crowd {
        connection: usize,
        count: u16,
        until: Until,
    },
    /// So many requests that more are rejected than may be, if they are. `answered`: each rejection would be an answer.
    Flood {
        connection: usize,
        answered: bool,
    },
    /// The node has these sockets now, and no others: of the connection's protocol and family, at each of some of the ports that
    /// flows may have.
    Sockets {
        connection: usize,
        kind: SocketKind,
        /// Counted from the first one.
        first: u16,
        count: u16,
    },
    Wait {
        seconds: u32,
    },
    /// The Service has these of its backends, a bit each in the order that it had them in at first.
    Backends {
        service: u32,
        present: u8,
    },
    /// The frontend goes, or comes back.
    Toggle {
        frontend: usize,
    },
    /// No packet, or hardly one.
    Bytes {
        hook: Hook,
        bytes: Vec<u8>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketKind {
    /// At this node's address, or any.
    Bound { any: bool },
    /// To the first backend.
    Connected,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    Request,
    /// The backend's answer, to the address that it saw.
    Reply,
    /// The backend's packet from and to the ports of its answer, to another address.
    ToSomebodyElse,
    /// What the backend, or a router on the way, says of a request.
    ErrorAboutRequest,
    /// What the client says of a reply.
    ErrorAboutReply,
    /// A request to the backend itself, from where it has seen one come.
    Direct,
    /// The backend's answer to that.
    ReplyToDirect,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Until {
    Request,
    Reply,
    Handshake,
    Reset,
}

/// How a packet is made. Most have nothing but flags.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Of those that the protocol has, or of the kinds of ICMP errors.
    pub flags: usize,
    pub hop_limit: u8,
    pub payload: usize,
    pub oddity: Oddity,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Oddity {
    None,
    FirstPiece,
    LaterPiece,
    /// IPv4 options in words.
    Options(usize),
    Extensions(Vec<Extension>),
    NoChecksum,
    /// Without this many of its last bytes.
    Cut(usize),
    /// With this many bytes behind its end.
    Padded(usize),
    /// A VLAN's tag in front.
    Tagged,
    /// One byte is another one: how far from the frame's start, and what it is changed by.
    Mutated(usize, u8),
    /// IPv4 addresses as IPv6 writes them (::ffff:0:0/96), in IPv6's header.
    Mapped,
}

impl Oddity {
    /// Whether the packet is such as a sound host sends, with right checksums.
    pub(crate) fn is_sound(&self) -> bool {
        !matches!(self, Oddity::Cut(_) | Oddity::Tagged | Oddity::Mutated(..) | Oddity::Mapped)
    }
}

impl Connection {
    pub(crate) fn request(&self, sport: u16) -> Packet {
        Packet::new(self.protocol, self.client, sport, self.to.0, self.to.1)
    }
}

/// The control bits, or chunks, of a handshake and what follows; a packet that begins a connection has the first.
fn flags(protocol: u8, at: usize, reply: bool) -> u8 {
    match (protocol, reply) {
        (TCP, false) => [SYN, SYN, ACK, ACK, FIN | ACK, RST, 0, SYN | ACK][at % 8],
        (TCP, true) => [SYN | ACK, SYN | ACK, ACK, ACK, FIN | ACK, RST | ACK, RST, ACK][at % 8],
        (SCTP, false) => [INIT, INIT, DATA, DATA, SHUTDOWN, ABORT, 14, DATA][at % 8],
        (SCTP, true) => [2, 2, DATA, DATA, 8, ABORT, DATA, DATA][at % 8],
        _ => 0,
    }
}

/// Where pieces are cut: behind a whole TCP header.
const CUT: usize = 24;

impl Shape {
    /// The frame of this packet.
    pub(crate) fn frame(&self, packet: Packet, reply: bool) -> Vec<u8> {
        let flags = flags(packet.protocol, self.flags, reply);
        let mut packet = Packet {
            hop_limit: self.hop_limit,
            payload: (0..self.payload).map(|at| at as u8).collect(),
            flags,
            ..packet
        };
        let v4 = packet.is_v4();
        match &self.oddity {
            Oddity::FirstPiece | Oddity::LaterPiece => {
                packet.payload.resize(packet.payload.len().max(40), 1);
                let [first, later] = packet.pieces(CUT);
                return if self.oddity == Oddity::FirstPiece { first.frame() } else { later.frame() };
            }
            Oddity::Options(words) if v4 => packet.options = vec![1; words * 4],
            Oddity::Extensions(extensions) if !v4 => packet.extensions.clone_from(extensions),
            Oddity::NoChecksum if v4 => packet.has_checksum = false,
            _ => (),
        }
        self.altered(packet.frame(), v4)
    }

    /// The frame of an ICMP error about this packet.
    pub(crate) fn error(&self, src: IpAddr, about: &Packet) -> Vec<u8> {
        let v4 = about.is_v4();
        let kinds = if v4 { [(3, 4), (3, 1), (11, 0), (12, 0)] } else { [(2, 0), (1, 0), (3, 0), (4, 0)] };
        let (kind, code) = kinds[self.flags % 4];
        let mut about = Packet { payload: vec![3; self.payload.min(1200)], ..about.clone() };
        match &self.oddity {
            Oddity::Options(words) if v4 => about.options = vec![1; words * 4],
            Oddity::NoChecksum if v4 => about.has_checksum = false,
            Oddity::FirstPiece | Oddity::LaterPiece => {
                about.payload.resize(about.payload.len().max(40), 1);
                let [first, later] = about.pieces(CUT);
                about = if self.oddity == Oddity::FirstPiece { first } else { later };
            }
            _ => (),
        }
        let mut quoted = about.network();
        if self.flags >= 4 {
            // 8 bytes of the transport header are the least.
            quoted.truncate(if v4 { 28 + about.options.len() } else { 48 });
        }
        let mtu = if (kind, code) == (3, 4) || kind == 2 && !v4 { 1400 } else { 0 };
        let hop_limit = self.hop_limit;
        let mut frame = IcmpError { macs: MACS, src, dst: about.src, kind, code, mtu, hop_limit, quoted }.frame();
        if let (Oddity::Extensions(extensions), false) = (&self.oddity, v4) {
            frame = with_extensions(&frame, extensions);
        }
        self.altered(frame, v4)
    }

    fn altered(&self, mut frame: Vec<u8>, v4: bool) -> Vec<u8> {
        // A test run takes no packet without a whole network header.
        let least = LINK + if v4 { 20 } else { 40 };
        match self.oddity {
            Oddity::Cut(bytes) => frame.truncate(frame.len().saturating_sub(bytes).max(least)),
            Oddity::Padded(bytes) => frame.resize(frame.len() + bytes, 0xee),
            Oddity::Tagged => drop(frame.splice(12..12, [0x81, 0, 0, 5])),
            Oddity::Mutated(at, change) => {
                let at = at % frame.len();
                frame[at] ^= change;
            }
            Oddity::Mapped if v4 => return mapped(&frame),
            _ => (),
        }
        frame
    }
}

/// The same in front of an ICMPv6 message.
fn with_extensions(frame: &[u8], extensions: &[Extension]) -> Vec<u8> {
    let mut rest = frame[LINK + 40..].to_vec();
    let mut next = frame[LINK + 6];
    for extension in extensions.iter().rev() {
        rest = [extension.bytes(next), rest].concat();
        next = extension.number();
    }
    let mut frame = [&frame[..LINK + 40], &rest].concat();
    frame[LINK + 4..LINK + 6].copy_from_slice(&(rest.len() as u16).to_be_bytes());
    frame[LINK + 6] = next;
    frame
}

fn mapped(frame: &[u8]) -> Vec<u8> {
    let header = usize::from(frame[LINK] & 15) * 4;
    let segment = &frame[LINK + header..];
    let of = |at: usize| [&[0; 10][..], &[0xff; 2], &frame[at..at + 4]].concat();
    let [a, b] = (segment.len() as u16).to_be_bytes();
    let link = [&frame[..12], &[0x86, 0xdd]].concat();
    let fixed = [0x60, 0, 0, 0, a, b, frame[LINK + 9], frame[LINK + 8]];
    [&link[..], &fixed, &of(LINK + 12), &of(LINK + 16), segment].concat()
}

/// `there`: what the backend sees of a request.
pub(crate) fn reply(protocol: u8, there: Ends) -> Packet {
    Packet::new(protocol, there.dst, there.dport, there.src, there.sport)
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings = &self.world.settings;
        let (first, last) = settings.source_ports;
        let flags = [
            (settings.masquerade_all, ", masquerade all"),
            (settings.detect_pods_v4, ", IPv4 pods are told by their range"),
            (settings.detect_pods_v6, ", IPv6 pods are told by their range"),
        ];
        let set: String = flags.iter().filter(|(is_set, _)| *is_set).map(|(_, name)| *name).collect();
        write!(f, "source ports {first} to {last}{set}")?;
        if settings.flow_sets == 1 {
            write!(f, ", a flow table of four cells")?;
        }
        for service in &self.world.services {
            write!(f, "\n{}", words::service(service))?;
        }
        Ok(())
    }
}
