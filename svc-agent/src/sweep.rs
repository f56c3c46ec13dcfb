//! Frees what has outlived its limit in the flow table, and what monitors had that have died. The kernel part frees such a flow
//! where it meets it; but a cell's clock goes round in 39 hours, after which an old flow would look young again.
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use svc_common::flow::{self, Cell, IdleLimits, Set};
use svc_common::map::{Config, pin};
use tracing::{debug, warn};

use crate::{host, monitor, sys};

const EVERY: Duration = Duration::from_secs(60);
/// Mapped at a time, so that the table does not count as the agent's memory.
const SETS: usize = 1 << 14;

/// Never returns. `bpffs`: where the maps are pinned.
pub async fn run(bpffs: PathBuf) {
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await;
        let bpffs = bpffs.clone();
        let both = move || {
            if let Err(error) = monitor::retire_dead(&bpffs.join("maps")) {
                warn!("cannot look after monitors that have died: {error:#}");
            }
            sweep(&bpffs)
        };
        match tokio::task::spawn_blocking(both).await {
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
    let mut freed = 0;
    each_cell(&bpffs.join("maps"), true, |cell, now, limits| {
        // SAFETY: a cell of the table, which may be written.
        freed += usize::from(unsafe { flow::sweep(cell, now, limits) });
    })?;
    Ok(freed)
}

/// Calls `see` with each cell, the tick and the limits, and returns how many there are. The cell may be written where `writable`
/// says so, and must not be kept.
///
/// # Errors
/// Where the table is not pinned under `maps`, or cannot be mapped.
pub fn each_cell(
    maps: &Path,
    writable: bool,
    mut see: impl FnMut(*mut Cell, u16, &IdleLimits),
) -> anyhow::Result<usize> {
    let open = |name: &str| sys::open_pin(&maps.join(name)).with_context(|| format!("cannot open the map {name}"));
    let config: Config = sys::lookup(open(pin::CONFIG)?.as_fd(), &0u32).context("cannot read the map config")?;
    let flows = open(pin::FLOWS)?;
    let sets = sys::map_info(flows.as_fd())?.max_entries as usize;
    let mut first = 0;
    while first < sets {
        let count = SETS.min(sets - first);
        let now = host::flow_tick();
        each_of_part(&flows, first, count, writable, |cell| see(cell, now, &config.idle_limits))
            .context("cannot map the flow table")?;
        first += count;
    }
    Ok(sets * flow::WAYS)
}

fn each_of_part(
    flows: &OwnedFd,
    first: usize,
    count: usize,
    writable: bool,
    mut see: impl FnMut(*mut Cell),
) -> io::Result<()> {
    let (offset, length) = (first * size_of::<Set>(), count * size_of::<Set>());
    // SAFETY: a new mapping, of memory that the kernel has allocated.
    let memory = unsafe {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, flows.as_raw_fd(), offset as libc::off_t)
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    for cell in 0..count * flow::WAYS {
        // SAFETY: within the mapping, which is given back behind this, and nothing keeps a pointer to it.
        see(unsafe { memory.cast::<Cell>().add(cell) });
    }
    // SAFETY: our own mapping, of this size.
    unsafe { libc::munmap(memory, length) };
    Ok(())
}
