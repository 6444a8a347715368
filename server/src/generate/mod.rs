//! `tandem generate`: one request, answered in this process by what answers in a server: the same engine, routes and words.
//! Nothing listens, and what is kept meanwhile goes with it. Not here: how it is asked (settings), how it is answered.

pub mod config;
pub mod settings;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use axum::body::{self, Body};
use axum::http::{Method, Request, header};
use futures::StreamExt;
use serde_json::{Map, Value, json};
use tandem_router::Fleet;
use tandem_store::{Places, Store};
use tower::ServiceExt;

use crate::app::{self, App};
use crate::cli::{Generate, Serve};
use crate::commands::edge::{self, Behind};
use crate::commands::{block_on, replica};
use crate::exit::WrongSetting;
use crate::hub::{self, Content};
use crate::listen::Signals;
use crate::output;
use crate::{ranks, train};
use settings::{Asked, Output};

/// The name by which the request calls the adapter.
const ADAPTER: &str = "adapter";
/// What the replica of this process may take to come: it was started before.
const REPLICA_WAIT: Duration = Duration::from_secs(5);

pub fn run(options: &Generate) -> Result<ExitCode> {
    if options.settings == ["help"] {
        output::say(format_args!("{}", settings::help()));
        return Ok(ExitCode::SUCCESS);
    }
    let Asked {
        serve,
        adapter,
        route,
        mut body,
        output,
    } = settings::read(&train::as_settings(&options.settings))?;
    let Serve { mut model, edge, .. } = serve;
    if model.folder().is_none() {
        note!("the embedded demo model answers: a model's folder or name goes first");
    }
    let scratch = tempfile::Builder::new().prefix("tandem-generate-").tempdir();
    let scratch = scratch.context("a folder for the time being")?;
    let adapter = adapter
        .map(|given| hub::find(&given, None, Content::Adapter))
        .transpose()?;
    let adapters = adapter.map(|found| (ADAPTER.to_owned(), found.folder));
    if let Some((_, folder)) = &adapters {
        model.max_lora_rank = rank(folder).max(model.max_lora_rank);
    }
    let (folder, names) = replica::model(&model, scratch.path())?;
    let called = adapters.as_ref().map_or(&names[0], |(name, _)| name);
    body.insert("model".to_owned(), json!(called));
    let tokenizer = edge::tokenizer(&folder, &edge)?;
    let team = ranks::team(&model, None)?;
    let engine = replica::engine_options(&model, &folder, scratch.path(), team, &tokenizer)?;
    let member = replica::member(engine, names[0].clone())?;
    block_on(async {
        let mut signals = Signals::new()?;
        let store = Store::open(&Places::local(scratch.path()))
            .await
            .context("the store")?;
        let behind = Behind {
            fleet: Fleet::open(vec![member], REPLICA_WAIT).await,
            tokenizer,
            base: None,
            names,
            adapters: adapters.into_iter().collect(),
        };
        let app = edge::open(store, behind, &edge, scratch.path()).await?;
        let router = app.router.clone();
        let code = tokio::select! {
            answered = answer(app, route, body, output) => answered.map(|()| ExitCode::SUCCESS),
            signal = signals.next() => Ok(ExitCode::from(train::signal_code(signal))),
        };
        router.shutdown().await;
        code
    })
}

/// The largest of an adapter, which has room then, whatever servers allow. What is wrong with it is said when it is loaded.
fn rank(folder: &Path) -> Option<u32> {
    let config = std::fs::read(folder.join("adapter_config.json")).ok()?;
    let config: Value = serde_json::from_slice(&config).ok()?;
    let others = config["rank_pattern"]
        .as_object()
        .into_iter()
        .flat_map(Map::values);
    let ranks = others.chain([&config["r"]]).filter_map(Value::as_u64);
    u32::try_from(ranks.max()?).ok()
}

