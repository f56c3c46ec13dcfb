//! What comes from the network and goes to it: NodePorts and whatever else is asked for from outside.
use svc_common::Reason;
use svc_common::flow::{CONFIRMED, FIN_BACKEND, FIN_CLIENT, Hit, Key, REPLIED, RESET, State, close, find, sync, touch};
use svc_common::map::TCP;

use crate::Action;
use crate::family::{Family, V4, V6};
use crate::forward::{check_hop_limit, route, send_on};
use crate::open::open;
use crate::packet::Packet;
use crate::parse::{Headers, TCP_FIN, TCP_RST, TCP_SYN, parse};
use crate::rewrite::{Endpoints, rewrite};
use crate::service::{Scope, choose, lookup};
use crate::tables::Tables;

/// A packet from the network.
///
/// # Errors
/// Why it is not sent on; it is unchanged then unless a kernel helper failed half way.
#[inline(always)]
pub fn ingress<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Result<Action, Reason> {
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
            open(tables, &headers, &key, &backend, &mut hit)?;
            tables.count(Reason::FlowOpened, packet.size());
        }
    }
    let counted = if hit.is_reverse() { Reason::Reply } else { Reason::FlowHit };
    if headers.v4 {
        apply::<P, T, V4>(packet, tables, &headers, &hit)
    } else {
        apply::<P, T, V6>(packet, tables, &headers, &hit)
    }
    .inspect(|_| tables.count(counted, packet.size()))
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
    let to = Endpoints { src: hit.to(), sport: hit.port, dst: hit.dst(), dport: hit.second };
    if headers.v4 { rewrite::<P, V4>(packet, &headers, &to) } else { rewrite::<P, V6>(packet, &headers, &to) }?;
    tables.count(Reason::Reply, packet.size());
    Ok(Action::Deliver)
}

/// Does to a packet from the network what its flow says.
#[inline(always)]
fn apply<P: Packet, T: Tables, F: Family>(
    packet: &mut P,
    tables: &T,
    headers: &Headers,
    hit: &Hit,
) -> Result<Action, Reason> {
    if !hit.is_masqueraded() {
        let to = Endpoints { src: headers.src, sport: hit.second, dst: hit.to(), dport: hit.port };
        rewrite::<P, F>(packet, headers, &to)?;
        return Ok(Action::Deliver);
    }
    let limit = check_hop_limit::<P, F>(packet)?;
    let dst = if hit.is_reverse() { hit.dst() } else { hit.to() };
    let hop = route(packet, headers, dst)?;
    let to = if hit.is_reverse() {
        Endpoints { src: hit.to(), sport: hit.port, dst, dport: hit.second }
    } else {
        let Some(uplink) = tables.uplink(hop.ifindex) else { return Err(Reason::NoRoute) };
        let src = if F::IS_V4 { uplink.v4 } else { uplink.v6 };
        Endpoints { src, sport: hit.second, dst, dport: hit.port }
    };
    rewrite::<P, F>(packet, headers, &to)?;
    send_on::<P, F>(packet, limit, &hop)?;
    Ok(Action::Transmit(hop))
}

/// Finds the packet's flow and lets it live on; false where there is none, or one that has ended and is not to be gone on
/// with: a new connection on a closed flow or towards a backend that has left, a datagram towards a backend that has left.
#[inline(always)]
fn follow<T: Tables>(tables: &T, key: &Key, headers: &Headers, hit: &mut Hit) -> bool {
    let now = tables.now();
    match visit(tables, key, headers, hit, now) {
        Visit::None => false,
        Visit::Over => {
            close(tables.flows(), key, hit);
            false
        }
        Visit::Found => true,
        Visit::Told => {
            sync(tables.flows(), key, hit, now);
            true
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Visit {
    None,
    Over,
    Found,
    /// Found, and the flow's other cell is to be told of it.
    Told,
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn visit<T: Tables>(tables: &T, key: &Key, headers: &Headers, hit: &mut Hit, now: u16) -> Visit {
    let cell = find(tables.flows(), key, hit);
    if cell.is_null() {
        return Visit::None;
    }
    if !hit.is_reverse() {
        let new_connection = headers.is_syn() || headers.protocol != TCP;
        let closed = headers.is_syn() && State::of(hit.state) == State::Closed;
        if closed || (new_connection && !tables.is_live(hit.backend)) {
            return Visit::Over;
        }
    }
    // SAFETY: `cell` was just found in the table.
    if unsafe { touch(cell, hit, learned(headers, hit), now) } { Visit::Told } else { Visit::Found }
}

/// The state bits that this packet adds to its flow's.
#[inline(always)]
const fn learned(headers: &Headers, hit: &Hit) -> u8 {
    let reverse = hit.is_reverse();
    let mut bits = if reverse {
        REPLIED
    } else if headers.flags & TCP_SYN == 0 && hit.state & REPLIED != 0 {
        CONFIRMED
    } else {
        0
    };
    if headers.flags & TCP_FIN != 0 {
        bits |= if reverse { FIN_BACKEND } else { FIN_CLIENT };
    }
    if headers.flags & TCP_RST != 0 {
        bits |= RESET;
    }
    bits
}
