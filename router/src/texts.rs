//! Work on texts, which takes a millisecond for some kilobytes and seconds for the longest that are taken: long ones go
//! to threads where no other request waits behind them, a few at a time, of tenants in turns. Not here: what is done with the text.

use std::sync::Arc;

use serde_json::Value;
use tandem_core::TokenId;
use tandem_store::Tenant;
use tandem_text::{Message, Skip, SpecialTokens, Tokenizer};

use crate::api::{Prompt, RouterError};
use crate::turns::Turns;
use crate::{Router, View, generate, text_error};

/// Up to here a text is worked on where it is: moving it to another thread costs as much.
const INLINE_TEXT_BYTES: usize = 4 << 10;

/// Of a text that is tokenized for its own sake: two seconds of a core, and many times the context of any model.
pub const MAX_TEXT_BYTES: usize = 4 << 20;

/// Of what a chat template makes: some seconds of a core.
const MAX_RENDERED_BYTES: usize = 2 * MAX_TEXT_BYTES;

pub(crate) struct Texts {
    pub tokenizer: Tokenizer,
    /// One for each core: more at once would only take the cores from each other, and from the engine.
    turns: Arc<Turns>,
}

impl Texts {
    pub fn new(tokenizer: Tokenizer) -> Texts {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Texts {
            tokenizer,
            turns: Turns::new(cores),
        }
    }

    pub async fn work<T: Send + 'static>(
        &self,
        tenant: &Tenant,
        bytes: usize,
        work: impl FnOnce(&Tokenizer) -> T + Send + 'static,
    ) -> T {
        if bytes <= INLINE_TEXT_BYTES {
            return work(&self.tokenizer);
        }
        let turn = self.turns.wait(tenant).await;
        let tokenizer = self.tokenizer.clone();
        let elsewhere = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&tokenizer)
        });
        match elsewhere.await {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }
}

impl Router {
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.0.texts.tokenizer
    }

    /// Whatever its length: who asks has looked at it. Of what a template makes at most `most_bytes` are tokenized.
    pub(crate) async fn encode(
        &self,
        tenant: &Tenant,
        prompt: Prompt,
        special: SpecialTokens,
        most_bytes: usize,
    ) -> Result<Vec<TokenId>, RouterError> {
        let bytes = work_bytes(&prompt);
        let most_bytes = most_bytes.min(MAX_RENDERED_BYTES);
        let encode = move |tokenizer: &Tokenizer| generate::encode(tokenizer, prompt, special, most_bytes);
        self.0.texts.work(tenant, bytes, encode).await
    }
}

impl View {
    pub fn tokenizer(&self) -> &Tokenizer {
        self.router.tokenizer()
    }

    /// `special` is for [`Prompt::Text`]; a chat template writes its own.
    pub async fn tokenize(
        &self,
        prompt: Prompt,
        special: SpecialTokens,
    ) -> Result<Vec<TokenId>, RouterError> {
        let bytes = work_bytes(&prompt);
        if bytes > MAX_TEXT_BYTES {
            let param = match &prompt {
                Prompt::Chat { .. } => "messages",
                Prompt::Text(_) | Prompt::Tokens(_) => "prompt",
            };
            let message =
                format!("a text of {bytes} bytes is too long: at most {MAX_TEXT_BYTES} are tokenized");
            return Err(RouterError::invalid(param, message));
        }
        let tenant = &self.client.tenant;
        self.router.encode(tenant, prompt, special, usize::MAX).await
    }

    pub async fn detokenize(&self, tokens: Vec<TokenId>) -> Result<String, RouterError> {
        if tokens.len() > MAX_TEXT_BYTES {
            let message = format!(
                "{} tokens are too many: at most {MAX_TEXT_BYTES} become text",
                tokens.len()
            );
            return Err(RouterError::invalid("tokens", message));
        }
        let bytes = size_of_val(&*tokens);
        let decode = move |tokenizer: &Tokenizer| tokenizer.decode(&tokens, Skip::Nothing);
        let texts = &self.router.0.texts;
        let text = texts.work(&self.client.tenant, bytes, decode).await;
        text.map_err(|error| text_error("tokens", error))
    }

    /// The text of each token.
    pub async fn spell(&self, tokens: Vec<TokenId>) -> Vec<String> {
        let bytes = size_of_val(&*tokens);
        let spell = move |tokenizer: &Tokenizer| tokens.iter().map(|&id| tokenizer.token_text(id)).collect();
        let texts = &self.router.0.texts;
        texts.work(&self.client.tenant, bytes, spell).await
    }
}

/// Bytes of text that are tokenized, a template's own not counted.
pub(crate) fn text_bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(_) => 0,
        Prompt::Chat { messages, .. } => messages.iter().map(Message::content_bytes).sum(),
    }
}

/// What there is to work on: also what a template is given beside the messages' content.
fn work_bytes(prompt: &Prompt) -> usize {
    let given = match prompt {
        Prompt::Chat { messages, kwargs, .. } => {
            let fields = messages.iter().flat_map(|message| message.fields.values());
            kwargs.values().chain(fields).map(value_bytes).sum()
        }
        Prompt::Text(_) | Prompt::Tokens(_) => 0,
    };
    text_bytes(prompt) + given
}

/// About the length of its JSON.
fn value_bytes(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 4,
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(value_bytes).sum(),
        Value::Object(values) => values
            .iter()
            .map(|(key, value)| key.len() + value_bytes(value))
            .sum(),
    }
}
