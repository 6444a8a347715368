//! The folder of an offline W&B run beside a run's result: `wandb sync output_dir/wandb/offline-run-*` sends it. A run that goes on
//! goes on under its id, in a folder more. Not here: what the file holds (core).

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tandem_core::report::Report;
use tandem_core::report::wandb::{Log, Run};
use tandem_router::time::calendar;

const FOLDER: &str = "wandb";
const OFFLINE: &str = "offline-run-";

/// What is told of a run.
#[derive(Clone, Debug)]
pub struct Asked {
    pub project: String,
    pub name: Option<String>,
    pub config: Map<String, Value>,
}

pub struct Open {
    file: File,
    log: Log,
}

impl Open {
    /// `before`: rows that the run has reported, where it goes on.
    pub fn begin(folder: &Path, asked: &Asked, before: Option<u64>, now_s: f64) -> io::Result<Open> {
        let all = folder.join(FOLDER);
        let known = match before {
            Some(_) => runs(folder)?.pop().and_then(|path| id_of(&path)),
            None => None,
        };
        let id = known.unwrap_or_else(|| new_id(folder));
        let [year, month, day, hour, minute, second] = calendar(now_s as i64);
        let own = all.join(format!(
            "{OFFLINE}{year:04}{month:02}{day:02}_{hour:02}{minute:02}{second:02}-{id}"
        ));
        fs::create_dir_all(&own)?;
        let mut file = File::create(own.join(format!("run-{id}.wandb")))?;
        let run = Run {
            id: &id,
            project: &asked.project,
            name: asked.name.as_deref(),
            config: &asked.config,
            began_s: now_s,
        };
        let (log, head) = Log::begin(&run, before.unwrap_or(0));
        file.write_all(&head)?;
        Ok(Open { file, log })
    }

    pub fn row(&mut self, report: &Report, now_s: f64) -> io::Result<()> {
        self.file.write_all(&self.log.row(report, now_s))
    }

    pub fn end(&mut self, now_s: f64) -> io::Result<()> {
        self.file.write_all(&self.log.end(now_s))
    }
}

/// Those of a run's folder, in order of their time.
pub fn runs(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let all = folder.join(FOLDER);
    if !all.is_dir() {
        return Ok(vec![]);
    }
    let mut found = vec![];
    for entry in fs::read_dir(all)? {
        let entry = entry?;
        if entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(OFFLINE))
        {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn id_of(run: &Path) -> Option<String> {
    Some(run.file_name()?.to_str()?.rsplit_once('-')?.1.to_owned())
}

/// Eight letters, as W&B has them.
fn new_id(folder: &Path) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = format!("{} {} {}", folder.display(), since.as_nanos(), std::process::id());
    let digest = Sha256::digest(seed);
    digest
        .iter()
        .take(8)
        .map(|byte| char::from(b'a' + byte % 26))
        .collect()
}
