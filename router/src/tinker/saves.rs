//! Checkpoints as Tinker names them, `tinker://RUN/KIND/NAME`. Each is also a model's name for everybody else's routes, as any
//! other adapter's name is a path here: one kind of thing. A state has the optimizer's memory beside. Not here: where they lie
//! (store).

use std::collections::BTreeMap;
use std::fmt;

use tandem_core::id::{AdapterDigest, AdapterRef};
use tandem_core::job::Lora;
use tandem_core::learner::{self, Moments};
use tandem_store::{SaveKind, SavePlace, SaveRecord, now};

use super::reach::{Reach, lora_of};
use super::sampler::Weights;
use crate::api::{Client, ModelKind, RouterError};
use crate::catalog::Hold;
use crate::generate::Nameless;
use crate::{Router, View};

const SCHEME: &str = "tinker://";
const STATES: &str = "weights";
const ADAPTERS: &str = "sampler_weights";

/// What is to be saved, and how.
#[derive(Clone, Debug)]
pub struct Keep {
    pub name: String,
    pub overwrite: bool,
    pub ttl_s: Option<i64>,
    pub user_metadata: Option<BTreeMap<String, serde_json::Value>>,
}

/// A parsed `tinker://` path.
#[derive(Clone, Debug)]
pub struct Path(SavePlace);

impl Path {
    pub fn new(run: &str, kind: &str, name: &str) -> Result<Path, RouterError> {
        let unknown = || RouterError::Unknown {
            what: "checkpoint",
            id: format!("{SCHEME}{run}/{kind}/{name}"),
        };
        let kind = match kind {
            STATES => SaveKind::State,
            ADAPTERS => SaveKind::Adapter,
            _ => return Err(unknown()),
        };
        SavePlace::new(run, kind, name).map(Path).ok_or_else(unknown)
    }

    pub fn parse(path: &str) -> Result<Path, RouterError> {
        let parts: Vec<&str> = path.strip_prefix(SCHEME).unwrap_or("").split('/').collect();
        match parts[..] {
            [run, kind, name] => Path::new(run, kind, name),
            _ => Err(RouterError::invalid(
                "path",
                format!(
                    "{path:?} is no checkpoint: those are {SCHEME}RUN/{STATES}/NAME and {SCHEME}RUN/{ADAPTERS}/NAME"
                ),
            )),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&path_of(&self.0))
    }
}

pub(super) fn path_of(place: &SavePlace) -> String {
    let SavePlace { run, kind, name } = place;
    format!("{SCHEME}{run}/{}/{name}", word(*kind))
}

fn word(kind: SaveKind) -> &'static str {
    match kind {
        SaveKind::State => STATES,
        SaveKind::Adapter => ADAPTERS,
    }
}

/// A checkpoint, for who asks what there is.
#[derive(Clone, Debug)]
pub struct Kept {
    pub run: String,
    /// `weights/NAME`
    pub id: String,
    pub path: String,
    pub is_sampler: bool,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub bytes: u64,
    pub public: bool,
    pub rank: u32,
    pub user_metadata: Option<BTreeMap<String, serde_json::Value>>,
}

fn kept(record: SaveRecord) -> Kept {
    let SaveRecord {
        place,
        base: _,
        tenant: _,
        created_at,
        expires_at,
        bytes,
        rank,
        train_attn: _,
        train_mlp: _,
        train_unembed: _,
        lora: _,
        public,
        user_metadata,
        file: _,
        adapter: _,
    } = record;
    Kept {
        id: format!("{}/{}", word(place.kind), place.name),
        path: path_of(&place),
        is_sampler: place.kind == SaveKind::Adapter,
        run: place.run,
        created_at,
        expires_at,
        bytes,
        public,
        rank,
        user_metadata,
    }
}

