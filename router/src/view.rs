//! Files, jobs and models as one client may use them: what is another tenant's does not exist for it, and what it makes
//! is its own. This is the only way to them from outside, so that nobody forgets who asks. Not here: what is done.

use std::path::{Path, PathBuf};

use tandem_core::id::Digest;
use tandem_store::{BatchRow, FileRow, JobRow, ResponseRow, Source, UploadRow};
use tokio::sync::mpsc;

use crate::Router;
use crate::api::{
    Checkpoint, Client, FileInfo, Job, JobEventRecord, JobRequest, KeptResponse, LoadMode, MetadataFilter,
    ModelCard, ModelKind, Order, Page, RouterError, Upload,
};
use crate::batches::{self, Batch, BatchRequest};
use crate::content::Content;
use crate::files;
use crate::jobs::preview::Preview;
use crate::jobs::record;
use crate::responses;
use crate::uploads::{self, PartInfo, PartRoom, UploadInfo, UploadRequest};

/// Cheap to make: one for each use.
#[derive(Clone)]
pub struct View {
    pub(crate) router: Router,
    pub(crate) client: Client,
}

impl Router {
    pub fn of(&self, client: &Client) -> View {
        View {
            router: self.clone(),
            client: client.clone(),
        }
    }
}

impl View {
    /// Takes the staged file over: published, or removed on an error.
    pub async fn create_file(self, upload: Upload) -> Result<FileInfo, RouterError> {
        self.router.create_file(upload, &self.client).await
    }

    pub async fn files(
        self,
        purpose: Option<&str>,
        after: Option<&str>,
        limit: u32,
        order: Order,
    ) -> Result<Page<FileInfo>, RouterError> {
        if let Some(id) = after {
            self.see_file(id).await?;
        }
        self.router
            .files(self.client.only(), purpose, after, limit, order)
            .await
    }

    pub async fn file(self, id: &str) -> Result<FileInfo, RouterError> {
        Ok(files::info(self.see_file(id).await?))
    }

    /// Jobs whose training has begun keep their tokens; one that still validates this file fails.
    pub async fn delete_file(self, id: &str) -> Result<(), RouterError> {
        self.see_file(id).await?;
        self.router.delete_file(id).await
    }

    pub async fn file_content(self, id: &str) -> Result<Content, RouterError> {
        self.see_file(id).await?;
        self.router.file_content(id).await
    }

    pub async fn create_upload(self, request: UploadRequest) -> Result<UploadInfo, RouterError> {
        self.router.create_upload(request, &self.client).await
    }

    /// What may come of an upload.
    pub async fn room_for_part(&self, upload: &str) -> Result<PartRoom, RouterError> {
        let row = self.see_upload(upload).await?;
        self.router.room_for_part(&row).await
    }

    /// Takes the staged bytes over.
    pub async fn add_part(
        self,
        upload: &str,
        staged: &Path,
        sha256: Digest,
    ) -> Result<PartInfo, RouterError> {
        let row = self.see_upload(upload).await?;
        self.router.add_part(&row, staged, sha256).await
    }

    /// The parts that are named, in this order, become one file.
    pub async fn complete_upload(
        self,
        upload: &str,
        part_ids: &[String],
        md5: Option<&str>,
    ) -> Result<UploadInfo, RouterError> {
        let row = self.see_upload(upload).await?;
        self.router.complete_upload(&row, part_ids, md5).await
    }

    pub async fn cancel_upload(self, upload: &str) -> Result<UploadInfo, RouterError> {
        let row = self.see_upload(upload).await?;
        self.router.cancel_upload(&row).await
    }

    /// Checked and durable when this returns; files are validated after it.
    pub async fn create_job(self, request: JobRequest) -> Result<Job, RouterError> {
        self.router.create_job(request, &self.client).await
    }

    /// What it would train.
    pub async fn preview_job(self, request: JobRequest, rows: usize) -> Result<Preview, RouterError> {
        self.router.preview_job(request, rows, &self.client).await
    }

