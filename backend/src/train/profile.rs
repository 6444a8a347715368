//! Where the time of some steps goes: each quantum an event of a Chrome trace, which chrome://tracing and Perfetto show, and
//! the shares in words.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::TrainError;

/// Steps that one trace may hold: what it has stays in memory until it is written.
pub const MAX_STEPS: u64 = 1000;

pub struct Profile {
    path: PathBuf,
    /// Still to be recorded, the one that is on its way among them.
    left: u64,
    /// The first step of a run is not recorded: it meets memory for the first time.
    is_warm: bool,
    began: Instant,
    events: Vec<Value>,
    took: BTreeMap<&'static str, Duration>,
}

/// What a quantum was about, and which sublayer of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doing(pub &'static str, pub Option<usize>);

impl Profile {
    pub fn new(path: &Path, steps: u64) -> Profile {
        Profile {
            path: path.to_owned(),
            left: steps.min(MAX_STEPS),
            is_warm: false,
            began: Instant::now(),
            events: vec![],
            took: BTreeMap::new(),
        }
    }

    /// A quantum of step `step` that began at `began` and is over. `ended_step`: it was the step's last.
    pub fn record(&mut self, Doing(what, sublayer): Doing, step: u64, began: Instant, ended_step: bool) {
        let took = began.elapsed();
        if self.is_warm && self.left > 0 {
            *self.took.entry(what).or_default() += took;
            let micros = |time: Duration| time.as_secs_f64() * 1e6;
            self.events.push(json!({
                "name": what, "ph": "X", "pid": 0, "tid": 0,
                "ts": micros(began.saturating_duration_since(self.began)), "dur": micros(took),
                "args": {"step": step, "sublayer": sublayer},
            }));
            self.left -= u64::from(ended_step);
        }
        self.is_warm |= ended_step;
    }

    pub fn is_full(&self) -> bool {
        self.left == 0
    }

    /// Writes the trace. What took how much of the time, the most first.
    pub fn write(self) -> Result<String, TrainError> {
        let trace = json!({"displayTimeUnit": "ms", "traceEvents": self.events});
        std::fs::write(&self.path, trace.to_string()).map_err(|error| TrainError::File {
            file: self.path.display().to_string(),
            error,
        })?;
        let all: Duration = self.took.values().sum();
        let mut shares: Vec<(&str, f64)> = self
            .took
            .into_iter()
            .map(|(what, took)| {
                (
                    what,
                    took.as_secs_f64() / all.as_secs_f64().max(f64::MIN_POSITIVE),
                )
            })
            .collect();
        shares.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        let shares = shares
            .iter()
            .map(|(what, share)| format!("{what} {:.1} %", 100.0 * share));
        let shares = shares.collect::<Vec<_>>().join(", ");
        Ok(format!(
            "{}: {:.3} s, {shares}",
            self.path.display(),
            all.as_secs_f64()
        ))
    }
}
