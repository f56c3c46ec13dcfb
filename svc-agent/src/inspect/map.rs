//! What is pinned, opened to be read: the few commands of bpf(2) that inspection needs.
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::NonNull;

use svc_common::Addr;
use svc_common::map::{
    Backend, BackendSlot, Config, Counter, Frontend, FrontendKey, ServiceName, SocketKey, SocketPeer, Uplink,
};

const MAP_LOOKUP_ELEM: libc::c_int = 1;
const OBJ_GET: libc::c_int = 7;
const MAP_GET_FD_BY_ID: libc::c_int = 14;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const MAP_LOOKUP_BATCH: libc::c_int = 24;
const READ_ONLY: u32 = 1 << 3;
/// Entries a system call.
const BATCH: usize = 1024;

/// # Safety
/// Any bytes are a value, and there is no padding.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ty),+ $(,)?) => {
        // SAFETY: integers, and structures of them whose padding is spelled out.
        $(unsafe impl Plain for $type {})+
    };
}
plain!(u32, Addr, Backend, BackendSlot, Config, Counter, Frontend, FrontendKey, ServiceName, SocketKey);
plain!(SocketPeer, Uplink);

/// Each command's part of `union bpf_attr`.
mod attr {
    #[repr(C)]
    pub(super) struct Get {
        pub(super) path: u64,
        pub(super) bpf_fd: u32,
        pub(super) flags: u32,
    }

    #[repr(C)]
    pub(super) struct ById {
        pub(super) id: u32,
        pub(super) next: u32,
        pub(super) flags: u32,
    }

    #[repr(C)]
    pub(super) struct Info {
        pub(super) fd: u32,
        pub(super) len: u32,
        pub(super) info: u64,
    }

    #[repr(C)]
    pub(super) struct Lookup {
        pub(super) fd: u32,
        pub(super) pad: u32,
        pub(super) key: u64,
        pub(super) value: u64,
        pub(super) flags: u64,
    }

    #[repr(C)]
    pub(super) struct Batch {
        pub(super) from: u64,
        pub(super) to: u64,
        pub(super) keys: u64,
        pub(super) values: u64,
        pub(super) count: u32,
        pub(super) fd: u32,
        pub(super) elem_flags: u64,
        pub(super) flags: u64,
    }
}

/// # Safety
/// `attr` is the command's, and its addresses are valid for what the command reads and writes there.
unsafe fn bpf<A>(command: libc::c_int, attr: &mut A) -> io::Result<i32> {
    // SAFETY: the caller's.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn open_pin(path: &Path, flags: u32) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = attr::Get { path: path.as_ptr() as u64, bpf_fd: 0, flags };
    // SAFETY: the path lives until the call has returned, and a successful one gives a descriptor of our own.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(OBJ_GET, &mut attr)?)) }
}

/// The beginning of the object's info; zeros where the kernel has less to say.
fn info<const N: usize>(fd: &OwnedFd) -> io::Result<[u32; N]> {
    let mut info = [0u32; N];
    let mut attr =
        attr::Info { fd: fd.as_raw_fd() as u32, len: size_of_val(&info) as u32, info: info.as_mut_ptr() as u64 };
    // SAFETY: the kernel writes at most `len` bytes.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr)? };
    Ok(info)
}

/// A pinned link, as the kernel knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    pub id: u32,
    pub program: u32,
    /// False where the cgroup or the interface is gone.
    pub attached: bool,
}

impl Link {
    /// # Errors
    /// Where the pin is none of a link, or may not be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        // type, id, prog_id, padding; then the cgroup's id in 64 bits, or the interface's index in 32.
        let info = info::<6>(&open_pin(path, 0)?)?;
        Ok(Link { id: info[1], program: info[2], attached: info[4] != 0 || info[0] == TYPE_CGROUP && info[5] != 0 })
    }
}

const TYPE_CGROUP: u32 = 3;

#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
    pub max_entries: u32,
}

