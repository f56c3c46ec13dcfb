//! Choosing one of a set's backends.

/// Maps 32 random bits onto `0..count` without a division (Lemire's multiply and shift); 0 where `count` is 0.
#[inline(always)]
pub const fn pick(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::pick;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_pick_is_within_the_set(random: u32, count in 1u32..) {
            prop_assert!(pick(random, count) < count);
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
