//! One address type for both families.
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address in network byte order; an IPv4 address is held as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2), so that one
/// table serves both families and a v4-mapped destination on an IPv6 socket finds the IPv4 Service.
///
/// The words are the address's bytes as they stand in a packet, read natively.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Addr(pub [u32; 4]);

const _: () = assert!(size_of::<Addr>() == 16);

const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// `::`, which as a frontend's address stands for every IPv6 address of the node (a NodePort).
    pub const ANY_V6: Addr = Addr([0; 4]);
    /// `0.0.0.0`, which as a frontend's address stands for every IPv4 address of the node (a NodePort).
    pub const ANY_V4: Addr = Addr::v4(0);

    /// `raw` is an IPv4 address as it stands in a packet, read natively.
    #[inline(always)]
    pub const fn v4(raw: u32) -> Self {
        Addr([0, 0, MAPPED, raw])
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// 127.0.0.0/8 and ::1.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 24 == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 1u32.to_be()
        }
    }

    /// Stands for a client that is known by its network namespace (SO_NETNS_COOKIE) alone: an address that no packet has,
    /// since 100::/64 is for discarding (RFC 6666).
    #[inline(always)]
    pub const fn of_netns(cookie: u64) -> Self {
        Addr([0x0100_0000_u32.to_be(), 0, cookie as u32, (cookie >> 32) as u32])
    }

    /// The cookie of [`Addr::of_netns`]; none where this is an address.
    pub const fn netns(&self) -> Option<u64> {
        if self.0[0] == 0x0100_0000_u32.to_be() && self.0[1] == 0 {
            Some(self.0[2] as u64 | (self.0[3] as u64) << 32)
        } else {
            None
        }
    }

    /// The wildcard of this address's family.
    #[inline(always)]
    pub const fn any(&self) -> Addr {
        if self.is_v4() { Addr::ANY_V4 } else { Addr::ANY_V6 }
    }

    /// Its words as one, for hashing.
    #[inline(always)]
    pub const fn folded(&self) -> u32 {
        self.0[0] ^ self.0[1].rotate_left(11) ^ self.0[2].rotate_left(19) ^ self.0[3]
    }

    #[inline(always)]
    pub const fn pairs(&self) -> [u64; 2] {
        [self.0[0] as u64 | (self.0[1] as u64) << 32, self.0[2] as u64 | (self.0[3] as u64) << 32]
    }

    #[inline(always)]
    pub const fn from_pairs(p: [u64; 2]) -> Self {
        Addr([p[0] as u32, (p[0] >> 32) as u32, p[1] as u32, (p[1] >> 32) as u32])
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(a: Ipv4Addr) -> Self {
        Addr::v4(u32::from_ne_bytes(a.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(a: Ipv6Addr) -> Self {
        let o = a.octets();
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(o.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Addr(words)
    }
}

impl From<IpAddr> for Addr {
    fn from(a: IpAddr) -> Self {
        match a {
            IpAddr::V4(a) => a.into(),
            IpAddr::V6(a) => a.into(),
        }
    }
}

impl From<Addr> for IpAddr {
    fn from(a: Addr) -> Self {
        if a.is_v4() {
            return IpAddr::V4(Ipv4Addr::from(a.0[3].to_ne_bytes()));
        }
        let mut octets = [0; 16];
        for (bytes, word) in octets.chunks_exact_mut(4).zip(a.0) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        IpAddr::V6(octets.into())
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn loopback_is_all_of_127_and_one_of_v6() {
        for (text, is) in
            [("127.0.0.1", true), ("127.9.9.9", true), ("128.0.0.1", false), ("::1", true), ("::2", false)]
        {
            assert_eq!(Addr::from(text.parse::<IpAddr>().unwrap()).is_loopback(), is, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_address_survives_the_round_trip(a: IpAddr) {
            // A mapped address is IPv4 to us, by design.
            prop_assume!(!matches!(a, IpAddr::V6(v) if v.to_ipv4_mapped().is_some()));
            let addr = Addr::from(a);
            prop_assert_eq!(IpAddr::from(addr), a);
            prop_assert_eq!(addr.is_v4(), a.is_ipv4());
            prop_assert_eq!(Addr::from_pairs(addr.pairs()), addr);
        }
    }
}
