//! What would become of a connection, asked of the kernel part itself, and nothing of it stays.
pub mod packet;
pub mod place;
pub mod run;
pub mod tables;

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;
use svc_common::map::{
    ADDRESS_CLUSTER_IP, BACKEND_LOCAL, BackendSlot, FRONTEND_SOURCE_RANGES, Frontend, FrontendKey, cluster_set,
    local_set,
};
use svc_common::{Addr, Reason};
use svc_ebpf::service::{self, Scope};
use svc_ebpf::socket::{self, Request};
use svc_ebpf::tables::Tables as _;

use crate::attach::SOCKET_HOOKS;
use crate::dataplane::State;
use crate::dataplane::dump::{address_and_port, kind, source_ranges};
use crate::host;
use crate::inspect::{Hook, Pins};
use crate::object::Protocol;
use crate::plan::PortName;
use packet::Ends;
use place::{From, Place};
use run::{Outcome, Verdict};
use tables::Known;

/// What is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    pub protocol: Protocol,
    pub ends: Ends,
    /// As the addresses say, where there is none.
    pub from: Option<From>,
    pub interface: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    pub protocol: String,
    #[serde(flatten)]
    pub ends: Ends,
    pub from: From,
    /// Where the packet is met.
    pub interface: String,
    /// None where the destination is no Service's.
    pub service: Option<Served>,
    /// What else is known of a destination that no Service has.
    pub note: Option<String>,
    /// What a socket of the client gets; none where no socket hook sees it.
    pub socket: Option<Socket>,
    pub packet: Fate,
}

/// The Service port that the destination is, and whom it may be served by.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Served {
    pub namespace: String,
    pub name: String,
    pub port_name: Option<String>,
    pub kind: &'static str,
    /// `Cluster` or `Local`: which backends this client may get.
    pub policy: &'static str,
    /// Those that the policy leaves.
    pub backends: Vec<Backend>,
    /// Of ClientIP affinity; 0 where there is none.
    pub affinity_seconds: u32,
    /// The backend that affinity leads this client's packets to.
    pub affine_to: Option<String>,
    /// None where all sources are served.
    pub source_ranges: Option<Vec<String>>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    pub address: String,
    /// On this node.
    pub local: bool,
}

/// What becomes of connect(), or of a datagram that an unconnected socket sends.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Socket {
    /// `connected`, `refused`, or `left` to be judged by its packets.
    pub verdict: &'static str,
    /// A label of [`Reason`].
    pub reason: &'static str,
}

/// What becomes of a packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fate {
    /// `forwarded`, `rejected`, `dropped` or `passed`.
    pub verdict: &'static str,
    /// A label of [`Reason`].
    pub reason: &'static str,
    /// Of the reason.
    pub description: &'static str,
    /// `new`, `known`, or none.
    pub flow: Option<&'static str>,
    pub backend: Option<Backend>,
    /// The packet's addresses afterwards, where they have changed.
    pub after: Option<Ends>,
}

/// # Errors
/// Where the pins cannot be read, the program is not attached where it would be asked, or the kernel refuses to run it.
pub fn ask(pins: &Pins, question: &Question) -> anyhow::Result<Answer> {
    let Question { protocol, ends, from, interface } = question;
    let (state, hooks) = (pins.state()?, pins.hooks()?);
    let (source, destination) = (ends.source.ip(), ends.destination.ip());
    let place = place::find(&state, &hooks, source, destination, *from, interface.as_deref())?;
    let affinity = pins.affinity()?;
    let known = Known::new(&state, &affinity, host::monotonic_seconds());
    let served = frontend(&known, *protocol, ends.destination, place.from)
        .map(|frontend| served(&state, &known, &frontend, source, place.from));
    let frame = packet::first(*protocol, *ends)?;
    let outcome = run::run(pins, &place, source.into(), &frame)?;
    Ok(Answer {
        protocol: protocol.to_string(),
        ends: *ends,
        from: place.from,
        note: if served.is_ok() { None } else { note(&state, *protocol, ends.destination) },
        socket: socket(&known, &hooks, *protocol, ends.destination, &place),
        packet: fate(&state, *ends, &outcome),
        service: served.ok(),
        interface: place.interface,
    })
}

fn frontend(known: &Known<'_>, protocol: Protocol, destination: SocketAddr, from: From) -> Result<Frontend, Reason> {
    let (addr, port) = (destination.ip().into(), destination.port().to_be());
    service::lookup(known, addr, port, protocol.number(), from == From::Node)
}

