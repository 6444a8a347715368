//! What `tandem generate` is told: whose answer it is, options of the model as `tandem serve` has them, and a request, whose
//! fields are those of the API. Not here: what the fields mean, and which are unknown (the API says so).

use std::path::{Path, PathBuf};

use clap::Parser;
use serde_json::{Map, Value, json};

use super::config;
use crate::cli::{Cli, Command, Serve};
use crate::train::settings::{SettingsError, file, json as from_yaml, of_others, wrong};
use crate::train::torchtune;

/// Key, other spellings, what it says.
type Key = (&'static str, &'static [&'static str], &'static str);

const OWN: &[Key] = &[
    (
        MODEL,
        &["model_name_or_path", "model_name", "base_model"],
        "folder, GGUF file or name on the hub (default: the embedded demo model); also the first word",
    ),
    (
        ADAPTER,
        &["peft_model", "adapter_name_or_path", "adapter_path", "lora_path"],
        "a PEFT folder or a name on the hub that answers instead of the base",
    ),
    ("prompt", &[], "a text to go on from"),
    (
        "prompt_file",
        &[],
        "the same from a file; /dev/stdin is what is piped in",
    ),
    (
        "user",
        &["prompt.user"],
        "what a user says: the chat template is put around it",
    ),
    (
        "system",
        &["prompt.system", "system_prompt"],
        "what the model is told before; a prompt beside it is what a user says",
    ),
    (
        "messages",
        &["prompt.messages"],
        "a whole chat, as in /v1/chat/completions",
    ),
    (
        "output",
        &[],
        "text (default), as it comes, or json: the API's answer (with stream=true its chunks, one a line)",
    ),
];

/// Of `tandem serve`, with underscores.
const OPTIONS: &[Key] = &[
    (
        "revision",
        &["model_revision"],
        "branch, tag or commit of a model on the hub",
    ),
    (
        "device",
        &[],
        "auto (default), cpu, cuda:N, or emu (a GPU emulated on the CPU, for tests)",
    ),
    ("dtype", &["torch_dtype"], "auto (default), bfloat16 or float32"),
    ("quantization", &[], "the linears in int8, int4 or nf4"),
    ("kv_cache_dtype", &[], "auto (default), bfloat16, float32 or int8"),
    ("max_model_len", &[], "tokens of prompt and answer together"),
    (
        "tensor_parallel_size",
        &["tp_size"],
        "ranks that divide the model",
    ),
    ("threads", &[], "compute threads"),
    (
        "speculative_config",
        &[],
        "JSON, as tandem serve --speculative-config",
    ),
    (
        "chat_template",
        &["chat_template_path"],
        "a Jinja file, or itself",
    ),
    (
        "generation_config",
        &[],
        "auto (default): the model's defaults of sampling; vllm: none; or a folder",
    ),
    ("tool_call_parser", &[], "how the model writes tool calls"),
    ("reasoning_parser", &[], "how the model writes its reasoning"),
];

/// Of the request, by other names than the API's.
const REQUEST: &[Key] = &[
    (
        MAX_TOKENS,
        &["max_new_tokens", "max_completion_tokens", "max_gen_len"],
        "tokens of the answer at most (default 256)",
    ),
    ("min_tokens", &["min_new_tokens"], "and at least"),
    ("temperature", &[], "0: always the likeliest token"),
    ("top_p", &[], "nucleus sampling"),
    ("top_k", &[], "of so many of the likeliest"),
    ("repetition_penalty", &[], "above 1: what was said is less likely"),
    (
        "n",
        &["num_return_sequences"],
        "answers; several are shown as json",
    ),
    ("seed", &[], "of the draws"),
    (
        "stop",
        &["stop_strings", "stop_sequences"],
        "texts that end the answer",
    ),
    ("stream", &[], "true (default of text): as it comes"),
    ("do_sample", &[], "false is temperature 0"),
];

/// They change how long it takes at most.
const HARMLESS: [&str; 5] = [
    "enable_kv_cache",
    "use_cache",
    "use_fast_kernels",
    "log_level",
    "output_dir",
];
/// Words that stay as they are typed, whatever YAML would make of them.
const TEXTS: [&str; 9] = [
    MODEL,
    ADAPTER,
    "prompt",
    "prompt_file",
    "user",
    "system",
    "guided_regex",
    "guided_grammar",
    "grammar",
];
/// What only JSON shows.
const OF_JSON: [&str; 8] = [
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "return_token_ids",
    "tools",
    "functions",
    "n",
    "best_of",
];

const MODEL: &str = "model";
const ADAPTER: &str = "adapter";
const MAX_TOKENS: &str = "max_tokens";
const DEFAULT_MAX_TOKENS: u32 = 256;

pub const COMPLETIONS: &str = "/v1/completions";
pub const CHAT: &str = "/v1/chat/completions";

/// A request and who answers it.
#[derive(Debug)]
pub struct Asked {
    /// Says the model and how it runs. Nothing listens.
    pub serve: Serve,
    pub adapter: Option<PathBuf>,
    pub route: &'static str,
    /// But for its `model`.
    pub body: Map<String, Value>,
    pub output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    Text,
    Json,
}

pub fn help() -> String {
    let mut text =
        "Settings of tandem generate, in a YAML file (torchtune's too) or as key=value:\n\n".to_owned();
    for (key, others, says) in OWN.iter().chain(REQUEST).chain(OPTIONS) {
        let others = match others {
            [] => String::new(),
            others => format!(" (or {})", others.join(", ")),
        };
        text.push_str(&format!("  {key:<28} {says}{others}\n"));
    }
    text.push_str(
        "\nand every other field of /v1/completions and /v1/chat/completions, by its name there.\n",
    );
    text
}

pub fn read(args: &[String]) -> Result<Asked, SettingsError> {
    let (mut config, model, words) = match args.split_first() {
        Some((first, words)) if is_file(first) => (file(first)?, None, words),
        Some((first, words)) if !first.contains('=') && !first.starts_with('~') => {
            (Map::new(), Some(first), words)
        }
        _ => (Map::new(), None, args),
    };
    let mut own_words = Map::new();
    for word in words {
        let (key, text) = match (word.strip_prefix('~'), word.split_once('=')) {
            (Some(removed), _) => {
                torchtune::set(&mut config, removed, None)?;
                continue;
            }
            (None, Some(word)) => word,
            (None, None) => return Err(SettingsError::NotASetting(word.clone())),
        };
        let value = of_word(key, text)?;
        let has_parts = |name: &str| config.get(name).is_some_and(Value::is_object);
        let is_path = key.contains('.') && (canonical(key) == key || has_parts("prompt"));
        // torchtune's word for its own code, and ours for a folder.
        let is_component =
            |value: &Value| key != MODEL || value.as_str().is_some_and(|path| path.starts_with("torchtune."));
        let names_section = torchtune::is_config(&config) && !key.contains('.') && is_component(&value);
        if (is_path || names_section) && torchtune::set(&mut config, key, Some(value.clone()))? {
            continue;
        }
        insert(&mut own_words, key, value)?;
    }
    if let Some(model) = model
        && own_words.insert(MODEL.to_owned(), json!(model)).is_some()
    {
        return Err(SettingsError::Twice {
            first: model.clone(),
            second: MODEL.to_owned(),
        });
    }
    let has = |name: &str| own_words.contains_key(name);
    let config = config::flat(config, has(ADAPTER) || has(MODEL))?;
    let mut given = Map::new();
    for (key, value) in config {
        insert(&mut given, &key, value)?;
    }
    // Words win over the file; a prompt of theirs over any of its.
    if PROMPTS.iter().any(|name| has(name)) {
        PROMPTS.iter().for_each(|name| drop(given.remove(*name)));
    }
    given.extend(own_words);
    typed(given)
}

/// Ways to say what is answered.
const PROMPTS: [&str; 4] = ["prompt", "prompt_file", "user", "messages"];

fn is_file(word: &str) -> bool {
    let is_yaml = Path::new(word)
        .extension()
        .is_some_and(|end| end == "yaml" || end == "yml");
    is_yaml || word == config::NAME
}

/// The name here of one that others use.
fn canonical(name: &str) -> &str {
    let known = OWN.iter().chain(OPTIONS).chain(REQUEST);
    let mut known = known.filter(|(_, others, _)| others.contains(&name));
    known.next().map_or(name, |(key, ..)| key)
}

fn insert(given: &mut Map<String, Value>, key: &str, value: Value) -> Result<(), SettingsError> {
    let name = canonical(key);
    match given.get(name) {
        // Of one word given twice, the later counts.
        Some(_) if name != key => Err(SettingsError::Twice {
            first: name.to_owned(),
            second: key.to_owned(),
        }),
        _ => {
            given.insert(name.to_owned(), value);
            Ok(())
        }
    }
}

fn of_word(key: &str, text: &str) -> Result<Value, SettingsError> {
    let name = canonical(key);
    let is_option = OPTIONS.iter().any(|(option, ..)| *option == name);
    let is_text = TEXTS.contains(&name) || is_option || name == "stop" && !text.starts_with('[');
    match serde_norway::from_str(text) {
        Ok(yaml) if !is_text => from_yaml(key, yaml),
        _ => Ok(Value::String(text.to_owned())),
    }
}

fn typed(mut given: Map<String, Value>) -> Result<Asked, SettingsError> {
    given.retain(|name, value| !value.is_null() && !HARMLESS.contains(&name.as_str()));
    for name in ["instruct_template", "chat_format"] {
        if let Some(value) = given.remove(name) {
            let message = format!(
                "{value} is not supported: write the prompt as the model reads it, or as prompt.user for the model's own chat template"
            );
            return Err(wrong(name, message));
        }
    }
    let model = text(&mut given, MODEL)?;
    let adapter = text(&mut given, ADAPTER)?.map(PathBuf::from);
    let output = text(&mut given, "output")?;
    let mut options = vec!["tandem".to_owned(), "serve".to_owned()];
    options.extend(model.map(|model| format!("--model={model}")));
    for (name, ..) in OPTIONS {
        if let Some(value) = given.remove(*name) {
            let value = match of_others(name, value) {
                Value::Null => continue,
                Value::String(text) => text,
                other => other.to_string(),
            };
            options.push(format!("--{}={value}", name.replace('_', "-")));
        }
    }
    let (route, mut body) = prompted(given)?;
    match body.remove("do_sample") {
        None | Some(Value::Bool(true)) => {}
        Some(Value::Bool(false)) => drop(body.insert("temperature".to_owned(), json!(0))),
        Some(other) => {
            return Err(wrong("do_sample", format!("must be true or false, got {other}")));
        }
    }
    body.entry(MAX_TOKENS).or_insert(json!(DEFAULT_MAX_TOKENS));
    let of_json = OF_JSON.iter().find(|name| match body.get(**name) {
        None | Some(Value::Bool(false)) => false,
        Some(value) => value.as_u64() != Some(1) || !["n", "best_of"].contains(name),
    });
    let of_json = of_json
        .copied()
        .or(body.get("prompt").and_then(Value::as_array).map(|_| "prompts"));
    let output = match (output.as_deref(), of_json) {
        (None, None) | (Some("text"), None) => Output::Text,
        (None, Some(_)) | (Some("json"), _) => Output::Json,
        (Some("text"), Some(name)) => {
            return Err(wrong("output", format!("text does not show {name}: take json")));
        }
        (Some(other), _) => return Err(wrong("output", format!("must be text or json, got {other}"))),
    };
    body.entry("stream").or_insert(json!(output == Output::Text));
    // In one piece: what the model writes.
    if output == Output::Text && route == CHAT && !body.contains_key("include_reasoning") {
        body.entry("separate_reasoning").or_insert(json!(false));
    }
    // As many places as are needed.
    options.push(format!(
        "--max-num-seqs={}",
        body.get("n").and_then(Value::as_u64).unwrap_or(1).clamp(1, 4096)
    ));
    options.extend(["--max-loras=1", "--strict-fields"].map(str::to_owned));
    let Command::Serve(serve) = Cli::try_parse_from(options)
        .map_err(|error| wrong("an option of the model", said(&error.to_string())))?
        .command
    else {
        unreachable!("it is asked for")
    };
    Ok(Asked {
        serve: *serve,
        adapter,
        route,
        body,
        output,
    })
}

/// Of clap's message, what is wrong.
fn said(message: &str) -> String {
    let first = message.lines().next().unwrap_or_default();
    first.trim_start_matches("error: ").to_owned()
}

fn text(given: &mut Map<String, Value>, name: &str) -> Result<Option<String>, SettingsError> {
    match given.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(name, format!("must be a text, got {other}"))),
    }
}

