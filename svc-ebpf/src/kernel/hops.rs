//! Next hops that the kernel was asked for, kept for the packets that follow: asking costs as much as all the rest.
//!
//! Each CPU has its own, which no other writes; nor does one hook's program interrupt another's while it is here. One holds for a
//! tick at most, after which what nobody hears of is seen, such as an MTU that a router has reported; and only while the agent,
//! which hears of every change to routes and neighbours, lets it: see [`HopLease`].
use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::btf_map;
use svc_common::Addr;
use svc_common::map::HopLease;
use svc_ebpf::forward::Hop;
use svc_ebpf::ticks::TICK_SHIFT;

#[btf_map]
static HOPS: PerCpuArray<[Known; 256], 4> = PerCpuArray::new();
#[btf_map]
static HOP_LEASE: Array<HopLease, 1> = Array::new();

/// One line of the cache.
#[repr(C)]
#[derive(Clone, Copy)]
struct Known {
    /// Of when it was learned.
    moment: u64,
    dst: Addr,
    source: Addr,
    /// By which the packet came in.
    interface: u32,
    ifindex: u32,
    macs: [u16; 6],
    mtu: u16,
    pad: u16,
}
const _: () = assert!(size_of::<Known>() == 64);

/// What a next hop that is learned now is learned under, the lease's generation and the tick; 0 where nothing may be kept.
#[inline(always)]
pub(super) fn moment() -> u64 {
    let Some(lease) = HOP_LEASE.get(0) else { return 0 };
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    if now < lease.until { (lease.generation as u64) << 32 | (now >> TICK_SHIFT) as u32 as u64 } else { 0 }
}

#[inline(always)]
fn place(dst: &Addr) -> Option<*mut Known> {
    super::place(&HOPS, dst.folded().wrapping_mul(0x9E37_79B1))
}

/// The way to `dst` for a packet of `length` bytes that came in by `hop.ifindex`; false where it is not known.
#[inline(never)]
pub(super) fn find(moment: u64, dst: &Addr, length: u16, hop: &mut Hop) -> bool {
    if moment == 0 {
        return false;
    }
    let Some(known) = place(dst) else { return false };
    // SAFETY: this CPU's own.
    let known = unsafe { &*known };
    if known.moment != moment || known.dst != *dst || known.interface != hop.ifindex || known.mtu < length {
        return false;
    }
    hop.ifindex = known.ifindex;
    hop.macs = known.macs;
    hop.mtu = known.mtu;
    hop.source = known.source;
    true
}

#[inline(never)]
pub(super) fn keep(moment: u64, dst: &Addr, interface: u32, hop: &Hop) {
    if moment == 0 {
        return;
    }
    if let Some(known) = place(dst) {
        // SAFETY: as in `find`.
        let known = unsafe { &mut *known };
        known.moment = moment;
        known.dst = *dst;
        known.source = hop.source;
        known.interface = interface;
        known.ifindex = hop.ifindex;
        known.macs = hop.macs;
        known.mtu = hop.mtu;
    }
}
