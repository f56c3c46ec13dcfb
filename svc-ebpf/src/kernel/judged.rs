//! What XDP tells the tc program behind it of a packet that is no Service's, in front of the packet (XDP's metadata), so that it
//! is judged once. Whoever writes there is the node's administrator; that it is this very packet's is looked at all the same.
use aya_ebpf::helpers::bpf_xdp_adjust_meta;
use aya_ebpf::programs::{TcContext, XdpContext};
use svc_ebpf::packet::Pod;

use super::at;

/// Other programs may leave something there, too.
const SIGN: u32 = 0x7376_6321;

/// Where the driver leaves no room the packet is judged once more.
#[inline(always)]
pub(super) fn tell(context: &XdpContext, digest: u16) {
    // SAFETY: the program's own context, and a number.
    if unsafe { bpf_xdp_adjust_meta(context.ctx, -(size_of::<[u32; 2]>() as i32)) } != 0 {
        return;
    }
    if let Ok(words) = at::<[u32; 2]>(context.metadata(), context.metadata_end(), 0) {
        // SAFETY: checked against the end.
        unsafe { [SIGN, digest.into()].store(words) };
    }
}

/// What XDP has told of this packet; 0 where it has not.
#[inline(always)]
pub(super) fn told(context: &TcContext) -> u16 {
    let skb = context.skb.skb;
    // SAFETY: the program's own context; read anew, as the packet's own bounds are.
    let (start, end) = unsafe {
        ((&raw const (*skb).data_meta).read_volatile() as usize, (&raw const (*skb).data).read_volatile() as usize)
    };
    match at::<[u32; 2]>(start, end, 0) {
        // SAFETY: checked against the end.
        Ok(words) => match unsafe { Pod::load(words) } {
            [SIGN, digest] => digest as u16,
            _ => 0,
        },
        Err(_) => 0,
    }
}
