//! Bound to the kernel: one file a kind of hook, and every map in `maps.rs`.
mod bare;
mod global;
mod hops;
#[cfg(feature = "log")]
mod log;
mod maps;
mod monitor;
mod pieces;
mod route;
mod sk_lookup;
mod sock_addr;
mod tc;
mod xdp;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// A `T` at `offset` of the bytes from `start` to `end`.
#[inline(always)]
fn at<T>(start: usize, end: usize, offset: usize) -> Result<*mut T, svc_common::Reason> {
    let from = start + offset;
    let mut to = from + size_of::<T>();
    if size_of::<T>() == 1 {
        // The compiler would ask whether `from >= end`, of which the verifier takes no notice.
        to = svc_common::verifier::opaque(to as u64) as usize;
    }
    if to > end { Err(svc_common::Reason::Truncated) } else { Ok(from as *mut T) }
}
