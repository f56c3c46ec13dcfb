//! Makes the kernel equal to what is wanted, and knows what it has when that failed half-way.
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::dataplane::{ApplyError, Dataplane, Part, State};
use crate::diff::{Touched, diff};

/// The dataplane and what is known to be in it.
#[derive(Debug)]
pub struct Applier<D> {
    dataplane: D,
    /// None after a failure: the kernel must be read again.
    realised: Option<State>,
    /// Entries that may differ from what is wanted.
    pending: Touched,
}

impl<D: Dataplane> Applier<D> {
    pub fn new(dataplane: D) -> Self {
        Applier { dataplane, realised: None, pending: Touched::default() }
    }

    /// What is in the kernel, read from it where that is not known.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn realised(&mut self) -> Result<&State, ApplyError> {
        if self.realised.is_none() {
            self.realised = Some(self.dataplane.read()?);
        }
        Ok(self.realised.get_or_insert_default())
    }

    /// Writes what differs, and returns how many operations that took. `touched` is what changed of `wanted` since the
    /// last call; after a failure everything is compared.
    ///
    /// # Errors
    /// At the first operation that the kernel refuses; the next call makes up for it.
    pub fn apply(&mut self, wanted: &State, touched: Touched) -> Result<usize, ApplyError> {
        self.pending.extend(touched);
        if self.realised.is_none() {
            let realised = self.dataplane.read()?;
            self.pending = Touched::everything(&realised, wanted);
            self.realised = Some(realised);
        }
        let Some(mut realised) = self.realised.take() else { return Ok(0) };
        let ops = diff(&realised, wanted, &self.pending);
        if !ops.is_empty() {
            // A failure leaves `realised` unknown.
            self.dataplane.apply(&ops)?;
            for op in &ops {
                realised.carry_out(op);
            }
        }
        self.pending = Touched::default();
        self.realised = Some(realised);
        Ok(ops.len())
    }

    /// Reads a part of the kernel's maps back, and makes up for what somebody else has done to it. Returns in how many
    /// entries it was not as it had been left.
    ///
    /// # Errors
    /// Where it cannot be read, or the kernel refuses a repair; [`Applier::apply`] makes up for that.
    pub fn repair(&mut self, part: &Part, wanted: &State) -> Result<usize, ApplyError> {
        let Some(realised) = &mut self.realised else { return Ok(0) };
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
        let touched = Touched::differences(part, &actual, realised);
        if touched.is_empty() {
            return Ok(0);
        }
        match part {
            Part::Frontends => realised.frontends = actual.frontends,
            Part::Sets(_) => {
                for id in &touched.sets {
                    match actual.sets.get(id) {
                        Some(set) => realised.sets.insert(*id, Arc::clone(set)),
                        None => realised.sets.remove(id),
                    };
                }
            }
            Part::Backends(_) => {
                for id in &touched.backends {
                    match actual.backends.get(id) {
                        Some(backend) => realised.backends.insert(*id, *backend),
                        None => realised.backends.remove(id),
                    };
                }
            }
            Part::Addresses => realised.addresses = actual.addresses,
            Part::Services => realised.services = actual.services,
            Part::SourceRanges => realised.source_ranges = actual.source_ranges,
            Part::Cidrs => realised.cidrs = actual.cidrs,
            Part::Config => realised.config = actual.config,
            Part::Uplinks => realised.uplinks = actual.uplinks,
        }
        let count = touched.len();
        self.apply(wanted, touched)?;
        Ok(count)
    }

    /// Of what is known to be in the kernel; nothing while that is not known.
    pub fn parts(&self) -> Vec<Part> {
        self.realised.as_ref().map(Part::all_of).unwrap_or_default()
    }

    /// The next call compares everything, so that what is wanted is in force whatever the last calls were told.
    pub fn touch_everything(&mut self, wanted: &State) {
        if let Some(realised) = &self.realised {
            self.pending = Touched::everything(realised, wanted);
        }
    }

    pub fn dataplane(&self) -> &D {
        &self.dataplane
    }
}

/// How long to wait before the attempt after the `failures`th failure in a row.
pub fn backoff(failures: u32) -> Duration {
    Duration::from_millis(10 << failures.min(9).saturating_sub(1)).min(Duration::from_secs(2))
}
