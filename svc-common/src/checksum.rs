//! The Internet checksum, updated by difference (RFC 1624).
use crate::Addr;

/// A running one's-complement difference. Words are added as they stand in the packet: the sum does not depend on byte
/// order (RFC 1071, 2 B).
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Diff(pub u64);

impl Diff {
    #[inline(always)]
    pub const fn word(self, from: u16, to: u16) -> Self {
        Diff(self.0 + (!from) as u64 + to as u64)
    }

    #[inline(always)]
    pub const fn long(self, from: u32, to: u32) -> Self {
        Diff(self.0 + halves(!from) + halves(to))
    }

    /// IPv4-mapped prefixes cancel out, so one rule serves both families.
    #[inline(always)]
    pub const fn addr(self, from: Addr, to: Addr) -> Self {
        self.long(from.0[0], to.0[0]).long(from.0[1], to.0[1]).long(from.0[2], to.0[2]).long(from.0[3], to.0[3])
    }

    /// The checksum field's new value. UDP's zero ("no checksum", RFC 768) is the caller's matter.
    #[inline(always)]
    pub const fn apply(self, field: u16) -> u16 {
        !fold(self.0 + (!field) as u64)
    }
}

const fn halves(v: u32) -> u64 {
    (v & 0xffff) as u64 + (v >> 16) as u64
}

/// Folds a sum to 16 bits with its carries.
#[inline(always)]
pub const fn fold(mut sum: u64) -> u16 {
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The one's-complement sum of `bytes` as they stand in memory, to be folded and inverted.
pub fn sum(bytes: &[u8]) -> u64 {
    let mut total = 0;
    let mut words = bytes.chunks_exact(2);
    for word in &mut words {
        total += u64::from(u16::from_ne_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_difference_gives_what_summing_again_gives(
            mut bytes in proptest::collection::vec(any::<u8>(), 8..64), at in 0usize..3, to: u32, port: u16
        ) {
            prop_assume!(sum(&bytes) != 0);
            let field = !fold(sum(&bytes));
            let read = |b: &[u8], i: usize| u32::from_ne_bytes(b[i..i + 4].try_into().unwrap());
            let diff = Diff::default().long(read(&bytes, at * 2), to);
            bytes[at * 2..at * 2 + 4].copy_from_slice(&to.to_ne_bytes());
            let old = u16::from_ne_bytes([bytes[0], bytes[1]]);
            let diff = diff.word(old, port);
            bytes[..2].copy_from_slice(&port.to_ne_bytes());
            // 0 and 0xffff are the same number in one's complement.
            let same = |a: u16, b: u16| a == b || (a ^ b == 0xffff && (a == 0 || b == 0));
            prop_assert!(same(diff.apply(field), !fold(sum(&bytes))));
        }
    }
}
