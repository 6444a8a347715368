//! Does the calls of one model, one after the other, at the replica where the model lives. Not here: their order (model).

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use tandem_core::id::AdapterDigest;
use tandem_core::job;
use tandem_core::learner::{self, Learn, LearnerId, NewLearner, Pass, Reply, Save, Saved, Saving};
use tandem_core::message::Fault;
use tandem_core::replica::{Command, ReplicaHandle};
use tandem_core::trace::TraceContext;
use tandem_store::{SaveKind, SavePlace, SaveRecord, StoreError, now};
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

use super::futures::Promise;
use super::model::{Call, Learning, Model, SamplerKind, Snapshot, Work};
use super::reach::{Reach, words};
use super::sampler::{Sampler, Weights};
use super::saves::{Keep, KeptNumbers, path_of};
use super::{Outcome, lock};
use crate::api::{Client, RouterError};
use crate::traced;
use crate::{LoadMode, Router};

/// Snapshots of a model that are kept to sample from; beyond, the one that was used longest ago goes.
const MAX_SNAPSHOTS: usize = 32;

/// How a model begins.
pub(super) enum Origin {
    New { seed: u64 },
    Kept { path: String, kept: Box<KeptNumbers> },
}

pub(super) struct Worker {
    router: Router,
    client: Client,
    session: String,
    about: Learning,
    learner: LearnerId,
    /// Where it lives, once it does.
    replica: Option<ReplicaHandle>,
    /// Why the next step cannot be made: gradients are missing.
    spoiled: Option<String>,
    snapshots: VecDeque<AdapterDigest>,
    /// What its inflight samplers share.
    inflight: Option<Arc<Mutex<AdapterDigest>>>,
}

type Done = Result<Outcome, RouterError>;

impl Worker {
    pub fn new(
        router: Router,
        client: Client,
        session: String,
        about: Learning,
        learner: LearnerId,
    ) -> Worker {
        Worker {
            router,
            client,
            session,
            about,
            learner,
            replica: None,
            spoiled: None,
            snapshots: VecDeque::new(),
            inflight: None,
        }
    }

    pub async fn run(
        mut self,
        origin: Origin,
        promise: Promise,
        mut works: mpsc::UnboundedReceiver<Work>,
        model: Weak<Model>,
    ) {
        let begun = self.begin(origin).await;
        let failed = begun.as_ref().err().map(ToString::to_string);
        promise.keep(begun.unwrap_or_else(Outcome::of_error));
        while let Some(Work {
            taken: _taken,
            promise,
            mut call,
            trace,
        }) = works.recv().await
        {
            // What still waits when the session ends is failed by dropping it.
            let Some(model) = model.upgrade() else { break };
            model.took(&call);
            drop(model);
            let span = self.trace(trace, &mut call);
            let outcome = match (&failed, call) {
                (Some(why), _) => Outcome::user_failed(format!("the model was not created: {why}")),
                (None, Ok(call)) => self.obey(call).await.unwrap_or_else(Outcome::of_error),
                (None, Err(why)) => {
                    self.spoil(&why);
                    Outcome::user_failed(why)
                }
            };
            if let Outcome::Failed(failure) = &outcome {
                span.record("error.type", failure.message.as_str());
            }
            drop(span);
            promise.keep(outcome);
        }
        if let Some(replica) = &self.replica {
            // One that is gone needs no telling.
            let _ = replica
                .commands
                .send(Command::Learn(self.learner, Learn::Drop))
                .await;
        }
        for digest in std::mem::take(&mut self.snapshots) {
            self.let_go(digest).await;
        }
    }

    async fn begin(&mut self, origin: Origin) -> Done {
        let (seed, from) = match &origin {
            Origin::New { seed } => (*seed, None),
            Origin::Kept { kept, .. } => (0, Some(kept.source.clone())),
        };
        let lora = self.about.lora.clone();
        self.replica = Some(
            self.router
                .learners_replica(&self.session)
                .map_err(RouterError::Engine)?,
        );
        let new = Box::new(NewLearner {
            lora,
            seed,
            tenant: self.client.tenant.as_str().to_owned(),
            from,
        });
        self.ask(|reply| Learn::Create(new, reply)).await?;
        let model_id = self.about.id.clone();
        Ok(match origin {
            Origin::New { .. } => Outcome::Created { model_id },
            Origin::Kept { path, .. } => Outcome::Loaded { path, model_id },
        })
    }

    async fn ask<T>(&self, learn: impl FnOnce(Reply<T>) -> Learn) -> Result<T, RouterError> {
        let lost = || {
            let why = "the replica that held this model; what was not saved is gone, load what was saved as a new model";
            RouterError::Engine(Fault::ReplicaLost(why.to_owned()))
        };
        let replica = self.replica.as_ref().ok_or_else(lost)?;
        let (reply, answer) = oneshot::channel();
        let command = Command::Learn(self.learner, learn(reply));
        replica.commands.send(command).await.map_err(|_| lost())?;
        answer.await.map_err(|_| lost())?.map_err(RouterError::Engine)
    }

