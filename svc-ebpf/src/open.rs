//! Opening a flow: both of its cells, and a source port where it needs one.
use svc_common::Reason;
use svc_common::flow::{Added, Entry, Hit, Key, Memory, add, find};
use svc_common::map::{BACKEND_LOCAL, BackendSlot};
use svc_common::select::pick;

use crate::parse::Headers;
use crate::service::{Scope, choose, lookup};
use crate::tables::Tables;

/// Source ports to try before a newcomer is turned away.
const TRIES: u32 = 8;

/// Opens the flow of `headers`, whose key is `key`, towards one of its frontend's backends; what its packets need
/// stands in `hit` then.
///
/// The client's address stays where the backend is on this node and replies pass by here; elsewhere it becomes this
/// node's. The client's port stays unless another flow to the same backend has it already.
///
/// # Errors
/// Those of [`lookup`] and [`choose`], [`Reason::FlowTableFull`], [`Reason::NoSourcePort`].
#[inline(always)]
pub fn open<T: Tables>(tables: &T, headers: &Headers, key: &Key, hit: &mut Hit) -> Result<(), Reason> {
    let mut backend = BackendSlot::default();
    balance(tables, headers, &mut backend)?;
    let mut port = if is_masqueraded(&backend) { source_port(tables) } else { headers.sport };
    let mut attempt = 0;
    while attempt < TRIES {
        attempt += 1;
        match add_reverse(tables, headers, &backend, port) {
            Added::New => {
                return match add_forward(tables, key, &backend, port, hit) {
                    Added::New => Ok(()),
                    added => {
                        withdraw(tables, headers, &backend, port);
                        // Another core opened the same flow meanwhile: its choice holds.
                        if added == Added::Exists && found(tables, key, hit) {
                            Ok(())
                        } else {
                            Err(Reason::FlowTableFull)
                        }
                    }
                };
            }
            Added::Exists => port = source_port(tables),
            Added::Full => return Err(Reason::FlowTableFull),
        }
    }
    Err(Reason::NoSourcePort)
}

// Functions of their own from here, so that no two of the entries and copies stand on the stack together.

#[cfg_attr(target_arch = "bpf", inline(never))]
fn balance<T: Tables>(tables: &T, headers: &Headers, backend: &mut BackendSlot) -> Result<(), Reason> {
    let frontend = lookup(tables, headers.dst, headers.dport, headers.protocol, false)?;
    *backend = choose(tables, &frontend, Scope::External)?;
    Ok(())
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn add_reverse<T: Tables>(tables: &T, headers: &Headers, backend: &BackendSlot, port: u16) -> Added {
    let key = reverse_key(headers, backend, port);
    let reverse = Entry::reverse(key, headers.dst, headers.dport, headers.src, headers.sport, backend.id);
    add(tables.flows(), &reverse, tables.now())
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn add_forward<T: Tables>(tables: &T, key: &Key, backend: &BackendSlot, port: u16, hit: &mut Hit) -> Added {
    let now = tables.now();
    let forward = Entry::forward(*key, backend.addr, backend.port, port, is_masqueraded(backend), backend.id);
    let added = add(tables.flows(), &forward, now);
    if added == Added::New {
        *hit = forward.hit(now);
    }
    added
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
    backend.flags & BACKEND_LOCAL == 0
}

/// Network byte order.
#[inline(always)]
fn source_port<T: Tables>(tables: &T) -> u16 {
    let config = tables.config();
    let range = config.snat_last.wrapping_sub(config.snat_first) as u32 + 1;
    config.snat_first.wrapping_add(pick(tables.random(), range) as u16).to_be()
}