impl Map {
    /// # Errors
    /// Where the pin is none of a map, or may not be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        Map::new(open_pin(path, READ_ONLY)?)
    }

    /// For [`Map::pages`]: the kernel maps no memory of a map that was opened for reading only (bpf_map_mmap), not even to be
    /// read.
    ///
    /// # Errors
    /// As [`Map::open`].
    pub fn open_mappable(path: &Path) -> io::Result<Self> {
        Map::new(open_pin(path, 0)?)
    }

    /// # Errors
    /// Where no map has this id any more, or it may not be opened.
    pub fn by_id(id: u32) -> io::Result<Self> {
        let mut attr = attr::ById { id, next: 0, flags: READ_ONLY };
        // SAFETY: no addresses; a successful call gives a descriptor of our own.
        Map::new(unsafe { OwnedFd::from_raw_fd(bpf(MAP_GET_FD_BY_ID, &mut attr)?) })
    }

    fn new(fd: OwnedFd) -> io::Result<Self> {
        // type, id, key_size, value_size, max_entries
        let info = info::<5>(&fd)?;
        Ok(Map { fd, key_size: info[2] as usize, value_size: info[3] as usize, max_entries: info[4] })
    }

    /// A map of another version of the agent must not be read as one of this version.
    fn check(&self, key_size: usize, value_size: usize) -> io::Result<()> {
        if (self.key_size, self.value_size) == (key_size, value_size) {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "its entries have {} + {} bytes, where this version of svc-agent has {key_size} + {value_size}",
            self.key_size, self.value_size,
        )))
    }

    /// All entries of a hash map, an array or an array of maps (as the maps' ids).
    ///
    /// # Errors
    /// Where the kernel refuses, or the entries are of another size.
    pub fn entries<K: Plain, V: Plain>(&self) -> io::Result<Vec<(K, V)>> {
        self.check(size_of::<K>(), size_of::<V>())?;
        let mut keys: Vec<K> = Vec::with_capacity(BATCH);
        let mut values: Vec<V> = Vec::with_capacity(BATCH);
        let mut entries = Vec::new();
        // Where to go on: a hash map's bucket in 4 bytes, or an array's index.
        let (mut from, mut to, mut first) = (0u32, 0u32, true);
        loop {
            let mut attr = attr::Batch {
                from: if first { 0 } else { &raw const from as u64 },
                to: &raw mut to as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: BATCH as u32,
                fd: self.fd.as_raw_fd() as u32,
                elem_flags: 0,
                flags: 0,
            };
            // SAFETY: both vectors have room for BATCH entries of the sizes checked above.
            let result = unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) };
            let last = match result {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                Err(error) => return Err(error),
            };
            let count = attr.count as usize;
            assert!(count <= BATCH, "the kernel gave more entries than it was asked for");
            // SAFETY: the kernel has written this many, and any bytes are a value.
            unsafe {
                keys.set_len(count);
                values.set_len(count);
            }
            entries.extend(keys.drain(..).zip(values.drain(..)));
            if last {
                return Ok(entries);
            }
            (from, first) = (to, false);
        }
    }

    /// The value of one entry.
    ///
    /// # Errors
    /// Where there is none, the kernel refuses, or the entry is of another size.
    pub fn lookup<V: Plain>(&self, key: u32) -> io::Result<V> {
        self.check(size_of::<u32>(), size_of::<V>())?;
        let mut value = std::mem::MaybeUninit::<V>::uninit();
        self.lookup_at(key, value.as_mut_ptr().cast())?;
        // SAFETY: the kernel has written it, and any bytes are a value.
        Ok(unsafe { value.assume_init() })
    }

    /// One entry of a per-CPU array, every CPU's.
    ///
    /// # Errors
    /// As [`Map::lookup`].
    pub fn lookup_per_cpu<V: Plain>(&self, key: u32, cpus: usize) -> io::Result<Vec<V>> {
        self.check(size_of::<u32>(), size_of::<V>())?;
        assert!(size_of::<V>().is_multiple_of(8), "the kernel rounds a CPU's value up to 8 bytes");
        let mut values: Vec<V> = Vec::with_capacity(cpus);
        self.lookup_at(key, values.as_mut_ptr().cast())?;
        // SAFETY: the kernel has written one value for each possible CPU.
        unsafe { values.set_len(cpus) };
        Ok(values)
    }

    fn lookup_at(&self, key: u32, value: *mut u8) -> io::Result<()> {
        let mut attr = attr::Lookup {
            fd: self.fd.as_raw_fd() as u32,
            pad: 0,
            key: &raw const key as u64,
            value: value as u64,
            flags: 0,
        };
        // SAFETY: the callers have checked the sizes of key and value and made room.
        unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr).map(drop) }
    }

    /// An mmapable array's memory, which the kernel goes on writing.
    ///
    /// # Errors
    /// Where the map is not mmapable, or its values are not of this size.
    pub fn pages<T>(&self) -> io::Result<Pages<T>> {
        self.check(size_of::<u32>(), size_of::<T>())?;
        let len = self.max_entries as usize;
        // SAFETY: a new mapping, of as many bytes as the kernel has allocated.
        let memory = unsafe {
            let fd = self.fd.as_raw_fd();
            libc::mmap(std::ptr::null_mut(), len * size_of::<T>(), libc::PROT_READ, libc::MAP_SHARED, fd, 0)
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Pages { memory: NonNull::new(memory.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?, len })
    }
}

/// Values of an array, in memory that the kernel writes: to be read by pointer only.
pub struct Pages<T> {
    memory: NonNull<T>,
    len: usize,
}

impl<T> Pages<T> {
    pub fn iter(&self) -> impl Iterator<Item = *const T> {
        // SAFETY: within the mapping.
        (0..self.len).map(|index| unsafe { self.memory.as_ptr().add(index).cast_const() })
    }
}

impl<T> Drop for Pages<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this size.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}

/// How many CPUs the kernel keeps per-CPU values for.
///
/// # Errors
/// Where sysfs does not say.
pub fn possible_cpus() -> io::Result<usize> {
    let text = io::read_to_string(File::open("/sys/devices/system/cpu/possible")?)?;
    count_cpus(&text).ok_or_else(|| io::Error::other(format!("/sys/devices/system/cpu/possible says {text:?}")))
}

/// `0-3,8`: four and one.
fn count_cpus(text: &str) -> Option<usize> {
    text.trim()
        .split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)? + 1)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::count_cpus;
    use rstest::rstest;

    #[rstest]
    #[case("0\n", Some(1))]
    #[case("0-3\n", Some(4))]
    #[case("0-3,8,10-11", Some(7))]
    #[case("", None)]
    #[case("3-0", None)]
    fn possible_cpus_are_ranges(#[case] text: &str, #[case] count: Option<usize>) {
        assert_eq!(count_cpus(text), count);
    }
}
