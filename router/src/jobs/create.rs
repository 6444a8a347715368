//! A job is taken: what it asks for is checked, and it is a row before it is acknowledged. Not here: the checks of single settings
//! (`check`), reading its files whole (`prepare`).

use std::path::PathBuf;

use tandem_core::id::AdapterDigest;
use tandem_core::job::Lora;
use tandem_core::settings::Settings;
use tandem_store::{NewJob, ids};

use crate::Router;
use crate::api::{Client, Job, JobRequest, Level, ModelCard, ModelKind, RouterError};
use crate::jobs::{SWEEPING, VALIDATING, check, event, hyper, name, record, sweep};

impl Router {
    pub(crate) async fn create_job(
        &self,
        mut request: JobRequest,
        client: &Client,
    ) -> Result<Job, RouterError> {
        let config = self.config();
        self.check_quota(client.training_key(), 0).await?;
        self.check_storage(client).await?;
        self.find_start(&mut request, client).await?;
        check::request(&request, self.info())?;
        self.check_files("training_file", &request.training_file, client)
            .await?;
        if let Some(files) = &request.validation_file {
            self.check_files("validation_file", files, client).await?;
        }
        self.check_rows(&request).await?;
        // Trials have one seed, unless that is what they differ in.
        let seed = request.settings.seed.unwrap_or_else(ids::seed);
        for settings in request.all_settings() {
            settings.seed.get_or_insert(seed);
        }
        let id = ids::job();
        let from = request.start.map(|digest| {
            let name = request.start_name().expect("it starts from one");
            event(
                Level::Info,
                format!("Training starts from the adapter {name} ({digest})"),
            )
        });
        let model_names = name::candidates(&request, config, &id, tandem_store::now());
        let trials = sweep::trials(&request, &id, self.info(), client);
        let is_sweep = !trials.is_empty();
        let files = match is_sweep {
            false => format!("Validating training file: {}", request.training_file),
            true => sweep::begins(&request),
        };
        let job = NewJob {
            base: self.info().base_digest,
            tenant: client.tenant.clone(),
            key_id: client.quota_key().map(str::to_owned),
            // Of a sweep, trials keep theirs.
            kept_bytes: if is_sweep {
                0
            } else {
                hyper::kept_bytes(&request.settings, self.info())
            },
            status: if is_sweep { SWEEPING } else { VALIDATING }.to_owned(),
            request: record::to_json(&request),
            metadata: request.metadata.clone(),
            model_names,
            events: vec![
                event(Level::Info, format!("Created fine-tuning job: {id}")),
                event(Level::Info, files),
            ]
            .into_iter()
            .chain(from)
            .collect(),
            id,
        };
        let records = is_sweep.then(|| record::to_json(&sweep::at_first(&request, &trials)));
        let row = self.0.store.insert_sweep(job, trials, records).await?;
        self.0.signals.wake_preparer();
        if is_sweep {
            self.0.signals.wake_supervisor();
        }
        tracing::info!(job = %row.id, file = %request.training_file, "job created");
        record::job(row)
    }

    /// What the job starts from: the model that it names, where that is an adapter, or the one that a setting names.
    pub(super) async fn find_start(
        &self,
        request: &mut JobRequest,
        client: &Client,
    ) -> Result<(), RouterError> {
        let find = |name: &str| self.0.catalog.find(client, name);
        let digest_of = |card: ModelCard| match card.kind {
            ModelKind::Base => None,
            ModelKind::Adapter { digest, .. } => Some(digest),
        };
        let model = find(&request.model).ok_or_else(|| RouterError::UnknownModel(request.model.clone()))?;
        let model = digest_of(model);
        let param = "from_peft_checkpoint";
        let named = match &request.settings.from_peft_checkpoint {
            None => None,
            Some(name) => Some(find(name).and_then(digest_of).ok_or_else(|| {
                let message = format!(
                    "{param}: there is no adapter named {name:?}; a folder is given a name first (/v1/load_lora_adapter)"
                );
                RouterError::invalid(param, message)
            })?),
        };
        if let (Some(model), Some(named)) = (model, named)
            && model != named
        {
            let message = format!("{param} and model name two adapters: a job starts from one");
            return Err(RouterError::invalid(param, message));
        }
        request.start = model.or(named);
        let Some(digest) = request.start else {
            return Ok(());
        };
        let unfit =
            |why| RouterError::invalid("model", format!("a job cannot start from this adapter: {why}"));
        let folder = self.0.store.adapter_folder(digest).await?;
        let known = self.info().lora_targets.clone();
        let read = move || -> Result<Lora, String> {
            let config =
                std::fs::read(folder.join("adapter_config.json")).map_err(|error| error.to_string())?;
            let config = serde_json::from_slice(&config).map_err(|error| error.to_string())?;
            let tensors =
                std::fs::read(folder.join("adapter_model.safetensors")).map_err(|error| error.to_string())?;
            Lora::of_start(&config, &tensors, &known)
        };
        let lora = tokio::task::spawn_blocking(read)
            .await
            .expect("reading does not panic")
            .map_err(unfit)?;
        let mut taken_over = request.all_settings().map(|settings| settings.start_from(&lora));
        let taken_over = taken_over.find(Result::is_err).unwrap_or(Ok(()));
        taken_over.map_err(|(param, message)| RouterError::invalid(param, message))
    }

    /// Where an adapter lies, and its shape; or why no client's model can go on from it.
    pub(crate) async fn adapter_shape(
        &self,
        digest: AdapterDigest,
    ) -> Result<(PathBuf, Result<Lora, String>), RouterError> {
        let folder = self.0.store.adapter_folder(digest).await?;
        let config = tokio::fs::read(folder.join("adapter_config.json")).await;
        let config = config.map_err(|error| error.to_string());
        let config =
            config.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string()));
        let lora = config.and_then(|config| Lora::of_peft(&config, &self.info().lora_targets));
        Ok((folder, lora))
    }
}

impl JobRequest {
    fn all_settings(&mut self) -> impl Iterator<Item = &mut Settings> {
        let trials = self.trials.iter_mut().map(|trial| &mut trial.settings);
        std::iter::once(&mut self.settings).chain(trials)
    }
}
