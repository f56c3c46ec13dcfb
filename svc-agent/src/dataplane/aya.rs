//! The kernel's own maps and programs.
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
