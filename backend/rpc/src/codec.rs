//! tandem-core's messages as protobuf, and back. Not here: who sends them.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tandem_core::id::{AdapterDigest, Digest};
use tandem_core::message::{Event, Fault, FinishReason, Guessed, Scored};

use crate::wire;

/// The other side said what this one cannot read: another version, most likely.
#[derive(Debug, thiserror::Error)]
#[error("cannot read what the other side sent: {0}")]
pub struct Damaged(pub String);

/// For types whose keys are strings and that hold no path.
pub fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data with string keys is JSON")
}

pub fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Damaged> {
    serde_json::from_slice(bytes).map_err(|error| Damaged(error.to_string()))
}

pub fn digest(bytes: &[u8]) -> Result<AdapterDigest, Damaged> {
    let digest = bytes.try_into().map(Digest);
    digest.map_err(|_| Damaged(format!("a digest of {} bytes, it must have 32", bytes.len())))
}

pub fn event(event: Event) -> wire::Event {
    use wire::event::What;
    let is_last = matches!(event, Event::Token { is_last: true, .. });
    let what = match event {
        Event::Token { token, .. } => What::Token(scored(token)),
        // The first entry is always empty; it is put back by the reader.
        Event::Prompt(tokens) => What::Prompt(wire::Prompt {
            scored: tokens.into_iter().flatten().map(scored).collect(),
        }),
        Event::Pooled(vector) => What::Pooled(wire::Pooled { vector }),
        Event::Finished {
            reason,
            cached_tokens,
            guessed: Guessed { tokens, accepted },
        } => What::Finished(wire::Finished {
            stop: match reason {
                FinishReason::Stop(token) => Some(token),
                FinishReason::Complete | FinishReason::Length => None,
            },
            cached_tokens,
            complete: reason == FinishReason::Complete,
            guessed_tokens: tokens,
            accepted_tokens: accepted,
        }),
        Event::Failed(fault) => What::FaultJson(json(&fault)),
    };
    wire::Event {
        what: Some(what),
        is_last,
    }
}

pub fn read_event(event: wire::Event) -> Result<Event, Damaged> {
    use wire::event::What;
    let wire::Event { what, is_last } = event;
    let what = what.ok_or_else(|| Damaged("an event of an unknown kind".to_owned()))?;
    Ok(match what {
        What::Token(token) => Event::Token {
            token: read_scored(token),
            is_last,
        },
        What::Prompt(wire::Prompt { scored }) => {
            let rest = scored.into_iter().map(|token| Some(read_scored(token)));
            Event::Prompt([None].into_iter().chain(rest).collect())
        }
        What::Finished(wire::Finished {
            stop,
            cached_tokens,
            complete,
            guessed_tokens,
            accepted_tokens,
        }) => Event::Finished {
            reason: match (stop, complete) {
                (Some(token), _) => FinishReason::Stop(token),
                (None, true) => FinishReason::Complete,
                (None, false) => FinishReason::Length,
            },
            cached_tokens,
            guessed: Guessed {
                tokens: guessed_tokens,
                accepted: accepted_tokens,
            },
        },
        What::Pooled(wire::Pooled { vector }) => Event::Pooled(vector),
        What::FaultJson(fault) => Event::Failed(from_json::<Fault>(&fault)?),
    })
}

fn scored(scored: Scored) -> wire::Scored {
    let Scored { token, logprob, top } = scored;
    let (top_tokens, top_logprobs) = top.into_iter().unzip();
    wire::Scored {
        token,
        logprob,
        top_tokens,
        top_logprobs,
    }
}

fn read_scored(scored: wire::Scored) -> Scored {
    let wire::Scored {
        token,
        logprob,
        top_tokens,
        top_logprobs,
    } = scored;
    Scored {
        token,
        logprob,
        top: top_tokens.into_iter().zip(top_logprobs).collect(),
    }
}
