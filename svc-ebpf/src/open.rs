//! Opening a flow: both of its cells, and a source port where it needs one.
use svc_common::flow::{Added, Entry, Hit, Key, Memory, TO_STACK, Vacancy, add, find};
use svc_common::map::{
    ADDRESS_LOCAL, ADDRESS_NODE, BACKEND_LOCAL, BackendSlot, CIDR_PODS, CONFIG_DETECT_PODS_V4, CONFIG_DETECT_PODS_V6,
    CONFIG_MASQUERADE_ALL, CONFIG_TAKE_OVER, FRONTEND_CLUSTER_IP, FRONTEND_KIND, Frontend, NO_BACKEND, SCTP, UDP,
};
use svc_common::select::{pick, shuffle};
use svc_common::{Addr, Reason};

use crate::negative;
use crate::parse::{From, Headers};
use crate::service::{Client, Scope, choose, lookup};
use crate::tables::Tables;

/// Source ports to look at before a newcomer is turned away: with nine tenths of them in use, 1 newcomer in 400 would be.
const PORT_TRIES: u32 = 64;
/// As many of them in turn, for protocols with a handshake: the first half-open flow that is met is the oldest one then.
const PORTS_IN_TURN: u32 = 16;
/// As many of them in all before that flow has to give way, the others at random: most of the ports are in use then, by all odds.
const PORTS_OF_GRACE: u32 = 8;
/// As many of them for UDP before a flow that went one way only has to give way, and where the client keeps its address.
const PORTS_AT_RANDOM: u32 = 16;
/// How often another core may take the port first.
const TRIES: u32 = 4;

/// In a chosen slot's flags: the source address becomes this node's.
const MASQUERADED: u16 = 1 << 15;
/// The source port stays if it can.
const PORT_KEPT: u16 = 1 << 14;

