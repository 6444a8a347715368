//! A model's tokenizer as its folder describes it: text to ids, ids to text, the special tokens. Not here: the chat
//! template's language (`chat`), incremental text (`stream`).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tokenizers::processors::template::TemplateProcessing;

use crate::bytes::TokenBytes;
use crate::chat::{ChatTemplate, Ending, Kwargs, Message};
use crate::error::TextError;

/// Cheap to clone, safe to share.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    library: tokenizers::Tokenizer,
    bytes: TokenBytes,
    special: Vec<bool>,
    bos: Option<(u32, String)>,
    eos: Option<(u32, String)>,
    /// Text is encoded as if it began with a space (SentencePiece's dummy prefix).
    prefixes_space: bool,
    template_source: Option<String>,
    template: Result<ChatTemplate, TextError>,
}

/// Whether encoding adds what the tokenizer adds by default (BOS, mostly).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    Add,
    Omit,
}

/// What decoding leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    Nothing,
    Special,
}

/// A token and the bytes of the encoded text it came from; a token that was added has none.
pub(crate) struct Placed {
    pub id: u32,
    pub start: usize,
    pub end: usize,
}

/// tokenizer_config.json, as far as it is read, and the files beside it.
#[derive(Default, Deserialize)]
struct Config {
    #[serde(default)]
    bos_token: Option<AddedToken>,
    #[serde(default)]
    eos_token: Option<AddedToken>,
    #[serde(default)]
    pad_token: Option<AddedToken>,
    #[serde(default)]
    unk_token: Option<AddedToken>,
    #[serde(default)]
    add_bos_token: Option<bool>,
    #[serde(default)]
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AddedToken {
    Text(String),
    Object { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Tokenizer {
    /// Reads tokenizer.json, and where there are tokenizer_config.json, special_tokens_map.json, chat_template.jinja.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer, TextError> {
        let path = folder.join("tokenizer.json");
        let json = std::fs::read(&path).map_err(|error| {
            let hint = match folder.join("tokenizer.model").exists() {
                true => "; tokenizer.model alone is not read: save the model once with transformers to get tokenizer.json",
                false => "",
            };
            TextError::Read { path: path.clone(), message: format!("{error}{hint}") }
        })?;
        let damaged = |error: tokenizers::Error| TextError::Damaged {
            path,
            message: error.to_string(),
        };
        let library = tokenizers::Tokenizer::from_bytes(json).map_err(damaged)?;

        let mut config: Config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        let map: Config = read_json(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
        config.bos_token = config.bos_token.or(map.bos_token);
        config.eos_token = config.eos_token.or(map.eos_token);
        config.pad_token = config.pad_token.or(map.pad_token);
        config.unk_token = config.unk_token.or(map.unk_token);
        // Newer transformers writes the template beside the config, and then prefers it.
        if let Some(source) = read_text(&folder.join("chat_template.jinja"))? {
            config.chat_template = Some(Templates::One(source));
        }
        Tokenizer::new(library, config)
    }

    fn new(mut library: tokenizers::Tokenizer, config: Config) -> Result<Tokenizer, TextError> {
        let Config {
            bos_token,
            eos_token,
            pad_token,
            unk_token,
            add_bos_token,
            chat_template,
        } = config;
        // Tokenizing one request must not fight the compute pool for the cores.
        tokenizers::utils::parallelism::set_parallelism(false);
        // Both may have been saved by a training script; a server must not cut a prompt silently.
        library.with_padding(None);
        library
            .with_truncation(None)
            .map_err(|error| TextError::Unsupported(error.to_string()))?;

        let texts = [
            ("bos_token", bos_token),
            ("eos_token", eos_token),
            ("pad_token", pad_token),
            ("unk_token", unk_token),
        ];
        let [bos, eos, pad, unk] = texts.map(|(name, token)| {
            let text = token.map(|token| match token {
                AddedToken::Text(text) | AddedToken::Object { content: text } => text,
            });
            (name, text.filter(|text| !text.is_empty()))
        });
        let template_source = chat_template.and_then(default_template);
        let template = match &template_source {
            Some(source) => {
                let known = [&bos, &eos, &pad, &unk].into_iter();
                ChatTemplate::new(
                    source,
                    known.filter_map(|(name, text)| Some((*name, text.as_deref()?))),
                )
            }
            None => Err(TextError::NoChatTemplate),
        };
        let with_id = |(_, text): (_, Option<String>)| {
            let text = text?;
            Some((library.token_to_id(&text)?, text))
        };
        let (bos, eos) = (with_id(bos), with_id(eos));
        // As transformers does: tokenizer.json's post-processor decides about BOS, the config only where there is none.
        if let (None, Some(true), Some((id, text))) = (library.get_post_processor(), add_bos_token, &bos) {
            library.with_post_processor(Some(prepend(*id, text)?));
        }

        let ids = library.get_vocab(true).into_values();
        let vocab_size = ids.max().map_or(0, |id| id as usize + 1);
        let bytes = TokenBytes::new(&library, vocab_size)?;
        let mut special = vec![false; vocab_size];
        for (id, token) in library.get_added_tokens_decoder() {
            special[id as usize] = token.special;
        }
        let mut inner = Inner {
            library,
            bytes,
            special,
            bos,
            eos,
            prefixes_space: false,
            template_source,
            template,
        };
        // Asked by example: the dummy prefix can come from a normalizer or from a pre-tokenizer, in several versions.
        let probe = inner.encode("a", SpecialTokens::Omit, |encoding| {
            encoding.get_ids().first().copied()
        })?;
        inner.prefixes_space = probe
            .and_then(|id| inner.bytes.get(id))
            .is_some_and(|bytes| bytes.starts_with(b" "));
        Ok(Tokenizer(Arc::new(inner)))
    }

    pub fn encode(&self, text: &str, special_tokens: SpecialTokens) -> Result<Vec<u32>, TextError> {
        self.0
            .encode(text, special_tokens, |encoding| encoding.get_ids().to_vec())
    }

    pub(crate) fn encode_placed(
        &self,
        text: &str,
        special_tokens: SpecialTokens,
    ) -> Result<Vec<Placed>, TextError> {
        self.0.encode_with_offsets(text, special_tokens)
    }

    /// The prompt of a chat. Templates write BOS and the like themselves, so none is added, as in transformers.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        ending: Ending,
        kwargs: &Kwargs,
    ) -> Result<Vec<u32>, TextError> {
        let rendered = self.chat_template()?.render(messages, ending, kwargs)?;
        self.encode(&rendered, SpecialTokens::Omit)
    }

    /// Ids of `text` as it goes on after other text: without the dummy prefix that the beginning of a text gets.
    /// `None` where a token would span the seam.
    pub(crate) fn encode_continuation(&self, text: &str) -> Result<Option<Vec<u32>>, TextError> {
        if !self.0.prefixes_space || text.is_empty() {
            return self.encode(text, SpecialTokens::Omit).map(Some);
        }
        if let Some(rest) = text.strip_prefix(' ').filter(|rest| !rest.is_empty()) {
            return self.encode(rest, SpecialTokens::Omit).map(Some); // the dummy prefix is the space
        }
        let placed = self.encode_placed(&format!("\n{text}"), SpecialTokens::Omit)?;
        match placed.iter().any(|token| token.start < 1 && token.end > 1) {
            true => Ok(None),
            false => Ok(Some(
                placed
                    .iter()
                    .filter(|token| token.start >= 1)
                    .map(|token| token.id)
                    .collect(),
            )),
        }
    }

    /// Invalid UTF-8 becomes U+FFFD. `clean_up_tokenization_spaces` is not applied: it changes what was generated.
    pub fn decode(&self, ids: &[u32], skip: Skip) -> Result<String, TextError> {
        let mut bytes = Vec::new();
        for &id in ids {
            let unknown = TextError::UnknownToken {
                id,
                vocab_size: self.vocab_size(),
            };
            bytes.extend(self.visible_bytes(id, skip).ok_or(unknown)?);
        }
        let stripped = bytes
            .strip_prefix(b" ")
            .filter(|_| self.strips_leading_space())
            .unwrap_or(&bytes);
        Ok(String::from_utf8_lossy(stripped).into_owned())
    }

    /// Empty for ids outside the vocabulary (a padded model can sample one).
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.0.bytes.get(id).unwrap_or_default().to_vec()
    }

    /// Lossy text of the token alone.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.0.bytes.get(id).unwrap_or_default()).into_owned()
    }

