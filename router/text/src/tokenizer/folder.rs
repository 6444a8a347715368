//! What a model's folder says about its text, read as transformers reads it. A key of tokenizer_config.json that is not
//! named here either repeats tokenizer.json (`add_prefix_space`, `do_lower_case`, `legacy`) or is for other uses
//! (`padding_side`, `model_max_length`, `tokenizer_class`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value as Json};
use tandem_core::lfs;
use tokenizers::AddedToken;
use tokenizers::processors::template::TemplateProcessing;

use crate::error::TextError;

pub(super) const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
/// Older files; what the config says about added tokens takes their place.
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const ADDED_TOKENS: &str = "added_tokens.json";
/// Newer transformers writes templates beside the config, and then prefers them.
const TEMPLATE: &str = "chat_template.jinja";
const MORE_TEMPLATES: &str = "additional_chat_templates";
/// Processors of multimodal models keep theirs here.
const PROCESSOR_TEMPLATE: &str = "chat_template.json";

/// Special tokens that have a name in the config and in templates.
const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

pub(super) struct Folder {
    pub library: tokenizers::Tokenizer,
    /// `bos_token`, ... and names that only this model has, as a template sees them.
    pub named_tokens: BTreeMap<String, String>,
    /// Where the config says otherwise than tokenizer.json what a text begins and ends with.
    pub post_processor: Option<TemplateProcessing>,
    /// Chat templates by name.
    pub templates: BTreeMap<String, String>,
}

/// An added token as the config spells it; in a few places the text alone.
#[derive(Deserialize)]
#[serde(untagged)]
enum Declared {
    Text(String),
    Token {
        content: String,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        normalized: Option<bool>,
        special: Option<bool>,
    },
}

impl Declared {
    fn into_token(self, is_special: bool) -> AddedToken {
        match self {
            Declared::Text(text) => AddedToken::from(text, is_special),
            Declared::Token {
                content,
                single_word,
                lstrip,
                rstrip,
                normalized,
                special,
            } => {
                let special = special.unwrap_or(is_special);
                AddedToken::from(content, special)
                    .single_word(single_word)
                    .lstrip(lstrip)
                    .rstrip(rstrip)
                    .normalized(normalized.unwrap_or(!special))
            }
        }
    }
}

/// Where the files are.
pub(super) enum Source<'a> {
    Folder(&'a Path),
    /// Of a model without a folder, with the path of what they were made from.
    Made(&'a Path, &'a [(String, Vec<u8>)]),
}

impl Source<'_> {
    /// For errors.
    fn path(&self, file: &str) -> PathBuf {
        match self {
            Source::Folder(folder) | Source::Made(folder, _) => folder.join(file),
        }
    }

    /// `None`: there is no such file.
    fn bytes(&self, file: &str) -> Result<Option<Vec<u8>>, TextError> {
        match self {
            Source::Made(_, files) => {
                let found = files.iter().find(|(name, _)| name == file);
                Ok(found.map(|(_, content)| content.clone()))
            }
            Source::Folder(folder) => match std::fs::read(folder.join(file)) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(TextError::Read {
                    path: self.path(file),
                    message: error.to_string(),
                }),
            },
        }
    }

    fn text(&self, file: &str) -> Result<Option<String>, TextError> {
        let text = self.bytes(file)?.map(String::from_utf8).transpose();
        text.map_err(|error| TextError::Damaged {
            path: self.path(file),
            message: error.to_string(),
        })
    }

    fn json<T: for<'de> Deserialize<'de>>(&self, file: &str) -> Result<Option<T>, TextError> {
        let json = self
            .bytes(file)?
            .map(|bytes| serde_json::from_slice(&bytes))
            .transpose();
        json.map_err(|error| TextError::Damaged {
            path: self.path(file),
            message: error.to_string(),
        })
    }
}

