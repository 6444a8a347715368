//! What a backend fetches before it obeys and keeps before it tells: adapters and jobs, by way of the artifact store.
//! Not here: where that is (store), what the router writes down.

use std::path::{Path, PathBuf};

use futures::FutureExt;
use futures::future::BoxFuture;
use tandem_core::id::{AdapterDigest, AdapterRef};
use tandem_core::job::{JobEvent, JobSpec};
use tandem_core::learner::{self, Saved};
use tandem_core::message::Fault;
use tandem_rpc::Hooks;
use tandem_store::{Artifacts, StoreError};

pub struct Kept(pub Artifacts);

impl Hooks for Kept {
    fn adapter(&self, digest: AdapterDigest) -> BoxFuture<'static, Result<AdapterRef, Fault>> {
        let artifacts = self.0.clone();
        async move {
            match artifacts.adapter(digest).await {
                Ok(folder) => Ok(AdapterRef { digest, folder }),
                Err(error) => {
                    tracing::error!(adapter = %digest.short(), %error, "an adapter cannot be fetched");
                    // Perhaps it can be the next time, or elsewhere; where it lies is nothing for clients.
                    let message = "the backend could not fetch the adapter".to_owned();
                    Err(Fault::ReplicaLost(message))
                }
            }
        }
        .boxed()
    }

    fn file(&self, path: &Path) -> BoxFuture<'static, Result<PathBuf, Fault>> {
        let (artifacts, path) = (self.0.clone(), path.to_owned());
        async move { artifacts.file_below(&path).await.map_err(unkept) }.boxed()
    }

    fn folder(&self, path: &Path) -> BoxFuture<'static, Result<PathBuf, Fault>> {
        let folder = self.0.below(path);
        async move {
            let made = tokio::fs::create_dir_all(&folder).await;
            made.map_err(|error| Fault::Step(format!("{}: {error}", folder.display())))?;
            Ok(folder)
        }
        .boxed()
    }

    fn saved(&self, folder: &Path, saved: &Saved) -> BoxFuture<'static, Result<(), Fault>> {
        let (artifacts, adapter) = (self.0.clone(), saved.adapter.clone());
        let (state, folder) = (folder.join(learner::STATE), self.0.below(folder));
        async move {
            let Some(adapter) = adapter else {
                return artifacts.keep_file_below(&state).await.map_err(unkept);
            };
            artifacts.keep_adapter(&adapter).await.map_err(unkept)?;
            if artifacts.is_cached() {
                // The store's own copy stays; an adapter is what is saved last.
                let _ = tokio::fs::remove_dir_all(folder).await;
            }
            Ok(())
        }
        .boxed()
    }

    fn job(&self, spec: JobSpec) -> BoxFuture<'static, Result<JobSpec, String>> {
        let artifacts = self.0.clone();
        async move {
            let folder = artifacts.pull_job(&spec.id, spec.life).await.map_err(said)?;
            Ok(JobSpec { folder, ..spec })
        }
        .boxed()
    }

    fn job_event(&self, spec: &JobSpec, event: JobEvent) -> BoxFuture<'static, Result<JobEvent, String>> {
        let (artifacts, id, epoch) = (self.0.clone(), spec.id.clone(), spec.life.epoch);
        async move {
            match &event {
                JobEvent::Checkpoint { step, adapter, .. } => {
                    artifacts.keep_adapter(adapter).await.map_err(said)?;
                    artifacts.push_job(&id, epoch, *step).await.map_err(said)?;
                }
                JobEvent::Kept { step } => artifacts.push_job(&id, epoch, *step).await.map_err(said)?,
                JobEvent::Finished { adapter, .. } => {
                    artifacts.keep_adapter(adapter).await.map_err(said)?;
                    artifacts.forget_job(&id).await.map_err(said)?;
                }
                JobEvent::Failed { .. } | JobEvent::Damaged { .. } | JobEvent::Cancelled { .. } => {
                    artifacts.forget_job(&id).await.map_err(said)?;
                }
                JobEvent::Started { .. }
                | JobEvent::Step(_)
                | JobEvent::Validated { .. }
                | JobEvent::StoppedEarly { .. }
                | JobEvent::BestLoaded { .. }
                | JobEvent::NoRoom { .. }
                | JobEvent::Refused { .. } => {}
            }
            Ok(event)
        }
        .boxed()
    }
}

fn unkept(error: StoreError) -> Fault {
    tracing::error!(%error, "a training client's state is not kept or fetched");
    // Where it lies is nothing for clients.
    Fault::Step("the backend could not reach the artifact store".to_owned())
}

fn said(error: StoreError) -> String {
    error.to_string()
}
