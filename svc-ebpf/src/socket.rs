//! Pointing a socket at a backend, so that none of its packets needs a translation; and which ports it may bind.
use svc_common::map::{
    ADDRESS_NODE, BackendSlot, CONFIG_HOST_SOCKETS_ONLY, FrontendKey, SOCKET_REVERSE, SOCKET_STICKY, SocketKey,
    SocketPeer,
};
use svc_common::{Addr, Reason};

use crate::service::{Client, Scope, choose, lookup};
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

/// Where `connect()` is to go instead.
///
/// # Errors
/// [`Reason::NoBackend`] and [`Reason::UnknownPort`] where the connection is to be refused. All others: the socket is left
/// alone, and its packets are judged on their way, which alone can drop them in silence or know their source.
#[inline(always)]
pub fn connect<T: Tables + Sockets>(tables: &T, request: &Request) -> Result<SocketPeer, Reason> {
    balance(tables, request).inspect(|peer| {
        tables.count(Reason::SocketConnected, 0);
        tables.pointed(request, peer, Reason::SocketConnected);
    })
}

/// Where one datagram of an unconnected socket is to go instead: as long as it lives, to the backend that the socket's
/// last datagram to this frontend went to.
///
/// # Errors
/// As [`connect`].
#[inline(always)]
pub fn send<T: Tables + Sockets>(tables: &T, request: &Request) -> Result<SocketPeer, Reason> {
    let sticky = key(request, SOCKET_STICKY);
    if let Some(peer) = tables.peer(&sticky)
        && tables.is_live(peer.backend)
    {
        tables.count(Reason::SocketDatagram, 0);
        return Ok(peer);
    }
    let peer = balance(tables, request)?;
    tables.set_peer(&sticky, &peer);
    tables.count(Reason::SocketDatagram, 0);
    tables.pointed(request, &peer, Reason::SocketDatagram);
    Ok(peer)
}

/// The frontend that the socket asked for, where `request`'s address is the backend that it got.
#[inline(always)]
pub fn asked_for<T: Sockets>(tables: &T, request: &Request) -> Option<SocketPeer> {
    tables.peer(&key(request, SOCKET_REVERSE))
}

/// Whether a socket of the node may have the address and port of `request`: not where connections to them are a NodePort's,
/// of which it would never get one.
///
/// A socket bound to `::` may be of both families, which it does not tell here: it is asked for both.
#[inline(always)]
pub fn may_bind<T: Tables>(tables: &T, request: &Request) -> bool {
    let Request { addr, port, protocol, .. } = *request;
    if port == 0 || request.netns != tables.config().host_netns {
        return true;
    }
    let any = addr.any();
    let answers = addr == any || addr.is_loopback() || tables.address(&addr) & ADDRESS_NODE != 0;
    let is_node_port = |any: Addr| tables.frontend(&FrontendKey::new(any, port, protocol)).is_some();
    !(answers && is_node_port(any) || addr == Addr::ANY_V6 && is_node_port(Addr::ANY_V4))
}

#[inline(always)]
fn balance<T: Tables + Sockets>(tables: &T, request: &Request) -> Result<SocketPeer, Reason> {
    let config = tables.config();
    let host = request.netns == config.host_netns;
    if !host && config.flags & CONFIG_HOST_SOCKETS_ONLY != 0 {
        return Err(Reason::NotService);
    }
    let frontend = lookup(tables, request.addr, request.port, request.protocol, host)?;
    let client = Client { addr: Addr::of_netns(request.netns), scope: Scope::Internal, is_known: false, opens: true };
    let mut backend = BackendSlot::default();
    choose(tables, &frontend, &client, &mut backend)?;
    let BackendSlot { addr, port, id, .. } = backend;
    let reverse = SocketKey { addr, port, ..key(request, SOCKET_REVERSE) };
    tables.set_peer(&reverse, &SocketPeer { addr: request.addr, port: request.port, pad: 0, backend: id });
    Ok(SocketPeer { addr, port, pad: 0, backend: id })
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