impl Folder {
    pub fn read(source: &Source) -> Result<Folder, TextError> {
        let mut library = read_library(source)?;
        let config_path = source.path(CONFIG);
        let mut config: Map<String, Json> = source.json(CONFIG)?.unwrap_or_default();
        let damaged = |key: &str, error: serde_json::Error| TextError::Damaged {
            path: config_path.clone(),
            message: format!("{key}: {error}"),
        };
        let mut added: BTreeMap<u32, Declared> = BTreeMap::new();
        match config.remove("added_tokens_decoder") {
            Some(decoder) => {
                added = serde_json::from_value(decoder)
                    .map_err(|error| damaged("added_tokens_decoder", error))?;
            }
            None => {
                config.extend(
                    source
                        .json::<Map<String, Json>>(SPECIAL_TOKENS_MAP)?
                        .unwrap_or_default(),
                );
                let listed: BTreeMap<String, u32> = source.json(ADDED_TOKENS)?.unwrap_or_default();
                added.extend(listed.into_iter().map(|(text, id)| (id, Declared::Text(text))));
            }
        }
        let token = |key: &str, value: Json| {
            let declared: Option<Declared> =
                serde_json::from_value(value).map_err(|error| damaged(key, error))?;
            let token = declared.map(|declared| declared.into_token(true));
            Ok(token.filter(|token| !token.content.is_empty()))
        };
        let mut named: BTreeMap<String, AddedToken> = BTreeMap::new();
        let mut unnamed: Vec<AddedToken> = Vec::new();
        for name in NAMES {
            if let Some(value) = config.remove(name) {
                named.extend(token(name, value)?.map(|token| (name.to_owned(), token)));
            }
        }
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            match config.remove(key) {
                Some(Json::Object(own)) => {
                    for (name, value) in own {
                        named.extend(token(&name, value)?.map(|token| (name, token)));
                    }
                }
                Some(Json::Array(list)) => {
                    for value in list {
                        unnamed.extend(token(key, value)?);
                    }
                }
                _ => {}
            }
        }
        if config.get("split_special_tokens") == Some(&Json::Bool(true)) {
            library.set_encode_special_tokens(true);
        }
        let special: BTreeSet<String> = named
            .values()
            .chain(&unnamed)
            .map(|token| token.content.clone())
            .collect();
        let added = added.into_iter().map(|(id, declared)| {
            let mut token = declared.into_token(false);
            token.special |= special.contains(&token.content);
            (Some(id), token)
        });
        let specials = named.values().cloned().chain(unnamed).map(|token| (None, token));
        add_missing(&mut library, added.chain(specials), &config_path)?;
        let named_tokens = named
            .into_iter()
            .map(|(name, token)| (name, token.content))
            .collect();
        Ok(Folder {
            post_processor: post_processor(&library, &config, &named_tokens)?,
            templates: templates(source, config.remove("chat_template"))?,
            library,
            named_tokens,
        })
    }
}

/// What only the config declares gets the next free id; the model was trained with the one that the config says.
fn add_missing(
    library: &mut tokenizers::Tokenizer,
    tokens: impl Iterator<Item = (Option<u32>, AddedToken)>,
    config: &Path,
) -> Result<(), TextError> {
    let refused = |message: String| TextError::Damaged {
        path: config.to_owned(),
        message,
    };
    let mut known: BTreeSet<String> = library
        .get_added_tokens_decoder()
        .into_values()
        .map(|token| token.content)
        .collect();
    for (declared, token) in tokens {
        let text = token.content.clone();
        if known.insert(text.clone()) {
            library
                .add_tokens([token])
                .map_err(|error| refused(format!("the token {text:?}: {error}")))?;
        }
        let id = library.token_to_id(&text);
        if let (Some(declared), Some(id)) = (declared, id)
            && declared != id
        {
            return Err(refused(format!(
                "added_tokens_decoder gives the token {text:?} the id {declared}, but with {TOKENIZER} it is {id}; save \
                 the tokenizer again with transformers so that both agree"
            )));
        }
    }
    Ok(())
}

fn read_library(source: &Source) -> Result<tokenizers::Tokenizer, TextError> {
    let path = source.path(TOKENIZER);
    let json = source.bytes(TOKENIZER)?.ok_or_else(|| {
        let sentencepiece = source.path("tokenizer.model");
        let hint = match sentencepiece.exists() {
            true => format!(
                "; tokenizer.model alone is not read. transformers converts it, with sentencepiece and protobuf installed: \
                 python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{0}').save_pretrained('{0}')\"",
                sentencepiece.parent().unwrap_or(&sentencepiece).display()
            ),
            false => String::new(),
        };
        TextError::Read {
            path: path.clone(),
            message: format!("there is no such file{hint}"),
        }
    })?;
    let pointer = lfs::pointer(&json);
    tokenizers::Tokenizer::from_bytes(json).map_err(|error| TextError::Damaged {
        path,
        message: pointer.unwrap_or_else(|| error.to_string()),
    })
}

