//! Bytes are counted of each backend where that is wanted.
use svc_common::map::{CONFIG_COUNT_BYTES, Traffic};
use svc_dataplane::Hook;
use svc_dataplane::packet::UDP;
use svc_dataplane::tables::Kind::{ClusterIp, NodePort};
use svc_dataplane::tables::Tables;
use svc_tests::kernel::{self, Kernel};

use crate::stage::{V4, V6, answer, open, service};

fn since(node: &Kernel, backend: u32, before: Traffic) -> (u64, u64) {
    let now = node.traffic(backend);
    (now.to_backend - before.to_backend, now.from_backend - before.from_backend)
}

#[test]
fn each_way_is_counted_for_the_backend_with_every_packets_whole_size() {
    for family in [V4, V6] {
        for (kind, hook) in [(ClusterIp, Hook::Ingress), (NodePort, Hook::Xdp)] {
            let (service, request) = service(kind, family, UDP, &[(family.remote(), false)], family.client());
            let mut tables = Tables::with(&[service]);
            tables.config.flags |= CONFIG_COUNT_BYTES;
            let (backend, _) = tables.backends.iter().next().map(|(id, backend)| (*id, *backend)).unwrap();
            kernel::with(&tables, |node| {
                let before = node.traffic(backend);
                let seen = open(node, Hook::Ingress, &request);
                let (sent, answer) = (request.frame().len() as u64, answer(&request, seen));
                assert_eq!(since(node, backend, before), (sent, 0));
                node.run(hook, &request.frame());
                assert_eq!(since(node, backend, before), (2 * sent, 0));
                node.run(hook, &answer.frame());
                assert_eq!(since(node, backend, before), (2 * sent, answer.frame().len() as u64));
            });
        }
    }
}

#[test]
fn nothing_is_counted_where_nobody_wants_it_counted() {
    let (service, request) = service(ClusterIp, V4, UDP, &[(V4.remote(), false)], V4.client());
    let tables = Tables::with(&[service]);
    let backend = *tables.backends.keys().next().unwrap();
    kernel::with(&tables, |node| {
        let before = node.traffic(backend);
        open(node, Hook::Ingress, &request);
        assert_eq!(since(node, backend, before), (0, 0));
    });
}
