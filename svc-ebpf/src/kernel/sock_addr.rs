//! The socket hooks. A v4-mapped address on an IPv6 socket is the same frontend as its IPv4 form.
use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use svc_common::map::{SocketPeer, TCP, UDP};
use svc_common::{Addr, Reason};
use svc_ebpf::Tables;
use svc_ebpf::socket::{self, Request};

use super::maps::Maps;
use super::monitor;

const PROCEED: i32 = 1;
const REFUSE: i32 = 0;
const EADDRINUSE: i32 = 98;
const ECONNREFUSED: i32 = 111;

#[inline(always)]
fn request(context: &SockAddrContext, v4: bool) -> Option<Request> {
    let at = context.sock_addr;
    // SAFETY: the program's own context; the verifier allows these fields to be read, a word at a time.
    unsafe {
        let protocol = (&raw const (*at).protocol).read_volatile() as u8;
        if protocol != TCP && protocol != UDP {
            return None;
        }
        let addr = if v4 {
            Addr::v4((&raw const (*at).user_ip4).read_volatile())
        } else {
            let words = (&raw const (*at).user_ip6).cast::<u32>();
            Addr([
                words.read_volatile(),
                words.add(1).read_volatile(),
                words.add(2).read_volatile(),
                words.add(3).read_volatile(),
            ])
        };
        let port = (&raw const (*at).user_port).read_volatile() as u16;
        let context = context.as_ptr();
        Some(Request {
            cookie: bpf_get_socket_cookie(context),
            netns: bpf_get_netns_cookie(context),
            addr,
            port,
            protocol,
        })
    }
}

#[inline(always)]
fn point_to(context: &SockAddrContext, v4: bool, peer: &SocketPeer) {
    let at = context.sock_addr;
    // SAFETY: as above, for writing.
    unsafe {
        if v4 {
            (&raw mut (*at).user_ip4).write_volatile(peer.addr.0[3]);
        } else {
            let words = (&raw mut (*at).user_ip6).cast::<u32>();
            words.write_volatile(peer.addr.0[0]);
            words.add(1).write_volatile(peer.addr.0[1]);
            words.add(2).write_volatile(peer.addr.0[2]);
            words.add(3).write_volatile(peer.addr.0[3]);
        }
        (&raw mut (*at).user_port).write_volatile(peer.port as u32);
    }
}

#[inline(always)]
fn settle(context: &SockAddrContext, v4: bool, request: &Request, answer: Result<SocketPeer, Reason>) -> i32 {
    match answer {
        Ok(peer) => {
            point_to(context, v4, &peer);
            PROCEED
        }
        Err(reason @ (Reason::NoBackend | Reason::UnknownPort)) => {
            Maps.count(Reason::SocketRefused, 0);
            Maps.count(reason, 0);
            monitor::turned_down(request, reason);
            // SAFETY: a plain value.
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            REFUSE
        }
        Err(_) => PROCEED,
    }
}

#[inline(always)]
fn bind(context: &SockAddrContext, v4: bool) -> i32 {
    let Some(request) = request(context, v4) else { return PROCEED };
    if socket::may_bind(&Maps, &request) {
        return PROCEED;
    }
    Maps.count(Reason::BindRefused, 0);
    monitor::turned_down(&request, Reason::BindRefused);
    // SAFETY: a plain value.
    unsafe { bpf_set_retval(-EADDRINUSE) };
    REFUSE
}

#[inline(always)]
fn connect(context: &SockAddrContext, v4: bool) -> i32 {
    let Some(request) = request(context, v4) else { return PROCEED };
    settle(context, v4, &request, socket::connect(&Maps, &request))
}

#[inline(always)]
fn send(context: &SockAddrContext, v4: bool) -> i32 {
    let Some(request) = request(context, v4) else { return PROCEED };
    settle(context, v4, &request, socket::send(&Maps, &request))
}

#[inline(always)]
fn disguise(context: &SockAddrContext, v4: bool) -> i32 {
    if let Some(request) = request(context, v4)
        && let Some(peer) = socket::asked_for(&Maps, &request)
    {
        point_to(context, v4, &peer);
    }
    PROCEED
}

#[cgroup_sock_addr(connect4)]
pub fn svc_connect4(context: SockAddrContext) -> i32 {
    connect(&context, true)
}

#[cgroup_sock_addr(connect6)]
pub fn svc_connect6(context: SockAddrContext) -> i32 {
    connect(&context, false)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn svc_sendmsg4(context: SockAddrContext) -> i32 {
    send(&context, true)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn svc_sendmsg6(context: SockAddrContext) -> i32 {
    send(&context, false)
}

#[cgroup_sock_addr(bind4)]
pub fn svc_bind4(context: SockAddrContext) -> i32 {
    bind(&context, true)
}

#[cgroup_sock_addr(bind6)]
pub fn svc_bind6(context: SockAddrContext) -> i32 {
    bind(&context, false)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn svc_recvmsg4(context: SockAddrContext) -> i32 {
    disguise(&context, true)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn svc_recvmsg6(context: SockAddrContext) -> i32 {
    disguise(&context, false)
}

#[cgroup_sock_addr(getpeername4)]
pub fn svc_getpeername4(context: SockAddrContext) -> i32 {
    disguise(&context, true)
}

#[cgroup_sock_addr(getpeername6)]
pub fn svc_getpeername6(context: SockAddrContext) -> i32 {
    disguise(&context, false)
}
