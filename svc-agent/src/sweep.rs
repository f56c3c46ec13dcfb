//! Frees what has outlived its limit in the flow table. The kernel part does so by itself where it meets such a flow; but a
//! cell's clock goes round in 39 hours, after which an old flow would look young again.
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use svc_common::flow::{self, IdleLimits, Set};
use svc_common::map::{Config, pin};
use tracing::{debug, warn};

use crate::{host, sys};

const EVERY: Duration = Duration::from_secs(60);
/// Mapped at a time, so that the table does not count as the agent's memory.
const SETS: usize = 1 << 14;

/// Never returns. `bpffs`: where the maps are pinned.
pub async fn run(bpffs: PathBuf) {
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await;
        let bpffs = bpffs.clone();
        match tokio::task::spawn_blocking(move || sweep(&bpffs)).await {
            Ok(Ok(cells)) => debug!(cells, "swept the flow table"),
            Ok(Err(error)) => warn!("cannot sweep the flow table: {error:#}"),
            Err(error) => warn!("cannot sweep the flow table: {error}"),
        }
    }
}

/// Returns how many cells were freed.
///
/// # Errors
/// Where the table is not pinned there, or cannot be mapped.
pub fn sweep(bpffs: &Path) -> anyhow::Result<usize> {
    let maps = bpffs.join("maps");
    let open = |name: &str| sys::open_pin(&maps.join(name)).with_context(|| format!("cannot open the map {name}"));
    let config: Config = sys::lookup(open(pin::CONFIG)?.as_fd(), &0u32).context("cannot read the map config")?;
    let flows = open(pin::FLOWS)?;
    let sets = sys::map_info(flows.as_fd())?.max_entries as usize;
    let mut freed = 0;
    let mut first = 0;
    while first < sets {
        let count = SETS.min(sets - first);
        freed += sweep_part(&flows, first, count, &config.idle_limits).context("cannot map the flow table")?;
        first += count;
    }
    Ok(freed)
}

fn sweep_part(flows: &OwnedFd, first: usize, count: usize, limits: &IdleLimits) -> io::Result<usize> {
    let (offset, length) = (first * size_of::<Set>(), count * size_of::<Set>());
    // SAFETY: a new mapping, of memory that the kernel has allocated.
    let memory = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, flows.as_raw_fd(), offset as libc::off_t)
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let now = host::flow_tick();
    // SAFETY: within the mapping, which is given back after it, and nothing keeps a pointer to it.
    unsafe {
        let cells = (0..count * flow::WAYS).map(|cell| memory.cast::<flow::Cell>().add(cell));
        let freed = cells.filter(|cell| flow::sweep(*cell, now, limits)).count();
        libc::munmap(memory, length);
        Ok(freed)
    }
}
