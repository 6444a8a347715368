//! Models as clients manage them: list, load, replace, delete. An adapter is copied into the store under its digest and
//! made resident by the engine before a name points to it. Not here: what a request does with a name (`catalog`).

use std::path::Path;
use std::time::Duration;

use tandem_core::id::{AdapterDigest, AdapterRef};
use tandem_core::message::Fault;
use tandem_core::replica::{AdapterInfo, Command};
use tandem_store::{NameRow, NewName, Placement, SaveRecord, Source, StoreError};
use tokio::sync::oneshot;

use crate::api::{Client, LoadMode, ModelCard, RouterError};
use crate::batches::KEPT_S;
use crate::catalog::Hold;
use crate::fleet::Ask;
use crate::{Router, Shared};

const MAX_NAME_CHARS: usize = 200;
/// What any adapter may have.
const SMALL_ADAPTER_BYTES: u64 = 256 << 20;
/// How often files are looked over for those that have expired (reads never show them).
const EXPIRY_PERIOD: Duration = Duration::from_secs(60);

impl Router {
    pub(crate) async fn delete_model(&self, name: &str) -> Result<(), RouterError> {
        if self.0.catalog.is_base(name) {
            return Err(RouterError::Conflict(format!(
                "The base model `{name}` cannot be deleted."
            )));
        }
        let _one_at_a_time = self.0.changes.lock().await;
        self.reread_names().await?;
        let row = self
            .0
            .catalog
            .row(name)
            .ok_or_else(|| RouterError::UnknownModel(name.to_owned()))?;
        self.remove(row).await
    }

    pub(crate) async fn delete_models_of(&self, job: &str) -> Result<(), RouterError> {
        if !self.job(job).await?.status.ended() {
            let message = format!("The job `{job}` has not ended; cancel it first.");
            return Err(RouterError::Conflict(message));
        }
        let _one_at_a_time = self.0.changes.lock().await;
        self.reread_names().await?;
        let names = self.names_of_job(job).await?;
        self.remove_names(names).await
    }

    pub(crate) async fn unload_adapter(&self, name: &str) -> Result<(), RouterError> {
        let _one_at_a_time = self.0.changes.lock().await;
        self.reread_names().await?;
        let Some(row) = self.0.catalog.row(name) else {
            return Err(unknown_adapter(name));
        };
        self.remove(row).await
    }

