//! Little memory for many objects, once their list is read.
use std::collections::BTreeMap;
use std::thread;

/// Builds the map anew from copies, each of its nodes full: keys that come in order leave them half empty.
pub fn repack<K: Ord + Clone, V: Clone>(map: &mut BTreeMap<K, V>) {
    *map = map.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
}

/// Runs `work` in a thread of its own, for which glibc has a heap of its own: what it allocates lies close together, and what it
/// frees of another heap no longer stands between what is free there.
pub fn apart(work: impl FnOnce() + Send) {
    thread::scope(|scope| {
        if let Err(panic) = scope.spawn(work).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Where a heap keeps free memory at its end, glibc lets it be up to twice the largest piece ever freed: tens of megabytes a
/// thread after a list. Call it before there are other threads.
pub fn keep_little_free() {
    #[cfg(target_env = "gnu")]
    for (parameter, bytes) in [(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD), (libc::M_TRIM_THRESHOLD, MMAP_THRESHOLD)] {
        // SAFETY: it takes two numbers.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}

/// glibc's default.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD: libc::c_int = 128 << 10;

/// Gives memory that is not used any more back to the system: glibc's heaps do not shrink by themselves.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // The end of a thread's heap goes when something large beside it is freed, and by nothing else.
        drop(std::hint::black_box(Vec::<u8>::with_capacity(MMAP_THRESHOLD as usize - 1024)));
        // SAFETY: it takes a number.
        unsafe { libc::malloc_trim(0) };
    }
}