/// The route, and the body with its prompt.
fn prompted(mut given: Map<String, Value>) -> Result<(&'static str, Map<String, Value>), SettingsError> {
    let mut ways = PROMPTS.into_iter().filter(|name| given.contains_key(*name));
    let way = match (ways.next(), ways.next()) {
        (Some(first), Some(second)) => {
            return Err(SettingsError::Twice {
                first: first.to_owned(),
                second: second.to_owned(),
            });
        }
        (None, _) => {
            let message = "is missing: prompt=TEXT, user=TEXT (a chat), messages=[...] or prompt_file=FILE";
            return Err(wrong("prompt", message.to_owned()));
        }
        (Some(way), None) => way,
    };
    let value = given.remove(way).expect("it is one of them");
    let system = given.remove("system");
    // torchtune's prompt of a chat.
    let (value, system) = match value {
        Value::Object(parts) if way == "prompt" => return chat(parts, system, given),
        value => (value, system),
    };
    let value = match (way, value) {
        ("prompt_file", Value::String(path)) => {
            let read = std::fs::read_to_string(&path);
            Value::String(read.map_err(|source| SettingsError::Unreadable { path, source })?)
        }
        (_, value) => value,
    };
    match (way, system) {
        ("messages", None) => {
            given.insert(way.to_owned(), value);
            Ok((CHAT, given))
        }
        ("messages", Some(_)) => {
            let message = "a whole chat says it by its first message, of role system";
            Err(wrong("system", message.to_owned()))
        }
        ("user", system) | (_, system @ Some(_)) => {
            let parts = Map::from_iter([("user".to_owned(), value)]);
            chat(parts, system, given)
        }
        (_, None) => {
            given.insert("prompt".to_owned(), value);
            Ok((COMPLETIONS, given))
        }
    }
}

