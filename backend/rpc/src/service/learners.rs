//! Models that a session's clients train: they and their snapshots end with the session. Not here: what they compute.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use tandem_core::id::{AdapterDigest, AdapterRef};
use tandem_core::learner::{Learn, LearnerId, NewLearner, Reply, Save, Saved, Source};
use tandem_core::message::Fault;
use tandem_core::replica::Command;
use tokio::sync::oneshot;

use super::Shared;
use crate::codec::{self, Damaged};
use crate::learn;
use crate::wire::learn::Ask;
use crate::wire::learn_answer::Answer;

pub struct Learners {
    shared: Arc<Shared>,
    /// By the router's numbers: each router counts its own from 0.
    ids: HashMap<u64, LearnerId>,
    snapshots: Arc<Mutex<HashSet<AdapterDigest>>>,
}

/// `None`: the engine gave no answer.
pub type Answered = BoxFuture<'static, Option<Answer>>;

impl Learners {
    pub fn new(shared: Arc<Shared>) -> Learners {
        Learners {
            shared,
            ids: HashMap::new(),
            snapshots: Arc::default(),
        }
    }

    /// What is to be sampled from lies in no folder.
    pub fn snapshot(&self, digest: AdapterDigest) -> Option<AdapterRef> {
        let is_known = lock(&self.snapshots).contains(&digest);
        is_known.then(|| AdapterRef {
            digest,
            folder: Default::default(),
        })
    }

    pub fn forget_snapshot(&self, digest: AdapterDigest) {
        lock(&self.snapshots).remove(&digest);
    }

    /// The command, and what will come of it. A router asks the next of a model when it was answered.
    pub async fn obey(&mut self, learner: u64, ask: Ask) -> Result<Answered, Damaged> {
        let next = || LearnerId(self.shared.next_learner());
        let id = *self.ids.entry(learner).or_insert_with(next);
        let (learn, answered) = match ask {
            Ask::CreateJson(json) => {
                let new: NewLearner = codec::from_json(&json)?;
                let (reply, answered) = wait(json_of);
                if let Err(message) = new.check(&self.shared.replica.info) {
                    return Ok(refused(reply, Fault::Refused(message), answered));
                }
                let from = match new.from {
                    None => Ok(None),
                    Some(source) => self.found(source).await.map(Some),
                };
                match from {
                    Ok(from) => (
                        Learn::Create(Box::new(NewLearner { from, ..new }), reply),
                        answered,
                    ),
                    Err(fault) => return Ok(refused(reply, fault, answered)),
                }
            }
            Ask::LoadJson(json) => {
                let (reply, answered) = wait(json_of);
                match self.found(codec::from_json(&json)?).await {
                    Ok(source) => (Learn::Load(source, reply), answered),
                    Err(fault) => return Ok(refused(reply, fault, answered)),
                }
            }
            Ask::SaveJson(json) => {
                let Save { folder: below, what } = codec::from_json(&json)?;
                // The root is nobody's to write to.
                let folder = match learn::is_below(&below) && !below.as_os_str().is_empty() {
                    true => self.shared.hooks.folder(&below).await,
                    false => Err(outside(&below)),
                };
                let (reply, answer) = oneshot::channel();
                let answered = saved(self.shared.clone(), below, answer).boxed();
                match folder {
                    Ok(folder) => (Learn::Save(Save { folder, what }, reply), answered),
                    Err(fault) => return Ok(refused(reply, fault, answered)),
                }
            }
            Ask::Accumulate(batch) => {
                let (reply, answered) = wait(learn::of_scores);
                (Learn::Accumulate(Box::new(learn::batch(batch)?), reply), answered)
            }
            Ask::StepJson(json) => {
                let (reply, answered) = wait(json_of);
                (Learn::Step(codec::from_json(&json)?, reply), answered)
            }
            Ask::Clear(_) => {
                let (reply, answered) = wait(json_of);
                (Learn::Clear(reply), answered)
            }
            Ask::Snapshot(_) => {
                let snapshots = self.snapshots.clone();
                let (reply, answered) = wait(move |digest: Result<AdapterDigest, Fault>| {
                    lock(&snapshots).extend(&digest);
                    json_of(digest)
                });
                (Learn::Snapshot(reply), answered)
            }
            // Nobody waits; the stream is closed at once.
            Ask::Drop(_) => (Learn::Drop, async { None }.boxed()),
        };
        // An engine that is gone drops the reply.
        drop(self.shared.replica.commands.send(Command::Learn(id, learn)).await);
        Ok(answered)
    }

    /// The router left: nobody trains them any more.
    pub async fn end(self) {
        let commands = &self.shared.replica.commands;
        for id in self.ids.into_values() {
            drop(commands.send(Command::Learn(id, Learn::Drop)).await);
        }
        let snapshots = std::mem::take(&mut *lock(&self.snapshots));
        for digest in snapshots {
            drop(commands.send(Command::UnloadAdapter(digest)).await);
        }
    }

    async fn found(&self, source: Source) -> Result<Source, Fault> {
        Ok(match source {
            Source::State { file, moments } => Source::State {
                file: match learn::is_below(&file) {
                    true => self.shared.hooks.file(&file).await?,
                    false => return Err(outside(&file)),
                },
                moments,
            },
            Source::Adapter(adapter) => Source::Adapter(self.shared.hooks.adapter(adapter.digest).await?),
        })
    }
}

fn outside(path: &Path) -> Fault {
    Fault::Step(format!("{} is not in the data folder", path.display()))
}

/// What was saved is told when a router can find it. `below`: the folder that it named.
async fn saved(
    shared: Arc<Shared>,
    below: PathBuf,
    answer: oneshot::Receiver<Result<Saved, Fault>>,
) -> Option<Answer> {
    let digest = match answer.await.ok()? {
        Ok(saved) => {
            let kept = shared.hooks.saved(&below, &saved).await;
            kept.map(|()| saved.adapter.map(|adapter| adapter.digest))
        }
        Err(fault) => Err(fault),
    };
    Some(json_of(digest))
}

fn wait<T: Send + 'static>(
    word: impl FnOnce(Result<T, Fault>) -> Answer + Send + 'static,
) -> (Reply<T>, Answered) {
    let (reply, answer) = oneshot::channel();
    let answered = async move { answer.await.ok().map(word) };
    (reply, answered.boxed())
}

fn refused<T>(reply: Reply<T>, fault: Fault, answered: Answered) -> Answered {
    drop(reply.send(Err(fault)));
    answered
}

fn json_of<T: serde::Serialize>(result: Result<T, Fault>) -> Answer {
    Answer::ResultJson(codec::json(&result))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
