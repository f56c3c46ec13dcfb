//! Hostile inputs: valid documents changed at random, and texts that are none. As tests they are a fixed number of cases
//! of one seed; `cargo xtask fuzz --config` and `--objects` go on with other seeds.
mod config;
mod mutation;
mod objects;

use std::fmt::Debug;
use std::time::{Duration, Instant};

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseResult, TestRng, TestRunner};

/// Cases of one seed.
const BATCH: u32 = 256;

/// A number that `cargo xtask fuzz` gives.
fn given(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// Batches of cases, each with a seed of its own, until there are enough. `flag` is the one of `cargo xtask fuzz`.
#[track_caller]
fn campaign<S: Strategy>(flag: &str, strategy: &S, check: impl Fn(S::Value) -> TestCaseResult)
where
    S::Value: Debug,
{
    const CASES: u64 = 1024;
    const SEED: u64 = 1;
    let (seconds, cases) = (given("SVC_FUZZ_SECONDS"), given("SVC_FUZZ_CASES"));
    let enough = if seconds.is_none() { cases.unwrap_or(CASES) } else { cases.unwrap_or(u64::MAX) };
    let start = Instant::now();
    let mut shown = start;
    let mut done = 0;
    for seed in given("SVC_FUZZ_SEED").unwrap_or(SEED).. {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config { cases: BATCH, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        if let Err(error) = runner.run(strategy, &check) {
            let story = format!("{error}\nseed {seed}; again: cargo xtask fuzz {flag} --seed {seed}");
            assert!(given("SVC_FUZZ_SEED").is_some(), "{story}");
            // Other campaigns of this process would go on.
            eprintln!("{story}");
            std::process::exit(1);
        }
        done += u64::from(BATCH);
        if shown.elapsed() >= Duration::from_secs(5) {
            shown = Instant::now();
            println!("{done} cases, seed {seed}");
        }
        if done >= enough || seconds.is_some_and(|seconds| start.elapsed() >= Duration::from_secs(seconds)) {
            break;
        }
    }
    println!("{done} cases");
}
