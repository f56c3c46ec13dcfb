//! A dataplane in memory, which can be told to fail.
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::{ApplyError, Dataplane, Op, Part, State};

#[derive(Default, Debug)]
pub struct Fake {
    pub state: State,
    /// Every operation that was carried out, in its order.
    pub log: Vec<Op>,
    /// Operations until the next one fails, for each failure to come.
    pub faults: Vec<usize>,
    /// How often the next reads fail.
    pub read_faults: usize,
    /// Backend sets are not read, as for an agent without CAP_SYS_ADMIN.
    pub hides_sets: bool,
}

impl Fake {
    pub fn with_state(state: State) -> Self {
        Fake { state, ..Fake::default() }
    }
}

impl Dataplane for Fake {
    fn read(&mut self) -> Result<State, ApplyError> {
        if self.read_faults > 0 {
            self.read_faults -= 1;
            return Err(fault("read", 0));
        }
        Ok(self.state.clone())
    }

    fn read_part(&mut self, part: &Part) -> Result<State, ApplyError> {
        if self.hides_sets && matches!(part, Part::Sets(_)) {
            let source = io::Error::from_raw_os_error(libc::EPERM);
            return Err(ApplyError { what: "reading sets".to_owned(), done: 0, source });
        }
        self.read()
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        for (done, op) in ops.iter().enumerate() {
            match self.faults.first_mut() {
                Some(0) => {
                    self.faults.remove(0);
                    return Err(fault(&format!("{op:?}"), done));
                }
                Some(left) => *left -= 1,
                None => {}
            }
            self.state.carry_out(op);
            self.log.push(op.clone());
        }
        Ok(())
    }
}

/// A fake that others can look at, and change, while somebody has it.
impl Dataplane for Arc<Mutex<Fake>> {
    fn read(&mut self) -> Result<State, ApplyError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).read()
    }

    fn read_part(&mut self, part: &Part) -> Result<State, ApplyError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).read_part(part)
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).apply(ops)
    }
}

fn fault(what: &str, done: usize) -> ApplyError {
    ApplyError { what: what.to_owned(), done, source: io::Error::from_raw_os_error(libc::ENOMEM) }
}
