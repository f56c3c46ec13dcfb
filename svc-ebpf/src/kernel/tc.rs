//! In the stack: the uplink's ingress, where all that XDP left is done, its egress, where replies leave, and both ways of a
//! pod's interface.
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::{bpf_csum_update, bpf_redirect, bpf_redirect_neigh, bpf_skb_change_tail};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use svc_common::checksum::{Diff, fold};
use svc_common::{Addr, Reason};
use svc_ebpf::family::{ETHERNET, Family};
use svc_ebpf::forward::Hop;
use svc_ebpf::packet::{Packet, Peer, Pod, Resize};
use svc_ebpf::parse::{FRAGMENT_FIRST, From, Headers};
use svc_ebpf::wire::{self, Next, Scratch};
use svc_ebpf::{Tables, negative, reject};

use super::maps::{Hook, Maps, may_reject, scratch};
use super::sk_lookup::has_socket;
use super::{at, monitor, pieces, route};

/// Not judged here: the next program, or the stack, goes on with it.
const NEXT: i32 = TC_ACT_UNSPEC;
pub(super) const DROP: i32 = TC_ACT_SHOT as i32;

/// In a packet's tc_index, which nothing but classful queues' own filters uses: it was translated and sent on, and the egresses
/// that it passes now, more than one where interfaces are stacked, have nothing to do. Taken off where the packet comes in
/// somewhere, since a veth does not.
const SENT_ON: u32 = 0x5ec0;

/// What has to be in the linear part of the buffer: an ICMPv6 error's headers, those that it quotes, and options.
const HEADERS: u32 = 256;

pub(super) struct Skb<'a>(pub(super) &'a TcContext);

/// A packet in the stack, by whether its link has a header.
pub(super) trait Met<'a>: Resize {
    fn of(context: &'a TcContext) -> Self;

    /// Sends it on by `scratch.hop`.
    fn transmit(context: &TcContext, scratch: &Scratch) -> i32;

    /// Sends a refused packet back to where it came from.
    fn back(&self, from: From) -> i32;
}

impl<'a> Met<'a> for Skb<'a> {
    #[inline(always)]
    fn of(context: &'a TcContext) -> Self {
        Skb(context)
    }

    #[inline(always)]
    fn transmit(context: &TcContext, scratch: &Scratch) -> i32 {
        transmit(context, &scratch.hop)
    }

    #[inline(always)]
    fn back(&self, from: From) -> i32 {
        // What was about to leave goes back up this node's stack.
        let flags = if from == From::Host { BPF_F_INGRESS as u64 } else { 0 };
        // SAFETY: plain values.
        unsafe { bpf_redirect(self.ifindex(), flags) as i32 }
    }
}

impl Skb<'_> {
    /// Where the linear part of the packet starts and ends. Read anew each time: moved away from its use, a load would be
    /// cut to 32 bits and extended again, and be no pointer for the verifier any more.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        let at = self.0.skb.skb;
        // SAFETY: as above.
        unsafe {
            ((&raw const (*at).data).read_volatile() as usize, (&raw const (*at).data_end).read_volatile() as usize)
        }
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).gso_segs > 1 }
    }

    /// [`Packet::route`] for a packet of `length` bytes without its link header.
    #[inline(always)]
    pub(super) fn way<T: Tables>(
        &self,
        length: u32,
        tables: &T,
        headers: &Headers,
        dst: &Addr,
        hop: &mut Hop,
    ) -> Result<(), Reason> {
        // Segments are cut to the next link's size by the stack.
        let length = if self.is_gso() { 0 } else { length as u16 };
        route::way(self.0.as_ptr(), tables, length, self.ifindex(), headers, dst, hop)
    }
}

