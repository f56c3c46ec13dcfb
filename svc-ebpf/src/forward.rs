//! Sending a packet on to another host, as a router does.
use svc_common::checksum::Diff;
use svc_common::{Addr, Reason};

use crate::family::Family;
use crate::packet::Packet;
use crate::tables::Tables;

/// The way to the next host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hop {
    pub ifindex: u32,
    /// Destination and source; all zeros while the neighbour's is unknown.
    pub macs: [u16; 6],
    /// What the next link takes, in bytes of the network packet; 0 where that is not known.
    pub mtu: u16,
    /// [`source`] of the interface.
    pub source: Addr,
}

impl Hop {
    #[inline(always)]
    pub const fn is_resolved(&self) -> bool {
        self.macs[0] | self.macs[1] | self.macs[2] != 0
    }
}

/// What traffic that leaves by this interface takes as its source: the interface's address, else the node's; unspecified where
/// there is none of the family.
#[inline(always)]
pub fn source<T: Tables>(tables: &T, v4: bool, ifindex: u32) -> Addr {
    let of = |ifindex: u32| {
        let uplink = tables.uplink(ifindex).unwrap_or_default();
        if v4 { uplink.v4 } else { uplink.v6 }
    };
    let own = of(ifindex);
    if own == own.any() { of(0) } else { own }
}

/// # Errors
/// [`Reason::NoRoute`] where it is none.
#[inline(always)]
pub fn known(source: Addr) -> Result<Addr, Reason> {
    if source == source.any() { Err(Reason::NoRoute) } else { Ok(source) }
}

/// # Errors
/// [`Reason::HopLimit`] where the packet has come too far to be sent on; nothing is changed then.
#[inline(always)]
pub fn check_hop_limit<P: Packet, F: Family>(packet: &P) -> Result<u8, Reason> {
    let limit: u8 = packet.get(F::HOP_LIMIT)?;
    if limit <= 1 { Err(Reason::HopLimit) } else { Ok(limit) }
}

/// One hop fewer, and the link addresses where they are known.
///
/// # Errors
/// [`Reason::Truncated`], [`Reason::HelperFailed`].
#[inline(always)]
pub fn send_on<P: Packet, F: Family>(packet: &mut P, limit: u8, hop: &Hop) -> Result<(), Reason> {
    if let Some(checksum) = F::L3_CHECKSUM {
        let from = u16::from_ne_bytes([limit, 0]);
        let to = u16::from_ne_bytes([limit - 1, 0]);
        packet.patch_l3(checksum, Diff::default().word(from, to))?;
    }
    packet.set(F::HOP_LIMIT, limit - 1)?;
    set_link(packet, hop)
}

/// The link addresses, where they are known.
///
/// # Errors
/// [`Reason::Truncated`].
#[inline(always)]
pub fn set_link<P: Packet>(packet: &mut P, hop: &Hop) -> Result<(), Reason> {
    if hop.is_resolved() { packet.set(0, hop.macs) } else { Ok(()) }
}
