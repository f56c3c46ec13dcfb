//! cgroup2 directories: one a node, one a pod below it, as a kubelet makes them.
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Where cgroup2 is mounted: beside version 1 it is not at /sys/fs/cgroup.
pub fn mount_point() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
    find_mount(&table).context(
        "no cgroup2 hierarchy is mounted, where the socket hooks attach; mount one: mount -t cgroup2 none /sys/fs/cgroup",
    )
}

fn find_mount(table: &str) -> Option<PathBuf> {
    let line = table.lines().find(|line| line.contains(" - cgroup2 "))?;
    Some(PathBuf::from(line.split_whitespace().nth(4)?))
}

/// Kills every process in `directory` and below, and removes it.
pub fn remove(directory: &Path) -> Result<()> {
    if !directory.exists() {
        return Ok(());
    }
    fs::write(directory.join("cgroup.kill"), "1")
        .with_context(|| format!("cannot end the processes in {}", directory.display()))?;
    wait_until_empty(directory)?;
    remove_tree(directory)
}

fn wait_until_empty(directory: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::read_to_string(directory.join("cgroup.events"))?.contains("populated 1") {
        if Instant::now() > deadline {
            bail!("processes in {} do not end", directory.display());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Only directories can be removed here: the files in them belong to the kernel.
fn remove_tree(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory).with_context(|| format!("cannot remove {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::find_mount;

    #[test]
    fn cgroup2_is_found_beside_version_1() {
        let table = "36 32 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                     44 32 0:39 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(table).as_deref(), Some("/sys/fs/cgroup/unified".as_ref()));
        assert_eq!(find_mount("36 32 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
    }
}
