//! The flow table: sets of four cells; a cell is one direction of one flow, and one cache line.
//!
//! Plain memory: the kernel binds it to an mmapable array map, tests to a vector, inspection to the mapped pages. A reader
//! takes no lock: it reads the cell's head, copies, and reads the head again. A writer takes the cell by compare-and-swap.
//!
//! A flow has two cells, which lead to each other:
//! - forward, client to frontend: `to` is the backend, `second` the source port that the backend sees;
//! - reverse, backend to client: `to` is the frontend, `second` the client's port, `dst` the client's address. Where the
//!   source was masqueraded the packet's own destination is an address of this node; the cell is then found by
//!   the port alone ([`Key::masqueraded`]), and `dst` is where the client's address is kept.
use core::cmp::{max, min};
use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use crate::Addr;
use crate::map::{SCTP, TCP, UDP};
use crate::verifier::{opaque, zeros};

pub const WAYS: usize = 4;

/// Binary logarithm of a tick in nanoseconds (2.1 s): the unit of a cell's last use. 16 bits of ticks are 39 hours.
pub const TICK_SHIFT: u32 = 31;

const fn ticks(seconds: u32) -> u16 {
    (((seconds as u64) * 1_000_000_000) >> TICK_SHIFT) as u16 + 1
}

/// Ages are counted from this many ticks ahead of now: another core, or the kernel beside a reader, may have looked at the clock
/// later, and what it has just used must not seem to be as old as ticks can tell.
const AHEAD: u16 = 16;

/// Ticks since `last`, and [`AHEAD`].
#[inline(always)]
const fn age(now: u16, last: u16) -> u16 {
    now.wrapping_add(AHEAD).wrapping_sub(last)
}

/// How often, in ticks as a power of two, a live direction keeps its silent counterpart from growing old.
const PEER_REFRESH_SHIFT: u32 = 3;

#[repr(C, align(64))]
#[derive(Clone, Copy, Default, Debug)]
pub struct Cell {
    key: Key,
    to: [u64; 2],
    tail: Tail,
}
const _: () = assert!(size_of::<Cell>() == 64);

#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq)]
struct Tail {
    port: u16,
    last: u16,
    backend: [u8; 3],
    state: u8,
}
const _: () = assert!(size_of::<Tail>() == 8);

#[repr(C, align(64))]
#[derive(Clone, Copy, Default)]
pub struct Set(pub [Cell; WAYS]);
const _: () = assert!(size_of::<Set>() == 256);

const PORTS: u64 = 0xffff_ffff;
const PROTOCOL_SHIFT: u32 = 32;
const LIVE: u64 = 1 << 34;
const REVERSE: u64 = 1 << 35;
/// Part of the key: found by source and port alone.
const BY_PORT: u64 = 1 << 36;
/// Forward: the source address becomes this node's.
const MASQUERADE: u64 = 1 << 37;
const LOCKED: u64 = 1 << 38;
/// In a set's first cell: an entry of this set may be in its second choice. Belongs to the set, not to the cell's flow.
const OVERFLOWN: u64 = 1 << 39;
const SECOND_SHIFT: u32 = 40;
const SEQUENCE: u64 = 1 << 56;
const SEQUENCE_MASK: u64 = 0xff << 56;
const KEY: u64 = PORTS | 3 << PROTOCOL_SHIFT | BY_PORT;

/// A packet went back to the client.
pub const REPLIED: u8 = 1;
/// The client answered the reply (TCP: anything after its SYN).
pub const CONFIRMED: u8 = 1 << 1;
pub const FIN_CLIENT: u8 = 1 << 2;
pub const FIN_BACKEND: u8 = 1 << 3;
pub const RESET: u8 = 1 << 4;
const STATE_BITS: u32 = 5;
/// Not of the flow's life: the client is reached through this node's stack, so that replies take the frontend's address
/// where they come in.
pub const TO_STACK: u8 = 1 << 7;
const STATE_MASK: u8 = (1 << STATE_BITS) - 1;

/// What the state bits amount to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum State {
    /// One direction only.
    New,
    Established,
    /// One side has sent its FIN.
    Closing,
    Closed,
}

impl State {
    #[inline(always)]
    pub const fn of(bits: u8) -> State {
        if bits & RESET != 0 || bits & (FIN_CLIENT | FIN_BACKEND) == FIN_CLIENT | FIN_BACKEND {
            State::Closed
        } else if bits & (FIN_CLIENT | FIN_BACKEND) != 0 {
            State::Closing
        } else if bits & (REPLIED | CONFIRMED) == REPLIED | CONFIRMED {
            State::Established
        } else {
            State::New
        }
    }

    pub const fn label(self) -> &'static str {
        match self {
            State::New => "new",
            State::Established => "established",
            State::Closing => "closing",
            State::Closed => "closed",
        }
    }
}

/// After how many seconds without a packet a flow is over. The defaults are the kernel's connection tracking's, with
/// kube-proxy's for established and half-closed TCP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    pub tcp_established: u32,
    /// One side has sent its FIN.
    pub tcp_closing: u32,
    /// Packets one way only.
    pub udp: u32,
    /// Packets both ways.
    pub udp_stream: u32,
    pub sctp_established: u32,
}

impl Timeouts {
    pub const DEFAULT: Timeouts =
        Timeouts { tcp_established: 86_400, tcp_closing: 3_600, udp: 30, udp_stream: 120, sctp_established: 210 };
    /// More cannot be told by a cell's clock of 16 bits.
    pub const MAX: u32 = 36 * 3_600;
}

/// By protocol and [`State`]: after how many idle ticks, and [`AHEAD`], a cell may be taken.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IdleLimits([u16; 16]);

impl IdleLimits {
    pub const fn new(timeouts: &Timeouts) -> Self {
        const HALF_OPEN: u32 = 60;
        const CLOSED: u32 = 10;
        let mut limits = [0; 16];
        let mut code = 0;
        while code < 4 {
            let [new, established, closing] = match protocol((code as u64) << PROTOCOL_SHIFT) {
                TCP => [HALF_OPEN, timeouts.tcp_established, timeouts.tcp_closing],
                UDP => [timeouts.udp, timeouts.udp_stream, timeouts.udp],
                _ => [HALF_OPEN, timeouts.sctp_established, HALF_OPEN],
            };
            limits[code << 2 | State::New as usize] = ticks(new) + AHEAD;
            limits[code << 2 | State::Established as usize] = ticks(established) + AHEAD;
            limits[code << 2 | State::Closing as usize] = ticks(closing) + AHEAD;
            limits[code << 2 | State::Closed as usize] = ticks(CLOSED) + AHEAD;
            code += 1;
        }
        IdleLimits(limits)
    }
}

impl Default for IdleLimits {
    fn default() -> Self {
        IdleLimits::new(&Timeouts::DEFAULT)
    }
}

/// What a cell is found by.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Key {
    /// From bit 0: source port 16, destination port 16, protocol 2, flags 6, second port 16, sequence 8. Ports in network
    /// byte order. The key's part of it is [`KEY`]; in a cell, every rewrite moves the sequence.
    head: u64,
    src: [u64; 2],
    dst: [u64; 2],
}

impl Key {
    /// Ports in network byte order.
    #[inline(always)]
    pub const fn new(src: Addr, dst: Addr, sport: u16, dport: u16, protocol: u8) -> Self {
        Key { src: src.pairs(), dst: dst.pairs(), head: head(sport, dport, protocol) }
    }

    /// The key of a reply to masqueraded traffic: `port` is the source port that was given to the flow. The destination's
    /// address is this node's and not looked at, since a port is given out once for a backend whatever the address.
    #[inline(always)]
    pub fn masqueraded(backend: Addr, backend_port: u16, port: u16, protocol: u8) -> Self {
        Key { src: backend.pairs(), dst: zeros(), head: head(backend_port, port, protocol) | BY_PORT }
    }

