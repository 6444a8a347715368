//! A trial's course, read off its events as they come.

use serde_json::Value;
use tandem_core::job::sweep::{Course, End, Sweep};
use tandem_store::JobRow;

use crate::Router;
use crate::api::{JobStatus, RouterError};
use crate::jobs::record;

const PAGE: u32 = 1000;

/// As far as its events were read.
#[derive(Clone, Default)]
pub(super) struct Followed {
    pub course: Course,
    pub train_loss: Option<f64>,
    pub valid_loss: Option<f64>,
    seq: i64,
}

impl Followed {
    pub async fn read(&mut self, router: &Router, trial: &JobRow, sweep: &Sweep) -> Result<(), RouterError> {
        loop {
            let events = router.0.store.job_events_since(&trial.id, self.seq, PAGE).await?;
            for event in &events {
                self.seq = event.seq;
                self.take(&record::from_json(&event.data)?, &sweep.metric);
            }
            if events.len() < PAGE as usize {
                break;
            }
        }
        self.course.end = match record::job(trial.clone())?.status {
            JobStatus::Succeeded => Some(End::Succeeded),
            status if status.ended() => Some(End::Failed),
            _ => None,
        };
        Ok(())
    }

    /// What an event's data say of the metric.
    fn take(&mut self, data: &Value, metric: &str) {
        if let Some(total) = data["total_steps"].as_u64() {
            self.course.total_steps = Some(total);
        }
        let Some(step) = data["step"].as_u64() else { return };
        // Null is what JSON has for NaN.
        let number = |key: &str| Some(data.get(key)?.as_f64().unwrap_or(f64::NAN));
        let of = |phase: &str| number(&format!("{phase}_{metric}"));
        self.train_loss = data["train_loss"].as_f64().or(self.train_loss);
        self.valid_loss = data["valid_loss"].as_f64().or(self.valid_loss);
        if data.get("train_loss").is_some()
            && let Some(value) = of("train").or_else(|| number(metric))
        {
            self.course.trained(step, value);
        }
        if data.get("valid_loss").is_some()
            && let Some(value) = of("valid")
        {
            self.course.validated(step, value);
        }
    }
}