/// Opens the flow of `headers`, whose key is `key`, towards one of its frontend's backends; what its packets need
/// stands in `hit` then. A connection that is no Service's and that a flow shadows ([`is_shadowed`]) keeps its destination.
///
/// The client's address stays where replies pass by here anyway; else it becomes this node's. The client's port becomes one
/// that no client chooses by itself, where the client may know the way to the backend: a connection that it makes
/// there directly, from the same port, would be the same to the backend, and its replies to us.
///
/// # Errors
/// Those of [`lookup`] and [`choose`], [`Reason::NotService`] where the packet is none that a flow begins with,
/// [`Reason::FlowTableFull`], [`Reason::NoSourcePort`].
#[inline(always)]
pub fn open<T: Tables>(tables: &T, headers: &Headers, key: &Key, hit: &mut Hit) -> Result<(), Reason> {
    let mut backend = BackendSlot::blank();
    match balance(tables, headers, &mut backend) {
        Err(Reason::NotService) if is_shadowed(tables, headers) => {
            backend = BackendSlot { addr: headers.dst, port: headers.dport, flags: 0, id: NO_BACKEND };
        }
        chosen => chosen?,
    }
    let mut attempt = 0;
    while attempt < TRIES {
        attempt += 1;
        let source = tables.source_port(headers, &backend);
        if source.port == 0 {
            break;
        }
        match tables.open_by(headers, key, &backend, hit, source) {
            Opened::Yes => return Ok(()),
            Opened::PortTaken => (),
            Opened::TableFull => return Err(Reason::FlowTableFull),
        }
    }
    Err(Reason::NoSourcePort)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Opened {
    Yes,
    /// By another core, meanwhile.
    PortTaken,
    TableFull,
}

/// One attempt of [`open`], by a source port.
#[inline(always)]
pub fn open_by<T: Tables>(
    tables: &T,
    headers: &Headers,
    key: &Key,
    backend: &BackendSlot,
    hit: &mut Hit,
    source: SourcePort,
) -> Opened {
    let SourcePort { port, in_use } = source;
    if in_use {
        give_up(tables, headers, backend, port, hit);
    }
    match add_reverse(tables, headers, backend, port) {
        Added::New => match add_forward(tables, headers, key, backend, port) {
            Added::New => {
                negative::end(tables, backend.port, port);
                if backend.id == NO_BACKEND {
                    // What was shadowed was no Service's before.
                    negative::end(tables, headers.sport, headers.dport);
                }
                note(tables, headers, backend, port, hit);
                Opened::Yes
            }
            added => {
                withdraw(tables, headers, backend, port);
                // Another core opened the same flow meanwhile: its choice holds.
                if added == Added::Exists && found(tables, key, hit) { Opened::Yes } else { Opened::TableFull }
            }
        },
        Added::Exists => Opened::PortTaken,
        Added::Full => Opened::TableFull,
    }
}

// Functions of their own from here, so that no two of the entries and copies stand on the stack together.

#[cfg_attr(target_arch = "bpf", inline(never))]
fn balance<T: Tables>(tables: &T, headers: &Headers, backend: &mut BackendSlot) -> Result<(), Reason> {
    if tables.config().flags & CONFIG_TAKE_OVER != 0 && headers.protocol != UDP && !headers.is_syn() {
        return Err(Reason::NotService);
    }
    let frontend = lookup(tables, headers.dst, headers.dport, headers.protocol, false)?;
    let opens = headers.may_open();
    let client = Client { addr: headers.src, scope: scope(headers), is_known: true, opens };
    choose(tables, &frontend, &client, backend)?;
    if !opens {
        return Err(Reason::NotService);
    }
    if masquerades(tables, headers, &frontend, backend) {
        backend.flags |= MASQUERADED;
    } else if keeps_port(headers) {
        backend.flags |= PORT_KEPT;
    }
    Ok(())
}

/// Whether a connection of this node or its pods that is no Service's, and begins with this packet, would get no reply: a
/// flow has the same source port towards the same backend. It has to go by another one, as the kernel's connection
/// tracking does with it.
///
/// What comes in from the network is not asked: a packet that was translated in front of the stack looks just so.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn is_shadowed<T: Tables>(tables: &T, headers: &Headers) -> bool {
    let Headers { src, dst, sport, dport, protocol, .. } = *headers;
    if !is_given_out(tables, sport) || !(protocol == UDP || headers.is_syn()) || headers.is_icmp_error() {
        return false;
    }
    if headers.from == From::Network {
        return false;
    }
    if headers.from == From::Host {
        if tables.address(&src) & (ADDRESS_LOCAL | ADDRESS_NODE) == 0 {
            return false;
        }
        if tables.flows().count(&Key::masqueraded(dst, dport, sport, protocol)) != 0 {
            return true;
        }
    }
    tables.flows().count(&Key::new(dst, src, dport, sport, protocol)) != 0
}

/// A pod of another node is external to this one: a backend elsewhere would answer it directly, or not at all.
#[inline(always)]
fn scope(headers: &Headers) -> Scope {
    if headers.from == From::Network { Scope::External } else { Scope::Internal }
}

/// Whether the backend sees an address of this node: where its replies would not come back here by themselves, where
/// it is its own client, and where kube-proxy is told to (masqueradeAll, detectLocalMode).
#[inline(always)]
fn masquerades<T: Tables>(tables: &T, headers: &Headers, frontend: &Frontend, backend: &BackendSlot) -> bool {
    let flags = tables.config().flags;
    let cluster_ip = frontend.flags & FRONTEND_KIND == FRONTEND_CLUSTER_IP;
    match headers.from {
        From::Network => backend.flags & BACKEND_LOCAL == 0 || cluster_ip && flags & CONFIG_MASQUERADE_ALL != 0,
        From::Pod => {
            backend.addr == headers.src
                || cluster_ip
                    && (flags & CONFIG_MASQUERADE_ALL != 0
                        || flags & detects_pods(headers.src) != 0 && tables.cidr(headers.src) & CIDR_PODS == 0)
        }
        From::Host => false,
    }
}

