//! The few bpf(2) commands that aya has no call for: batches, inner maps, and replacing the program of any link.
use std::io;
use std::mem::{size_of, size_of_val, zeroed};
use std::ops::Range;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use svc_common::map::{
    Affinity, AffinityKey, Backend, BackendSlot, CidrKey, Config, Counter, FragmentKey, FragmentPorts, Frontend,
    FrontendKey, HopLease, Monitor, ServiceName, SocketKey, SocketPeer, SourceRangeKey, Told, Traffic, Uplink,
};
use svc_common::{Addr, flow};

/// Plain bytes: a key or a value of a map.
///
/// # Safety
/// Every bit pattern is a value, and there is no padding.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($name:ty),+) => {
        // SAFETY: `repr(C)`, integers only, padding spelled out.
        $(unsafe impl Plain for $name {})+
    };
}
plain!(
    u32,
    u64,
    Addr,
    FrontendKey,
    HopLease,
    Frontend,
    BackendSlot,
    Backend,
    ServiceName,
    Uplink,
    Config,
    SocketKey,
    SocketPeer,
    Counter,
    SourceRangeKey,
    CidrKey,
    AffinityKey,
    Affinity,
    FragmentKey,
    FragmentPorts,
    Monitor,
    Told,
    Traffic,
    flow::Set
);

const MAP_CREATE: i64 = 0;
const MAP_LOOKUP_ELEM: i64 = 1;
const MAP_UPDATE_ELEM: i64 = 2;
const MAP_DELETE_ELEM: i64 = 3;
const MAP_GET_NEXT_KEY: i64 = 4;
const OBJ_GET: i64 = 7;
const MAP_GET_FD_BY_ID: i64 = 14;
const OBJ_GET_INFO_BY_FD: i64 = 15;
const MAP_LOOKUP_BATCH: i64 = 24;
const MAP_UPDATE_BATCH: i64 = 26;
const LINK_CREATE: i64 = 28;
const LINK_UPDATE: i64 = 29;
const LINK_DETACH: i64 = 34;

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;
const BPF_F_INNER_MAP: u32 = 1 << 12;

fn bpf<T>(command: i64, attr: &mut T) -> io::Result<i64> {
    // SAFETY: `attr` is laid out as the command wants it, and its pointers outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the kernel has just made it for us.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn element<K, V>(map: BorrowedFd<'_>, key: &K, value: *const V) -> Element {
    Element { map: map.as_raw_fd() as u32, pad: 0, key: address(key), value: value as u64, flags: 0 }
}

/// The object pinned at `path`.
///
/// # Errors
/// Where there is none, or one may not be opened.
pub fn open_pin(path: &std::path::Path) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt as _;
    #[repr(C)]
    struct Attr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    bpf(OBJ_GET, &mut Attr { path: path.as_ptr() as u64, fd: 0, flags: 0 }).map(owned)
}

/// # Errors
/// `NotFound` where the key is absent, else what the kernel says.
pub fn lookup<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<V> {
    // SAFETY: `Plain` takes any bytes.
    let mut value: V = unsafe { zeroed() };
    bpf(MAP_LOOKUP_ELEM, &mut element(map, key, &raw mut value)).map(|_| value)
}

/// A per-CPU map's values, one a possible CPU. `V`'s size is a multiple of 8.
///
/// # Errors
/// What the kernel says.
pub fn lookup_per_cpu<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, cpus: usize) -> io::Result<Vec<V>> {
    // SAFETY: `Plain` takes any bytes.
    let mut values: Vec<V> = vec![unsafe { zeroed() }; cpus];
    bpf(MAP_LOOKUP_ELEM, &mut element(map, key, values.as_mut_ptr())).map(|_| values)
}

/// # Errors
/// What the kernel says.
pub fn update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    bpf(MAP_UPDATE_ELEM, &mut element(map, key, value)).map(drop)
}

/// Deleting the absent succeeds.
///
/// # Errors
/// What the kernel says.
pub fn delete<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    match bpf(MAP_DELETE_ELEM, &mut element::<K, u8>(map, key, std::ptr::null())) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map(drop),
    }
}

