//! Opening a flow: both of its cells, and a source port where it needs one.
use svc_common::Reason;
use svc_common::flow::{Added, Entry, Hit, Key, add, find, remove};
use svc_common::map::{BACKEND_LOCAL, BackendSlot, Config};
use svc_common::select::pick;

use crate::parse::Headers;
use crate::tables::Tables;

/// Source ports to try before a newcomer is turned away.
const TRIES: u32 = 8;

/// Opens the flow of `headers`, whose key is `key`, towards `backend`; what its packets need stands in `hit` then.
///
/// The client's address stays where the backend is on this node and replies pass by here; elsewhere it becomes this
/// node's. The client's port stays unless another flow to the same backend has it already.
///
/// # Errors
/// [`Reason::FlowTableFull`], [`Reason::NoSourcePort`].
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn open<T: Tables>(
    tables: &T,
    headers: &Headers,
    key: &Key,
    backend: &BackendSlot,
    hit: &mut Hit,
) -> Result<(), Reason> {
    let now = tables.now();
    let config = tables.config();
    let masquerade = backend.flags & BACKEND_LOCAL == 0;
    let mut port = if masquerade { source_port(&config, tables.random()) } else { headers.sport };
    let mut attempt = 0;
    while attempt < TRIES {
        attempt += 1;
        let reverse_key = if masquerade {
            Key::masqueraded(backend.addr, backend.port, port, headers.protocol)
        } else {
            Key::new(backend.addr, headers.src, backend.port, port, headers.protocol)
        };
        let reverse = Entry::reverse(reverse_key, headers.dst, headers.dport, headers.src, headers.sport, backend.id);
        match add(tables.flows(), &reverse, now) {
            Added::New => {
                let forward = Entry::forward(*key, backend.addr, backend.port, port, masquerade, backend.id);
                let added = add(tables.flows(), &forward, now);
                if added == Added::New {
                    *hit = forward.hit(now);
                    return Ok(());
                }
                remove(tables.flows(), &reverse_key);
                // Another core opened the same flow meanwhile: its choice holds.
                if added == Added::Exists && !find(tables.flows(), key, hit).is_null() {
                    return Ok(());
                }
                return Err(Reason::FlowTableFull);
            }
            Added::Exists => port = source_port(&config, tables.random()),
            Added::Full => return Err(Reason::FlowTableFull),
        }
    }
    Err(Reason::NoSourcePort)
}

/// Network byte order.
#[inline(always)]
fn source_port(config: &Config, random: u32) -> u16 {
    let range = config.snat_last.wrapping_sub(config.snat_first) as u32 + 1;
    config.snat_first.wrapping_add(pick(random, range) as u16).to_be()
}
