//! What a job's events say of its steps, as files: `step_metrics.csv`, one line a step, and an event file for TensorBoard.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;
use tandem_core::id::Digest;
use tandem_core::report::{self, Report};
use tandem_store::{EventRow, FileRow, NewFile, Tenant};

use crate::Router;
use crate::api::RouterError;
use crate::jobs::record;

pub(crate) const FILENAME: &str = "step_metrics.csv";
pub(crate) const PURPOSE: &str = "fine-tune-results";
/// OpenAI's columns, then ours; each names a key of the events' data. Behind them stands what the objective reports.
const COLUMNS: [(&str, &str); 10] = [
    ("step", "step"),
    ("train_loss", "train_loss"),
    ("train_accuracy", "train_mean_token_accuracy"),
    ("valid_loss", "valid_loss"),
    ("valid_mean_token_accuracy", "valid_mean_token_accuracy"),
    ("epoch", "epoch"),
    ("learning_rate", "learning_rate"),
    ("grad_norm", "grad_norm"),
    ("trained_tokens", "trained_tokens"),
    ("tokens_per_second", "tokens_per_second"),
];
const PAGE: u32 = 1000;

/// Durable bytes; the rows come with the change that ends the job.
pub(crate) async fn publish(router: &Router, job: &str) -> Result<Vec<FileRow>, RouterError> {
    let mut steps = Steps::default();
    let mut seq = 0;
    loop {
        let events = router.0.store.job_events_since(job, seq, PAGE).await?;
        for event in &events {
            steps.read(event)?;
            seq = event.seq;
        }
        if events.len() < PAGE as usize {
            break;
        }
    }
    let events = format!("events.out.tfevents.{}.{job}", steps.began_s());
    let mut rows = vec![];
    for (filename, bytes) in [
        (FILENAME, steps.csv().into_bytes()),
        (events.as_str(), steps.tensorboard()),
    ] {
        let file = NewFile {
            filename,
            purpose: PURPOSE,
            expires_after_s: None,
            // The change makes it the job's tenant's.
            tenant: &Tenant::default(),
            sha256: Digest::of(&bytes),
        };
        rows.push(router.0.store.publish_result(&bytes, file).await?);
    }
    Ok(rows)
}

/// Of a job that ended otherwise.
pub(crate) async fn discard(router: &Router, files: &[FileRow]) -> Result<(), RouterError> {
    for file in files {
        router.0.store.discard_file(file).await?;
    }
    Ok(())
}

/// The metrics of each step. A job that went on from a checkpoint reports steps again: the later report counts.
#[derive(Default)]
struct Steps(BTreeMap<u64, Step>);

#[derive(Default)]
struct Step {
    /// Of the last report, in seconds since 1970.
    at: i64,
    metrics: serde_json::Map<String, Value>,
}

impl Steps {
    fn read(&mut self, event: &EventRow) -> Result<(), RouterError> {
        let data: Value = record::from_json(&event.data)?;
        let (Value::Object(data), Some(step)) = (&data, data.get("step").and_then(Value::as_u64)) else {
            return Ok(());
        };
        if data.contains_key("train_loss") || data.contains_key("valid_loss") {
            let of_step = self.0.entry(step).or_default();
            of_step.at = event.created_at;
            of_step.metrics.extend(data.clone());
        }
        Ok(())
    }

    fn began_s(&self) -> i64 {
        self.0.values().next().map_or(0, |step| step.at)
    }

    /// The bytes of an event file, with the tags of transformers' callback.
    fn tensorboard(&self) -> Vec<u8> {
        let mut bytes = report::tensorboard_head(self.began_s() as f64);
        for (&step, Step { at, metrics }) in &self.0 {
            let named = metrics
                .iter()
                .filter(|(key, _)| !["step", "total_steps"].contains(&key.as_str()));
            let values = named.filter_map(|(key, value)| Some((tag(key), value.as_f64()?)));
            let report = Report {
                step,
                values: values.collect(),
            };
            bytes.extend(report.tensorboard(*at as f64));
        }
        bytes
    }

    fn csv(&self) -> String {
        let known = |key: &str| COLUMNS.iter().any(|(_, known)| *known == key) || key == "total_steps";
        let mut others: Vec<&str> = self
            .0
            .values()
            .flat_map(|step| step.metrics.keys())
            .map(String::as_str)
            .collect();
        others.retain(|key| !known(key));
        others.sort_unstable();
        others.dedup();
        let columns = || COLUMNS.into_iter().chain(others.iter().map(|key| (*key, *key)));
        let mut csv = columns().map(|(title, _)| title).collect::<Vec<_>>().join(",");
        csv.push('\n');
        for metrics in self
            .0
            .values()
            .map(|step| &step.metrics)
            .filter(|metrics| metrics.contains_key("train_loss"))
        {
            let cell = |key| metrics.get(key).map(Value::to_string).unwrap_or_default();
            let cells: Vec<String> = columns().map(|(_, key)| cell(key)).collect();
            writeln!(csv, "{}", cells.join(",")).expect("a String takes all");
        }
        csv
    }
}

/// As `tandem train` and transformers' Trainer call it.
fn tag(key: &str) -> String {
    match key.split_once('_') {
        _ if key == "trained_tokens" => "num_tokens".to_owned(),
        Some(("train", name)) => name.to_owned(),
        Some(("valid", name)) => format!("eval_{name}"),
        _ => key.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_report_of_a_step_counts_and_validation_joins_it() {
        let mut steps = Steps::default();
        for data in [
            r#"{"step":1,"train_loss":3.0}"#,
            r#"{"step":2,"train_loss":2.5}"#,
            "null",
            r#"{"step":2,"train_loss":2.0,"train_mean_token_accuracy":0.5}"#,
            r#"{"step":2,"valid_loss":2.25}"#,
            r#"{"step":2,"valid_loss":2.25,"valid_rewards/margins":0.5}"#,
            r#"{"step":9,"model":"a checkpoint without a step"}"#,
        ] {
            let data = data.to_owned();
            let event = EventRow {
                seq: 1,
                id: String::new(),
                created_at: 0,
                level: String::new(),
                message: String::new(),
                data,
            };
            steps.read(&event).unwrap();
        }
        let csv = steps.csv();
        let lines: Vec<&str> = csv.lines().collect();
        assert!(lines[0].starts_with("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"));
        assert!(lines[0].ends_with(",valid_rewards/margins"));
        assert_eq!(lines[1..], ["1,3.0,,,,,,,,,", "2,2.0,0.5,2.25,,,,,,,0.5"]);

        let tags = [
            "train_loss",
            "valid_rewards/margins",
            "trained_tokens",
            "grad_norm",
        ]
        .map(tag);
        assert_eq!(tags, ["loss", "eval_rewards/margins", "num_tokens", "grad_norm"]);
        let read = |text: &str| {
            steps
                .tensorboard()
                .windows(text.len())
                .filter(|part| *part == text.as_bytes())
                .count()
        };
        let counts = [
            "brain.Event:2",
            "train/loss",
            "eval/loss",
            "train/mean_token_accuracy",
        ]
        .map(read);
        assert_eq!(counts, [1, 2, 1, 1]);
    }
}
