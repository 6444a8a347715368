//! What is asked of a model that a client trains, and what it answers, as messages: batches and scores in protobuf, what is
//! rare in JSON. Files travel as paths below the data folder, which both sides share. Not here: whose models they are
//! (service), who waits (client).

use std::path::{Component, Path, PathBuf};

use prost::Message;
use serde::de::DeserializeOwned;
use tandem_core::id::{AdapterDigest, AdapterRef};
use tandem_core::learner::{self, Batch, Datum, Learn, Pass, Reply, Save, Saved, Scores, Source, Stepped};
use tandem_core::message::Fault;

use crate::codec::{self, Damaged};
use crate::wire::learn::Ask;
use crate::wire::learn_answer::Answer;
use crate::{UP_BYTES, wire};

/// Who waits at the router.
pub enum Waiting {
    Done(Reply<()>),
    Scores(Reply<Scores>),
    Stepped(Reply<Stepped>),
    Snapshot(Reply<AdapterDigest>),
    /// With the folder that it named.
    Saved(Reply<Saved>, PathBuf),
}

impl Waiting {
    pub fn answer(self, answer: wire::LearnAnswer) -> Result<(), Damaged> {
        let answer = answer
            .answer
            .ok_or_else(|| Damaged("an answer of an unknown kind".to_owned()))?;
        match self {
            Waiting::Done(reply) => give(reply, result(answer)?),
            Waiting::Stepped(reply) => give(reply, result(answer)?),
            Waiting::Snapshot(reply) => give(reply, result(answer)?),
            Waiting::Saved(reply, folder) => {
                let digest: Result<Option<AdapterDigest>, Fault> = result(answer)?;
                let adapter = |digest| AdapterRef {
                    digest,
                    folder: folder.join(learner::ADAPTER),
                };
                let saved = digest.map(|digest| Saved {
                    adapter: digest.map(adapter),
                });
                give(reply, saved);
            }
            Waiting::Scores(reply) => match answer {
                Answer::Scores(wire::LearnScores { loss, logprobs }) => {
                    let logprobs = logprobs.into_iter().map(|of_datum| of_datum.logprobs).collect();
                    give(reply, Ok(Scores { loss, logprobs }));
                }
                Answer::ResultJson(json) => give(reply, Err(codec::from_json(&json)?)),
            },
        }
        Ok(())
    }
}

fn give<T>(reply: Reply<T>, result: Result<T, Fault>) {
    // Whoever asked may be gone.
    drop(reply.send(result));
}

fn result<T: DeserializeOwned>(answer: Answer) -> Result<T, Damaged> {
    match answer {
        Answer::ResultJson(json) => codec::from_json(&json),
        Answer::Scores(_) => Err(Damaged("scores, where none were asked".to_owned())),
    }
}

/// For the wire, and who waits; `None`: nobody does. `root`: the router's data folder. What cannot travel is refused.
pub fn ask(learn: Learn, root: &Path) -> Option<(Ask, Option<Waiting>)> {
    Some(match learn {
        Learn::Create(new, reply) => {
            let from = new.from.clone().map(|source| source_below(source, root));
            match from.transpose() {
                Ok(from) => {
                    let new = learner::NewLearner { from, ..*new };
                    (Ask::CreateJson(codec::json(&new)), Some(Waiting::Done(reply)))
                }
                Err(fault) => return refuse(reply, fault),
            }
        }
        Learn::Load(source, reply) => match source_below(source, root) {
            Ok(source) => (Ask::LoadJson(codec::json(&source)), Some(Waiting::Done(reply))),
            Err(fault) => return refuse(reply, fault),
        },
        Learn::Save(Save { folder, what }, reply) => match below(&folder, root) {
            Ok(relative) => {
                let save = Save {
                    folder: relative,
                    what,
                };
                (
                    Ask::SaveJson(codec::json(&save)),
                    Some(Waiting::Saved(reply, folder)),
                )
            }
            Err(fault) => return refuse(reply, fault),
        },
        Learn::Accumulate(batch, reply) => {
            let batch = of_batch(*batch);
            let bytes = batch.encoded_len();
            // Room for the message around it.
            if bytes + 1024 > UP_BYTES {
                let fault = Fault::Refused(format!(
                    "a call of {bytes} bytes is too large: {UP_BYTES} go to a backend at once; send fewer data in one call"
                ));
                return refuse(reply, fault);
            }
            (Ask::Accumulate(batch), Some(Waiting::Scores(reply)))
        }
        Learn::Step(adam, reply) => (Ask::StepJson(codec::json(&adam)), Some(Waiting::Stepped(reply))),
        Learn::Clear(reply) => (Ask::Clear(true), Some(Waiting::Done(reply))),
        Learn::Snapshot(reply) => (Ask::Snapshot(true), Some(Waiting::Snapshot(reply))),
        Learn::Drop => (Ask::Drop(true), None),
    })
}

