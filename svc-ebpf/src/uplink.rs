//! What comes from the network and goes to it: NodePorts and whatever else is asked for from outside.
use svc_common::Reason;
use svc_common::flow::{Hit, Key, Memory};

use crate::Action;
use crate::family::{Family, V4, V6};
use crate::forward::{Hop, check_hop_limit, route, send_on};
use crate::packet::Packet;
use crate::parse::{Headers, parse};
use crate::rewrite::{Endpoints, rewrite};
use crate::service::{Scope, choose, lookup};
use crate::tables::Tables;
use crate::visit::Visit;

/// A packet from the network.
///
/// # Errors
/// Why it is not sent on; it is unchanged then unless a kernel helper failed half way.
#[inline(always)]
pub fn ingress<P: Packet, T: Tables>(packet: &mut P, tables: &T, hop: &mut Hop) -> Result<Action, Reason> {
    let Some(headers) = parse(packet)? else { return Ok(Action::Pass) };
    let mut hit = Hit::default();
    let mut key = Key::masqueraded(headers.src, headers.sport, headers.dport, headers.protocol);
    let config = tables.config();
    let port = u16::from_be(headers.dport);
    if port < config.snat_first || config.snat_last < port || !follow(tables, &key, &headers, &mut hit) {
        key = Key::new(headers.src, headers.dst, headers.sport, headers.dport, headers.protocol);
        if follow(tables, &key, &headers, &mut hit) {
            if hit.is_reverse() {
                return Ok(Action::Pass);
            }
        } else {
            let Some(frontend) = lookup(tables, headers.dst, headers.dport, headers.protocol, false)? else {
                return Ok(Action::Pass);
            };
            let backend = choose(tables, &frontend, Scope::External)?;
            tables.open(&headers, &key, &backend, &mut hit)?;
            tables.count(Reason::FlowOpened, packet.size());
        }
    }
    if headers.v4 {
        apply::<P, T, V4>(packet, tables, &headers, &hit, hop)
    } else {
        apply::<P, T, V6>(packet, tables, &headers, &hit, hop)
    }?;
    tables.count(if hit.is_reverse() { Reason::Reply } else { Reason::FlowHit }, packet.size());
    Ok(if hit.is_masqueraded() { Action::Transmit } else { Action::Deliver })
}

/// A packet to the network: the reply of a backend on this node takes its frontend's address again.
///
/// # Errors
/// As [`ingress`].
#[inline(always)]
pub fn egress<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Result<Action, Reason> {
    let Some(headers) = parse(packet)? else { return Ok(Action::Pass) };
    let key = Key::new(headers.src, headers.dst, headers.sport, headers.dport, headers.protocol);
    let mut hit = Hit::default();
    if !follow(tables, &key, &headers, &mut hit) || !hit.is_reverse() {
        return Ok(Action::Pass);
    }
    if headers.v4 { restore::<P, V4>(packet, &headers, &hit) } else { restore::<P, V6>(packet, &headers, &hit) }?;
    tables.count(Reason::Reply, packet.size());
    Ok(Action::Deliver)
}

/// Gives a reply the frontend's address.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn restore<P: Packet, F: Family>(packet: &mut P, headers: &Headers, hit: &Hit) -> Result<(), Reason> {
    let to = Endpoints { src: hit.to(), sport: hit.port, dst: hit.dst(), dport: hit.second };
    rewrite::<P, F>(packet, headers, &to)
}

/// Does to a packet from the network what its flow says; `hop` is the way it then has to take, if it leaves the node.
///
/// A function of its own, so that its variables and those of opening a flow do not stand on the stack together.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn apply<P: Packet, T: Tables, F: Family>(
    packet: &mut P,
    tables: &T,
    headers: &Headers,
    hit: &Hit,
    hop: &mut Hop,
) -> Result<(), Reason> {
    if !hit.is_masqueraded() {
        let to = Endpoints { src: headers.src, sport: hit.second, dst: hit.to(), dport: hit.port };
        return rewrite::<P, F>(packet, headers, &to);
    }
    let limit = check_hop_limit::<P, F>(packet)?;
    let dst = if hit.is_reverse() { hit.dst() } else { hit.to() };
    route(packet, headers, dst, hop)?;
    let to = if hit.is_reverse() {
        Endpoints { src: hit.to(), sport: hit.port, dst, dport: hit.second }
    } else {
        let Some(uplink) = tables.uplink(hop.ifindex) else { return Err(Reason::NoRoute) };
        let src = if F::IS_V4 { uplink.v4 } else { uplink.v6 };
        Endpoints { src, sport: hit.second, dst, dport: hit.port }
    };
    rewrite::<P, F>(packet, headers, &to)?;
    send_on::<P, F>(packet, limit, hop)
}

/// Finds the packet's flow and lets it live on; false where there is none, or one that has ended and is not to be gone on
/// with: a new connection on a closed flow or towards a backend that has left, a datagram towards a backend that has left.
#[inline(always)]
fn follow<T: Tables>(tables: &T, key: &Key, headers: &Headers, hit: &mut Hit) -> bool {
    let now = tables.now();
    match tables.visit(key, headers, hit, now) {
        Visit::None => false,
        Visit::Over => {
            tables.flows().close(key, hit);
            false
        }
        Visit::Found => true,
        Visit::Told => {
            tables.flows().sync(key, hit, now);
            true
        }
    }
}
