//! A folder's tokenizer as the metadata of a GGUF file; what the reader beside it makes of that must cut texts as the folder
//! does, or it is not written. Reference: convert_hf_to_gguf.py and gguf-py/gguf/vocab.py of llama.cpp (keys, types).

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;
use tandem_core::gguf::{Metadata, Value};
use tokenizers::{NormalizedString, Normalizer, PreTokenizerWrapper};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::super::folder::{Folder, Source, TOKENIZER};
use super::super::pretokenizers::{KNOWN, Pretokenizer};
use super::super::{SpecialTokens, Tokenizer};
use super::{
    MERGES, MODEL, NAMED, PRE, SAMPLING, SCORES, SPACE_PREFIX, TEMPLATE, TOKENS, TYPES, cut, from_metadata,
    kind,
};
use crate::error::TextError;

/// What is tried: words, numbers, spaces, scripts, marks that compose, code.
const PROBES: [&str; 8] = [
    "Hello world, don't I'll WE'VE it's",
    " two  spaces   and\ttabs\n\nlines \r\n x\n   y",
    "Ünïcödé, naïve ελληνικά Привет 漢字かな交じり文 🦙🦙 e\u{301} كتاب",
    "1 12 123 1234567890 3.14159 0x1F ³ ½",
    "def f(x):\n    return x ** 2  # a_comment; a.b->c != \"d\"\n",
    "aaaa AAAA camelCase HTTPServer it-is/so",
    "\0\u{A0}\u{3000}x",
    "the in the other of",
];

/// Keys and values for a model with rows for `vocab` tokens.
pub fn metadata(folder: &Path, vocab: usize) -> Result<Vec<(String, Value)>, TextError> {
    let read = Folder::read(&Source::Folder(folder))?;
    let tokenizer = Tokenizer::from_folder(folder)?;
    let file = folder.join(TOKENIZER);
    let unreadable = |message: String| TextError::Read {
        path: file.clone(),
        message,
    };
    let bytes = std::fs::read(&file).map_err(|error| unreadable(error.to_string()))?;
    let json: Json = serde_json::from_slice(&bytes).map_err(|error| unreadable(error.to_string()))?;
    let mut values: Vec<(String, Value)> = vec![];
    let mut put = |key: &str, value: Value| values.push((key.to_owned(), value));
    let is_sentencepiece = json["model"]["byte_fallback"] == true;
    let merges = merges(&json)?;
    let tokens = tokens(&read, vocab)?;
    let added = read.library.get_added_tokens_decoder();
    let unknown = json["model"]["unk_token"].as_str();
    let types = (0..)
        .zip(&tokens)
        .map(|(id, token)| match (token, added.get(&id)) {
            (None, _) => kind::UNUSED,
            (Some(token), _) if is_sentencepiece && unknown == Some(token) => kind::UNKNOWN,
            (_, Some(token)) if token.special => kind::CONTROL,
            (_, Some(_)) => kind::USER_DEFINED,
            (Some(token), None) if is_sentencepiece && is_byte(token) => kind::BYTE,
            (Some(_), None) => kind::NORMAL,
        });
    let types: Vec<i64> = types.collect();
    let texts = tokens.iter().enumerate();
    let texts = texts.map(|(id, token)| token.clone().unwrap_or_else(|| format!("[PAD{id}]")));
    let texts: Vec<String> = texts.collect();
    match is_sentencepiece {
        true => {
            put(MODEL, Value::Text("llama".to_owned()));
            put(PRE, Value::Text("default".to_owned()));
            put(SCORES, Value::Floats(scores(&texts, &merges)));
            put(SPACE_PREFIX, Value::Flag(tokenizer.0.prefixes_space));
        }
        false => {
            let pretokenizer = pretokenizer(&read.library, &json)?;
            put(MODEL, Value::Text("gpt2".to_owned()));
            put(PRE, Value::Text(pretokenizer.names[0].to_owned()));
            let merges = merges.iter().map(|(left, right)| format!("{left} {right}"));
            put(MERGES, Value::Texts(merges.collect()));
        }
    }
    put(TOKENS, Value::Texts(texts));
    put(TYPES, Value::Wholes(types));
    for (name, keys) in NAMED {
        let id = read
            .named_tokens
            .get(name)
            .and_then(|text| read.library.token_to_id(text));
        if let Some(id) = id {
            put(keys[0], Value::Whole(id.into()));
        }
    }
    let [bare, whole] = [SpecialTokens::Omit, SpecialTokens::Add]
        .map(|special| tokenizer.encode("a", special).unwrap_or_default());
    put(
        "tokenizer.ggml.add_bos_token",
        Value::Flag(!whole.starts_with(&bare)),
    );
    put(
        "tokenizer.ggml.add_eos_token",
        Value::Flag(!whole.ends_with(&bare)),
    );
    for (name, template) in &read.templates {
        match name.as_str() {
            "default" => put(TEMPLATE, Value::Text(template.clone())),
            name => put(&format!("{TEMPLATE}.{name}"), Value::Text(template.clone())),
        }
    }
    let generation = std::fs::read(folder.join("generation_config.json")).unwrap_or_default();
    let generation: Json = serde_json::from_slice(&generation).unwrap_or_default();
    for (key, name) in SAMPLING {
        match &generation[name] {
            Json::Number(n) if n.is_u64() => put(key, Value::Whole(n.as_u64().unwrap_or_default().into())),
            Json::Number(n) => put(key, Value::Float(n.as_f64().unwrap_or_default())),
            _ => {}
        }
    }
    check(&tokenizer, folder, &values)?;
    Ok(values)
}

