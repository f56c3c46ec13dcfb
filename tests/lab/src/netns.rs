//! A named network namespace, and work done inside it.
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

pub const DIRECTORY: &str = "/run/netns";

pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes it, with its loopback interface up.
    pub fn create(name: String) -> Result<Self> {
        let status = Command::new("ip").args(["netns", "add", &name]).status().context("cannot start ip (iproute2)")?;
        if !status.success() {
            bail!("cannot make the network namespace {name}");
        }
        let namespace = Netns { name };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// One that is there.
    pub fn existing(name: String) -> Self {
        Netns { name }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    pub fn open(&self) -> Result<File> {
        File::open(self.path()).with_context(|| format!("cannot open the network namespace {}", self.name))
    }

    /// Runs lines of `ip` here, all in one process.
    pub fn ip(&self, lines: &str) -> Result<()> {
        let mut ip = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start ip (iproute2)")?;
        ip.stdin.take().context("ip has no standard input")?.write_all(lines.as_bytes())?;
        let output = ip.wait_with_output()?;
        if !output.status.success() {
            bail!("ip in {}: {}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Runs `work` on a thread that is inside: its sockets and its view of /proc/sys/net are this namespace's.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = self.open()?;
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                enter(&namespace).context("cannot enter a network namespace")?;
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes settings below /proc/sys/net.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.inside(|| {
            for (name, value) in settings {
                let path = Path::new("/proc/sys/net").join(name);
                fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))?;
            }
            Ok(())
        })
    }
}

/// Moves the calling thread; it stays there.
pub fn enter(namespace: &File) -> std::io::Result<()> {
    // SAFETY: setns takes a descriptor that is open for the whole call, and touches no memory of ours.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Removes every namespace whose name starts with this.
pub fn remove_all(prefix: &str) -> Result<()> {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return Ok(()) };
    let mut lines = String::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) {
            lines.push_str(&format!("netns del {name}\n"));
        }
    }
    if lines.is_empty() {
        return Ok(());
    }
    let mut ip = Command::new("ip").args(["-force", "-batch", "-"]).stdin(Stdio::piped()).spawn()?;
    ip.stdin.take().context("ip has no standard input")?.write_all(lines.as_bytes())?;
    ip.wait()?;
    Ok(())
}
