//! Both ways of an uplink whose packets have no link header.
use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::btf_maps::HashMap;
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_neigh, bpf_skb_change_head};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use svc_common::{Addr, Reason};
use svc_ebpf::Tables;
use svc_ebpf::family::{ETHERNET, Family, V4, V6};
use svc_ebpf::forward::Hop;
use svc_ebpf::linkless::{Bare, ETHERTYPE, Linkless};
use svc_ebpf::packet::Packet;
use svc_ebpf::parse::{From, Headers};
use svc_ebpf::wire::Scratch;

use super::maps::Maps;
use super::tc::{DROP, Met, Skb, come_in, go_out, transmit};

/// The interfaces that these programs are attached to, by index, which the agent puts here.
#[btf_map]
static BARE_LINKS: HashMap<u32, u32, 256> = HashMap::new();

/// Whether what leaves by this interface has no link header. The kernel has to find the route itself then: a tunnel with more
/// than one other end asks the packet's route for the end that it goes to.
#[inline(always)]
pub(super) fn is_bare(ifindex: u32) -> bool {
    // SAFETY: nothing is read of it.
    unsafe { BARE_LINKS.get(&ifindex) }.is_some()
}

#[classifier]
pub fn svc_bare_ingress(context: TcContext) -> i32 {
    come_in::<Linkless<Skb<'_>>>(&context, From::Network)
}

#[classifier]
pub fn svc_bare_egress(context: TcContext) -> i32 {
    go_out::<Linkless<Skb<'_>>>(&context, true)
}

impl Bare for Skb<'_> {
    #[inline(always)]
    fn ethertype(&self) -> u16 {
        let skb = self.0.skb.skb;
        // Where it is asked for, and not kept on the stack for where it might be.
        // SAFETY: the program's own context.
        unsafe { (&raw const (*skb).protocol).read_volatile() as u16 }
    }

    #[inline(always)]
    fn route_bare<T: Tables>(&self, tables: &T, headers: &Headers, dst: &Addr, hop: &mut Hop) -> Result<(), Reason> {
        self.way(self.size(), tables, headers, dst, hop)
    }
}

impl<'a> Met<'a> for Linkless<Skb<'a>> {
    #[inline(always)]
    fn of(context: &'a TcContext) -> Self {
        Linkless(Skb(context))
    }

    /// A function of its own, since the stack of what calls it stands below the deepest chain.
    #[inline(never)]
    fn transmit(context: &TcContext, scratch: &Scratch) -> i32 {
        match put_link_header(context, scratch) {
            Ok(()) => transmit(context, &scratch.hop),
            Err(reason) => {
                Maps.count(reason, context.len());
                DROP
            }
        }
    }

    #[inline(always)]
    fn back(&self, from: From) -> i32 {
        let ifindex = self.ifindex();
        if from == From::Host {
            // SAFETY: plain values.
            return unsafe { bpf_redirect(ifindex, BPF_F_INGRESS as u64) as i32 };
        }
        if grow(self.0.0).is_err() {
            return DROP;
        }
        // By the packet's route, see `is_bare`.
        // SAFETY: plain values.
        unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
    }
}

/// The next link's, where it has one and the neighbour is known.
#[inline(always)]
fn put_link_header(context: &TcContext, scratch: &Scratch) -> Result<(), Reason> {
    grow(context)?;
    let frame = &mut Skb(context);
    let hop = &scratch.hop;
    if hop.is_resolved() {
        frame.set(0, hop.macs)?;
        frame.set(ETHERTYPE, if scratch.headers.v4 { V4::ETHERTYPE } else { V6::ETHERTYPE })?;
    }
    Ok(())
}

/// Room for a link header, of zeros. The kernel takes what it is to send by a route or on an Ethernet link with one only, and
/// takes it off again where it has no place.
#[inline(always)]
fn grow(context: &TcContext) -> Result<(), Reason> {
    // SAFETY: the program's own context.
    if unsafe { bpf_skb_change_head(context.skb.skb, ETHERNET as u32, 0) } == 0 {
        Ok(())
    } else {
        Err(Reason::HelperFailed)
    }
}
