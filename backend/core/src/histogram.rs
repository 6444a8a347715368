//! How often a time fell where: counts in fixed buckets, written and read without a lock. Not here: how it is shown.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets in microseconds; what is longer counts in one more.
pub const BOUNDS_US: [u64; 16] = [
    10, 25, 50, 75, 100, 125, 150, 200, 300, 500, 1_000, 2_500, 5_000, 10_000, 100_000, 1_000_000,
];

/// Cheap enough for every request and every probe.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [AtomicU64; BOUNDS_US.len() + 1],
    sum_ns: AtomicU64,
}

/// What was counted so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counted {
    /// Of each bucket alone, not of all below it.
    pub counts: [u64; BOUNDS_US.len() + 1],
    pub sum_seconds: f64,
}

impl Counted {
    pub fn add(&mut self, other: &Counted) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        self.sum_seconds += other.sum_seconds;
    }
}

impl Histogram {
    pub fn observe(&self, time: Duration) {
        let us = u64::try_from(time.as_nanos().div_ceil(1000)).unwrap_or(u64::MAX);
        let bucket = BOUNDS_US.partition_point(|&bound| bound < us);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(
            u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
    }

    pub fn counted(&self) -> Counted {
        Counted {
            counts: std::array::from_fn(|bucket| self.counts[bucket].load(Ordering::Relaxed)),
            sum_seconds: self.sum_ns.load(Ordering::Relaxed) as f64 / 1e9,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_counts_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::default();
        for (us, bucket) in [(0, 0), (10, 0), (11, 1), (150, 6), (151, 7), (2_000_000, 16)] {
            let before = histogram.counted();
            histogram.observe(Duration::from_micros(us));
            let after = histogram.counted();
            assert_eq!(after.counts[bucket], before.counts[bucket] + 1, "{us} us");
        }
        assert_eq!(histogram.counted().counts.iter().sum::<u64>(), 6);
    }
}