    /// Newest first.
    pub async fn jobs(
        self,
        after: Option<&str>,
        limit: u32,
        metadata: MetadataFilter,
    ) -> Result<Page<Job>, RouterError> {
        if let Some(id) = after {
            self.see_job(id).await?;
        }
        self.router.jobs(self.client.only(), after, limit, metadata).await
    }

    pub async fn job(self, id: &str) -> Result<Job, RouterError> {
        record::job(self.see_job(id).await?)
    }

    /// A waiting job ends at once, a running one when the engine says so. If that takes long, the job comes back as it
    /// is and ends later.
    pub async fn cancel_job(self, id: &str) -> Result<Job, RouterError> {
        self.see_job(id).await?;
        self.router.cancel_job(id).await
    }

    /// A waiting job pauses at once, a running one when its state is written, one that is being prepared after that. If that
    /// takes long, the job comes back as it is and pauses later.
    pub async fn pause_job(self, id: &str) -> Result<Job, RouterError> {
        self.see_job(id).await?;
        self.router.pause_job(id).await
    }

    /// A paused job waits for its turn again and goes on from its state.
    pub async fn resume_job(self, id: &str) -> Result<Job, RouterError> {
        self.see_job(id).await?;
        self.router.resume_job(id).await
    }

    /// Durable when this returns; its file is read after it.
    pub async fn create_batch(self, request: BatchRequest) -> Result<Batch, RouterError> {
        self.router.create_batch(request, &self.client).await
    }

    /// Newest first.
    pub async fn batches(self, after: Option<&str>, limit: u32) -> Result<Page<Batch>, RouterError> {
        if let Some(id) = after {
            self.see_batch(id).await?;
        }
        self.router.batches(self.client.only(), after, limit).await
    }

    pub async fn batch(self, id: &str) -> Result<Batch, RouterError> {
        batches::batch(self.see_batch(id).await?)
    }

    /// It ends in a moment, with the answers that there are.
    pub async fn cancel_batch(self, id: &str) -> Result<Batch, RouterError> {
        self.see_batch(id).await?;
        self.router.cancel_batch(id).await
    }