    /// All ones where the destination's address belongs to the key.
    #[inline(always)]
    const fn dst_mask(&self) -> u64 {
        if self.head & BY_PORT != 0 { 0 } else { u64::MAX }
    }

    /// 64 bits, of which each half chooses a set; `seed` is a secret, so that nobody can aim at one set.
    ///
    /// What differs in many keys is the last bytes of an address, the highest bits of its word, which a multiplication takes
    /// nowhere: the end is MurmurHash3's, which brings every bit everywhere.
    #[inline(always)]
    const fn hash(&self, seed: u64) -> u64 {
        let mask = self.dst_mask();
        let a = (self.src[1] ^ seed).wrapping_mul(0x9E37_79B1_85EB_CA87);
        let b = ((self.dst[1] & mask) ^ seed.rotate_left(17)).wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
        let c = (self.src[0] ^ (self.dst[0] & mask).rotate_left(32) ^ (self.head & KEY) ^ seed.rotate_left(41))
            .wrapping_mul(0x1656_67B1_9E37_79F9);
        let h = a ^ b.rotate_left(23) ^ (c >> 29) ^ c;
        let h = (h ^ (h >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
        let h = (h ^ (h >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
        h ^ (h >> 33)
    }
}

#[inline(always)]
const fn head(sport: u16, dport: u16, protocol: u8) -> u64 {
    let code: u64 = match protocol {
        TCP => 1,
        UDP => 2,
        _ => 3,
    };
    sport as u64 | (dport as u64) << 16 | code << PROTOCOL_SHIFT
}

#[inline(always)]
const fn protocol(head: u64) -> u8 {
    match (head >> PROTOCOL_SHIFT) & 3 {
        1 => TCP,
        2 => UDP,
        _ => SCTP,
    }
}

/// What a cell says of a packet. Ports in network byte order.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Hit {
    to: [u64; 2],
    dst: [u64; 2],
    /// Port of `to`.
    pub port: u16,
    /// Forward: the source port towards the backend. Reverse: the client's port.
    pub second: u16,
    /// Tick of the last packet.
    pub last: u16,
    pub state: u8,
    flags: u8,
    pub backend: u32,
}

impl Hit {
    /// What [`find`] would say of the entry that [`Entry::forward`] makes of the same; `frontend` is its key's destination.
    #[inline(always)]
    pub fn set_forward(&mut self, frontend: Addr, to: Addr, masquerade: bool, backend: u32) {
        self.to = to.pairs();
        self.dst = frontend.pairs();
        self.flags = if masquerade { (MASQUERADE >> PROTOCOL_SHIFT) as u8 } else { 0 };
        self.backend = backend;
    }

    #[inline(always)]
    pub const fn to(&self) -> Addr {
        Addr::from_pairs(self.to)
    }

    /// Where the packet is to go in the end: for a reverse cell the client's address.
    #[inline(always)]
    pub const fn dst(&self) -> Addr {
        Addr::from_pairs(self.dst)
    }

    #[inline(always)]
    pub const fn is_reverse(&self) -> bool {
        (self.flags as u64) << PROTOCOL_SHIFT & REVERSE != 0
    }

    /// See [`TO_STACK`].
    #[inline(always)]
    pub const fn is_to_stack(&self) -> bool {
        self.state & TO_STACK != 0
    }

    /// The flow's source address is this node's on the way to the backend.
    #[inline(always)]
    pub const fn is_masqueraded(&self) -> bool {
        (self.flags as u64) << PROTOCOL_SHIFT & (MASQUERADE | BY_PORT) != 0
    }
}

/// A cell to be written. Ports in network byte order.
#[derive(Clone, Copy)]
pub struct Entry(Cell);

impl Entry {
    #[inline(always)]
    const fn new(key: Key, flags: u64, to: [u64; 2], port: u16, second: u16, backend: u32, state: u8) -> Self {
        let head = (key.head & KEY) | flags | (second as u64) << SECOND_SHIFT;
        let backend = [backend as u8, (backend >> 8) as u8, (backend >> 16) as u8];
        Entry(Cell { key: Key { head, src: key.src, dst: key.dst }, to, tail: Tail { port, last: 0, backend, state } })
    }

    /// Client to frontend. `source_port` is what the backend sees; `masquerade`: it sees an address of this node, too.
    #[inline(always)]
    pub const fn forward(key: Key, to: Addr, port: u16, source_port: u16, masquerade: bool, backend: u32) -> Self {
        Entry::new(key, if masquerade { MASQUERADE } else { 0 }, to.pairs(), port, source_port, backend, 0)
    }

    /// `state`: the state bits that the flow begins with.
    #[inline(always)]
    pub const fn set_state(&mut self, state: u8) {
        self.0.tail.state = state;
    }

    /// Backend to client.
    #[inline(always)]
    pub const fn reverse(key: Key, frontend: Addr, port: u16, client: Addr, client_port: u16, backend: u32) -> Self {
        let key = Key { head: key.head, src: key.src, dst: client.pairs() };
        Entry::new(key, REVERSE, frontend.pairs(), port, client_port, backend, 0)
    }

    #[inline(always)]
    pub const fn key(&self) -> &Key {
        &self.0.key
    }

    /// Whether what was found by its key leads where it does.
    #[inline(always)]
    fn is(&self, found: &Hit) -> bool {
        let Cell { key, to, tail } = &self.0;
        found.to == *to
            && found.dst == key.dst
            && found.port == tail.port
            && found.second == (key.head >> SECOND_SHIFT) as u16
    }

    /// What [`find`] would say of it.
    #[inline(always)]
    pub const fn hit(&self, now: u16) -> Hit {
        let mut hit = decode(&self.0);
        hit.last = now;
        hit
    }

    /// The counterpart of the cell that was hit by `key`.
    #[inline(always)]
    pub const fn peer_of(hit: &Hit, key: &Key) -> Self {
        let (sport, dport) = (key.head as u16, (key.head >> 16) as u16);
        let protocol = key.head & 3 << PROTOCOL_SHIFT;
        if hit.is_reverse() {
            // client:second -> to:port
            let head = hit.second as u64 | (hit.port as u64) << 16 | protocol;
            let flags = if hit.is_masqueraded() { MASQUERADE } else { 0 };
            let forward = Key { head, src: hit.dst, dst: hit.to };
            Entry::new(forward, flags, key.src, sport, dport, hit.backend, hit.state)
        } else {
            let by_port = if hit.is_masqueraded() { BY_PORT } else { 0 };
            let head = hit.port as u64 | (hit.second as u64) << 16 | protocol | by_port;
            let reverse = Key { head, src: hit.to, dst: key.src };
            Entry::new(reverse, REVERSE, key.dst, dport, sport, hit.backend, hit.state)
        }
    }
}

/// The memory of the table.
pub trait Memory {
    /// The set at `index` modulo the number of sets, which is a power of two; null where there is none.
    fn set(&self, index: u32) -> *mut Set;
    fn seed(&self) -> u64;
    /// Null where there is no table.
    fn idle_limits(&self) -> *const IdleLimits;
    /// How many searches for room have failed since the last one that did not, see [`MANY`]; null where nobody counts.
    fn crowded(&self) -> *mut u32;

    /// [`put`], or a kernel function that is verified by itself and calls it. So for those below.
    fn put(&self, entry: &Entry, now: u16, room: Room) -> Added
    where
        Self: Sized,
    {
        put(self, entry, now, room)
    }

    /// As [`count`].
    fn count(&self, key: &Key) -> u32
    where
        Self: Sized,
    {
        count(self, key)
    }

    /// As [`victim`].
    ///
    /// # Safety
    /// `set` is a whole set of this table.
    unsafe fn victim(&self, set: *const Set, now: u16) -> u32
    where
        Self: Sized,
    {
        // SAFETY: the caller's set.
        unsafe { victim(self, set, now) }
    }

    /// As [`vacancy`].
    fn vacancy(&self, key: &Key, now: u16) -> Vacancy
    where
        Self: Sized,
    {
        vacancy(self, key, now)
    }

    /// As [`make_room`].
    fn make_room(&self, entry: &Entry, now: u16)
    where
        Self: Sized,
    {
        make_room(self, entry, now);
    }

    /// As [`sync`].
    fn sync(&self, key: &Key, hit: &Hit, now: u16) -> bool
    where
        Self: Sized,
    {
        sync(self, key, hit, now)
    }

    /// As [`close`].
    fn close(&self, key: &Key, hit: &Hit)
    where
        Self: Sized,
    {
        close(self, key, hit);
    }

    /// As [`remove`].
    fn remove(&self, key: &Key)
    where
        Self: Sized,
    {
        remove(self, key);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Added {
    New,
    /// The key has a cell already; nothing was changed.
    Exists,
    /// All cells that the key may have are taken by flows that live, or the best one by its flow's other direction.
    Full,
}

/// The key's cell, or null; what it says stands in `hit` then.
///
/// A key has two sets. The second is looked at only where the first has once been full.
#[inline(always)]
pub fn find<M: Memory>(memory: &M, key: &Key, hit: &mut Hit) -> *mut Cell {
    let hash = key.hash(memory.seed());
    let first = memory.set((hash >> 32) as u32);
    if first.is_null() {
        return core::ptr::null_mut();
    }
    // SAFETY: `set` gives null or a whole set, and cells are read by the protocol above.
    unsafe {
        let cell = find_in(first, key, hit);
        if !cell.is_null() || head_of(addr_of!((*first).0[0])) & OVERFLOWN == 0 {
            return cell;
        }
        let second = memory.set(hash as u32);
        if second.is_null() {
            return second.cast();
        }
        find_in(second, key, hit)
    }
}

/// From the last cell on, since that is taken first ([`victim`]): in a set with few flows no other line is touched.
#[inline(always)]
unsafe fn find_in(set: *mut Set, key: &Key, hit: &mut Hit) -> *mut Cell {
    let mut way = WAYS;
    while way > 0 {
        way -= 1;
        // SAFETY: the caller's set is whole.
        unsafe {
            let cell = addr_of_mut!((*set).0[way]);
            let head = head_of(cell);
            // Most cells differ in their first word.
            if head & (KEY | LIVE | LOCKED) == key.head & KEY | LIVE && difference(cell, key) == 0 {
                let copy = read_volatile(cell);
                if (head ^ head_of(cell)) & !OVERFLOWN == 0 {
                    *hit = decode(&copy);
                    return cell;
                }
            }
        }
    }
    core::ptr::null_mut()
}

#[inline(always)]
unsafe fn head_of(cell: *const Cell) -> u64 {
    // SAFETY: the caller's cell.
    unsafe { read_volatile(addr_of!((*cell).key.head)) }
}

/// Word by word, so that nothing needs to stand on the kernel's stack.
#[inline(always)]
unsafe fn read_pair(pair: *const [u64; 2]) -> [u64; 2] {
    let words = pair.cast::<u64>();
    // SAFETY: the caller's pair.
    unsafe { [read_volatile(words), read_volatile(words.add(1))] }
}

#[inline(always)]
unsafe fn write_pair(pair: *mut [u64; 2], value: [u64; 2]) {
    let words = pair.cast::<u64>();
    // SAFETY: the caller's pair.
    unsafe {
        write_volatile(words, value[0]);
        write_volatile(words.add(1), value[1]);
    }
}

/// 0 where the cell is the key's, and whole.
#[inline(always)]
unsafe fn difference(cell: *const Cell, key: &Key) -> u64 {
    // SAFETY: the caller's cell.
    unsafe {
        let src = read_pair(addr_of!((*cell).key.src));
        let dst = read_pair(addr_of!((*cell).key.dst));
        let head = (head_of(cell) & (KEY | LIVE | LOCKED)) ^ (key.head & KEY | LIVE);
        let mask = key.dst_mask();
        head | (src[0] ^ key.src[0]) | (src[1] ^ key.src[1]) | ((dst[0] ^ key.dst[0]) | (dst[1] ^ key.dst[1])) & mask
    }
}

/// How many cells are the key's. Where both its choices are the same set, each of that set's cells counts twice once that is
/// [`OVERFLOWN`], as it is with an entry of that kind.
#[inline(always)]
pub fn count<M: Memory>(memory: &M, key: &Key) -> u32 {
    let hash = key.hash(memory.seed());
    let (first, second) = (memory.set((hash >> 32) as u32), memory.set(hash as u32));
    if first.is_null() || second.is_null() {
        return 0;
    }
    // SAFETY: two whole sets of `memory`.
    unsafe {
        let found = count_in(first, key);
        // In this order: what was moved meanwhile has left its mark.
        if head_of(addr_of!((*first).0[0])) & OVERFLOWN == 0 { found } else { found + count_in(second, key) }
    }
}

/// How many cells of the set are the key's.
#[inline(always)]
unsafe fn count_in(set: *const Set, key: &Key) -> u32 {
    let mut found = 0;
    let mut way = 0;
    while way < WAYS {
        // SAFETY: the caller's set is whole.
        found += is_zero(unsafe { difference(addr_of!((*set).0[way]), key) });
        way += 1;
    }
    found
}

#[inline(always)]
const fn decode(cell: &Cell) -> Hit {
    let Cell { key: Key { head, dst, .. }, to, tail } = *cell;
    Hit {
        to,
        dst,
        port: tail.port,
        second: (head >> SECOND_SHIFT) as u16,
        last: tail.last,
        state: tail.state,
        flags: ((head & (REVERSE | BY_PORT | MASQUERADE)) >> PROTOCOL_SHIFT) as u8,
        backend: tail.backend[0] as u32 | (tail.backend[1] as u32) << 8 | (tail.backend[2] as u32) << 16,
    }
}

/// Notes that the flow lives and what its packets said: `bits` are added to its state. Writes at most once a tick, so that a
/// busy flow's line stays clean. True where the flow's other cell should be told as well ([`sync`]).
///
/// # Safety
/// `cell` comes from [`find`] on a table that still exists, `hit` from the same call.
#[inline(always)]
pub unsafe fn touch(cell: *mut Cell, hit: &mut Hit, bits: u8, now: u16) -> bool {
    let mut tell = false;
    if hit.last != now {
        // SAFETY: the caller's cell; two bytes that any core may overwrite with its own tick.
        unsafe { write_volatile(addr_of_mut!((*cell).tail.last), now) };
        tell = hit.last >> PEER_REFRESH_SHIFT != now >> PEER_REFRESH_SHIFT;
    }
    let state = hit.state | bits;
    if state != hit.state {
        hit.state = state;
        // SAFETY: as above, one byte.
        unsafe { write_volatile(addr_of_mut!((*cell).tail.state), state) };
        tell = true;
    }
    tell
}

/// Brings the flow's other cell up to date, and puts it back where it has gone: whether it did that. Where another flow has got its
/// key meanwhile, this flow is over.
#[inline(always)]
pub fn sync<M: Memory>(memory: &M, key: &Key, hit: &Hit, now: u16) -> bool {
    let peer = Entry::peer_of(hit, key);
    match tell(memory, &peer, now) {
        Standing::None => return memory.put(&peer, now, Room::Dispensable) == Added::New,
        Standing::Own => (),
        Standing::Another => memory.remove(key),
    }
    false
}

/// What stands under an entry's key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
enum Standing {
    None,
    /// This very entry, but for what its packets have changed.
    Own,
    /// Another flow's.
    Another,
}

/// Tells the entry's cell of its state, at `now`.
// Functions of their own, so that the copies of cells do not stand on the kernel's stack together with what their caller calls else.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn tell<M: Memory>(memory: &M, entry: &Entry, now: u16) -> Standing {
    let mut found = Hit::default();
    let cell = find(memory, entry.key(), &mut found);
    if cell.is_null() {
        return Standing::None;
    }
    if !entry.is(&found) {
        return Standing::Another;
    }
    // SAFETY: `cell` was just found in `memory`.
    unsafe { touch(cell, &mut found, entry.0.tail.state, now) };
    Standing::Own
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn stands<M: Memory>(memory: &M, entry: &Entry) -> bool {
    let mut found = Hit::default();
    !find(memory, entry.key(), &mut found).is_null() && entry.is(&found)
}

/// Frees the cell that was hit by `key`, and its counterpart, unless another flow has got that key meanwhile.
#[inline(always)]
pub fn close<M: Memory>(memory: &M, key: &Key, hit: &Hit) {
    let peer = Entry::peer_of(hit, key);
    if stands(memory, &peer) {
        memory.remove(peer.key());
    }
    memory.remove(key);
}

/// Adds a flow's direction. Taken for it is a free cell or one past its idle limit, where need be by moving another flow to
/// its second choice; else a closed one, else the oldest half-open one: never a flow that lives.
#[inline(always)]
pub fn add<M: Memory>(memory: &M, entry: &Entry, now: u16) -> Added {
    let added = memory.put(entry, now, Room::Spare);
    if added != Added::Full {
        return added;
    }
    memory.make_room(entry, now);
    memory.put(entry, now, Room::Dispensable)
}

/// After so many searches for room that have found none the table is full, by all odds, as in a flood. Flows that can be done
/// without are to give way then, and it is not to cost more than that: of the flows in the way, each of which costs a look at a
/// set that is in no cache, only [`FEW`] are tried to be moved, until that is found to succeed.
const MANY: u32 = 8;
const FEW: usize = 1;

/// How many searches have failed since the last one that did not; at most [`MANY`].
#[inline(always)]
fn crowded<M: Memory>(memory: &M) -> u32 {
    let crowded = memory.crowded();
    // SAFETY: null, or a number of `memory`'s; what another core says of the table is as good.
    if crowded.is_null() { 0 } else { unsafe { read_volatile(crowded) } }
}

#[inline(always)]
fn set_crowded<M: Memory>(memory: &M, failed: u32) {
    let crowded = memory.crowded();
    if !crowded.is_null() {
        // SAFETY: as above.
        unsafe { write_volatile(crowded, failed) };
    }
}

/// What may be taken for a newcomer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Room {
    /// A cell that is free or past its idle limit.
    Spare,
    /// Also that of a closed or half-open flow.
    Dispensable,
}

/// Writes the entry into the best cell that `room` allows.
#[inline(always)]
pub fn put<M: Memory>(memory: &M, entry: &Entry, now: u16, room: Room) -> Added {
    let least = if room == Room::Spare { IDLE } else { HALF_OPEN };
    let key = &entry.0.key;
    let hash = key.hash(memory.seed());
    let (first, second) = (memory.set((hash >> 32) as u32), memory.set(hash as u32));
    let limits = memory.idle_limits();
    if first.is_null() || second.is_null() || limits.is_null() {
        return Added::Full;
    }
    // SAFETY: `set` gives null or a whole set.
    unsafe {
        if memory.count(key) > 0 {
            return Added::Exists;
        }
        let mut best = memory.victim(first, now);
        let mut set = first;
        if best >> WAY_BITS < IDLE {
            let better = memory.victim(second, now);
            if better >> WAY_BITS > best >> WAY_BITS {
                best = better;
                set = second;
            }
        }
        let cell = addr_of_mut!((*set).0[best as usize & (WAYS - 1)]);
        let old = head_of(cell);
        // One direction in place of the other would be a flow whose replies are nobody's.
        let is_own = room == Room::Dispensable && difference(cell, Entry::peer_of(&decode(&entry.0), key).key()) == 0;
        if is_own
            || score_of(cell, old, now, limits) < least
            || !take(cell, old, &raw const entry.0, entry.0.key.head, now)
        {
            if room == Room::Dispensable {
                // The search for room was a short one, perhaps: none that comes after is to be refused for that.
                set_crowded(memory, 0);
            }
            return Added::Full;
        }
        if set == second {
            fetch_or(addr_of_mut!((*first).0[0].key.head), OVERFLOWN);
        }
        // Another core may have added the same key meanwhile. Both see it then, and both step back.
        if memory.count(key) > if first == second { 2 } else { 1 } {
            clear(cell);
            return Added::Exists;
        }
    }
    Added::New
}

const FREE: u32 = u32::MAX >> 2;
const IDLE: u32 = 0x3_0000;
const CLOSED: u32 = 0x2_0000;
const HALF_OPEN: u32 = 0x1_0000;

/// What a cell is worth before its idle limit, by its state bits.
#[repr(C)]
#[derive(Clone, Copy)]
struct Worth {
    state: u16,
    /// How much of its age counts.
    age_mask: u16,
    score: u32,
}

static WORTH: [Worth; 1 << STATE_BITS] = {
    let mut table = [Worth { state: 0, age_mask: 0, score: 0 }; 1 << STATE_BITS];
    let mut bits = 0;
    while bits < table.len() {
        let state = State::of(bits as u8);
        let (score, age_mask) = match state {
            State::Closed => (CLOSED, u16::MAX),
            State::New => (HALF_OPEN, u16::MAX),
            State::Established | State::Closing => (0, 0),
        };
        table[bits] = Worth { state: state as u16, age_mask, score };
        bits += 1;
    }
    table
};

const WAY_BITS: u32 = 2;
const _: () = assert!(1 << WAY_BITS == WAYS);

/// The cell that can best be done without, in the lowest [`WAY_BITS`], and above them how well: 0 is not at all.
///
/// Written without choices where arithmetic does: the verifier walks every combination of them.
///
/// # Safety
/// `set` is a whole set of a table that exists.
#[inline(always)]
pub unsafe fn victim<M: Memory>(memory: &M, set: *const Set, now: u16) -> u32 {
    let limits = memory.idle_limits();
    if limits.is_null() {
        return 0;
    }
    let mut best = 0;
    let mut way = 0;
    while way < WAYS {
        // SAFETY: the caller's set is whole.
        let score = unsafe {
            let cell = addr_of!((*set).0[way]);
            score_of(cell, head_of(cell), now, limits)
        };
        best = max(best, score << WAY_BITS | way as u32);
        way += 1;
    }
    best
}

/// How well the cell, whose head is `head`, can be done without.
#[inline(always)]
unsafe fn score_of(cell: *const Cell, head: u64, now: u16, limits: *const IdleLimits) -> u32 {
    // SAFETY: the caller's cell and limits.
    unsafe { score(head, read_volatile(addr_of!((*cell).tail)), now, limits) }
}

/// # Safety
/// `limits` is not null.
#[inline(always)]
unsafe fn score(head: u64, tail: Tail, now: u16, limits: *const IdleLimits) -> u32 {
    let worth = &WORTH[(tail.state & STATE_MASK) as usize];
    let age = age(now, tail.last) as u32;
    // SAFETY: the caller's.
    let limit = unsafe { idle_limit(limits, head, worth) };
    let idle = ones((limit as u64).wrapping_sub(age as u64) >> 63);
    let free = ones(!head >> LIVE.trailing_zeros() & 1);
    let locked = ones(head >> LOCKED.trailing_zeros() & 1);
    let score = (IDLE | age) & idle | (worth.score | age & worth.age_mask as u32) & !idle;
    (score & !free | FREE & free) & !locked
}

/// # Safety
/// `limits` is not null.
#[inline(always)]
unsafe fn idle_limit(limits: *const IdleLimits, head: u64, worth: &Worth) -> u16 {
    let index = (head >> PROTOCOL_SHIFT & 3) << 2 | (worth.state & 3) as u64;
    // SAFETY: the caller's; two bits and two more.
    unsafe { read_volatile(limits.cast::<u16>().add(index as usize)) }
}

/// What stands in the way of a new flow with some key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Vacancy {
    Free,
    /// A flow that has been closed or has outlived its limit.
    Over,
    /// One whose client has not answered yet.
    HalfOpen,
    Living,
}

#[inline(always)]
pub fn vacancy<M: Memory>(memory: &M, key: &Key, now: u16) -> Vacancy {
    let mut hit = Hit::default();
    if find(memory, key, &mut hit).is_null() {
        return Vacancy::Free;
    }
    if is_outlived(memory, key, &hit, now) {
        return Vacancy::Over;
    }
    match State::of(hit.state) {
        State::Closed => Vacancy::Over,
        State::New => Vacancy::HalfOpen,
        State::Established | State::Closing => Vacancy::Living,
    }
}

/// Whether the flow of the cell that was hit by `key` had no packet for too long.
#[inline(always)]
pub fn is_outlived<M: Memory>(memory: &M, key: &Key, hit: &Hit, now: u16) -> bool {
    let limits = memory.idle_limits();
    if limits.is_null() {
        return false;
    }
    let worth = &WORTH[(hit.state & STATE_MASK) as usize];
    // SAFETY: not null.
    age(now, hit.last) > unsafe { idle_limit(limits, key.head, worth) }
}

/// Frees the cell where its flow has had no packet for too long: true where it was so. For the agent to do now and then, since
/// a cell's clock goes round.
///
/// # Safety
/// `cell` belongs to a table that exists, and may be written; `limits` are its.
pub unsafe fn sweep(cell: *mut Cell, now: u16, limits: &IdleLimits) -> bool {
    // SAFETY: the caller's cell.
    unsafe {
        let head = head_of(cell);
        let score = score_of(cell, head, now, limits);
        let over = head & LIVE != 0 && score >= IDLE;
        over && clear_as(cell, head)
    }
}

/// 1 for 0, 0 for anything else; without a branch, of which each would double what the verifier walks.
#[inline(always)]
fn is_zero(word: u64) -> u32 {
    (opaque(word | word.wrapping_neg()) >> 63) as u32 ^ 1
}

/// All ones for 1, none for 0.
#[inline(always)]
const fn ones(bit: u64) -> u32 {
    0u32.wrapping_sub(bit as u32)
}

/// Frees a cell that the entry may have, where another flow can be moved out of it.
#[inline(always)]
pub fn make_room<M: Memory>(memory: &M, entry: &Entry, now: u16) {
    let hash = entry.0.key.hash(memory.seed());
    let (first, second) = (memory.set((hash >> 32) as u32), memory.set(hash as u32));
    if first.is_null() || second.is_null() {
        return;
    }
    // SAFETY: two whole sets of `memory`.
    unsafe {
        let failed = crowded(memory);
        let moved = if failed >= MANY {
            displace(memory, first, now, FEW)
        } else {
            displace(memory, first, now, WAYS) || displace(memory, second, now, WAYS)
        };
        set_crowded(memory, if moved { 0 } else { min(failed + 1, MANY) });
    }
}

/// The other set that the flow of this set's cell may be in, or the same one; null where there is none. A function of its own in
/// the kernel, whose stack is short.
///
/// # Safety
/// `cell` is one of `set`, and that one of `memory`'s.
#[cfg_attr(target_arch = "bpf", inline(never))]
unsafe fn elsewhere<M: Memory>(memory: &M, set: *const Set, cell: *const Cell) -> *mut Set {
    // SAFETY: the caller's cell.
    let key = unsafe {
        let (src, dst) = (read_pair(addr_of!((*cell).key.src)), read_pair(addr_of!((*cell).key.dst)));
        Key { head: head_of(cell), src, dst }
    };
    let hash = key.hash(memory.seed());
    let first = memory.set((hash >> 32) as u32);
    if set == first { memory.set(hash as u32) } else { first }
}

/// Moves one of the set's first `ways` flows to the other set that the flow may be in; false where none can be moved.
///
/// The copy is there before the original goes, so a reader finds one of them.
///
/// # Safety
/// `set` is a whole set of `memory`.
#[inline(always)]
unsafe fn displace<M: Memory>(memory: &M, set: *mut Set, now: u16, ways: usize) -> bool {
    let limits = memory.idle_limits();
    if limits.is_null() {
        return false;
    }
    let mut way = 0;
    while way < ways {
        // SAFETY: the caller's set is whole, and so are those that `memory` gives.
        unsafe {
            let cell = addr_of_mut!((*set).0[way]);
            let head = head_of(cell);
            let other = elsewhere(memory, set, cell);
            if head & (LIVE | LOCKED) == LIVE && !other.is_null() && other != set {
                let room = memory.victim(other, now);
                let last = read_volatile(addr_of!((*cell).tail.last));
                let target = addr_of_mut!((*other).0[room as usize & (WAYS - 1)]);
                let old = head_of(target);
                if score_of(target, old, now, limits) >= IDLE && take(target, old, cell, head, last) {
                    // Needless where the set was the flow's second choice, but a set that was full has this mark as a rule.
                    fetch_or(addr_of_mut!((*set).0[0].key.head), OVERFLOWN);
                    clear(cell);
                    return true;
                }
            }
        }
        way += 1;
    }
    false
}

/// Makes `cell` a copy of `from`, last used at `last`; false where another core was faster, at either cell. `old` and `head`
/// are what the heads of `cell` and `from` were when they were looked at: a cell that was found dispensable may have been
/// given to another flow since.
///
/// # Safety
/// `cell` belongs to a table that exists; `from` is an entry's, or belongs to the same table.
#[inline(always)]
unsafe fn take(cell: *mut Cell, old: u64, from: *const Cell, head: u64, last: u16) -> bool {
    // SAFETY: the caller's cells; `cell` is ours alone between the two changes of its head.
    unsafe {
        let at = addr_of_mut!((*cell).key.head);
        let busy = (old & OVERFLOWN) | ((old & SEQUENCE_MASK).wrapping_add(SEQUENCE)) | LOCKED;
        if old & LOCKED != 0 || compare_exchange(at, old, busy) != old {
            return false;
        }
        write_pair(addr_of_mut!((*cell).key.src), read_pair(addr_of!((*from).key.src)));
        write_pair(addr_of_mut!((*cell).key.dst), read_pair(addr_of!((*from).key.dst)));
        write_pair(addr_of_mut!((*cell).to), read_pair(addr_of!((*from).to)));
        write_volatile(addr_of_mut!((*cell).tail), Tail { last, ..read_volatile(addr_of!((*from).tail)) });
        let whole = (head ^ head_of(from)) & !OVERFLOWN == 0;
        let new = if whole { (head & !(OVERFLOWN | SEQUENCE_MASK | LOCKED)) | LIVE } else { 0 };
        // By exclusive or and not a store: another core may have set OVERFLOWN meanwhile.
        fetch_xor(at, new | LOCKED);
        whole
    }
}

/// Frees a key's cell, if it has one.
#[inline(always)]
pub fn remove<M: Memory>(memory: &M, key: &Key) {
    let mut hit = Hit::default();
    let cell = find(memory, key, &mut hit);
    if !cell.is_null() {
        // SAFETY: `cell` was just found in `memory`.
        unsafe { clear(cell) };
    }
}

/// # Safety
/// `cell` belongs to a table that exists.
#[inline(always)]
unsafe fn clear(cell: *mut Cell) {
    // SAFETY: the caller's cell; where the swap fails another core has taken the cell over already.
    unsafe { clear_as(cell, head_of(cell)) };
}

/// Frees the cell if its head is still `head`.
///
/// # Safety
/// As [`clear`].
#[inline(always)]
unsafe fn clear_as(cell: *mut Cell, head: u64) -> bool {
    let free = (head & OVERFLOWN) | (head & SEQUENCE_MASK).wrapping_add(SEQUENCE);
    // SAFETY: the caller's cell.
    head & LOCKED == 0 && unsafe { compare_exchange(addr_of_mut!((*cell).key.head), head, free) } == head
}

#[cfg(target_arch = "bpf")]
mod atomic {
    use core::intrinsics::AtomicOrdering::SeqCst;
    use core::intrinsics::{atomic_cxchg, atomic_or, atomic_xor};

    #[inline(always)]
    pub(super) unsafe fn compare_exchange(at: *mut u64, old: u64, new: u64) -> u64 {
        unsafe { atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(at, old, new).0 }
    }
    #[inline(always)]
    pub(super) unsafe fn fetch_or(at: *mut u64, bits: u64) {
        unsafe { atomic_or::<u64, u64, { SeqCst }>(at, bits) };
    }
    #[inline(always)]
    pub(super) unsafe fn fetch_xor(at: *mut u64, bits: u64) {
        unsafe { atomic_xor::<u64, u64, { SeqCst }>(at, bits) };
    }
}

#[cfg(not(target_arch = "bpf"))]
mod atomic {
    use core::sync::atomic::AtomicU64;
    use core::sync::atomic::Ordering::SeqCst;

    pub(super) unsafe fn compare_exchange(at: *mut u64, old: u64, new: u64) -> u64 {
        // SAFETY: the caller's cell is aligned to its line and outlives the call.
        match unsafe { AtomicU64::from_ptr(at) }.compare_exchange(old, new, SeqCst, SeqCst) {
            Ok(seen) | Err(seen) => seen,
        }
    }
    pub(super) unsafe fn fetch_or(at: *mut u64, bits: u64) {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(at) }.fetch_or(bits, SeqCst);
    }
    pub(super) unsafe fn fetch_xor(at: *mut u64, bits: u64) {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(at) }.fetch_xor(bits, SeqCst);
    }
}
use atomic::{compare_exchange, fetch_or, fetch_xor};

/// One cell, read for inspection. Ports in host byte order.
#[cfg(any(test, feature = "std"))]
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub protocol: u8,
    pub reverse: bool,
    pub masqueraded: bool,
    pub src: Addr,
    pub src_port: u16,
    /// The packet's own destination; of a masqueraded reverse cell the client's address.
    pub dst: Addr,
    pub dst_port: u16,
    pub to: Addr,
    pub to_port: u16,
    pub second_port: u16,
    pub backend: u32,
    pub state: State,
    /// Since the last packet.
    pub idle_ticks: u16,
    /// Longer idle than its kind may be: as good as free.
    pub expired: bool,
}

