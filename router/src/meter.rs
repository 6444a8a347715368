//! What a key may ask in a minute: requests and tokens, of buckets that fill steadily and hold a minute's worth. A request
//! comes in while something is left, and takes what it turns out to cost: nobody has to guess how long an answer will be,
//! and what is under way may overdraw a bucket, which later requests wait for. Each router counts what comes to it. Not here:
//! which key has which limits, and what it trains in a day (store), places among clients (catalog).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tandem_store::Limits;

/// One key's, shared by its requests.
#[derive(Clone, Debug)]
pub struct Meter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Its id.
    key: String,
    limits: Limits,
    requests: Option<Mutex<Bucket>>,
    tokens: Option<Mutex<Bucket>>,
}

/// Nothing is left of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this key may ask for {limit} {what} a minute, which are used up; try again in {retry_after_s} s")]
pub struct UsedUp {
    pub what: &'static str,
    pub limit: u32,
    pub retry_after_s: u32,
}

/// What there is of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    pub limit: u32,
    pub remaining: u32,
    /// Until the bucket is full.
    pub reset: Duration,
}

#[derive(Debug)]
struct Bucket {
    limit: u32,
    left: f64,
    at: Instant,
}

impl Meter {
    /// `None` where nothing is limited. `key`: its id.
    pub fn new(key: &str, limits: Limits) -> Option<Meter> {
        let bucket = |limit: Option<u32>| limit.map(|limit| Mutex::new(Bucket::full(limit, Instant::now())));
        let Limits {
            requests_per_minute,
            tokens_per_minute,
            // Counted in the database: they outlive a process.
            training_tokens_per_day: _,
            stored_bytes: _,
        } = limits;
        let inner = Inner {
            key: key.to_owned(),
            limits,
            requests: bucket(requests_per_minute),
            tokens: bucket(tokens_per_minute),
        };
        (limits != Limits::default()).then(|| Meter(Arc::new(inner)))
    }

    pub fn limits(&self) -> Limits {
        self.0.limits
    }

    /// Whether what it asks models is limited.
    pub fn limits_asking(&self) -> bool {
        self.0.requests.is_some() || self.0.tokens.is_some()
    }

    /// The key's id, where its training is limited.
    pub fn training_key(&self) -> Option<&str> {
        self.0.limits.training_tokens_per_day.map(|_| self.0.key.as_str())
    }

    /// The key's id, where what it stores is limited.
    pub fn storing_key(&self) -> Option<&str> {
        self.0.limits.stored_bytes.map(|_| self.0.key.as_str())
    }

    /// A request comes.
    pub fn admit(&self) -> Result<(), UsedUp> {
        let now = Instant::now();
        if let Some(tokens) = &self.0.tokens {
            held(tokens).at_least("tokens", f64::MIN_POSITIVE, now)?;
        }
        if let Some(requests) = &self.0.requests {
            let mut requests = held(requests);
            requests.at_least("requests", 1.0, now)?;
            requests.left -= 1.0;
        }
        Ok(())
    }

    /// Of prompts or of answers.
    pub fn take_tokens(&self, n: usize) {
        if let Some(tokens) = &self.0.tokens {
            let mut tokens = held(tokens);
            tokens.fill(Instant::now());
            tokens.left -= n as f64;
        }
    }

    /// Of requests and of tokens, where these are limited.
    pub fn left(&self) -> [Option<Left>; 2] {
        let now = Instant::now();
        [&self.0.requests, &self.0.tokens].map(|bucket| bucket.as_ref().map(|bucket| held(bucket).shown(now)))
    }
}

/// The same key's.
impl PartialEq for Meter {
    fn eq(&self, other: &Meter) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Meter {}

fn held(bucket: &Mutex<Bucket>) -> std::sync::MutexGuard<'_, Bucket> {
    bucket.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bucket {
    fn full(limit: u32, now: Instant) -> Bucket {
        Bucket {
            limit,
            left: f64::from(limit),
            at: now,
        }
    }

    fn per_second(&self) -> f64 {
        f64::from(self.limit) / 60.0
    }

    fn fill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = f64::from(self.limit).min(self.left + since * self.per_second());
        self.at = now;
    }

    fn at_least(&mut self, what: &'static str, wanted: f64, now: Instant) -> Result<(), UsedUp> {
        self.fill(now);
        if self.left >= wanted {
            return Ok(());
        }
        Err(UsedUp {
            what,
            limit: self.limit,
            retry_after_s: ((wanted - self.left) / self.per_second()).ceil().max(1.0) as u32,
        })
    }

    fn shown(&mut self, now: Instant) -> Left {
        self.fill(now);
        let missing = f64::from(self.limit) - self.left;
        Left {
            limit: self.limit,
            remaining: self.left.max(0.0) as u32,
            reset: Duration::from_secs_f64(missing / self.per_second()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_fills_steadily_and_may_be_overdrawn() {
        let start = Instant::now();
        let after = |s: u64| start + Duration::from_secs(s);
        let mut bucket = Bucket::full(120, start);
        assert_eq!(bucket.at_least("tokens", 1.0, start), Ok(()));
        bucket.left -= 300.0;
        let used_up = UsedUp {
            what: "tokens",
            limit: 120,
            retry_after_s: 91,
        };
        assert_eq!(bucket.at_least("tokens", 1.0, start), Err(used_up));
        let left = bucket.shown(after(30));
        assert_eq!(
            (left.limit, left.remaining, left.reset),
            (120, 0, Duration::from_secs(120))
        );
        assert!(bucket.at_least("tokens", 1.0, after(90)).is_err());
        assert_eq!(bucket.at_least("tokens", 1.0, after(91)), Ok(()));
        assert_eq!(
            bucket.shown(after(10_000)).remaining,
            120,
            "a minute's worth, however long nothing was asked"
        );
    }

    #[test]
    fn only_what_is_limited_is_counted() {
        assert_eq!(Meter::new("key-1", Limits::default()), None);
        let requests = Limits {
            requests_per_minute: Some(2),
            ..Limits::default()
        };
        let meter = Meter::new("key-1", requests).expect("requests are limited");
        meter.take_tokens(1_000_000);
        assert_eq!([meter.admit(), meter.admit()], [Ok(()), Ok(())]);
        let refused = meter.admit().expect_err("two a minute");
        assert_eq!((refused.what, refused.limit), ("requests", 2));
        assert!((29..=30).contains(&refused.retry_after_s), "{refused}");
        assert_eq!(meter.left()[0].map(|left| left.remaining), Some(0));
        assert_eq!(meter.left()[1], None);
    }
}
