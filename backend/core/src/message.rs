//! What is said to a replica and what it says back. The same messages cross a channel in one process and gRPC
//! between machines; senders of replies are added by the transport (see [`crate::replica`]).

use std::ops::AddAssign;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::TokenId;
use crate::grammar::{self, Grammar};
use crate::id::{AdapterRef, Digest, RequestId};
use crate::pooling::Pooling;
use crate::sampling::Sampling;
use crate::thinking::Budget;
use crate::trace::TraceContext;

/// Continue one token sequence. Everything in it is checked: the prompt is not empty, its ids are below the
/// vocabulary size, `prompt.len() + max_tokens <= max_model_len`.
#[derive(Clone, Debug, PartialEq)]
pub struct Generate {
    pub id: RequestId,
    /// Shared by the choices of a call.
    pub prompt: Arc<[TokenId]>,
    /// `None`: the base model.
    pub adapter: Option<AdapterRef>,
    pub sampling: Sampling,
    /// What the answer must be a sentence of.
    pub grammar: Option<Grammar>,
    /// How long it may reason.
    pub thinking: Option<Box<Budget>>,
    /// What has a lower one goes first; among equals, keys and their adapters take turns.
    pub priority: i32,
    /// A digest of the API key that asks; 0 without one.
    pub key: u64,
    /// Whose KV blocks it may find, and who may find its own: those with the same salt alone.
    pub salt: Option<Digest>,
    /// Tokens to generate at most; 0 only scores the prompt, or pools it.
    pub max_tokens: u32,
    /// The prompt becomes a vector.
    pub pooling: Option<Pooling>,
    /// Generation ends after any of these (EOS among them, unless the client ignores it).
    pub stop_tokens: Vec<TokenId>,
    /// Of whoever waits for the answer, where that is traced; apart, because most are not.
    pub trace: Option<Box<TraceContext>>,
}

/// Of requests that nobody waits for: they go behind all others.
pub const LAST_PRIORITY: i32 = i32::MAX;
/// Stop tokens of one request at most: each step looks through them.
pub const MAX_STOP_TOKENS: usize = 2048;

impl Generate {
    /// Of the base model, with nothing that could be left out.
    pub fn new(id: RequestId, prompt: Arc<[TokenId]>, sampling: Sampling, max_tokens: u32) -> Generate {
        Generate {
            id,
            prompt,
            adapter: None,
            sampling,
            grammar: None,
            thinking: None,
            priority: 0,
            key: 0,
            salt: None,
            max_tokens,
            pooling: None,
            stop_tokens: vec![],
            trace: None,
        }
    }

    /// Whether a model with these sizes can be asked this. Who sends a request has checked it; whoever takes one in does
    /// so again, because one wrong token would cost a whole step's requests.
    pub fn check(&self, vocab_size: u32, max_model_len: u32) -> Result<(), Fault> {
        let Generate {
            id: _,
            prompt,
            adapter: _,
            sampling,
            grammar,
            thinking,
            priority: _,
            key: _,
            salt: _,
            max_tokens,
            pooling,
            stop_tokens,
            trace: _,
        } = self;
        let refused = |why: String| Err(Fault::Refused(why));
        let n = prompt.len();
        if n == 0 {
            return refused("a prompt of 0 tokens cannot be continued".to_owned());
        }
        if n as u64 + u64::from(*max_tokens) > u64::from(max_model_len) {
            return refused(format!(
                "a prompt of {n} tokens and {max_tokens} more exceed {max_model_len}"
            ));
        }
        if pooling.is_some() && (*max_tokens > 0 || sampling.prompt_logprobs().is_some()) {
            return refused("a prompt that is pooled is neither continued nor scored".to_owned());
        }
        if stop_tokens.len() > MAX_STOP_TOKENS {
            return refused(format!(
                "at most {MAX_STOP_TOKENS} stop tokens are allowed, got {}",
                stop_tokens.len()
            ));
        }
        if let Some(budget) = thinking {
            budget.check().map_err(Fault::Refused)?;
        }
        let marks = thinking.iter().flat_map(|budget| &budget.end);
        let mut tokens = prompt.iter().chain(stop_tokens).chain(marks);
        if let Some(token) = tokens.find(|&&id| id >= vocab_size) {
            return refused(format!("token {token} is not in the vocabulary of {vocab_size}"));
        }
        if let Some(bytes) = grammar.as_ref().map(|grammar| grammar.text().len())
            && bytes > grammar::MAX_BYTES
        {
            return refused(format!(
                "a grammar of {bytes} bytes: at most {} are allowed",
                grammar::MAX_BYTES
            ));
        }
        let known = sampling.check_vocabulary(vocab_size);
        known.map_err(|error| Fault::Refused(error.to_string()))
    }
}

/// A token with its log-probability under the model (before temperature and penalties, as vLLM reports it) and the
/// most likely alternatives, best first (under a grammar: among the tokens that it allows). Empty and NaN-free when
/// log-probabilities were not asked: `logprob` is 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    pub token: TokenId,
    pub logprob: f32,
    pub top: Vec<(TokenId, f32)>,
}

/// What a sequence tells its client, in this order: `Prompt` or `Pooled` at most once, `Token`s, then one of the two ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// One entry per prompt token; the first has none. Sent once, when prompt log-probabilities were asked.
    Prompt(Vec<Option<Scored>>),
    /// `[H]`, of [`Generate::pooling`].
    Pooled(Vec<f32>),
    /// A generated token, a final stop token included. `is_last`: `Finished` follows at once.
    Token {
        token: Scored,
        is_last: bool,
    },
    Finished {
        reason: FinishReason,
        cached_tokens: u32,
        guessed: Guessed,
    },
    Failed(Fault),
}

/// How many tokens of an answer were guessed before they were computed, and how many of the guesses were right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guessed {
    pub tokens: u32,
    pub accepted: u32,
}

impl AddAssign for Guessed {
    fn add_assign(&mut self, Guessed { tokens, accepted }: Guessed) {
        self.tokens += tokens;
        self.accepted += accepted;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinishReason {
    /// One of the stop tokens was generated.
    Stop(TokenId),
    /// The grammar is at its end: nothing can follow.
    Complete,
    /// `max_tokens` were generated.
    Length,
}

/// Why a replica could not do what was asked. The reader acts differently on each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Fault {
    /// Try again later, or elsewhere.
    #[error("the replica's waiting queue is full: {waiting} requests wait")]
    Overloaded { waiting: u32 },
    /// This replica can never serve the request: it is too long, or has a value that no request may have.
    #[error("{0}")]
    Refused(String),
    /// The adapter's folder is missing, damaged, or asks for what is not supported. Says which and why.
    #[error("{0}")]
    Adapter(String),
    /// The request's grammar does not compile here, or became too complex to follow. Says why.
    #[error("{0}")]
    Grammar(String),
    /// A step failed in the tensor library; the request's state is lost, the replica lives.
    #[error("the engine failed a step: {0}")]
    Step(String),
    /// Its client took nothing in while too many others did so, too.
    #[error("the answer was given up because nothing of it was read while many others waited")]
    Unread,
    #[error("the replica is shutting down")]
    ShuttingDown,
    /// The replica is gone (a rank died, a connection broke); it comes back, or others answer.
    #[error("the replica was lost: {0}")]
    ReplicaLost(String),
}
