//! Time in steps, and what is limited by it.

/// Binary logarithm of a tick in nanoseconds: 134 ms.
pub const TICK_SHIFT: u32 = 27;
/// For each CPU and tick: ten thousand a second, as many as the kernel sends ICMP messages (icmp_msgs_per_sec).
const MOST: u32 = 1342;

/// Counts one more of what a flood must not make a flood of, and says whether it may still be. `tick`, `count`: this CPU's own;
/// `now`: nanoseconds.
#[inline(always)]
pub const fn has_room(tick: &mut u32, count: &mut u32, now: u64) -> bool {
    let this = (now >> TICK_SHIFT) as u32;
    if *tick != this {
        (*tick, *count) = (this, 0);
    }
    *count += 1;
    *count <= MOST
}
