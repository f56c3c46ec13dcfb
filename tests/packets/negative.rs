//! What was found to be no Service's is known again, and for no longer than it holds.
use rstest::rstest;
use svc_dataplane::Hook;
use svc_dataplane::packet::{Packet, TCP, UDP};
use svc_dataplane::tables::{Kind::ExternalIp, Service, Tables};
use svc_tests::kernel::{self, Kernel};

use crate::stage::{Client, Family, OPENED, V4, V6, assert_not_ours, service};

/// Each CPU knows what it has met itself.
fn stay_on_this_cpu() {
    // SAFETY: a set of its own, for the calling thread.
    let stays = unsafe {
        let mut here = std::mem::zeroed::<libc::cpu_set_t>();
        libc::CPU_SET(libc::sched_getcpu() as usize, &mut here);
        libc::sched_setaffinity(0, size_of_val(&here), &raw const here)
    };
    assert_eq!(stays, 0);
}

/// A packet of no Service, that is sent to what the Service is to be.
fn stranger(client: Client, family: Family, protocol: u8) -> (Hook, Service, Packet) {
    let (hook, address) = client.of(family);
    let (service, packet) = service(ExternalIp, family, protocol, &[(family.remote(), false)], address);
    (hook, service, packet)
}

fn is_translated(node: &mut Kernel, hook: Hook, packet: &Packet) -> bool {
    let frame = packet.frame();
    let outcome = node.run(hook, &frame);
    if outcome.moved.is_empty() {
        assert_not_ours(&outcome, &frame);
        return false;
    }
    assert!(outcome.moved_only(OPENED), "{:?}", outcome.moved);
    true
}

#[rstest]
fn a_packet_that_was_no_services_is_not_looked_at_until_the_agent_has_written(
    #[values(Client::Network, Client::Pod, Client::Host)] client: Client,
    #[values(TCP, UDP)] protocol: u8,
    #[values(V4, V6)] family: Family,
) {
    let (hook, service, packet) = stranger(client, family, protocol);
    kernel::with(&Tables::default(), |node| {
        stay_on_this_cpu();
        assert!(!is_translated(node, hook, &packet));
        let tables = Tables::with(&[service]);
        node.slip_in(&tables);
        assert!(!is_translated(node, hook, &packet), "it is known");
        let other = Packet { sport: packet.sport ^ 1, ..packet.clone() };
        assert!(is_translated(node, hook, &other), "another connection is not");
        node.set_tables(&tables);
        assert!(is_translated(node, hook, &packet));
    });
}

/// As it passes XDP, the uplink's ingress, and the egress to another pod or back to the network.
#[rstest]
fn all_hooks_know_what_one_has_met(#[values(V4, V6)] family: Family) {
    let (_, service, packet) = stranger(Client::Network, family, TCP);
    kernel::with(&Tables::default(), |node| {
        stay_on_this_cpu();
        let frame = packet.frame();
        assert_not_ours(&node.run(Hook::Xdp, &frame), &frame);
        node.slip_in(&Tables::with(&[service]));
        for hook in Hook::ALL {
            assert_not_ours(&node.run(hook, &frame), &frame);
        }
    });
}
