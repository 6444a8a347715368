//! Values of options as people and vLLM's documentation write them: counts with a suffix, sizes, hosts, adapters. Not
//! here: which option takes which (cli.rs).

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::Deserialize;
use tandem_backend::ModelLen;
use tandem_text::reasoning::ReasoningFormat;
use tandem_text::tools::ToolFormat;

use crate::connection::RootPath;
use crate::tls::CertReqs;

/// `auto` and -1 are what fits into the memory, as in vLLM.
pub fn model_len(text: &str) -> Result<ModelLen, String> {
    match text {
        "auto" | "-1" => Ok(ModelLen::Fits),
        text => count(1..=u32::MAX)(text).map(ModelLen::Asked),
    }
}

/// Whether requests may go before others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchedulingPolicy {
    Fcfs,
    Priority,
}

pub fn scheduling_policy(text: &str) -> Result<SchedulingPolicy, String> {
    match text {
        "fcfs" => Ok(SchedulingPolicy::Fcfs),
        "priority" => Ok(SchedulingPolicy::Priority),
        _ => Err("fcfs or priority is wanted".to_owned()),
    }
}

pub fn root_path(text: &str) -> Result<RootPath, String> {
    RootPath::new(text).ok_or_else(|| "a path such as /llm is wanted".to_owned())
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    /// An object a line.
    Json,
}

pub fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("text or json is wanted".to_owned()),
    }
}

/// By the numbers of Python's `ssl` module, as vLLM takes them.
pub fn cert_reqs(text: &str) -> Result<CertReqs, String> {
    match text {
        "0" => Ok(CertReqs::None),
        "1" => Ok(CertReqs::Optional),
        "2" => Ok(CertReqs::Required),
        _ => Err(
            "0 (no certificate of a client is asked for), 1 (one may be shown) or 2 (one must be) is wanted"
                .to_owned(),
        ),
    }
}

/// A whole number within `range`, with a suffix if need be: 1k is 1000, 1K is 1024.
pub fn count(range: RangeInclusive<u32>) -> impl Fn(&str) -> Result<u32, String> + Clone + Send + Sync {
    move |text| match number(text).map(u32::try_from) {
        Some(Ok(n)) if range.contains(&n) => Ok(n),
        _ => {
            let (low, high) = (range.start(), range.end());
            Err(format!(
                "a whole number from {low} to {high} is wanted, such as 4096, 4k (4000) or 4K (4096)"
            ))
        }
    }
}

/// `4294967296`, `4G` or `4GiB` (of 1024), `500m` or `500mb` (of 1000).
pub fn bytes(text: &str) -> Result<u64, String> {
    match number(text) {
        Some(n @ 1..) => Ok(n),
        _ => Err(
            "a number of bytes is wanted, at most 8000T, such as 2147483648, 2G, 2GiB (both of 1024) or 500m (of 1000)"
                .to_owned(),
        ),
    }
}

/// The same, or 0.
pub fn bytes_or_none(text: &str) -> Result<u64, String> {
    match text {
        "0" => Ok(0),
        text => bytes(text),
    }
}

/// The case of the suffix says whether it counts by 1000 or 1024, as in vLLM; an `i` says 1024 in either case.
fn number(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let unit = unit.strip_suffix(['b', 'B']).unwrap_or(unit);
    let (unit, is_binary) = match unit.strip_suffix('i') {
        Some(unit) => (unit, true),
        None => (unit, unit.starts_with(|c: char| c.is_ascii_uppercase())),
    };
    let power = match unit.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return None,
    };
    let factor = if is_binary { 1024_f64 } else { 1000_f64 }.powi(power);
    let number = digits.trim().parse::<f64>().ok()? * factor;
    ((0.0..9e15).contains(&number) && number.fract() == 0.0).then_some(number as u64)
}

pub fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.01..=100.0).contains(&share) => Ok(share),
        _ => Err("a number from 0.01 to 100 is wanted".to_owned()),
    }
}

