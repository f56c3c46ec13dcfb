//! What was measured: samples of each contestant, taken in turn, so that what disturbs the machine disturbs all.
use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) row: String,
    pub(crate) case: String,
    pub(crate) unit: String,
    /// Of each contestant.
    pub(crate) samples: BTreeMap<String, Vec<f64>>,
    pub(crate) ratios: Vec<Ratio>,
}

/// Two contestants, the first one's figure divided by the second's.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Ratio {
    /// The figure's own, or another one that it answers as well.
    pub(crate) row: String,
    pub(crate) of: String,
    pub(crate) to: String,
    pub(crate) goal: Option<Goal>,
}

/// What a ratio's median is to be.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    pub(crate) fn reached(self, median: f64) -> bool {
        match self {
            Goal::AtMost(most) => median <= most,
            Goal::AtLeast(least) => median >= least,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Goal::AtMost(most) => write!(f, "at most {most}"),
            Goal::AtLeast(least) => write!(f, "at least {least}"),
        }
    }
}

/// The middle, and the quarters on both sides of it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Spread {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

impl Spread {
    /// # Panics
    /// Where there are no samples.
    pub(crate) fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |part: usize| sorted[(sorted.len() - 1) * part / 4];
        Spread { low: at(1), median: at(2), high: at(3) }
    }
}

impl Figure {
    pub(crate) fn new(row: &str, case: String, unit: &str) -> Self {
        Figure { row: row.to_owned(), case, unit: unit.to_owned(), samples: BTreeMap::new(), ratios: Vec::new() }
    }

    pub(crate) fn add(&mut self, contestant: &str, sample: f64) {
        self.samples.entry(contestant.to_owned()).or_default().push(sample);
    }

    #[must_use]
    pub(crate) fn ratio(self, of: &str, to: &str) -> Self {
        self.ratio_to(of, to, None)
    }

    /// Of the figure's own row.
    #[must_use]
    pub(crate) fn ratio_to(self, of: &str, to: &str, goal: Option<Goal>) -> Self {
        let row = self.row.clone();
        self.ratio_of(&row, of, to, goal)
    }

    #[must_use]
    pub(crate) fn ratio_of(mut self, row: &str, of: &str, to: &str, goal: Option<Goal>) -> Self {
        self.ratios.push(Ratio { row: row.to_owned(), of: of.to_owned(), to: to.to_owned(), goal });
        self
    }

    /// Of the ratios of samples that were taken one after the other. None where something is too small to be seen.
    pub(crate) fn spread(&self, ratio: &Ratio) -> Option<Spread> {
        let (of, to) = (self.samples.get(&ratio.of)?, self.samples.get(&ratio.to)?);
        let ratios: Vec<f64> = of.iter().zip(to).map(|(of, to)| of / to).collect();
        (!ratios.is_empty() && ratios.iter().all(|ratio| ratio.is_finite())).then(|| Spread::of(&ratios))
    }
}

#[cfg(test)]
mod tests {
    use super::{Figure, Goal, Spread};

    #[test]
    fn the_median_is_the_middle_sample() {
        assert_eq!(Spread::of(&[5., 1., 3., 2., 4.]), Spread { low: 2., median: 3., high: 4. });
        assert_eq!(Spread::of(&[7.]), Spread { low: 7., median: 7., high: 7. });
    }

    #[test]
    fn a_goal_itself_reaches_it() {
        assert!(Goal::AtMost(1.0).reached(1.0) && !Goal::AtMost(1.0).reached(1.1));
        assert!(Goal::AtLeast(1.0).reached(1.0) && !Goal::AtLeast(1.0).reached(0.9));
    }

    #[test]
    fn a_ratio_is_of_samples_of_one_round() {
        let mut figure = Figure::new("P0", "case".to_owned(), "ns").ratio("ours", "floor");
        for (ours, floor) in [(2., 1.), (8., 4.), (3., 1.)] {
            figure.add("ours", ours);
            figure.add("floor", floor);
        }
        assert_eq!(figure.spread(&figure.ratios[0]).map(|spread| spread.median), Some(2.));
        figure.add("ours", 1.);
        figure.add("floor", 0.);
        assert_eq!(figure.spread(&figure.ratios[0]), None);
    }
}
