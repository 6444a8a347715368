//! A call becomes sequences: model, prompt tokens, limits, admission, commands. Not here: what comes back (`relay`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tandem_core::TokenId;
use tandem_core::id::{AdapterDigest, AdapterRef, Digest};
use tandem_core::message::{Fault, LAST_PRIORITY};
use tandem_core::replica::Command;
use tandem_core::sampling::Sampling;
use tandem_text::chat::Ending;
use tandem_text::stop::{Matched, StopStrings};
use tandem_text::stream::TextStream;
use tandem_text::{Skip, SpecialTokens, TextError, Tokenizer};
use tokio::sync::mpsc;

use crate::answer::{Bounds, Plan};
use crate::api::{Call, Client, Generation, Prompt, RouterError, Tenant, Work};
use crate::catalog::Wish;
use crate::relay::{self, Choice, Order, Path, Relay};
use crate::texts::text_bytes;
use crate::traced::Traced;
use crate::{Router, text_error};

/// Stop strings of one call at most; clients send more than OpenAI's 4 (lm-eval does).
const MAX_STOPS: usize = 64;
/// Bytes of all stop strings of a call together, and token ids that end it: each choice has its own copy.
const MAX_STOP_BYTES: usize = 16 << 10;
const MAX_STOP_TOKENS: usize = 1024;
/// Pieces that may wait for a slow reader before its sequences are parked.
const PIECE_QUEUE: usize = 32;

/// An adapter that answers without a name of the client's.
pub(crate) struct Nameless {
    pub digest: AdapterDigest,
    /// The one replica that has it, in memory and in no folder.
    pub at: Option<mpsc::Sender<Command>>,
}

impl Router {
    /// Admit a call. Its sequences run until they end or `Generation::pieces` is dropped.
    pub async fn generate(&self, call: Call) -> Result<Generation, RouterError> {
        self.generate_from(call, None).await
    }