fn served(state: &State, known: &Known<'_>, frontend: &Frontend, source: IpAddr, from: From) -> Served {
    let name = state.port_name(frontend.service);
    let local = service::is_local(frontend, if from == From::Network { Scope::External } else { Scope::Internal });
    let set = if local { local_set(frontend.service) } else { cluster_set(frontend.service) };
    let slots = state.backend_set(set);
    let key = svc_common::map::AffinityKey { service: frontend.service, pad: 0, client: source.into() };
    let last = known.affinity(&key).filter(|last| {
        frontend.affinity_seconds > 0 && known.seconds().wrapping_sub(last.last) <= frontend.affinity_seconds
    });
    let affine = last.and_then(|last| slots.iter().find(|slot| slot.id == last.backend));
    let text = |part: fn(&PortName) -> &str| name.as_ref().map_or_else(String::new, |name| part(name).to_owned());
    Served {
        namespace: text(|name| &name.service.namespace),
        name: text(|name| &name.service.name),
        port_name: Some(text(|name| &name.port)).filter(|port| !port.is_empty()),
        kind: kind(frontend.flags),
        policy: if local { "Local" } else { "Cluster" },
        backends: slots.iter().map(backend).collect(),
        affinity_seconds: frontend.affinity_seconds,
        affine_to: affine.map(|slot| address_and_port(slot.addr, slot.port)),
        source_ranges: (frontend.flags & FRONTEND_SOURCE_RANGES != 0).then(|| source_ranges(state, frontend.service)),
    }
}

fn backend(slot: &BackendSlot) -> Backend {
    Backend { address: address_and_port(slot.addr, slot.port), local: slot.flags & BACKEND_LOCAL != 0 }
}

/// Whose ClusterIP it is, and what that would answer.
fn note(state: &State, protocol: Protocol, destination: SocketAddr) -> Option<String> {
    let addr: Addr = destination.ip().into();
    if state.addresses.get(&addr)? & ADDRESS_CLUSTER_IP == 0 {
        return None;
    }
    let of_address = state.frontends.iter().filter(|(key, _)| key.addr == addr);
    let mut ports = Vec::new();
    let mut owner = None;
    for (FrontendKey { port, protocol, .. }, frontend) in of_address {
        let protocol = Protocol::from_number(*protocol).map_or_else(String::new, |protocol| protocol.to_string());
        ports.push(format!("{}/{protocol}", u16::from_be(*port)));
        owner = owner.or_else(|| state.port_name(frontend.service));
    }
    let owner = owner.map_or_else(|| "a Service".to_owned(), |name| name.service.to_string());
    let wanted = format!("{}/{protocol}", destination.port());
    Some(format!(
        "{} is a ClusterIP of {owner}, which has no port {wanted}, but {}",
        destination.ip(),
        ports.join(", ")
    ))
}

fn socket(
    known: &Known<'_>,
    hooks: &[Hook],
    protocol: Protocol,
    destination: SocketAddr,
    place: &Place,
) -> Option<Socket> {
    let hooked = hooks.iter().any(|hook| hook.attached && SOCKET_HOOKS.contains(&hook.name.as_str()));
    if place.from == From::Network || protocol == Protocol::Sctp || !hooked {
        return None;
    }
    // A pod's own network namespace is not known here: any that is not the node's stands for it.
    let host = known.config().host_netns;
    let netns = if place.from == From::Node { host } else { host.wrapping_add(1) };
    let (addr, port) = (destination.ip().into(), destination.port().to_be());
    let request = Request { cookie: 0, netns, addr, port, protocol: protocol.number() };
    let (verdict, reason) = match socket::connect(known, &request) {
        Ok(_) => ("connected", Reason::SocketConnected),
        Err(reason @ (Reason::NoBackend | Reason::UnknownPort)) => ("refused", reason),
        Err(reason) => ("left", reason),
    };
    Some(Socket { verdict, reason: reason.label() })
}

fn fate(state: &State, before: Ends, outcome: &Outcome) -> Fate {
    let has = |reason: Reason| outcome.counted.contains(&reason);
    let opened = has(Reason::FlowOpened);
    let reason = outcome.counted.iter().find(|reason| **reason != Reason::FlowOpened);
    let reason = *reason.unwrap_or(&Reason::NotService);
    let translated = matches!(reason, Reason::FlowHit | Reason::Reply);
    let verdict = match outcome.verdict {
        _ if translated => "forwarded",
        Verdict::Drop => "dropped",
        Verdict::Redirect => "rejected",
        Verdict::Next => "passed",
    };
    let after = packet::ends(&outcome.frame).filter(|after| translated && *after != before);
    let to = after.filter(|_| reason == Reason::FlowHit).map(|after| after.destination);
    let is_local = |to: SocketAddr| {
        let mut slots = state.sets.values().flat_map(|set| &**set);
        slots.any(|slot| {
            slot.addr == to.ip().into() && u16::from_be(slot.port) == to.port() && slot.flags & BACKEND_LOCAL != 0
        })
    };
    Fate {
        verdict,
        reason: reason.label(),
        description: reason.description(),
        flow: if opened { Some("new") } else { translated.then_some("known") },
        backend: to.map(|to| Backend { address: to.to_string(), local: is_local(to) }),
        after,
    }
}
