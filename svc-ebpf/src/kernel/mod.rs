//! Bound to the kernel: one file a kind of hook, and every map in `maps.rs`.
mod global;
#[cfg(feature = "log")]
mod log;
mod maps;
mod route;
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
    if start + offset + size_of::<T>() > end {
        Err(svc_common::Reason::Truncated)
    } else {
        Ok((start + offset) as *mut T)
    }
}
