//! Everything that happens to one request's choices, in order, from all its prompts at once; and who answers. Not
//! here: shapes of the wire.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use tandem_core::TokenId;
use tandem_core::id::{AdapterDigest, Digest};
use tandem_core::message::{Fault, Guessed};
use tandem_openapi::usage::Usage;
use tandem_router::api::{
    Call, CallDelta, Client, Delta, Finish, Generation, ModelKind, Piece, RouterError, TokenText, What,
};
use tokio::sync::mpsc;

use crate::access_log::Exchange;
use crate::app::App;
use crate::error::{ApiError, invalid};
use crate::metrics::Meter;

/// Pieces that are taken from one prompt's channel at once.
const BATCH: usize = 64;
/// Log-probabilities of a request's prompts, which are held until all are there: about 300 bytes each.
const MAX_PROMPT_SCORES: usize = 1 << 20;

/// Which weights answer.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    base: Digest,
    adapter: Option<AdapterDigest>,
}

impl Identity {
    pub fn fingerprint(&self) -> String {
        match self.adapter {
            None => format!("fp_{}", self.base.short()),
            Some(adapter) => format!("fp_{}_{}", self.base.short(), adapter.short()),
        }
    }

    pub fn write(&self, headers: &mut HeaderMap) {
        let value =
            |digest: Digest| HeaderValue::from_str(&digest.to_string()).expect("a digest is hexadecimal");
        headers.insert(HeaderName::from_static("x-tandem-base"), value(self.base));
        if let Some(adapter) = self.adapter {
            headers.insert(HeaderName::from_static("x-tandem-adapter"), value(adapter));
        }
    }
}

/// A piece and the prompt it belongs to.
pub type Placed = (usize, Piece);

pub struct Feed {
    prompts: Vec<Prompt>,
    batch: Vec<Piece>,
    exchange: Option<Arc<Exchange>>,
}

struct Prompt {
    /// `None` once it is closed.
    pieces: Option<mpsc::Receiver<Piece>>,
    /// Choices that have not ended.
    open: Vec<u32>,
    meter: Meter,
}

/// A request whose calls were all admitted.
pub struct Admitted {
    pub identity: Identity,
    pub prompts: Vec<Vec<TokenId>>,
    pub feed: Feed,
}

/// All calls are to one model. If one is refused, those before it are aborted by being dropped.
pub async fn admit(
    app: &App,
    client: Client,
    calls: impl IntoIterator<Item = Call, IntoIter: Send>,
    prompt_param: &'static str,
) -> Result<Admitted, ApiError> {
    let refused = |error: RouterError| match error {
        RouterError::Invalid {
            param: Some(param),
            code,
            message,
        } if param == "prompt" => ApiError::Router(RouterError::Invalid {
            param: Some(prompt_param.to_owned()),
            code,
            message,
        }),
        RouterError::Invalid { .. } | RouterError::UnknownModel(_) => ApiError::Router(error),
        error => ApiError::Prompt(error, prompt_param),
    };
    let exchange = Exchange::current();
    let (mut admitted, mut earlier): (Option<Admitted>, u32) = (None, 0);
    let mut scores = 0;
    for call in calls {
        let (n, model) = (call.n, call.model.clone());
        let of_token = call.sampling.prompt_logprobs.map_or(0, |k| k as usize + 1);
        let call = Call {
            client: client.clone(),
            earlier,
            ..call
        };
        earlier += n;
        let generation = app.router.generate(call).await.map_err(refused)?;
        let Generation {
            prompt_tokens,
            adapter,
            base,
            pieces,
        } = generation;
        scores += of_token * prompt_tokens.len();
        if scores > MAX_PROMPT_SCORES {
            return Err(invalid(
                "prompt_logprobs",
                format!(
                    "the prompts have more than {MAX_PROMPT_SCORES} log-probabilities to tell, alternatives counted: send fewer \
                     prompts, or ask for fewer"
                ),
            ));
        }
        if let Some(exchange) = &exchange {
            exchange.asks(&model, adapter, prompt_tokens.len());
        }
        let name = match (
            adapter,
            app.router.of(&client).model(&model).map(|card| card.kind),
        ) {
            (Some(_), Ok(ModelKind::Adapter { .. }) | Err(_)) => Some(model),
            _ => None,
        };
        let meter = Meter::new(app.metrics.clone(), name, n);
        let prompt = Prompt {
            pieces: Some(pieces),
            open: (0..n).collect(),
            meter,
        };
        let all = admitted.get_or_insert_with(|| Admitted {
            identity: Identity { base, adapter },
            prompts: Vec::new(),
            feed: Feed {
                prompts: Vec::new(),
                batch: Vec::new(),
                exchange: exchange.clone(),
            },
        });
        all.prompts.push(prompt_tokens.to_vec());
        all.feed.prompts.push(prompt);
    }
    admitted.ok_or_else(|| ApiError::Internal("a request without calls".to_owned()))
}

