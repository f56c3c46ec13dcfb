//! Every kind of Service, from every kind of client, to every kind of backend: the way there and the way back.
use rstest::rstest;
use svc_dataplane::check::Ends;
use svc_dataplane::net;
use svc_dataplane::packet::{Packet, SCTP, TCP, UDP};
use svc_dataplane::tables::Kind::{self, ClusterIp, ExternalIp, LoadBalancer, NodePort};
use svc_dataplane::{Hook, Verdict};

use crate::stage::Client::{self, Host, Network, Pod};
use crate::stage::{
    FROM_HERE, FROM_NETWORK, Family, HIT, MASQUERADED, OPENED, REPLY, V4, V6, answer, assert_changed, assert_not_ours,
    ends, on, sent, service, translated,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Local,
    Remote,
}
use Place::{Local, Remote};

#[rstest]
fn a_request_reaches_a_backend_and_the_reply_its_client(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(ClusterIp, NodePort, ExternalIp, LoadBalancer)] kind: Kind,
    #[values(Local, Remote)] place: Place,
    #[values(Network, Pod, Host)] from: Client,
) {
    let (hook, client) = from.of(family);
    there_and_back(protocol, family, kind, place, from, hook, client);
}

#[rstest]
fn in_front_of_the_stack_the_same_happens_to_what_the_network_sends(
    #[values(TCP, UDP, SCTP)] protocol: u8,
    #[values(V4, V6)] family: Family,
    #[values(ClusterIp, NodePort, ExternalIp, LoadBalancer)] kind: Kind,
    #[values(Local, Remote)] place: Place,
) {
    there_and_back(protocol, family, kind, place, Network, Hook::Xdp, family.client());
}

fn there_and_back(
    protocol: u8,
    family: Family,
    kind: Kind,
    place: Place,
    from: Client,
    hook: Hook,
    client: std::net::IpAddr,
) {
    let backend = if place == Local { family.local() } else { family.remote() };
    let (service, request) = service(kind, family, protocol, &[(backend, place == Local)], client);
    let masqueraded = (from, place) == (Network, Remote);
    on(&[service], |node| {
        let outcome = node.run(hook, &request.frame());
        let seen = ends(&outcome);
        let source = if masqueraded { family.node() } else { client };
        assert_eq!((seen.src, seen.dst, seen.dport), (source, backend, 9376));
        match (protocol, from, masqueraded) {
            (_, _, true) => assert!(MASQUERADED.contains(&seen.sport), "{}", seen.sport),
            (SCTP, ..) => assert_eq!(seen.sport, request.sport),
            (_, Network, _) => assert!(FROM_NETWORK.contains(&seen.sport), "{}", seen.sport),
            _ => assert!(FROM_HERE.contains(&seen.sport), "{}", seen.sport),
        }
        let there = translated(&request, seen);
        let (verdict, expected) = match (from, place) {
            (Network, Remote) => (Verdict::Redirect, sent(&there, true)),
            (Host, _) => (Verdict::Redirect, sent(&there, false)),
            _ => (Verdict::Next, there.frame()),
        };
        assert_changed(&outcome, verdict, OPENED, &expected);
        assert_changed(&node.run(hook, &request.frame()), verdict, HIT, &expected);

        let reply = answer(&request, seen);
        let restored =
            translated(&reply, Ends { src: request.dst, sport: request.dport, dst: client, dport: request.sport });
        let (hook, verdict, expected) = match (from, place) {
            (Network, Remote) => (hook, Verdict::Redirect, sent(&restored, true)),
            (Network, Local) => (Hook::Egress, Verdict::Next, restored.frame()),
            (Pod, _) => {
                let first = if place == Local { Hook::PodIngress } else { Hook::Ingress };
                assert_not_ours(&node.run(first, &reply.frame()), &reply.frame());
                (Hook::PodEgress, Verdict::Next, restored.frame())
            }
            (Host, Local) => {
                let mut macs = restored.macs;
                macs[..6].copy_from_slice(&net::interface(net::UPLINK).mac);
                (Hook::PodIngress, Verdict::Redirect, Packet { macs, ..restored }.frame())
            }
            (Host, Remote) => (Hook::Ingress, Verdict::Next, restored.frame()),
        };
        assert_changed(&node.run(hook, &reply.frame()), verdict, REPLY, &expected);
    });
}
