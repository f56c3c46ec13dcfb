//! Generated packets beside the model of the rules, and generated inputs of the agent, on and on.
use std::os::unix::process::CommandExt;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use crate::step::{cargo, program, shown};
use crate::{host, setup};

/// Compare what is done to generated packets with a plain model of the rules, until they differ or Ctrl-C. A difference is made
/// as small as it gets, and shown with the seed that leads to it again. With --config or --objects: give the agent files of
/// kube-proxy's, or objects, with generated mistakes in them, until one does more harm than it may.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The kernel's programs instead of the engine over memory; needs root.
    #[arg(long)]
    kernel: bool,
    /// Files for `svc-agent run --config`.
    #[arg(long, conflicts_with_all = ["kernel", "objects"])]
    config: bool,
    /// Services, EndpointSlices and what else the agent reads.
    #[arg(long, conflicts_with = "kernel")]
    objects: bool,
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
    if options.config || options.objects {
        return inputs(options);
    }
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

/// The tests of svc-agent's module `fuzz`, without their end.
fn inputs(options: &Options) -> Result<()> {
    setup::ensure()?;
    let of = if options.config { "fuzz::config" } else { "fuzz::objects" };
    let another = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    let mut test = cargo();
    test.args(["test", "--package", "svc-agent", "--lib", "--", of, "--nocapture"]);
    test.env("SVC_FUZZ_SEED", options.seed.unwrap_or_else(another).to_string());
    test.env("SVC_FUZZ_CASES", options.cases.unwrap_or(u64::MAX).to_string());
    if let Some(seconds) = options.seconds {
        test.env("SVC_FUZZ_SECONDS", seconds.to_string());
    }
    Err(test.exec()).context("cannot start cargo")
}
