//! What a folder of `tandem train` was made from, in its run.yaml: a run goes on only where the same was begun, and a
//! finished one is not done again. Not here: the state it goes on from (backend).

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use serde_norway::{Mapping, Value};
use sha2::{Digest, Sha256};
use tandem_core::job::selection::{self, Selection};
use tandem_core::job::{Hyper, Lora, Method, Optimizer, files};
use tandem_core::{gguf, id};

use super::{TrainError, logs};

const FILE: &str = "run.yaml";
/// Prefix of the folders in which a sweep's trials run: `trial-<number>`.
pub const TRIAL: &str = "trial-";
/// What a sweep writes of them: a line each.
pub const TRIALS: &str = "trials.csv";
/// What full training makes, where LoRA makes [`files::ADAPTER`].
pub const WEIGHTS: &str = "model.safetensors";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// By the names under which they are set.
    pub settings: Mapping,
    /// Digests of what goes in.
    pub inputs: Mapping,
    pub finished: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}", path.display())]
    Damaged {
        path: PathBuf,
        source: serde_norway::Error,
    },
    #[error(
        "output_dir {} holds another run: {}. overwrite_output_dir=true deletes what it left and begins anew; another output_dir keeps both",
        folder.display(),
        differences.join("; ")
    )]
    AnotherRun {
        folder: PathBuf,
        differences: Vec<String>,
    },
}

/// What there is to do in the output folder.
#[derive(Debug, PartialEq, Eq)]
pub enum Begin {
    /// From the start, or from the state that is there.
    Run,
    /// It is all done.
    Finished,
}

impl Record {
    /// Compares with what the folder has, and says in it what is done there from now on. `result`: what is there when
    /// all is done.
    pub fn begin(&self, folder: &Path, result: &str) -> Result<Begin, RecordError> {
        let there = read(folder)?;
        let differences = match &there {
            Some(there) => self.differences(there),
            None => match traces(folder)?.first() {
                Some(trace) => vec![format!("{} is there, and no {FILE}", trace.display())],
                None => Vec::new(),
            },
        };
        if !differences.is_empty() {
            return Err(RecordError::AnotherRun {
                folder: folder.to_owned(),
                differences,
            });
        }
        if there.is_some_and(|there| there.finished) && folder.join(result).exists() {
            return Ok(Begin::Finished);
        }
        self.write(folder)?;
        Ok(Begin::Run)
    }

    fn differences(&self, there: &Record) -> Vec<String> {
        let mut differences = Vec::new();
        let keys = |one: &Mapping, other: &Mapping| {
            let mut keys: Vec<Value> = one.keys().cloned().collect();
            keys.extend(other.keys().filter(|key| !one.contains_key(*key)).cloned());
            keys
        };
        for key in keys(&self.inputs, &there.inputs) {
            let name = show(Some(&key));
            match (there.inputs.get(&key), self.inputs.get(&key)) {
                (was, is) if was == is => {}
                (Some(_), Some(_)) => differences.push(format!("the content of {name} is another")),
                (None, _) => differences.push(format!("it had no {name}")),
                (_, None) => differences.push(format!("it had a {name}")),
            }
        }
        for key in keys(&self.settings, &there.settings) {
            let (was, is) = (there.settings.get(&key), self.settings.get(&key));
            if was != is {
                differences.push(format!(
                    "{} was {}, now it is {}",
                    show(Some(&key)),
                    show(was),
                    show(is)
                ));
            }
        }
        differences
    }

    pub fn finish(&mut self, folder: &Path) -> Result<(), RecordError> {
        self.finished = true;
        self.write(folder)
    }

    fn write(&self, folder: &Path) -> Result<(), RecordError> {
        let (path, fresh) = (folder.join(FILE), folder.join(format!(".{FILE}.partial")));
        let text = serde_norway::to_string(self).expect("plain data serialises");
        let write = || {
            let mut file = fs::File::create(&fresh)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&fresh, &path)
        };
        write().map_err(|source| RecordError::File {
            path: path.clone(),
            source,
        })
    }
}

