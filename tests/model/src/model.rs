//! What may have happened so far, and the rules for what may happen next.
use std::collections::BTreeMap;
use std::time::Duration;

use svc_dataplane::check::Ends;
use svc_dataplane::{Hook, Outcome};

use crate::chance::Chance;
use crate::rules::Rules;
use crate::run::{Clock, SWEEP};
use crate::world::World;

/// As many ways would be more than a case has room for.
const MOST_WAYS: usize = 4096;

pub struct Model {
    /// At least one: where the rules leave a choice that no packet has shown yet, one for each.
    ways: Vec<Rules>,
}

impl Model {
    pub fn new(world: World, keeps_pieces: bool, clock: Clock) -> Self {
        Model { ways: vec![Rules::new(world, keeps_pieces, clock)] }
    }

    pub fn set_world(&mut self, world: &World) {
        for way in &mut self.ways {
            way.set_world(world.clone());
        }
    }

    /// Lets at least this many seconds go by: so many that it is beyond doubt which flows are over. How many it were.
    pub fn wait(&mut self, seconds: u32) -> u32 {
        let least = if self.ways[0].is_small() && seconds > 0 { Rules::LEAST_WAIT } else { 0 };
        let mut waited = seconds.max(least);
        while self.ways.iter().any(|way| way.is_in_doubt(waited)) {
            waited += 1;
        }
        for way in &mut self.ways {
            way.wait(waited, waited >= SWEEP);
        }
        waited
    }

    /// A flow that the last packet opened and did not show: where it came from, its protocol and the ends of its requests.
    pub fn hidden(&self) -> Option<(Hook, u8, Ends)> {
        self.ways.iter().find_map(Rules::hidden)
    }

    /// Whether the rules allow this outcome; what was chosen is remembered as far as it can be told. Which rules it were, of
    /// those that are counted.
    ///
    /// # Errors
    /// What they would have allowed instead.
    pub fn judge(&mut self, hook: Hook, frame: &[u8], outcome: &Outcome) -> Result<Vec<&'static str>, String> {
        if let [only] = &mut self.ways[..]
            && only.is_certain()
        {
            only.judge(hook, frame, outcome)?;
            return Ok(only.take_met());
        }
        let (mut after, mut met, mut error) = (Vec::new(), None, None);
        for way in &self.ways {
            let mut chance = Chance::default();
            loop {
                let mut next = way.clone();
                next.chance = chance;
                let judged = next.judge(hook, frame, outcome);
                chance = std::mem::take(&mut next.chance);
                let of_this = next.take_met();
                match judged {
                    Ok(()) => {
                        met.get_or_insert(of_this);
                        if !after.contains(&next) {
                            after.push(next);
                        }
                    }
                    Err(why) => drop(error.get_or_insert(why)),
                }
                if !chance.turn() {
                    break;
                }
            }
        }
        assert!(after.len() <= MOST_WAYS, "{} ways", after.len());
        match (met, error) {
            (Some(met), _) => {
                self.ways = after;
                Ok(met)
            }
            (None, error) => Err(error.expect("nothing was allowed")),
        }
    }

    /// Whether the counters may move so in a flood of as many packets, each of which is to be rejected.
    ///
    /// # Errors
    /// How they may.
    pub fn judge_flood(
        &mut self,
        times: u32,
        rejected: u64,
        moved: &BTreeMap<&'static str, u64>,
        took: Duration,
    ) -> Result<(), String> {
        let mut judged = self.ways.iter_mut().map(|way| way.judge_flood(times, rejected, moved, took));
        judged.try_for_each(|judged| judged)
    }
}
