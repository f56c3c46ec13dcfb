//! The cgroup hierarchies of this machine. A node has a directory in each, so that its kubelet finds what a machine of its own
//! would have.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use svc_lab::cgroup;

/// What a kubelet asks of version 1.
const NEEDED: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];
/// Eight times what the kernel gives, which is as much as one thread beside the directory has: all nodes together would stand still
/// for seconds while the machine does other things as well.
const CPU_SHARES: &str = "8192";

pub(crate) struct Hierarchy {
    /// As mount(8) takes it; none for version 2.
    controllers: Option<String>,
    /// That of this process.
    directory: PathBuf,
}

/// All of them.
pub(crate) fn all() -> Result<Vec<Hierarchy>> {
    let own = fs::read_to_string("/proc/self/cgroup").context("cannot read this process's cgroups")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
    let mut found = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let relative = path.trim_start_matches('/');
        if controllers.is_empty() {
            found.push(Hierarchy { controllers: None, directory: cgroup::mount_point()?.join(relative) });
        } else if let Some(point) = mount_point(&mounts, controllers) {
            found.push(Hierarchy { controllers: Some(controllers.to_owned()), directory: point.join(relative) });
        }
    }
    let has = |name: &str| {
        let version_1 = found.iter().filter_map(|hierarchy| hierarchy.controllers.as_deref());
        version_1.flat_map(|controllers| controllers.split(',')).any(|controller| controller == name)
    };
    let missing: Vec<_> = NEEDED.into_iter().filter(|name| !has(name)).collect();
    if !missing.is_empty() {
        bail!(
            "the cluster's kubelets need cgroup version 1 beside version 2 (systemd.unified_cgroup_hierarchy=0), \
             and here these controllers are not mounted: {}",
            missing.join(" ")
        );
    }
    Ok(found)
}

fn mount_point(mounts: &str, controllers: &str) -> Option<PathBuf> {
    let wanted = controllers.split(',').next()?;
    let line = mounts.lines().find(|line| {
        let Some((_, file_system)) = line.split_once(" - cgroup ") else { return false };
        file_system.rsplit(' ').next().is_some_and(|options| options.split(',').any(|option| option == wanted))
    })?;
    Some(line.split_whitespace().nth(4)?.into())
}

impl Hierarchy {
    pub(crate) fn is_version_2(&self) -> bool {
        self.controllers.is_none()
    }

    /// Makes `below` in it, a path.
    pub(crate) fn create(&self, below: &str) -> Result<PathBuf> {
        let mut directory = self.directory.clone();
        for name in below.split('/') {
            let parent = directory.clone();
            directory.push(name);
            fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
            let weight = directory.join("cpu.shares");
            if weight.exists() {
                fs::write(&weight, CPU_SHARES).with_context(|| format!("cannot write {}", weight.display()))?;
            }
            // A new cpuset is empty, and nothing can join it.
            if directory.join("cpuset.cpus").exists() && self.controllers.is_some() {
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    fs::write(directory.join(file), fs::read(parent.join(file))?)?;
                }
                fs::write(directory.join("cgroup.clone_children"), "1")?;
            }
        }
        Ok(directory)
    }

    /// Ends what is in `below`, and removes it.
    pub(crate) fn remove(&self, below: &str) -> Result<()> {
        let directory = self.directory.join(below);
        if self.controllers.is_none() {
            return cgroup::remove(&directory);
        }
        // Processes are gone once they are killed by version 2; the kernel takes a moment to see it here.
        let deadline = Instant::now() + Duration::from_secs(60);
        while directory.exists() {
            if let Err(error) = remove_tree(&directory)
                && Instant::now() > deadline
            {
                return Err(error).with_context(|| format!("cannot remove {}", directory.display()));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Mounts it below `directory`, in a directory that is made.
    pub(crate) fn mount(&self, directory: &Path) -> Result<()> {
        let name = match &self.controllers {
            None => "unified",
            Some(controllers) => controllers.trim_start_matches("name="),
        };
        let target = directory.join(name);
        fs::create_dir(&target)?;
        let (kind, options) = match self.controllers.as_deref() {
            None => ("cgroup2", None),
            Some(named) if named.starts_with("name=") => ("cgroup", Some(format!("none,{named}"))),
            Some(controllers) => ("cgroup", Some(controllers.to_owned())),
        };
        mount(Some(kind), &target, Some(kind), MsFlags::empty(), options.as_deref())
            .with_context(|| format!("cannot mount the cgroups {name}"))
    }
}

/// Files here are the kernel's, and go with their directory.
fn remove_tree(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// Has the command started in these directories.
pub(crate) fn join(command: &mut Command, directories: Vec<PathBuf>) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::process::CommandExt as _;

    let mut files = Vec::new();
    for directory in directories {
        let path = directory.join("cgroup.procs");
        let file = fs::OpenOptions::new().write(true).open(&path);
        files.push(file.with_context(|| format!("cannot open {}", path.display()))?);
    }
    // SAFETY: between fork and exec these are writes to descriptors opened before, and nothing else.
    unsafe {
        // "0" is whoever writes it.
        command.pre_exec(move || files.iter_mut().try_for_each(|file| file.write_all(b"0")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::mount_point;

    #[test]
    fn a_hierarchy_is_found_by_its_controllers() {
        let mounts = "31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      32 30 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
                      33 30 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
        let found = |controllers| mount_point(mounts, controllers);
        assert_eq!(found("cpuset"), Some("/sys/fs/cgroup/cpuset".into()));
        assert_eq!(found("cpu,cpuacct"), Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(found("name=systemd"), Some("/sys/fs/cgroup/systemd".into()));
        assert_eq!(found("memory"), None);
    }
}
