//! What a session samples from, and its samples: the router's ordinary calls, by tokens, gathered into one result. Not
//! here: how tokens are chosen (backend).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tandem_core::TokenId;
use tandem_core::id::AdapterDigest;
use tandem_core::sampling::RawSampling;
use tandem_store::ids;

use super::futures::{Futures, Promise};
use super::{MAX_ALL_SAMPLERS, MAX_SAMPLERS, Outcome, Session, check_tokens, lock};
use crate::api::{Call, Finish, Generation, Prompt, RouterError, TokenText, What};
use crate::generate::Nameless;
use crate::{Router, View};

/// Numbers of calls that are remembered, so that one that is sent again counts once.
const MAX_KNOWN: usize = 4096;

/// One question: some samples of one prompt.
#[derive(Clone, Debug)]
pub struct Ask {
    pub prompt: Vec<TokenId>,
    pub n: u32,
    pub max_tokens: Option<u32>,
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: i64,
    pub seed: Option<u64>,
    pub stop: Stop,
    pub prompt_logprobs: bool,
    /// Only those of the last tokens.
    pub prompt_logprobs_last: Option<u32>,
    pub top_prompt_logprobs: u32,
    pub top_logprobs: u32,
}

#[derive(Clone, Debug)]
pub enum Stop {
    /// Where the model ends by itself.
    Model,
    Texts(Vec<String>),
    Tokens(Vec<TokenId>),
}

/// Token and log-probability, best first.
pub type Top = Vec<(TokenId, f32)>;

#[derive(Debug, Default)]
pub struct Samples {
    pub sequences: Vec<Sampled>,
    /// One for each token of the prompt, where asked; NaN where there is none.
    pub prompt_logprobs: Option<Vec<f32>>,
    pub prompt_tops: Option<Vec<Top>>,
    pub cached_tokens: u32,
}

#[derive(Debug, Default)]
pub struct Sampled {
    pub tokens: Vec<TokenId>,
    pub logprobs: Vec<f32>,
    pub tops: Vec<Top>,
    /// It came to an end of its own.
    pub stopped: bool,
}

/// A sampler, for who asks what it is.
pub struct SamplerInfo {
    pub id: String,
    pub base_model: String,
    pub path: Option<String>,
}

pub(super) struct Sampler {
    pub id: String,
    base_model: String,
    path: Option<String>,
    weights: Weights,
    /// The futures of numbers that came, and how many samples each was promised.
    known: Mutex<BTreeMap<u64, (String, u32)>>,
}

#[derive(Clone)]
pub(super) enum Weights {
    Base,
    /// A name of the catalog: what was saved.
    Named(String),
    /// What another tenant published, as long as it is.
    Published(String),
    Snapshot(AdapterDigest),
    Inflight(Arc<Mutex<AdapterDigest>>),
}

impl Sampler {
    pub fn new(id: String, base_model: String, path: Option<String>, weights: Weights) -> Sampler {
        Sampler {
            id,
            base_model,
            path,
            weights,
            known: Mutex::default(),
        }
    }

    /// Numbers whose results nobody can fetch any more.
    pub fn forget(&self, futures: &Futures) {
        lock(&self.known).retain(|_, (id, _)| futures.has(id));
    }
}

/// Of the samples of one call.
fn names(id: &str, n: u32) -> Vec<String> {
    (0..n).map(|i| format!("{id}-{i}")).collect()
}

impl View {
    /// A sampler of the base, or of what is kept as `path`.
    pub async fn create_sampler(
        &self,
        session: &str,
        seq: u64,
        base_model: Option<&str>,
        path: Option<&str>,
    ) -> Result<String, RouterError> {
        let router = &self.router;
        let served = router.config().served_model_name.clone();
        if let Some(asked) = base_model.filter(|asked| path.is_none() && !router.0.catalog.is_base(asked)) {
            let message = format!("base_model {asked:?} is not served here: it must be {served:?}");
            return Err(RouterError::invalid("base_model", message));
        }
        let base = base_model.filter(|asked| router.0.catalog.is_base(asked));
        let base = base.unwrap_or(&served).to_owned();
        let weights = match path {
            Some(path) => router.sampled_by(&self.client, path).await?,
            None if base_model.is_some() => Weights::Base,
            None => {
                let message = "base_model or model_path must say what to sample from";
                return Err(RouterError::invalid("base_model", message));
            }
        };
        let id = format!("{session}:sample:{seq}");
        let sampler = Sampler::new(id, base, path.map(str::to_owned), weights);
        self.put_sampler(session, seq, sampler)
    }