    /// The span of a call, which its quanta are in; none where the request that brought it is not traced.
    fn trace(&self, parent: Option<TraceContext>, call: &mut Result<Call, String>) -> Span {
        let (Some(parent), Ok(call)) = (parent, call) else {
            return Span::none();
        };
        let (context, span) = traced::learner_call(parent, &self.about.id, call.name());
        if let Call::Accumulate { batch, .. } = call {
            batch.trace = Some(context);
        }
        span
    }

    fn spoil(&mut self, why: &str) {
        self.spoiled.get_or_insert_with(|| why.to_owned());
    }

    async fn obey(&mut self, call: Call) -> Done {
        match call {
            Call::Accumulate { batch, shapes } => {
                let is_backward = batch.pass == Pass::ForwardBackward;
                let key = self
                    .client
                    .training_key()
                    .filter(|_| is_backward)
                    .map(str::to_owned);
                let tokens = batch.data.iter().map(|datum| datum.targets.len() as u64).sum();
                let scored = match self.router.check_quota(key.as_deref(), tokens).await {
                    Ok(()) => self.ask(|reply| Learn::Accumulate(Box::new(batch), reply)).await,
                    Err(refused) => Err(refused),
                };
                if let (Ok(_), Some(key)) = (&scored, &key) {
                    self.router.0.store.add_trained(key, tokens).await?;
                }
                if let (Err(error), true) = (&scored, is_backward) {
                    self.spoil(&error.to_string());
                }
                Ok(Outcome::Scored {
                    scores: scored?,
                    shapes,
                })
            }
            Call::Step(adam) => {
                if let Some(why) = self.spoiled.take() {
                    // The gradients of the others go, too.
                    self.ask(Learn::Clear).await?;
                    return Ok(Outcome::user_failed(format!(
                        "no step was made, because a forward_backward since the last one failed: {why}"
                    )));
                }
                Ok(Outcome::Stepped(
                    self.ask(|reply| Learn::Step(adam, reply)).await?,
                ))
            }
            Call::Save(keep) => self.save(SaveKind::State, keep).await,
            Call::SaveForSampler(keep) => self.save(SaveKind::Adapter, keep).await,
            Call::Sampler { seq, kind } => self.make_sampler(seq, kind).await,
            Call::Load { path, moments } => {
                let kept = self.router.kept_numbers(&self.client, &path, moments).await?;
                if kept.lora != self.about.lora {
                    let (there, here) = (words(&kept.lora), words(&self.about.lora));
                    return Ok(Outcome::user_failed(format!(
                        "{path} has {there}; this model has {here}"
                    )));
                }
                self.ask(|reply| Learn::Load(kept.source, reply)).await?;
                self.spoiled = None;
                let model_id = self.about.id.clone();
                Ok(Outcome::Loaded { path, model_id })
            }
        }
    }

    /// Everything that is saved has a name under which it answers; a state can also be gone on from.
    async fn save(&mut self, kind: SaveKind, keep: Keep) -> Done {
        let place = self.place(kind, &keep).await?;
        self.router.check_storage(&self.client).await?;
        let folder = self.router.0.store.save_folder(&place).await?;
        let named = self.save_in(&folder, &place, &keep).await;
        remove(folder).await;
        Ok(Outcome::Saved { path: named? })
    }

    async fn save_in(&self, folder: &Path, place: &SavePlace, keep: &Keep) -> Result<String, RouterError> {
        let ask = |what| Save {
            folder: folder.to_owned(),
            what,
        };
        let base_model = job::base_model(&self.router.info().model_folder);
        let save = ask(Saving::Adapter { base_model });
        let saved: Saved = self.ask(|reply| Learn::Save(save, reply)).await?;
        let adapter = saved
            .adapter
            .ok_or_else(|| RouterError::Engine(Fault::Step("the engine wrote no adapter".to_owned())))?;
        let path = path_of(place);
        // Where the engine is elsewhere, the shared store has it by its digest.
        let made = match adapter.folder.exists() {
            true => adapter.folder,
            false => self.router.0.store.artifacts().adapter(adapter.digest).await?,
        };
        let bytes = tokio::fs::metadata(made.join("adapter_model.safetensors")).await;
        let bytes = bytes.map_or(0, |file| file.len());
        let wanted = match place.kind {
            SaveKind::Adapter => bytes,
            // The numbers again, and two moments.
            SaveKind::State => bytes.saturating_mul(4),
        };
        if let Some(storage) = self.router.check_storage(&self.client).await? {
            storage.check(wanted).map_err(StoreError::from)?;
        }
        let state = match place.kind {
            SaveKind::Adapter => None,
            SaveKind::State => {
                let save = ask(Saving::State);
                self.ask(|reply| Learn::Save(save, reply)).await?;
                Some(folder.join(learner::STATE))
            }
        };
        let record = SaveRecord {
            bytes,
            adapter: Some(adapter.digest),
            ..self.record(place.clone(), keep)
        };
        self.name(&path, &made).await?;
        self.router.0.store.keep_save(record, state).await?;
        if !self.router.is_name_of(&path, adapter.digest).await? {
            // The end of the save of before took the same adapter's name with it.
            self.name(&path, &made).await?;
        }
        Ok(path)
    }

