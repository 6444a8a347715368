//! From the options of a replica to the engine's own: which model, how it runs, and how it is started again. Not here:
//! what starting means (backend).

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use tandem_backend::ranks::Team;
use tandem_router::fleet::{Made, Member};
use tandem_rpc::ModelFiles;

use crate::cli::ModelOptions;
use crate::demo;

/// The base model's folder and name. `data_dir` takes the demo model, when none is named.
pub fn model(options: &ModelOptions, data_dir: &Path) -> Result<(PathBuf, String)> {
    let (folder, own_name) = match &options.model {
        Some(folder) => {
            let whole = folder
                .canonicalize()
                .with_context(|| format!("--model {}", folder.display()))?;
            let name = whole
                .file_name()
                .map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
            (whole, name)
        }
        None => (
            demo::materialise(data_dir).context("cannot write the demo model")?,
            demo::NAME.to_owned(),
        ),
    };
    Ok((folder, options.served_model_name.clone().unwrap_or(own_name)))
}

/// What was not asked is the backend's to choose.
pub fn engine_options(options: &ModelOptions, folder: &Path, team: Team) -> Result<tandem_backend::Options> {
    let mut engine = tandem_backend::Options::new(folder.to_owned());
    engine.team = team;
    engine.device = tandem_backend::words::device(&options.device)?;
    engine.dtype = options.dtype.parse()?;
    engine.max_model_len = options.max_model_len;
    engine.kv_cache_bytes = options.kv_cache_memory_bytes;
    engine.threads = options.threads.map(|threads| threads as usize);
    engine.max_num_seqs = options.max_num_seqs.unwrap_or(engine.max_num_seqs);
    engine.max_num_batched_tokens = options
        .max_num_batched_tokens
        .unwrap_or(engine.max_num_batched_tokens);
    engine.max_loras = options.max_loras.unwrap_or(engine.max_loras);
    engine.training_share = options.training_share.unwrap_or(engine.training_share);
    engine.max_lora_rank = options.max_lora_rank.unwrap_or(engine.max_lora_rank);
    Ok(engine)
}

/// The replica of this process. It is started now, so that what is wrong with it is said at once; and again, whenever it
/// is lost.
pub fn member(options: tandem_backend::Options, model_name: String) -> Result<Member> {
    let files = ModelFiles::read(&options.model_folder).context("the model's files")?;
    let first = tandem_backend::start(options.clone()).context("the model")?;
    let first = Mutex::new(Some(first));
    Ok(Member::new("local", move || {
        let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (options, files, model_name) = (options.clone(), files.clone(), model_name.clone());
        async move {
            let replica = match first {
                Some(replica) => replica,
                None => start_again(options).await?,
            };
            Ok(Made {
                replica,
                files,
                model_name,
                hop: None,
            })
        }
    }))
}

async fn start_again(
    options: tandem_backend::Options,
) -> Result<tandem_core::replica::ReplicaHandle, String> {
    let started = tokio::task::spawn_blocking(move || tandem_backend::start(options)).await;
    match started {
        Ok(started) => started.map_err(|error| error.to_string()),
        Err(panic) => Err(panic.to_string()),
    }
}
