//! Where a client's packets are met: by which program, at which interface.
use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use futures::TryStreamExt as _;
use netlink_packet_route::route::RouteAttribute;
use nix::net::if_::{if_indextoname, if_nametoindex};
use rtnetlink::RouteMessageBuilder;
use serde::Serialize;
use svc_common::map::{ADDRESS_LOCAL, ADDRESS_NODE};

use crate::attach;
use crate::dataplane::State;
use crate::inspect::Hook;

#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum From {
    /// A pod of this node.
    Pod,
    /// This node itself.
    Node,
    /// Anybody whose packets come in from the network.
    Network,
}

impl From {
    /// The program's name, without its prefix `svc_`.
    pub const fn program(self) -> &'static str {
        match self {
            From::Pod => "pod_ingress",
            From::Node => "egress",
            From::Network => "ingress",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    pub from: From,
    pub interface: String,
    pub index: u32,
}

/// Where the packets of `source` to `destination` are met, as far as the flags do not say it.
///
/// # Errors
/// Where no such program is attached, or a name is no interface's.
pub fn find(
    state: &State,
    hooks: &[Hook],
    source: IpAddr,
    destination: IpAddr,
    from: Option<From>,
    interface: Option<&str>,
) -> anyhow::Result<Place> {
    let places: Vec<(&str, String)> = hooks.iter().filter_map(|hook| attach::place(&hook.name)).collect();
    let has = |program: &str, name: &str| places.iter().any(|(hook, at)| *hook == program && at == name);
    let is_own = source.is_loopback()
        || state.addresses.get(&source.into()).is_some_and(|flags| flags & (ADDRESS_LOCAL | ADDRESS_NODE) != 0);
    let way_back = if is_own { None } else { way_to(source) };
    let from = match (from, interface, way_back.as_deref()) {
        (Some(from), ..) => from,
        (None, Some(name), _) if has(From::Pod.program(), name) => From::Pod,
        (None, Some(name), _) if has(From::Network.program(), name) && !is_own => From::Network,
        _ if is_own => From::Node,
        (None, None, Some(name)) if has(From::Pod.program(), name) => From::Pod,
        _ => From::Network,
    };
    let program = from.program();
    let by_route = if from == From::Node { way_to(destination) } else { way_back };
    let first = || places.iter().find(|(hook, _)| *hook == program).map(|(_, name)| name.clone());
    let interface = match interface {
        Some(name) => name.to_owned(),
        None => by_route.filter(|name| has(program, name)).or_else(first).with_context(|| {
            format!("svc_{program} is attached to no interface here: `svc-agent status` says what is")
        })?,
    };
    ensure!(has(program, &interface), "--interface {interface}: svc_{program} is not attached to it; it is to {}", {
        let names: Vec<_> = places.iter().filter(|(hook, _)| *hook == program).map(|(_, name)| name.as_str()).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    });
    let index = if_nametoindex(interface.as_str()).with_context(|| format!("the interface {interface}"))?;
    Ok(Place { from, interface, index })
}

/// The interface by which this host sends to an address.
fn way_to(address: IpAddr) -> Option<String> {
    let message = match address {
        IpAddr::V4(address) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(address, 32).build(),
        IpAddr::V6(address) => {
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(address, 128).build()
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().ok()?;
        tokio::spawn(connection);
        let route = handle.route().get(message).execute().try_next().await.ok()??;
        let index = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })?;
        if_indextoname(index).ok()?.into_string().ok()
    })
}
