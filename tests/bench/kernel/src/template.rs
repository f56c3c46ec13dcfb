//! What a generator is told; the benchmark compiles this file, too.

/// Eight bytes each, of a header.
pub(crate) const WORDS: usize = 10;

/// What a generator writes.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Template {
    /// The packet's first bytes.
    pub(crate) header: [u64; WORDS],
    /// One less than the number of flows, which is a power of two.
    pub(crate) mask: u32,
    /// 0: a flow at random, else one after the other.
    pub(crate) in_turn: u32,
    /// Where the last two bytes of the source address and the source port stand.
    pub(crate) address: u32,
    pub(crate) port: u32,
    /// Where to start from with flows in turn.
    pub(crate) first: u32,
    /// The first of the source ports.
    pub(crate) first_port: u32,
}
