//! Choosing a backend, or a source port.

/// Maps 32 random bits onto `0..count` without a division (Lemire's multiply and shift); 0 where `count` is 0.
#[inline(always)]
pub const fn pick(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

/// The `turn`th of the numbers below `range`, each of which comes up once in `range` turns, in an order that only who has the
/// `seed` knows; few come up twice, or not at all. `range` is at most 65,536; 0 where it is 0.
///
/// A permutation of the least power of two, gone through again until it leads into the range.
#[inline(always)]
pub const fn shuffle(turn: u32, range: u32, seed: u64) -> u32 {
    if range == 0 {
        return 0;
    }
    let mut mask = range - 1;
    mask |= mask >> 1;
    mask |= mask >> 2;
    mask |= mask >> 4;
    mask |= mask >> 8;
    let mut number = turn % range;
    let mut walk = 0;
    while walk < 12 {
        walk += 1;
        number = permuted(number, mask, seed);
        if number < range {
            return number;
        }
    }
    number % range
}

/// Each step can be undone: an odd factor, a secret addend, and a shift.
#[inline(always)]
const fn permuted(number: u32, mask: u32, seed: u64) -> u32 {
    let mut number = number;
    let mut seed = seed;
    let mut round = 0;
    while round < 3 {
        round += 1;
        number = number.wrapping_mul((seed as u32 ^ 0x9E37_79B1) | 1).wrapping_add((seed >> 32) as u32) & mask;
        number ^= number >> 7;
        seed = seed.rotate_left(21);
    }
    number
}

/// The next turn, counted by all cores together at `turn`.
///
/// # Safety
/// `turn` is aligned, and written by nothing else.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub unsafe fn take_turn(turn: *mut u32) -> u32 {
    use core::intrinsics::{AtomicOrdering, atomic_xadd};
    // SAFETY: the caller's.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(turn, 1) }
}

/// Counts one more, together with all other cores.
///
/// # Safety
/// `counter` is aligned, and written by nothing else but this and by who sets it back.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub unsafe fn count_one(counter: *mut u64) {
    use core::intrinsics::{AtomicOrdering, atomic_xadd};
    // SAFETY: the caller's.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(counter, 1) };
}

#[cfg(test)]
mod tests {
    use super::{pick, shuffle};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_pick_is_within_the_set(random: u32, count in 1u32..) {
            prop_assert!(pick(random, count) < count);
        }
    }

    #[test]
    fn every_port_has_its_turn() {
        for (range, seed) in
            [(21_732u32, 0x1234_5678_9abc_def1u64), (2700, 99), (1, 5), (256, 0), (32_768, 7), (48_000, !0)]
        {
            let mut seen = vec![0u32; range as usize];
            for turn in 0..range {
                seen[shuffle(turn, range, seed) as usize] += 1;
            }
            let once = seen.iter().filter(|times| **times == 1).count();
            assert!(once as f64 >= 0.85 * f64::from(range), "{once} of {range} with seed {seed}");
            assert!(seen.iter().all(|times| *times <= 3), "{range} {seed}");
        }
    }

    #[test]
    fn every_backend_of_a_small_set_has_its_equal_share() {
        for count in 1..=7u32 {
            let mut hits = [0u32; 7];
            for step in 0..70_000u32 {
                hits[pick(step.wrapping_mul(u32::MAX / 70_000), count) as usize] += 1;
            }
            let share = 70_000 / count;
            for hit in &hits[..count as usize] {
                assert!(hit.abs_diff(share) <= 2 + share / 1000, "{count} backends: {hits:?}");
            }
        }
    }
}
