//! From a destination to a backend.
use svc_common::map::{
    ADDRESS_CLUSTER_IP, ADDRESS_NODE, Affinity, AffinityKey, BackendSlot, CIDR_SERVICES, FRONTEND_CLUSTER_IP,
    FRONTEND_EXTERNAL_LOCAL, FRONTEND_INTERNAL_LOCAL, FRONTEND_KIND, FRONTEND_SOURCE_RANGES, Frontend, FrontendKey,
    cluster_set, local_set,
};
use svc_common::select::pick;
use svc_common::{Addr, Reason};

use crate::tables::{BackendSet, Tables};

/// Where the client is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// This node or a pod of it. Where that asks for an external address it is short-cut to all backends, as kube-proxy does it.
    Internal,
    /// The network, other nodes' pods among it.
    External,
}

#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// What session affinity knows it by.
    pub addr: Addr,
    pub scope: Scope,
    /// `addr` is the source address that its packets have: source ranges can be judged by it.
    pub is_known: bool,
    /// It opens a connection, which session affinity is to remember.
    pub opens: bool,
}

/// The frontend that `addr`:`port` is. `port` in network byte order; `loopback`: a loopback address means
/// this node's ports.
///
/// # Errors
/// [`Reason::NotService`] where it is none, [`Reason::UnknownPort`] where the address is a ClusterIP that has no such port,
/// [`Reason::UnallocatedAddress`] where no Service has it though it is set aside for them.
#[inline(always)]
pub fn lookup<T: Tables>(tables: &T, addr: Addr, port: u16, protocol: u8, loopback: bool) -> Result<Frontend, Reason> {
    let flags = if loopback && addr.is_loopback() { ADDRESS_NODE } else { tables.address(&addr) };
    if flags == 0 {
        let unallocated = tables.cidr(addr) & CIDR_SERVICES != 0;
        return Err(if unallocated { Reason::UnallocatedAddress } else { Reason::NotService });
    }
    if let Some(frontend) = tables.frontend(&FrontendKey::new(addr, port, protocol)) {
        return Ok(frontend);
    }
    if flags & ADDRESS_NODE != 0
        && let Some(node_port) = tables.frontend(&FrontendKey::new(addr.any(), port, protocol))
    {
        return Ok(node_port);
    }
    Err(if flags & ADDRESS_CLUSTER_IP != 0 { Reason::UnknownPort } else { Reason::NotService })
}

/// One of the frontend's backends, into `backend`.
///
/// # Errors
/// [`Reason::NoBackend`] where there is none (a reject), [`Reason::NoLocalBackend`] where the policy is Local and there
/// are some on other nodes only (a drop), [`Reason::SourceRange`] (a drop).
#[inline(always)]
pub fn choose<T: Tables>(
    tables: &T,
    frontend: &Frontend,
    client: &Client,
    backend: &mut BackendSlot,
) -> Result<(), Reason> {
    if frontend.flags & FRONTEND_SOURCE_RANGES != 0
        && !(client.is_known && tables.is_admitted(frontend.service, client.addr))
    {
        return Err(Reason::SourceRange);
    }
    let local = is_local(frontend, client.scope);
    let set = if local { local_set(frontend.service) } else { cluster_set(frontend.service) };
    if pick_from(tables, set, frontend, client, backend) {
        return Ok(());
    }
    if local && count(tables, cluster_set(frontend.service)) > 0 {
        return Err(Reason::NoLocalBackend);
    }
    Err(Reason::NoBackend)
}

/// Whether the traffic policy leaves a client of this scope the node's own backends only.
#[inline(always)]
pub fn is_local(frontend: &Frontend, scope: Scope) -> bool {
    if frontend.flags & FRONTEND_KIND == FRONTEND_CLUSTER_IP {
        frontend.flags & FRONTEND_INTERNAL_LOCAL != 0
    } else {
        scope == Scope::External && frontend.flags & FRONTEND_EXTERNAL_LOCAL != 0
    }
}

#[inline(always)]
fn count<T: Tables>(tables: &T, set: u32) -> u32 {
    tables.backend_set(set).and_then(|set| set.slot(0)).map_or(0, |header| header.id)
}

#[inline(always)]
fn pick_from<T: Tables>(tables: &T, set: u32, frontend: &Frontend, client: &Client, backend: &mut BackendSlot) -> bool {
    let Some(set) = tables.backend_set(set) else { return false };
    let Some(header) = set.slot(0) else { return false };
    if header.id == 0 {
        return false;
    }
    if frontend.affinity_seconds == 0 {
        return read(set, 1 + pick(tables.random(), header.id), backend);
    }
    pick_with_affinity(tables, set, header.id, frontend, client, backend)
}

/// ClientIP session affinity: the backend of the client's last connection, while that is in the set and the last one was
/// not longer ago than the timeout.
#[inline(always)]
fn pick_with_affinity<T: Tables>(
    tables: &T,
    set: &T::Set,
    count: u32,
    frontend: &Frontend,
    client: &Client,
    backend: &mut BackendSlot,
) -> bool {
    let key = AffinityKey { service: frontend.service, pad: 0, client: client.addr };
    let now = tables.seconds();
    let kept = match tables.affinity(&key) {
        Some(last) if now.wrapping_sub(last.last) <= frontend.affinity_seconds => {
            find_in(set, count, last.backend, backend)
        }
        _ => false,
    };
    if !kept && !read(set, 1 + pick(tables.random(), count), backend) {
        return false;
    }
    if client.opens {
        tables.set_affinity(&key, Affinity { backend: backend.id, last: now });
    }
    true
}

#[inline(always)]
fn read<S: BackendSet>(set: &S, index: u32, backend: &mut BackendSlot) -> bool {
    match set.slot(index) {
        Some(slot) => {
            *backend = slot;
            true
        }
        None => false,
    }
}

/// Binary logarithm of the largest set that is searched.
const SEARCH: u32 = 17;

/// The backend with this id, in a set that is in the order of ids.
#[inline(always)]
fn find_in<S: BackendSet>(set: &S, count: u32, id: u32, backend: &mut BackendSlot) -> bool {
    // The first slot whose id is not less is in `low..=high`.
    let (mut low, mut high) = (1, count);
    let mut step = 0;
    while step < SEARCH && low < high {
        let middle = (low + high) / 2;
        let Some(slot) = set.slot(middle) else { return false };
        if slot.id < id {
            low = middle + 1;
        } else {
            high = middle;
        }
        step += 1;
    }
    read(set, low, backend) && backend.id == id
}