#[cfg(any(test, feature = "std"))]
impl Snapshot {
    /// `None` where the cell is free or being written. `now` in ticks.
    ///
    /// # Safety
    /// `cell` points to a cell that exists; the kernel may write it meanwhile.
    pub unsafe fn read(cell: *const Cell, now: u16, limits: &IdleLimits) -> Option<Self> {
        // SAFETY: the caller's cell.
        let (head, copy, again) = unsafe { (head_of(cell), read_volatile(cell), head_of(cell)) };
        let Key { src, .. } = copy.key;
        if head & LIVE == 0 || head & LOCKED != 0 || head & !OVERFLOWN != again & !OVERFLOWN {
            return None;
        }
        let hit = decode(&copy);
        let age = age(now, hit.last);
        let worth = &WORTH[(hit.state & STATE_MASK) as usize];
        let protocol = protocol(head);
        Some(Snapshot {
            protocol,
            reverse: hit.is_reverse(),
            masqueraded: hit.is_masqueraded(),
            src: Addr::from_pairs(src),
            src_port: u16::from_be(head as u16),
            dst: hit.dst(),
            dst_port: u16::from_be((head >> 16) as u16),
            to: hit.to(),
            to_port: u16::from_be(hit.port),
            second_port: u16::from_be(hit.second),
            backend: hit.backend,
            state: State::of(hit.state),
            idle_ticks: age.saturating_sub(AHEAD),
            // SAFETY: a reference.
            expired: age > unsafe { idle_limit(limits, head, worth) },
        })
    }
}

