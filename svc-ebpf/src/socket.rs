//! Pointing a socket at a backend, so that none of its packets needs a translation.
use svc_common::map::{BackendSlot, SOCKET_REVERSE, SOCKET_STICKY, SocketKey, SocketPeer};
use svc_common::{Addr, Reason};

use crate::service::{Scope, choose, lookup};
use crate::tables::{Sockets, Tables};

/// What a socket hook knows of the socket and of the address it was given. Ports in network byte order.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub cookie: u64,
    pub netns: u64,
    pub addr: Addr,
    pub port: u16,
    pub protocol: u8,
}

/// Where `connect()` is to go instead; `None` where the address is no frontend.
///
/// # Errors
/// Why the connection is refused.
#[inline(always)]
pub fn connect<T: Tables + Sockets>(tables: &T, request: &Request) -> Result<Option<SocketPeer>, Reason> {
    let peer = balance(tables, request)?;
    if peer.is_some() {
        tables.count(Reason::SocketConnected, 0);
    }
    Ok(peer)
}

/// Where one datagram of an unconnected socket is to go instead: as long as it lives, to the backend that the socket's
/// last datagram to this frontend went to.
///
/// # Errors
/// Why the datagram is refused.
#[inline(always)]
pub fn send<T: Tables + Sockets>(tables: &T, request: &Request) -> Result<Option<SocketPeer>, Reason> {
    let sticky = key(request, SOCKET_STICKY);
    if let Some(peer) = tables.peer(&sticky)
        && tables.is_live(peer.backend)
    {
        tables.count(Reason::SocketDatagram, 0);
        return Ok(Some(peer));
    }
    let peer = balance(tables, request)?;
    if let Some(peer) = &peer {
        tables.set_peer(&sticky, peer);
        tables.count(Reason::SocketDatagram, 0);
    }
    Ok(peer)
}

/// The frontend that the socket asked for, where `request`'s address is the backend that it got.
#[inline(always)]
pub fn asked_for<T: Sockets>(tables: &T, request: &Request) -> Option<SocketPeer> {
    tables.peer(&key(request, SOCKET_REVERSE))
}

#[inline(always)]
fn balance<T: Tables + Sockets>(tables: &T, request: &Request) -> Result<Option<SocketPeer>, Reason> {
    let loopback = request.netns == tables.config().host_netns;
    let Some(frontend) = lookup(tables, request.addr, request.port, request.protocol, loopback)? else {
        return Ok(None);
    };
    let BackendSlot { addr, port, id, .. } = choose(tables, &frontend, Scope::Internal)?;
    let reverse = SocketKey { addr, port, ..key(request, SOCKET_REVERSE) };
    tables.set_peer(&reverse, &SocketPeer { addr: request.addr, port: request.port, pad: 0, backend: id });
    Ok(Some(SocketPeer { addr, port, pad: 0, backend: id }))
}

#[inline(always)]
const fn key(request: &Request, kind: u8) -> SocketKey {
    SocketKey {
        cookie: request.cookie,
        addr: request.addr,
        port: request.port,
        protocol: request.protocol,
        kind,
        pad: 0,
    }
}
