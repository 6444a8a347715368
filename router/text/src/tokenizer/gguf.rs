//! The tokenizer in a GGUF's metadata, written as the files of a model's folder (tokenizer.json, tokenizer_config.json), so
//! that one reader makes tokenizers and a router gets the same files of either. Reference: ggml's docs/gguf.md (keys),
//! src/llama-vocab.cpp of llama.cpp (what each pre-tokenizer splits), transformers' convert_slow_tokenizer.py (how the
//! tokenizers library spells SentencePiece).

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde_json::{Map, Value as Json, json};
use tandem_core::gguf::{Gguf, GgufError, Metadata, Value};

use super::pretokenizers::{self, Pretokenizer};
use crate::error::TextError;

mod write;

pub use write::metadata;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const TEMPLATE: &str = "tokenizer.chat_template";

/// docs/gguf.md, tokenizer.ggml.token_type.
mod kind {
    pub const NORMAL: i64 = 1;
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
    pub const BYTE: i64 = 6;
}

/// How SentencePiece writes a space.
const SPACE: &str = "\u{2581}";

/// The special tokens that have a name in a tokenizer_config.json, and their keys.
const NAMED: [(&str, &[&str]); 7] = [
    ("bos_token", &["tokenizer.ggml.bos_token_id"]),
    ("eos_token", &["tokenizer.ggml.eos_token_id"]),
    ("unk_token", &["tokenizer.ggml.unknown_token_id"]),
    // The older key is spelt so.
    (
        "sep_token",
        &[
            "tokenizer.ggml.seperator_token_id",
            "tokenizer.ggml.separator_token_id",
        ],
    ),
    ("pad_token", &["tokenizer.ggml.padding_token_id"]),
    ("cls_token", &["tokenizer.ggml.cls_token_id"]),
    ("mask_token", &["tokenizer.ggml.mask_token_id"]),
];

/// Recommended sampling parameters, as a generation_config.json calls them.
const SAMPLING: [(&str, &str); 5] = [
    ("general.sampling.temp", "temperature"),
    ("general.sampling.top_p", "top_p"),
    ("general.sampling.top_k", "top_k"),
    ("general.sampling.min_p", "min_p"),
    ("general.sampling.penalty_repeat", "repetition_penalty"),
];

/// Names and contents.
pub type Files = Vec<(String, Vec<u8>)>;

/// Reads the head of the file at `path`.
pub fn files(path: &Path) -> Result<Files, TextError> {
    let unreadable = |error: std::io::Error| TextError::Read {
        path: path.to_owned(),
        message: error.to_string(),
    };
    let file = File::open(path).map_err(unreadable)?;
    let bytes = file.metadata().map_err(unreadable)?.len();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let gguf = Gguf::read(BufReader::new(file), bytes, &name).map_err(damaged)?;
    from_metadata(&gguf.metadata)
}

fn damaged(GgufError { file, message }: GgufError) -> TextError {
    TextError::Damaged {
        path: file.into(),
        message,
    }
}

fn from_metadata(metadata: &Metadata) -> Result<Files, TextError> {
    let vocabulary = Vocabulary::read(metadata).map_err(damaged)?;
    let model = metadata.text(MODEL).map_err(damaged)?;
    let (tokenizer, adds_bos) = match model.expect("a vocabulary has a model") {
        "gpt2" => byte_level(metadata, &vocabulary)?,
        "llama" => sentencepiece(metadata, &vocabulary).map_err(damaged)?,
        _ => {
            let error = metadata.wrong(
                MODEL,
                "gpt2 (byte-level BPE) and llama (SentencePiece) are supported",
            );
            return Err(TextError::Unsupported(error.to_string()));
        }
    };
    let config = config(metadata, &vocabulary, adds_bos).map_err(damaged)?;
    let sampling = sampling(metadata).map_err(damaged)?;
    let bytes = |json: &Json| serde_json::to_vec(json).expect("plain JSON has a text");
    let mut files = vec![
        ("tokenizer.json".to_owned(), bytes(&tokenizer)),
        ("tokenizer_config.json".to_owned(), bytes(&config)),
    ];
    files.extend(sampling.map(|sampling| ("generation_config.json".to_owned(), bytes(&sampling))));
    Ok(files)
}

struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Vocabulary<'a>, GgufError> {
        let how = "the tokenizer is read from the file: convert the model again with its tokenizer";
        if metadata.text(MODEL)?.is_none() {
            return Err(metadata.missing(MODEL, how));
        }
        let tokens = metadata
            .texts(TOKENS)?
            .ok_or_else(|| metadata.missing(TOKENS, how))?;
        let types = match metadata.wholes(TYPES)? {
            Some(types) if types.len() != tokens.len() => {
                return Err(metadata.wrong(
                    TYPES,
                    &format!("one for each of {} tokens is needed", tokens.len()),
                ));
            }
            Some(types) => types.to_vec(),
            None => vec![kind::NORMAL; tokens.len()],
        };
        let mut ids = HashMap::new();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(earlier) = ids.insert(token, id) {
                let why = format!("the token {token:?} has the ids {earlier} and {id}");
                return Err(metadata.wrong(TOKENS, &why));
            }
        }
        Ok(Vocabulary { tokens, types })
    }

    /// (id, token, type)
    fn iter(&self) -> impl Iterator<Item = (usize, &'a str, i64)> {
        let types = self.types.iter().copied();
        let tokens = self.tokens.iter().zip(types).enumerate();
        tokens.map(|(id, (token, kind))| (id, token.as_str(), kind))
    }

    /// Tokens that are found in a text before anything else is done with it.
    fn added(&self) -> Vec<Json> {
        let added = self.iter().filter(|(_, token, kind)| {
            matches!(*kind, kind::CONTROL | kind::UNKNOWN | kind::USER_DEFINED) && !token.is_empty()
        });
        added
            .map(|(id, token, kind)| {
                json!({
                    "id": id, "content": token, "special": kind != kind::USER_DEFINED, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
            .collect()
    }
}

/// The tokenizer.json, and whether a text begins with BOS where no key says so.
fn byte_level(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<(Json, bool), TextError> {
    let name = metadata.text(PRE).map_err(damaged)?.ok_or_else(|| {
        let how = "how text is cut into words is not known without it; convert_hf_to_gguf.py writes it since April 2024: \
                   convert the model again";
        damaged(metadata.missing(PRE, how))
    })?;
    let pretokenizer = pretokenizers::named(name).ok_or_else(|| {
        let why = format!("{} are supported", pretokenizers::names());
        TextError::Unsupported(metadata.wrong(PRE, &why).to_string())
    })?;
    let merges = metadata.texts(MERGES).map_err(damaged)?;
    let merges = merges.ok_or_else(|| damaged(metadata.missing(MERGES, "byte-level BPE has them")))?;
    let mut pairs: Vec<(&str, &str)> = Vec::with_capacity(merges.len());
    for merge in merges {
        let pair = cut(merge);
        pairs.push(
            pair.ok_or_else(|| damaged(metadata.wrong(MERGES, &format!("{merge:?} is not two tokens"))))?,
        );
    }
    // Conversion fills up a vocabulary that is smaller than the model's table with such tokens.
    let tokens = vocabulary.iter().filter(|(_, _, kind)| *kind != kind::UNUSED);
    let vocab: Map<String, Json> = tokens
        .map(|(id, token, _)| (token.to_owned(), json!(id)))
        .collect();
    let Pretokenizer {
        takes_whole_words,
        adds_bos,
        composes,
        ..
    } = pretokenizer;
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": vocabulary.added(),
        "normalizer": if *composes { json!({"type": "NFC"}) } else { Json::Null },
        "pre_tokenizer": pre_tokenizer(pretokenizer),
        "post_processor": bytes(),
        "decoder": bytes(),
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs, "ignore_merges": takes_whole_words},
    });
    Ok((tokenizer, *adds_bos))
}

/// The two tokens of a merge, of which the first can be a space itself.
fn cut(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next().map_or(0, char::len_utf8);
    let at = merge[first..].find(' ')? + first;
    Some((&merge[..at], &merge[at + 1..]))
}

/// As a tokenizer.json has it.
fn pre_tokenizer(pretokenizer: &Pretokenizer) -> Json {
    let splits = pretokenizer.splits.iter();
    let splits = splits.map(
        |split| json!({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false}),
    );
    let steps: Vec<Json> = splits.chain([bytes()]).collect();
    json!({"type": "Sequence", "pretokenizers": steps})
}

fn bytes() -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false})
}

