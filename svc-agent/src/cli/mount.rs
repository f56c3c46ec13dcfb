//! `svc-agent mount`: mounts the BPF file system and cgroup v2 where a node has not. A step of its own, so that the agent
//! itself need not be privileged.
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};

use super::print;
use crate::host::{cgroup2_mount, is_bpffs, is_cgroup2};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Where the BPF file system belongs.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,

    /// Where cgroup v2 is, or below; else it is mounted at DIR/unified.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/cgroup")]
    cgroup: PathBuf,
}

/// # Errors
/// Where a directory does not exist, or mounting is not allowed.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let told = || format!("--bpffs {}", args.bpffs.display());
    if !is_bpffs(&args.bpffs).with_context(told)? {
        mount_at("bpf", &args.bpffs)?;
    }
    let told = || format!("--cgroup {}", args.cgroup.display());
    if !is_cgroup2(&args.cgroup).with_context(told)? && cgroup2_mount(&args.cgroup)?.is_none() {
        let directory = args.cgroup.join("unified");
        std::fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        mount_at("cgroup2", &directory)?;
    }
    Ok(())
}

fn mount_at(kind: &str, directory: &Path) -> anyhow::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(kind), directory, Some(kind), flags, None::<&str>)
        .with_context(|| format!("mounting {kind} at {}", directory.display()))?;
    print::text(&format!("mounted {kind} at {}\n", directory.display()))
}
