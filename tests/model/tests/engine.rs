//! The engine over memory, on a million packets that a generator chooses.
use svc_model::Scope;
use svc_model::campaign::campaign;
use svc_model::fuzz::{any_seed, engine};
use svc_model::run::EXPECTED;

#[test]
fn the_engine_does_what_the_rules_say() {
    const PACKETS: u64 = 1_000_000;
    let seed = any_seed();
    let tally = campaign(seed, Scope::Memory, engine, |tally| tally.packets >= PACKETS);
    let tally = tally.unwrap_or_else(|difference| panic!("{difference}"));
    println!("seed {seed}: {tally}");
    // Over memory nothing is kept.
    let expected: Vec<_> = EXPECTED.into_iter().filter(|reason| *reason != "fragment_kept").collect();
    assert_eq!(tally.missing(&expected), [""; 0], "no packet had these reasons, of {tally}");
}
