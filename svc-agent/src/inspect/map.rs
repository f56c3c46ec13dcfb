//! What is pinned, opened to be read. Hash maps are read by batches, which a map that changes meanwhile cannot lead in
//! circles, as it can a walk from key to key.
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;

use crate::sys::{self, Plain};

const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const MAP_LOOKUP_BATCH: libc::c_int = 24;
/// Entries a system call.
const BATCH: usize = 1024;
const LINK_TYPE_CGROUP: u32 = 3;

/// Each command's part of `union bpf_attr`.
mod attr {
    #[repr(C)]
    pub(super) struct Info {
        pub(super) fd: u32,
        pub(super) len: u32,
        pub(super) info: u64,
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
unsafe fn bpf<A>(command: libc::c_int, attr: &mut A) -> io::Result<()> {
    // SAFETY: the caller's.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
        let link = sys::open_pin(path)?;
        // type, id, prog_id, padding; then the cgroup's id in 64 bits, or the interface's index in 32.
        let mut info = [0u32; 6];
        let (len, address) = (size_of_val(&info) as u32, info.as_mut_ptr() as u64);
        let mut attr = attr::Info { fd: link.as_raw_fd() as u32, len, info: address };
        // SAFETY: the kernel writes at most `len` bytes.
        unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr)? };
        let [kind, id, program, _, target, target_high] = info;
        Ok(Link { id, program, attached: target != 0 || kind == LINK_TYPE_CGROUP && target_high != 0 })
    }
}

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
        Map::new(sys::open_pin(path)?)
    }

    /// # Errors
    /// Where no map has this id any more, or it may not be opened.
    pub fn by_id(id: u32) -> io::Result<Self> {
        Map::new(sys::map_by_id(id)?)
    }

    fn new(fd: OwnedFd) -> io::Result<Self> {
        let info = sys::map_info(fd.as_fd())?;
        let (key_size, value_size) = (info.key_size as usize, info.value_size as usize);
        Ok(Map { fd, key_size, value_size, max_entries: info.max_entries })
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

    /// All entries of a trie.
    ///
    /// # Errors
    /// As [`Map::entries`].
    pub fn trie_entries<K: Plain, V: Plain>(&self) -> io::Result<Vec<(K, V)>> {
        self.check(size_of::<K>(), size_of::<V>())?;
        sys::entries(self.fd.as_fd())
    }

    /// The value of one entry.
    ///
    /// # Errors
    /// Where there is none, the kernel refuses, or the entry is of another size.
    pub fn lookup<V: Plain>(&self, key: u32) -> io::Result<V> {
        self.check(size_of::<u32>(), size_of::<V>())?;
        sys::lookup(self.fd.as_fd(), &key)
    }

    /// One entry of a per-CPU array, every CPU's.
    ///
    /// # Errors
    /// As [`Map::lookup`].
    pub fn lookup_per_cpu<V: Plain>(&self, key: u32, cpus: usize) -> io::Result<Vec<V>> {
        self.check(size_of::<u32>(), size_of::<V>())?;
        assert!(size_of::<V>().is_multiple_of(8), "the kernel rounds a CPU's value up to 8 bytes");
        sys::lookup_per_cpu(self.fd.as_fd(), &key, cpus)
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
