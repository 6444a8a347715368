//! What the fuzz targets do with bytes, as ordinary functions: each reads something that strangers write, as far as the product
//! does before it computes with it. None may panic, hang or take memory without a bound; errors are right answers.

use std::io::Write;
use std::sync::{Arc, LazyLock};

use prost::Message;
use serde::de::DeserializeOwned;
use tandem_backend::family::{DecoderSpec, described};
use tandem_backend::lora::peft;
use tandem_core::gguf::Gguf;
use tandem_core::grammar::{Compiler, Grammar, Vocabulary, Whitespace};
use tandem_core::id::Digest;
use tandem_core::job::{JobEvent, JobSpec};
use tandem_core::protobuf::tree_bytes;
use tandem_core::replica::ReplicaInfo;
use tandem_core::sampling::{RawSampling, Sampling};
use tandem_openapi as openapi;
use tandem_rpc::weighed::Shaped;
use tandem_rpc::{codec, wire as proto};
use tandem_text::chat::Kwargs;
use tandem_text::dataset::{Reading, Rows, Source, check};
use tandem_text::{ChatTemplate, Ending, Message as Turn};

/// Training rows. The first byte chooses the ending of the file's name, which says what the content leaves open.
pub fn rows(bytes: &[u8]) {
    const ENDINGS: [&str; 6] = ["jsonl", "json", "csv", "tsv", "parquet", "txt"];
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("it takes bytes");
    let source = Source {
        path: file.path().to_owned(),
        name: format!("rows.{}", ENDINGS[*choice as usize % ENDINGS.len()]),
    };
    let _ = check(&source);
    if let Ok(rows) = Rows::open(vec![source], &Reading::default()) {
        rows.take_while(Result::is_ok).for_each(drop);
    }
}

/// An adapter for a small base: the length of its adapter_config.json in two bytes, that file, and the tensors.
pub fn adapter(bytes: &[u8]) {
    static BASE: LazyLock<DecoderSpec> = LazyLock::new(|| {
        let config = include_str!("../../numerics/fixtures/gqa_tied/config.json");
        described(serde_json::from_str(config).expect("an object")).expect("a model's config")
    });
    let Some((length, bytes)) = bytes.split_first_chunk() else {
        return;
    };
    let length = usize::from(u16::from_le_bytes(*length));
    let (config, tensors) = bytes.split_at(length.min(bytes.len()));
    let _ = peft::read_bytes(config, tensors, &BASE, 64);
}

/// A model's config.json, and all its parameters by name.
pub fn model(bytes: &[u8]) {
    if let Ok(config) = serde_json::from_slice(bytes)
        && let Ok(spec) = described(config)
    {
        drop(spec.params());
    }
}

/// A model's chat template, and a conversation with all that a message may have.
pub fn template(bytes: &[u8]) {
    let Ok(source) = str::from_utf8(bytes) else { return };
    let special =
        [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name.to_owned(), text.to_owned()));
    let Ok(template) = ChatTemplate::new(source, special.into()) else {
        return;
    };
    let turns = ["system", "user", "assistant", "user"]
        .map(|role| Turn::new(role, format!("What a {role} says: '\"\n")));
    for ending in [Ending::Closed, Ending::GenerationPrompt, Ending::OpenMessage] {
        let _ = template.render(&turns, ending, &Kwargs::new());
    }
}

/// Bodies of requests. The first byte chooses the route.
pub fn bodies(bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    fn read<T: DeserializeOwned>(bytes: &[u8]) {
        let _ = serde_json::from_slice::<T>(bytes);
    }
    const READERS: [fn(&[u8]); 13] = [
        chat,
        read::<openapi::completions::CompletionRequest>,
        read::<openapi::responses::ResponsesRequest>,
        read::<openapi::messages::MessagesRequest>,
        read::<openapi::generate::GenerateRequest>,
        read::<openapi::embeddings::EmbeddingRequest>,
        read::<openapi::tokenize::TokenizeRequest>,
        read::<openapi::tinker::CreateModelRequest>,
        read::<openapi::tinker::OptimStepRequest>,
        read::<openapi::tinker::SampleRequest>,
        read::<openapi::tinker::SaveWeightsForSamplerRequest>,
        |bytes| drop(openapi::tinker::proto::ForwardBackwardRequest::decode(bytes)),
        |bytes| drop(tandem_core::json::twice(bytes)),
    ];
    READERS[*choice as usize % READERS.len()](bytes);
}

/// A chat request, as far as its prompt.
fn chat(bytes: &[u8]) {
    static TEMPLATE: LazyLock<ChatTemplate> = LazyLock::new(|| {
        let source = include_str!("../../../router/text/src/fixture/tools.jinja");
        ChatTemplate::new(source, Default::default()).expect("the fixture is a template")
    });
    if serde_json::from_slice::<openapi::chat::ChatRequest>(bytes).is_err() {
        return;
    }
    let Ok(body) = serde_json::from_slice::<serde_json::Value>(bytes) else {
        return;
    };
    let tools = body["tools"].clone();
    let _ = tandem_text::chat::parse_tools(tools.as_array().cloned().unwrap_or_default());
    let messages = body["messages"].as_array().cloned().unwrap_or_default();
    let turns: Vec<Turn> = messages
        .iter()
        .filter_map(|message| {
            let mut turn = Turn::new(
                message["role"].as_str()?,
                message["content"].as_str().unwrap_or_default(),
            );
            turn.fields = message.as_object()?.clone();
            turn.fields
                .retain(|name, _| !["role", "content"].contains(&name.as_str()));
            Some(turn)
        })
        .collect();
    let kwargs: Kwargs = [("tools".to_owned(), tools)].into();
    let _ = TEMPLATE.render(&turns, Ending::GenerationPrompt, &kwargs);
}

