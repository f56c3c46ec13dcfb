//! In the stack: the uplink's ingress, where all that XDP left is done, and its egress, where replies leave.
use aya_ebpf::bindings::{
    BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1,
};
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_neigh, bpf_skb_change_tail};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use svc_common::Reason;
use svc_common::checksum::{Diff, fold};
use svc_ebpf::family::ETHERNET;
use svc_ebpf::forward::{Hop, Query};
use svc_ebpf::packet::{Packet, Pod, Resize};
use svc_ebpf::{Action, Tables, reject, uplink};

use super::maps::{Maps, keep_services};
use super::{at, route};

/// Not judged here: the next program, or the stack, goes on with it.
const NEXT: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT as i32;

/// Link, IPv6 and TCP headers: what has to be in the linear part of the buffer.
const HEADERS: u32 = ETHERNET as u32 + 40 + 20;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

struct Skb<'a>(&'a TcContext);

impl Skb<'_> {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the program's own context.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).gso_segs > 1 }
    }
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn get<T: Pod>(&self, offset: usize) -> Result<T, Reason> {
        // SAFETY: checked against the packet's end; `Pod` takes any bytes.
        Ok(unsafe { at::<T>(self.0.data(), self.0.data_end(), offset)?.read_unaligned() })
    }

    #[inline(always)]
    fn set<T: Pod>(&mut self, offset: usize, value: T) -> Result<(), Reason> {
        // SAFETY: as in `get`.
        unsafe { at::<T>(self.0.data(), self.0.data_end(), offset)?.write_unaligned(value) };
        Ok(())
    }

    #[inline(always)]
    fn size(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn patch_l3(&mut self, offset: usize, diff: Diff) -> Result<(), Reason> {
        self.0.l3_csum_replace(offset, 0, fold(diff.0) as u64, 0).map_err(|_| Reason::HelperFailed)
    }

    #[inline(always)]
    fn patch_l4(&mut self, offset: usize, addresses: Diff, ports: Diff, udp: bool) -> Result<(), Reason> {
        let flags = if udp { BPF_F_MARK_MANGLED_0 as u64 } else { 0 };
        self.0
            .l4_csum_replace(offset, 0, fold(addresses.0) as u64, flags | BPF_F_PSEUDO_HDR as u64)
            .and_then(|()| self.0.l4_csum_replace(offset, 0, fold(ports.0) as u64, flags))
            .map_err(|_| Reason::HelperFailed)
    }

    #[inline(always)]
    fn route(&mut self, query: &Query) -> Result<Hop, Reason> {
        // Segments are cut to the next link's size by the stack.
        let length = if self.is_gso() { 0 } else { self.size().wrapping_sub(ETHERNET as u32) as u16 };
        route::route(self.0, self.ifindex(), length, query)
    }
}

impl Resize for Skb<'_> {
    #[inline(always)]
    fn resize(&mut self, len: u32) -> Result<(), Reason> {
        // SAFETY: the program's own context.
        if unsafe { bpf_skb_change_tail(self.0.skb.skb, len, 0) } == 0 { Ok(()) } else { Err(Reason::HelperFailed) }
    }

    #[inline(always)]
    fn set_l4_checksum(&mut self, offset: usize, pseudo: u16, full: u16) -> Result<(), Reason> {
        self.set(offset, pseudo)?;
        // The helper leaves the field alone where the summing is still to come (CHECKSUM_PARTIAL), and nothing else tells
        // whether it is; else it takes the field from `pseudo` to `full`.
        let diff = (!full) as u64 + pseudo as u64;
        self.0.l4_csum_replace(offset, 0, fold(diff) as u64, 0).map_err(|_| Reason::HelperFailed)
    }
}

#[inline(always)]
fn linear(context: &TcContext) {
    let len = context.len();
    if context.data() + (HEADERS as usize) > context.data_end() {
        // Where it fails the packet is too short, which the engine finds by itself.
        let _ = context.pull_data(if len < HEADERS { len } else { HEADERS });
    }
}

#[inline(always)]
fn transmit(hop: &Hop) -> i32 {
    // SAFETY: plain values; the neighbour outlives the call.
    unsafe {
        if hop.is_resolved() {
            return bpf_redirect(hop.ifindex, 0) as i32;
        }
        let mut neighbour = if hop.gateway.is_v4() {
            bpf_redir_neigh {
                nh_family: AF_INET,
                __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: [hop.gateway.0[3], 0, 0, 0] },
            }
        } else {
            bpf_redir_neigh {
                nh_family: AF_INET6,
                __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: hop.gateway.0 },
            }
        };
        bpf_redirect_neigh(hop.ifindex, &raw mut neighbour, size_of::<bpf_redir_neigh>() as i32, 0) as i32
    }
}

/// The one place where a reason becomes a verdict.
#[inline(never)]
fn refuse(context: &TcContext, reason: Reason) -> i32 {
    let packet = &mut Skb(context);
    let verdict = match reason {
        Reason::NoBackend | Reason::UnknownPort => match reject::reject(packet) {
            // SAFETY: plain values.
            Ok(true) => unsafe { bpf_redirect(packet.ifindex(), 0) as i32 },
            Ok(false) | Err(_) => DROP,
        },
        Reason::NoLocalBackend
        | Reason::FlowTableFull
        | Reason::NoSourcePort
        | Reason::NoRoute
        | Reason::HopLimit
        | Reason::TooBig
        | Reason::HelperFailed => DROP,
        Reason::Truncated
        | Reason::Unsupported
        | Reason::FlowHit
        | Reason::FlowOpened
        | Reason::Reply
        | Reason::SocketConnected
        | Reason::SocketDatagram
        | Reason::SocketRefused => NEXT,
    };
    Maps.count(reason, packet.size());
    verdict
}

#[classifier]
pub fn svc_ingress(context: TcContext) -> i32 {
    keep_services();
    linear(&context);
    let mut packet = Skb(&context);
    match uplink::ingress(&mut packet, &Maps) {
        Ok(Action::Transmit(hop)) => transmit(&hop),
        Ok(Action::Pass | Action::Deliver) => NEXT,
        Err(reason) => refuse(&context, reason),
    }
}

#[classifier]
pub fn svc_egress(context: TcContext) -> i32 {
    linear(&context);
    let mut packet = Skb(&context);
    match uplink::egress(&mut packet, &Maps) {
        Ok(_) => NEXT,
        Err(reason) => refuse(&context, reason),
    }
}