    /// Names of flags of an earlier start go, those of this one come.
    pub(crate) async fn restore_flags(&self) -> Result<(), RouterError> {
        for (name, folder) in &self.0.config.lora_modules {
            // A name that a tenant has is not taken away from it.
            self.load(name, folder, LoadMode::Replace, Source::Flag, &Client::default())
                .await?;
        }
        if self.0.store.is_shared() {
            // Another router's flags may differ, and it may be serving by them.
            return Ok(());
        }
        let _one_at_a_time = self.0.changes.lock().await;
        for name in self.0.catalog.names_from(&Source::Flag) {
            if !self.0.config.lora_modules.iter().any(|(given, _)| *given == name) {
                self.remove_names(vec![name]).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn load(
        &self,
        name: &str,
        folder: &Path,
        mode: LoadMode,
        source: Source,
        client: &Client,
    ) -> Result<ModelCard, RouterError> {
        self.check_name(name)?;
        self.refresh_names().await?;
        self.replaceable(name, mode, client)?;
        let hold = self.publish(folder).await?;
        let digest = hold.digest;
        // As long as it takes until an adapter's slot is free: nobody else waits for it.
        let resident = self.make_resident(digest).await.map_err(|error| match error {
            RouterError::Adapter { not_found, message } => RouterError::Adapter {
                not_found,
                message: format!("The adapter in {} cannot be loaded: {message}", folder.display()),
            },
            other => other,
        });
        let AdapterInfo { rank, .. } = resident?;
        let new = NewName {
            base: self.info().base_digest,
            name: name.to_owned(),
            digest,
            rank,
            source,
        };
        let _one_at_a_time = self.0.changes.lock().await;
        loop {
            let current = self.replaceable(name, mode, client)?;
            // Who replaces another's name by its reach leaves it to its owner.
            let tenant = current
                .as_ref()
                .map_or(client.tenant.as_str(), |row| &row.tenant)
                .to_owned();
            let written = self
                .0
                .store
                .swap_name(&new, &tenant, current.map(|row| row.digest))
                .await?;
            if let Some(row) = written {
                tracing::info!(model = name, adapter = %digest.short(), rank = row.rank, "adapter loaded");
                self.0.catalog.insert(row);
                return self.of(client).model(name);
            }
            // Another router moved the name, or memory missed a write that was reported as failed.
            self.take_names().await?;
            let is_there = |row: NameRow| row.digest == digest && client.sees(&row.tenant);
            if self.0.catalog.row(name).is_some_and(is_there) {
                return self.of(client).model(name);
            }
        }
    }

    /// What `name` points to now, if it may be replaced.
    fn replaceable(
        &self,
        name: &str,
        mode: LoadMode,
        client: &Client,
    ) -> Result<Option<NameRow>, RouterError> {
        let current = self.0.catalog.row(name).filter(|row| row.name == name);
        match (mode, &current) {
            (_, Some(row)) if !client.sees(&row.tenant) => Err(RouterError::Conflict(format!(
                "The name '{name}' is taken: choose another."
            ))),
            (LoadMode::New, Some(_)) => Err(RouterError::Conflict(format!(
                "The lora adapter '{name}' has already been loaded. To replace it, set 'load_inplace' to true."
            ))),
            _ => Ok(current),
        }
    }

    /// Brings a PEFT folder into the store.
    async fn publish(&self, folder: &Path) -> Result<Hold, RouterError> {
        let Shared { store, catalog, .. } = &*self.0;
        loop {
            let published = store
                .publish_adapter(folder, Placement::Copy, self.adapter_limit_bytes())
                .await;
            let hold = catalog.hold(published.map_err(adapter_error)?).await;
            // The same adapter may have been there, and on its way out.
            if store.has_adapter(hold.digest).await? {
                return Ok(hold);
            }
        }
    }

    /// An adapter in float32 has fewer numbers than twice the base, unless the base is tiny: what is larger is not copied
    /// to find out what it is.
    fn adapter_limit_bytes(&self) -> u64 {
        SMALL_ADAPTER_BYTES.saturating_add(self.info().parameters.saturating_mul(8))
    }

    /// Sees that the store has an adapter that a replica made.
    pub(crate) async fn keep_adapter(&self, adapter: &AdapterRef) -> Result<Hold, RouterError> {
        let hold = self.0.catalog.hold(adapter.digest).await;
        let digest = self.0.store.keep_adapter(adapter).await?;
        if digest == adapter.digest {
            return Ok(hold);
        }
        let (told, folder) = (adapter.digest, adapter.folder.display());
        tracing::warn!(%told, %digest, %folder, "the engine's digest of an adapter is not its files'");
        Ok(self.0.catalog.hold(digest).await)
    }

    /// Names that other routers made or moved.
    pub(crate) async fn refresh_names(&self) -> Result<(), RouterError> {
        let _one_at_a_time = self.0.changes.lock().await;
        self.reread_names().await
    }

    /// The caller holds `changes`, so that what is read does not overwrite what is written meanwhile. Without other
    /// routers, memory is as the store.
    async fn reread_names(&self) -> Result<(), RouterError> {
        match self.0.store.is_shared() {
            true => self.take_names().await,
            false => Ok(()),
        }
    }

    /// Memory becomes what the store has. The caller holds `changes`.
    async fn take_names(&self) -> Result<(), RouterError> {
        let names = self.0.store.names(self.info().base_digest).await?;
        self.0.catalog.replace(names);
        Ok(())
    }

    /// On one replica, which checks it; the others load it with its first request there.
    async fn make_resident(&self, digest: AdapterDigest) -> Result<AdapterInfo, RouterError> {
        let adapter = AdapterRef {
            digest,
            folder: self.0.store.adapter_folder(digest).await.map_err(adapter_error)?,
        };
        let (reply, answer) = oneshot::channel();
        let ask = Ask {
            prompt: &[],
            adapter: Some(digest),
            max_tokens: 0,
            n: 0,
            at: None,
        };
        let seat = self.0.fleet.seat(ask).await.map_err(RouterError::Engine)?;
        // A replica that is gone drops the reply.
        let _ = seat.commands.send(Command::LoadAdapter(adapter, reply)).await;
        match answer.await {
            Ok(Ok(info)) => Ok(info),
            Ok(Err(Fault::Adapter(message))) => Err(RouterError::Adapter {
                not_found: false,
                message,
            }),
            Ok(Err(fault)) => Err(RouterError::Engine(fault)),
            Err(_) => Err(RouterError::Engine(Fault::ReplicaLost(
                "it went away while it loaded the adapter".to_owned(),
            ))),
        }
    }

    /// The caller holds `changes`.
    async fn remove(&self, row: NameRow) -> Result<(), RouterError> {
        let names = match &row.source {
            Source::Job { job, step: None } => self.names_of_job(job).await?,
            _ => vec![row.name],
        };
        self.remove_names(names).await
    }

    /// Of a sweep with those of its trials.
    async fn names_of_job(&self, job: &str) -> Result<Vec<String>, RouterError> {
        let mut names = self.0.catalog.names_of_job(job);
        for trial in self.0.store.trials(job).await? {
            names.extend(self.0.catalog.names_of_job(&trial.id));
        }
        Ok(names)
    }

    /// The caller holds `changes`.
    async fn remove_names(&self, names: Vec<String>) -> Result<(), RouterError> {
        let base = self.info().base_digest;
        self.0
            .store
            .remove_names(base, names.iter().map(String::as_str))
            .await?;
        self.0.catalog.remove(&names);
        tracing::info!(models = names.join(", "), "names removed");
        Ok(())
    }

    /// Whether a name is this adapter's.
    pub(crate) async fn is_name_of(&self, name: &str, adapter: AdapterDigest) -> Result<bool, RouterError> {
        self.refresh_names().await?;
        Ok(self.0.catalog.row(name).is_some_and(|row| row.digest == adapter))
    }

    /// With the name of its adapter. Whether it was still there.
    pub(crate) async fn remove_save(&self, save: &SaveRecord, name: &str) -> Result<bool, RouterError> {
        let _one_at_a_time = self.0.changes.lock().await;
        let removed = self.0.store.remove_save(save, name).await?;
        self.reread_names().await?;
        let is_its = |row: NameRow| Some(row.digest) == save.adapter;
        if removed && !self.0.store.is_shared() && self.0.catalog.row(name).is_some_and(is_its) {
            self.0.catalog.remove(&[name.to_owned()]);
        }
        Ok(removed)
    }

    fn check_name(&self, name: &str) -> Result<(), RouterError> {
        let chars = name.chars().count();
        let wrong = match name {
            "" => "it is empty".to_owned(),
            name if self.0.catalog.is_base(name) => "it is the base model's name".to_owned(),
            _ if chars > MAX_NAME_CHARS => {
                format!("it has {chars} characters, at most {MAX_NAME_CHARS} are allowed")
            }
            name if name.chars().any(char::is_control) => "it has a control character".to_owned(),
            // Clients resolve them in URLs, and archives are unpacked under them.
            name if name.split('/').any(|part| [".", ".."].contains(&part)) => {
                "a part of it is . or ..".to_owned()
            }
            name if name.trim() != name => "it begins or ends with a space".to_owned(),
            _ => return Ok(()),
        };
        Err(RouterError::invalid(
            "lora_name",
            format!("{name:?} cannot name an adapter: {wrong}"),
        ))
    }

    /// After a job's change was committed: serve its new name.
    pub(crate) fn serve(&self, row: Option<NameRow>) {
        row.into_iter().for_each(|row| self.0.catalog.insert(row));
    }

    /// Delete retired adapters that nothing uses.
    async fn reap(&self) -> Result<(), RouterError> {
        for leaving in self.0.catalog.take_free() {
            let digest = leaving.digest;
            self.tell_all(|| Command::UnloadAdapter(digest)).await;
            if self.0.store.remove_adapter_if_unnamed(digest).await? {
                tracing::info!(adapter = %digest.short(), "adapter deleted");
            }
        }
        Ok(())
    }
}

pub(crate) fn unknown_adapter(name: &str) -> RouterError {
    RouterError::Adapter {
        not_found: true,
        message: format!("The lora adapter '{name}' cannot be found."),
    }
}

pub(crate) fn adapter_error(error: StoreError) -> RouterError {
    match error {
        StoreError::Adapter { missing, message } => RouterError::Adapter {
            not_found: missing,
            message,
        },
        other => RouterError::Store(other),
    }
}

/// Deletes adapters that were let go, and files and responses that have expired, as long as the router lives. What a failure leaves
/// behind, the next start sweeps.
pub(crate) async fn housekeeping(router: Router) {
    let mut expiry = tokio::time::interval(EXPIRY_PERIOD);
    loop {
        tokio::select! {
            _ = expiry.tick() => {
                match router.0.store.delete_expired_files().await {
                    Ok(0) => {}
                    Ok(files) => tracing::info!(files, "expired files deleted"),
                    Err(error) => tracing::warn!(%error, "expired files were not deleted"),
                }
                match router.0.store.delete_expired_responses(router.config().keep_responses).await {
                    Ok(0) => {}
                    Ok(responses) => tracing::info!(responses, "old responses deleted"),
                    Err(error) => tracing::warn!(%error, "old responses were not deleted"),
                }
                match router.0.store.expire_uploads().await {
                    Ok(0) => {}
                    Ok(uploads) => tracing::info!(uploads, "uploads that nobody completed in time ended"),
                    Err(error) => tracing::warn!(%error, "old uploads were not ended"),
                }
                match router.0.store.delete_old_batches(KEPT_S).await {
                    Ok(0) => {}
                    Ok(batches) => tracing::info!(batches, "old batches deleted"),
                    Err(error) => tracing::warn!(%error, "old batches were not deleted"),
                }
                if router.0.store.is_shared() {
                    match router.0.store.delete_loose_files().await {
                        Ok(0) => {}
                        Ok(files) => tracing::info!(files, "bytes that no file names deleted"),
                        Err(error) => tracing::warn!(%error, "bytes that no file names were not deleted"),
                    }
                    // Each router says what its own requests need.
                    if let Err(error) = router.0.store.keep_unnamed(router.0.catalog.used_unnamed()).await {
                        tracing::warn!(%error, "adapters without a name that are in use may be deleted");
                    }
                    match router.0.store.delete_unnamed_adapters().await {
                        Ok(0) => {}
                        Ok(adapters) => tracing::info!(adapters, "adapters without a name deleted"),
                        Err(error) => tracing::warn!(%error, "adapters without a name were not deleted"),
                    }
                }
            },
            () = router.0.catalog.retiring() => if let Err(error) = router.reap().await {
                tracing::warn!(%error, "an unused adapter was not deleted");
            },
        }
    }
}
