//! Ctrl-C: ends the lab's processes at once, so that whatever waits for one goes on, and the lab is taken down in order.
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use anyhow::{Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub(crate) struct Interrupt {
    happened: Arc<AtomicBool>,
    signal: Receiver<()>,
}

impl Interrupt {
    /// `cgroup` holds the lab's processes.
    pub(crate) fn watch(cgroup: PathBuf) -> Result<Self> {
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
        let happened = Arc::new(AtomicBool::new(false));
        let (sender, signal) = mpsc::channel();
        let told = Arc::clone(&happened);
        thread::spawn(move || {
            for _ in signals.forever() {
                if told.swap(true, Ordering::SeqCst) {
                    // The next lab removes what this leaves.
                    std::process::exit(130);
                }
                // If it cannot be written the lab is being removed already.
                let _ = fs::write(cgroup.join("cgroup.kill"), "1");
                let _ = sender.send(());
            }
        });
        Ok(Interrupt { happened, signal })
    }

    pub(crate) fn happened(&self) -> bool {
        self.happened.load(Ordering::SeqCst)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.happened() {
            bail!("interrupted");
        }
        Ok(())
    }

    pub(crate) fn wait(&self) {
        // An error means that the watching thread is gone: then there is nothing to wait for.
        let _ = self.signal.recv();
    }
}
