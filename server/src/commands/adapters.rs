//! `tandem adapters`: what there is, in PEFT folders below a folder, in a data folder (beside the server that has it open) or in a
//! running server. Not here: what an adapter does.

use std::collections::BTreeMap;
use std::fs;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use reqwest::{Client, Method, Url};
use serde_json::Value;
use tandem_store::{Keys, NameRow, Source, names_in};

use super::block_on;
use crate::cli::Adapters;
use crate::exit::WrongSetting;
use crate::output;

const CONFIG: &str = "adapter_config.json";
const TENSORS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
const CARD: &str = "README.md";
/// What a run of `tandem train` leaves beside its adapter.
const RUN: &str = "run.yaml";
/// Folders in folders that are looked into.
const DEPTH: usize = 8;

pub fn run(command: &Adapters) -> Result<()> {
    match command {
        Adapters::Ls { folder, server } => {
            let adapters = match (&server.url, folder) {
                (Some(_), Some(folder)) => {
                    let folder = folder.display();
                    bail!(WrongSetting(format!("{folder} and --url: give one of them")));
                }
                (Some(url), None) => block_on(of_server(url, server.api_key.as_deref()))?,
                (None, folder) => block_on(below(&place(folder.as_deref())))?,
            };
            let lines = adapters.iter().map(|adapter| adapter.line() + "\n");
            output::say(format_args!("{}", lines.collect::<String>()));
            Ok(())
        }
        Adapters::Show {
            adapter,
            data_dir,
            server,
        } => {
            let adapters = match &server.url {
                Some(url) => block_on(of_server(url, server.api_key.as_deref()))?,
                None if Path::new(adapter).is_dir() => vec![Adapter::of_folder(Path::new(adapter))?],
                None => block_on(below(data_dir))?,
            };
            let is_meant = |found: &&Adapter| found.called == *adapter || Path::new(adapter).is_dir();
            match adapters.iter().find(is_meant) {
                Some(adapter) => output::say(format_args!("{}", adapter.page())),
                None => bail!(WrongSetting(format!(
                    "there is no adapter {adapter}: {}",
                    known(&adapters)
                ))),
            }
            Ok(())
        }
        Adapters::Rm { adapter, server } => match &server.url {
            Some(url) => block_on(forget(url, server.api_key.as_deref(), adapter)),
            None => remove(Path::new(adapter)),
        },
    }
}

fn known(adapters: &[Adapter]) -> String {
    match adapters {
        [] => "none was found".to_owned(),
        adapters => {
            let names: Vec<&str> = adapters.iter().map(|adapter| adapter.called.as_str()).collect();
            format!("there are {}", names.join(", "))
        }
    }
}

/// Without a folder: the data folder of a server that is started here, else here.
fn place(folder: Option<&Path>) -> PathBuf {
    let own = Path::new("./tandem-data");
    match folder {
        Some(folder) => folder.to_owned(),
        None if own.is_dir() => own.to_owned(),
        None => PathBuf::from("."),
    }
}

/// What is known of one, by what it is called: a name, else a folder.
#[derive(Default)]
struct Adapter {
    called: String,
    /// In the order in which they are shown. The first are a line's.
    facts: Vec<(&'static str, String)>,
}

const IN_LINES: [&str; 5] = ["rank", "base", "modules", "size", "made by"];

impl Adapter {
    fn of_folder(folder: &Path) -> Result<Adapter> {
        let file = folder.join(CONFIG);
        let config = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let config: Value = serde_json::from_slice(&config)
            .map_err(|error| WrongSetting(format!("{} is not JSON: {error}", file.display())))?;
        let text = |name: &str| match &config[name] {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            Value::Array(items) => {
                let items = items
                    .iter()
                    .map(|item| item.as_str().map_or(item.to_string(), str::to_owned));
                let mut items: Vec<String> = items.collect();
                items.sort();
                items.join(",")
            }
            other => other.to_string(),
        };
        let bytes = TENSORS
            .iter()
            .find_map(|name| Some(folder.join(name).metadata().ok()?.len()));
        let mut facts = vec![
            ("rank", text("r")),
            ("base", text("base_model_name_or_path")),
            ("modules", text("target_modules")),
            (
                "size",
                bytes.map_or("no tensors".to_owned(), tandem_backend::size),
            ),
            ("made by", maker(folder).unwrap_or_default()),
            ("folder", folder.display().to_string()),
            ("alpha", text("lora_alpha")),
            ("kind", text("peft_type")),
        ];
        for name in [
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "lora_dropout",
        ] {
            if !["", "false", "{}", "0.0", "0"].contains(&text(name).as_str()) {
                facts.push((name, text(name)));
            }
        }
        Ok(Adapter {
            called: folder.display().to_string(),
            facts,
        })
    }

