//! Why something could not be had from a hub, and what to do.

use std::io;
use std::path::PathBuf;

use super::Kind;

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "cannot reach {endpoint} for {name}: {why}. HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 takes what is in the cache"
    )]
    Away {
        endpoint: String,
        name: String,
        why: String,
    },
    #[error(
        "there is no folder {name} in {}, and HF_HUB_OFFLINE keeps from asking the hub: {why}",
        cwd.display()
    )]
    Offline { name: String, why: String, cwd: PathBuf },
    #[error("{name} is gated: {how} ({endpoint}/{name})")]
    Gated {
        endpoint: String,
        name: String,
        how: &'static str,
    },
    #[error(
        "{endpoint} does not accept the token in HF_TOKEN (or of `hf auth login`): {endpoint}/settings/tokens makes one"
    )]
    Token { endpoint: String },
    #[error(
        "there is no {} {name} in {}, and no {} {name} on {endpoint}{}",
        if *kind == Kind::Dataset { "file" } else { "folder" },
        cwd.display(),
        kind.name(),
        if *has_token { " that this token may see" } else { "; if it is private, set HF_TOKEN" }
    )]
    Unknown {
        endpoint: String,
        kind: Kind,
        name: String,
        has_token: bool,
        cwd: PathBuf,
    },
    #[error("{name} has no revision {revision:?}: {endpoint}/{name}/tree/main shows its branches and tags")]
    Revision {
        endpoint: String,
        name: String,
        revision: String,
    },
    #[error("{endpoint}{path} answers {status} {said}")]
    Refused {
        endpoint: String,
        path: String,
        status: u16,
        said: String,
    },
    #[error("{name} on the hub cannot be used: {why}")]
    Unfit { name: String, why: String },
    #[error("{url} does not answer as a hub does: {why}")]
    Strange { url: String, why: String },
    #[error("{file} broke off after {got} of {size} bytes")]
    Cut { file: String, got: u64, size: u64 },
    #[error(
        "{file} of {name} was damaged on its way: its SHA-256 is {got}, the hub's is {expected}. It is removed; try again"
    )]
    Damaged {
        name: String,
        file: String,
        expected: String,
        got: String,
    },
    #[error("{}: {error}{}", path.display(), elsewhere(error))]
    Disk { path: PathBuf, error: io::Error },
    #[error("{} is a folder of this machine: --revision {revision} is for names of the hub", folder.display())]
    RevisionOfFolder { folder: PathBuf, revision: String },
    #[error("the HTTP client: {0}")]
    Client(String),
}

fn elsewhere(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ". What is there is kept, and the next try goes on from it; HF_HOME (or HF_HUB_CACHE) puts the cache elsewhere"
        }
        _ => ". HF_HOME (or HF_HUB_CACHE) puts the cache elsewhere",
    }
}

impl HubError {
    /// Another try may do better.
    pub fn may_pass(&self) -> bool {
        matches!(self, HubError::Away { .. } | HubError::Cut { .. })
    }

    /// The name leads nowhere.
    pub fn is_unknown(&self) -> bool {
        matches!(
            self,
            HubError::Unknown { .. } | HubError::Revision { .. } | HubError::Offline { .. }
        )
    }
}

/// An answer that is no success.
pub(super) struct Refusal<'a> {
    pub endpoint: &'a str,
    pub kind: Kind,
    pub name: &'a str,
    pub revision: &'a str,
    pub has_token: bool,
    pub status: u16,
    /// The hub's own word for it, if any.
    pub code: &'a str,
    pub said: &'a str,
    pub path: &'a str,
}

impl Refusal<'_> {
    pub fn into_error(self) -> HubError {
        let Refusal {
            endpoint,
            kind,
            name,
            revision,
            has_token,
            status,
            code,
            said,
            path,
        } = self;
        let (endpoint, name) = (endpoint.to_owned(), name.to_owned());
        match (code, status) {
            ("GatedRepo", _) => HubError::Gated {
                endpoint,
                name,
                how: match has_token {
                    true => "the account of this token has no access; ask for it on the model's page",
                    false => {
                        "ask for access on the model's page, and set HF_TOKEN to a token of that account"
                    }
                },
            },
            ("RevisionNotFound", _) => HubError::Revision {
                endpoint,
                name,
                revision: revision.to_owned(),
            },
            // The hub answers 401 for what does not exist, too, so as not to say what is private.
            (_, 401) if has_token && said.contains("Invalid credentials") => HubError::Token { endpoint },
            ("RepoNotFound", _) | (_, 401 | 404) => HubError::Unknown {
                endpoint,
                kind,
                name,
                has_token,
                cwd: std::env::current_dir().unwrap_or_default(),
            },
            _ => HubError::Refused {
                endpoint,
                path: path.to_owned(),
                status,
                said: said.to_owned(),
            },
        }
    }
}