/// The flag that says whether pods of this address's family can be told.
#[inline(always)]
fn detects_pods(addr: Addr) -> u32 {
    if addr.is_v4() { CONFIG_DETECT_PODS_V4 } else { CONFIG_DETECT_PODS_V6 }
}

/// A port that is to show its client's privilege, and SCTP's, which its checksum covers. Of UDP, 0 is none (RFC 768).
#[inline(always)]
fn keeps_port(headers: &Headers) -> bool {
    const PRIVILEGED: u16 = 1024;
    (1..PRIVILEGED).contains(&u16::from_be(headers.sport)) || headers.protocol == SCTP
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn add_reverse<T: Tables>(tables: &T, headers: &Headers, backend: &BackendSlot, port: u16) -> Added {
    let key = reverse_key(headers, backend, port);
    let mut reverse = Entry::reverse(key, headers.dst, headers.dport, headers.src, headers.sport, backend.id);
    reverse.set_state(first_state(headers));
    add(tables.flows(), &reverse, tables.now())
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn add_forward<T: Tables>(tables: &T, headers: &Headers, key: &Key, backend: &BackendSlot, port: u16) -> Added {
    let mut forward = Entry::forward(*key, backend.addr, backend.port, port, is_masqueraded(backend), backend.id);
    forward.set_state(first_state(headers));
    add(tables.flows(), &forward, tables.now())
}

/// What was just added, without looking for it.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn note<T: Tables>(tables: &T, headers: &Headers, backend: &BackendSlot, port: u16, hit: &mut Hit) {
    hit.set_forward(headers.dst, backend.addr, is_masqueraded(backend), backend.id);
    hit.port = backend.port;
    hit.second = port;
    hit.last = tables.now();
    hit.state = first_state(headers);
}

#[inline(always)]
const fn first_state(headers: &Headers) -> u8 {
    match headers.from {
        From::Host => TO_STACK,
        From::Network | From::Pod => 0,
    }
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn withdraw<T: Tables>(tables: &T, headers: &Headers, backend: &BackendSlot, port: u16) {
    tables.flows().remove(&reverse_key(headers, backend, port));
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn found<T: Tables>(tables: &T, key: &Key, hit: &mut Hit) -> bool {
    !find(tables.flows(), key, hit).is_null()
}

/// What a reply is found by; `port`: the source port that the backend sees.
#[inline(always)]
fn reverse_key(headers: &Headers, backend: &BackendSlot, port: u16) -> Key {
    if is_masqueraded(backend) {
        Key::masqueraded(backend.addr, backend.port, port, headers.protocol)
    } else {
        Key::new(backend.addr, headers.src, backend.port, port, headers.protocol)
    }
}

#[inline(always)]
const fn is_masqueraded(backend: &BackendSlot) -> bool {
    backend.flags & MASQUERADED != 0
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn give_up<T: Tables>(tables: &T, headers: &Headers, backend: &BackendSlot, port: u16, hit: &mut Hit) {
    let key = reverse_key(headers, backend, port);
    if found(tables, &key, hit) {
        tables.flows().close(&key, hit);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourcePort {
    /// Network byte order; 0 where none was found.
    pub port: u16,
    /// A flow has it that can be done without.
    pub in_use: bool,
}

/// A port for which no flow to the backend lives.
///
/// A flow that is over gives its port up. So does one whose client has not answered yet, where a few other ports are not free
/// either: where there is a handshake at its turn, when it has had the time in which all other ports were given out;
/// else, since a UDP flow may go one way for good, after more tries.
///
/// Where the client keeps its address, its own port is left to it when the others are taken: one client may have more
/// connections to a backend than there are ports to give out.
#[inline(always)]
pub fn source_port<T: Tables>(tables: &T, headers: &Headers, backend: &BackendSlot) -> SourcePort {
    let mut half_open = 0;
    let mut attempt = 0;
    while attempt <= PORT_TRIES {
        match tables.try_port(headers, backend, attempt, half_open != 0) {
            Trial { port, outcome: Outcome::Free } => return SourcePort { port, in_use: false },
            Trial { port, outcome: Outcome::Over } => return SourcePort { port, in_use: true },
            Trial { port, outcome: Outcome::HalfOpen } => half_open = port,
            Trial { outcome: Outcome::Taken, .. } => (),
            Trial { outcome: Outcome::Last, .. } => break,
        }
        attempt += 1;
    }
    SourcePort { port: half_open, in_use: true }
}

/// One step of [`source_port`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trial {
    /// Network byte order.
    pub port: u16,
    pub outcome: Outcome,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Outcome {
    Free,
    /// A flow has it that is over.
    Over,
    /// A flow has it whose client has not answered yet, which is to make room where no better one is found.
    HalfOpen,
    Taken,
    /// No port was tried, nor is another to be.
    Last,
}

/// Tries the port that is due at an attempt, counted from 0. `half_open`: one was met already that may make room.
#[inline(always)]
pub fn try_port<T: Tables>(
    tables: &T,
    headers: &Headers,
    backend: &BackendSlot,
    attempt: u32,
    half_open: bool,
) -> Trial {
    let masqueraded = is_masqueraded(backend);
    let tries = if masqueraded { PORT_TRIES } else { PORTS_AT_RANDOM };
    let grace = if headers.protocol == UDP { PORTS_AT_RANDOM } else { PORTS_OF_GRACE };
    let is_last = attempt >= tries;
    if is_last && (masqueraded || attempt > tries) || masqueraded && half_open && attempt >= grace {
        return Trial { port: 0, outcome: Outcome::Last };
    }
    let port = if is_last || attempt == 0 && backend.flags & PORT_KEPT != 0 {
        headers.sport
    } else {
        let (first, next) = port_range(tables, headers, backend);
        let range = next.wrapping_sub(first) as u32;
        let in_turn = !half_open && attempt < PORTS_IN_TURN && headers.protocol != UDP;
        let offset = if in_turn { next_in_turn(tables, range) } else { pick(tables.random(), range) };
        first.wrapping_add(offset as u16).to_be()
    };
    let outcome = match tables.flows().vacancy(&reverse_key(headers, backend, port), tables.now()) {
        Vacancy::Free => Outcome::Free,
        Vacancy::Over => Outcome::Over,
        Vacancy::HalfOpen if !half_open && !is_last => Outcome::HalfOpen,
        Vacancy::HalfOpen | Vacancy::Living => Outcome::Taken,
    };
    Trial { port, outcome }
}

/// The first port of the range, and the one after its last, in host byte order. Ports that a client's node gives out are none
/// that a backend's node does, since neither knows of the other's.
#[inline(always)]
fn port_range<T: Tables>(tables: &T, headers: &Headers, backend: &BackendSlot) -> (u16, u16) {
    let config = tables.config();
    let moved = config.first_moved_port();
    let middle = moved.wrapping_add(config.snat_last.wrapping_sub(moved) / 2);
    if is_masqueraded(backend) {
        (config.snat_first, moved)
    } else if headers.from == From::Network {
        (moved, middle)
    } else {
        (middle, config.snat_last)
    }
}

/// Whether the port, in network byte order, is one that we give out, and no client's own.
#[inline(always)]
pub fn is_given_out<T: Tables>(tables: &T, port: u16) -> bool {
    let config = tables.config();
    (config.snat_first..=config.snat_last).contains(&u16::from_be(port))
}

/// Less than `range`: each number once, in an order that only this node knows, then again from the start.
#[inline(always)]
fn next_in_turn<T: Tables>(tables: &T, range: u32) -> u32 {
    shuffle(tables.turn(), range, tables.config().flow_seed)
}
