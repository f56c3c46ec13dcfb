//! Whose lab is whose. A lab has an id, and everything of it carries the id: namespaces, cgroup, directory. Its owner holds a
//! lock, which the kernel lets go when the owner dies, however it dies: what no one holds any more is removed.
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

use crate::{cgroup, netns};

const DIRECTORY: &str = "/run/svc-lab";
const LOCK: &str = "lock";

pub struct Claim {
    id: String,
    _lock: File,
}

impl Claim {
    /// A new lab's name and directories. Removes what owners left that are no more.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        require_root()?;
        fs::create_dir_all(DIRECTORY).with_context(|| format!("cannot create {DIRECTORY}"))?;
        // Held until the new directory's own lock is: no one may take it for one left behind.
        let _turn = turn()?;
        sweep_locked()?;
        let id = format!("{}.{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        fs::create_dir(directory(&id))?;
        let claim = Claim { _lock: lock(&directory(&id).join(LOCK))?, id };
        claim.mount_bpffs()?;
        fs::create_dir_all(claim.cgroup()?)?;
        fs::create_dir(claim.logs())?;
        Ok(claim)
    }

    pub fn namespace(&self, host: &str) -> String {
        format!("{}{host}", namespace_prefix(&self.id))
    }

    pub fn cgroup(&self) -> Result<PathBuf> {
        cgroup_directory(&self.id)
    }

    /// A bpf file system of the lab's own, in which every node has a directory.
    pub fn bpffs(&self) -> PathBuf {
        bpffs(&self.id)
    }

    pub fn logs(&self) -> PathBuf {
        self.directory().join("logs")
    }

    /// For files, gone with the lab.
    pub fn directory(&self) -> PathBuf {
        directory(&self.id)
    }

    fn remove(&self) -> Result<()> {
        take_down(&self.id)?;
        // The lock's file goes with the directory: a sweep that finds the one without the other would remove it, too.
        let _turn = turn()?;
        remove_directory(&self.id)
    }

    fn mount_bpffs(&self) -> Result<()> {
        let target = self.bpffs();
        fs::create_dir(&target)?;
        let path = std::ffi::CString::new(target.as_os_str().as_bytes())?;
        // SAFETY: all are strings that end with a zero and outlive the call; no data is passed.
        let result = unsafe { libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null()) };
        if result != 0 {
            return Err(std::io::Error::last_os_error())
                .context("cannot mount a bpf file system, in which the programs are pinned; it needs root and the bpf file system in the kernel");
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("the lab {} is not wholly removed: {error:#}", self.id);
        }
    }
}

/// The ids of the labs there are.
pub fn running() -> Result<Vec<String>> {
    if !Path::new(DIRECTORY).exists() {
        return Ok(Vec::new());
    }
    let mut ids = Vec::new();
    for entry in fs::read_dir(DIRECTORY)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            ids.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(ids)
}

/// Removes every lab whose owner is no more.
pub fn sweep() -> Result<()> {
    if !Path::new(DIRECTORY).exists() {
        return Ok(());
    }
    let _turn = turn()?;
    sweep_locked()
}

fn sweep_locked() -> Result<()> {
    for id in running()? {
        let abandoned = match File::open(directory(&id).join(LOCK)) {
            Ok(lock) => lock.try_lock().is_ok(),
            // Its owner died before it could lock, or its removal was cut short.
            Err(_) => true,
        };
        if abandoned {
            take_down(&id)?;
            remove_directory(&id)?;
        }
    }
    Ok(())
}

/// All but the directory, which goes last: while it is there, the next sweep goes on where this one was cut short.
fn take_down(id: &str) -> Result<()> {
    cgroup::remove(&cgroup_directory(id)?)?;
    netns::remove_all(&namespace_prefix(id))?;
    let bpffs = bpffs(id);
    if bpffs.exists() {
        let path = std::ffi::CString::new(bpffs.as_os_str().as_bytes())?;
        // SAFETY: the path is a string that ends with a zero and outlives the call. Where nothing is mounted, it fails.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
    Ok(())
}

fn remove_directory(id: &str) -> Result<()> {
    fs::remove_dir_all(directory(id)).with_context(|| format!("cannot remove {}", directory(id).display()))
}

fn require_root() -> Result<()> {
    // SAFETY: it takes nothing, touches no memory and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        bail!(
            "a lab makes network namespaces and loads eBPF programs, which needs root: run it by `cargo xtask run` or `cargo xtask test`, as root"
        );
    }
    Ok(())
}

/// Directories of labs are made, swept and removed in turn.
fn turn() -> Result<File> {
    lock(&Path::new(DIRECTORY).join(LOCK))
}

fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock()?;
    Ok(file)
}

fn directory(id: &str) -> PathBuf {
    Path::new(DIRECTORY).join(id)
}

fn bpffs(id: &str) -> PathBuf {
    directory(id).join("bpf")
}

/// Where the lab's cgroups are.
pub fn cgroup_directory(id: &str) -> Result<PathBuf> {
    Ok(cgroup::mount_point()?.join(format!("svc-lab-{id}")))
}

/// What the names of the lab's namespaces start with. It ends in a character that no id holds: the namespaces of lab 1.1 are
/// not those of lab 1.10.
pub fn namespace_prefix(id: &str) -> String {
    format!("svc-{id}-")
}
