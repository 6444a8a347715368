//! What a job made becomes what clients use: its checkpoints and its result.

use std::ops::ControlFlow;

use serde_json::json;
use tandem_core::id::AdapterRef;
use tandem_core::job::{Saved, selection};
use tandem_store::{CheckpointRow, JobChange, NewCheckpoint};

use super::Run;
use crate::api::{Level, RouterError};
use crate::catalog::{Hold, checkpoint_name};
use crate::jobs::supervisor::HERE;
use crate::jobs::{Made, event, metrics, record, result};

impl Run<'_> {
    /// The state and the adapter are in the store before the row that names them.
    pub(super) async fn checkpoint(
        &mut self,
        step: u64,
        adapter: AdapterRef,
        best: Option<u64>,
    ) -> Result<ControlFlow<()>, RouterError> {
        let artifacts = self.router.0.store.artifacts();
        let saved = Saved {
            epoch: self.lease.epoch(),
            step,
        };
        artifacts.push_job(&self.id, saved.epoch, step).await?;
        let kept = self.router.keep_adapter(&adapter).await?;
        let made = self.made(&kept);
        let model = checkpoint_name(&self.model, step);
        let surplus = self.surplus(step, best).await?;
        let change = JobChange {
            from: HERE,
            drops: surplus.iter().map(|row| row.model.clone()).collect(),
            events: vec![metrics(
                Level::Info,
                format!("Checkpoint created at step {step}: {model}"),
                json!({ "step": step, "model": model }),
            )],
            checkpoint: Some(NewCheckpoint {
                step,
                model: model.clone(),
                metrics: record::to_json(self.progress.metrics_at(step)),
            }),
            saved: Some(saved),
            name: Some(self.router.job_name(self.id.as_str(), model, Some(step), made)),
            ..JobChange::default()
        };
        let done = self.rename(change).await?;
        if done.is_continue()
            && let Some(earlier) = self.saved.replace(saved).filter(|&earlier| earlier != saved)
        {
            artifacts.drop_state(&self.id, earlier).await?;
        }
        Ok(done)
    }

    /// Checkpoints that are one too many beside that of `step`.
    async fn surplus(&self, step: u64, best: Option<u64>) -> Result<Vec<CheckpointRow>, RouterError> {
        let Some(limit) = self.save_total_limit else {
            return Ok(vec![]);
        };
        let mut rows = self.router.0.store.all_checkpoints(self.id.as_str()).await?;
        let mut steps: Vec<u64> = rows.iter().map(|row| row.step).chain([step]).collect();
        steps.sort_unstable();
        steps.dedup();
        let surplus = selection::surplus(&steps, best, limit as usize);
        rows.retain(|row| surplus.contains(&row.step));
        Ok(rows)
    }

    /// The name, the result files and the success are one transaction: a client that reads `succeeded` can use all.
    pub(super) async fn finish(
        &mut self,
        adapter: AdapterRef,
        trained_tokens: u64,
    ) -> Result<ControlFlow<()>, RouterError> {
        let result_files = result::publish(self.router, self.id.as_str()).await?;
        let kept = self.router.keep_adapter(&adapter).await?;
        let made = self.made(&kept);
        let change = JobChange {
            from: HERE,
            status: Some("succeeded"),
            ends: true,
            trained_tokens: Some(trained_tokens),
            fine_tuned_model: Some(self.model.clone()),
            events: vec![
                event(
                    Level::Info,
                    format!("New fine-tuned model created: {}", self.model),
                ),
                event(Level::Info, "Fine tuning job successfully completed".to_owned()),
            ],
            name: Some(
                self.router
                    .job_name(self.id.as_str(), self.model.clone(), None, made),
            ),
            result_files: result_files.clone(),
            ..JobChange::default()
        };
        let done = self.rename(change).await?;
        if done.is_break() {
            result::discard(self.router, &result_files).await?;
            return Ok(done);
        }
        tracing::info!(job = %self.id, model = self.model, trained_tokens, "job succeeded");
        self.router.0.store.remove_job_folder(self.id.as_str()).await?;
        Ok(done)
    }

    /// A change by the holder that gives an adapter a name.
    async fn rename(&self, change: JobChange) -> Result<ControlFlow<()>, RouterError> {
        let _one_at_a_time = self.router.0.changes.lock().await;
        self.change(change).await
    }

    fn made(&self, kept: &Hold) -> Made {
        Made {
            digest: kept.digest,
            rank: self.rank,
        }
    }
}
