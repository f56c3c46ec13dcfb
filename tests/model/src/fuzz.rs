//! `cargo xtask fuzz`: a campaign on the command line.
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::campaign::campaign;
use crate::case::Case;
use crate::generate::Scope;
use crate::run::Tally;

/// Compare what is done to generated packets with the model, until they differ.
#[derive(clap::Parser)]
pub struct Options {
    /// Stop after this many seconds.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Stop after this many cases.
    #[arg(long, value_name = "N")]
    cases: Option<u64>,
    /// The first seed; by default another one each time.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
}

/// Another one each time.
///
/// # Panics
/// Where the clock is before 1970.
fn any_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970").as_millis() as u64
}

/// `scope`, `check`: as [`campaign`] has them.
pub fn run(options: &Options, scope: Scope, check: impl FnMut(&Case, &mut Tally) -> Result<(), String>) -> ExitCode {
    const EVERY: Duration = Duration::from_secs(5);
    let start = Instant::now();
    let mut shown = start;
    let seed = options.seed.unwrap_or_else(any_seed);
    println!("seed {seed}");
    let result = campaign(seed, scope, check, |tally| {
        if shown.elapsed() >= EVERY {
            shown = Instant::now();
            let speed = tally.packets as f64 / start.elapsed().as_secs_f64();
            println!("{} packets, {speed:.0} a second, {} reasons", tally.packets, tally.reasons.len());
        }
        options.seconds.is_some_and(|seconds| start.elapsed().as_secs() >= seconds)
            || options.cases.is_some_and(|cases| tally.cases >= cases)
    });
    match result {
        Ok(tally) => {
            println!("{tally}\nno difference");
            ExitCode::SUCCESS
        }
        Err(difference) => {
            eprintln!("{difference}");
            ExitCode::FAILURE
        }
    }
}

/// A case on the engine over memory.
///
/// # Errors
/// As [`crate::run::check`].
pub fn engine(case: &Case, tally: &mut Tally) -> Result<(), String> {
    let mut memory = svc_dataplane::memory::Memory::new(case.world.tables(), 1);
    crate::run::check(case, &mut memory, tally)
}