fn unsupported(why: String) -> TextError {
    TextError::Unsupported(format!("no GGUF is written of it: {why}"))
}

/// By id; `None` where no token has it.
fn tokens(folder: &Folder, vocab: usize) -> Result<Vec<Option<String>>, TextError> {
    let mut tokens = vec![None; vocab];
    for (token, id) in folder.library.get_vocab(true) {
        match tokens.get_mut(id as usize) {
            Some(place) => *place = Some(token),
            None => {
                let why = format!("token {token:?} has the id {id}, the model has {vocab} rows for tokens");
                return Err(unsupported(why));
            }
        }
    }
    Ok(tokens)
}

/// Of a tokenizer.json, which has each as a pair or, in older files, as a text.
fn merges(tokenizer: &Json) -> Result<Vec<(String, String)>, TextError> {
    let model = &tokenizer["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") || !model["merges"].is_array() {
        return Err(unsupported(format!(
            "its model is {}, and BPE is wanted",
            model["type"]
        )));
    }
    let pair = |merge: &Json| match merge {
        Json::Array(pair) => Some((
            pair.first()?.as_str()?.to_owned(),
            pair.get(1)?.as_str()?.to_owned(),
        )),
        merge => {
            let (left, right) = cut(merge.as_str()?)?;
            Some((left.to_owned(), right.to_owned()))
        }
    };
    let pairs = model["merges"].as_array().into_iter().flatten().map(pair);
    let pairs: Option<Vec<_>> = pairs.collect();
    pairs.ok_or_else(|| unsupported("its merges are not pairs of tokens".to_owned()))
}

/// What tokens are joined to first scores highest; SentencePiece's own numbers are such ranks, too.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (left, right) in merges {
        let next = ranks.len();
        ranks.entry(format!("{left}{right}")).or_insert(next);
    }
    let last = ranks.len();
    let score = |token: &String| -(*ranks.get(token).unwrap_or(&last) as f32);
    tokens.iter().map(score).collect()
}

/// `<0x0A>`
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// The known one that cuts the probes as the folder's does.
fn pretokenizer(library: &tokenizers::Tokenizer, json: &Json) -> Result<&'static Pretokenizer, TextError> {
    let mut mark = NormalizedString::from("e\u{301}");
    if let Some(normalizer) = library.get_normalizer() {
        normalizer
            .normalize(&mut mark)
            .map_err(|error| unsupported(error.to_string()))?;
    }
    let composes = mark.get() == "\u{e9}";
    let takes_whole_words = json["model"]["ignore_merges"] == true;
    let own = library.get_pre_tokenizer();
    let own = own.ok_or_else(|| unsupported("it does not cut texts into words".to_owned()))?;
    let wanted = words(own)?;
    for known in &KNOWN {
        if known.takes_whole_words == takes_whole_words && known.composes == composes {
            let candidate =
                serde_json::from_value(super::pre_tokenizer(known)).expect("the reader makes it, too");
            if words(&candidate)? == wanted {
                return Ok(known);
            }
        }
    }
    let own = serde_json::to_string(own).unwrap_or_default();
    let why = format!(
        "none of the ways to cut texts that a GGUF has a name for (tokenizer.ggml.pre) is its own, {own}"
    );
    Err(unsupported(why))
}

/// Where each probe is cut.
fn words(pretokenizer: &PreTokenizerWrapper) -> Result<Vec<Vec<(usize, usize)>>, TextError> {
    let cuts = |text: &&str| {
        let mut cut = PreTokenizedString::from(*text);
        pretokenizer
            .pre_tokenize(&mut cut)
            .map_err(|error| unsupported(error.to_string()))?;
        let words = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(words.into_iter().map(|(_, offsets, _)| offsets).collect())
    };
    PROBES.iter().map(cuts).collect()
}

/// What is read out of the metadata is the folder's tokenizer.
fn check(folder: &Tokenizer, path: &Path, values: &[(String, Value)]) -> Result<(), TextError> {
    let files = from_metadata(&Metadata::new("the GGUF", values))?;
    let written = Tokenizer::new(Folder::read(&Source::Made(path, &files))?)?;
    let marks: String = folder
        .special_tokens()
        .into_iter()
        .map(|(text, _)| text + "a")
        .collect();
    for text in PROBES.into_iter().chain([marks.as_str()]) {
        for special in [SpecialTokens::Add, SpecialTokens::Omit] {
            let [own, written] = [folder, &written].map(|tokenizer| tokenizer.encode(text, special));
            if own? != written? {
                return Err(unsupported(format!("{text:?} would become other tokens")));
            }
        }
    }
    Ok(())
}
