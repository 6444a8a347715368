//! How much a fine-tuning job may run between two serving steps. Durations come in as arguments: no clock here, and
//! no tensor.
//!
//! Without requests the job has the machine. Beside requests each step earns the job a share of its own duration, and
//! a quantum runs when enough is earned to pay for it: so the mean time between a stream's tokens grows by that share
//! whatever a quantum costs, and no single gap by more than the share of a step and one quantum.

use std::time::Duration;

/// Training time for each second of serving steps, unless chosen.
pub const SHARE: f64 = 0.25;
/// Weight of the newest duration in the learned ones.
const NEWEST: f64 = 0.2;

#[derive(Debug)]
pub struct Pace {
    /// Training time for each second of serving steps.
    share: f64,
    earned_s: f64,
    quantum_s: Option<f64>,
}

/// What the job may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// Quanta until a command comes.
    Unlimited,
    /// And then ask again.
    OneQuantum,
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    Idle,
    Serving,
}

impl Pace {
    pub fn new(share: f64) -> Pace {
        Pace {
            share,
            earned_s: 0.0,
            quantum_s: None,
        }
    }

    pub fn stepped(&mut self, step: Duration) {
        let share = self.share * step.as_secs_f64();
        // Not a hoard: one quantum's price and the newest share, so that a job does not catch up in a burst.
        self.earned_s = (self.earned_s + share).min(self.quantum_s.unwrap_or(0.0) + share);
    }

    pub fn trained(&mut self, quantum: Duration, load: Load) {
        let seconds = quantum.as_secs_f64();
        let learned = self
            .quantum_s
            .map_or(seconds, |before| before + NEWEST * (seconds - before));
        self.quantum_s = Some(learned);
        self.earned_s = match load {
            // Nobody waited for it.
            Load::Idle => 0.0,
            // What it cost above its price is paid later.
            Load::Serving => self.earned_s - seconds,
        };
    }

    pub fn budget(&self, load: Load) -> Budget {
        match load {
            Load::Idle => Budget::Unlimited,
            Load::Serving if self.earned_s >= self.quantum_s.unwrap_or(0.0) => Budget::OneQuantum,
            Load::Serving => Budget::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Training for each second of serving when steps and quanta take so many milliseconds.
    fn got(asked: f64, step_ms: u64, quantum_ms: u64) -> f64 {
        let mut pace = Pace::new(asked);
        let (mut steps, mut quanta, mut last) = (0, 0, Budget::Nothing);
        for _ in 0..10_000 {
            pace.stepped(Duration::from_millis(step_ms));
            steps += 1;
            last = pace.budget(Load::Serving);
            while last == Budget::OneQuantum {
                pace.trained(Duration::from_millis(quantum_ms), Load::Serving);
                quanta += 1;
                last = pace.budget(Load::Serving);
            }
        }
        assert_ne!(last, Budget::Unlimited);
        (quanta * quantum_ms) as f64 / (steps * step_ms) as f64
    }

    #[test]
    fn training_gets_its_share_whatever_a_quantum_costs() {
        for (step_ms, quantum_ms) in [(100, 1), (10, 2), (10, 3), (10, 10), (10, 400), (200, 50)] {
            for share in [0.1, SHARE, 2.0] {
                let got = got(share, step_ms, quantum_ms);
                assert!(
                    (got / share - 1.0).abs() < 0.05,
                    "{step_ms} ms steps, {quantum_ms} ms quanta, {share} asked: {got}"
                );
            }
        }
    }

    #[test]
    fn alone_it_runs_on_and_a_debt_is_forgotten() {
        let mut pace = Pace::new(SHARE);
        pace.trained(Duration::from_secs(5), Load::Serving);
        assert_eq!(pace.budget(Load::Serving), Budget::Nothing);
        assert_eq!(pace.budget(Load::Idle), Budget::Unlimited);
        pace.trained(Duration::from_millis(1), Load::Idle);
        (0..100).for_each(|_| pace.stepped(Duration::from_millis(500)));
        assert_eq!(pace.budget(Load::Serving), Budget::OneQuantum);
    }
}