/// A trie's entries, one by one; what changes meanwhile may be missing or old.
///
/// # Errors
/// What the kernel says.
pub fn entries<K: Plain, V: Plain>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut entries = Vec::new();
    let mut previous: Option<K> = None;
    loop {
        // SAFETY: `Plain` takes any bytes.
        let mut next: K = unsafe { zeroed() };
        let key = previous.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let mut attr =
            Element { map: map.as_raw_fd() as u32, pad: 0, key: key as u64, value: (&raw mut next) as u64, flags: 0 };
        match bpf(MAP_GET_NEXT_KEY, &mut attr) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(entries),
            other => other?,
        };
        match lookup(map, &next) {
            Ok(value) => entries.push((next, value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        previous = Some(next);
    }
}

#[repr(C)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Writes all entries with one call. In an error's place: how many were written.
///
/// # Errors
/// What the kernel says of the first entry that it refuses.
pub fn update_batch<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    assert_eq!(keys.len(), values.len());
    if keys.is_empty() {
        return Ok(());
    }
    let mut attr = Batch {
        from: 0,
        to: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len() as u32,
        map: map.as_raw_fd() as u32,
        element_flags: 0,
        flags: 0,
    };
    // Where the call itself was refused the kernel leaves the count as it was.
    bpf(MAP_UPDATE_BATCH, &mut attr).map(drop).map_err(|error| {
        let done = attr.count as usize;
        (if done < keys.len() { done } else { 0 }, error)
    })
}

/// Entries of a trie, which takes batches only from Linux 5.16 on. In an error's place: how many were written.
///
/// # Errors
/// What the kernel says of the first entry that it refuses.
pub fn update_trie<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    /// The kernel's own number, which is not for user space and yet comes.
    const ENOTSUPP: i32 = 524;
    match update_batch(map, keys, values) {
        Err((0, error)) if [libc::EOPNOTSUPP, ENOTSUPP].contains(&error.raw_os_error().unwrap_or(0)) => {
            let pairs = keys.iter().zip(values).enumerate();
            pairs
                .into_iter()
                .try_for_each(|(done, (key, value))| update(map, key, value).map_err(|error| (done, error)))
        }
        result => result,
    }
}

/// The entries of a hash map or an array that are wanted; absent ones (of an array of maps) are left out. `chunk` of them
/// are asked for at once, more than a hash map's bucket may hold.
///
/// # Errors
/// What the kernel says.
pub fn batch_entries<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    chunk: usize,
    wanted: impl Fn(&V) -> bool,
) -> io::Result<Vec<(K, V)>> {
    let mut entries = Vec::new();
    each_batch::<K, V>(map, chunk, 1, |keys, values| {
        entries.extend(keys.iter().copied().zip(values.iter().copied()).filter(|(_, value)| wanted(value)));
    })?;
    Ok(entries)
}

/// A per-CPU array's values, by index, each of the `cpus` possible CPUs' together. `V`'s size is a multiple of 8.
///
/// # Errors
/// What the kernel says.
pub fn each_per_cpu<V: Plain>(
    map: BorrowedFd<'_>,
    cpus: usize,
    chunk: usize,
    mut see: impl FnMut(u32, &[V]),
) -> io::Result<()> {
    each_batch::<u32, V>(map, chunk, cpus, |keys, values| {
        keys.iter().zip(values.chunks(cpus)).for_each(|(key, values)| see(*key, values));
    })
}

/// `width`: how many values there are to a key.
fn each_batch<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    chunk: usize,
    width: usize,
    mut see: impl FnMut(&[K], &[V]),
) -> io::Result<()> {
    // SAFETY: `Plain` takes any bytes.
    let mut keys: Vec<K> = vec![unsafe { zeroed() }; chunk];
    // SAFETY: as above.
    let mut values: Vec<V> = vec![unsafe { zeroed() }; chunk * width];
    // Where to go on: a hash map's bucket, or an array's index.
    let (mut from, mut to) = (0u32, 0u32);
    let mut first = true;
    loop {
        let mut attr = Batch {
            from: if first { 0 } else { address(&from) },
            to: (&raw mut to) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: chunk as u32,
            map: map.as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        };
        let last = match bpf(MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        let count = attr.count as usize;
        see(&keys[..count], &values[..count * width]);
        if last {
            return Ok(());
        }
        from = to;
        first = false;
    }
}

/// The entries of an array with these indices, as far as it has them.
///
/// # Errors
/// What the kernel says.
pub fn array_range<V: Plain>(map: BorrowedFd<'_>, range: Range<u32>) -> io::Result<Vec<(u32, V)>> {
    let wanted = range.len();
    if wanted == 0 {
        return Ok(Vec::new());
    }
    let mut keys = vec![0u32; wanted];
    // SAFETY: `Plain` takes any bytes.
    let mut values: Vec<V> = vec![unsafe { zeroed() }; wanted];
    // The kernel begins behind this one.
    let before = range.start.wrapping_sub(1);
    let mut last = 0u32;
    let mut attr = Batch {
        from: if range.start == 0 { 0 } else { address(&before) },
        to: (&raw mut last) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: wanted as u32,
        map: map.as_raw_fd() as u32,
        element_flags: 0,
        flags: 0,
    };
    match bpf(MAP_LOOKUP_BATCH, &mut attr) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(keys.into_iter().zip(values).take(attr.count as usize).collect()),
    }
}

