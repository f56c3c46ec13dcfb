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

/// Eight bytes each, of a live frame.
pub(crate) const LIVE_WORDS: usize = 8;

/// What the generator of live frames writes, IPv4 without options in 64 bytes. Its checksums are right for every flow: what
/// varies in a frame stands in it twice, the second time as its complement.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Live {
    pub(crate) header: [u64; LIVE_WORDS],
    /// One less than the number of flows, which is a power of two.
    pub(crate) mask: u32,
    /// 0: a flow at random, else one after the other.
    pub(crate) in_turn: u32,
    /// Where to start from with flows in turn.
    pub(crate) first: u32,
    /// The first of the source ports.
    pub(crate) first_port: u32,
    /// Where the frames go.
    pub(crate) interface: u32,
    /// Not 0: when the frame was made stands in it, which is UDP's.
    pub(crate) stamped: u32,
    /// Nanoseconds between two frames at the least, with flows in turn.
    pub(crate) pause: u32,
    /// Where there is a pause, no more frames than these.
    pub(crate) limit: u32,
}

/// Where in a live frame, in bytes.
pub(crate) mod at {
    /// The header's own checksum is mended by the identification.
    pub(crate) const IDENTIFICATION: u32 = 18;
    /// The last two bytes of the source address.
    pub(crate) const ADDRESS: u32 = 28;
    pub(crate) const PORT: u32 = 34;
    /// Nanoseconds, modulo 2^32; the complement follows.
    pub(crate) const STAMP: u32 = 44;
    pub(crate) const ADDRESS_COMPLEMENT: u32 = 60;
    pub(crate) const PORT_COMPLEMENT: u32 = 62;
}

/// How many steps the far end counts a stamp's age in.
pub(crate) const AGES: u32 = 1 << 14;
/// A step is this many bits of nanoseconds: 64 ns.
pub(crate) const AGE_SHIFT: u32 = 6;
/// The far end counts all frames of IPv4, and below those to this network.
pub(crate) const BACKENDS: [u8; 2] = [10, 78];