    /// `nameless`: what answers instead of `call.model`.
    pub(crate) async fn generate_from(
        &self,
        call: Call,
        nameless: Option<Nameless>,
    ) -> Result<Generation, RouterError> {
        let began = Instant::now();
        let traced = Traced::begin(&call);
        let Call {
            client,
            earlier,
            model,
            prompt,
            n,
            max_tokens,
            pooling,
            sampling,
            priority,
            cache_salt,
            constraint,
            answer,
            stop,
            stop_token_ids,
            include_stop_str_in_output,
            ignore_eos,
            skip_special_tokens,
            add_special_tokens,
        } = call;
        if self.stopping() {
            return Err(RouterError::Engine(Fault::ShuttingDown));
        }
        let info = self.info();
        let max_choices = self.0.config.max_choices;
        if n == 0 || n > max_choices {
            return Err(RouterError::invalid(
                "n",
                format!("n must be between 1 and {max_choices}, got {n}"),
            ));
        }
        if priority < 0 && !self.0.config.overtaking {
            let message = format!(
                "priority {priority} goes before requests that say nothing, which this server allows under \
                 --scheduling-policy priority alone; 0 and more are always taken"
            );
            return Err(RouterError::invalid("priority", message));
        }
        let limit = info.max_model_len;
        if let Some(asked) = max_tokens.filter(|&asked| asked > limit) {
            let message = format!("max_tokens must be at most {limit}, the context length, got {asked}");
            return Err(RouterError::invalid("max_tokens", message));
        }
        let defaults = &self.0.config.defaults;
        let sampling = Sampling::new(defaults.fill(sampling), info.vocab_size)?;
        let max_tokens = max_tokens.or(defaults.max_tokens);
        if let Some(max) = max_tokens.filter(|&max| sampling.min_tokens() > max) {
            let min = sampling.min_tokens();
            let message = format!("min_tokens must be at most max_tokens, got {min} and {max}");
            return Err(RouterError::invalid("min_tokens", message));
        }
        check_stops(&stop)?;
        if stop_token_ids.len() > MAX_STOP_TOKENS {
            let message = format!(
                "at most {MAX_STOP_TOKENS} stop_token_ids are allowed, got {}",
                stop_token_ids.len()
            );
            return Err(RouterError::invalid("stop_token_ids", message));
        }
        check_ids("stop_token_ids", &stop_token_ids, info.vocab_size)?;
        let stop_tokens = self.stop_tokens(stop_token_ids, ignore_eos);

        let fleet = &self.0.fleet;
        let wish = Wish {
            model: &model,
            nameless: nameless.as_ref().map(|adapter| adapter.digest),
            client: &client,
            n,
            earlier,
            slots: fleet.slots(),
            engine_waiting: fleet.waiting(),
        };
        let lease = match self.0.catalog.admit(wish) {
            // Another router may have made the name a moment ago.
            Err(RouterError::UnknownModel(_)) if self.0.store.is_shared() => {
                self.refresh_names().await?;
                self.0.catalog.admit(wish)?
            }
            admitted => admitted?,
        };
        let is_chat = matches!(prompt, Prompt::Chat { .. });
        let special = match add_special_tokens {
            true => SpecialTokens::Add,
            false => SpecialTokens::Omit,
        };
        let prompt: Arc<[TokenId]> = self.prompt_tokens(&client, prompt, special).await?.into();
        let max_tokens = fit(prompt.len(), max_tokens, limit, is_chat)?;
        client.took(prompt.len());
        if let Some(traced) = &traced {
            traced.prompt(prompt.len());
        }
        let (plan, bounds) = match (answer, constraint) {
            (Some(answer), constraint) => {
                let (plan, bounds) = self.plan(answer, &prompt, constraint).await?;
                (Some(plan), bounds)
            }
            (None, Some(constraint)) => {
                let bounds = Bounds {
                    grammar: Some(self.checked(constraint).await?),
                    thinking: None,
                };
                (None, bounds)
            }
            (None, None) => (None, Bounds::default()),
        };

        let skip = if skip_special_tokens {
            Skip::Special
        } else {
            Skip::Nothing
        };
        let matched = if include_stop_str_in_output {
            Matched::Shown
        } else {
            Matched::Hidden
        };
        let at = nameless.and_then(|adapter| adapter.at);
        let adapter = match (lease.adapter, &at) {
            (None, _) => None,
            // It lies in no folder.
            (Some(digest), Some(_)) => Some(AdapterRef {
                digest,
                folder: PathBuf::new(),
            }),
            (Some(digest), None) => Some(AdapterRef {
                digest,
                folder: self.0.store.adapter_folder(digest).await?,
            }),
        };
        // What another tenant has in the cache is not to be seen by what a prompt costs.
        let salt = match (cache_salt, client.tenant == Tenant::default()) {
            (None, true) => None,
            (None, false) => Some(Digest::of(client.tenant.as_str().as_bytes())),
            // No tenant's name has a NUL.
            (Some(salt), _) => Some(Digest::of(format!("{}\0{salt}", client.tenant).as_bytes())),
        };
        let relay = Relay {
            fleet: fleet.clone(),
            tokenizer: self.tokenizer().clone(),
            order: Order {
                prompt: prompt.clone(),
                adapter,
                at,
                sampling,
                bounds,
                priority: match client.work {
                    Work::Live => priority,
                    Work::Batch => LAST_PRIORITY,
                },
                key: client.key,
                salt,
                max_tokens,
                pooling,
                stop_tokens,
                trace: traced.as_ref().map(|traced| traced.context),
            },
            traced,
            skip,
            matched,
            one_call: plan.as_ref().is_some_and(|plan| !plan.parallel),
            lease,
        };
        let (seat, events) = relay.place_all(n).await.map_err(RouterError::Engine)?;
        self.0.admission.observe(began.elapsed());
        let seats = Choice::seats(seat, n);
        let choices = relay.lease.ids().zip(0..n).zip(seats.zip(events));
        let choices = choices
            .map(|((id, index), (seat, events))| {
                let mut text = TextStream::after(self.tokenizer().clone(), &prompt, skip);
                if let Some(plan) = &plan {
                    text = text.showing(plan.shown.clone());
                }
                let path = Path {
                    text,
                    stops: StopStrings::new(stop.iter().cloned(), matched),
                    reader: plan.as_ref().map(Plan::reader),
                };
                Choice::new(index, id, seat, events, path)
            })
            .collect();
        let (sender, pieces) = mpsc::channel(PIECE_QUEUE);
        let generation = Generation {
            prompt_tokens: prompt,
            adapter: relay.lease.adapter,
            base: info.base_digest,
            pieces,
        };
        tokio::spawn(relay::run(relay, choices, sender));
        Ok(generation)
    }

    /// EOS as the model's files and its tokenizer name it (they differ in the wild), and what the client adds.
    fn stop_tokens(&self, mut asked: Vec<TokenId>, ignore_eos: bool) -> Vec<TokenId> {
        if !ignore_eos {
            asked.extend(&self.info().eos_tokens);
            asked.extend(self.tokenizer().eos().map(|(id, _)| id));
        }
        // A tokenizer may know more tokens than the model can say.
        asked.retain(|&token| token < self.info().vocab_size);
        asked.sort_unstable();
        asked.dedup();
        asked
    }

    async fn prompt_tokens(
        &self,
        client: &Client,
        prompt: Prompt,
        special: SpecialTokens,
    ) -> Result<Vec<TokenId>, RouterError> {
        let limit = self.info().max_model_len;
        let least = text_bytes(&prompt) / self.0.longest_token_bytes;
        if least > limit as usize {
            // Not worth the seconds that exact numbers would take.
            let is_chat = matches!(prompt, Prompt::Chat { .. });
            return Err(too_long(limit, &format!("at least {least}"), is_chat));
        }
        let most_bytes = (limit as usize).saturating_mul(self.0.longest_token_bytes);
        let tokens = self.encode(&client.tenant, prompt, special, most_bytes).await?;
        if tokens.is_empty() {
            return Err(RouterError::invalid(
                "prompt",
                "the prompt is empty: it must have at least one token",
            ));
        }
        check_ids("prompt", &tokens, self.info().vocab_size)?;
        Ok(tokens)
    }
}