impl Feed {
    /// Waits for news and appends it to `out`. `false`: every choice has ended.
    pub async fn next(&mut self, out: &mut Vec<Placed>) -> bool {
        poll_fn(|context| {
            let Feed {
                prompts,
                batch,
                exchange,
            } = self;
            let mut waiting = false;
            for (i, prompt) in prompts.iter_mut().enumerate() {
                let Some(pieces) = &mut prompt.pieces else {
                    continue;
                };
                match pieces.poll_recv_many(context, batch, BATCH) {
                    Poll::Pending => waiting = true,
                    Poll::Ready(0) => {
                        prompt.pieces = None;
                        // A channel that closes early is an engine that died; its choices must not hang or look whole.
                        let fault = || What::Failed(Fault::Step("the engine went away".to_owned()));
                        batch.extend(prompt.open.iter().map(|&choice| Piece {
                            choice,
                            what: fault(),
                        }));
                    }
                    Poll::Ready(_) => {}
                }
                for piece in batch.drain(..) {
                    prompt.meter.see(&piece);
                    if let Some(exchange) = exchange {
                        exchange.see(&piece);
                    }
                    if matches!(piece.what, What::Finished { .. } | What::Failed(_)) {
                        prompt.open.retain(|&choice| choice != piece.choice);
                    }
                    out.push((i, piece));
                }
                if prompt.open.is_empty() {
                    prompt.pieces = None;
                }
            }
            match (out.is_empty(), waiting) {
                (false, _) => Poll::Ready(true),
                (true, true) => Poll::Pending,
                (true, false) => Poll::Ready(false),
            }
        })
        .await
    }
}

/// One finished choice.
#[derive(Debug, Default)]
pub struct Gathered {
    pub text: String,
    pub reasoning: String,
    pub calls: Vec<Called>,
    pub tokens: Vec<TokenText>,
    pub prompt: Option<Vec<Option<TokenText>>>,
    pub vector: Option<Vec<f32>>,
    pub finish: Option<Finish>,
    pub stop_string: Option<String>,
    pub completion_tokens: u32,
    pub cached_tokens: u32,
    pub guessed: Guessed,
    pub reasoning_tokens: u64,
}

/// A call, whole.
#[derive(Debug, Default)]
pub struct Called {
    pub name: String,
    pub arguments: String,
}

impl Gathered {
    fn add(&mut self, delta: Delta) {
        let Delta {
            reasoning,
            content,
            calls,
        } = delta;
        self.text.push_str(&content);
        self.reasoning.push_str(&reasoning);
        for CallDelta {
            index,
            name,
            arguments,
        } in calls
        {
            if self.calls.len() <= index {
                self.calls.resize_with(index + 1, Called::default);
            }
            let call = &mut self.calls[index];
            call.name.extend(name);
            call.arguments.push_str(&arguments);
        }
    }

    pub fn token_ids(&self) -> Vec<TokenId> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

/// All choices, whole, at `prompt * n + choice`.
pub async fn gather(feed: &mut Feed, n: u32) -> Result<Vec<Gathered>, ApiError> {
    let mut all: Vec<Gathered> = (0..feed.prompts.len() * n as usize)
        .map(|_| Gathered::default())
        .collect();
    let mut news = Vec::new();
    while feed.next(&mut news).await {
        for (prompt, Piece { choice, what }) in news.drain(..) {
            let index = prompt * n as usize + choice as usize;
            let one = all
                .get_mut(index)
                .ok_or_else(|| ApiError::Internal(format!("a piece of choice {index}")))?;
            match what {
                What::Prompt(tokens) => one.prompt = Some(tokens),
                What::Pooled(vector) => one.vector = Some(vector),
                What::Text {
                    text,
                    tokens,
                    reasoning_tokens,
                    is_last: _,
                } => {
                    one.reasoning_tokens += u64::from(reasoning_tokens);
                    one.add(text);
                    one.tokens.extend(tokens);
                }
                What::Finished {
                    reason,
                    completion_tokens,
                    cached_tokens,
                    stop_string,
                    guessed,
                } => {
                    one.finish = Some(reason);
                    one.stop_string = stop_string;
                    (one.completion_tokens, one.cached_tokens) = (completion_tokens, cached_tokens);
                    one.guessed = guessed;
                }
                What::Failed(fault) => return Err(ApiError::Router(RouterError::Engine(fault))),
            }
        }
    }
    Ok(all)
}

/// A prompt is computed once for its `n` choices, and counted once.
pub fn usage(prompts: &[Vec<TokenId>], gathered: &[Gathered], n: u32) -> Usage {
    let prompt_tokens = prompts.iter().map(|prompt| prompt.len() as u64).sum();
    let completion_tokens = gathered.iter().map(|one| u64::from(one.completion_tokens)).sum();
    let cached_tokens = gathered
        .iter()
        .step_by(n as usize)
        .map(|one| u64::from(one.cached_tokens))
        .sum();
    let mut guessed = Guessed::default();
    gathered.iter().for_each(|one| guessed += one.guessed);
    Usage::new(prompt_tokens, completion_tokens, cached_tokens)
        .guessing(guessed.tokens.into(), guessed.accepted.into())
        .reasoning(gathered.iter().map(|one| one.reasoning_tokens).sum())
}

pub fn finish_reason(reason: Finish) -> &'static str {
    match reason {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Calls => "tool_calls",
    }
}
