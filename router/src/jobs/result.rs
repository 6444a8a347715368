//! `step_metrics.csv`: what a job's events say of its steps, one line a step.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;
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

/// Durable bytes; the row comes with the change that ends the job.
pub(crate) async fn publish(router: &Router, job: &str) -> Result<FileRow, RouterError> {
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
    let csv = steps.csv();
    let file = NewFile {
        filename: FILENAME,
        purpose: PURPOSE,
        expires_after_s: None,
        // The change makes it the job's tenant's.
        tenant: &Tenant::default(),
    };
    Ok(router.0.store.publish_result(csv.as_bytes(), file).await?)
}

/// The metrics of each step. A job that went on from a checkpoint reports steps again: the later report counts.
#[derive(Default)]
struct Steps(BTreeMap<u64, serde_json::Map<String, Value>>);

impl Steps {
    fn read(&mut self, event: &EventRow) -> Result<(), RouterError> {
        let data: Value = record::from_json(&event.data)?;
        let (Value::Object(data), Some(step)) = (&data, data.get("step").and_then(Value::as_u64)) else {
            return Ok(());
        };
        if data.contains_key("train_loss") || data.contains_key("valid_loss") {
            self.0.entry(step).or_default().extend(data.clone());
        }
        Ok(())
    }

    fn csv(&self) -> String {
        let known = |key: &str| COLUMNS.iter().any(|(_, known)| *known == key) || key == "total_steps";
        let mut others: Vec<&str> = self
            .0
            .values()
            .flat_map(|metrics| metrics.keys())
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
            .filter(|metrics| metrics.contains_key("train_loss"))
        {
            let cell = |key| metrics.get(key).map(Value::to_string).unwrap_or_default();
            let cells: Vec<String> = columns().map(|(_, key)| cell(key)).collect();
            writeln!(csv, "{}", cells.join(",")).expect("a String takes all");
        }
        csv
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
    }
}
