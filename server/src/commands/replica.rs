//! From the options of a replica to the engine's own: which model, how it runs, and how it is started again. Not here:
//! what starting means (backend).

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use tandem_backend::ranks::Team;
use tandem_router::fleet::{Made, Member};
use tandem_rpc::ModelFiles;
use tandem_text::Tokenizer;
use tracing::info;

use crate::cli::ModelOptions;
use crate::demo;
use crate::exit::WrongSetting;
use crate::hub::{self, Content, Found};

/// The base model's folder and names. `data_dir` takes the demo model, when none is named.
pub fn model(options: &ModelOptions, data_dir: &Path) -> Result<(PathBuf, Vec<String>)> {
    let given = &options.served_model_name;
    let Some(folder) = options.folder() else {
        // `--served-model-name a ./model` swallows what was meant to be the model.
        if let Some(folder) = given.iter().find(|name| Path::new(name).is_dir()) {
            bail!(WrongSetting(format!(
                "--served-model-name took {folder:?} for a name: put the model's folder before it, or use --model"
            )));
        }
        let folder = demo::materialise(data_dir).context("cannot write the demo model")?;
        return Ok((folder, names(given.clone(), || demo::NAME.to_owned())));
    };
    let Found { folder, name } = hub::find(folder, options.revision.as_deref(), Content::Model)?;
    tandem_backend::weights::check_folder(&folder)?;
    let whole = whole_path(&folder).with_context(|| format!("the model {}", folder.display()))?;
    let of_path = if whole.is_file() {
        whole.file_stem()
    } else {
        whole.file_name()
    };
    let own_name = || match (name, of_path) {
        (Some(name), _) => name.as_str().to_owned(),
        (None, Some(name)) => name.to_string_lossy().into_owned(),
        (None, None) => "model".to_owned(),
    };
    let names = names(given.clone(), own_name);
    Ok((whole, names))
}

/// From the root on. A file keeps the name that it was given by: where it is a link, what it points to (a blob of the hub's
/// cache) may be called anything and lie without the other parts.
pub fn whole_path(model: &Path) -> std::io::Result<PathBuf> {
    let path = std::path::absolute(model)?;
    match (path.is_file(), path.parent(), path.file_name()) {
        (true, Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
        _ => model.canonicalize(),
    }
}

/// Each once, in their order.
pub fn names(given: Vec<String>, own: impl FnOnce() -> String) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in given {
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() {
        names.push(own());
    }
    names
}

/// The small files that travel with a replica's description.
pub fn files(model: &Path) -> Result<ModelFiles> {
    match model.is_file() {
        true => Ok(ModelFiles::made(
            tandem_text::tokenizer::gguf::files(model).context("the model's tokenizer")?,
        )),
        false => ModelFiles::read(model).context("the model's files"),
    }
}

/// What was not asked is the backend's to choose.
pub fn engine_options(
    options: &ModelOptions,
    folder: &Path,
    data_dir: &Path,
    team: Team,
    tokenizer: &Tokenizer,
) -> Result<tandem_backend::Options> {
    let mut engine = tandem_backend::Options::new(folder.to_owned());
    engine.digests = Some(data_dir.join("weights.json"));
    engine.team = team;
    engine.vocabulary = Some(Arc::new(tokenizer.vocabulary()));
    engine.device = tandem_backend::words::device(&options.device)?;
    engine.dtype = options.dtype.parse()?;
    if ["half", "float16", "fp16", "f16"].contains(&options.dtype.as_str()) {
        info!(
            dtype = options.dtype,
            "16 bits of a weight are bfloat16 here; --dtype float32 rounds nothing"
        );
    }
    engine.quantization = options.quantization.as_deref().map(str::parse).transpose()?;
    engine.kv_cache_dtype = tandem_backend::words::kv_cache_dtype(&options.kv_cache_dtype)?;
    engine.deterministic = options.deterministic;
    let lookup = options.speculative_config.as_deref();
    engine.lookup = lookup
        .map(tandem_backend::words::speculative_config)
        .transpose()?;
    engine.max_model_len = options.max_model_len;
    engine.kv_cache_bytes = options.kv_cache_memory_bytes;
    engine.threads = options.threads.map(|threads| threads as usize);
    engine.max_num_seqs = options.max_num_seqs.unwrap_or(engine.max_num_seqs);
    engine.max_num_batched_tokens = options
        .max_num_batched_tokens
        .unwrap_or(engine.max_num_batched_tokens);
    engine.max_loras = options.max_loras.unwrap_or(engine.max_loras);
    engine.max_training_jobs = options.max_training_jobs.unwrap_or(engine.max_training_jobs);
    engine.training_share = options.training_share.unwrap_or(engine.training_share);
    engine.target_itl = options
        .target_itl_ms
        .map(|ms| std::time::Duration::from_millis(ms.into()));
    engine.seed = options.seed;
    engine.max_lora_rank = options.max_lora_rank.unwrap_or(engine.max_lora_rank);
    Ok(engine)
}

/// The replica of this process. It is started now, so that what is wrong with it is said at once; and again, whenever it
/// is lost.
pub fn member(options: tandem_backend::Options, model_name: String) -> Result<Member> {
    let files = files(&options.model_folder)?;
    let place = options.model_folder.display().to_string();
    let first = tandem_backend::start(options.clone()).with_context(|| format!("the model in {place}"))?;
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
