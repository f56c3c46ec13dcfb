//! The kernel part loaded once more, apart from the one in use: nothing is attached or pinned, and all is gone with it.
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use anyhow::{Context as _, bail};
use aya::maps::Map;
use aya::{Ebpf, EbpfLoader};

use super::aya::{MAPS, OBJECT};
use crate::sys;

/// Over maps of its own, which have room for little.
///
/// # Errors
/// What the kernel refused.
pub fn alone() -> anyhow::Result<Ebpf> {
    /// At least as many as there are CPUs (maps of kind LRU), and as a flow table has.
    const LEAST: u32 = 1024;
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    const OF_THEIR_SIZE: [&str; 5] = ["CONFIG", "COUNTERS", "MONITORS", "EVENTS", "EVENTS_TOLD"];
    for (name, _) in MAPS.iter().filter(|(name, _)| !OF_THEIR_SIZE.contains(name)) {
        loader.map_max_entries(name, LEAST);
    }
    Ok(loader.load(OBJECT)?)
}

/// Over those of the pinned maps under `directory` that only the agent writes, and over maps of its own for all that the
/// programs write.
///
/// # Errors
/// Where a map is not pinned, or is another version's, and what the kernel refused.
pub fn over(directory: &Path) -> anyhow::Result<Ebpf> {
    const WRITTEN_BY_PROGRAMS: [&str; 8] =
        ["FLOWS", "SOCKETS", "COUNTERS", "AFFINITY", "FRAGMENTS", "EVENTS_TOLD", "CONNECTIONS", "TRAFFIC"];
    // Nobody is to be told of a packet that is none.
    const OF_MONITORS: [&str; 2] = ["MONITORS", "EVENTS"];
    super::aya::check_pins(directory)?;
    let paths: Vec<_> = MAPS.iter().map(|(name, pin)| (*name, directory.join(pin))).collect();
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    for (name, path) in &paths {
        // A map that is not pinned would be made, and pinned.
        let map = sys::open_pin(path).with_context(|| format!("opening the pin {}", path.display()))?;
        loader.map_max_entries(name, sys::map_info(map.as_fd())?.max_entries);
        if !WRITTEN_BY_PROGRAMS.contains(name) && !OF_MONITORS.contains(name) {
            loader.map_pin_path(name, path.as_path());
        }
    }
    Ok(loader.load(OBJECT)?)
}

/// A map of the kernel part.
///
/// # Errors
/// Where it has none of this name.
pub fn map<'a>(ebpf: &'a Ebpf, name: &str) -> anyhow::Result<BorrowedFd<'a>> {
    match ebpf.map(name).with_context(|| format!("the kernel part has no map {name}"))? {
        Map::Array(map) | Map::LruHashMap(map) | Map::PerCpuArray(map) => Ok(map.fd().as_fd()),
        other => bail!("the map {name} is of an unexpected kind: {other:?}"),
    }
}