    /// Newest first.
    pub async fn job_events(
        self,
        id: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Page<JobEventRecord>, RouterError> {
        self.see_job(id).await?;
        self.router.job_events(id, after, limit).await
    }

    /// From the first event on, then as they come; the channel closes when the job has ended.
    pub async fn follow_job(self, id: &str) -> Result<mpsc::Receiver<JobEventRecord>, RouterError> {
        self.see_job(id).await?;
        self.router.follow_job(id).await
    }

    /// Newest first.
    pub async fn checkpoints(
        self,
        id: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Page<Checkpoint>, RouterError> {
        self.see_job(id).await?;
        self.router.checkpoints(id, after, limit).await
    }

    /// Whether it is kept: no more is than [`View::max_kept_bytes`] of a tenant's together, of which the newest stay.
    pub async fn keep_response(self, response: KeptResponse) -> Result<bool, RouterError> {
        self.router.keep_response(response, &self.client.tenant).await
    }

    pub fn max_kept_bytes(&self) -> u64 {
        self.router.config().keep_responses.bytes
    }

    pub async fn response(self, id: &str) -> Result<KeptResponse, RouterError> {
        self.see_response(id).await.map(responses::kept)
    }

    /// The response and all that it goes on with, the oldest first.
    pub async fn conversation(self, id: &str) -> Result<Vec<KeptResponse>, RouterError> {
        let rows = self.router.conversation_rows(id).await?;
        match rows.iter().find(|row| !self.client.sees(&row.tenant)) {
            None => Ok(rows.into_iter().map(responses::kept).collect()),
            Some(_) => Err(RouterError::UnknownResponse(id.to_owned())),
        }
    }

    pub async fn delete_response(self, id: &str) -> Result<(), RouterError> {
        self.see_response(id).await?;
        self.router.delete_response(id).await
    }

    /// The base first, then adapters from the oldest on.
    pub fn models(self) -> Vec<ModelCard> {
        self.router.0.catalog.cards(&self.client)
    }

    pub fn model(self, name: &str) -> Result<ModelCard, RouterError> {
        let found = self.router.0.catalog.find(&self.client, name);
        found.ok_or_else(|| RouterError::UnknownModel(name.to_owned()))
    }

    /// An adapter's card, and its PEFT folder on this machine.
    pub async fn adapter_folder(self, name: &str) -> Result<(ModelCard, PathBuf), RouterError> {
        let router = self.router.clone();
        let card = self.model(name)?;
        let ModelKind::Adapter { digest, .. } = card.kind else {
            return Err(RouterError::invalid(
                "name",
                format!("`{name}` is the base model, no adapter"),
            ));
        };
        let folder = router.0.store.adapter_folder(digest).await?;
        Ok((card, folder))
    }

    /// The name goes now, and with a job's model the names of its checkpoints; what they named goes when no other name
    /// and no running request needs it.
    pub async fn delete_model(self, name: &str) -> Result<(), RouterError> {
        self.change_model(name).await?;
        self.router.delete_model(name).await
    }

    /// As [`View::delete_model`] for what a job made. The job itself stays on record.
    pub async fn delete_models_of(self, job: &str) -> Result<(), RouterError> {
        self.see_job(job).await?;
        self.router.delete_models_of(job).await
    }

    /// Serve the PEFT folder `folder` as `name`. Requests that run keep the version they began with.
    pub async fn load_adapter(
        self,
        name: &str,
        folder: &Path,
        mode: LoadMode,
    ) -> Result<ModelCard, RouterError> {
        self.router.check_storage(&self.client).await?;
        self.router
            .load(name, folder, mode, Source::Loaded, &self.client)
            .await
    }

    /// As [`View::delete_model`], with the error of the adapter routes.
    pub async fn unload_adapter(self, name: &str) -> Result<(), RouterError> {
        match self.change_model(name).await {
            Ok(()) => self.router.unload_adapter(name).await,
            Err(RouterError::UnknownModel(_)) => Err(crate::models::unknown_adapter(name)),
            Err(error) => Err(error),
        }
    }

    async fn see_file(&self, id: &str) -> Result<FileRow, RouterError> {
        let row = self.router.file_row(id).await?;
        match self.client.sees(&row.tenant) {
            true => Ok(row),
            false => Err(RouterError::UnknownFile(id.to_owned())),
        }
    }

    async fn see_response(&self, id: &str) -> Result<ResponseRow, RouterError> {
        let row = self.router.response_row(id).await?;
        match self.client.sees(&row.tenant) {
            true => Ok(row),
            false => Err(RouterError::UnknownResponse(id.to_owned())),
        }
    }

    async fn see_upload(&self, id: &str) -> Result<UploadRow, RouterError> {
        let row = self.router.upload_row(id).await?;
        match self.client.sees(&row.tenant) {
            true => Ok(row),
            false => Err(uploads::unknown("upload", id)),
        }
    }

    async fn see_batch(&self, id: &str) -> Result<BatchRow, RouterError> {
        let row = self.router.batch_row(id).await?;
        match self.client.sees(&row.tenant) {
            true => Ok(row),
            false => Err(batches::unknown(id)),
        }
    }

    async fn see_job(&self, id: &str) -> Result<JobRow, RouterError> {
        let row = self.router.0.store.job(id).await?;
        let seen = row.filter(|row| self.client.sees(&row.tenant));
        seen.ok_or_else(|| RouterError::UnknownJob(id.to_owned()))
    }

    /// What the command line names all see, but only who has it changes it.
    async fn change_model(&self, name: &str) -> Result<(), RouterError> {
        // Another router may have made the name a moment ago.
        self.router.refresh_names().await?;
        match self.router.0.catalog.row(name) {
            Some(row) if self.client.sees(&row.tenant) => Ok(()),
            Some(row) if row.source == Source::Flag => Err(RouterError::Conflict(format!(
                "The model `{name}` is served to everybody; only its owner can remove it."
            ))),
            Some(_) => Err(RouterError::UnknownModel(name.to_owned())),
            // Of the base or of nothing, the router says what holds.
            None => Ok(()),
        }
    }
}