/// `add_bos_token` and `add_eos_token`, where they are given, decide what is added, and not tokenizer.json. Asked by
/// example whether both say the same: then tokenizer.json's stays, which also places tokens in the text.
fn post_processor(
    library: &tokenizers::Tokenizer,
    config: &Map<String, Json>,
    named_tokens: &BTreeMap<String, String>,
) -> Result<Option<TemplateProcessing>, TextError> {
    let flags = [("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")];
    if !flags.iter().any(|(flag, _)| config.contains_key(*flag)) {
        return Ok(None);
    }
    let refused = |error: String| TextError::Unsupported(format!("add_bos_token, add_eos_token: {error}"));
    let [bos, eos] = flags.map(|(flag, name)| {
        let text = named_tokens
            .get(name)
            .filter(|_| config.get(flag) == Some(&Json::Bool(true)));
        text.and_then(|text| Some((text.clone(), library.token_to_id(text)?)))
    });
    let encode = |add: bool| {
        let encoding = library
            .encode_fast("a", add)
            .map_err(|error| refused(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    };
    let ids = |token: &Option<(String, u32)>| token.iter().map(|(_, id)| *id).collect::<Vec<u32>>();
    if encode(true)? == [ids(&bos), encode(false)?, ids(&eos)].concat() {
        return Ok(None);
    }
    let text = |token: &Option<(String, u32)>| {
        token
            .iter()
            .map(|(text, _)| text.clone())
            .collect::<Vec<String>>()
    };
    TemplateProcessing::builder()
        .try_single([text(&bos), vec!["$A".to_owned()], text(&eos)].concat())
        .map_err(|error| refused(error.to_string()))?
        .special_tokens(bos.into_iter().chain(eos).collect::<Vec<_>>())
        .build()
        .map(Some)
        .map_err(|error| refused(error.to_string()))
}

fn templates(source: &Source, configured: Option<Json>) -> Result<BTreeMap<String, String>, TextError> {
    let mut templates = BTreeMap::new();
    templates.extend(
        source
            .text(TEMPLATE)?
            .map(|source| ("default".to_owned(), source)),
    );
    let more = source.path(MORE_TEMPLATES);
    let unreadable = |error: std::io::Error| TextError::Read {
        path: more.clone(),
        message: error.to_string(),
    };
    let entries = match std::fs::read_dir(&more) {
        Ok(entries) => Some(entries),
        Err(_) if !more.is_dir() => None,
        Err(error) => return Err(unreadable(error)),
    };
    for entry in entries.into_iter().flatten() {
        let path = entry.map_err(unreadable)?.path();
        if let (Some(name), Some("jinja")) = (path.file_stem(), path.extension().and_then(|end| end.to_str()))
        {
            let name = name.to_string_lossy().into_owned();
            let source = std::fs::read_to_string(&path).map_err(unreadable)?;
            templates.insert(name, source);
        }
    }
    if !templates.is_empty() {
        return Ok(templates);
    }
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a string, or templates with their names")]
    enum Configured {
        One(String),
        List(Vec<Named>),
        Named(BTreeMap<String, String>),
    }
    #[derive(Deserialize)]
    struct Named {
        name: String,
        template: String,
    }
    let (path, configured) = match configured.filter(|configured| !configured.is_null()) {
        Some(configured) => (CONFIG, Some(configured)),
        None => {
            let file: Option<Map<String, Json>> = source.json(PROCESSOR_TEMPLATE)?;
            (
                PROCESSOR_TEMPLATE,
                file.and_then(|mut file| file.remove("chat_template")),
            )
        }
    };
    let configured: Option<Configured> =
        configured
            .map(serde_json::from_value)
            .transpose()
            .map_err(|error| TextError::Damaged {
                path: source.path(path),
                message: format!("chat_template: {error}"),
            })?;
    Ok(match configured {
        None => BTreeMap::new(),
        Some(Configured::One(source)) => BTreeMap::from([("default".to_owned(), source)]),
        Some(Configured::List(list)) => list
            .into_iter()
            .map(|Named { name, template }| (name, template))
            .collect(),
        Some(Configured::Named(named)) => named,
    })
}
