//! From a destination to a backend.
use svc_common::map::{
    ADDRESS_CLUSTER_IP, ADDRESS_NODE, BackendSlot, FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_LOCAL,
    FRONTEND_INTERNAL_LOCAL, FRONTEND_KIND, Frontend, FrontendKey, cluster_set, local_set,
};
use svc_common::select::pick;
use svc_common::{Addr, Reason};

use crate::tables::{BackendSet, Tables};

/// Where the client is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// A process of this node or of one of its pods. A pod or node that asks for an external address is short-cut to all
    /// backends, as kube-proxy does it.
    Internal,
    /// The network.
    External,
}

/// The frontend that `addr`:`port` is, if it is one. `port` in network byte order; `loopback`: a loopback address means
/// this node's ports.
///
/// # Errors
/// [`Reason::UnknownPort`] where the address is a ClusterIP that has no such port.
#[inline(always)]
pub fn lookup<T: Tables>(
    tables: &T,
    addr: Addr,
    port: u16,
    protocol: u8,
    loopback: bool,
) -> Result<Option<Frontend>, Reason> {
    if let Some(frontend) = tables.frontend(&FrontendKey::new(addr, port, protocol)) {
        return Ok(Some(frontend));
    }
    let flags = tables.address(&addr);
    if flags & ADDRESS_NODE != 0 || (loopback && addr.is_loopback()) {
        let node_port = tables.frontend(&FrontendKey::new(addr.any(), port, protocol));
        if node_port.is_some() {
            return Ok(node_port);
        }
    }
    if flags & ADDRESS_CLUSTER_IP != 0 { Err(Reason::UnknownPort) } else { Ok(None) }
}

/// One of the frontend's backends.
///
/// # Errors
/// [`Reason::NoBackend`] where there is none (a reject), [`Reason::NoLocalBackend`] where the policy is Local and there
/// are some on other nodes only (a drop).
#[inline(always)]
pub fn choose<T: Tables>(tables: &T, frontend: &Frontend, scope: Scope) -> Result<BackendSlot, Reason> {
    let local = if frontend.flags & FRONTEND_KIND == FRONTEND_CLUSTER_IP {
        frontend.flags & FRONTEND_INTERNAL_LOCAL != 0
    } else {
        scope == Scope::External && frontend.flags & FRONTEND_EXTERNAL_LOCAL != 0
    };
    let set = if local { local_set(frontend.service) } else { cluster_set(frontend.service) };
    if let Some(backend) = one_of(tables, set) {
        return Ok(backend);
    }
    if local && one_of(tables, cluster_set(frontend.service)).is_some() {
        return Err(Reason::NoLocalBackend);
    }
    Err(Reason::NoBackend)
}

#[inline(always)]
fn one_of<T: Tables>(tables: &T, set: u32) -> Option<BackendSlot> {
    let set = tables.backend_set(set)?;
    let count = set.slot(0)?.id;
    if count == 0 {
        return None;
    }
    set.slot(1 + pick(tables.random(), count))
}
