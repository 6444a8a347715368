//! How much may be trained between two serving steps. Durations come in as arguments: no clock here, and no tensor.
//!
//! Without requests training has the machine. Beside requests it gets the larger of two:
//! - a share. Each step earns a share of its own duration, and a quantum runs when enough is earned to pay for it: so the
//!   mean time between a stream's tokens grows by that share whatever a quantum costs, and no single gap by more than the
//!   share of a step and one quantum;
//! - what a target leaves, where one is set. While streams only decode, quanta run as long as they and the next step
//!   most likely end within the target; they cost nothing of the share. A prompt is not made to wait for that: while one
//!   is read, there is the share alone. Nor are streams made to wait for a prompt behind quanta: the step then reads as
//!   much of it as still ends within the target.

use std::time::Duration;

/// Training time for each second of serving steps, unless chosen.
pub const SHARE: f64 = 0.25;
/// Of prompts that are read in a step, whatever is left of a target.
const LEAST_PROMPT_TOKENS: usize = 16;

#[derive(Debug)]
pub struct Pace {
    /// Training time for each second of serving steps.
    share: f64,
    /// Between two tokens of a stream.
    target_s: Option<f64>,
    earned_s: f64,
    quantum: Learned,
    /// Of steps that only decode.
    step: Learned,
    /// What a token of a prompt adds to a step.
    prompt_token: Learned,
    /// The last step was one.
    only_decodes: bool,
    trained_since_step_s: f64,
}

/// What may be trained now.
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

/// A duration that varies: its mean and its mean deviation, the newest counting most, as TCP learns a round trip (RFC 6298).
#[derive(Debug, Default)]
struct Learned {
    mean_s: Option<f64>,
    deviation_s: f64,
}

impl Learned {
    /// Weight of the newest duration.
    const NEWEST: f64 = 0.2;

    fn learn(&mut self, seconds: f64) {
        let Some(mean) = self.mean_s else {
            *self = Learned {
                mean_s: Some(seconds),
                deviation_s: seconds / 2.0,
            };
            return;
        };
        self.deviation_s += Self::NEWEST * ((seconds - mean).abs() - self.deviation_s);
        self.mean_s = Some(mean + Self::NEWEST * (seconds - mean));
    }

    fn mean_s(&self) -> f64 {
        self.mean_s.unwrap_or(0.0)
    }

    /// Most are shorter.
    fn long_s(&self) -> f64 {
        self.mean_s() + 2.0 * self.deviation_s
    }
}

impl Pace {
    /// `target`: the longest time between two tokens of a stream that training may make beyond what its share makes.
    pub fn new(share: f64, target: Option<Duration>) -> Pace {
        Pace {
            share,
            target_s: target.map(|target| target.as_secs_f64()),
            earned_s: 0.0,
            quantum: Learned::default(),
            step: Learned::default(),
            prompt_token: Learned::default(),
            only_decodes: false,
            trained_since_step_s: 0.0,
        }
    }

    /// `prompt_tokens`: the pieces of prompts that it read.
    pub fn stepped(&mut self, step: Duration, prompt_tokens: usize) {
        let seconds = step.as_secs_f64();
        self.only_decodes = prompt_tokens == 0;
        if self.only_decodes {
            self.step.learn(seconds);
        } else if self.step.mean_s.is_some() {
            let more = (seconds - self.step.mean_s()).max(0.0);
            self.prompt_token.learn(more / prompt_tokens as f64);
        }
        self.trained_since_step_s = 0.0;
        let share = self.share * seconds;
        // Not a hoard: one quantum's price and the newest share, so that a job does not catch up in a burst.
        self.earned_s = (self.earned_s + share).min(self.quantum.mean_s() + share);
    }

    pub fn trained(&mut self, quantum: Duration, load: Load) {
        let seconds = quantum.as_secs_f64();
        match load {
            // Nobody waited for it.
            Load::Idle => self.earned_s = 0.0,
            Load::Serving if self.fits_target() => {}
            // What it cost above its price is paid later.
            Load::Serving => self.earned_s -= seconds,
        }
        self.quantum.learn(seconds);
        self.trained_since_step_s += seconds;
    }

    pub fn budget(&self, load: Load) -> Budget {
        match load {
            Load::Idle => Budget::Unlimited,
            Load::Serving if self.fits_target() || self.earned_s >= self.quantum.mean_s() => {
                Budget::OneQuantum
            }
            Load::Serving => Budget::Nothing,
        }
    }

    /// Tokens of prompts that the next step may read beside streams that decode: what the quanta since the last one left of
    /// the target, and a few always, so that a prompt is not kept waiting.
    pub fn most_prompt_tokens(&self) -> usize {
        let (Some(target), Some(token)) = (self.target_s, self.prompt_token.mean_s) else {
            return usize::MAX;
        };
        let left = target - self.trained_since_step_s - self.step.long_s();
        ((left / token.max(f64::MIN_POSITIVE)) as usize).max(LEAST_PROMPT_TOKENS)
    }

