//! What passes the node's interfaces: those to the network, and those to its pods.
use svc_common::Reason;
use svc_common::flow::{Hit, Key, Memory};
use svc_common::map::{ADDRESS_LOCAL, ADDRESS_NODE};

use crate::family::{Family, V4, V6};
use crate::forward::{Hop, check_hop_limit, known, send_on, set_link, source};
use crate::negative;
use crate::open::is_shadowed;
use crate::packet::{Packet, Peer};
use crate::parse::{From, Headers, parse};
use crate::rewrite::{Endpoints, rewrite, rewrite_error};
use crate::tables::Tables;
use crate::visit::Visit;

/// What is known of the packet at hand. It is the caller's, since the kernel's stack of 512 bytes has no room for it.
#[derive(Clone, Copy, Default)]
pub struct Scratch {
    pub headers: Headers,
    key: Key,
    hit: Hit,
    pub hop: Hop,
    next: Next,
    /// [`negative::epoch`] of before anything was looked up.
    epoch: u64,
}

/// Where a packet goes that was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u32)]
pub enum Next {
    #[default]
    /// On its way, by the node's stack.
    Stack,
    /// Out by `scratch.hop`.
    Send,
    /// In again by the uplink, where the kernel expects the address that is its source now (rp_filter).
    Reenter,
}

/// Finds or opens the flow of a packet that comes in; `scratch.headers.from` is the caller's. [`translate`] is to follow.
///
/// # Errors
/// Why it is not sent on.
#[inline(always)]
pub fn ingress<P: Packet, T: Tables>(packet: &P, tables: &T, scratch: &mut Scratch) -> Result<(), Reason> {
    let Scratch { headers, key, hit, hop, epoch, .. } = scratch;
    hop.ifindex = 0;
    parse(packet, tables, headers)?;
    *epoch = negative::epoch(tables, headers.sport, headers.dport);
    let config = tables.config();
    let port = u16::from_be(headers.dport);
    let may_be_masqueraded = config.snat_first <= port && port < config.first_moved_port();
    // What goes to somebody else from and to the same ports is not to be noted in the flow.
    if may_be_masqueraded && tables.address(&headers.dst) & (ADDRESS_LOCAL | ADDRESS_NODE) != 0 {
        *key = Key::masqueraded(headers.src, headers.sport, headers.dport, headers.protocol);
        if follow(tables, key, headers, hit) {
            return Ok(());
        }
    }
    *key = Key::new(headers.src, headers.dst, headers.sport, headers.dport, headers.protocol);
    if !follow(tables, key, headers, hit) {
        let opened = open(packet, tables, headers, key, hit, hop);
        if opened == Err(Reason::NotService) {
            negative::keep(tables, headers, *epoch);
        }
        return opened;
    }
    if hit.is_reverse() && !hit.is_to_stack() {
        return Err(Reason::NotService);
    }
    Ok(())
}

/// Finds the flow of a packet that leaves, and was not sent on by us: the reply of a backend is to take its frontend's
/// address again. `to_network`: one that is addressed to a frontend, and was not seen where it came from, is to be translated
/// as well. [`translate`] is to follow.
///
/// # Errors
/// As [`ingress`].
#[inline(always)]
pub fn egress<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    scratch: &mut Scratch,
    to_network: bool,
) -> Result<(), Reason> {
    let Scratch { headers, key, hit, hop, epoch, .. } = scratch;
    hop.ifindex = 0;
    headers.from = From::Host;
    parse_apart(packet, tables, headers)?;
    *epoch = negative::epoch(tables, headers.sport, headers.dport);
    *key = Key::new(headers.src, headers.dst, headers.sport, headers.dport, headers.protocol);
    if !follow(tables, key, headers, hit) {
        if !to_network && !is_shadowed(tables, headers) {
            return Err(Reason::NotService);
        }
        let opened = open(packet, tables, headers, key, hit, hop);
        // To this node itself nothing leaves, and what comes in with the same addresses may be masqueraded traffic's.
        if opened == Err(Reason::NotService) && tables.address(&headers.dst) & (ADDRESS_LOCAL | ADDRESS_NODE) == 0 {
            negative::keep(tables, headers, *epoch);
        }
        return opened;
    }
    if hit.is_reverse() == hit.is_to_stack() {
        // A reply to the node's own connection was translated where it came in. A forward packet of somebody else's
        // flow was translated before.
        return Err(Reason::NotService);
    }
    Ok(())
}

/// Its variables are not to stand on the kernel's stack together with those of what comes behind.
///
/// # Errors
/// As [`parse`].
#[cfg_attr(target_arch = "bpf", inline(never))]
fn parse_apart<P: Packet, T: Tables>(packet: &P, tables: &T, headers: &mut Headers) -> Result<(), Reason> {
    parse(packet, tables, headers)
}

/// How often a source port is chosen anew since a socket has the one chosen first.
const SOCKET_TRIES: u32 = 8;