/// A cell as it stands, for a copy of the table; a free one where it is being written.
///
/// # Safety
/// `cell` points to a cell that exists; the kernel may write it meanwhile.
#[cfg(any(test, feature = "std"))]
pub unsafe fn copy(cell: *const Cell) -> Cell {
    // SAFETY: the caller's cell.
    let (head, copy, again) = unsafe { (head_of(cell), read_volatile(cell), head_of(cell)) };
    if head & LOCKED != 0 || head != again { Cell::default() } else { copy }
}

/// A table in ordinary memory, for tests.
#[cfg(any(test, feature = "std"))]
pub struct Sets {
    sets: Vec<core::cell::UnsafeCell<Set>>,
    crowded: core::cell::UnsafeCell<u32>,
    seed: u64,
    limits: IdleLimits,
}

// SAFETY: every access goes through the cells' own protocol.
#[cfg(any(test, feature = "std"))]
unsafe impl Sync for Sets {}

#[cfg(any(test, feature = "std"))]
impl Sets {
    /// `sets` is a power of two.
    pub fn new(sets: usize, seed: u64) -> Self {
        assert!(sets.is_power_of_two());
        let sets = (0..sets).map(|_| core::cell::UnsafeCell::new(Set::default())).collect();
        Sets { sets, crowded: core::cell::UnsafeCell::new(0), seed, limits: IdleLimits::default() }
    }