/// What a model can begin with.
pub(super) struct KeptNumbers {
    pub lora: Lora,
    pub source: learner::Source,
    /// An adapter stays as long as it takes to read it.
    _hold: Option<Hold>,
}

/// What a client may mean by a path: a checkpoint, or the name of an adapter, whoever made that. The SDK samples from nothing
/// that does not begin as a path, so a name may stand behind `tinker://`.
enum Named<'a> {
    Save(Box<SaveRecord>),
    Adapter(&'a str, AdapterDigest),
    Base,
}

impl Router {
    async fn saved(&self, client: &Client, path: &Path) -> Result<SaveRecord, RouterError> {
        let record = self.0.store.save(&path.0).await?;
        let seen = record.filter(|record| client.sees(&record.tenant) || record.public);
        let record = seen.ok_or_else(|| RouterError::Unknown {
            what: "checkpoint",
            id: path.to_string(),
        })?;
        if record.base != self.info().base_digest {
            let message = format!("{path} was trained on another base model than the one that is served");
            return Err(RouterError::invalid("path", message));
        }
        Ok(record)
    }

    async fn named<'a>(&self, client: &Client, path: &'a str) -> Result<Named<'a>, RouterError> {
        if let Ok(place) = Path::parse(path) {
            let record = self.saved(client, &place).await?;
            return Ok(Named::Save(Box::new(record)));
        }
        self.refresh_names().await?;
        let name = path.strip_prefix(SCHEME).unwrap_or(path);
        match self.0.catalog.find(client, name).map(|card| card.kind) {
            Some(ModelKind::Adapter { digest, .. }) => Ok(Named::Adapter(name, digest)),
            Some(ModelKind::Base) => Ok(Named::Base),
            None => Err(RouterError::Unknown {
                what: "checkpoint or adapter",
                id: path.to_owned(),
            }),
        }
    }

    pub(super) async fn kept_numbers(
        &self,
        client: &Client,
        path: &str,
        moments: Moments,
    ) -> Result<KeptNumbers, RouterError> {
        let digest = match self.named(client, path).await? {
            Named::Save(record) => match (self.0.store.state_of(&record).await?, record.adapter) {
                (Some(file), _) => {
                    return Ok(KeptNumbers {
                        lora: lora_of(&record, &self.info().lora_targets),
                        source: learner::Source::State { file, moments },
                        _hold: None,
                    });
                }
                (None, Some(digest)) => digest,
                (None, None) => return Err(RouterError::invalid("path", format!("{path} has no numbers"))),
            },
            Named::Adapter(_, digest) => digest,
            Named::Base => {
                let message = format!("{path} is the base, not an adapter: a model on it begins anew");
                return Err(RouterError::invalid("path", message));
            }
        };
        if moments == Moments::Restored {
            let message = format!(
                "{path} is an adapter: it has weights, but no state of an optimizer. Load it without \
                 (create_training_client_from_state, load_state), and the optimizer is a new one; with its optimizer a model \
                 goes on from what save_state saved."
            );
            return Err(RouterError::invalid("optimizer", message));
        }
        let hold = self.0.catalog.hold(digest).await;
        let (folder, lora) = self.adapter_shape(digest).await?;
        Ok(KeptNumbers {
            lora: lora
                .map_err(|why| RouterError::invalid("path", format!("{path} cannot be trained on: {why}")))?,
            source: learner::Source::Adapter(AdapterRef { digest, folder }),
            _hold: Some(hold),
        })
    }

    pub(super) async fn sampled_by(&self, client: &Client, path: &str) -> Result<Weights, RouterError> {
        Ok(match self.named(client, path).await? {
            Named::Base => Weights::Base,
            Named::Adapter(name, _) => Weights::Named(name.to_owned()),
            Named::Save(record) => match record.adapter {
                Some(_) if client.sees(&record.tenant) => Weights::Named(path.to_owned()),
                Some(_) => Weights::Published(path.to_owned()),
                None => {
                    let message = format!(
                        "{path} was saved by an older version, as a state alone: load it and save it again, then it answers"
                    );
                    return Err(RouterError::invalid("model_path", message));
                }
            },
        })
    }

    pub(super) async fn published(&self, client: &Client, path: &str) -> Result<Nameless, RouterError> {
        let digest = match self.named(client, path).await? {
            Named::Save(record) => record.adapter,
            Named::Adapter(..) | Named::Base => None,
        };
        let digest =
            digest.ok_or_else(|| RouterError::invalid("model_path", format!("{path} is no adapter")))?;
        Ok(Nameless { digest, at: None })
    }

    async fn reach_of(&self, client: &Client, path: &str) -> Result<Reach, RouterError> {
        let lora = match self.named(client, path).await? {
            Named::Save(record) => lora_of(&record, &self.info().lora_targets),
            Named::Adapter(_, digest) => {
                let shape = self.adapter_shape(digest).await?.1;
                shape.map_err(|why| RouterError::invalid("tinker_path", format!("{path}: {why}")))?
            }
            Named::Base => {
                let message = format!("{path} is the base: it has no weights of a training client");
                return Err(RouterError::invalid("tinker_path", message));
            }
        };
        Ok(Reach::of(&lora))
    }

    /// What has been saved in its place meanwhile stays.
    async fn drop_save(&self, record: &SaveRecord) -> Result<(), RouterError> {
        match self.remove_save(record, &path_of(&record.place)).await? {
            true => Ok(self.0.store.remove_state(record).await?),
            false => Ok(()),
        }
    }
}