    async fn name(&self, path: &str, adapter: &Path) -> Result<(), RouterError> {
        let (mode, source) = (LoadMode::Replace, tandem_store::Source::Loaded);
        let loaded = self.router.load(path, adapter, mode, source, &self.client).await;
        loaded.map(drop)
    }

    /// Where a save goes, if it may.
    async fn place(&self, kind: SaveKind, keep: &Keep) -> Result<SavePlace, RouterError> {
        let name = &keep.name;
        let place = SavePlace::new(&self.about.id, kind, name).ok_or_else(|| {
            let message = format!(
                "{name:?} cannot name a checkpoint: letters, digits, `-`, `_` and `.` make one, 100 at most"
            );
            RouterError::invalid("path", message)
        })?;
        if !keep.overwrite && self.router.0.store.save(&place).await?.is_some() {
            let path = path_of(&place);
            let message = format!("{path} exists: choose another name, or overwrite=True");
            return Err(RouterError::invalid("path", message));
        }
        Ok(place)
    }

    fn record(&self, place: SavePlace, keep: &Keep) -> SaveRecord {
        let Reach {
            rank,
            train_attn,
            train_mlp,
            train_unembed,
        } = Reach::of(&self.about.lora);
        SaveRecord {
            place,
            base: self.router.info().base_digest,
            tenant: self.client.tenant.as_str().to_owned(),
            created_at: now(),
            expires_at: keep.ttl_s.map(|ttl_s| now().saturating_add(ttl_s)),
            bytes: 0,
            rank,
            train_attn,
            train_mlp,
            train_unembed,
            lora: Some(self.about.lora.clone()),
            public: false,
            user_metadata: keep.user_metadata.clone(),
            file: None,
            adapter: None,
        }
    }

    async fn make_sampler(&mut self, seq: u64, kind: SamplerKind) -> Done {
        let digest = self.ask(Learn::Snapshot).await?;
        let replica = self.replica.clone().expect("it was asked just now");
        self.snapshots.retain(|known| *known != digest);
        self.snapshots.push_back(digest);
        let tinker = &self.router.0.tinker;
        let used = Instant::now();
        tinker.snapshots().insert(digest, Snapshot { replica, used });
        self.make_room().await;
        let id = format!("{}:sample:{seq}", self.session);
        let weights = match kind {
            SamplerKind::Snapshot => Weights::Snapshot(digest),
            SamplerKind::Inflight => {
                let inflight = self.inflight.get_or_insert_with(|| Arc::new(Mutex::new(digest)));
                *lock(inflight) = digest;
                Weights::Inflight(inflight.clone())
            }
        };
        let view = self.router.of(&self.client);
        let sampler = Sampler::new(id, self.about.base_model.clone(), None, weights);
        view.put_sampler(&self.session, seq, sampler)
            .map(|id| Outcome::Sampler { id })
    }

    async fn make_room(&mut self) {
        while self.snapshots.len() > MAX_SNAPSHOTS {
            let oldest = {
                let snapshots = self.router.0.tinker.snapshots();
                let used = |digest: &AdapterDigest| snapshots.get(digest).map(|snapshot| snapshot.used);
                // The newest stays: something is about to sample from it.
                let shared = self.inflight.as_ref().map(|inflight| *lock(inflight));
                let others = self.snapshots.iter().take(MAX_SNAPSHOTS);
                let others = others.filter(|digest| shared != Some(**digest));
                others.min_by_key(|digest| used(digest)).copied()
            };
            let Some(oldest) = oldest else { return };
            self.snapshots.retain(|digest| *digest != oldest);
            self.let_go(oldest).await;
        }
    }

    async fn let_go(&self, digest: AdapterDigest) {
        let snapshot = self.router.0.tinker.snapshots().remove(&digest);
        if let Some(Snapshot { replica, .. }) = snapshot {
            // One that is gone holds nothing.
            let _ = replica.commands.send(Command::UnloadAdapter(digest)).await;
        }
    }
}

async fn remove(folder: PathBuf) {
    // What was taken out of it is no part of it any more; the staging folder is emptied at the next start, too.
    let _ = tokio::fs::remove_dir_all(folder).await;
}
