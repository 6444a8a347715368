//! What a run reports of a step or a validation, as lines that others read: JSON and a table with the names that
//! transformers' Trainer logs, TensorBoard's event files, and W&B's. Bytes only. Not here: which files, and when.
//!
//! An event file is a sequence of TFRecords (tensorflow/core/lib/io/record_writer.h), each an `Event`
//! (tensorflow/core/util/event.proto) with a `Summary` (tensorflow/core/framework/summary.proto).

mod protobuf;
pub mod wandb;

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

use crate::job::{JobEvent, StepReport};
use protobuf::Message;

/// Of validations: as Trainer names them.
const EVAL: &str = "eval_";

/// Numbers after an optimizer step.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub step: u64,
    /// In the order in which they are shown.
    pub values: Vec<(String, f64)>,
}

impl Report {
    /// Of events that have numbers.
    pub fn of(event: &JobEvent) -> Option<Report> {
        match event {
            JobEvent::Step(StepReport {
                step,
                epoch,
                loss,
                token_accuracy,
                metrics,
                grad_norm,
                learning_rate,
                trained_tokens,
                tokens_per_second,
            }) => {
                let named = [
                    ("epoch", *epoch),
                    ("loss", *loss),
                    ("mean_token_accuracy", *token_accuracy),
                    ("grad_norm", *grad_norm),
                    ("learning_rate", *learning_rate),
                    ("num_tokens", *trained_tokens as f64),
                    ("tokens_per_second", *tokens_per_second),
                ];
                Some(Report::new(*step, "", &named, metrics))
            }
            JobEvent::Validated {
                step,
                loss,
                token_accuracy,
                metrics,
            } => {
                let named = [("loss", *loss), ("mean_token_accuracy", *token_accuracy)];
                Some(Report::new(*step, EVAL, &named, metrics))
            }
            _ => None,
        }
    }

    fn new(step: u64, prefix: &str, named: &[(&str, f64)], metrics: &BTreeMap<String, f64>) -> Report {
        let metrics = metrics.iter().map(|(name, value)| (name.as_str(), *value));
        let values = named
            .iter()
            .copied()
            .chain(metrics)
            .map(|(name, value)| (format!("{prefix}{name}"), value));
        Report {
            step,
            values: values.collect(),
        }
    }

    /// A line of `metrics.jsonl`.
    pub fn json(&self) -> String {
        let mut line = format!("{{\"step\":{}", self.step);
        for (name, value) in &self.values {
            let (name, value) = (Value::from(name.as_str()), Value::from(*value));
            write!(line, ",{name}:{value}").expect("a String takes all");
        }
        line + "}\n"
    }

    /// What [`Report::json`] wrote.
    pub fn of_json(line: &str) -> Option<Report> {
        let object: serde_json::Map<String, Value> = serde_json::from_str(line).ok()?;
        let values = object.iter().filter(|(name, _)| *name != "step");
        Some(Report {
            step: object.get("step")?.as_u64()?,
            values: values
                .filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)))
                .collect(),
        })
    }

    /// A record of an event file, of `time_s` seconds since 1970. Tags are those of transformers' TensorBoardCallback.
    pub fn tensorboard(&self, time_s: f64) -> Vec<u8> {
        let summary = self
            .values
            .iter()
            .fold(Message::default(), |summary, (name, value)| {
                let entry = Message::default().bytes(1, tag(name).as_bytes());
                // simple_value
                summary.message(1, entry.float(2, *value as f32))
            });
        let event = event_at(time_s).integer(2, self.step);
        record(&event.message(5, summary).0)
    }
}

/// A value's name where training and validation are told apart by folders.
fn tag(name: &str) -> String {
    match name.strip_prefix(EVAL) {
        Some(name) => format!("eval/{name}"),
        None => format!("train/{name}"),
    }
}

/// The first record of an event file.
pub fn tensorboard_head(time_s: f64) -> Vec<u8> {
    record(&event_at(time_s).bytes(3, b"brain.Event:2").0)
}

