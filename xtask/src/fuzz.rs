//! Generated packets beside the model of the rules, on and on.
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::step::{cargo, program, shown};
use crate::{host, setup};

/// Compare what is done to generated packets with a plain model of the rules, until they differ or Ctrl-C. A difference is made
/// as small as it gets, and shown with the seed that leads to it again.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The kernel's programs instead of the engine over memory; needs root.
    #[arg(long)]
    kernel: bool,
    /// Stop after this many seconds.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Stop after this many cases.
    #[arg(long, value_name = "N")]
    cases: Option<u64>,
    /// The first seed; by default another one each time. What the kernel chooses at random is another thing each time all the
    /// same.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut fuzz = if options.kernel {
        host::require_lab()?;
        setup::ensure()?;
        shown(cargo().args(["build", "--package", "svc-tests"]))?;
        program("svc-fuzz-kernel")?
    } else {
        shown(cargo().args(["build", "--package", "svc-model"]))?;
        program("svc-fuzz")?
    };
    for (name, value) in [("--seconds", options.seconds), ("--cases", options.cases), ("--seed", options.seed)] {
        if let Some(value) = value {
            fuzz.args([name, &value.to_string()]);
        }
    }
    // In place of this process, so that Ctrl-C and the exit status are the comparison's.
    Err(fuzz.exec()).context("cannot start the comparison")
}
