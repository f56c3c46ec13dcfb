//! Little memory for many objects, once their list is read.
use std::collections::BTreeMap;

/// Builds the map anew, each of its nodes full: keys that come in order leave them half empty.
pub fn repack<K: Ord, V>(map: &mut BTreeMap<K, V>) {
    *map = std::mem::take(map).into_iter().collect();
}

/// Gives memory that is not used any more back to the system: glibc's heap does not shrink by itself.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number.
    unsafe {
        libc::malloc_trim(0)
    };
}