/// An address, or a name that has one; of several addresses an IPv4 one, which is what `localhost` means to clients.
pub fn host(text: &str) -> Result<IpAddr, String> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    match bare.parse() {
        Ok(address) => Ok(address),
        Err(_) => Ok(resolve((bare, 0))?.ip()),
    }
}

/// `ADDRESS:PORT`, or `NAME:PORT`.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    match text.parse() {
        Ok(address) => Ok(address),
        Err(_) if text.contains(':') => resolve(text),
        Err(_) => Err("an address and a port are wanted, such as 127.0.0.1:8001".to_owned()),
    }
}

fn resolve(name: impl ToSocketAddrs) -> Result<SocketAddr, String> {
    let addresses: Vec<SocketAddr> = name
        .to_socket_addrs()
        .map_err(|error| error.to_string())?
        .collect();
    let ipv4 = addresses.iter().find(|address| address.is_ipv4());
    ipv4.or(addresses.first())
        .copied()
        .ok_or_else(|| "the name has no address".to_owned())
}

/// What one word of `--lora-modules` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraModules(pub Vec<LoraModule>);

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraModule {
    pub name: String,
    pub path: PathBuf,
    /// vLLM's: what the adapter's card calls its base. Here it is the base that is served.
    pub base_model_name: Option<String>,
}

/// `NAME=DIR`, several by commas, or vLLM's JSON: an object or a list of them.
pub fn lora_modules(text: &str) -> Result<LoraModules, String> {
    let json = match text.trim_start().as_bytes().first() {
        Some(b'{') => Some(serde_json::from_str(text).map(|module| vec![module])),
        Some(b'[') => Some(serde_json::from_str(text)),
        _ => None,
    };
    if let Some(json) = json {
        return json.map(LoraModules).map_err(|error| {
            format!(r#"as JSON an adapter is {{"name": "NAME", "path": "DIR"}}, with "base_model_name" if need be ({error})"#)
        });
    }
    let words = text.split(',').filter(|word| !word.is_empty());
    let modules = words.map(|word| match word.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => Ok(LoraModule {
            name: name.to_owned(),
            path: PathBuf::from(folder),
            base_model_name: None,
        }),
        _ => Err(r#"an adapter is given as NAME=DIR, or as {"name": "NAME", "path": "DIR"}"#.to_owned()),
    });
    modules.collect::<Result<_, _>>().map(LoraModules)
}

/// The text of a template, and how it was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplate {
    pub given: String,
    pub source: String,
}

/// A format by its name; `none` is no format.
#[derive(Debug)]
pub enum Parser<F: 'static> {
    None,
    Named(&'static F),
}

impl<F> Clone for Parser<F> {
    fn clone(&self) -> Parser<F> {
        *self
    }
}

impl<F> Copy for Parser<F> {}

pub fn tool_call_parser(name: &str) -> Result<Parser<ToolFormat>, String> {
    parser(name, ToolFormat::named, &ToolFormat::all_names())
}

pub fn reasoning_parser(name: &str) -> Result<Parser<ReasoningFormat>, String> {
    parser(name, ReasoningFormat::named, &ReasoningFormat::all_names())
}

fn parser<F>(name: &str, named: fn(&str) -> Option<&'static F>, known: &[&str]) -> Result<Parser<F>, String> {
    match (name, named(name)) {
        ("none", _) => Ok(Parser::None),
        (_, Some(format)) => Ok(Parser::Named(format)),
        (_, None) => Err(format!("it must be none or one of {}", known.join(", "))),
    }
}

/// A file, or, as in vLLM, the template itself where there is no such file and the text has braces.
pub fn chat_template(given: &str) -> Result<ChatTemplate, String> {
    let source = match std::fs::read_to_string(given) {
        Ok(source) => source,
        Err(_) if given.contains(['{', '}', '\n']) => unescaped(given),
        Err(error) => {
            return Err(format!(
                "{error}; without such a file the text must be a template itself, with {{{{ .. }}}} or {{% .. %}}"
            ));
        }
    };
    Ok(ChatTemplate {
        given: given.to_owned(),
        source,
    })
}