impl View {
    /// The oldest first; of one run, or of all.
    pub async fn saves(&self, run: Option<&str>) -> Result<Vec<Kept>, RouterError> {
        let records = self.router.0.store.saves(self.client.only(), run).await?;
        let lives = |record: &SaveRecord| !record.has_expired();
        Ok(records.into_iter().filter(lives).map(kept).collect())
    }

    /// What was kept as `path`, a checkpoint's or an adapter's name, is of which shape.
    pub async fn reach_of(&self, path: &str) -> Result<Reach, RouterError> {
        self.router.reach_of(&self.client, path).await
    }

    async fn own_save(&self, path: &Path) -> Result<SaveRecord, RouterError> {
        let record = self.router.0.store.save(&path.0).await?;
        let own = record.filter(|record| self.client.sees(&record.tenant));
        own.ok_or_else(|| RouterError::Unknown {
            what: "checkpoint",
            id: path.to_string(),
        })
    }

    pub async fn delete_save(&self, path: &Path) -> Result<(), RouterError> {
        let record = self.own_save(path).await?;
        self.router.drop_save(&record).await
    }

    pub async fn publish_save(&self, path: &Path, public: bool) -> Result<(), RouterError> {
        self.change_save(path, |record| record.public = public).await
    }

    /// `None`: for ever.
    pub async fn expire_save(&self, path: &Path, ttl_s: Option<i64>) -> Result<(), RouterError> {
        let expires_at = ttl_s.map(|ttl_s| now().saturating_add(ttl_s));
        self.change_save(path, |record| record.expires_at = expires_at)
            .await
    }

    async fn change_save(&self, path: &Path, change: impl Fn(&mut SaveRecord)) -> Result<(), RouterError> {
        self.own_save(path).await?;
        match self.router.0.store.change_save(&path.0, change).await? {
            true => Ok(()),
            false => Err(RouterError::Unknown {
                what: "checkpoint",
                id: path.to_string(),
            }),
        }
    }
}

pub(super) async fn remove_expired(router: &Router) -> Result<(), RouterError> {
    for record in router.0.store.expired_saves().await? {
        // The next one goes all the same.
        if let Err(error) = router.drop_save(&record).await {
            tracing::warn!(path = path_of(&record.place), %error, "a save that has expired is not removed");
        }
    }
    Ok(())
}