    /// One past the largest id, added tokens included. A model's vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.0.bytes.len()
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.get(id as usize).copied().unwrap_or(false)
    }

    pub fn bos(&self) -> Option<(u32, &str)> {
        self.0.bos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    pub fn eos(&self) -> Option<(u32, &str)> {
        self.0.eos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    pub fn chat_template_source(&self) -> Option<&str> {
        self.0.template_source.as_deref()
    }

    /// `NoChatTemplate` or `BrokenTemplate` where chat is impossible; everything else works without.
    pub fn chat_template(&self) -> Result<&ChatTemplate, TextError> {
        self.0.template.as_ref().map_err(Clone::clone)
    }

    /// What a token adds to text; `None` outside the vocabulary.
    pub(crate) fn visible_bytes(&self, id: u32, skip: Skip) -> Option<&[u8]> {
        match skip == Skip::Special && self.is_special(id) {
            true => Some(&[]),
            false => self.0.bytes.get(id),
        }
    }

    pub(crate) fn strips_leading_space(&self) -> bool {
        self.0.bytes.strips_leading_space
    }
}

impl Inner {
    fn encode<R>(
        &self,
        text: &str,
        special_tokens: SpecialTokens,
        read: impl FnOnce(&tokenizers::Encoding) -> R,
    ) -> Result<R, TextError> {
        let add = special_tokens == SpecialTokens::Add;
        guarded(|| self.library.encode_fast(text, add)).map(|encoding| read(&encoding))
    }

    fn encode_with_offsets(
        &self,
        text: &str,
        special_tokens: SpecialTokens,
    ) -> Result<Vec<Placed>, TextError> {
        let encoding = guarded(|| self.library.encode(text, special_tokens == SpecialTokens::Add))?;
        let placed = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(placed
            .map(|(&id, &(start, end))| Placed { id, start, end })
            .collect())
    }
}

/// The library unwraps inside (its regular expressions have a backtracking limit), and text comes from anybody.
fn guarded(
    encode: impl FnOnce() -> tokenizers::Result<tokenizers::Encoding>,
) -> Result<tokenizers::Encoding, TextError> {
    match catch_unwind(AssertUnwindSafe(encode)) {
        Ok(Ok(encoding)) => Ok(encoding),
        Ok(Err(error)) => Err(TextError::Encode(error.to_string())),
        Err(_) => Err(TextError::Encode("the tokenizer panicked".to_owned())),
    }
}

fn prepend(id: u32, text: &str) -> Result<TemplateProcessing, TextError> {
    let piece =
        |error: String| TextError::Unsupported(format!("add_bos_token with bos_token {text}: {error}"));
    let mut builder = TemplateProcessing::builder();
    builder
        .try_single(vec![text.to_owned(), "$A".to_owned()])
        .map_err(|error| piece(error.to_string()))?;
    builder
        .special_tokens(vec![(text.to_owned(), id)])
        .build()
        .map_err(|error| piece(error.to_string()))
}

fn default_template(templates: Templates) -> Option<String> {
    match templates {
        Templates::One(source) => Some(source),
        Templates::Named(named) => {
            let chosen = named
                .iter()
                .position(|template| template.name == "default")
                .unwrap_or(0);
            named
                .into_iter()
                .nth(chosen)
                .map(|NamedTemplate { template, .. }| template)
        }
    }
}

/// `None`: there is no such file.
fn read_text(path: &Path) -> Result<Option<String>, TextError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TextError::Read {
            path: path.to_owned(),
            message: error.to_string(),
        }),
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, TextError> {
    let damaged = |error: serde_json::Error| TextError::Damaged {
        path: path.to_owned(),
        message: error.to_string(),
    };
    read_text(path)?
        .map(|text| serde_json::from_str(&text).map_err(damaged))
        .transpose()
}

#[cfg(test)]
mod tests;