/// Grammars that answers are bound to, and the tokens that they allow at first. The first byte chooses the language.
pub fn grammar(bytes: &[u8]) {
    static COMPILER: LazyLock<Arc<Compiler>> = LazyLock::new(|| {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        tokens.extend([&b"true"[..], b"null", b"{\"", b"\":", b"</s>"].map(<[u8]>::to_vec));
        let special = (0..tokens.len()).map(|token| token == 260).collect();
        let vocabulary = Vocabulary {
            tokens,
            special,
            ends: vec![260],
        };
        Arc::new(Compiler::new(&vocabulary).expect("a small vocabulary"))
    });
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    let Ok(text) = str::from_utf8(bytes) else { return };
    let grammar = match choice % 4 {
        0 => match serde_json::from_str(text) {
            Ok(schema) => Grammar::json_schema(&schema, &Whitespace::Usual),
            Err(_) => return,
        },
        1 => Ok(Grammar::regex(text)),
        2 => Grammar::lark_or_gbnf(text),
        _ => Grammar::choice(&text.lines().map(str::to_owned).collect::<Vec<_>>()),
    };
    let Ok(grammar) = grammar else { return };
    let Ok(mut guide) = COMPILER.compile(&grammar) else {
        return;
    };
    for byte in *b"{\"a\":1}" {
        if guide.mask(&[]).is_err() || guide.advance(byte.into()).is_err() {
            return;
        }
    }
}

/// The head of a GGUF file.
pub fn gguf(bytes: &[u8]) {
    let _ = Gguf::read(bytes, bytes.len() as u64, "fuzz.gguf");
}

/// What routers and backends say to each other. The first byte chooses who speaks.
pub fn wire(bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    match choice % 4 {
        0 => up(bytes),
        1 => down(bytes),
        2 => job(bytes),
        _ => drop(
            proto::Description::decode(bytes)
                .map(|described| codec::from_json::<ReplicaInfo>(&described.info_json)),
        ),
    }
}

fn up(bytes: &[u8]) {
    use proto::up::Say;
    let _ = tree_bytes(bytes, proto::Up::SHAPE);
    let Ok(proto::Up { say: Some(say) }) = proto::Up::decode(bytes) else {
        return;
    };
    match say {
        Say::Generate(generate) => {
            let _ = generate.adapter.as_deref().map(codec::digest);
            let _ = generate.grammar_json.as_deref().map(codec::from_json::<Grammar>);
            if let Ok(sampling) = codec::from_json::<RawSampling>(&generate.sampling_json) {
                let _ = Sampling::new(sampling, 100);
            }
        }
        Say::StartJob(start) => job(&start.spec_json),
        _ => {}
    }
}

fn down(bytes: &[u8]) {
    let weighed = tree_bytes(bytes, proto::Down::SHAPE);
    let Ok(down) = proto::Down::decode(bytes) else {
        return;
    };
    // What a message is weighed at is no less than its lists are.
    let events: usize = down.events.iter().map(|events| events.events.len()).sum();
    let taken = down.events.len() * size_of::<proto::Events>()
        + events * size_of::<proto::Event>()
        + down.job_events.len() * size_of::<proto::JobEvents>()
        + (down.pong.len() + down.closed.len()) * size_of::<u64>()
        + down.learned.len() * size_of::<proto::LearnAnswer>();
    assert!(weighed >= bytes.len() + taken, "{weighed} for {taken}");
    for event in down.events.into_iter().flat_map(|events| events.events) {
        let _ = codec::read_event(event);
    }
    for event in down.job_events.iter().flat_map(|events| &events.events_json) {
        let _ = codec::from_json::<JobEvent>(event);
    }
}

fn job(json: &[u8]) {
    let Ok(spec) = codec::from_json::<JobSpec>(json) else {
        return;
    };
    let _ = spec.check(&info());
}

fn info() -> ReplicaInfo {
    ReplicaInfo {
        model_folder: "/models/base".into(),
        base_digest: Digest([7; 32]),
        vocab_size: 100,
        hidden_size: 64,
        max_model_len: 512,
        max_num_seqs: 4,
        max_num_batched_tokens: 512,
        dtype: "float32".to_owned(),
        device: "cpu".to_owned(),
        tensor_parallel_size: 1,
        parameters: 1,
        weight_bytes: 2,
        kv_blocks: 3,
        block_size: 16,
        kv_tokens: 0,
        kv_bytes: 4,
        max_loras: 4,
        max_lora_rank: 64,
        max_training_jobs: 1,
        lora_targets: vec!["q_proj".to_owned()],
        lora_sizes: [("q_proj".to_owned(), 128)].into(),
        eos_tokens: vec![1],
        grammars: true,
    }
}
