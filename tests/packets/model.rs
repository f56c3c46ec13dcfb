//! The kernel's programs, XDP's and tc's, do what the plain model of the rules says.
use std::time::{Duration, Instant};

use svc_model::Scope;
use svc_model::campaign::campaign;
use svc_model::run::EXPECTED;
use svc_tests::kernel;

#[test]
fn the_kernels_programs_do_what_the_rules_say() {
    const TIME: Duration = Duration::from_secs(30);
    // One seed, as the engine's has; what the kernel chooses at random is another thing each time.
    const SEED: u64 = 1;
    let start = Instant::now();
    let tally = campaign(SEED, Scope::Kernel, kernel::check, |_| start.elapsed() >= TIME);
    let tally = tally.unwrap_or_else(|difference| panic!("{difference}"));
    println!("seed {SEED}: {tally}");
    // Few cases take so many connections to one backend.
    let expected: Vec<_> = EXPECTED.into_iter().filter(|reason| *reason != "no_source_port").collect();
    assert_eq!(tally.missing(&expected), [""; 0], "no packet had these reasons, of {tally}");
}
