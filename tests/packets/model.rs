//! The kernel's programs, XDP's and tc's, do what the plain model of the rules says.
use std::time::{Duration, Instant};

use svc_model::campaign::campaign;
use svc_model::run::EXPECTED;
use svc_model::{RULES, Scope};
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
    // A machine without hardware help gets through few cases, which hold what is common. No flow outlives its time here.
    const MANY: u64 = 400;
    const RARE: [&str; 3] = ["flow_table_full", "no_source_port", "reject_limited"];
    let is_due = |name: &&str| {
        *name != "an outlived flow makes room" && (tally.cases >= MANY || !RARE.contains(name) && !RULES.contains(name))
    };
    let expected: Vec<_> = EXPECTED.into_iter().chain(RULES).filter(is_due).collect();
    assert_eq!(tally.rarer(1, &expected), [""; 0], "no packet had these reasons or met these rules, of {tally}");
}