async fn answer(app: App, route: &'static str, body: Map<String, Value>, output: Output) -> Result<()> {
    let is_stream = body.get("stream") == Some(&json!(true));
    let mut body = Value::Object(body);
    if is_stream && body["stream_options"].is_null() {
        body["stream_options"] = json!({"include_usage": true});
    }
    let mut request = Request::new(Body::from(body.to_string()));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = route.parse().expect("a path is a URI");
    let json = header::HeaderValue::from_static("application/json");
    request.headers_mut().insert(header::CONTENT_TYPE, json);
    let began = Instant::now();
    let response = app::inner(app)
        .oneshot(request)
        .await
        .unwrap_or_else(|never| match never {});
    let is_good = response.status().is_success();
    let mut shown = Shown::new(output);
    if is_good && is_stream {
        let mut events = Events::default();
        let mut pieces = response.into_body().into_data_stream();
        while let Some(piece) = pieces.next().await {
            for event in events.take(&piece.context("the answer breaks off")?) {
                shown.take(&event)?;
            }
        }
    } else {
        let whole = body::to_bytes(response.into_body(), usize::MAX).await?;
        let whole: Value = serde_json::from_slice(&whole).context("the answer is no JSON")?;
        shown.take(&whole)?;
    }
    shown.end(began.elapsed())
}

/// What an answer has said so far.
struct Shown {
    output: Output,
    ends_line: bool,
    finish: Option<String>,
    usage: Value,
}

impl Shown {
    fn new(output: Output) -> Shown {
        Shown {
            output,
            ends_line: true,
            finish: None,
            usage: Value::Null,
        }
    }

    /// A whole answer, or a chunk of one.
    fn take(&mut self, answer: &Value) -> Result<()> {
        if let Some(message) = answer["error"]["message"].as_str() {
            bail!(WrongSetting(message.to_owned()));
        }
        if answer["usage"].is_object() {
            self.usage = answer["usage"].clone();
        }
        let choice = &answer["choices"][0];
        if let Some(finish) = choice["finish_reason"].as_str() {
            self.finish = Some(finish.to_owned());
        }
        let texts = [
            &choice["text"],
            &choice["delta"]["content"],
            &choice["message"]["content"],
        ];
        match self.output {
            Output::Json => self.say(&format!("{answer}\n")),
            Output::Text => self.say(texts.into_iter().find_map(Value::as_str).unwrap_or_default()),
        }
    }

    fn say(&mut self, text: &str) -> Result<()> {
        if let Some(last) = text.chars().last() {
            self.ends_line = last == '\n';
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .context("standard output")
    }

    fn end(mut self, took: Duration) -> Result<()> {
        if !self.ends_line {
            self.say("\n")?;
        }
        let tokens = |name: &str| self.usage[name].as_u64().unwrap_or(0);
        let (prompt, answer) = (tokens("prompt_tokens"), tokens("completion_tokens"));
        let seconds = took.as_secs_f64();
        let why = match self.finish.as_deref() {
            Some("length") => ", which was all that max_tokens or the context allows",
            _ => "",
        };
        note!(
            "{answer} tokens behind a prompt of {prompt} in {seconds:.2} s, {:.1} tokens/s{why}",
            answer as f64 / seconds.max(1e-9)
        );
        Ok(())
    }
}

/// Server-sent events, whose ends need not be those of the pieces that come.
#[derive(Default)]
struct Events(Vec<u8>);

impl Events {
    fn take(&mut self, piece: &[u8]) -> Vec<Value> {
        self.0.extend_from_slice(piece);
        let mut events = vec![];
        while let Some(end) = self.0.windows(2).position(|two| two == b"\n\n") {
            let event: Vec<u8> = self.0.drain(..end + 2).collect();
            let data = event.strip_prefix(b"data: ").unwrap_or_default();
            // The last is `[DONE]`.
            events.extend(serde_json::from_slice(data));
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_in_any_pieces() {
        let stream = b"data: {\"a\": 1}\n\n: still here\n\ndata: {\"a\": 2}\n\ndata: [DONE]\n\n";
        for cut in 0..stream.len() {
            let mut events = Events::default();
            let found = [&stream[..cut], &stream[cut..]]
                .map(|piece| events.take(piece))
                .concat();
            assert_eq!(found, [json!({"a": 1}), json!({"a": 2})], "{cut}");
        }
    }
}
