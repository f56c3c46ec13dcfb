//! What this machine must be able to do, said in one sentence where it cannot.
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// tcx, by which the programs attach to interfaces.
const MINIMUM_KERNEL: (u32, u32) = (6, 6);

/// The kernel part can be built here.
pub(crate) fn require_linux() -> Result<()> {
    if cfg!(not(target_os = "linux")) {
        bail!("svc is built and run on Linux; on this system, use a Linux virtual machine with kernel 6.6 or newer");
    }
    Ok(())
}

/// Programs can be loaded and attached here, and network namespaces made.
pub(crate) fn require_lab() -> Result<()> {
    require_linux()?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's version")?;
    let version = kernel_version(&release)
        .with_context(|| format!("cannot understand the kernel's version {:?}", release.trim()))?;
    if version < MINIMUM_KERNEL {
        bail!(
            "the lab attaches its programs by tcx, which needs Linux {}.{} or newer; this is {}",
            MINIMUM_KERNEL.0,
            MINIMUM_KERNEL.1,
            release.trim()
        );
    }
    if !is_root() {
        bail!(
            "loading eBPF programs and making network namespaces needs root; run it as root, for example: sudo -E env \"PATH=$PATH\" cargo xtask …"
        );
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
    if !mounts.lines().any(|line| line.contains(" - cgroup2 ")) {
        bail!(
            "no cgroup2 hierarchy is mounted, where the socket hooks attach; mount one: mount -t cgroup2 none /sys/fs/cgroup"
        );
    }
    let filesystems = fs::read_to_string("/proc/filesystems").context("cannot read the kernel's file systems")?;
    if !filesystems.split_whitespace().any(|name| name == "bpf") {
        bail!(
            "this kernel has no bpf file system, in which the programs are pinned; use a kernel with CONFIG_BPF_SYSCALL=y"
        );
    }
    Ok(())
}

const GIB: u64 = 1 << 30;

/// There is room for what the tests build and unpack, most of it the build, where that is still to come.
pub(crate) fn require_space(root: &Path) -> Result<()> {
    let needed = if root.join("target/debug/svc-lab").exists() { 3 } else { 8 };
    let free = free_bytes(root)
        .with_context(|| format!("cannot ask how much is free on the file system of {}", root.display()))?;
    if free < needed * GIB {
        bail!(
            "the tests take {needed} GiB on the file system of {}, which has {:.1} GiB left",
            root.display(),
            free as f64 / GIB as f64
        );
    }
    Ok(())
}

fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut statistics = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: a path that ends in a zero, and room for what the call writes, which is read only where it has succeeded.
    let statistics = unsafe {
        if libc::statvfs(path.as_ptr(), statistics.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        statistics.assume_init()
    };
    Ok(statistics.f_bavail * statistics.f_frsize)
}

pub(crate) fn is_root() -> bool {
    // SAFETY: it takes nothing, touches no memory and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::kernel_version;

    #[test]
    fn kernel_versions_with_suffixes() {
        assert_eq!(kernel_version("6.18.44-cloud\n"), Some((6, 18)));
        assert_eq!(kernel_version("5.15-rc1"), Some((5, 15)));
        assert_eq!(kernel_version("unknown"), None);
    }
}
