//! How a run shows itself: a bar on a terminal, a line for each event elsewhere.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use tandem_core::bar;
use tandem_core::job::{JobEvent, StepReport};

pub struct Progress {
    is_terminal: bool,
    /// Before each line.
    prefix: String,
    /// Parameters that are not trained.
    frozen: u64,
    total_steps: u64,
    /// When the first step of this run began, and how many were done before.
    began: Instant,
    steps_before: u64,
    last: Option<StepReport>,
}

impl Progress {
    pub fn new(frozen: u64) -> Progress {
        Progress {
            is_terminal: io::stdout().is_terminal(),
            prefix: String::new(),
            frozen,
            total_steps: 0,
            began: Instant::now(),
            steps_before: 0,
            last: None,
        }
    }

    /// Beside those of others, who have no bar together.
    pub fn of_trial(frozen: u64, number: usize) -> Progress {
        Progress {
            is_terminal: false,
            prefix: format!("trial {number}: "),
            ..Progress::new(frozen)
        }
    }

    pub fn show(&mut self, event: &JobEvent) {
        match event {
            JobEvent::Started {
                total_steps,
                resumed_from,
                ..
            } => {
                self.total_steps = *total_steps;
                self.steps_before = resumed_from.unwrap_or(0);
                self.began = Instant::now();
            }
            JobEvent::Step(report) => self.last = Some(report.clone()),
            _ => {}
        }
        let mut text = String::new();
        if !(self.is_terminal && matches!(event, JobEvent::Step(_))) {
            let said = line(event, self.total_steps, self.frozen);
            text = said
                .lines()
                .map(|line| format!("{}{line}\n", self.prefix))
                .collect();
        }
        if self.is_terminal {
            // The bar is the last line, drawn anew below what was said.
            let is_over = matches!(event, JobEvent::Finished { .. });
            let bar = self
                .last
                .as_ref()
                .filter(|_| !is_over)
                .map(|report| self.bar(report));
            text = format!("\r\x1b[K{text}{}", bar.unwrap_or_default());
        }
        self.write(&text);
    }

    /// The bar goes; what is said next stands on a line of its own.
    pub fn end(&self) {
        if self.is_terminal {
            self.write("\r\x1b[K");
        }
    }

    fn write(&self, text: &str) {
        // Nobody who looks on is no reason to stop.
        let mut out = io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }

    fn bar(&self, report: &StepReport) -> String {
        let done = report.step.saturating_sub(self.steps_before).max(1);
        let left = self.total_steps.saturating_sub(report.step);
        bar(
            report,
            self.total_steps,
            self.began.elapsed().mul_f64(left as f64 / done as f64),
        )
    }
}

fn bar(report: &StepReport, total_steps: u64, left: Duration) -> String {
    let StepReport {
        step,
        loss,
        tokens_per_second,
        ..
    } = report;
    format!(
        "{} {step}/{total_steps} loss {loss:.4} {tokens_per_second:.0} tokens/s {} left",
        bar::drawn(*step, total_steps),
        bar::clock(left)
    )
}

fn line(event: &JobEvent, total_steps: u64, frozen: u64) -> String {
    match event {
        JobEvent::Started {
            total_steps,
            resumed_from,
            notes,
            examples,
            epoch_tokens,
            trainable_parameters,
            ..
        } => {
            let resumed =
                resumed_from.map_or_else(String::new, |step| format!(", going on from step {step}"));
            let all = frozen + trainable_parameters;
            let notes: String = notes.iter().map(|note| format!("warning: {note}\n")).collect();
            format!(
                "{notes}trainable params: {} || all params: {} || trainable%: {:.4}\n\
                 {total_steps} steps, {examples} examples, {epoch_tokens} tokens an epoch{resumed}",
                thousands(*trainable_parameters),
                thousands(all),
                100.0 * *trainable_parameters as f64 / all as f64
            )
        }
        JobEvent::Step(step) => format!(
            "step {}/{total_steps} epoch {:.2} loss {:.4} accuracy {:.3}{} grad_norm {:.3} lr {:.2e} {:.0} tokens/s",
            step.step,
            step.epoch,
            step.loss,
            step.token_accuracy,
            of_objective(&step.metrics),
            step.grad_norm,
            step.learning_rate,
            step.tokens_per_second
        ),
        JobEvent::Validated {
            step,
            loss,
            token_accuracy,
            metrics,
        } => format!(
            "step {step}/{total_steps} validation loss {loss:.4} accuracy {token_accuracy:.3}{}",
            of_objective(metrics)
        ),
        JobEvent::Checkpoint { step, adapter, .. } => {
            format!("step {step}: saved {}", adapter.folder.display())
        }
        JobEvent::StoppedEarly { step, waited } => format!(
            "step {step}/{total_steps}: training ends early, {waited} validations in a row were not better than the best"
        ),
        JobEvent::BestLoaded { step, metric, value } => {
            format!("the model of step {step} is the result: its {metric} of {value:.4} is the best")
        }
        JobEvent::Finished { trained_tokens, .. } => {
            format!("finished after {} tokens", thousands(*trained_tokens))
        }
        JobEvent::Failed { message } | JobEvent::Damaged { message } => format!("failed: {message}"),
        JobEvent::NoRoom { message } => format!("waiting until it can write: {message}"),
        JobEvent::Refused { message } => format!("not begun: {message}"),
        JobEvent::Cancelled { step } => format!("cancelled at step {step}"),
        JobEvent::Kept { step } => format!("stopped after step {step}"),
    }
}

/// What an objective is judged by at a glance.
fn of_objective(metrics: &BTreeMap<String, f64>) -> String {
    let shown = ["rewards/accuracies", "rewards/margins"].into_iter();
    let shown = shown.filter_map(|name| Some(format!(" {name} {:.3}", metrics.get(name)?)));
    shown.collect()
}

/// 1,838,208
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_can_be_followed() {
        let report = StepReport {
            step: 15,
            epoch: 0.5,
            loss: 1.23456,
            token_accuracy: 0.5,
            metrics: BTreeMap::new(),
            grad_norm: 1.0,
            learning_rate: 1e-4,
            trained_tokens: 100,
            tokens_per_second: 1234.4,
        };
        assert_eq!(
            bar(&report, 60, Duration::from_secs(3723)),
            "[======                  ] 15/60 loss 1.2346 1234 tokens/s 1:02:03 left"
        );
        let started = JobEvent::Started {
            total_steps: 60,
            resumed_from: Some(12),
            notes: vec![],
            examples: 9,
            epoch_tokens: 100,
            epoch_label_tokens: 50,
            trainable_parameters: 294_912,
        };
        assert_eq!(
            line(&started, 60, 124_439_808),
            "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364\n\
             60 steps, 9 examples, 100 tokens an epoch, going on from step 12"
        );
        assert_eq!([0, 999, 1000].map(thousands), ["0", "999", "1,000"]);
    }
}