    /// One that is there already stays: the same call was sent again.
    pub(super) fn put_sampler(
        &self,
        session: &str,
        seq: u64,
        sampler: Sampler,
    ) -> Result<String, RouterError> {
        let count = |session: &Session| session.samplers.len();
        let tinker = &self.router.0.tinker;
        let has_share = tinker.check_share(session, "samplers", MAX_ALL_SAMPLERS, count);
        self.in_session(session, |session| {
            if !session.samplers.contains_key(&seq) {
                has_share?;
            }
            if session.samplers.len() >= MAX_SAMPLERS && !session.samplers.contains_key(&seq) {
                let message = format!("a session has at most {MAX_SAMPLERS} samplers; begin another session");
                return Err(RouterError::invalid("sampling_session_seq_id", message));
            }
            let sampler = session.samplers.entry(seq).or_insert_with(|| Arc::new(sampler));
            Ok(sampler.id.clone())
        })?
    }

    pub fn sampler(&self, id: &str) -> Result<SamplerInfo, RouterError> {
        let sampler = self.seen_sampler(id)?;
        Ok(SamplerInfo {
            id: sampler.id.clone(),
            base_model: sampler.base_model.clone(),
            path: sampler.path.clone(),
        })
    }

    fn seen_sampler(&self, id: &str) -> Result<Arc<Sampler>, RouterError> {
        let sampler = self.router.0.tinker.sampler(&self.client, id);
        sampler.ok_or_else(|| RouterError::Unknown {
            what: "sampler (it lives as long as its session and the server)",
            id: id.to_owned(),
        })
    }

    /// The future of call number `seq`, and the names of its samples. Only a server that is full says so at once.
    pub async fn sample(
        &self,
        sampler: &str,
        seq: u64,
        n: u32,
        ask: Result<Ask, String>,
    ) -> Result<(String, Vec<String>), RouterError> {
        let sampler = self.seen_sampler(sampler)?;
        let id = ids::future();
        {
            let mut known = lock(&sampler.known);
            if let Some((id, n)) = known.get(&seq) {
                return Ok((id.clone(), names(id, *n)));
            }
            known.insert(seq, (id.clone(), n));
            if known.len() > MAX_KNOWN {
                known.pop_first();
            }
        }
        let promise = self.router.0.tinker.futures.promise(&id, &self.client.tenant);
        let begun = match ask {
            Err(why) => Err(Outcome::user_failed(why)),
            Ok(ask) => match self.begin(&sampler, &ask).await {
                Err(error @ RouterError::Busy { .. }) => {
                    lock(&sampler.known).remove(&seq);
                    self.router.0.tinker.futures.forget(&id);
                    return Err(error);
                }
                begun => begun
                    .map(|generation| (ask, generation))
                    .map_err(Outcome::of_error),
            },
        };
        match begun {
            Err(failed) => promise.keep(failed),
            Ok((ask, generation)) => drop(tokio::spawn(gather(ask, generation, promise))),
        }
        let names = names(&id, n);
        Ok((id, names))
    }

