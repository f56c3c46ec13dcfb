//! What comes from the network and goes to it: NodePorts and whatever else is asked for from outside.
use svc_common::Reason;
use svc_common::flow::{Hit, Key, Memory};

use crate::family::{Family, V4, V6};
use crate::forward::{Hop, check_hop_limit, send_on};
use crate::packet::Packet;
use crate::parse::{Headers, parse};
use crate::rewrite::{Endpoints, rewrite};
use crate::tables::Tables;
use crate::visit::Visit;

/// What is known of the packet at hand. It is the caller's, since the kernel's stack of 512 bytes has no room for it.
#[derive(Clone, Copy, Default)]
pub struct Scratch {
    headers: Headers,
    key: Key,
    hit: Hit,
    pub hop: Hop,
}

/// A packet from the network: changed, and then to be sent by `scratch.hop`, or delivered to the stack where `hop` has no interface.
///
/// # Errors
/// Why it is not sent on; it is unchanged then unless a kernel helper failed half way.
#[inline(always)]
pub fn ingress<P: Packet, T: Tables>(packet: &mut P, tables: &T, scratch: &mut Scratch) -> Result<(), Reason> {
    let Scratch { headers, key, hit, hop } = scratch;
    *hop = Hop::default();
    *headers = parse(packet)?;
    *key = Key::masqueraded(headers.src, headers.sport, headers.dport, headers.protocol);
    let config = tables.config();
    let port = u16::from_be(headers.dport);
    if port < config.snat_first || config.snat_last < port || !follow(tables, key, headers, hit) {
        *key = Key::new(headers.src, headers.dst, headers.sport, headers.dport, headers.protocol);
        if !follow(tables, key, headers, hit) {
            tables.open(headers, key, hit)?;
            tables.count(Reason::FlowOpened, packet.size());
        } else if hit.is_reverse() {
            return Err(Reason::NotService);
        }
    }
    if headers.v4 {
        apply::<P, T, V4>(packet, tables, headers, hit, hop)
    } else {
        apply::<P, T, V6>(packet, tables, headers, hit, hop)
    }?;
    tables.count(if hit.is_reverse() { Reason::Reply } else { Reason::FlowHit }, packet.size());
    Ok(())
}

/// A packet to the network: the reply of a backend on this node takes its frontend's address again.
///
/// # Errors
/// As [`ingress`].
#[inline(always)]
pub fn egress<P: Packet, T: Tables>(packet: &mut P, tables: &T, scratch: &mut Scratch) -> Result<(), Reason> {
    let Scratch { headers, key, hit, .. } = scratch;
    *headers = parse(packet)?;
    *key = Key::new(headers.src, headers.dst, headers.sport, headers.dport, headers.protocol);
    if !follow(tables, key, headers, hit) || !hit.is_reverse() {
        return Err(Reason::NotService);
    }
    if headers.v4 { restore::<P, V4>(packet, headers, hit) } else { restore::<P, V6>(packet, headers, hit) }?;
    tables.count(Reason::Reply, packet.size());
    Ok(())
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
    packet.route(headers, &dst, hop)?;
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