/// A map's shape, and all else at its default.
#[repr(C)]
struct Create {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    rest: [u32; 13],
}

/// A ring buffer of `bytes`, a power of two and a multiple of the page size.
///
/// # Errors
/// What the kernel says.
pub fn create_ring_buffer(bytes: u32) -> io::Result<OwnedFd> {
    let mut attr =
        Create { kind: BPF_MAP_TYPE_RINGBUF, key_size: 0, value_size: 0, max_entries: bytes, flags: 0, rest: [0; 13] };
    bpf(MAP_CREATE, &mut attr).map(owned)
}

/// An array to stand in an array of maps.
///
/// # Errors
/// What the kernel says.
pub fn create_inner_array<V: Plain>(values: &[V]) -> io::Result<OwnedFd> {
    let mut attr = Create {
        kind: BPF_MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: size_of::<V>() as u32,
        max_entries: values.len() as u32,
        flags: BPF_F_INNER_MAP,
        rest: [0; 13],
    };
    let map = bpf(MAP_CREATE, &mut attr).map(owned)?;
    let keys: Vec<u32> = (0..values.len() as u32).collect();
    use std::os::fd::AsFd as _;
    update_batch(map.as_fd(), &keys, values).map_err(|(_, error)| error)?;
    Ok(map)
}

/// The map with this id.
///
/// # Errors
/// Without CAP_SYS_ADMIN, or where there is none.
pub fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        id: u32,
        next: u32,
        flags: u32,
    }
    bpf(MAP_GET_FD_BY_ID, &mut Attr { id, next: 0, flags: 0 }).map(owned)
}

/// A map's shape.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapInfo {
    pub kind: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

/// # Errors
/// What the kernel says.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    #[repr(C)]
    struct Attr {
        fd: u32,
        length: u32,
        info: u64,
    }
    let mut info = MapInfo::default();
    let mut attr = Attr { fd: map.as_raw_fd() as u32, length: size_of_val(&info) as u32, info: (&raw mut info) as u64 };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr).map(|_| info)
}

/// Whether the kernel has tcx links; distributions have them in kernels older than Linux 6.6 as well. `program` is a
/// classifier.
pub fn has_tcx(program: BorrowedFd<'_>) -> bool {
    #[repr(C)]
    struct Attr {
        program: u32,
        interface: u32,
        attach_type: u32,
        flags: u32,
        relative: u32,
        pad: u32,
        expected_revision: u64,
    }
    const BPF_TCX_INGRESS: u32 = 46;
    let mut attr = Attr {
        program: program.as_raw_fd() as u32,
        interface: 0,
        attach_type: BPF_TCX_INGRESS,
        flags: 0,
        relative: 0,
        pad: 0,
        expected_revision: 0,
    };
    // No interface has the number 0, and a kernel that knows no tcx does not get as far as to notice.
    matches!(bpf(LINK_CREATE, &mut attr), Err(error) if error.raw_os_error() == Some(libc::ENODEV))
}

/// Puts another program in a link's place, without a gap.
///
/// # Errors
/// ENOLINK where what the link was attached to has gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: u32,
        program: u32,
        flags: u32,
        old: u32,
    }
    let mut attr = Attr { link: link.as_raw_fd() as u32, program: program.as_raw_fd() as u32, flags: 0, old: 0 };
    bpf(LINK_UPDATE, &mut attr).map(drop)
}

/// Takes a link's program off what it is attached to, at once: removing the link's last pin does so only later.
///
/// # Errors
/// What the kernel says.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut link = link.as_raw_fd() as u32;
    bpf(LINK_DETACH, &mut link).map(drop)
}
