//! The engine over memory, on a million packets that a generator chooses.
use svc_model::RULES;
use svc_model::Scope;
use svc_model::campaign::campaign;
use svc_model::fuzz::engine;
use svc_model::run::EXPECTED;

#[test]
fn the_engine_does_what_the_rules_say() {
    const PACKETS: u64 = 1_000_000;
    // One seed, so that a failure is the change's that it is seen with: new ones are `cargo xtask fuzz`'s.
    const SEED: u64 = 1;
    let tally = campaign(SEED, Scope::Memory, engine, |tally| tally.packets >= PACKETS);
    let tally = tally.unwrap_or_else(|difference| panic!("{difference}"));
    println!("seed {SEED}: {tally}");
    // Over memory nothing is kept.
    let expected = EXPECTED.into_iter().filter(|reason| *reason != "fragment_kept");
    let expected: Vec<_> = expected.chain(RULES).collect();
    assert_eq!(tally.rarer(100, &expected), [""; 0], "few packets had these reasons or met these rules, of {tally}");
}
