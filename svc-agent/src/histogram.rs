//! How long things took, as Prometheus counts it.
use std::time::Duration;

#[derive(Clone, PartialEq, Debug)]
pub struct Histogram {
    /// Upper bounds in seconds, ascending, each with the number of those that took no longer.
    pub buckets: Vec<(f64, u64)>,
    pub count: u64,
    pub total: Duration,
}

impl Histogram {
    /// `bounds` ascend.
    pub fn new(bounds: impl IntoIterator<Item = f64>) -> Self {
        Histogram { buckets: bounds.into_iter().map(|bound| (bound, 0)).collect(), count: 0, total: Duration::ZERO }
    }

    pub fn observe(&mut self, took: Duration) {
        self.count += 1;
        self.total += took;
        for (bound, count) in &mut self.buckets {
            *count += u64::from(took.as_secs_f64() <= *bound);
        }
    }

    /// Of the same bounds.
    pub fn add(&mut self, other: &Histogram) {
        self.count += other.count;
        self.total += other.total;
        for ((_, count), (_, more)) in self.buckets.iter_mut().zip(&other.buckets) {
            *count += more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_counts_all_up_to_its_bound() {
        let mut histogram = Histogram::new([0.001, 0.01]);
        for micros in [1_000, 1_001, 20_000] {
            histogram.observe(Duration::from_micros(micros));
        }
        let other = histogram.clone();
        histogram.add(&other);
        assert_eq!(histogram.buckets, [(0.001, 2), (0.01, 4)]);
        assert_eq!((histogram.count, histogram.total), (6, Duration::from_micros(44_002)));
    }
}