    /// What is wrong with one hides no others.
    fn readable(folder: &Path) -> Option<Adapter> {
        let read = Adapter::of_folder(folder);
        read.inspect_err(|error| note!("{}", printable(&format!("{error:#}"))))
            .ok()
    }

    fn named(self, row: &NameRow) -> Adapter {
        let NameRow {
            name,
            digest,
            rank: _,
            source,
            created_at,
            tenant,
            request,
        } = row;
        let mut adapter = Adapter {
            called: name.clone(),
            ..self
        };
        adapter.put("made by", made_by(source));
        adapter.put("tenant", tenant.clone());
        adapter.put("digest", digest.to_string());
        adapter.put("named at (s since 1970)", created_at.to_string());
        let request: Option<Value> = request
            .as_ref()
            .and_then(|request| serde_json::from_str(request).ok());
        if let Some(files) = request.as_ref().map(|request| &request["training_file"]) {
            adapter.put("training_file", files.to_string());
        }
        adapter
    }

    /// A model of a server's list; `None`: it is the base.
    fn of_list(model: &Value) -> Option<Adapter> {
        let text = |name: &str| model[name].as_str().map(str::to_owned);
        let rank = model["lora_rank"].as_u64()?;
        let source = match (text("fine_tuning_job_id"), model["step_number"].as_u64()) {
            (Some(job), step) => Source::Job { job, step },
            (None, _) => Source::Loaded,
        };
        Some(Adapter {
            called: text("id")?,
            facts: vec![
                ("rank", rank.to_string()),
                ("base", text("parent").unwrap_or_default()),
                ("made by", made_by(&source)),
                ("digest", text("root").unwrap_or_default()),
            ],
        })
    }

    fn put(&mut self, name: &'static str, value: String) {
        match self.facts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.facts.push((name, value)),
        }
    }

    fn line(&self) -> String {
        let fact = |name: &str| self.facts.iter().find(|(known, _)| *known == name);
        let columns = IN_LINES
            .iter()
            .map(|name| fact(name).map_or("", |(_, value)| value.as_str()));
        let columns = std::iter::once(self.called.as_str()).chain(columns);
        columns.map(printable).collect::<Vec<_>>().join("\t")
    }

    fn page(&self) -> String {
        let facts = self.facts.iter().filter(|(_, value)| !value.is_empty());
        let lines = facts.map(|(name, value)| format!("{name:<24} {}\n", printable(value)));
        format!("{}\n{}", printable(&self.called), lines.collect::<String>())
    }
}

/// Adapters come from anywhere, and a terminal obeys control characters.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| match c.is_control() {
            true => c.escape_default().collect::<Vec<_>>(),
            false => vec![c],
        })
        .collect()
}

fn made_by(source: &Source) -> String {
    match source {
        Source::Loaded => "loaded".to_owned(),
        Source::Flag => "--lora-modules".to_owned(),
        Source::Job { job, step: None } => job.clone(),
        Source::Job {
            job,
            step: Some(step),
        } => format!("{job}, after step {step}"),
    }
}

/// `out/adapter` and `out/checkpoint-4` of a run of `tandem train`.
fn maker(folder: &Path) -> Option<String> {
    let run = folder.parent()?.join(RUN);
    let step = folder.file_name()?.to_str()?.strip_prefix("checkpoint-");
    let step = step.map_or(String::new(), |step| format!(", after step {step}"));
    run.exists()
        .then(|| format!("tandem train ({}){step}", run.display()))
}

async fn below(folder: &Path) -> Result<Vec<Adapter>> {
    let mut found = vec![];
    let mut folders = vec![(folder.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        if Keys::may_lie_in(&folder) {
            found.extend(of_data_folder(&folder).await?);
            continue;
        }
        if folder.join(CONFIG).is_file() {
            found.extend(Adapter::readable(&folder));
            continue;
        }
        let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut within: Vec<PathBuf> = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .filter(|path| {
                !path
                    .file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with('.'))
            })
            .collect();
        within.sort();
        if depth < DEPTH {
            folders.extend(within.into_iter().rev().map(|path| (path, depth + 1)));
        }
    }
    Ok(found)
}

