//! A model's tokenizer: text to ids, ids to text, the special tokens. Not here: its files (`folder`), the chat template's
//! language (`chat`), incremental text (`stream`).

mod folder;
pub mod gguf;
mod pretokenizers;
mod templates;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use tandem_core::grammar::Vocabulary;

use crate::bytes::TokenBytes;
use crate::chat::{ChatTemplate, Ending, Kwargs, Message};
use crate::error::TextError;
use folder::{Folder, Source};
use templates::Templates;

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
    templates: Templates,
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

impl Tokenizer {
    /// Of a model's folder or GGUF file.
    pub fn open(model: &Path) -> Result<Tokenizer, TextError> {
        Tokenizer::new(read(model)?)
    }

    /// With this chat template instead of the model's, with and without tools. One that does not compile is an error
    /// here, since somebody chose it.
    pub fn with_chat_template(model: &Path, template: String) -> Result<Tokenizer, TextError> {
        let folder = Folder {
            templates: BTreeMap::from([("default".to_owned(), template)]),
            ..read(model)?
        };
        let tokenizer = Tokenizer::new(folder)?;
        tokenizer.chat_template(&Kwargs::new())?;
        Ok(tokenizer)
    }

    /// Reads tokenizer.json and what lies beside it (`folder`).
    pub fn from_folder(folder: &Path) -> Result<Tokenizer, TextError> {
        Tokenizer::new(Folder::read(&Source::Folder(folder))?)
    }

    fn new(folder: Folder) -> Result<Tokenizer, TextError> {
        let Folder {
            mut library,
            named_tokens,
            post_processor,
            templates,
        } = folder;
        // Tokenizing one request must not fight the compute pool for the cores.
        tokenizers::utils::parallelism::set_parallelism(false);
        // Both may have been saved by a training script; a server must not cut a prompt silently.
        library.with_padding(None);
        library
            .with_truncation(None)
            .map_err(|error| TextError::Unsupported(error.to_string()))?;
        if let Some(post_processor) = post_processor {
            library.with_post_processor(Some(post_processor));
        }
        let with_id = |name: &str| {
            let text: &String = named_tokens.get(name)?;
            Some((library.token_to_id(text)?, text.clone()))
        };
        let (bos, eos) = (with_id("bos_token"), with_id("eos_token"));
        let templates = Templates::new(templates, named_tokens);

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
            templates,
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

    /// Tokens of a text that stands within another: without what a tokenizer writes before a text's first word.
    pub fn encode_within(&self, text: &str) -> Result<Vec<u32>, TextError> {
        const BEFORE: &str = "\n";
        let before = self.encode(BEFORE, SpecialTokens::Omit)?;
        let both = self.encode(&format!("{BEFORE}{text}"), SpecialTokens::Omit)?;
        match both.strip_prefix(before.as_slice()) {
            Some(within) => Ok(within.to_vec()),
            None => self.encode(text, SpecialTokens::Omit),
        }
    }

    /// The prompt of a chat. Templates write BOS and the like themselves, so none is added, as in transformers.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        ending: Ending,
        kwargs: &Kwargs,
        most_bytes: usize,
    ) -> Result<Vec<u32>, TextError> {
        let rendered = self.chat_template(kwargs)?.render(messages, ending, kwargs)?;
        if rendered.len() > most_bytes {
            return Err(TextError::Refused(format!(
                "it makes {} bytes of them, at most {most_bytes} are tokenized",
                rendered.len()
            )));
        }
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
            .filter(|_| self.0.bytes.strips_leading_space)
            .unwrap_or(&bytes);
        let (text, half) = self.0.bytes.text(stripped);
        Ok(text + &self.0.bytes.replacement(half.len()))
    }

    /// Empty for ids outside the vocabulary (a padded model can sample one).
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.0.bytes.get(id).unwrap_or_default().to_vec()
    }

    /// Lossy text of the token alone.
    pub fn token_text(&self, id: u32) -> String {
        let (text, half) = self.0.bytes.text(self.0.bytes.get(id).unwrap_or_default());
        text + &self.0.bytes.replacement(half.len())
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

    /// What a grammar is followed by: the bytes of every token.
    pub fn vocabulary(&self) -> Vocabulary {
        let ids = 0..self.vocab_size() as u32;
        Vocabulary {
            tokens: ids.clone().map(|id| self.token_bytes(id)).collect(),
            special: ids.map(|id| self.is_special(id)).collect(),
            ends: self.eos().map(|(id, _)| id).into_iter().collect(),
        }
    }

    /// Every special token and its id.
    pub fn special_tokens(&self) -> Vec<(String, u32)> {
        let ids = (0..self.vocab_size() as u32).filter(|&id| self.is_special(id));
        ids.map(|id| (self.token_text(id), id))
            .filter(|(text, _)| !text.is_empty())
            .collect()
    }

    /// What is wrong with a chat template of the model, which its chats will be refused with.
    pub fn broken_template(&self) -> Option<&TextError> {
        self.0.templates.broken()
    }

    pub fn chat_template_source(&self) -> Option<&str> {
        self.0.templates.source()
    }

    /// Of the template for requests with tools.
    pub fn tool_template_source(&self) -> Option<&str> {
        self.0.templates.tool_source()
    }

    /// The template for these variables. `NoChatTemplate` or `BrokenTemplate` where chat is impossible; everything else
    /// works without.
    pub fn chat_template(&self, kwargs: &Kwargs) -> Result<&ChatTemplate, TextError> {
        self.0.templates.choose(kwargs)
    }

    /// What a token adds to text; `None` outside the vocabulary.
    pub(crate) fn visible_bytes(&self, id: u32, skip: Skip) -> Option<&[u8]> {
        match skip == Skip::Special && self.is_special(id) {
            true => Some(&[]),
            false => self.0.bytes.get(id),
        }
    }

    pub(crate) fn bytes(&self) -> &TokenBytes {
        &self.0.bytes
    }
}

fn read(model: &Path) -> Result<Folder, TextError> {
    match model.is_file() {
        true => Folder::read(&Source::Made(model, &gguf::files(model)?)),
        false => Folder::read(&Source::Folder(model)),
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

#[cfg(test)]
mod tests;
