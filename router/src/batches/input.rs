//! The file of a batch's requests, line by line: what can be asked, what is wrong with a line, and when the file as a whole
//! is none. Bodies stay on the disk until they are asked. Blocking. Not here: what is wrong with a body (the edge's).

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;
use tandem_core::json;

use super::{Endpoint, LineError};

/// OpenAI's limits.
const MAX_LINES: u64 = 50_000;
const MAX_BYTES: u64 = 200 << 20;
/// Of one line: as much as a request may have, and its envelope.
const MAX_LINE_BYTES: usize = 33 << 20;
/// Of the values that a line is made of, in memory.
const MAX_TREE_BYTES: usize = 512 << 20;
const MAX_ID_CHARS: usize = 512;
/// Errors of a file that are listed.
const MAX_ERRORS: usize = 100;

/// All lines but empty ones, in order.
pub(crate) struct Input {
    file: Arc<File>,
    pub lines: Vec<Request>,
}

pub(crate) struct Request {
    /// From 1.
    pub line: u64,
    pub custom_id: Option<String>,
    pub what: What,
}

pub(crate) enum What {
    /// Where it lies in the file.
    Asked(Range<u64>),
    Wrong(LineError),
}

/// Of the lines before.
#[derive(Default)]
struct Seen {
    ids: HashSet<String>,
    /// What the first one asked.
    model: Option<String>,
}

impl Seen {
    /// The model of the lines before, where this one names another. (That one is missing is the edge's to say.)
    fn other_model(&mut self, model: Option<String>) -> Option<String> {
        let model = model?;
        let first = self.model.get_or_insert_with(|| model.clone());
        (*first != model).then(|| first.clone())
    }
}

/// What a line is. Values stay text, of which a tree would take a hundred times as much memory.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    custom_id: Option<&'a RawValue>,
    #[serde(borrow)]
    method: Option<&'a RawValue>,
    #[serde(borrow)]
    url: Option<&'a RawValue>,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

/// Of a body what its line is judged by.
#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    stream: Option<&'a RawValue>,
}

/// A value, if it is a text.
fn text_of(value: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(value?.get()).ok()
}

impl Input {
    /// The errors of a file of which nothing can be asked.
    pub fn read(path: &Path, endpoint: Endpoint) -> io::Result<Result<Input, Vec<LineError>>> {
        let file = File::open(path)?;
        let whole = |code: &str, message: String| {
            Ok(Err(vec![LineError {
                code: code.to_owned(),
                message,
                line: None,
                param: Some("input_file_id".to_owned()),
            }]))
        };
        let bytes = file.metadata()?.len();
        if bytes > MAX_BYTES {
            return whole(
                "file_too_large",
                format!("the file has {bytes} bytes, a batch at most {MAX_BYTES}"),
            );
        }
        let mut reader = BufReader::new(&file);
        let (mut lines, mut seen) = (Vec::new(), Seen::default());
        let (mut number, mut at) = (0, 0);
        let mut text = Vec::new();
        loop {
            text.clear();
            let read = reader.read_until(b'\n', &mut text)? as u64;
            if read == 0 {
                break;
            }
            (number, at) = (number + 1, at + read);
            if text.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            if lines.len() as u64 == MAX_LINES {
                return whole(
                    "too_many_requests",
                    format!("the file has more than {MAX_LINES} requests; make several batches of it"),
                );
            }
            let (custom_id, what) = judge(&text, number, endpoint, &mut seen);
            lines.push(Request {
                line: number,
                custom_id,
                what: match what {
                    Ok(()) => What::Asked(at - read..at),
                    Err(error) => What::Wrong(error),
                },
            });
        }
        if lines.is_empty() {
            return whole("empty_file", "the file has no requests".to_owned());
        }
        let wrong = |line: &Request| match &line.what {
            What::Wrong(error) => Some(error.clone()),
            What::Asked(_) => None,
        };
        match lines.iter().all(|line| wrong(line).is_some()) {
            true => Ok(Err(lines.iter().filter_map(wrong).take(MAX_ERRORS).collect())),
            false => Ok(Ok(Input {
                file: Arc::new(file),
                lines,
            })),
        }
    }

    /// The body of a line that was judged.
    pub fn body(&self, place: &Range<u64>) -> impl FnOnce() -> io::Result<Vec<u8>> + Send + 'static {
        let (file, place) = (self.file.clone(), place.clone());
        move || {
            let mut text = vec![0; (place.end - place.start) as usize];
            file.read_exact_at(&mut text, place.start)?;
            let envelope: Envelope = serde_json::from_slice(&text)?;
            Ok(envelope.body.map_or_else(Vec::new, |body| body.get().into()))
        }
    }
}

