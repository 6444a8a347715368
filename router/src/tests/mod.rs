//! The router over a real store, with the test in the engine's place at the command channel.

mod batches;
mod calls;
mod damaged;
mod fleet;
mod jobs;
mod models;
mod shared;
mod stored;
mod sweeps;
mod tinker;
mod uploads;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};
use tandem_core::id::{AdapterRef, Digest};
use tandem_core::message::Fault;
use tandem_core::replica::{AdapterInfo, COMMAND_QUEUE, Command, ReplicaHandle, ReplicaInfo};
use tandem_core::stats::Stats;
use tandem_rpc::ModelFiles;
use tandem_store::{Places, Store};
use tandem_text::Tokenizer;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};

use crate::api::{Client, FileInfo, RouterError, Upload};
use crate::fleet::{Made, Member};
use crate::{Config, Fleet, Router, View};

pub(crate) const BASE: &str = "base";
const BOS: u32 = 0;
const EOS: u32 = 1;
const FIRST_BYTE: u32 = 2;
/// A lost replica comes back within it, where it comes back.
const SEAT_PATIENCE: Duration = Duration::from_secs(1);
/// Nothing here waits this long unless it is broken.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn info() -> ReplicaInfo {
    ReplicaInfo {
        model_folder: PathBuf::new(),
        base_digest: Digest([7; 32]),
        vocab_size: FIRST_BYTE + 256,
        hidden_size: 64,
        max_model_len: 512,
        max_num_seqs: 4,
        max_num_batched_tokens: 512,
        dtype: "float32".to_owned(),
        device: "cpu".to_owned(),
        parameters: 0,
        tensor_parallel_size: 1,
        weight_bytes: 0,
        kv_blocks: 0,
        block_size: 16,
        kv_tokens: 0,
        kv_bytes: 0,
        max_loras: 4,
        max_training_jobs: 1,
        max_lora_rank: 64,
        lora_targets: ["q_proj", "v_proj"].map(str::to_owned).to_vec(),
        lora_sizes: [("q_proj".to_owned(), 128), ("v_proj".to_owned(), 100)].into(),
        eos_tokens: vec![EOS],
        grammars: true,
    }
}

/// A token per byte, BOS before a text, and a chat template.
impl Router {
    /// As the default tenant sees it.
    pub fn own(&self) -> View {
        self.of(&Client::default())
    }
}

fn tokenizer(folder: &Path) -> Tokenizer {
    // GPT-2's printable stand-ins for bytes.
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let mut vocab =
        serde_json::Map::from_iter([("<s>".to_owned(), json!(BOS)), ("</s>".to_owned(), json!(EOS))]);
    for byte in 0..256 {
        let code = match printable(byte) {
            true => byte,
            false => {
                next += 1;
                next - 1
            }
        };
        let letter = char::from_u32(code).expect("below 512");
        vocab.insert(letter.to_string(), json!(FIRST_BYTE + byte));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let piece = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let bos = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>")],
        "normalizer": null, "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, piece("A")], "pair": [bos, piece("A"), piece("B")],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let template = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}a:{% endif %}";
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_folder(folder).unwrap()
}

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| FIRST_BYTE + u32::from(byte)).collect()
}

/// A data folder that outlives routers, and folders of adapters.
struct House {
    root: TempDir,
    tokenizer: Tokenizer,
}

/// The engine's end of the channel.
struct Engine {
    commands: mpsc::Receiver<Command>,
    stats: watch::Sender<Stats>,
}

impl House {
    fn new() -> House {
        let root = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer(root.path());
        House { root, tokenizer }
    }

    fn data(&self) -> PathBuf {
        self.root.path().join("data")
    }

    async fn open(&self) -> (Router, Engine) {
        let (replica, engine) = replica();
        (self.open_with(Config::default(), replica).await.unwrap(), engine)
    }

    async fn open_with(&self, config: Config, replica: ReplicaHandle) -> Result<Router, RouterError> {
        self.open_fleet(config, vec![member("only", [replica])]).await
    }

    async fn open_fleet(&self, config: Config, members: Vec<Member>) -> Result<Router, RouterError> {
        let fleet = Fleet::open(members, SEAT_PATIENCE).await;
        let store = self.store().await;
        let config = Config {
            served_model_name: BASE.to_owned(),
            ..config
        };
        Router::open(store, self.tokenizer.clone(), fleet, config).await
    }