fn refuse<T>(reply: Reply<T>, fault: Fault) -> Option<(Ask, Option<Waiting>)> {
    drop(reply.send(Err(fault)));
    None
}

fn source_below(source: Source, root: &Path) -> Result<Source, Fault> {
    Ok(match source {
        Source::State { file, moments } => Source::State {
            file: below(&file, root)?,
            moments,
        },
        // Found there by its digest.
        Source::Adapter(adapter) => Source::Adapter(AdapterRef {
            folder: PathBuf::new(),
            ..adapter
        }),
    })
}

fn below(path: &Path, root: &Path) -> Result<PathBuf, Fault> {
    let relative = path.strip_prefix(root).map(Path::to_owned);
    relative.map_err(|_| Fault::Step(format!("{} is not in the data folder", path.display())))
}

/// Whether a path that came leads nowhere else than below the data folder.
pub fn is_below(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
}

fn of_batch(batch: Batch) -> wire::LearnBatch {
    let Batch {
        loss,
        data,
        pass,
        trace,
    } = batch;
    let datum = |datum| {
        let Datum {
            tokens,
            columns,
            targets,
            weights,
            sampled,
            advantages,
            ratio_mask,
        } = datum;
        wire::LearnDatum {
            tokens,
            columns: columns as u64,
            targets,
            weights,
            sampled,
            advantages,
            ratio_mask,
        }
    };
    wire::LearnBatch {
        loss_json: codec::json(&loss),
        forward_only: pass == Pass::Forward,
        data: data.into_iter().map(datum).collect(),
        traceparent: trace.map(|trace| trace.to_string()),
    }
}

pub fn batch(batch: wire::LearnBatch) -> Result<Batch, Damaged> {
    let wire::LearnBatch {
        loss_json,
        forward_only,
        data,
        traceparent,
    } = batch;
    let datum = |datum| {
        let wire::LearnDatum {
            tokens,
            columns,
            targets,
            weights,
            sampled,
            advantages,
            ratio_mask,
        } = datum;
        Datum {
            tokens,
            columns: columns as usize,
            targets,
            weights,
            sampled,
            advantages,
            ratio_mask,
        }
    };
    Ok(Batch {
        loss: codec::from_json(&loss_json)?,
        data: data.into_iter().map(datum).collect(),
        pass: match forward_only {
            true => Pass::Forward,
            false => Pass::ForwardBackward,
        },
        // One that cannot be read costs its spans.
        trace: traceparent.and_then(|trace| trace.parse().ok()),
    })
}

pub fn of_scores(scores: Result<Scores, Fault>) -> Answer {
    match scores {
        Ok(Scores { loss, logprobs }) => Answer::Scores(wire::LearnScores {
            loss,
            logprobs: logprobs
                .into_iter()
                .map(|logprobs| wire::LearnLogprobs { logprobs })
                .collect(),
        }),
        Err(fault) => Answer::ResultJson(codec::json(&fault)),
    }
}