/// A line a step, in a table with a column for each name; a validation joins its step's line. Where a step was reported
/// twice the later report counts.
pub fn csv<'a>(reports: impl IntoIterator<Item = &'a Report>) -> String {
    let mut columns: Vec<&str> = vec![];
    let mut steps: BTreeMap<u64, BTreeMap<&str, f64>> = BTreeMap::new();
    for report in reports {
        for (name, value) in &report.values {
            if !columns.contains(&name.as_str()) {
                columns.push(name);
            }
            steps.entry(report.step).or_default().insert(name, *value);
        }
    }
    let mut table = format!("step,{}\n", columns.join(","));
    for (step, values) in &steps {
        write!(table, "{step}").expect("a String takes all");
        for column in &columns {
            match values.get(column) {
                Some(value) => write!(table, ",{value}").expect("a String takes all"),
                None => table.push(','),
            }
        }
        table.push('\n');
    }
    table
}

fn event_at(time_s: f64) -> Message {
    // wall_time
    Message::default().double(1, time_s)
}

/// A TFRecord: the length and its checksum, the data and theirs.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [
        &length[..],
        &masked(crc(CASTAGNOLI, &length)).to_le_bytes(),
        data,
        &masked(crc(CASTAGNOLI, data)).to_le_bytes(),
    ]
    .concat()
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The polynomial of iSCSI's checksum (RFC 3720, appendix B.4), bits turned around.
const CASTAGNOLI: u32 = 0x82f6_3b78;

/// Bit by bit: records are short.
fn crc(polynomial: u32, bytes: &[u8]) -> u32 {
    let crc = bytes.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (polynomial & (crc & 1).wrapping_neg())
        })
    });
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports() -> Vec<Report> {
        let step = |step, loss| {
            JobEvent::Step(StepReport {
                step,
                epoch: 0.5,
                loss,
                token_accuracy: 0.25,
                metrics: [("rewards/margins".to_owned(), 2.0)].into(),
                grad_norm: 1.5,
                learning_rate: 1e-4,
                trained_tokens: 300,
                tokens_per_second: 100.0,
            })
        };
        let validated = JobEvent::Validated {
            step: 2,
            loss: 3.5,
            token_accuracy: 0.5,
            metrics: BTreeMap::new(),
        };
        let events = [step(1, 4.0), step(2, 9.0), step(2, 3.0), validated];
        events.iter().filter_map(Report::of).collect()
    }

    #[test]
    fn lines_have_the_names_of_the_trainer_and_come_back() {
        let reports = reports();
        let line = reports[3].json();
        assert_eq!(
            line,
            "{\"step\":2,\"eval_loss\":3.5,\"eval_mean_token_accuracy\":0.5}\n"
        );
        for report in &reports {
            let mut back = Report::of_json(&report.json()).unwrap();
            let mut report = report.clone();
            report.values.sort_by(|a, b| a.0.cmp(&b.0));
            back.values.sort_by(|a, b| a.0.cmp(&b.0));
            assert_eq!(back, report);
        }
        assert_eq!(Report::of_json("half a li"), None);
        let table = csv(&reports);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines,
            [
                "step,epoch,loss,mean_token_accuracy,grad_norm,learning_rate,num_tokens,tokens_per_second,rewards/margins,\
                 eval_loss,eval_mean_token_accuracy",
                "1,0.5,4,0.25,1.5,0.0001,300,100,2,,",
                "2,0.5,3,0.25,1.5,0.0001,300,100,2,3.5,0.5",
            ]
        );
    }

    /// The checksum's standard example, and records as TensorBoard's own writer makes them.
    #[test]
    fn records_are_tensorboards() {
        assert_eq!(crc(CASTAGNOLI, b"123456789"), 0xe306_9283);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(&tensorboard_head(1.5)), HEAD);
        assert_eq!(hex(&reports()[3].tensorboard(2.5)), VALIDATION);
    }

    const HEAD: &str = "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c";
    const VALIDATION: &str = "40000000000000002817f49509000000000000044010022a330a100a096576616c2f6c6f737315000060400a1f0a186576616c2f6d65616e5f746f6b656e5f6163637572616379150000003f3dd638ea";
}