/// Opens a flow whose replies no socket of this node would take for its own.
///
/// The flow is there before the sockets are asked, and a socket before its first packet leaves, where [`is_shadowed`]
/// asks for flows: whichever comes second sees the other.
#[inline(always)]
fn open<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    headers: &Headers,
    key: &Key,
    hit: &mut Hit,
    hop: &mut Hop,
) -> Result<(), Reason> {
    let mut attempt = 0;
    while attempt < SOCKET_TRIES {
        attempt += 1;
        tables.open(headers, key, hit)?;
        let local = if hit.is_masqueraded() {
            // Once, since the verifier goes through all attempts: a second one is rare, and for another backend behind another link
            // much rarer.
            if attempt == 1 {
                find_source(packet, tables, headers, hit, hop);
            }
            known(hop.source)?
        } else if headers.from == From::Host && hit.second != headers.sport {
            headers.src
        } else {
            // No address of this node, or the port of the socket that has sent the packet.
            return opened(packet, tables, headers, hit);
        };
        let backend = Peer { addr: hit.to(), port: hit.port };
        if !packet.has_socket(headers.protocol, backend, Peer { addr: local, port: hit.second }) {
            return opened(packet, tables, headers, hit);
        }
        tables.flows().close(key, hit);
    }
    Err(Reason::NoSourcePort)
}

/// The source of what leaves for the flow's backend, into `hop.source`; where the way there cannot be told, which [`translate`]
/// will say, that of the interface at hand.
///
/// What it finds stands in `hop` alone, so that for the verifier all its ends are one.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn find_source<P: Packet, T: Tables>(packet: &P, tables: &T, headers: &Headers, hit: &Hit, hop: &mut Hop) {
    let dst = hit.to();
    hop.source = dst.any();
    // An error, too, may be one of a packet whose way is known.
    let _ = packet.route(tables, headers, &dst, hop);
    if hop.source == dst.any() {
        hop.source = source(tables, headers.v4, packet.ifindex());
    }
}

#[inline(always)]
fn opened<P: Packet, T: Tables>(packet: &P, tables: &T, headers: &Headers, hit: &Hit) -> Result<(), Reason> {
    tables.count(Reason::FlowOpened, packet.size());
    tables.opened(headers, hit, packet.size(), packet.ifindex());
    Ok(())
}

/// Does to a packet what the flow in `scratch` says.
///
/// # Errors
/// Why it is not sent on; it is unchanged then unless a kernel helper failed half way.
#[inline(always)]
pub fn translate<P: Packet, T: Tables>(packet: &mut P, tables: &T, scratch: &mut Scratch) -> Result<Next, Reason> {
    let Scratch { headers, hit, hop, next, .. } = scratch;
    if headers.v4 {
        apply::<P, T, V4>(packet, tables, headers, hit, hop, next)
    } else {
        apply::<P, T, V6>(packet, tables, headers, hit, hop, next)
    }?;
    tables.count(if hit.is_reverse() { Reason::Reply } else { Reason::FlowHit }, packet.size());
    tables.carried(hit, packet.size());
    Ok(*next)
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn apply<P: Packet, T: Tables, F: Family>(
    packet: &mut P,
    tables: &T,
    headers: &Headers,
    hit: &Hit,
    hop: &mut Hop,
    next: &mut Next,
) -> Result<(), Reason> {
    let reverse = hit.is_reverse();
    let dst = if reverse { hit.dst() } else { hit.to() };
    let limit = if hit.is_masqueraded() { check_hop_limit::<P, F>(packet)? } else { 0 };
    if hit.is_masqueraded() || (!reverse && headers.from == From::Host) {
        packet.route(tables, headers, &dst, hop)?;
    }
    let to = if reverse {
        Endpoints { src: hit.to(), sport: hit.port, dst, dport: hit.second }
    } else {
        let src = if hit.is_masqueraded() { known(hop.source)? } else { headers.src };
        Endpoints { src, sport: hit.second, dst, dport: hit.port }
    };
    let has_new_source = to.src != headers.src;
    rewrite_any::<P, F>(packet, headers, &to)?;
    if hit.is_masqueraded() {
        send_on::<P, F>(packet, limit, hop)?;
        *next = Next::Send;
        return Ok(());
    }
    *next = match (headers.from, reverse) {
        (From::Pod, true) if has_new_source => {
            packet.set(0, tables.config().uplink_mac)?;
            Next::Reenter
        }
        (From::Host, false) => {
            set_link(packet, hop)?;
            Next::Send
        }
        _ => Next::Stack,
    };
    Ok(())
}

#[inline(always)]
fn rewrite_any<P: Packet, F: Family>(packet: &mut P, headers: &Headers, to: &Endpoints) -> Result<(), Reason> {
    if !P::PLAIN && headers.is_icmp_error() {
        rewrite_error::<P, F>(packet, headers, to)
    } else {
        rewrite::<P, F>(packet, headers, to)
    }
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
            if tables.flows().sync(key, hit, now) {
                negative::end(tables, hit.port, hit.second);
            }
            true
        }
    }
}
