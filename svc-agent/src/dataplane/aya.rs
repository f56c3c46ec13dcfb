//! The kernel's own maps and programs.
use svc_common::Reason;
use svc_common::map::Counter;

use super::{ApplyError, Dataplane, Op, Settings, State};

/// The kernel part, loaded and attached.
#[derive(Debug)]
pub enum Aya {}

/// # Errors
/// Always: this build has no kernel part.
pub fn open(_settings: &Settings) -> anyhow::Result<Aya> {
    anyhow::bail!("this build of svc-agent has no kernel part")
}

impl Dataplane for Aya {
    fn read(&mut self) -> Result<State, ApplyError> {
        match *self {}
    }

    fn apply(&mut self, _ops: &[Op]) -> Result<(), ApplyError> {
        match *self {}
    }
}

impl Aya {
    /// Reads the kernel's counters by reason, summed over the CPUs; None where the dataplane keeps none.
    pub fn counters(&self) -> Option<Box<dyn Fn() -> Vec<(Reason, Counter)> + Send + Sync>> {
        match *self {}
    }
}
