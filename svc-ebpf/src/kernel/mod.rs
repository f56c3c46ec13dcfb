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

use aya_ebpf::btf_maps::PerCpuArray;

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

/// The place that the highest bits of a hash choose in this CPU's tables; both their number and their size are powers of two. A table
/// is one value, since of values each is found by a pointer of its own, and the kernel's largest is 32 KiB.
#[inline(always)]
fn place<T, const SIZE: usize, const TABLES: usize>(
    tables: &PerCpuArray<[T; SIZE], TABLES>,
    hash: u32,
) -> Option<*mut T> {
    let table = tables.get_ptr_mut(hash >> (32 - TABLES.ilog2()))?;
    let index = (hash >> (32 - TABLES.ilog2() - SIZE.ilog2())) as usize % SIZE;
    // SAFETY: within the table.
    Some(unsafe { table.cast::<T>().add(index) })
}