    /// Most likely streams have their next token in time after another quantum.
    fn fits_target(&self) -> bool {
        let gap = self.trained_since_step_s + self.quantum.long_s() + self.step.long_s();
        self.only_decodes && self.target_s.is_some_and(|target| gap <= target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Got {
        /// Training for each second of serving.
        share: f64,
        /// The longest training between two steps.
        longest_ms: u64,
    }

    /// When steps and quanta take so many milliseconds, quanta in turns.
    fn run(mut pace: Pace, step_ms: u64, only_decodes: bool, quanta_ms: &[u64]) -> Got {
        let (mut steps, mut trained_ms, mut longest_ms, mut last) = (0, 0, 0, Budget::Nothing);
        let mut quanta = quanta_ms.iter().cycle();
        for turn in 0..10_000 {
            pace.stepped(Duration::from_millis(step_ms), usize::from(!only_decodes));
            steps += 1;
            last = pace.budget(Load::Serving);
            let before = trained_ms;
            while last == Budget::OneQuantum {
                let quantum_ms = quanta.next().unwrap();
                pace.trained(Duration::from_millis(*quantum_ms), Load::Serving);
                trained_ms += quantum_ms;
                last = pace.budget(Load::Serving);
            }
            // What a quantum and a step take is learned first.
            if turn > 20 {
                longest_ms = longest_ms.max(trained_ms - before);
            }
        }
        assert_ne!(last, Budget::Unlimited);
        Got {
            share: trained_ms as f64 / (steps * step_ms) as f64,
            longest_ms,
        }
    }

    #[test]
    fn training_gets_its_share_whatever_a_quantum_costs() {
        for (step_ms, quantum_ms) in [(100, 1), (10, 2), (10, 3), (10, 10), (10, 400), (200, 50)] {
            for (share, only_decodes) in [(0.1, true), (SHARE, false), (2.0, true)] {
                // A target that is shorter than a step leaves nothing.
                for target in [None, Some(Duration::from_millis(9))] {
                    let got = run(Pace::new(share, target), step_ms, only_decodes, &[quantum_ms]).share;
                    assert!(
                        (got / share - 1.0).abs() < 0.05,
                        "{step_ms} ms steps, {quantum_ms} ms quanta, {share} asked: {got}"
                    );
                }
            }
        }
    }

    #[test]
    fn streams_that_decode_leave_what_the_target_allows() {
        let target = Some(Duration::from_millis(50));
        // Steps of 10 ms leave 40 ms for quanta, less what they may vary by.
        for (quanta_ms, least) in [(&[4][..], 3.2), (&[2, 6], 2.8), (&[1, 1, 1, 12], 2.0)] {
            let got = run(Pace::new(SHARE, target), 10, true, quanta_ms);
            assert!(got.share >= least, "{quanta_ms:?}: {}", got.share);
            assert!(
                got.longest_ms <= 40 + 12,
                "{quanta_ms:?}: {} ms at once",
                got.longest_ms
            );
        }
        let prompts = run(Pace::new(SHARE, target), 10, false, &[4]).share;
        assert!((prompts / SHARE - 1.0).abs() < 0.05, "{prompts}");
    }

    #[test]
    fn a_prompt_behind_quanta_is_read_in_pieces_that_end_in_time() {
        let ms = Duration::from_millis;
        let mut pace = Pace::new(SHARE, Some(ms(60)));
        assert_eq!(pace.most_prompt_tokens(), usize::MAX, "nothing is known yet");
        // A token of a prompt adds half a millisecond to steps of 10.
        (0..50).for_each(|_| {
            pace.stepped(ms(10), 0);
            pace.stepped(ms(60), 100);
        });
        assert!(
            (95..=100).contains(&pace.most_prompt_tokens()),
            "{}",
            pace.most_prompt_tokens()
        );
        pace.stepped(ms(10), 0);
        pace.trained(ms(30), Load::Serving);
        assert!(
            (35..=40).contains(&pace.most_prompt_tokens()),
            "{}",
            pace.most_prompt_tokens()
        );
        pace.trained(ms(30), Load::Serving);
        assert_eq!(pace.most_prompt_tokens(), LEAST_PROMPT_TOKENS);
        let mut untold = Pace::new(SHARE, None);
        untold.stepped(ms(10), 0);
        untold.stepped(ms(60), 100);
        assert_eq!(untold.most_prompt_tokens(), usize::MAX);
    }

    #[test]
    fn alone_it_runs_on_and_a_debt_is_forgotten() {
        let mut pace = Pace::new(SHARE, None);
        pace.trained(Duration::from_secs(5), Load::Serving);
        assert_eq!(pace.budget(Load::Serving), Budget::Nothing);
        assert_eq!(pace.budget(Load::Idle), Budget::Unlimited);
        pace.trained(Duration::from_millis(1), Load::Idle);
        (0..100).for_each(|_| pace.stepped(Duration::from_millis(500), 0));
        assert_eq!(pace.budget(Load::Serving), Budget::OneQuantum);
    }
}
