//! Next hops that XDP keeps instead of asking for each packet's way.
use std::process::Command;
use std::time::{Duration, Instant};

use rstest::rstest;
use svc_dataplane::packet::{ACK, Packet, TCP};
use svc_dataplane::tables::Kind::NodePort;
use svc_dataplane::{Hook, Verdict, net};
use svc_tests::kernel::Kernel;

use crate::stage::{Family, HIT, OPENED, V4, V6, assert_not_ours, on, service};

const OLD: u8 = 2;
const NEW: u8 = 0x77;

/// The last byte of the link address of the gateway to the backend.
fn move_gateway(family: Family, last: u8) {
    let gateway = net::route(family.remote()).unwrap().gateway.unwrap();
    let mac = net::neighbour_mac(net::UPLINK, last).map(|byte| format!("{byte:02x}")).join(":");
    let status = Command::new("ip")
        .args(["neighbour", "replace", gateway, "lladdr", &mac, "dev", "eth0", "nud", "permanent"])
        .status()
        .unwrap();
    assert!(status.success());
}

#[track_caller]
fn sent_to(node: &mut Kernel, packet: &Packet) -> u8 {
    let outcome = node.run(Hook::Xdp, &packet.frame());
    assert_eq!(outcome.verdict, Verdict::Redirect, "{:?}", outcome.moved);
    assert!(outcome.moved_only(HIT), "{:?}", outcome.moved);
    outcome.frame[5]
}

/// The gateway is where it was, for whoever comes next.
struct MovedBack(Family);

impl Drop for MovedBack {
    fn drop(&mut self) {
        move_gateway(self.0, OLD);
    }
}

/// A node whose gateway the test moves, and the packets of a flow that is sent on.
fn with_flow<T: Send>(family: Family, test: impl FnOnce(&mut Kernel, &Packet) -> T + Send) -> T {
    let (service, request) = service(NodePort, family, TCP, &[(family.remote(), false)], family.client());
    on(&[service], |node| {
        let _moved_back = MovedBack(family);
        let outcome = node.run(Hook::Xdp, &request.frame());
        assert!(outcome.moved_only(OPENED), "{:?}", outcome.moved);
        test(node, &Packet { flags: ACK, ..request })
    })
}

#[rstest]
fn a_neighbour_that_has_moved_is_followed(#[values(V4, V6)] family: Family) {
    with_flow(family, |node, packet| {
        for (last, before) in [(NEW, OLD), (OLD, NEW)] {
            assert_eq!(sent_to(node, packet), before);
            move_gateway(family, last);
            node.routes_changed();
            assert_eq!(sent_to(node, packet), last);
        }
    });
}

#[rstest]
fn nothing_is_kept_without_a_lease(#[values(V4, V6)] family: Family) {
    with_flow(family, |node, packet| {
        assert_eq!(sent_to(node, packet), OLD);
        node.keep_no_hops();
        for last in [NEW, OLD, NEW] {
            move_gateway(family, last);
            assert_eq!(sent_to(node, packet), last);
        }
    });
}

#[rstest]
fn a_change_that_nobody_tells_of_is_seen_after_a_tick(#[values(V4, V6)] family: Family) {
    const TICK: Duration = Duration::from_nanos(1 << 27);
    with_flow(family, |node, packet| {
        // Where a tick ends between the packet and the change nothing is kept: then once more.
        for last in [NEW, OLD].into_iter().cycle().take(100) {
            sent_to(node, packet);
            move_gateway(family, last);
            let changed = Instant::now();
            let mut was_kept = false;
            while sent_to(node, packet) != last {
                was_kept = true;
                assert!(changed.elapsed() < 10 * TICK, "the old neighbour's address is kept for good");
            }
            if was_kept {
                return;
            }
        }
        panic!("nothing was kept, a hundred times");
    });
}

#[rstest]
fn what_is_too_big_for_a_known_way_is_left_to_tc(#[values(V4, V6)] family: Family) {
    with_flow(family, |node, packet| {
        sent_to(node, packet);
        let large = Packet { payload: vec![0; usize::from(net::MTU)], ..packet.clone() };
        assert_not_ours(&node.run(Hook::Xdp, &large.frame()), &large.frame());
        sent_to(node, packet);
    });
}