impl Packet for Skb<'_> {
    const PLAIN: bool = false;

    #[inline(always)]
    fn get<T: Pod>(&self, offset: usize) -> Result<T, Reason> {
        let (start, end) = self.bounds();
        // SAFETY: checked against the packet's end; `Pod` takes any bytes.
        Ok(unsafe { T::load(at::<T>(start, end, offset)?) })
    }

    #[inline(always)]
    fn set<T: Pod>(&mut self, offset: usize, value: T) -> Result<(), Reason> {
        let (start, end) = self.bounds();
        // SAFETY: as in `get`.
        unsafe { value.store(at::<T>(start, end, offset)?) };
        Ok(())
    }

    #[inline(always)]
    fn size(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the program's own context.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    fn has_socket(&self, protocol: u8, remote: Peer, local: Peer) -> bool {
        has_socket(self.0.as_ptr(), protocol, remote, local)
    }

    #[inline(always)]
    fn patch_l4<F: Family>(&mut self, offset: usize, addresses: Diff, ports: Diff, udp: bool) -> Result<(), Reason> {
        let flags = if udp { BPF_F_MARK_MANGLED_0 as u64 } else { 0 };
        let addresses = fold(addresses.0);
        self.0
            .l4_csum_replace(offset, 0, addresses as u64, flags | BPF_F_PSEUDO_HDR as u64)
            .and_then(|()| self.0.l4_csum_replace(offset, 0, fold(ports.0) as u64, flags))
            .map_err(|_| Reason::HelperFailed)?;
        if !F::IS_V4 {
            // Where the network card has summed the whole packet, the helper takes the addresses' difference out of that sum,
            // as is right beside an IPv4 header, whose own checksum makes up for it. (BPF_F_IPV6 says so to newer kernels.)
            // An error means that there is no such sum.
            // SAFETY: the program's own context.
            let _ = unsafe { bpf_csum_update(self.0.skb.skb, addresses as u32) };
        }
        Ok(())
    }

    #[inline(always)]
    fn route<T: Tables>(&self, tables: &T, headers: &Headers, dst: &Addr, hop: &mut Hop) -> Result<(), Reason> {
        self.way(self.size().wrapping_sub(ETHERNET as u32), tables, headers, dst, hop)
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

/// Brings the headers into the linear part of the buffer; false where they were there, or are nowhere.
#[inline(always)]
fn pull(context: &TcContext) -> bool {
    let wanted = context.len().min(HEADERS);
    let (start, end) = Skb(context).bounds();
    start + (wanted as usize) > end && context.pull_data(wanted).is_ok()
}

#[inline(always)]
pub(super) fn transmit(context: &TcContext, hop: &Hop) -> i32 {
    // SAFETY: the program's own context, and plain values.
    unsafe {
        (*context.skb.skb).tc_index = SENT_ON;
        if hop.is_resolved() {
            bpf_redirect(hop.ifindex, 0) as i32
        } else {
            // Without a neighbour named: a packet that waits for one is sent by its own route, which of a packet that was
            // about to leave is the old one unless the helper looks for another.
            bpf_redirect_neigh(hop.ifindex, core::ptr::null_mut(), 0, 0) as i32
        }
    }
}

/// The one place where a reason becomes a verdict.
#[inline(never)]
fn refuse<'a, P: Met<'a>>(context: &'a TcContext, scratch: &Scratch, reason: Reason) -> i32 {
    let packet = &mut P::of(context);
    // As it came: a rejection makes another packet of it.
    let (bytes, ifindex) = (packet.size(), packet.ifindex());
    let verdict = match reason {
        Reason::NoBackend | Reason::UnknownPort | Reason::TooBig | Reason::HopLimit => {
            if !may_reject() {
                Maps.count(Reason::RejectLimited, packet.size());
                monitor::refused(&scratch.headers, Reason::RejectLimited, bytes, ifindex);
                return DROP;
            }
            match reject::reject(packet, &scratch.headers, &scratch.hop, reason) {
                Ok(()) => packet.back(scratch.headers.from),
                Err(_) => DROP,
            }
        }
        Reason::NoLocalBackend
        | Reason::SourceRange
        | Reason::UnallocatedAddress
        | Reason::RejectLimited
        | Reason::FlowTableFull
        | Reason::NoSourcePort
        | Reason::NoRoute
        | Reason::HelperFailed => DROP,
        Reason::NotService => return NEXT,
        Reason::Truncated
        | Reason::Unsupported
        | Reason::FragmentUnknown
        | Reason::FragmentKept
        | Reason::FlowHit
        | Reason::FlowOpened
        | Reason::Reply
        | Reason::SocketConnected
        | Reason::SocketDatagram
        | Reason::SocketRefused
        | Reason::BindRefused => NEXT,
    };
    Maps.count(reason, packet.size());
    monitor::refused(&scratch.headers, reason, bytes, ifindex);
    verdict
}

#[inline(always)]
fn settle<'a, P: Met<'a>>(context: &'a TcContext, scratch: &mut Scratch, found: Result<(), Reason>) -> i32 {
    match found.and_then(|()| translate::<P>(context, scratch)) {
        Ok(Next::Stack) => NEXT,
        Ok(Next::Send) => P::transmit(context, scratch),
        Ok(Next::Reenter) => {
            let uplink = Maps.config().uplink;
            // SAFETY: plain values.
            if uplink == 0 { NEXT } else { unsafe { bpf_redirect(uplink, BPF_F_INGRESS as u64) as i32 } }
        }
        Err(reason) => refuse::<P>(context, scratch, reason),
    }
}

#[classifier]
pub fn svc_ingress(context: TcContext) -> i32 {
    come_in::<Skb<'_>>(&context, From::Network)
}

#[classifier]
pub fn svc_pod_ingress(context: TcContext) -> i32 {
    come_in::<Skb<'_>>(&context, From::Pod)
}

#[inline(always)]
pub(super) fn come_in<'a, P: Met<'a>>(context: &'a TcContext, from: From) -> i32 {
    let skb = context.skb.skb;
    // SAFETY: the program's own context.
    unsafe {
        if (*skb).tc_index == SENT_ON {
            (*skb).tc_index = 0;
        }
    }
    if is_known::<P>(context) {
        return NEXT;
    }
    let Some(scratch) = scratch(Hook::Ingress) else { return NEXT };
    scratch.headers.from = from;
    let mut found = ingress::<P>(context, scratch);
    if found == Err(Reason::Truncated) && pull(context) {
        found = ingress::<P>(context, scratch);
    }
    if scratch.headers.fragment == FRAGMENT_FIRST && pieces::release(context, &scratch.headers) {
        return DROP;
    }
    if found == Err(Reason::FragmentUnknown) {
        if pieces::keep(context, &scratch.headers) {
            Maps.count(Reason::FragmentKept, context.len());
            return DROP;
        }
        found = ingress::<P>(context, scratch);
    }
    settle::<P>(context, scratch, found)
}

#[classifier]
pub fn svc_egress(context: TcContext) -> i32 {
    go_out::<Skb<'_>>(&context, true)
}

#[classifier]
pub fn svc_pod_egress(context: TcContext) -> i32 {
    go_out::<Skb<'_>>(&context, false)
}

#[inline(always)]
pub(super) fn go_out<'a, P: Met<'a>>(context: &'a TcContext, to_network: bool) -> i32 {
    // SAFETY: the program's own context.
    if unsafe { (*context.skb.skb).tc_index } == SENT_ON || is_known::<P>(context) {
        return NEXT;
    }
    let Some(scratch) = scratch(Hook::Egress) else { return NEXT };
    let mut found = egress::<P>(context, scratch, to_network);
    if found == Err(Reason::Truncated) && pull(context) {
        found = egress::<P>(context, scratch, to_network);
    }
    settle::<P>(context, scratch, found)
}

// Functions of their own, so that the variables of two of them do not stand on the stack together.

#[inline(never)]
fn is_known<'a, P: Met<'a>>(context: &'a TcContext) -> bool {
    negative::is_known(&P::of(context), &Maps)
}

#[inline(never)]
fn ingress<'a, P: Met<'a>>(context: &'a TcContext, scratch: &mut Scratch) -> Result<(), Reason> {
    wire::ingress(&P::of(context), &Maps, scratch)
}

#[inline(never)]
fn egress<'a, P: Met<'a>>(context: &'a TcContext, scratch: &mut Scratch, to_network: bool) -> Result<(), Reason> {
    wire::egress(&P::of(context), &Maps, scratch, to_network)
}

#[inline(never)]
fn translate<'a, P: Met<'a>>(context: &'a TcContext, scratch: &mut Scratch) -> Result<Next, Reason> {
    wire::translate(&mut P::of(context), &Maps, scratch)
}
