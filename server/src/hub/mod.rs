//! Models and adapters by their names on a hub: found in the cache that huggingface_hub, transformers and vLLM share,
//! else downloaded into it. A path that exists goes before a name. Not here: what the files mean.

mod cache;
mod client;
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
    let cached = Repository::new(&place.cache, name);
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| HubError::Client(error.to_string()))?;
    let client = Client::new(&place, name)?;
    let fetched = runtime.block_on(fetch(&client, revision, content, local_dir, &cached));
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
