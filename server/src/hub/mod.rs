//! Models, adapters and data sets by their names on a hub: found in the cache that huggingface_hub, transformers and vLLM
//! share, else downloaded into it. A path that exists goes before a name. Not here: what the files mean.

mod cache;
mod client;
mod dataset;
mod download;
mod error;
mod place;
mod progress;
mod wanted;

use std::path::{Path, PathBuf};

use tracing::{info, warn};

use cache::Repository;
use client::Client;
pub use error::HubError;
pub use place::Place;
use progress::Progress;
pub use wanted::Content;

/// Of a repository: the hub has a route and the cache a folder for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Model,
    Dataset,
}

impl Kind {
    /// In the hub's routes and the cache's folders.
    fn plural(self) -> &'static str {
        match self {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        }
    }

    /// What it is to a user.
    fn name(self) -> &'static str {
        match self {
            Kind::Model => "model or adapter",
            Kind::Dataset => "data set",
        }
    }
}

/// What is taken where nobody says: the branch that every repository has.
const REVISION: &str = "main";

/// `ORG/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoName(String);

impl RepoName {
    /// By the hub's own rules. `None`: the text can only be a path.
    pub fn parse(text: &str) -> Option<RepoName> {
        const MAX_CHARS: usize = 96;
        let is_name = |part: &str| {
            let is_known = |c: char| c.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&c);
            let joins = ['-', '.'];
            !part.is_empty()
                && part.chars().all(is_known)
                && !part.starts_with(joins)
                && !part.ends_with(joins)
                && !part.contains("--")
                && !part.contains("..")
        };
        let (owner, name) = text.split_once('/')?;
        let is_file = Path::new(name)
            .extension()
            .is_some_and(|end| ["gguf", "safetensors", "json"].iter().any(|known| end == *known));
        (text.len() <= MAX_CHARS && is_name(owner) && is_name(name) && !is_file)
            .then(|| RepoName(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The folder of a model or an adapter.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    pub folder: PathBuf,
    /// Where it is the hub's.
    pub name: Option<RepoName>,
}

/// The folder that `given` means: itself where it exists or cannot be a name of the hub, else the repository's in the
/// cache, which is filled first. Blocks as long as that takes, so it is not for an async worker's thread.
pub fn find(given: &Path, revision: Option<&str>, content: Content) -> Result<Found, HubError> {
    let name = given
        .to_str()
        .and_then(RepoName::parse)
        .filter(|_| !given.exists());
    match name {
        Some(name) => {
            let folder = get(&name, revision, content, None)?;
            Ok(Found {
                folder,
                name: Some(name),
            })
        }
        None => match revision {
            Some(revision) => Err(HubError::RevisionOfFolder {
                folder: given.to_owned(),
                revision: revision.to_owned(),
            }),
            None => Ok(Found {
                folder: given.to_owned(),
                name: None,
            }),
        },
    }
}

/// The files of a repository, in the cache or in `local_dir`. Blocks.
pub fn get(
    name: &RepoName,
    revision: Option<&str>,
    content: Content,
    local_dir: Option<&Path>,
) -> Result<PathBuf, HubError> {
    let place = Place::from_env(|variable| std::env::var(variable).ok());
    let revision = revision.unwrap_or(REVISION);
    let cached = Repository::new(&place.cache, Kind::Model, name);
    if place.is_offline {
        let whole = |folder: PathBuf| content.check_folder(&folder).map(|()| folder);
        return cached
            .snapshot(revision)
            .and_then(whole)
            .map_err(|why| HubError::Offline {
                name: name.0.clone(),
                why,
                cwd: std::env::current_dir().unwrap_or_default(),
            });
    }
    let client = Client::new(&place, Kind::Model, name)?;
    let fetched = runtime()?.block_on(fetch(&client, revision, content, local_dir, &cached));
    match fetched {
        // What was fetched once serves while the hub is away.
        Err(error @ HubError::Away { .. }) if local_dir.is_none() => match cached.snapshot(revision) {
            Ok(folder) if content.check_folder(&folder).is_ok() => {
                warn!(%error, folder = %folder.display(), "the hub does not answer: its files in the cache are taken");
                Ok(folder)
            }
            _ => Err(error),
        },
        fetched => fetched,
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, HubError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| HubError::Client(error.to_string()))
}

/// A split of a data set.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub name: &'a RepoName,
    pub revision: Option<&'a str>,
    /// Of a data set with several parts.
    pub config: Option<&'a str>,
    /// The first of these that is there.
    pub splits: &'a [&'a str],
}

