//! SCTP's checksum (CRC32c; RFC 9260, appendix A), updated by difference: a CRC is linear, so that of changed bytes is known
//! without the rest of the packet.

use crate::verifier::opaque;

/// Castagnoli's polynomial, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Bits of a packet's length.
const LENGTH_BITS: usize = 16;

/// The checksum of a packet of `length` bytes whose first four bytes change by `difference` (exclusive or). All words as
/// they stand in a packet on a little-endian machine, which is how the checksum is sent; `checksum` is the old one.
#[inline(always)]
pub fn patch(checksum: u32, difference: u32, length: u32) -> u32 {
    // A register that has taken the difference in, with a register of zeros before it, is that many zero bytes later
    // what the two packets' checksums differ by. What the register starts with and is inverted by cancels out.
    checksum ^ advance(difference, length & 0xffff)
}

/// A CRC register after `bytes` zero bytes: times x^(8 * bytes), a table for each bit of that number. Without a choice, so
/// that the kernel's verifier has one path to walk.
#[inline(always)]
fn advance(mut register: u32, bytes: u32) -> u32 {
    let mut bit = 0;
    while bit < LENGTH_BITS {
        let table = 2 * bit as u32 + (bytes >> bit & 1);
        let mut product = 0;
        let mut nibble = 0;
        while nibble < 8 {
            let index = (table * 8 + nibble) * 16 + (register >> (4 * nibble) & 0xf);
            // Verifiers before Linux 6.10 lose the bounds of a sum that was made by "or"; a mask at the end they see.
            product ^= TABLES[opaque(index as u64) as usize % TABLES.len()];
            nibble += 1;
        }
        register = product;
        bit += 1;
    }
    register
}

/// Product of two reflected polynomials of degree 31 (bit 31 is x^0), modulo [`POLYNOMIAL`].
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut i = 0;
    while i < 32 {
        if a >> (31 - i) & 1 == 1 {
            product ^= b;
        }
        b = if b & 1 == 1 { b >> 1 ^ POLYNOMIAL } else { b >> 1 };
        i += 1;
    }
    product
}

/// What a register's nibble, by place and value, becomes: of each bit's two tables by the first itself, by the second times
/// x^(8 * 2^bit).
static TABLES: [u32; LENGTH_BITS * 2 * 8 * 16] = {
    let mut tables = [0; LENGTH_BITS * 2 * 8 * 16];
    // x^8: bit 31 - 8.
    let mut power = 1 << 23;
    let mut bit = 0;
    while bit < LENGTH_BITS {
        let mut i = 0;
        while i < 8 * 16 {
            let (nibble, value) = (i / 16, i % 16);
            let part = (value as u32) << (4 * nibble);
            tables[bit * 2 * 8 * 16 + i] = part;
            tables[(bit * 2 + 1) * 8 * 16 + i] = multiply(part, power);
            i += 1;
        }
        power = multiply(power, power);
        bit += 1;
    }
    tables
};

#[cfg(test)]
mod tests {
    use super::patch;
    use proptest::prelude::*;

    /// By the definition, bit by bit.
    fn crc32c(bytes: &[u8]) -> u32 {
        let mut register = u32::MAX;
        for byte in bytes {
            register ^= u32::from(*byte);
            for _ in 0..8 {
                register = if register & 1 == 1 { register >> 1 ^ 0x82f6_3b78 } else { register >> 1 };
            }
        }
        !register
    }

    #[test]
    fn the_reference_itself_is_right() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn a_patched_checksum_is_that_of_the_changed_packet(mut packet in proptest::collection::vec(any::<u8>(), 12..1500), ports: u32) {
            let before = crc32c(&packet);
            let old = u32::from_le_bytes(packet[..4].try_into().unwrap());
            packet[..4].copy_from_slice(&ports.to_le_bytes());
            prop_assert_eq!(patch(before, old ^ ports, packet.len() as u32), crc32c(&packet));
        }
    }
}
