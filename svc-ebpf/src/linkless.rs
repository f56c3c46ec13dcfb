//! Packets of links without headers: tunnels of kinds such as IPIP, SIT, GRE and WireGuard, and a user's process' (tun).
use svc_common::checksum::Diff;
use svc_common::verifier::anew;
use svc_common::{Addr, Reason};

use crate::family::{ETHERNET, Family};
use crate::forward::Hop;
use crate::packet::{Packet, Peer, Pod, Resize};
use crate::parse::Headers;
use crate::tables::Tables;

/// Where a frame has its ethertype.
pub const ETHERTYPE: usize = ETHERNET - 2;

/// A packet that starts with its network header.
pub trait Bare: Packet {
    /// What it is, as an ethertype that stands in a frame.
    fn ethertype(&self) -> u16;

    /// As [`Packet::route`].
    ///
    /// # Errors
    /// As there.
    fn route_bare<T: Tables>(&self, tables: &T, headers: &Headers, dst: &Addr, hop: &mut Hop) -> Result<(), Reason>;
}

/// Such a packet for the engine, whose offsets are a frame's: as if an Ethernet header stood in front of it, of which the
/// addresses are zeros, and nothing is kept.
pub struct Linkless<P>(pub P);

/// More than any offset of the engine's.
const OFFSETS: u64 = 1 << 10;

/// Brought down before it meets the packet's start: of a pointer in front of the packet, moved up again, the verifier does not know
/// how far it reaches. Nor does it always see that it is no less than a link header, hence the remainder.
#[inline(always)]
fn below(offset: usize) -> usize {
    (anew(anew(offset as u64).wrapping_sub(ETHERNET as u64)) % OFFSETS) as usize
}

/// Whether `T` is what the engine reads and writes of a link header: both addresses, or the first. Told by its size, which costs
/// nothing where the offset is not known before.
const fn is_link_addresses<T>(offset: usize) -> bool {
    offset == 0 && (size_of::<T>() == ETHERTYPE || size_of::<T>() == ETHERTYPE / 2)
}

impl<P: Bare> Packet for Linkless<P> {
    const PLAIN: bool = P::PLAIN;

    #[inline(always)]
    fn get<T: Pod>(&self, offset: usize) -> Result<T, Reason> {
        // SAFETY: `Pod` takes any bytes.
        unsafe {
            if is_link_addresses::<T>(offset) {
                return Ok(core::mem::zeroed());
            }
            if offset == ETHERTYPE && size_of::<T>() == 2 {
                return Ok(core::mem::transmute_copy(&self.0.ethertype()));
            }
        }
        self.0.get(below(offset))
    }

    #[inline(always)]
    fn set<T: Pod>(&mut self, offset: usize, value: T) -> Result<(), Reason> {
        if is_link_addresses::<T>(offset) { Ok(()) } else { self.0.set(below(offset), value) }
    }

    #[inline(always)]
    fn size(&self) -> u32 {
        self.0.size()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.0.ifindex()
    }

    #[inline(always)]
    fn patch_l4<F: Family>(&mut self, offset: usize, addresses: Diff, ports: Diff, udp: bool) -> Result<(), Reason> {
        self.0.patch_l4::<F>(below(offset), addresses, ports, udp)
    }

    #[inline(always)]
    fn route<T: Tables>(&self, tables: &T, headers: &Headers, dst: &Addr, hop: &mut Hop) -> Result<(), Reason> {
        self.0.route_bare(tables, headers, dst, hop)
    }

    #[inline(always)]
    fn has_socket(&self, protocol: u8, remote: Peer, local: Peer) -> bool {
        self.0.has_socket(protocol, remote, local)
    }
}

impl<P: Bare + Resize> Resize for Linkless<P> {
    #[inline(always)]
    fn resize(&mut self, len: u32) -> Result<(), Reason> {
        self.0.resize(len - ETHERNET as u32)
    }

    #[inline(always)]
    fn set_l4_checksum(&mut self, offset: usize, pseudo: u16, full: u16) -> Result<(), Reason> {
        self.0.set_l4_checksum(below(offset), pseudo, full)
    }
}
