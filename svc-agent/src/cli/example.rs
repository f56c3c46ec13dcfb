//! A small state for the subcommands' tests.
use std::net::IpAddr;
use std::sync::Arc;

use svc_common::Addr;
use svc_common::map::{
    BACKEND_LOCAL, Backend, BackendSlot, FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_LOCAL, FRONTEND_NODE_PORT, Frontend,
    FrontendKey, TCP, cluster_set, local_set,
};

use crate::dataplane::State;
use crate::object::{Family, ObjectName, Protocol};
use crate::plan::PortName;

/// `default/web`, dual stack, a NodePort with a Local policy, two backends of IPv4 of which one is on this node.
pub(crate) fn state() -> State {
    let mut state = State::default();
    for (service, family, cluster_ip) in [(1, Family::V4, "10.96.0.10"), (2, Family::V6, "fd00:96::10")] {
        let name = PortName {
            service: ObjectName::new("default", "web"),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family,
        };
        state.services.insert(service, (&name.to_map(80).unwrap()).into());
        let frontend = |flags| Frontend { service, flags, affinity_seconds: 0 };
        let key = FrontendKey::new(addr(cluster_ip), 80u16.to_be(), TCP);
        state.frontends.insert(key, frontend(FRONTEND_CLUSTER_IP));
        let node_port = FrontendKey::new(addr(cluster_ip).any(), 30_080u16.to_be(), TCP);
        state.frontends.insert(node_port, frontend(FRONTEND_NODE_PORT | FRONTEND_EXTERNAL_LOCAL));
        state.sets.insert(cluster_set(service), Arc::default());
        state.sets.insert(local_set(service), Arc::default());
    }
    for (id, text, flags) in [(5, "10.1.0.2", 0), (9, "10.1.0.1", BACKEND_LOCAL)] {
        let (addr, port) = (addr(text), 8080u16.to_be());
        let slot = BackendSlot { addr, port, flags, id };
        let mut add = |set: u32| {
            let slots = state.backend_set(set).iter().copied().chain([slot]).collect();
            state.sets.insert(set, slots);
        };
        add(cluster_set(1));
        if flags & BACKEND_LOCAL != 0 {
            add(local_set(1));
        }
        state.backends.insert(id, Backend { addr, port, protocol: TCP, live: 1, service: 1 });
    }
    state
}

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}