/// Every name, and what has none.
async fn of_data_folder(folder: &Path) -> Result<Vec<Adapter>> {
    let names = names_in(folder).await.context("the database")?;
    let mut by_digest: BTreeMap<String, Vec<&NameRow>> = BTreeMap::new();
    for row in &names {
        by_digest.entry(row.digest.to_string()).or_default().push(row);
    }
    let mut found = vec![];
    let place = folder.join("adapters");
    let entries = fs::read_dir(&place).with_context(|| format!("cannot read {}", place.display()))?;
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    folders.sort();
    for folder in folders.iter().filter(|folder| folder.join(CONFIG).is_file()) {
        let digest = folder.file_name().unwrap_or_default().to_string_lossy();
        match by_digest.get(&*digest) {
            None => found.extend(Adapter::readable(folder)),
            Some(rows) => {
                for row in rows {
                    found.extend(Adapter::readable(folder).map(|adapter| adapter.named(row)));
                }
            }
        }
    }
    Ok(found)
}

async fn of_server(url: &str, key: Option<&str>) -> Result<Vec<Adapter>> {
    let models = ask(Method::GET, url, &["v1", "models"], key).await?;
    let models = models["data"].as_array().into_iter().flatten();
    Ok(models.filter_map(Adapter::of_list).collect())
}

async fn forget(url: &str, key: Option<&str>, name: &str) -> Result<()> {
    ask(Method::DELETE, url, &["v1", "models", name], key).await?;
    say!("{name} is no model of {url} any more");
    Ok(())
}

async fn ask(method: Method, url: &str, path: &[&str], key: Option<&str>) -> Result<Value> {
    let wrong = || {
        WrongSetting(format!(
            "--url {url}: an address such as http://localhost:8000 is wanted"
        ))
    };
    let mut place = Url::parse(url).map_err(|_| wrong())?;
    place
        .path_segments_mut()
        .map_err(|()| wrong())?
        .pop_if_empty()
        .extend(path);
    tandem_store::use_ring();
    let mut request = Client::builder()
        .build()
        .context("a client")?
        .request(method, place);
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    let answer = request
        .send()
        .await
        .with_context(|| format!("nobody answers at {url}"))?;
    let status = answer.status();
    let body = answer
        .bytes()
        .await
        .with_context(|| format!("{url} breaks off"))?;
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    match status.is_success() {
        true => Ok(body),
        false => {
            let message = body["error"]["message"].as_str().unwrap_or("it does not say why");
            bail!("{url} answers {status}: {message}")
        }
    }
}

/// The adapter's own files; what else lies there stays.
fn remove(folder: &Path) -> Result<()> {
    let shown = folder.display();
    // Without a slash behind it, which would follow a link.
    if let Ok(target) = fs::read_link(folder.components().collect::<PathBuf>()) {
        bail!(WrongSetting(format!(
            "{shown} is a link to {}: give that folder, or remove the link itself",
            target.display()
        )));
    }
    if !folder.join(CONFIG).is_file() {
        bail!(WrongSetting(format!(
            "{shown} is no PEFT folder: give one, or --url for a name of a running server"
        )));
    }
    let whole = folder
        .canonicalize()
        .with_context(|| format!("cannot read {shown}"))?;
    if let Some(data) = whole.ancestors().find(|folder| is_data_folder(folder)) {
        bail!(WrongSetting(format!(
            "{shown} lies in {}, whose database speaks of it: `tandem adapters rm NAME --url URL` asks the server",
            data.display()
        )));
    }
    let own = [CONFIG].iter().chain(&TENSORS).map(|name| whole.join(name));
    for file in own.filter(|file| file.exists()) {
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
    }
    let left = || -> std::io::Result<Vec<String>> {
        let entries = fs::read_dir(&whole)?.collect::<Result<Vec<_>, _>>()?;
        Ok(entries
            .iter()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect())
    };
    let mut others = left().with_context(|| format!("cannot read {shown}"))?;
    if others == [CARD] {
        fs::remove_file(whole.join(CARD)).with_context(|| format!("cannot remove {shown}/{CARD}"))?;
        others.clear();
    }
    match others.is_empty() {
        true => match fs::remove_dir(&whole) {
            Ok(()) => say!("{shown} is gone"),
            Err(error) => say!("the adapter in {shown} is gone; the empty folder stays: {error}"),
        },
        false => say!("the adapter in {shown} is gone; {} stay", others.join(", ")),
    }
    Ok(())
}

fn is_data_folder(folder: &Path) -> bool {
    Keys::may_lie_in(folder) || folder.join("store.json").is_file()
}