    async fn begin(&self, sampler: &Sampler, ask: &Ask) -> Result<Generation, RouterError> {
        let router = &self.router;
        let adapter = match &sampler.weights {
            Weights::Base | Weights::Named(_) => None,
            Weights::Published(path) => Some(router.published(&self.client, path).await?),
            Weights::Snapshot(digest) => Some(router.use_snapshot(*digest)?),
            Weights::Inflight(digest) => {
                let digest = *lock(digest);
                Some(router.use_snapshot(digest)?)
            }
        };
        let model = match &sampler.weights {
            Weights::Named(path) => path.clone(),
            _ => router.config().served_model_name.clone(),
        };
        check_tokens(&ask.prompt, router.info().vocab_size)
            .map_err(|message| RouterError::invalid("prompt", message))?;
        let (texts, tokens, ignore_eos) = match &ask.stop {
            Stop::Model => (vec![], vec![], false),
            Stop::Texts(texts) => (texts.clone(), vec![], true),
            Stop::Tokens(tokens) => (vec![], tokens.clone(), true),
        };
        let call = Call {
            client: self.client.clone(),
            earlier: 0,
            model,
            prompt: Prompt::Tokens(ask.prompt.clone()),
            n: ask.n,
            max_tokens: ask.max_tokens,
            // All of it, so that nothing is filled in from the model's recommendations.
            sampling: RawSampling {
                temperature: Some(ask.temperature),
                top_p: Some(ask.top_p),
                top_k: Some(ask.top_k),
                min_p: Some(0.0),
                presence_penalty: Some(0.0),
                frequency_penalty: Some(0.0),
                repetition_penalty: Some(1.0),
                logit_bias: vec![],
                seed: ask.seed,
                logprobs: Some(ask.top_logprobs),
                prompt_logprobs: ask.prompt_logprobs.then_some(ask.top_prompt_logprobs),
                min_tokens: Some(0),
            },
            priority: 0,
            cache_salt: None,
            constraint: None,
            answer: None,
            stop: texts,
            stop_token_ids: tokens,
            include_stop_str_in_output: true,
            ignore_eos,
            skip_special_tokens: false,
            add_special_tokens: false,
            pooling: None,
        };
        router.generate_from(call, adapter).await
    }
}

impl Router {
    /// It was just used, and is still there.
    fn use_snapshot(&self, digest: AdapterDigest) -> Result<Nameless, RouterError> {
        let mut snapshots = self.0.tinker.snapshots();
        match snapshots.get_mut(&digest) {
            Some(snapshot) if !snapshot.replica.commands.is_closed() => {
                snapshot.used = Instant::now();
                let at = snapshot.replica.commands.clone();
                Ok(Nameless { digest, at: Some(at) })
            }
            _ => {
                let message = "the weights of this sampler are no longer in memory: newer snapshots took their place, or the \
                               engine was lost. Make a new sampler, or keep weights by a name: save_weights_for_sampler(name)";
                Err(RouterError::invalid("sampling_session_id", message))
            }
        }
    }
}

/// All of it, or why not.
async fn gather(ask: Ask, mut generation: Generation, promise: Promise) {
    let n = ask.n as usize;
    let mut samples = Samples {
        sequences: (0..n).map(|_| Sampled::default()).collect(),
        ..Samples::default()
    };
    let mut open = n;
    while open > 0 {
        let Some(piece) = generation.pieces.recv().await else {
            return promise.keep(Outcome::server_failed("the engine went away"));
        };
        let choice = piece.choice as usize;
        let sequence = &mut samples.sequences[choice];
        match piece.what {
            What::Prompt(scores) if choice == 0 => {
                let skipped = ask
                    .prompt_logprobs_last
                    .map_or(0, |last| scores.len().saturating_sub(last as usize));
                let of = |(i, score): (usize, &Option<TokenText>)| match score {
                    Some(score) if i >= skipped => score.logprob,
                    _ => f32::NAN,
                };
                samples.prompt_logprobs = Some(scores.iter().enumerate().map(of).collect());
                let tops = |(i, score): (usize, &Option<TokenText>)| match score {
                    Some(score) if i >= skipped => top(score),
                    _ => vec![],
                };
                samples.prompt_tops = Some(scores.iter().enumerate().map(tops).collect());
            }
            What::Prompt(_) | What::Pooled(_) => {}
            What::Text { tokens, .. } => {
                for token in &tokens {
                    sequence.tokens.push(token.id);
                    sequence.logprobs.push(token.logprob);
                    sequence.tops.push(top(token));
                }
            }
            What::Finished {
                reason,
                cached_tokens,
                ..
            } => {
                sequence.stopped = reason != Finish::Length;
                samples.cached_tokens = samples.cached_tokens.max(cached_tokens);
                open -= 1;
            }
            What::Failed(fault) => return promise.keep(Outcome::of_fault(fault)),
        }
    }
    promise.keep(Outcome::Sampled(samples));
}

fn top(token: &TokenText) -> Top {
    token
        .top
        .iter()
        .map(|(id, _, _, logprob)| (*id, *logprob))
        .collect()
}
