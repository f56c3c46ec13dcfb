//! Makes the kernel equal to what is wanted, and knows what it has when that failed half-way.
use std::io;
use std::time::Duration;

use crate::dataplane::{ApplyError, Dataplane, Part, State};
use crate::diff::{Before, diff};

/// The dataplane and what is known to be in it.
#[derive(Debug)]
pub struct Applier<D> {
    dataplane: D,
    kernel: Kernel,
}

#[derive(Debug)]
enum Kernel {
    /// Not read yet, or a write failed half-way.
    Unknown,
    /// As read, and nothing written since.
    Read(Box<State>),
    /// All that is wanted, and nothing else.
    InStep,
}

impl<D: Dataplane> Applier<D> {
    pub fn new(dataplane: D) -> Self {
        Applier { dataplane, kernel: Kernel::Unknown }
    }

    /// What is in the kernel, read from it. The next write compares all of it with what is wanted.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn read(&mut self) -> Result<&State, ApplyError> {
        let state = Box::new(self.dataplane.read()?);
        self.kernel = Kernel::Read(state);
        let Kernel::Read(state) = &self.kernel else { unreachable!("it is read") };
        Ok(state)
    }

    /// Writes what differs, and returns how many operations that took. `before` is what changed of `wanted` since the last
    /// call, as it was then; without it, and after a failure, everything is compared.
    ///
    /// # Errors
    /// At the first operation that the kernel refuses; the next call makes up for it.
    pub fn apply(&mut self, wanted: &State, before: Option<Before>) -> Result<usize, ApplyError> {
        let before = match (std::mem::replace(&mut self.kernel, Kernel::Unknown), before) {
            (Kernel::InStep, Some(before)) => before,
            (Kernel::Read(state), _) => Before::everything(&state, wanted),
            (Kernel::Unknown | Kernel::InStep, _) => Before::everything(&self.dataplane.read()?, wanted),
        };
        let ops = diff(&before, wanted);
        if !ops.is_empty() {
            self.dataplane.apply(&ops)?;
        }
        self.kernel = Kernel::InStep;
        Ok(ops.len())
    }

    /// Reads a part of the kernel's maps back, and makes up for what somebody else has done to it. Returns in how many
    /// entries it was not as it had been left.
    ///
    /// # Errors
    /// Where it cannot be read, or the kernel refuses a repair; [`Applier::apply`] makes up for that.
    pub fn repair(&mut self, part: &Part, wanted: &State) -> Result<usize, ApplyError> {
        if !self.is_in_step() {
            return Ok(0);
        }
        let actual = match self.dataplane.read_part(part) {
            // An agent without CAP_SYS_ADMIN may write sets, and not read them, nor may any on a kernel that takes too long.
            Err(error)
                if matches!(part, Part::Sets(_))
                    && matches!(error.source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) =>
            {
                return Ok(0);
            }
            actual => actual?,
        };
        let before = Before::differences(part, &actual, wanted);
        let count = before.len();
        if count > 0 {
            self.apply(wanted, Some(before))?;
        }
        Ok(count)
    }

    /// The last write went through, and none is due for a failure's sake.
    pub fn is_in_step(&self) -> bool {
        matches!(self.kernel, Kernel::InStep)
    }

    pub fn dataplane(&self) -> &D {
        &self.dataplane
    }
}

/// How long to wait before the attempt after the `failures`th failure in a row.
pub fn backoff(failures: u32) -> Duration {
    Duration::from_millis(10 << failures.min(9).saturating_sub(1)).min(Duration::from_secs(2))
}
