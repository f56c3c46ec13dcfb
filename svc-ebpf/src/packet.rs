//! A packet, wherever it stands: in front of the stack (XDP), in the stack (tc), or in a test's memory.
use svc_common::checksum::Diff;
use svc_common::{Addr, Reason};

use crate::family::Family;
use crate::forward::Hop;
use crate::parse::Headers;
use crate::tables::Tables;

/// Plain bytes that may be read from and written to a packet, where nothing is aligned.
///
/// # Safety
/// Every bit pattern is a value of the type, and it has no padding.
pub unsafe trait Pod: Copy {
    /// # Safety
    /// All of it may be read.
    unsafe fn load(from: *const Self) -> Self;

    /// # Safety
    /// All of it may be written.
    unsafe fn store(self, to: *mut Self);
}

/// The compiler would make a load of each byte of what may not be aligned. The kernel takes any address in a packet where the
/// processor does, which those do that are served.
macro_rules! word {
    ($word:ty, $size:literal) => {
        // SAFETY: an integer.
        unsafe impl Pod for $word {
            #[inline(always)]
            unsafe fn load(from: *const Self) -> Self {
                #[cfg(target_arch = "bpf")]
                // SAFETY: the caller's.
                unsafe {
                    let word: u64;
                    core::arch::asm!(
                        concat!("{0} = *(", $size, " *)({1} + 0)"),
                        lateout(reg) word, in(reg) from, options(pure, readonly, nostack)
                    );
                    word as $word
                }
                #[cfg(not(target_arch = "bpf"))]
                // SAFETY: as above.
                unsafe {
                    from.read_unaligned()
                }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut Self) {
                #[cfg(target_arch = "bpf")]
                // SAFETY: the caller's.
                unsafe {
                    core::arch::asm!(
                        concat!("*(", $size, " *)({1} + 0) = {0}"),
                        in(reg) self as u64, in(reg) to, options(nostack)
                    );
                }
                #[cfg(not(target_arch = "bpf"))]
                // SAFETY: as above.
                unsafe {
                    to.write_unaligned(self)
                }
            }
        }
    };
}
word!(u16, "u16");
word!(u32, "u32");

// SAFETY: an integer.
unsafe impl Pod for u8 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> Self {
        // SAFETY: the caller's.
        unsafe { from.read() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut Self) {
        // SAFETY: the caller's.
        unsafe { to.write(self) }
    }
}

// SAFETY: of such, and nothing between them.
unsafe impl<T: Pod, const N: usize> Pod for [T; N] {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> Self {
        // SAFETY: within the caller's.
        core::array::from_fn(|index| unsafe { T::load(from.cast::<T>().add(index)) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut Self) {
        let mut index = 0;
        while index < N {
            // SAFETY: within the caller's.
            unsafe { self[index].store(to.cast::<T>().add(index)) };
            index += 1;
        }
    }
}

// SAFETY: four words.
unsafe impl Pod for Addr {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> Self {
        // SAFETY: the caller's.
        Addr(unsafe { Pod::load(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut Self) {
        // SAFETY: the caller's.
        unsafe { self.0.store(to.cast()) }
    }
}

pub trait Packet {
    /// Only what has no options, extension headers or fragments, and no ICMP, is done here; the rest is left to the next hook.
    const PLAIN: bool;

    /// # Errors
    /// [`Reason::Truncated`] where the packet ends before.
    fn get<T: Pod>(&self, offset: usize) -> Result<T, Reason>;

    /// # Errors
    /// [`Reason::Truncated`] where the packet ends before.
    fn set<T: Pod>(&mut self, offset: usize, value: T) -> Result<(), Reason>;

    /// Bytes, link header included.
    fn size(&self) -> u32;

    /// The interface that it passes.
    fn ifindex(&self) -> u32;

    /// Patches the IPv4 header's checksum at `offset`. With it the sum of the whole packet stays what it was, so that a socket
    /// buffer's is right still.
    ///
    /// # Errors
    /// [`Reason::Truncated`] where the packet ends before.
    #[inline(always)]
    fn patch_l3(&mut self, offset: usize, diff: Diff) -> Result<(), Reason> {
        let field = self.get(offset)?;
        self.set(offset, diff.apply(field))
    }

    /// Patches the transport checksum at `offset` for changed addresses (its pseudo header) and ports. `udp`: a checksum of
    /// 0 is none and stays so (RFC 768), and none is never made of one.
    ///
    /// # Errors
    /// Where the packet is too short or the kernel refuses.
    fn patch_l4<F: Family>(&mut self, offset: usize, addresses: Diff, ports: Diff, udp: bool) -> Result<(), Reason>;

    /// The way to `dst` for a packet with these headers, and the source that it takes there, into `hop`.
    ///
    /// # Errors
    /// [`Reason::NoRoute`] and [`Reason::TooBig`]; in front of the stack also where only the stack can send it.
    fn route<T: Tables>(&self, tables: &T, headers: &Headers, dst: &Addr, hop: &mut Hop) -> Result<(), Reason>;

    /// Whether a socket of this node would get what `remote` sends to `local`. Addresses and ports, these in network byte
    /// order, are those of such a packet.
    fn has_socket(&self, protocol: u8, remote: Peer, local: Peer) -> bool;
}

/// One end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
}

/// A packet that can be turned into another: only in the stack.
pub trait Resize: Packet {
    /// Cuts or grows the packet at its end to `len` bytes.
    ///
    /// # Errors
    /// [`Reason::HelperFailed`] where the kernel refuses.
    fn resize(&mut self, len: u32) -> Result<(), Reason>;

    /// Sets the transport checksum of a packet made anew to `full`. `pseudo` is the pseudo header's folded sum, which has
    /// to stand there instead where the sender left the summing to its network card, and the next card will do it.
    ///
    /// # Errors
    /// Where the packet is too short or the kernel refuses.
    fn set_l4_checksum(&mut self, offset: usize, pseudo: u16, full: u16) -> Result<(), Reason>;
}
