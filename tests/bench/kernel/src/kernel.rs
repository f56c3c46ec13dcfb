use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_TX};
use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::btf_maps::{Array, LruHashMap};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::{btf_map, classifier, map, xdp};
use aya_ebpf::maps::ProgramArray;
use aya_ebpf::programs::{TcContext, XdpContext};

use crate::template::{AGE_SHIFT, AGES, BACKENDS, LIVE_WORDS, Live, Template, WORDS, at};

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

#[btf_map]
static LIVE: Array<Live, 1> = Array::new();
/// When the last frame was made.
#[btf_map]
static LAST: Array<u64, 1> = Array::new();
/// All frames that arrived at the far end, and those to backends. One core takes them.
#[btf_map]
static ARRIVED: Array<u64, 2> = Array::new();
/// How old stamped frames were.
#[btf_map]
static AGE: Array<u64, { AGES as usize }> = Array::new();

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
    let flow = draw(template.in_turn != 0, template.first)? & template.mask;
    let (address, port) = parts(flow, template.first_port);
    put(start, end, template.address, address)?;
    put(start, end, template.port, port)
}

/// The next number.
#[inline(always)]
fn draw(in_turn: bool, first: u32) -> Option<u32> {
    if !in_turn {
        // SAFETY: no arguments.
        return Some(unsafe { bpf_get_prandom_u32() });
    }
    let turn = TURN.get_ptr_mut(0)?;
    // SAFETY: nobody else's.
    unsafe {
        *turn = (*turn).wrapping_add(1);
        Some((*turn).wrapping_add(first))
    }
}

/// A flow's part of the source address, and its source port.
#[inline(always)]
fn parts(flow: u32, first_port: u32) -> (u16, u16) {
    ((flow >> PORT_BITS) as u16, first_port as u16 + (flow & ((1 << PORT_BITS) - 1)) as u16)
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

/// Makes a frame, whatever the last journey has left of its page, and sends it out.
#[xdp]
pub fn generate_live(context: XdpContext) -> u32 {
    live(context.data(), context.data_end()).unwrap_or(XDP_ABORTED)
}

#[inline(always)]
fn live(start: usize, end: usize) -> Option<u32> {
    let template = LIVE.get(0)?;
    if template.pause != 0 && !is_due(template)? {
        return Some(XDP_DROP);
    }
    if start + size_of::<[u64; LIVE_WORDS]>() > end {
        return None;
    }
    // SAFETY: checked against the frame's end.
    unsafe { (start as *mut [u64; LIVE_WORDS]).write_unaligned(template.header) };
    let flow = draw(template.in_turn != 0, template.first)? & template.mask;
    let (address, port) = parts(flow, template.first_port);
    put(start, end, at::IDENTIFICATION, !address)?;
    put(start, end, at::ADDRESS, address)?;
    put(start, end, at::PORT, port)?;
    put(start, end, at::ADDRESS_COMPLEMENT, !address)?;
    put(start, end, at::PORT_COMPLEMENT, !port)?;
    if template.stamped != 0 {
        // SAFETY: no arguments; checked against the frame's end above.
        unsafe {
            let now = bpf_ktime_get_ns() as u32;
            ((start + at::STAMP as usize) as *mut [u32; 2]).write_unaligned([now, !now]);
        }
    }
    // SAFETY: a number, whatever it stands for.
    Some(unsafe { bpf_redirect(template.interface, 0) } as u32)
}

/// Whether the next frame's time has come.
#[inline(always)]
fn is_due(template: &Live) -> Option<bool> {
    let (last, turn) = (LAST.get_ptr_mut(0)?, TURN.get(0)?);
    // SAFETY: nobody else's, and no arguments.
    unsafe {
        let now = bpf_ktime_get_ns();
        let is_due = *turn < template.limit && now.wrapping_sub(*last) >= template.pause.into();
        if is_due {
            *last = now;
        }
        Some(is_due)
    }
}

/// As [`lookup_xdp`], by the addresses and the ports of a live frame.
#[xdp]
pub fn lookup_live(context: XdpContext) -> u32 {
    let (start, end) = (context.data(), context.data_end());
    if start + 38 > end {
        return XDP_ABORTED;
    }
    // SAFETY: checked against the frame's end.
    let [source, destination, ports] = unsafe { ((start + 26) as *const [u32; 3]).read_unaligned() };
    let key = [source, destination, ports, 0];
    // SAFETY: the value is only counted on.
    if unsafe { LRU.get(&key) }.is_none() {
        let _ = LRU.insert(&key, &1, 0);
    }
    XDP_TX
}

/// The far end: counts what arrives, and drops it.
#[xdp]
pub fn arrive(context: XdpContext) -> u32 {
    let (start, end) = (context.data(), context.data_end());
    if start + 54 > end {
        return XDP_DROP;
    }
    let frame = start as *const u8;
    // SAFETY: checked against the frame's end.
    let (kind, protocol, network) =
        unsafe { ([*frame.add(12), *frame.add(13)], *frame.add(23), [*frame.add(30), *frame.add(31)]) };
    if kind != [8, 0] || (protocol != 6 && protocol != 17) {
        return XDP_DROP;
    }
    add(ARRIVED.get_ptr_mut(0));
    if network == BACKENDS {
        add(ARRIVED.get_ptr_mut(1));
    }
    if LIVE.get(0).is_some_and(|template| template.stamped != 0) {
        // SAFETY: checked against the frame's end.
        let made = unsafe { ((start + at::STAMP as usize) as *const u32).read_unaligned() };
        // SAFETY: no arguments.
        let age = unsafe { bpf_ktime_get_ns() as u32 }.wrapping_sub(made) >> AGE_SHIFT;
        add(AGE.get_ptr_mut(if age < AGES { age } else { AGES - 1 }));
    }
    XDP_DROP
}

#[inline(always)]
fn add(counter: Option<*mut u64>) {
    if let Some(counter) = counter {
        // SAFETY: of a map, and one core's at a time.
        unsafe { *counter += 1 };
    }
}