    fn cells(&self) -> impl Iterator<Item = *mut Cell> {
        self.sets.iter().flat_map(|set| (0..WAYS).map(move |way| set.get().cast::<Cell>().wrapping_add(way)))
    }

    pub fn snapshots(&self, now: u16) -> Vec<Snapshot> {
        // SAFETY: the cells live as long as `self`.
        self.cells().filter_map(|cell| unsafe { Snapshot::read(cell, now, &self.limits) }).collect()
    }

    /// [`sweep`] for all cells.
    pub fn sweep(&self, now: u16) {
        for cell in self.cells() {
            // SAFETY: the cells live as long as `self`.
            unsafe { sweep(cell, now, &self.limits) };
        }
    }
}

#[cfg(any(test, feature = "std"))]
impl Memory for Sets {
    fn crowded(&self) -> *mut u32 {
        self.crowded.get()
    }
    fn set(&self, index: u32) -> *mut Set {
        self.sets[index as usize & (self.sets.len() - 1)].get()
    }
    fn seed(&self) -> u64 {
        self.seed
    }
    fn idle_limits(&self) -> *const IdleLimits {
        &raw const self.limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEED: u64 = 0x1234_5678_9abc_def1;

    fn addr(n: u32) -> Addr {
        Addr::v4(n.to_be())
    }

    fn client(i: u32) -> Key {
        Key::new(addr(0x0a63_0000 + (i >> 14)), addr(0x0a60_0001), (1024 + (i & 0x3fff)) as u16, 80, TCP)
    }

    fn forward(i: u32) -> Entry {
        Entry::forward(client(i), addr(i), 8080, 1, false, i & 0xff_ffff)
    }

    fn look<M: Memory>(memory: &M, key: &Key) -> Option<Hit> {
        let mut hit = Hit::default();
        (!find(memory, key, &mut hit).is_null()).then_some(hit)
    }

    #[test]
    fn what_was_added_is_found_and_nothing_else() {
        let table = Sets::new(1 << 10, SEED);
        for i in 0..1000 {
            assert_eq!(add(&table, &forward(i), 7), Added::New);
        }
        for i in 0..1000 {
            let hit = look(&table, &client(i)).unwrap();
            assert_eq!((hit.to(), hit.port, hit.second, hit.backend), (addr(i), 8080, 1, i));
        }
        assert_eq!(look(&table, &client(1000)), None);
    }

    #[test]
    fn a_key_is_added_once() {
        let table = Sets::new(4, SEED);
        assert_eq!(add(&table, &forward(1), 7), Added::New);
        assert_eq!(add(&table, &forward(1), 7), Added::Exists);
    }

    #[test]
    fn a_removed_key_is_gone_and_its_cell_is_used_again() {
        let table = Sets::new(1, SEED);
        for i in 0..WAYS as u32 {
            assert_eq!(add(&table, &forward(i), 7), Added::New);
        }
        remove(&table, &client(2));
        assert_eq!(look(&table, &client(2)), None);
        assert_eq!(add(&table, &forward(9), 7), Added::New);
        assert!([0, 1, 3, 9].iter().all(|i| look(&table, &client(*i)).is_some()));
    }

    /// Two flows of which the second has got the first one's source port, after the first one's reverse cell was evicted.
    fn evicted_and_succeeded(table: &Sets) -> (Key, Hit, Key) {
        let reverse = |i| {
            Entry::reverse(
                Key::masqueraded(addr(99), 8080, 5000, TCP),
                addr(0x0a60_0001),
                80,
                addr(i),
                1000 + i as u16,
                3,
            )
        };
        let key = |i| Key::new(addr(i), addr(0x0a60_0001), 1000 + i as u16, 80, TCP);
        let forward = |i| Entry::forward(key(i), addr(99), 8080, 5000, true, 3);
        assert_eq!([add(table, &reverse(1), 7), add(table, &forward(1), 7)], [Added::New; 2]);
        remove(table, reverse(1).key());
        assert_eq!([add(table, &reverse(2), 7), add(table, &forward(2), 7)], [Added::New; 2]);
        (key(1), look(table, &key(1)).unwrap(), *reverse(2).key())
    }

    #[test]
    fn a_flows_end_is_not_that_of_the_one_that_has_its_port_now() {
        let table = Sets::new(4, SEED);
        let (first, hit, second) = evicted_and_succeeded(&table);
        close(&table, &first, &hit);
        assert_eq!(look(&table, &first), None);
        assert_eq!(look(&table, &second).unwrap().dst(), addr(2));
    }

    #[test]
    fn a_flow_whose_port_another_has_now_is_over() {
        let table = Sets::new(4, SEED);
        let (first, hit, second) = evicted_and_succeeded(&table);
        let before = look(&table, &second).unwrap();
        sync(&table, &first, &Hit { state: RESET, ..hit }, 7);
        assert_eq!(look(&table, &first), None);
        assert_eq!(look(&table, &second), Some(before));
    }

    #[test]
    fn six_tenths_full_refuses_nobody_and_full_refuses_the_newcomer() {
        let table = Sets::new(1 << 12, SEED);
        let cells = 4u32 << 12;
        let mut refused = 0;
        for i in 0..cells {
            let mut entry = forward(i);
            entry.0.tail.state = REPLIED | CONFIRMED;
            refused += u32::from(add(&table, &entry, 7) == Added::Full);
            if i == cells * 6 / 10 {
                assert_eq!(refused, 0);
            }
        }
        assert!(refused > 0);
        let found = (0..cells).filter(|i| look(&table, &client(*i)).is_some_and(|hit| hit.to() == addr(*i))).count();
        assert_eq!(found as u32, cells - refused);
    }

    #[test]
    fn no_likely_kind_of_keys_is_refused_up_to_six_tenths() {
        let node = addr(0x0a60_0001);
        let v6 = |n: u32| Addr([0xfd00_u32.to_be(), 0, 0, n.to_be()]);
        let kinds: [(&str, &dyn Fn(u32) -> Key); 7] = [
            ("clients of one port", &|n| Key::new(addr(0xc633_0000 + n), node, 1024, 80, TCP)),
            ("ports of one client", &|n| Key::new(addr(7 + (n >> 16)), node, n as u16, 80, TCP)),
            ("ports in network byte order", &|n| Key::new(addr(7 + (n >> 16)), node, (n as u16).to_be(), 80, TCP)),
            ("frontends of one client", &|n| Key::new(node, addr(0x0a60_0000 + n), 1024, 80, TCP)),
            ("masqueraded", &|n| Key::masqueraded(addr(7 + (n >> 14)), 80, (n as u16 & 0x3fff).to_be(), TCP)),
            ("IPv6 clients", &|n| Key::new(v6(n), v6(1), 1024, 80, UDP)),
            ("IPv6 clients and ports", &|n| Key::new(v6(n >> 8), v6(1), (n as u16 & 0xff).to_be(), 80, UDP)),
        ];
        for (kind, key) in kinds {
            for seed in [0, 1, SEED, u64::MAX, 0xffff_0000_0000_0000] {
                let table = Sets::new(1 << 12, seed);
                for n in 0..(4 << 12) * 6 / 10 {
                    let mut entry = Entry::forward(key(n), node, 8080, 1, false, 1);
                    entry.0.tail.state = REPLIED | CONFIRMED;
                    assert_eq!(add(&table, &entry, 7), Added::New, "{kind}: {n} with seed {seed:x}");
                }
            }
        }
    }

    /// A set of four with these states and ages; which one goes for a newcomer.
    fn evicted(cells: [(u8, u16); 4]) -> Option<usize> {
        let table = Sets::new(1, SEED);
        let now = 50_000;
        for (i, (state, age)) in cells.into_iter().enumerate() {
            let mut entry = forward(i as u32);
            entry.0.tail.state = state;
            assert_eq!(add(&table, &entry, now - age), Added::New);
        }
        match add(&table, &forward(99), now) {
            Added::Full => None,
            Added::New => (0..4).find(|i| look(&table, &client(*i as u32)).is_none()),
            Added::Exists => panic!(),
        }
    }

    #[test]
    fn the_one_that_can_best_be_done_without_goes() {
        let live = REPLIED | CONFIRMED;
        let closed = live | RESET;
        assert_eq!(evicted([(live, 1), (live, 900), (0, 2), (closed, 1)]), Some(3), "closed before half-open");
        assert_eq!(evicted([(live, 1), (0, 1), (0, 5), (live, 9)]), Some(2), "the oldest half-open one");
        assert_eq!(evicted([(closed, 1), (live, ticks(90_000)), (0, 1), (live, 9)]), Some(1), "past its limit first");
        assert_eq!(
            evicted([(live, 1), (live, 2), (live | FIN_CLIENT, 3), (live, 30_000)]),
            None,
            "never one that lives"
        );
    }

    #[test]
    fn no_direction_takes_its_flows_other_one() {
        for masqueraded in [false, true] {
            let table = Sets::new(1, SEED);
            for i in 0..3 {
                let mut entry = forward(i);
                entry.0.tail.state = REPLIED | CONFIRMED;
                assert_eq!(add(&table, &entry, 7), Added::New);
            }
            let entry = Entry::forward(client(9), addr(9), 8080, 1, masqueraded, 9);
            let reverse = Entry::peer_of(&entry.hit(7), entry.key());
            assert_eq!(add(&table, &reverse, 7), Added::New);
            assert_eq!(add(&table, &entry, 7), Added::Full);
            assert!(look(&table, reverse.key()).is_some());
        }
    }

    #[test]
    fn what_another_core_used_a_moment_later_is_young() {
        let table = Sets::new(1, SEED);
        for i in 0..4 {
            let mut entry = forward(i);
            entry.0.tail.state = REPLIED | CONFIRMED;
            assert_eq!(add(&table, &entry, 1001), Added::New);
        }
        assert_eq!(add(&table, &forward(99), 1000), Added::Full);
        assert!(table.snapshots(1000).iter().all(|cell| !cell.expired && cell.idle_ticks == 0));
    }

    #[test]
    fn only_what_has_outlived_its_limit_is_swept() {
        let table = Sets::new(1, SEED);
        let states = [REPLIED | CONFIRMED, 0, RESET, REPLIED | CONFIRMED];
        for (i, state) in (0..).zip(states) {
            let mut entry = forward(i);
            entry.0.tail.state = state;
            assert_eq!(add(&table, &entry, if i == 3 { 30_000 } else { 1 }), Added::New);
        }
        let swept = |seconds: u32| {
            let now = 1 + ticks(seconds);
            // SAFETY: the table's own cells.
            let sweep = |way: usize| unsafe { sweep(table.sets[0].get().cast::<Cell>().add(way), now, &table.limits) };
            (0..WAYS).filter(|way| sweep(*way)).count()
        };
        assert_eq!([5, 15, 70, 86_500, 86_500].map(swept), [0, 1, 1, 1, 0]);
        assert!(look(&table, &client(3)).is_some());
    }

    #[test]
    fn what_stands_in_the_way_of_a_key() {
        let table = Sets::new(4, SEED);
        for (i, state) in (0..).zip([0, REPLIED | CONFIRMED, RESET]) {
            let mut entry = forward(i);
            entry.0.tail.state = state;
            assert_eq!(add(&table, &entry, 7), Added::New);
        }
        let vacancies = |now: u16| [0, 1, 2, 3].map(|i| vacancy(&table, &client(i), now));
        let (half_open, living, over, free) = (Vacancy::HalfOpen, Vacancy::Living, Vacancy::Over, Vacancy::Free);
        assert_eq!(vacancies(8), [half_open, living, over, free]);
        assert_eq!(vacancies(7 + ticks(70)), [over, living, over, free]);
        assert_eq!(vacancies(7 + ticks(86_500)), [over, over, over, free]);
    }

    #[test]
    fn a_set_that_once_overflowed_is_searched_in_both_places() {
        let table = Sets::new(2, SEED);
        for i in 0..8 {
            let mut entry = forward(i);
            entry.0.tail.state = REPLIED | CONFIRMED;
            assert_eq!(add(&table, &entry, 7), Added::New, "{i}");
        }
        assert!((0..8).all(|i| look(&table, &client(i)).is_some()));
    }

    fn both_directions(masquerade: bool) -> (Sets, Key, Key) {
        let table = Sets::new(4, SEED);
        let (c, f, b) = (addr(1), addr(2), addr(3));
        let forward_key = Key::new(c, f, 10, 20, UDP);
        let reverse_key = if masquerade { Key::masqueraded(b, 30, 40, UDP) } else { Key::new(b, c, 30, 40, UDP) };
        assert_eq!(add(&table, &Entry::reverse(reverse_key, f, 20, c, 10, 5), 7), Added::New);
        assert_eq!(add(&table, &Entry::forward(forward_key, b, 30, 40, masquerade, 5), 7), Added::New);
        (table, forward_key, reverse_key)
    }

    #[test]
    fn the_two_directions_lead_to_each_other() {
        for masquerade in [false, true] {
            let (table, forward_key, reverse_key) = both_directions(masquerade);
            let (f, r) = (look(&table, &forward_key).unwrap(), look(&table, &reverse_key).unwrap());
            assert_eq!((f.is_reverse(), r.is_reverse()), (false, true));
            assert_eq!((f.is_masqueraded(), r.is_masqueraded()), (masquerade, masquerade));
            let reverse = Entry::peer_of(&f, &forward_key);
            assert_eq!((look(&table, reverse.key()), reverse.hit(7)), (Some(r), r));
            let forward = Entry::peer_of(&r, &reverse_key);
            assert_eq!((look(&table, forward.key()), forward.hit(7)), (Some(f), f));
        }
    }

    #[test]
    fn a_lost_direction_is_put_back_as_it_was() {
        for masquerade in [false, true] {
            let (table, forward_key, reverse_key) = both_directions(masquerade);
            for (kept, lost) in [(forward_key, reverse_key), (reverse_key, forward_key)] {
                let before = look(&table, &lost).unwrap();
                remove(&table, &lost);
                sync(&table, &kept, &look(&table, &kept).unwrap(), 7);
                assert_eq!(look(&table, &lost), Some(before));
            }
        }
    }

    #[test]
    fn what_one_direction_learns_the_other_knows() {
        let (table, forward_key, reverse_key) = both_directions(true);
        let mut hit = Hit::default();
        let cell = find(&table, &forward_key, &mut hit);
        // SAFETY: the cell was just found.
        assert!(unsafe { touch(cell, &mut hit, RESET, 8) });
        sync(&table, &forward_key, &hit, 8);
        let other = look(&table, &reverse_key).unwrap();
        assert_eq!((State::of(other.state), other.last), (State::Closed, 8));
        // SAFETY: as above.
        assert!(!unsafe { touch(cell, &mut look(&table, &forward_key).unwrap(), RESET, 8) }, "nothing new to tell");
    }

    #[test]
    fn readers_never_see_half_an_entry() {
        let table = Sets::new(2, SEED);
        std::thread::scope(|scope| {
            for writer in 0..2u32 {
                let table = &table;
                scope.spawn(move || {
                    for n in 0..300_000u32 {
                        let i = (n * 2 + writer) % 64;
                        remove(table, &client((i + 31) % 64));
                        add(table, &forward(i), 7);
                    }
                });
            }
            let mut hits = 0u64;
            for n in 0..600_000u32 {
                if let Some(hit) = look(&table, &client(n % 64)) {
                    assert_eq!((hit.to(), hit.backend), (addr(n % 64), n % 64));
                    hits += 1;
                }
            }
            assert!(hits > 1000, "{hits}");
        });
    }

    #[test]
    fn two_cores_never_own_the_same_key() {
        for round in 0..2_000u32 {
            let table = Sets::new(2, SEED);
            let barrier = std::sync::Barrier::new(2);
            let race = || {
                barrier.wait();
                add(&table, &forward(round), 7)
            };
            let (a, b) = std::thread::scope(|scope| {
                let other = scope.spawn(race);
                (race(), other.join().unwrap())
            });
            assert!(!(a == Added::New && b == Added::New));
            assert!(table.snapshots(7).len() <= 1);
        }
    }

    proptest! {
        #[test]
        fn a_snapshot_says_what_was_written(
            sport: u16, dport: u16, port: u16, second: u16, backend in 0..=crate::map::MAX_BACKEND_ID, udp: bool, masquerade: bool
        ) {
            let table = Sets::new(1, SEED);
            let protocol = if udp { UDP } else { TCP };
            let key = Key::new(addr(1), addr(2), sport.to_be(), dport.to_be(), protocol);
            let entry = Entry::forward(key, addr(3), port.to_be(), second.to_be(), masquerade, backend);
            prop_assert_eq!(add(&table, &entry, 7), Added::New);
            prop_assert_eq!(table.snapshots(9), vec![Snapshot {
                protocol, reverse: false, masqueraded: masquerade, src: addr(1), src_port: sport, dst: addr(2), dst_port: dport,
                to: addr(3), to_port: port, second_port: second, backend, state: State::New, idle_ticks: 2, expired: false,
            }]);
        }
    }
}
