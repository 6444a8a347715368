//! What clients read of jobs: their rows, and their events, all or as they come.

use tandem_store::Tenant;
use tokio::sync::mpsc;

use crate::Router;
use crate::api::{Checkpoint, Job, JobEventRecord, MetadataFilter, Page, RouterError};
use crate::jobs::record;

/// Events that are read from the store at once, and that may wait for a slow follower.
const FOLLOW_PAGE: u32 = 100;

impl Router {
    pub(crate) async fn jobs(
        &self,
        tenant: Option<&Tenant>,
        after: Option<&str>,
        limit: u32,
        metadata: MetadataFilter,
    ) -> Result<Page<Job>, RouterError> {
        let rows = self.0.store.jobs(tenant, after, limit, &metadata).await?;
        record::page(rows, record::job)
    }

    pub(crate) async fn job(&self, id: &str) -> Result<Job, RouterError> {
        let row = self.0.store.job(id).await?;
        record::job(row.ok_or_else(|| RouterError::UnknownJob(id.to_owned()))?)
    }

    pub(crate) async fn checkpoints(
        &self,
        id: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Page<Checkpoint>, RouterError> {
        self.job(id).await?;
        let rows = self.0.store.checkpoints(id, after, limit).await?;
        record::page(rows, record::checkpoint)
    }

    pub(crate) async fn job_events(
        &self,
        id: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Page<JobEventRecord>, RouterError> {
        self.job(id).await?;
        let rows = self.0.store.job_events(id, after, limit).await?;
        record::page(rows, record::event)
    }

    pub(crate) async fn follow_job(&self, id: &str) -> Result<mpsc::Receiver<JobEventRecord>, RouterError> {
        self.job(id).await?;
        let (sender, receiver) = mpsc::channel(FOLLOW_PAGE as usize);
        let (router, id) = (self.clone(), id.to_owned());
        tokio::spawn(async move {
            let follow = router.follow(&id, &sender);
            tokio::select! {
                () = sender.closed() => {}
                followed = follow => if let Err(error) = followed {
                    tracing::warn!(job = id, %error, "cannot go on reading a job's events");
                },
            }
        });
        Ok(receiver)
    }

    async fn follow(&self, id: &str, sender: &mpsc::Sender<JobEventRecord>) -> Result<(), RouterError> {
        let mut changed = self.0.signals.watch();
        let mut seq = 0;
        loop {
            changed.mark_unchanged();
            // The state is read first: the last events come with the end, in one transaction.
            let ended = self.job(id).await?.status.ended();
            let rows = self.0.store.job_events_since(id, seq, FOLLOW_PAGE).await?;
            let n_rows = rows.len();
            for row in rows {
                seq = row.seq;
                if sender.send(record::event(row)?).await.is_err() {
                    return Ok(());
                }
            }
            if n_rows == FOLLOW_PAGE as usize {
                continue;
            }
            if ended || changed.changed().await.is_err() {
                return Ok(());
            }
        }
    }
}