fn read(folder: &Path) -> Result<Option<Record>, RecordError> {
    let path = folder.join(FILE);
    match fs::read_to_string(&path) {
        Ok(text) => serde_norway::from_str(&text)
            .map(Some)
            .map_err(|source| RecordError::Damaged { path, source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RecordError::File { path, source }),
    }
}

/// What a run writes beside its record.
fn traces(folder: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let fixed = [files::STATE, files::EARLIER_STATE, files::ADAPTER].map(|name| folder.join(name));
    let mut traces: Vec<PathBuf> = fixed.into_iter().filter(|path| path.exists()).collect();
    traces.extend(checkpoints(folder)?.into_iter().map(|(_, path)| path));
    Ok(traces)
}

/// Step and folder of each, the oldest first.
fn checkpoints(folder: &Path) -> Result<Vec<(u64, PathBuf)>, RecordError> {
    numbered(folder, files::CHECKPOINT)
}

/// What lies there under the prefix and a number, by number.
fn numbered(folder: &Path, prefix: &str) -> Result<Vec<(u64, PathBuf)>, RecordError> {
    let failed = |source| RecordError::File {
        path: folder.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            found.push((number, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// What an earlier run left, and nothing else that may lie there.
fn own(folder: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let mut paths = traces(folder)?;
    // A model is a run's own only where the run says so: the folder may be that of the base model, too.
    if read(folder)?
        .is_some_and(|record| record.finished && record.settings.get("method") == Some(&"full".into()))
    {
        paths.push(folder.join(WEIGHTS));
    }
    paths.extend(logs::files(folder).map_err(|source| RecordError::File {
        path: folder.to_owned(),
        source,
    })?);
    for (_, trial) in numbered(folder, TRIAL)?
        .into_iter()
        .filter(|(_, path)| path.is_dir())
    {
        paths.extend(own(&trial)?);
    }
    paths.push(folder.join(TRIALS));
    // The record last: until then the folder is known as what it was.
    paths.extend(
        files::INPUTS
            .into_iter()
            .chain([FILE])
            .map(|name| folder.join(name)),
    );
    paths.retain(|path| path.exists());
    Ok(paths)
}

/// Where an earlier run's files are until the one that takes their place has begun.
const ASIDE: &str = ".overwritten";

/// An earlier run that is to be overwritten: its files are out of the way, and come back where the new one cannot begin.
pub struct Aside {
    folder: PathBuf,
    /// Where each was.
    moved: Vec<PathBuf>,
}

impl Aside {
    pub fn set(folder: &Path) -> Result<Aside, RecordError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| RecordError::File { path, source }
        };
        let mut aside = Aside {
            folder: folder.to_owned(),
            moved: vec![],
        };
        let is_left = folder.join(ASIDE).exists();
        for path in own(folder)? {
            match is_left {
                // Of a run that was killed as it began: what it was to take the place of is there still.
                true => remove(path)?,
                false => {
                    let kept = aside.kept(&path);
                    fs::create_dir_all(kept.parent().expect("it lies in a folder")).map_err(at(&kept))?;
                    fs::rename(&path, &kept).map_err(at(&path))?;
                    aside.moved.push(path);
                }
            }
        }
        // What somebody else put there stays.
        for (_, trial) in numbered(folder, TRIAL)? {
            let _ = fs::remove_dir(trial);
        }
        Ok(aside)
    }

    fn kept(&self, path: &Path) -> PathBuf {
        let name = path.strip_prefix(&self.folder).expect("it is the run's own");
        self.folder.join(ASIDE).join(name)
    }

    /// The new run has begun.
    pub fn discard(self) -> Result<(), RecordError> {
        let aside = self.folder.join(ASIDE);
        match aside.exists() {
            true => remove(aside),
            false => Ok(()),
        }
    }

    /// The new run cannot begin: all is as it was.
    pub fn restore(self) -> Result<(), RecordError> {
        own(&self.folder)?.into_iter().try_for_each(remove)?;
        for path in self.moved.iter().rev() {
            let folder = path.parent().expect("it lies in a folder");
            let back = fs::create_dir_all(folder).and_then(|()| fs::rename(self.kept(path), path));
            back.map_err(|source| RecordError::File {
                path: path.clone(),
                source,
            })?;
        }
        self.discard()
    }
}

/// What `begin` gives. Where it fails, what is aside comes back.
pub fn in_place_of<T>(
    aside: Option<Aside>,
    begin: impl FnOnce() -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    match (begin(), aside) {
        (Ok(begun), aside) => {
            aside.map_or(Ok(()), Aside::discard)?;
            Ok(begun)
        }
        (Err(error), aside) => {
            aside.map_or(Ok(()), Aside::restore)?;
            Err(error)
        }
    }
}

/// Keeps the newest `limit` checkpoints, `best` among them.
pub fn prune(folder: &Path, best: Option<u64>, limit: u32) -> Result<(), RecordError> {
    let checkpoints = checkpoints(folder)?;
    let steps: Vec<u64> = checkpoints.iter().map(|(step, _)| *step).collect();
    let surplus = selection::surplus(&steps, best, limit as usize);
    checkpoints
        .into_iter()
        .filter(|(step, _)| surplus.contains(step))
        .try_for_each(|(_, path)| remove(path))
}

fn remove(path: PathBuf) -> Result<(), RecordError> {
    let removed = match path.is_dir() {
        true => fs::remove_dir_all(&path),
        false => fs::remove_file(&path),
    };
    removed.map_err(|source| RecordError::File { path, source })
}

/// Every number of the run, under the name by which it is set.
pub fn settings(hyper: &Hyper) -> Mapping {
    let Hyper {
        n_epochs,
        max_steps,
        max_steps_per_epoch,
        batch_size,
        gradient_accumulation_steps,
        learning_rate,
        lr_scheduler,
        warmup_steps,
        optimizer,
        weight_decay,
        adam_beta1,
        adam_beta2,
        adam_epsilon,
        max_grad_norm,
        loraplus_lr_ratio,
        neftune_noise_alpha,
        seed,
        max_seq_length,
        packing,
        shuffle,
        save_strategy,
        save_steps,
        eval_steps,
        selection,
        objective,
        frozen_layers,
        method,
    } = hyper;
    let mut settings = Mapping::new();
    let mut put = |name: &str, value: Value| drop(settings.insert(name.into(), value));
    match method {
        Method::Full => {
            put("method", "full".into());
            if *frozen_layers > 0 {
                put("num_freeze_layers", (*frozen_layers).into());
            }
        }
        Method::Lora(Lora {
            r,
            alpha,
            dropout,
            target_modules,
            use_rslora,
            use_dora,
        }) => {
            put("method", "lora".into());
            put("lora_r", (*r).into());
            put("lora_alpha", (*alpha).into());
            put("lora_dropout", (*dropout).into());
            let modules = target_modules.iter().map(|name| Value::from(name.as_str()));
            put("lora_target_modules", Value::Sequence(modules.collect()));
            put("use_rslora", (*use_rslora).into());
            put("use_dora", (*use_dora).into());
        }
    }
    put("objective", objective.name().into());
    if let Some(loss_type) = objective.loss_type() {
        put("loss_type", loss_type.into());
    }
    for (name, number) in objective.numbers() {
        put(name, number.into());
    }
    match n_epochs.fract() {
        0.0 => put("n_epochs", (*n_epochs as u64).into()),
        _ => put("n_epochs", (*n_epochs).into()),
    }
    if let Some(max_steps) = max_steps {
        put("max_steps", (*max_steps).into());
    }
    if let Some(most) = max_steps_per_epoch {
        put("max_steps_per_epoch", (*most).into());
    }
    put("batch_size", (*batch_size).into());
    put(
        "gradient_accumulation_steps",
        (*gradient_accumulation_steps).into(),
    );
    put("learning_rate", (*learning_rate).into());
    put("lr_scheduler_type", lr_scheduler.name().into());
    for (name, number) in lr_scheduler.numbers() {
        // A setting of that name is a rate.
        let number = if name == "lr_end" {
            number * learning_rate
        } else {
            number
        };
        put(name, number.into());
    }
    put("warmup_steps", (*warmup_steps).into());
    put("optim", optimizer.name().into());
    match *optimizer {
        Optimizer::Sgd { momentum, nesterov } => {
            put("momentum", momentum.into());
            put("nesterov", nesterov.into());
        }
        Optimizer::Adafactor { scale_parameter } => put("scale_parameter", scale_parameter.into()),
        Optimizer::AdamW | Optimizer::AdamW8bit | Optimizer::Lion => {}
    }
    put("weight_decay", (*weight_decay).into());
    put("max_grad_norm", (*max_grad_norm).into());
    if let Some(ratio) = loraplus_lr_ratio {
        put("loraplus_lr_ratio", (*ratio).into());
    }
    if let Some(alpha) = neftune_noise_alpha {
        put("neftune_noise_alpha", (*alpha).into());
    }
    put("adam_beta1", (*adam_beta1).into());
    put("adam_beta2", (*adam_beta2).into());
    put("adam_epsilon", (*adam_epsilon).into());
    put("max_seq_length", (*max_seq_length).into());
    put("packing", (*packing).into());
    put("shuffle", (*shuffle).into());
    put("save_strategy", save_strategy.name().into());
    put("save_steps", (*save_steps).into());
    put("eval_steps", (*eval_steps).into());
    if let Some(Selection {
        metric,
        greater_is_better,
        load_best,
        patience,
        threshold,
    }) = selection
    {
        put("metric_for_best_model", metric.as_str().into());
        put("greater_is_better", (*greater_is_better).into());
        put("load_best_model_at_end", (*load_best).into());
        if let Some(patience) = patience {
            put("early_stopping_patience", (*patience).into());
            put("early_stopping_threshold", (*threshold).into());
        }
    }
    put("seed", (*seed).into());
    settings
}

/// A value as it would stand in a recipe, on one line.
pub fn show(value: Option<&Value>) -> String {
    match value {
        None => "not set".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Sequence(items)) => {
            let items: Vec<String> = items.iter().map(|item| show(Some(item))).collect();
            format!("[{}]", items.join(", "))
        }
        Some(value) => {
            serde_norway::to_string(value).map_or_else(|_| "?".to_owned(), |text| text.trim_end().to_owned())
        }
    }
}

pub fn digest(bytes: &[u8]) -> Value {
    id::Digest(Sha256::digest(bytes).into()).to_string().into()
}

/// What stands for a model's content without reading all of it: names, sizes and times of its files.
pub fn model_digest(model: &Path) -> io::Result<Value> {
    let (folder, first) = match (model.is_file(), model.parent(), model.file_name()) {
        (true, Some(folder), Some(name)) => (folder, Some(name.to_string_lossy())),
        _ => (model, None),
    };
    let parts = first.map(|first| gguf::siblings(&first).unwrap_or_else(|_| vec![first.into_owned()]));
    let is_its_own = |name: &String| match &parts {
        Some(parts) => parts.contains(name),
        None => name == "config.json" || name.ends_with(".safetensors"),
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_its_own(&name) {
            let about = fs::metadata(entry.path())?;
            let changed = about.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            files.push((name, about.len(), changed.as_secs()));
        }
    }
    files.sort();
    Ok(digest(format!("{files:?}").as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(learning_rate: f64, data: &str, validation: Option<&str>) -> Record {
        let settings = [
            ("learning_rate".into(), learning_rate.into()),
            ("seed".into(), 7.into()),
        ];
        let mut inputs = Mapping::from_iter([("training_file".into(), digest(data.as_bytes()))]);
        if let Some(validation) = validation {
            inputs.insert("validation_file".into(), digest(validation.as_bytes()));
        }
        Record {
            settings: settings.into_iter().collect(),
            inputs,
            finished: false,
        }
    }

    #[test]
    fn a_folder_goes_on_with_the_same_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = record(1e-4, "rows", Some("held out"));
        let begin = |record: &Record| {
            record
                .begin(folder.path(), files::ADAPTER)
                .map_err(|error| error.to_string())
        };
        assert_eq!(begin(&run), Ok(Begin::Run));
        assert_eq!(begin(&run), Ok(Begin::Run));
        for (other, expected) in [
            (
                record(2e-4, "rows", Some("held out")),
                "learning_rate was 0.0001, now it is 0.0002",
            ),
            (
                record(1e-4, "sows", Some("held out")),
                "the content of training_file is another",
            ),
            (record(1e-4, "rows", None), "it had a validation_file"),
        ] {
            let message = begin(&other).unwrap_err();
            assert!(
                message.contains(expected) && message.contains("overwrite_output_dir=true"),
                "{message}"
            );
        }
        run.finish(folder.path()).unwrap();
        let again = record(1e-4, "rows", Some("held out"));
        assert_eq!(begin(&again), Ok(Begin::Run), "its result is gone");
        run.finish(folder.path()).unwrap();
        fs::create_dir(folder.path().join(files::ADAPTER)).unwrap();
        assert_eq!(begin(&again), Ok(Begin::Finished));
        assert!(begin(&record(1e-4, "rows", None)).is_err());
        Aside::set(folder.path()).unwrap().discard().unwrap();
        assert_eq!(begin(&record(1e-4, "rows", None)), Ok(Begin::Run));
    }

    #[test]
    fn only_a_runs_own_files_go() {
        let folder = tempfile::tempdir().unwrap();
        let there = |name: &str| folder.path().join(name).exists();
        for name in ["notes.txt", "model.safetensors", files::STATE, files::VALID] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        for name in [
            "checkpoint-2",
            "checkpoint-10",
            "checkpoint-9",
            "checkpoint-mine",
            files::ADAPTER,
        ] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let message = record(1.0, "", None)
            .begin(folder.path(), files::ADAPTER)
            .unwrap_err()
            .to_string();
        assert!(message.contains(files::STATE), "{message}");
        prune(folder.path(), None, 2).unwrap();
        assert!(!there("checkpoint-2") && there("checkpoint-9") && there("checkpoint-10"));
        // What cannot begin leaves everything as it was.
        let listed = || {
            let entries = fs::read_dir(folder.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let before = listed();
        let aside = Aside::set(folder.path()).unwrap();
        assert!(!there(files::ADAPTER) && !there("checkpoint-9") && there("model.safetensors"));
        fs::write(folder.path().join(files::VALID), "of the new one").unwrap();
        aside.restore().unwrap();
        assert_eq!(listed(), before);
        assert_eq!(fs::read_to_string(folder.path().join(files::VALID)).unwrap(), "x");
        Aside::set(folder.path()).unwrap().discard().unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["checkpoint-mine", "model.safetensors", "notes.txt"]);
    }
}