    /// A killed router's tasks end a moment after its runtime was told to.
    async fn store(&self) -> Store {
        for _ in 0..200 {
            match Store::open(&Places::local(self.data())).await {
                Ok(store) => return store,
                Err(tandem_store::StoreError::Locked(_)) => {
                    tokio::time::sleep(Duration::from_millis(10)).await
                }
                Err(error) => panic!("{error}"),
            }
        }
        panic!("the data folder stayed locked");
    }

    /// A PEFT folder whose tensors are `tensors`: the store looks at bytes only.
    fn adapter(&self, name: &str, tensors: &str) -> PathBuf {
        let folder = self.root.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("adapter_config.json"), "{}").unwrap();
        std::fs::write(folder.join("adapter_model.safetensors"), tensors).unwrap();
        folder
    }

    fn stored_adapters(&self) -> usize {
        std::fs::read_dir(self.data().join("adapters")).unwrap().count()
    }
}

/// Its lives, one after the other.
fn member<const N: usize>(name: &str, lives: [ReplicaHandle; N]) -> Member {
    let lives = Mutex::new(VecDeque::from(lives));
    Member::new(name, move || {
        let life = lives.lock().unwrap().pop_front();
        let made = |replica| Made {
            replica,
            files: ModelFiles::default(),
            model_name: BASE.to_owned(),
            hop: None,
        };
        std::future::ready(life.map(made).ok_or_else(|| "it is dead".to_owned()))
    })
}

fn replica() -> (ReplicaHandle, Engine) {
    let (sender, commands) = mpsc::channel(COMMAND_QUEUE);
    let (publish, stats) = watch::channel(Stats::default());
    (
        ReplicaHandle {
            info: info(),
            commands: sender,
            stats,
        },
        Engine {
            commands,
            stats: publish,
        },
    )
}

impl Router {
    /// Answers of a batch that are no file yet.
    async fn store_lines(&self, batch: &str) -> usize {
        self.0.store.answered_batch_lines(batch).await.unwrap().len()
    }
}

impl Engine {
    async fn next(&mut self) -> Command {
        let command = tokio::time::timeout(PATIENCE, self.commands.recv()).await;
        command.expect("a command comes soon").expect("the router lives")
    }

    async fn answer_load(&mut self, answer: Result<u32, Fault>) -> AdapterRef {
        let Command::LoadAdapter(adapter, reply) = self.next().await else {
            panic!("a LoadAdapter was expected")
        };
        let digest = adapter.digest;
        reply
            .send(answer.map(|rank| AdapterInfo {
                digest,
                rank,
                bytes: 1,
            }))
            .unwrap();
        adapter
    }
}

fn chat_rows(n: usize) -> String {
    let row =
        json!({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]});
    format!("{row}\n").repeat(n)
}

async fn upload(
    router: &Router,
    filename: &str,
    purpose: &str,
    content: &str,
) -> Result<String, RouterError> {
    upload_by(router.own(), filename, purpose, content).await
}

async fn upload_by(view: View, filename: &str, purpose: &str, content: &str) -> Result<String, RouterError> {
    let staged = view.router.staging();
    std::fs::write(&staged, content).unwrap();
    let upload = Upload {
        staged: staged.clone(),
        bytes: content.len() as u64,
        sha256: Digest::of(content.as_bytes()),
        filename: filename.to_owned(),
        purpose: purpose.to_owned(),
        expires_after_seconds: None,
    };
    let created = view.create_file(upload).await.map(|file| file.id);
    assert!(!staged.exists(), "an upload is taken over or removed");
    created
}

/// A file, as whoever downloads it gets it.
async fn content(router: &Router, id: &str) -> Result<(FileInfo, String), RouterError> {
    let mut content = router.own().file_content(id).await?;
    let mut bytes = vec![];
    while let Some(chunk) = content.next().await? {
        bytes.extend(chunk);
    }
    Ok((content.info(), String::from_utf8(bytes).unwrap()))
}

/// Param of an `Invalid`, or the variant's name.
fn kind(error: &RouterError) -> String {
    match error {
        RouterError::Invalid { param, .. } => param.clone().unwrap_or_default(),
        other => format!("{other:?}")
            .split(['(', ' ', '{'])
            .next()
            .unwrap_or_default()
            .to_owned(),
    }
}

fn value(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}