/// The tokens of a prompt; `special` is for plain text, `most_bytes` for what a template makes.
pub(crate) fn encode(
    tokenizer: &Tokenizer,
    prompt: Prompt,
    special: SpecialTokens,
    most_bytes: usize,
) -> Result<Vec<TokenId>, RouterError> {
    match prompt {
        Prompt::Tokens(tokens) => Ok(tokens),
        Prompt::Text(text) => tokenizer
            .encode(&text, special)
            .map_err(|error| text_error("prompt", error)),
        Prompt::Chat {
            messages,
            add_generation_prompt,
            continue_final_message,
            kwargs,
        } => {
            let ending = match (add_generation_prompt, continue_final_message) {
                (_, true) => Ending::OpenMessage,
                (true, false) => Ending::GenerationPrompt,
                (false, false) => Ending::Closed,
            };
            tokenizer
                .encode_chat(&messages, ending, &kwargs, most_bytes)
                .map_err(|error| match &error {
                    TextError::UnreadVariable { name, .. } => text_error(&name.clone(), error),
                    TextError::NoTools => text_error("tools", error),
                    _ => text_error("messages", error),
                })
        }
    }
}

/// Tokens to generate at most: what was asked, but no more than the context has room for (as vLLM does).
fn fit(prompt_tokens: usize, asked: Option<u32>, limit: u32, is_chat: bool) -> Result<u32, RouterError> {
    let room = u32::try_from(prompt_tokens)
        .ok()
        .and_then(|tokens| limit.checked_sub(tokens));
    match (room, asked) {
        (Some(_), Some(0)) => Ok(0),
        (Some(room @ 1..), asked) => Ok(asked.unwrap_or(room).min(room)),
        (Some(0), Some(asked)) if !is_chat => {
            let total = prompt_tokens as u64 + u64::from(asked);
            let message = format!(
                "you requested {total} tokens ({prompt_tokens} in your prompt; {asked} for the completion). Please \
                 reduce your prompt; or completion length."
            );
            Err(RouterError::ContextLength { limit, message })
        }
        _ => Err(too_long(limit, &prompt_tokens.to_string(), is_chat)),
    }
}

fn too_long(limit: u32, tokens: &str, is_chat: bool) -> RouterError {
    let message = match is_chat {
        true => {
            format!("your messages resulted in {tokens} tokens. Please reduce the length of the messages.")
        }
        false => format!("your prompt has {tokens} tokens. Please reduce the length of the prompt."),
    };
    RouterError::ContextLength { limit, message }
}

fn check_stops(stops: &[String]) -> Result<(), RouterError> {
    if stops.len() > MAX_STOPS {
        let message = format!(
            "at most {MAX_STOPS} stop strings are allowed, got {}",
            stops.len()
        );
        return Err(RouterError::invalid("stop", message));
    }
    let bytes: usize = stops.iter().map(String::len).sum();
    if bytes > MAX_STOP_BYTES {
        let message = format!("stop strings of {bytes} bytes together: at most {MAX_STOP_BYTES} are allowed");
        return Err(RouterError::invalid("stop", message));
    }
    match stops.iter().any(String::is_empty) {
        true => Err(RouterError::invalid("stop", "a stop string must not be empty")),
        false => Ok(()),
    }
}

fn check_ids(param: &str, ids: &[TokenId], vocab_size: u32) -> Result<(), RouterError> {
    match ids.iter().find(|&&id| id >= vocab_size) {
        Some(id) => {
            let message = format!("token id {id} is out of range: the vocabulary has {vocab_size} tokens");
            Err(RouterError::invalid(param, message))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_clamped_and_what_cannot_is_refused_with_numbers() {
        // prompt, asked, granted or a part of the refusal; the context has 10 tokens
        let cases = [
            (4, None, Ok(6)),
            (4, Some(2), Ok(2)),
            (4, Some(9), Ok(6)),
            (9, Some(9), Ok(1)),
            (10, Some(0), Ok(0)),
            (10, None, Err("your prompt has 10 tokens")),
            (
                10,
                Some(3),
                Err("you requested 13 tokens (10 in your prompt; 3 for the completion)"),
            ),
            (11, Some(0), Err("your prompt has 11 tokens")),
        ];
        for (prompt, asked, expected) in cases {
            let granted = fit(prompt, asked, 10, false).map_err(|error| error.to_string());
            match (granted, expected) {
                (Ok(granted), Ok(expected)) => assert_eq!(granted, expected, "{prompt} {asked:?}"),
                (Err(error), Err(part)) => {
                    assert!(error.starts_with("This model's maximum context length is 10 tokens. However, "));
                    assert!(error.contains(part), "{error}");
                }
                (granted, expected) => panic!("{prompt} {asked:?}: {granted:?}, expected {expected:?}"),
            }
        }
        let chat = fit(12, Some(1), 10, true).unwrap_err().to_string();
        assert!(chat.contains("your messages resulted in 12 tokens"), "{chat}");
    }
}
