//! Many cases: until there are enough, or one in which the model and the subject differ.
use std::cell::RefCell;
use std::fmt;

use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use crate::case::Case;
use crate::generate::{Scope, cases};
use crate::run::Tally;

/// Cases of one seed.
const BATCH: u32 = 64;

/// A difference, made as small as it gets.
pub struct Difference {
    /// A campaign that starts with it meets the difference in its first batch.
    pub seed: u64,
    pub story: String,
    pub tally: Tally,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\nafter {}", self.story, self.tally)?;
        write!(f, "seed {0}; again: cargo xtask fuzz --seed {0}, with --kernel where it was the kernel's", self.seed)
    }
}

/// Batches of cases, of this seed and those that follow it, until `is_enough`. `check` runs one case on a subject without flows.
///
/// # Errors
/// The first difference.
pub fn campaign(
    seed: u64,
    scope: Scope,
    check: impl FnMut(&Case, &mut Tally) -> Result<(), String>,
    mut is_enough: impl FnMut(&Tally) -> bool,
) -> Result<Tally, Box<Difference>> {
    let state = RefCell::new((Tally::default(), check));
    for seed in seed.. {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config { cases: BATCH, max_shrink_iters: 20_000, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let result = runner.run(&cases(scope), |case| {
            let (tally, check) = &mut *state.borrow_mut();
            check(&case, tally).map_err(TestCaseError::fail)
        });
        let tally = &state.borrow().0;
        if let Err(error) = result {
            let story = match error {
                TestError::Fail(story, _) => story.message().to_owned(),
                TestError::Abort(why) => why.message().to_owned(),
            };
            return Err(Box::new(Difference { seed, story, tally: tally.clone() }));
        }
        if is_enough(tally) {
            break;
        }
    }
    Ok(state.into_inner().0)
}
