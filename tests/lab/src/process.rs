//! A process of the lab: in its host's network namespace and cgroup, and gone when the lab's owner is.
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output};
use std::sync::LazyLock;
use std::sync::mpsc::{self, Sender};
use std::thread;

use anyhow::{Context, Result};

use crate::netns;

/// Where a process of a host runs.
pub struct Place {
    pub namespace: File,
    pub cgroup: PathBuf,
}

/// Killed when dropped.
pub struct Process {
    child: Child,
}

impl Process {
    pub fn spawn(command: Command, place: Place) -> Result<Self> {
        let program = command.get_program().display().to_string();
        let child = start(command, place).with_context(|| format!("cannot start {program}"))?;
        Ok(Process { child })
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn resident_kib(&self) -> Result<u64> {
        kibibytes(&fs::read_to_string(format!("/proc/{}/status", self.pid()))?, "VmRSS")
    }

    /// What it has had of all CPUs, in nanoseconds, threads that have ended included.
    pub fn cpu_ns(&self) -> Result<u64> {
        let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
        // SAFETY: both are written, and outlive the calls.
        let result = unsafe {
            match libc::clock_getcpuclockid(self.pid().cast_signed(), &raw mut clock) {
                0 => libc::clock_gettime(clock, &raw mut time),
                error => return Err(io::Error::from_raw_os_error(error)).context("cannot ask for a process' CPU time"),
            }
        };
        if result != 0 {
            return Err(io::Error::last_os_error()).context("cannot read a process' CPU time");
        }
        Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().context("cannot wait for a process")
    }

    /// Waits for its end, and gives what it wrote to its pipes.
    pub fn output(&mut self) -> Result<Output> {
        let mut output = self.child.stdout.take();
        let mut errors = self.child.stderr.take();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        thread::scope(|scope| -> Result<()> {
            let reader = scope.spawn(|| errors.as_mut().map(|pipe| pipe.read_to_end(&mut stderr)).transpose());
            output.as_mut().map(|pipe| pipe.read_to_end(&mut stdout)).transpose()?;
            reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok(())
        })?;
        Ok(Output { status: self.wait()?, stdout, stderr })
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&mut self, signal: i32) -> Result<()> {
        if self.ended().is_none() {
            // SAFETY: the process is a child that has not been waited for, so its pid is still its own.
            unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

type Request = (Command, Place, Sender<io::Result<Child>>);

/// "Die with your parent" means the thread that forked, so all are forked by one that lives as long as the program.
static SPAWNER: LazyLock<Sender<Request>> = LazyLock::new(|| {
    let (sender, receiver) = mpsc::channel::<Request>();
    thread::spawn(move || {
        for (command, place, reply) in receiver {
            // Whoever asked may have stopped waiting.
            let _ = reply.send(fork(command, &place));
        }
    });
    sender
});

fn start(command: Command, place: Place) -> Result<Child> {
    let (reply, answer) = mpsc::channel();
    SPAWNER.send((command, place, reply)).ok().context("the thread that starts processes has ended")?;
    Ok(answer.recv().context("the thread that starts processes has ended")??)
}

fn fork(mut command: Command, place: &Place) -> io::Result<Child> {
    let namespace = place.namespace.try_clone()?;
    let cgroup = OpenOptions::new().write(true).open(place.cgroup.join("cgroup.procs"))?;
    // SAFETY: between fork and exec these are system calls on descriptors opened before, and nothing else.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            netns::enter(&namespace)?;
            // "0" is whoever writes it.
            if libc::write(cgroup.as_raw_fd(), c"0".as_ptr().cast(), 1) != 1 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command.spawn()
}

/// A line of /proc's in units of kB, as `VmRSS:  1234 kB`.
///
/// # Errors
/// Where there is none of this name.
pub fn kibibytes(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok());
    number.with_context(|| format!("no {name} in kB"))
}