/// SentencePiece joins the two neighbours whose union has the best score, which is BPE with merges in the order of scores.
fn sentencepiece(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<(Json, bool), GgufError> {
    let tokens = vocabulary.tokens;
    let scores = metadata.floats(SCORES)?;
    let scores = scores.ok_or_else(|| metadata.missing(SCORES, "SentencePiece has one for each token"))?;
    if scores.len() != tokens.len() {
        return Err(metadata.wrong(
            SCORES,
            &format!("one for each of {} tokens is needed", tokens.len()),
        ));
    }
    let prefix = metadata.flag(SPACE_PREFIX)?.unwrap_or(true);
    let unknown = metadata.token_ids(&["tokenizer.ggml.unknown_token_id"], tokens.len())?;
    let unknown = unknown.first().map(|&id| tokens[id as usize].clone());
    let unknown = unknown.or_else(|| {
        Some(
            vocabulary
                .iter()
                .find(|(.., kind)| *kind == kind::UNKNOWN)?
                .1
                .to_owned(),
        )
    });
    let vocab: Map<String, Json> = vocabulary
        .iter()
        .map(|(id, token, _)| (token.to_owned(), json!(id)))
        .collect();
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let mut normalizers = vec![];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(replace);
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": vocabulary.added(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "vocab": vocab, "merges": merges_of(vocabulary, scores), "unk_token": unknown, "fuse_unk": true,
            "byte_fallback": vocabulary.types.contains(&kind::BYTE),
        },
    });
    Ok((tokenizer, true))
}

/// All pairs of tokens whose union is a token, the best score first; of equal scores the longer parts first.
fn merges_of(vocabulary: &Vocabulary, scores: &[f32]) -> Vec<(String, String)> {
    let normal = || vocabulary.iter().filter(|(_, _, kind)| *kind == kind::NORMAL);
    let known: std::collections::HashSet<&str> = normal().map(|(_, token, _)| token).collect();
    let mut merges: Vec<(f32, &str, &str)> = vec![];
    for (id, token, _) in normal() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if known.contains(left) && known.contains(right) {
                merges.push((scores[id], left, right));
            }
        }
    }
    merges.sort_by(|a, b| {
        let lengths = |m: &(f32, &str, &str)| (m.1.chars().count(), m.2.chars().count());
        b.0.total_cmp(&a.0).then_with(|| lengths(b).cmp(&lengths(a)))
    });
    merges
        .into_iter()
        .map(|(_, left, right)| (left.to_owned(), right.to_owned()))
        .collect()
}

fn sampling(metadata: &Metadata) -> Result<Option<Json>, GgufError> {
    let mut config = Map::new();
    for (key, name) in SAMPLING {
        let value = match metadata.get(key) {
            None => continue,
            Some(Value::Whole(_)) => json!(metadata.whole(key)?),
            Some(_) => json!(metadata.float(key)?),
        };
        config.insert(name.to_owned(), value);
    }
    Ok((!config.is_empty()).then_some(Json::Object(config)))
}

fn config(metadata: &Metadata, vocabulary: &Vocabulary, adds_bos: bool) -> Result<Json, GgufError> {
    let mut config = Map::new();
    for (name, keys) in NAMED {
        let ids = metadata.token_ids(keys, vocabulary.tokens.len())?;
        if let Some(&id) = ids.first() {
            config.insert(name.to_owned(), json!(vocabulary.tokens[id as usize]));
        }
    }
    let adds_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let adds_eos = metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    config.insert("add_bos_token".to_owned(), json!(adds_bos));
    config.insert("add_eos_token".to_owned(), json!(adds_eos));
    let mut templates = vec![];
    if let Some(template) = metadata.text(TEMPLATE)? {
        templates.push(json!({"name": "default", "template": template}));
    }
    for key in metadata.keys() {
        if let Some(name) = key.strip_prefix("tokenizer.chat_template.") {
            templates.push(json!({"name": name, "template": metadata.text(key)?}));
        }
    }
    if !templates.is_empty() {
        config.insert("chat_template".to_owned(), json!(templates));
    }
    Ok(Json::Object(config))
}

#[cfg(test)]
mod tests;
