use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_TX};
use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::btf_maps::{Array, LruHashMap};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_redirect};
use aya_ebpf::macros::{btf_map, classifier, map, xdp};
use aya_ebpf::maps::ProgramArray;
use aya_ebpf::programs::{TcContext, XdpContext};

use crate::template::{Template, WORDS};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[btf_map]
static TEMPLATE: Array<Template, 1> = Array::new();
/// One generator runs at a time.
#[btf_map]
static TURN: Array<u32, 1> = Array::new();
#[map]
static XDP: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
static TC: ProgramArray = ProgramArray::with_max_entries(1, 0);
/// A flow table as the kernel has one, for what it costs to look something up.
#[btf_map]
static LRU: LruHashMap<[u32; 4], u64, { 1 << 21 }> = LruHashMap::new();

/// A flow's source port has this many bits of its number, and its address the others.
const PORT_BITS: u32 = 14;

/// Writes the header of a packet of the next flow over the bytes from `start` on.
#[inline(always)]
fn write(start: usize, end: usize) -> Option<()> {
    let template = TEMPLATE.get(0)?;
    if start + size_of::<[u64; WORDS]>() > end {
        return None;
    }
    // SAFETY: checked against the packet's end.
    unsafe { (start as *mut [u64; WORDS]).write_unaligned(template.header) };
    let number = if template.in_turn == 0 {
        // SAFETY: no arguments.
        unsafe { bpf_get_prandom_u32() }
    } else {
        let turn = TURN.get_ptr_mut(0)?;
        // SAFETY: nobody else's.
        unsafe {
            *turn = (*turn).wrapping_add(1);
            (*turn).wrapping_add(template.first)
        }
    };
    let flow = number & template.mask;
    let port = template.first_port as u16 + (flow & ((1 << PORT_BITS) - 1)) as u16;
    put(start, end, template.address, (flow >> PORT_BITS) as u16)?;
    put(start, end, template.port, port)
}

/// In network byte order.
#[inline(always)]
fn put(start: usize, end: usize, offset: u32, value: u16) -> Option<()> {
    let at = start + (offset & 63) as usize;
    if at + 2 > end {
        return None;
    }
    // SAFETY: checked against the packet's end.
    unsafe { (at as *mut u16).write_unaligned(value.to_be()) };
    Some(())
}

#[xdp]
pub fn generate_xdp(context: XdpContext) -> u32 {
    if write(context.data(), context.data_end()).is_some() {
        // SAFETY: nothing is to be dropped.
        unsafe { XDP.tail_call(&context, 0) };
    }
    XDP_ABORTED
}

/// What making packets takes, without a program behind.
#[xdp]
pub fn generate_only(context: XdpContext) -> u32 {
    if write(context.data(), context.data_end()).is_some() { XDP_TX } else { XDP_ABORTED }
}

#[xdp]
pub fn empty_xdp(_: XdpContext) -> u32 {
    XDP_TX
}

/// One look-up in the kernel's own table of 16-byte keys, and nothing else.
#[xdp]
pub fn lookup_xdp(context: XdpContext) -> u32 {
    let (start, end) = (context.data(), context.data_end());
    let Some(template) = TEMPLATE.get(0) else { return XDP_ABORTED };
    let (address, port) = (start + (template.address & 63) as usize, start + (template.port & 63) as usize);
    if address + 2 > end || port + 2 > end {
        return XDP_ABORTED;
    }
    // SAFETY: checked against the packet's end.
    let key = unsafe {
        let (address, port) = ((address as *const u16).read_unaligned(), (port as *const u16).read_unaligned());
        [u32::from(address), u32::from(port), 0, 0]
    };
    // SAFETY: the value is only counted on.
    if unsafe { LRU.get(&key) }.is_some() {
        return XDP_TX;
    }
    let _ = LRU.insert(&key, &1, 0);
    XDP_TX
}

#[classifier]
pub fn generate_tc(context: TcContext) -> i32 {
    if write(context.data(), context.data_end()).is_some() {
        // SAFETY: nothing is to be dropped.
        unsafe { TC.tail_call(&context, 0) };
    }
    TC_ACT_SHOT as i32
}

/// Back out by the interface that it came from, the link addresses turned.
#[classifier]
pub fn redirect_tc(context: TcContext) -> i32 {
    let (start, end) = (context.data(), context.data_end());
    if start + 12 > end {
        return TC_ACT_SHOT as i32;
    }
    // SAFETY: checked against the packet's end.
    unsafe {
        let macs = start as *mut [u16; 6];
        let [a, b, c, d, e, f] = macs.read_unaligned();
        macs.write_unaligned([d, e, f, a, b, c]);
        bpf_redirect((*context.as_ptr().cast::<__sk_buff>()).ifindex, 0) as i32
    }
}
