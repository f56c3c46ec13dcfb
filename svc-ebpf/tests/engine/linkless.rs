//! Packets without a link header beside the same ones with one.
use rstest::rstest;
use svc_common::map::{FRONTEND_NODE_PORT, TCP, UDP};
use svc_common::{Addr, Reason};
use svc_ebpf::forward::Hop;
use svc_ebpf::linkless::{Bare, Linkless};
use svc_ebpf::packet::{Packet, Resize};
use svc_ebpf::parse::{Headers, TCP_SYN, parse};
use svc_ebpf::reject::reject;
use svc_ebpf::tables::Tables;

use crate::world::{Frame, World};
use crate::{CLIENT, LOCAL, NODE, REMOTE, node_port};

const LINK_HEADER: usize = 14;

impl Bare for Frame {
    fn ethertype(&self) -> u16 {
        u16::from_ne_bytes([8, 0])
    }

    fn route_bare<T: Tables>(&self, tables: &T, headers: &Headers, dst: &Addr, hop: &mut Hop) -> Result<(), Reason> {
        self.route(tables, headers, dst, hop)
    }
}

impl Resize for Frame {
    fn resize(&mut self, len: u32) -> Result<(), Reason> {
        self.bytes.resize(len as usize, 0);
        Ok(())
    }

    fn set_l4_checksum(&mut self, offset: usize, _: u16, full: u16) -> Result<(), Reason> {
        self.set(offset, full)
    }
}

fn bare(frame: &Frame) -> Linkless<Frame> {
    Linkless(Frame { bytes: frame.bytes[LINK_HEADER..].to_vec(), sockets: 0..0 })
}

#[rstest]
#[case::local_backend(LOCAL, true)]
#[case::remote_backend(REMOTE, false)]
fn a_packet_is_translated_as_behind_a_link_header(#[case] backend: &str, #[case] local: bool) {
    for mut frame in [Frame::tcp(CLIENT, 4000, NODE, 30080, TCP_SYN), Frame::udp(CLIENT, 4000, NODE, 30080)] {
        // What is left to chance is the same in both.
        let [first, second] = [(), ()].map(|()| {
            let mut world = World::default();
            node_port(&mut world, &[(backend, local)], 0);
            world.service(8, "0.0.0.0", 30080, UDP, FRONTEND_NODE_PORT, &[(backend, local)]);
            world
        });
        let mut packet = bare(&frame);
        assert_eq!(second.ingress(&mut packet), first.ingress(&mut frame));
        assert_eq!(packet.0.bytes, frame.bytes[LINK_HEADER..]);
        assert_eq!(frame.endpoints().2, backend);

        let (src, sport, dst, dport) = frame.endpoints();
        let mut reply = if frame.bytes[23] == TCP {
            Frame::tcp(&dst, dport, &src, sport, TCP_SYN)
        } else {
            Frame::udp(&dst, dport, &src, sport)
        };
        let mut packet = bare(&reply);
        if local {
            assert_eq!(second.egress(&mut packet), first.egress(&mut reply));
        } else {
            assert_eq!(second.ingress(&mut packet), first.ingress(&mut reply));
        }
        assert_eq!(packet.0.bytes, reply.bytes[LINK_HEADER..]);
        assert_eq!(reply.endpoints(), (NODE.into(), 30080, CLIENT.into(), 4000));
    }
}

#[rstest]
#[case::reset(Frame::tcp(CLIENT, 4000, NODE, 30080, TCP_SYN), Reason::NoBackend)]
#[case::unreachable(Frame::udp(CLIENT, 4000, NODE, 30080), Reason::NoBackend)]
#[case::too_big(Frame::tcp(CLIENT, 4000, NODE, 30080, TCP_SYN), Reason::TooBig)]
fn a_refusal_is_the_one_behind_a_link_header(#[case] mut frame: Frame, #[case] reason: Reason) {
    let hop = Hop { mtu: 1300, ..Hop::default() };
    let mut headers = Headers::default();
    let mut packet = bare(&frame);
    parse(&packet, &World::default(), &mut headers).unwrap();
    reject(&mut packet, &headers, &hop, reason).unwrap();
    reject(&mut frame, &headers, &hop, reason).unwrap();
    assert_eq!(packet.0.bytes, frame.bytes[LINK_HEADER..]);
}

#[test]
fn a_packet_that_ends_in_its_headers_is_truncated() {
    let mut packet = bare(&Frame::tcp(CLIENT, 4000, NODE, 30080, TCP_SYN));
    packet.0.bytes.truncate(30);
    assert_eq!(parse(&packet, &World::default(), &mut Headers::default()), Err(Reason::Truncated));
}