/// Its files, in the cache. Blocks.
pub fn rows(asked: Rows) -> Result<Vec<PathBuf>, HubError> {
    let place = Place::from_env(|variable| std::env::var(variable).ok());
    let cached = Repository::new(&place.cache, Kind::Dataset, asked.name);
    let from_cache = |why_not: Option<HubError>| {
        let found = asked.in_cache(&cached);
        found.map_err(|why| match why_not {
            Some(error) => error,
            None => HubError::Offline {
                name: asked.name.0.clone(),
                why,
                cwd: std::env::current_dir().unwrap_or_default(),
            },
        })
    };
    if place.is_offline {
        return from_cache(None);
    }
    let client = Client::new(&place, Kind::Dataset, asked.name)?;
    match runtime()?.block_on(asked.fetch(&client, &cached)) {
        Err(error @ HubError::Away { .. }) => from_cache(Some(error)),
        fetched => fetched,
    }
}

/// Where the hub keeps data sets of other formats as Parquet.
const CONVERTED: &str = "refs/convert/parquet";
const README: &str = "README.md";

impl Rows<'_> {
    fn unfit(&self, why: String) -> HubError {
        HubError::Unfit {
            name: self.name.0.clone(),
            why,
        }
    }

    fn of(&self, splits: dataset::Splits) -> Result<Vec<String>, String> {
        let found = self
            .splits
            .iter()
            .map(|split| dataset::files_of(splits.clone(), split));
        found.reduce(Result::or).expect("a split is asked")
    }

    async fn fetch(&self, client: &Client<'_>, cached: &Repository) -> Result<Vec<PathBuf>, HubError> {
        let revision = self.revision.unwrap_or(REVISION);
        let listing = client.listing(revision).await?;
        let progress = Progress::new(client.name());
        let target = cache::Target::Cache(cached);
        let fetch = async |commit: &str, files: Vec<String>| {
            download::all(client, &target, commit, files, &progress).await
        };
        let has_readme = listing.files.iter().any(|file| file == README);
        fetch(
            &listing.commit,
            has_readme.then(|| README.to_owned()).into_iter().collect(),
        )
        .await?;
        let folder = target.folder(&listing.commit);
        let readme = std::fs::read_to_string(folder.join(README)).ok();
        let own = dataset::splits(&listing.files, readme.as_deref(), self.config);
        let (revision, commit, files) = match (own, self.revision) {
            (Ok(splits), _) => (revision, listing.commit, self.of(splits)),
            (Err(why), Some(_)) => return Err(self.unfit(why)),
            // Of other formats, or made by a program that nobody runs.
            (Err(why), None) => match client.listing(CONVERTED).await {
                Ok(listing) => {
                    let splits = dataset::converted(&listing.files, self.config);
                    (
                        CONVERTED,
                        listing.commit,
                        splits.and_then(|splits| self.of(splits)),
                    )
                }
                Err(_) => return Err(self.unfit(why)),
            },
        };
        let files = files.map_err(|why| self.unfit(why))?;
        fetch(&commit, files.clone()).await?;
        cached.write_ref(revision, &commit)?;
        progress.end();
        info!(
            dataset = client.name(),
            revision,
            commit,
            files = files.len(),
            downloaded = %tandem_backend::size(progress.downloaded_bytes()),
            "from the hub"
        );
        let folder = target.folder(&commit);
        Ok(files.iter().map(|file| folder.join(file)).collect())
    }

    /// What was fetched before: the splits are told from the files that are there.
    fn in_cache(&self, cached: &Repository) -> Result<Vec<PathBuf>, String> {
        let own = cached
            .snapshot(self.revision.unwrap_or(REVISION))
            .and_then(|folder| {
                let readme = std::fs::read_to_string(folder.join(README)).ok();
                let splits = dataset::splits(&cache::files(&folder), readme.as_deref(), self.config)?;
                Ok((folder, self.of(splits)?))
            });
        let (folder, files) = own.or_else(|why| {
            let folder = cached.snapshot(CONVERTED).map_err(|_| why)?;
            let splits = dataset::converted(&cache::files(&folder), self.config)?;
            Ok::<_, String>((folder, self.of(splits)?))
        })?;
        Ok(files.iter().map(|file| folder.join(file)).collect())
    }
}

async fn fetch(
    client: &Client<'_>,
    revision: &str,
    content: Content,
    local_dir: Option<&Path>,
    cached: &Repository,
) -> Result<PathBuf, HubError> {
    let listing = client.listing(revision).await?;
    let small = content.small_files(client.name(), &listing.files)?;
    let target = match local_dir {
        Some(folder) => cache::Target::Folder(folder),
        None => cache::Target::Cache(cached),
    };
    let progress = Progress::new(client.name());
    let fetch =
        async |files: Vec<String>| download::all(client, &target, &listing.commit, files, &progress).await;
    fetch(small).await?;
    let folder = target.folder(&listing.commit);
    let weights = content.weight_files(client.name(), &listing.files, &folder)?;
    fetch(weights).await?;
    // Last, so that a revision in the cache is a whole one.
    if let cache::Target::Cache(repository) = &target {
        repository.write_ref(revision, &listing.commit)?;
    }
    progress.end();
    info!(
        model = client.name(),
        revision,
        commit = listing.commit,
        folder = %folder.display(),
        downloaded = %tandem_backend::size(progress.downloaded_bytes()),
        "from the hub"
    );
    Ok(folder)
}
