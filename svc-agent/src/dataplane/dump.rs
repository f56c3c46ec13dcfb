//! A state in words, one line a frontend, the same text for the same state whatever its ids.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use svc_common::Addr;
use svc_common::map::{
    ADDRESS_CLUSTER_IP, ADDRESS_EXTERNAL, ADDRESS_LOCAL, ADDRESS_NODE, BACKEND_LOCAL, BackendSlot, CIDR_PODS,
    CIDR_SERVICES, CONFIG_DETECT_PODS_V4, CONFIG_DETECT_PODS_V6, CONFIG_MASQUERADE_ALL, CONFIG_TAKE_OVER,
    FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_IP, FRONTEND_EXTERNAL_LOCAL, FRONTEND_INTERNAL_LOCAL, FRONTEND_KIND,
    FRONTEND_NODE_PORT, FRONTEND_SOURCE_RANGES, Frontend, FrontendKey, cluster_set, local_set,
};

use super::{NODE, State};
use crate::object::Protocol;
use crate::plan::PortName;

/// Frontends by Service name, then addresses, ranges and settings.
///
/// `default/hostnames:http 10.96.0.10:80/TCP ClusterIP -> 10.244.1.2:9376 10.244.2.2:9376*`; a star marks a backend on
/// this node, `local ->` the backends for clients that are to have local ones only.
pub fn dump(state: &State) -> String {
    let mut lines: Vec<(Option<PortName>, u32, FrontendKey, String)> = state
        .frontends
        .iter()
        .map(|(key, frontend)| {
            let name = state.port_name(frontend.service);
            (name, frontend.flags & FRONTEND_KIND, *key, line(state, key, frontend))
        })
        .collect();
    lines.sort();
    let mut text = String::new();
    for (name, _, _, line) in lines {
        let name = name.map_or_else(|| "(no name)".to_owned(), |name| name.to_string());
        let _ = writeln!(text, "{name} {line}");
    }
    let addresses: BTreeMap<IpAddr, u32> =
        state.addresses.iter().map(|(addr, flags)| (IpAddr::from(*addr), *flags)).collect();
    for (addr, flags) in addresses {
        let names = [
            (ADDRESS_CLUSTER_IP, "ClusterIP"),
            (ADDRESS_EXTERNAL, "external"),
            (ADDRESS_NODE, "node ports"),
            (ADDRESS_LOCAL, "local"),
        ];
        let what: Vec<_> = names.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| *name).collect();
        let _ = writeln!(text, "address {addr}: {}", what.join(", "));
    }
    let cidrs: BTreeMap<_, _> =
        state.cidrs.iter().map(|(key, flags)| ((IpAddr::from(key.addr), key.prefix_len), (key, *flags))).collect();
    for (key, flags) in cidrs.into_values() {
        let mut what = Vec::new();
        if flags & CIDR_PODS != 0 {
            what.push("pods");
        }
        if flags & CIDR_SERVICES != 0 {
            what.push("ClusterIPs");
        }
        let _ = writeln!(text, "range {}: {}", range_text(key.addr, key.prefix_len), what.join(", "));
    }
    let node = state.uplinks.get(&NODE).copied().unwrap_or_default();
    let _ = writeln!(text, "node {} {}", node.v4, node.v6);
    for (flag, what) in [
        (CONFIG_DETECT_PODS_V4, "IPv4 pods are told apart"),
        (CONFIG_DETECT_PODS_V6, "IPv6 pods are told apart"),
        (CONFIG_MASQUERADE_ALL, "masquerade all"),
        (CONFIG_TAKE_OVER, "take over"),
    ] {
        if state.config.flags & flag != 0 {
            let _ = writeln!(text, "{what}");
        }
    }
    text
}

fn line(state: &State, key: &FrontendKey, frontend: &Frontend) -> String {
    let mut text = format!("{} {}", key_text(key), kind(frontend.flags));
    match (frontend.flags & FRONTEND_INTERNAL_LOCAL != 0, frontend.flags & FRONTEND_EXTERNAL_LOCAL != 0) {
        (true, true) => text.push_str(" all-local"),
        (true, false) => text.push_str(" internal-local"),
        (false, true) => text.push_str(" external-local"),
        (false, false) => {}
    }
    if frontend.flags & FRONTEND_SOURCE_RANGES != 0 {
        let _ = write!(text, " from={}", source_ranges(state, frontend.service).join(","));
    }
    if frontend.affinity_seconds > 0 {
        let _ = write!(text, " affinity={}s", frontend.affinity_seconds);
    }
    let _ = write!(text, " -> {}", set_text(state.sets.get(&cluster_set(frontend.service))));
    if frontend.flags & (FRONTEND_INTERNAL_LOCAL | FRONTEND_EXTERNAL_LOCAL) != 0 {
        let _ = write!(text, " local -> {}", set_text(state.sets.get(&local_set(frontend.service))));
    }
    text
}

/// The sources that a service's restricted frontends serve.
pub fn source_ranges(state: &State, service: u32) -> Vec<String> {
    let of = state.source_ranges.iter().filter(|range| range.service == service);
    let sorted: BTreeMap<_, _> = of
        .map(|range| ((IpAddr::from(range.addr), range.prefix_len), range_text(range.addr, range.prefix_len - 32)))
        .collect();
    sorted.into_values().collect()
}

/// `len`: bits of the address, an IPv4 one being v4-mapped.
pub fn range_text(addr: Addr, len: u32) -> String {
    format!("{addr}/{}", if addr.is_v4() && len >= 96 { len - 96 } else { len })
}

fn set_text(set: Option<&Arc<[BackendSlot]>>) -> String {
    match set.map(|set| &**set) {
        None => "(no set)".to_owned(),
        Some([]) => "(none)".to_owned(),
        Some(slots) => {
            let slot = |slot: &BackendSlot| {
                let star = if slot.flags & BACKEND_LOCAL != 0 { "*" } else { "" };
                format!("{}{star}", address_and_port(slot.addr, slot.port))
            };
            let mut sorted: Vec<_> = slots.iter().collect();
            sorted.sort_by_key(|slot| (IpAddr::from(slot.addr), u16::from_be(slot.port)));
            sorted.into_iter().map(slot).collect::<Vec<_>>().join(" ")
        }
    }
}

/// A frontend's address, port and protocol: `10.96.0.10:80/TCP`.
pub fn key_text(key: &FrontendKey) -> String {
    let protocol =
        Protocol::from_number(key.protocol).map_or_else(|| key.protocol.to_string(), |protocol| protocol.to_string());
    format!("{}/{protocol}", address_and_port(key.addr, key.port))
}

/// `port` in network byte order.
pub fn address_and_port(addr: Addr, port: u16) -> String {
    let port = u16::from_be(port);
    if addr.is_v4() { format!("{addr}:{port}") } else { format!("[{addr}]:{port}") }
}

/// The API's name for a kind of frontend; `flags` are `FRONTEND_*`.
pub fn kind(flags: u32) -> &'static str {
    match flags & FRONTEND_KIND {
        FRONTEND_CLUSTER_IP => "ClusterIP",
        FRONTEND_NODE_PORT => "NodePort",
        FRONTEND_EXTERNAL_IP => "ExternalIP",
        _ => "LoadBalancer",
    }
}
