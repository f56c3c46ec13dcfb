//! The next hop, from the kernel's own routing and neighbour tables.
use core::ffi::c_void;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Params,
};
use aya_ebpf::helpers::bpf_fib_lookup;
use svc_common::verifier::zeros;
use svc_common::{Addr, Reason};
use svc_ebpf::Tables;
use svc_ebpf::forward::{Hop, source};
use svc_ebpf::parse::Headers;

use super::{bare, hops};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The way to `dst`, as it is kept or from the kernel. `length`: as in [`route`]; `interface`: by which the packet came in.
#[inline(always)]
pub(super) fn way<T: Tables>(
    context: *mut c_void,
    tables: &T,
    length: u16,
    interface: u32,
    headers: &Headers,
    dst: &Addr,
    hop: &mut Hop,
) -> Result<(), Reason> {
    hop.ifindex = interface;
    let moment = hops::moment();
    if hops::find(moment, dst, length, hop) {
        return Ok(());
    }
    route(context, length, headers, dst, hop)?;
    hop.source = source(tables, dst.is_v4(), hop.ifindex);
    let is_bare = bare::is_bare(hop.ifindex);
    if is_bare {
        // Of such a neighbour the kernel tells the tunnel's own address, if any.
        hop.macs = [0; 6];
    }
    // Without a length the MTU is another one.
    if length != 0 && (is_bare || hop.is_resolved()) {
        hops::keep(moment, dst, interface, hop);
    }
    Ok(())
}

/// Asks for a packet that came in by `hop.ifindex`. `length`: the packet's without its link header, or 0 not to have it
/// compared with the next link's MTU.
///
/// A function of its own: its parameters and the engine's variables together would not fit one stack frame.
#[inline(never)]
pub(super) fn route(
    context: *mut c_void,
    length: u16,
    headers: &Headers,
    dst: &Addr,
    hop: &mut Hop,
) -> Result<(), Reason> {
    let v4 = dst.is_v4();
    // SAFETY: all zeros is a value of this plain struct.
    let mut params: Params = unsafe { core::mem::transmute(zeros::<{ size_of::<Params>() / 8 }>()) };
    params.l4_protocol = headers.protocol;
    params.sport = headers.sport;
    params.dport = headers.dport;
    params.__bindgen_anon_1.tot_len = length;
    params.ifindex = hop.ifindex;
    if v4 {
        params.family = AF_INET;
        params.__bindgen_anon_3.ipv4_src = headers.src.0[3];
        params.__bindgen_anon_4.ipv4_dst = dst.0[3];
    } else {
        params.family = AF_INET6;
        params.__bindgen_anon_3.ipv6_src = headers.src.0;
        params.__bindgen_anon_4.ipv6_dst = dst.0;
    }
    // SAFETY: the context is the program's own and `params` outlives the call.
    let answer = unsafe { bpf_fib_lookup(context, &raw mut params, size_of::<Params>() as i32, 0) } as u32;
    // SAFETY: the kernel has put the MTU there (since 5.12) where it was given a length.
    let mtu = unsafe { params.__bindgen_anon_1.mtu_result };
    match answer {
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH => {}
        BPF_FIB_LKUP_RET_FRAG_NEEDED => {
            hop.mtu = mtu;
            return Err(Reason::TooBig);
        }
        _ => return Err(Reason::NoRoute),
    }
    let macs = if answer == BPF_FIB_LKUP_RET_SUCCESS {
        let (d, s) = (params.dmac, params.smac);
        [
            u16::from_ne_bytes([d[0], d[1]]),
            u16::from_ne_bytes([d[2], d[3]]),
            u16::from_ne_bytes([d[4], d[5]]),
            u16::from_ne_bytes([s[0], s[1]]),
            u16::from_ne_bytes([s[2], s[3]]),
            u16::from_ne_bytes([s[4], s[5]]),
        ]
    } else {
        [0; 6]
    };
    hop.ifindex = params.ifindex;
    hop.macs = macs;
    hop.mtu = mtu;
    Ok(())
}