/// `{system, user}` or `{messages}`.
fn chat(
    mut parts: Map<String, Value>,
    system: Option<Value>,
    mut given: Map<String, Value>,
) -> Result<(&'static str, Map<String, Value>), SettingsError> {
    let [system_part, user, messages] =
        ["system", "user", "messages"].map(|name| parts.remove(name).filter(|value| !value.is_null()));
    if let Some((other, _)) = parts.into_iter().next() {
        let message = "an unknown part; a chat has system and user, or messages";
        return Err(wrong(&format!("prompt.{other}"), message.to_owned()));
    }
    let messages = match (messages, user) {
        (Some(messages), None) if system.is_none() && system_part.is_none() => messages,
        (None, Some(user)) => {
            let system = system.or(system_part).into_iter();
            let system = system.map(|text| json!({"role": "system", "content": text}));
            system.chain([json!({"role": "user", "content": user})]).collect()
        }
        _ => {
            let message = "a chat is system and user, or messages alone";
            return Err(wrong("prompt", message.to_owned()));
        }
    };
    given.insert("messages".to_owned(), messages);
    Ok((CHAT, given))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(words: &[&str]) -> Result<Asked, SettingsError> {
        read(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn words_are_a_request() {
        for (words, route, expected) in [
            (
                &[
                    "m",
                    "prompt=Q: {x}",
                    "max_new_tokens=3",
                    "top_k=5",
                    "do_sample=false",
                ][..],
                COMPLETIONS,
                json!({"prompt": "Q: {x}", "max_tokens": 3, "top_k": 5, "temperature": 0, "stream": true}),
            ),
            (
                &[
                    "m",
                    "user=1",
                    "system=Be brief.",
                    "stop=\n",
                    "chat_template_kwargs.enable_thinking=false",
                ],
                CHAT,
                json!({
                    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1"}],
                    "max_tokens": 256, "stop": "\n", "stream": true, "separate_reasoning": false,
                    "chat_template_kwargs": {"enable_thinking": false},
                }),
            ),
            (
                &["prompt=a", "prompt=b", "n=2", "logprobs=1"],
                COMPLETIONS,
                json!({"prompt": "b", "max_tokens": 256, "n": 2, "logprobs": 1, "stream": false}),
            ),
            (
                &[
                    "messages=[{role: user, content: Hi}]",
                    "output=json",
                    "stream=true",
                ],
                CHAT,
                json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 256, "stream": true}),
            ),
        ] {
            let asked = asked(words).unwrap_or_else(|error| panic!("{words:?}: {error}"));
            assert_eq!(
                (asked.route, Value::Object(asked.body)),
                (route, expected),
                "{words:?}"
            );
        }
        let Asked { serve, adapter, .. } = asked(&[
            "m",
            "prompt=a",
            "quantization=8bit",
            "dtype=bf16",
            "threads=1",
            "peft_model=a",
        ])
        .unwrap();
        assert_eq!(serve.model.folder(), Some(Path::new("m")));
        assert_eq!(serve.model.quantization.as_deref(), Some("int8"));
        assert_eq!(
            (serve.model.threads, serve.model.max_num_seqs),
            (Some(1), Some(1))
        );
        assert_eq!(adapter.as_deref(), Some(Path::new("a")));
        let help = help();
        assert!(OWN.iter().chain(OPTIONS).all(|(key, ..)| help.contains(key)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (words, expected) in [
            (&["m"][..], "prompt: is missing"),
            (
                &["m", "prompt=a", "user=b"],
                "prompt and user are the same setting",
            ),
            (
                &["m", "prompt=a", "max_tokens=1", "max_new_tokens=2"],
                "max_tokens and max_new_tokens",
            ),
            (&["m", "prompt=a", "output=xml"], "must be text or json, got xml"),
            (&["m", "prompt=a", "output=text", "n=2"], "text does not show n"),
            (&["m", "prompt=a", "do_sample=maybe"], "must be true or false"),
            (&["m", "prompt=a", "threads=0"], "threads"),
            (&["m", "messages=[]", "system=x"], "of role system"),
            (&["m", "prompt.users=a"], "prompt.users: an unknown part"),
            (&["m", "prompt_file=/nowhere/x"], "cannot read /nowhere/x"),
            (&["m", "what"], "neither key=value"),
            (&["m", "prompt=a", "model=n"], "m and model are the same setting"),
        ] {
            let message = asked(words).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(expected), "{words:?}: {message}");
        }
    }
}
