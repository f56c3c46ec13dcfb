//! The node's own sockets.
use core::ffi::c_void;

use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, bpf_sock, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as V4, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as V6,
};
use aya_ebpf::helpers::{bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release};
use svc_common::map::{SCTP, TCP};
use svc_ebpf::packet::Peer;

/// See [`svc_ebpf::packet::Packet::has_socket`]. The kernel has no look-up of SCTP's sockets.
///
/// A function of its own: the tuple and the engine's variables together would not fit one stack frame.
#[inline(never)]
pub(super) fn has_socket(context: *mut c_void, protocol: u8, remote: Peer, local: Peer) -> bool {
    if protocol == SCTP {
        return false;
    }
    // The size is a constant in each call, since the verifier is to know it.
    if remote.addr.is_v4() {
        let ipv4 = V4 { saddr: remote.addr.0[3], daddr: local.addr.0[3], sport: remote.port, dport: local.port };
        find::<V4>(context, protocol, &bpf_sock_tuple__bindgen_ty_1 { ipv4 })
    } else {
        let ipv6 = V6 { saddr: remote.addr.0, daddr: local.addr.0, sport: remote.port, dport: local.port };
        find::<V6>(context, protocol, &bpf_sock_tuple__bindgen_ty_1 { ipv6 })
    }
}

#[inline(always)]
fn find<T>(context: *mut c_void, protocol: u8, tuple: &bpf_sock_tuple__bindgen_ty_1) -> bool {
    let tuple = core::ptr::from_ref(tuple).cast_mut().cast::<bpf_sock_tuple>();
    let netns = BPF_F_CURRENT_NETNS as u64;
    // SAFETY: the context is the program's own, the tuple outlives the call, and what was found is given back.
    unsafe {
        let socket: *mut bpf_sock = if protocol == TCP {
            bpf_sk_lookup_tcp(context, tuple, size_of::<T>() as u32, netns, 0)
        } else {
            bpf_sk_lookup_udp(context, tuple, size_of::<T>() as u32, netns, 0)
        };
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket.cast());
    }
    true
}