/// Its `custom_id`, as far as it has one, and whether it can be asked.
fn judge(
    text: &[u8],
    line: u64,
    endpoint: Endpoint,
    seen: &mut Seen,
) -> (Option<String>, Result<(), LineError>) {
    let wrong = |code: &str, param: Option<&str>, message: String| {
        Err(LineError {
            code: code.to_owned(),
            message: format!("Line {line}: {message}"),
            line: Some(line),
            param: param.map(str::to_owned),
        })
    };
    if text.len() > MAX_LINE_BYTES {
        let message = format!("it has {} bytes, a request at most {MAX_LINE_BYTES}", text.len());
        return (None, wrong("request_too_large", None, message));
    }
    let tree = json::tree_bytes(text);
    if tree > MAX_TREE_BYTES {
        let message =
            format!("its values would take {tree} bytes of memory, a request's at most {MAX_TREE_BYTES}");
        return (None, wrong("request_too_large", None, message));
    }
    let envelope: Envelope = match serde_json::from_slice(text) {
        Ok(envelope) => envelope,
        Err(error) => {
            let message = format!("this is not a JSON object of custom_id, method, url and body: {error}");
            return (None, wrong("invalid_json_line", None, message));
        }
    };
    let Envelope {
        custom_id,
        method,
        url,
        body,
    } = envelope;
    let id = match text_of(custom_id) {
        Some(id) if !id.is_empty() && id.chars().count() <= MAX_ID_CHARS => id,
        _ => {
            let code = if custom_id.is_none() {
                "missing_required_parameter"
            } else {
                "invalid_custom_id"
            };
            let message = format!("custom_id must be a text of 1 to {MAX_ID_CHARS} characters");
            return (None, wrong(code, Some("custom_id"), message));
        }
    };
    let judged = if !seen.ids.insert(id.clone()) {
        let message = format!("custom_id {id:?} is that of an earlier line");
        wrong("duplicate_custom_id", Some("custom_id"), message)
    } else if text_of(method).as_deref() != Some("POST") {
        wrong(
            "invalid_method",
            Some("method"),
            "method must be \"POST\"".to_owned(),
        )
    } else if text_of(url).as_deref() != Some(endpoint.path()) {
        let message = format!("url must be {:?}, the batch's endpoint", endpoint.path());
        wrong("mismatched_endpoint", Some("url"), message)
    } else {
        // A derived struct would also take a list, by position.
        let head = body
            .filter(|body| body.get().starts_with('{'))
            .map(|body| serde_json::from_str::<Head>(body.get()));
        match head {
            Some(Ok(Head { model, stream })) if stream.is_none_or(|on| on.get() == "false") => {
                match seen.other_model(text_of(model)) {
                    None => Ok(()),
                    Some(first) => {
                        let message = format!(
                            "model must be {first:?}, as in the first line: one batch asks one model"
                        );
                        wrong("mismatched_model", Some("body.model"), message)
                    }
                }
            }
            Some(Ok(_)) => {
                let message = "an answer of a batch is never streamed: leave stream out".to_owned();
                wrong("invalid_request", Some("body.stream"), message)
            }
            Some(Err(error)) => wrong("invalid_request", Some("body"), format!("body: {error}")),
            None => wrong(
                "invalid_request",
                Some("body"),
                "body must be a JSON object".to_owned(),
            ),
        }
    };
    (Some(id), judged)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn lines_fail_alone_and_files_as_a_whole() {
        let line = |id: &str, url: &str, body: &str| {
            format!(r#"{{"custom_id": "{id}", "method": "POST", "url": "{url}", "body": {body}}}"#)
        };
        let chat = "/v1/chat/completions";
        let good = line("a", chat, r#"{"model": "m", "stream": false}"#);
        // A line beside a good one, and the code it gets; `None`: it is good, too.
        let lines = [
            (line("b", chat, "{}"), None),
            (String::new(), None),
            ("{".to_owned(), Some("invalid_json_line")),
            ("[1]".to_owned(), Some("invalid_json_line")),
            (r#"{"custom_id": "b"}"#.to_owned(), Some("invalid_method")),
            (good.clone(), Some("duplicate_custom_id")),
            (line("b", "/v1/completions", "{}"), Some("mismatched_endpoint")),
            (line("", chat, "{}"), Some("invalid_custom_id")),
            (
                r#"{"method": "POST"}"#.to_owned(),
                Some("missing_required_parameter"),
            ),
            (line("b", chat, "[]"), Some("invalid_request")),
            (line("b", chat, r#"{"stream": true}"#), Some("invalid_request")),
            (
                line("b", chat, r#"{"model": "m", "model": "m"}"#),
                Some("invalid_request"),
            ),
            (
                line("b", chat, &format!("[{}{{}}]", "{\"\":0},".repeat(2 << 20))),
                Some("request_too_large"),
            ),
            (line("b", chat, r#"{"model": "n"}"#), Some("mismatched_model")),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("input.jsonl");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Input::read(&path, Endpoint::Chat).unwrap()
        };
        for (other, code) in lines {
            let input = read(&format!("{good}\n{other}\n")).unwrap_or_else(|errors| panic!("{errors:?}"));
            let found = input.lines.last().unwrap();
            match (&found.what, code) {
                (What::Wrong(error), Some(code)) => {
                    assert_eq!((error.code.as_str(), error.line), (code, Some(2)), "{other}");
                    assert!(error.message.starts_with("Line 2: "), "{}", error.message);
                    let alone = read(&format!("\n{other}"));
                    if !["duplicate_custom_id", "mismatched_model"].contains(&code) {
                        let errors = alone.err().unwrap_or_else(|| panic!("{other} is refused"));
                        assert_eq!((errors[0].code.as_str(), errors[0].line), (code, Some(2)));
                    }
                }
                (What::Asked(place), None) => {
                    let body: Value = serde_json::from_slice(&input.body(place)().unwrap()).unwrap();
                    assert!(body.is_object());
                }
                _ => panic!("{other}: not {code:?}"),
            }
        }
        assert_eq!(read(" \n\n").err().unwrap()[0].code, "empty_file");
        let many: String = (0..=MAX_LINES)
            .map(|n| line(&n.to_string(), chat, "{}") + "\n")
            .collect();
        assert_eq!(read(&many).err().unwrap()[0].code, "too_many_requests");
    }
}
