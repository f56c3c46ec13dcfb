//! The benchmark runs in a process of its own, so that what it has made goes however it ends.
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use svc_lab::claim;

use crate::conntrack;

/// Runs this program once more with `--worker`, and cleans up behind it. A signal ends the worker.
pub(crate) fn run() -> Result<ExitCode> {
    let limit = conntrack::limit();
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--worker").args(std::env::args_os().skip(1));
    // SAFETY: a system call between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let mut worker = command.spawn().context("cannot start the benchmark")?;
    let pid = worker.id().cast_signed();
    let interrupted = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&interrupted);
    let handle = signals.handle();
    let watcher = thread::spawn(move || {
        for _ in signals.forever() {
            told.store(true, Ordering::Relaxed);
            // SAFETY: the worker is not waited for before this thread has ended or the worker has.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    });
    let status = worker.wait()?;
    handle.close();
    let _ = watcher.join();
    claim::sweep()?;
    if let (Some(before), Some(now)) = (limit, conntrack::limit())
        && before != now
    {
        conntrack::set_limit(before)?;
    }
    if interrupted.load(Ordering::Relaxed) {
        eprintln!("interrupted");
    }
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