/// As a shell's word holds it: `\n` is a new line, and so on.
fn unescaped(text: &str) -> String {
    let (mut plain, mut chars) = (String::new(), text.chars().peekable());
    while let Some(c) = chars.next() {
        let meant = match chars.peek().filter(|_| c == '\\') {
            Some('n') => Some('\n'),
            Some('t') => Some('\t'),
            Some('r') => Some('\r'),
            Some(&same @ ('\\' | '\'' | '"')) => Some(same),
            _ => None,
        };
        plain.push(meant.unwrap_or(c));
        if meant.is_some() {
            chars.next();
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_counts_are_read_as_vllm_reads_them() {
        for (text, expected) in [
            ("2147483648", Some(2 << 30)),
            ("2G", Some(2 << 30)),
            ("1.5GiB", Some(3 << 29)),
            ("512m", Some(512_000_000)),
            ("512M", Some(512 << 20)),
            ("512mib", Some(512 << 20)),
            ("64kb", Some(64_000)),
            ("25.6k", Some(25_600)),
            ("", None),
            ("G", None),
            ("-1G", None),
            ("1X", None),
            ("1.5", None),
            ("0", None),
            ("nan", None),
        ] {
            assert_eq!(bytes(text).ok(), expected, "{text:?}");
        }
        for (text, expected) in [
            ("1k", Ok(ModelLen::Asked(1000))),
            ("1K", Ok(ModelLen::Asked(1024))),
            ("32K", Ok(ModelLen::Asked(32_768))),
            ("auto", Ok(ModelLen::Fits)),
            ("-1", Ok(ModelLen::Fits)),
            ("0", Err(())),
            ("-2", Err(())),
            ("9G", Err(())),
            ("many", Err(())),
        ] {
            assert_eq!(model_len(text).map_err(drop), expected, "{text:?}");
        }
    }

    #[test]
    fn hosts_may_have_names() {
        let local: IpAddr = [127, 0, 0, 1].into();
        assert_eq!(host("localhost"), Ok(local));
        assert_eq!(host("[::1]").map(|address| address.is_loopback()), Ok(true));
        assert_eq!(address("localhost:8001"), Ok((local, 8001).into()));
        assert!(host("no such host").is_err());
        assert!(address("8001").is_err());
    }

    #[test]
    fn a_chat_template_is_a_file_or_itself() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "{{ a }}\\n\n").unwrap();
        let path = file.path().to_str().unwrap();
        for (given, expected) in [
            (path, Some("{{ a }}\\n\n")),
            (r"{{ a }}\n{{ 'b\\' }}\x", Some("{{ a }}\n{{ 'b\\' }}\\x")),
            ("chatml", None),
            ("./no-such-file.jinja", None),
        ] {
            let got = chat_template(given).map(|template| template.source);
            assert_eq!(got.ok().as_deref(), expected, "{given}");
        }
    }

    #[test]
    fn adapters_are_pairs_or_json() {
        let names = |text: &str| {
            lora_modules(text).map(|LoraModules(modules)| {
                let pair = |module: LoraModule| format!("{}={}", module.name, module.path.display());
                modules.into_iter().map(pair).collect::<Vec<_>>().join(" ")
            })
        };
        for (text, expected) in [
            ("a=x", Some("a=x")),
            ("a=x,b=y/z", Some("a=x b=y/z")),
            (r#"{"name": "a", "path": "x"}"#, Some("a=x")),
            (
                r#"{"name": "a", "path": "x", "base_model_name": "m"}"#,
                Some("a=x"),
            ),
            (
                r#"[{"name": "a", "path": "x"}, {"name": "b", "path": "y"}]"#,
                Some("a=x b=y"),
            ),
            (r#"{"name": "a"}"#, None),
            (r#"{"name": "a", "path": "x", "rank": 8}"#, None),
            ("a", None),
            ("=x", None),
        ] {
            assert_eq!(names(text).ok().as_deref(), expected, "{text}");
        }
    }
}
