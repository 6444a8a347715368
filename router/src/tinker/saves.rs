//! Checkpoints as Tinker names them, `tinker://RUN/KIND/NAME`. A state is loaded by training clients; an adapter is also a
//! model's name for everybody else's routes. Not here: where they lie (store).

use std::collections::BTreeMap;
use std::fmt;

use tandem_store::{SaveKind, SavePlace, SaveRecord, now};

use crate::api::{Client, RouterError};
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
    pub train_attn: bool,
    pub train_mlp: bool,
    pub train_unembed: bool,
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
        train_attn,
        train_mlp,
        train_unembed,
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
        train_attn,
        train_mlp,
        train_unembed,
        user_metadata,
    }
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

    pub(super) async fn saved_state(&self, client: &Client, path: &str) -> Result<SaveRecord, RouterError> {
        let record = self.saved(client, &Path::parse(path)?).await?;
        match record.place.kind {
            SaveKind::State => Ok(record),
            SaveKind::Adapter => Err(RouterError::invalid(
                "path",
                format!("{path} is for sampling and has no state to go on from: load what save_state saved"),
            )),
        }
    }

    /// The model's name by which it is sampled.
    pub(super) async fn saved_adapter(&self, client: &Client, path: &str) -> Result<String, RouterError> {
        let record = self.saved(client, &Path::parse(path)?).await?;
        match record.place.kind {
            SaveKind::Adapter => Ok(path.to_owned()),
            SaveKind::State => Err(RouterError::invalid(
                "model_path",
                format!("{path} is a state to train on from: sample what save_weights_for_sampler saved"),
            )),
        }
    }

    async fn drop_save(&self, record: &SaveRecord) -> Result<(), RouterError> {
        let path = path_of(&record.place);
        if record.place.kind == SaveKind::Adapter {
            match self.unload_adapter(&path).await {
                // Its name was removed by another route.
                Err(RouterError::Adapter { not_found: true, .. }) => {}
                done => done?,
            }
        }
        Ok(self.0.store.remove_save(&record.place).await?)
    }
}

impl View {
    /// The oldest first; of one run, or of all.
    pub async fn saves(&self, run: Option<&str>) -> Result<Vec<Kept>, RouterError> {
        let records = self.router.0.store.saves(run).await?;
        let seen = |record: &SaveRecord| self.client.sees(&record.tenant) && !record.has_expired();
        Ok(records.into_iter().filter(seen).map(kept).collect())
    }

    pub async fn saved(&self, path: &Path) -> Result<Kept, RouterError> {
        self.router.saved(&self.client, path).await.map(kept)
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
        let record = self.own_save(path).await?;
        let record = SaveRecord { public, ..record };
        Ok(self.router.0.store.change_save(record).await?)
    }

    /// `None`: for ever.
    pub async fn expire_save(&self, path: &Path, ttl_s: Option<i64>) -> Result<(), RouterError> {
        let record = self.own_save(path).await?;
        let record = SaveRecord {
            expires_at: ttl_s.map(|ttl_s| now().saturating_add(ttl_s)),
            ..record
        };
        Ok(self.router.0.store.change_save(record).await?)
    }
}

pub(super) async fn remove_expired(router: &Router) -> Result<(), RouterError> {
    for record in router.0.store.saves(None).await? {
        if record.has_expired() {
            router.drop_save(&record).await?;
        }
    }
    Ok(())
}
