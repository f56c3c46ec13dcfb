//! What differs between IPv4 and IPv6. Offsets are from the start of an Ethernet frame.
use svc_common::checksum::Diff;
use svc_common::{Addr, Reason};

use crate::packet::Packet;

pub const ETHERNET: usize = 14;

pub trait Family {
    /// As it stands in the frame, read natively.
    const ETHERTYPE: u16;
    const IS_V4: bool;
    /// Of the network header without options.
    const HEADER: usize;
    const L4: usize = ETHERNET + Self::HEADER;
    const PROTOCOL: usize;
    const HOP_LIMIT: usize;
    const L3_CHECKSUM: Option<usize>;
    /// Of the field that tells the packet's length, counted from [`Family::LENGTH_FROM`] on.
    const LENGTH: usize;
    const LENGTH_FROM: usize;

    /// # Errors
    /// [`Reason::Truncated`].
    fn addresses<P: Packet>(packet: &P) -> Result<(Addr, Addr), Reason>;
    /// # Errors
    /// [`Reason::Truncated`].
    #[inline(always)]
    fn set_addresses<P: Packet>(packet: &mut P, src: Addr, dst: Addr) -> Result<(), Reason> {
        Self::set_addresses_at(packet, ETHERNET, src, dst)
    }
    /// `at`: where the network header starts.
    ///
    /// # Errors
    /// [`Reason::Truncated`].
    fn set_addresses_at<P: Packet>(packet: &mut P, at: usize, src: Addr, dst: Addr) -> Result<(), Reason>;
    /// How the checksums change where `from` becomes `to`.
    fn diff(diff: Diff, from: Addr, to: Addr) -> Diff;
}

pub struct V4;
pub struct V6;

impl Family for V4 {
    const ETHERTYPE: u16 = 0x0800u16.to_be();
    const IS_V4: bool = true;
    const HEADER: usize = 20;
    const PROTOCOL: usize = ETHERNET + 9;
    const HOP_LIMIT: usize = ETHERNET + 8;
    const L3_CHECKSUM: Option<usize> = Some(ETHERNET + 10);
    const LENGTH: usize = ETHERNET + 2;
    const LENGTH_FROM: usize = ETHERNET;

    #[inline(always)]
    fn addresses<P: Packet>(packet: &P) -> Result<(Addr, Addr), Reason> {
        let [src, dst] = packet.get::<[u32; 2]>(ETHERNET + 12)?;
        Ok((Addr::v4(src), Addr::v4(dst)))
    }

    #[inline(always)]
    fn set_addresses_at<P: Packet>(packet: &mut P, at: usize, src: Addr, dst: Addr) -> Result<(), Reason> {
        packet.set(at + 12, [src.0[3], dst.0[3]])
    }

    #[inline(always)]
    fn diff(diff: Diff, from: Addr, to: Addr) -> Diff {
        diff.long(from.0[3], to.0[3])
    }
}

impl Family for V6 {
    const ETHERTYPE: u16 = 0x86ddu16.to_be();
    const IS_V4: bool = false;
    const HEADER: usize = 40;
    const PROTOCOL: usize = ETHERNET + 6;
    const HOP_LIMIT: usize = ETHERNET + 7;
    const L3_CHECKSUM: Option<usize> = None;
    const LENGTH: usize = ETHERNET + 4;
    const LENGTH_FROM: usize = ETHERNET + 40;

    #[inline(always)]
    fn addresses<P: Packet>(packet: &P) -> Result<(Addr, Addr), Reason> {
        Ok((packet.get(ETHERNET + 8)?, packet.get(ETHERNET + 24)?))
    }

    #[inline(always)]
    fn set_addresses_at<P: Packet>(packet: &mut P, at: usize, src: Addr, dst: Addr) -> Result<(), Reason> {
        packet.set(at + 8, src)?;
        packet.set(at + 24, dst)
    }

    #[inline(always)]
    fn diff(diff: Diff, from: Addr, to: Addr) -> Diff {
        Diff(long_diff(diff.0, &from, &to))
    }
}

/// A function of its own in the kernel, whose stack is short.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn long_diff(sum: u64, from: &Addr, to: &Addr) -> u64 {
    Diff(sum).addr(*from, *to).0
}
