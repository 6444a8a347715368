//! What the edge (server) may ask of the router, and the plain types it gets back. No HTTP, no JSON shapes: `server`
//! converts. Not here: how anything is done.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_core::TokenId;
use tandem_core::grammar::{Format, Grammar};
use tandem_core::id::{AdapterDigest, Digest, JobId};
use tandem_core::job::sweep::Sweep;
use tandem_core::message::{Fault, Guessed};
use tandem_core::pooling::Pooling;
use tandem_core::sampling::{BadSampling, RawSampling};
use tandem_core::settings::{Settings, Trial};
use tandem_core::trace::TraceContext;
use tandem_text::chat::Message;

pub use crate::meter::{Left, Meter, UsedUp};
pub use crate::quota::QuotaExceeded;
pub use tandem_text::tools::{CallDelta, Delta, Tool};

pub use tandem_store::{Keep, MetadataFilter, Order, Part, Tenant};

/// A model name as clients see it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCard {
    pub name: String,
    pub created_at: i64,
    pub kind: ModelKind,
    pub max_model_len: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub enum ModelKind {
    Base,
    /// `source`: where it came from. `parent` is the name of the adapter that its job started from, else the base's.
    Adapter {
        digest: AdapterDigest,
        parent: String,
        source: AdapterSource,
        rank: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdapterSource {
    /// `--lora-modules` or `/v1/load_lora_adapter`.
    Loaded,
    /// Made by a job; `step` when it is a checkpoint.
    Job { job: String, step: Option<u64> },
}

/// What a load does with a name that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadMode {
    /// Refuse.
    New,
    /// Switch it over once the new adapter is resident.
    Replace,
}

/// Who asks: whose things it sees and changes, to whom belongs what it makes, and which clients are told apart when
/// places are few.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Client {
    pub tenant: Tenant,
    pub reach: Reach,
    /// A digest of the API key; 0 without one.
    pub key: u64,
    /// Each has its part of its key's share.
    pub connection: u64,
    pub work: Work,
    /// Where its key has limits.
    pub meter: Option<Meter>,
    /// The span of what it asks, where that is traced.
    pub trace: Option<TraceContext>,
}

/// Whether somebody waits for an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Work {
    /// It has a place among other clients, or is refused.
    #[default]
    Live,
    /// A line of a batch: it takes no place from anybody, and goes behind everybody.
    Batch,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// What its tenant has.
    #[default]
    Own,
    /// What any tenant has.
    All,
}

impl Client {
    /// Tokens that were read or written for it.
    pub(crate) fn took(&self, tokens: usize) {
        if let Some(meter) = &self.meter {
            meter.take_tokens(tokens);
        }
    }

    /// The id of its key, where that one's training is limited.
    pub(crate) fn training_key(&self) -> Option<&str> {
        self.meter.as_ref().and_then(Meter::training_key)
    }

    /// The id of its key, where what that one trains or stores is limited.
    pub(crate) fn quota_key(&self) -> Option<&str> {
        let meter = self.meter.as_ref()?;
        meter.training_key().or(meter.storing_key())
    }

    /// Bytes that its tenant may store by its key.
    pub(crate) fn stored_bytes(&self) -> Option<u64> {
        self.meter.as_ref()?.limits().stored_bytes
    }

    pub fn sees(&self, tenant: &str) -> bool {
        self.reach == Reach::All || self.tenant.as_str() == tenant
    }

    /// Whose rows a list has; `None`: everybody's.
    pub(crate) fn only(&self) -> Option<&Tenant> {
        match self.reach {
            Reach::Own => Some(&self.tenant),
            Reach::All => None,
        }
    }
}

/// One generation request: one prompt, `n` choices.
#[derive(Clone, Debug)]
pub struct Call {
    pub client: Client,
    /// Sequences of the same request that came in before this call: a request is refused at its beginning or not at all.
    pub earlier: u32,
    pub model: String,
    pub prompt: Prompt,
    pub n: u32,
    /// `None`: all that fits the context.
    pub max_tokens: Option<u32>,
    /// The prompt becomes a vector; nothing is generated.
    pub pooling: Option<Pooling>,
    pub sampling: RawSampling,
    /// What has a lower one goes first; among equals, what came first.
    pub priority: i32,
    /// Which blocks of the prefix cache it shares: those of its tenant with the same salt.
    pub cache_salt: Option<String>,
    /// What each answer must be.
    pub constraint: Option<Constraint>,
    /// How the answer of a chat is read; without it all of its text is content.
    pub answer: Option<Answer>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<TokenId>,
    pub include_stop_str_in_output: bool,
    pub ignore_eos: bool,
    pub skip_special_tokens: bool,
    /// Before a prompt that is plain text: BOS and the like.
    pub add_special_tokens: bool,
}

/// How a chat's answer is taken apart.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Functions that the prompt offers.
    pub tools: Arc<[Tool]>,
    pub choice: ToolChoice,
    /// Several calls may be in one answer.
    pub parallel: bool,
    /// Reasoning is no part of the content.
    pub separate_reasoning: bool,
    /// Tokens of reasoning at most.
    pub thinking_budget: Option<u32>,
}

/// Whether the model calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// What looks like a call is content.
    None,
    Auto,
    Required,
    Named(String),
}

/// Whether the model reasons before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reasoning {
    /// As far as is known.
    None,
    Always,
    /// Its chat template has a variable that says so: `enable_thinking`.
    Switched,
}

/// A grammar, and the field that asked for it.
#[derive(Clone, Debug)]
pub struct Constraint {
    pub param: String,
    pub form: Form,
}

#[derive(Clone, Debug)]
pub enum Form {
    Grammar(Grammar),
    /// Its texts may name special tokens, which the tokenizer knows.
    Format(Format),
}

#[derive(Clone, Debug)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
    Chat {
        messages: Vec<Message>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: BTreeMap<String, serde_json::Value>,
    },
}

/// A call that was admitted. Dropping `pieces` aborts all its sequences in the engine.
pub struct Generation {
    pub prompt_tokens: Arc<[TokenId]>,
    /// What answers: `None` is the base.
    pub adapter: Option<AdapterDigest>,
    pub base: Digest,
    pub pieces: tokio::sync::mpsc::Receiver<Piece>,
}

/// Something that happened to one choice. The last of a choice is `Finished` or `Failed`.
#[derive(Clone, Debug)]
pub struct Piece {
    pub choice: u32,
    pub what: What,
}

#[derive(Clone, Debug)]
pub enum What {
    /// Prompt log-probabilities, one entry per prompt token; the first is `None`.
    Prompt(Vec<Option<TokenText>>),
    /// `[H]`, the prompt's vector as [`Call::pooling`] asks.
    Pooled(Vec<f32>),
    /// New text that is safe to show (no half UTF-8, no possible beginning of a stop string), taken apart, and the tokens it
    /// came from. Text may be empty while tokens are not. A stop token is listed with empty text.
    Text {
        text: Delta,
        tokens: Vec<TokenText>,
        /// So many more of the choice's tokens, of these or earlier ones, are known to be reasoning: they stand between its
        /// marks, whose own tokens are not counted (vLLM counts so).
        reasoning_tokens: u32,
        /// `Finished` follows at once.
        is_last: bool,
    },
    Finished {
        reason: Finish,
        /// The one of `Call::stop` that ended it.
        stop_string: Option<String>,
        completion_tokens: u32,
        cached_tokens: u32,
        guessed: Guessed,
    },
    Failed(Fault),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    Stop,
    Length,
    /// It ended by itself, and holds calls.
    Calls,
}

/// A token as people and OpenAI's logprobs shapes want it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenText {
    pub id: TokenId,
    /// Lossy text of the token alone.
    pub text: String,
    /// A special token that the answer's text leaves out.
    pub is_hidden: bool,
    pub bytes: Vec<u8>,
    pub logprob: f32,
    /// Most likely alternatives, best first.
    pub top: Vec<(TokenId, String, Vec<u8>, f32)>,
}

/// A stored file.
#[derive(Clone, Debug, PartialEq)]
pub struct FileInfo {
    pub id: String,
    pub bytes: u64,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub filename: String,
    pub purpose: String,
}

/// A file that already lies in the store's staging folder (see `Router::staging`).
pub struct Upload {
    pub staged: PathBuf,
    pub bytes: u64,
    /// Made while they were written.
    pub sha256: Digest,
    pub filename: String,
    pub purpose: String,
    pub expires_after_seconds: Option<u64>,
}

/// What a client asks of a fine-tune. `None` = choose well. Names are TRL's, PEFT's and OpenAI's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobRequest {
    pub model: String,
    pub training_file: FileIds,
    pub validation_file: Option<FileIds>,
    pub suffix: Option<String>,
    pub metadata: BTreeMap<String, String>,
    /// Of a sweep: those of its first trial.
    #[serde(flatten)]
    pub settings: Settings,
    /// Empty: it is no sweep.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<Trial>,
    /// Of a trial: its place in its sweep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// Was it asked through the legacy API (only changes the made model's id prefix).
    pub legacy: bool,
    /// The adapter that it starts from, found by its name when the job was created.
    #[serde(default)]
    pub start: Option<AdapterDigest>,
}

/// Which of how many trials, and what sets it apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// From 1.
    pub number: usize,
    pub of: usize,
    pub varied: serde_json::Map<String, serde_json::Value>,
}

/// Of one file or several, whose rows are read one after the other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "OneOrSeveral", into = "OneOrSeveral")]
pub struct FileIds(pub Vec<String>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrSeveral {
    One(String),
    Several(Vec<String>),
}

impl From<OneOrSeveral> for FileIds {
    fn from(ids: OneOrSeveral) -> FileIds {
        match ids {
            OneOrSeveral::One(id) => FileIds(vec![id]),
            OneOrSeveral::Several(ids) => FileIds(ids),
        }
    }
}

impl From<FileIds> for OneOrSeveral {
    fn from(FileIds(mut ids): FileIds) -> OneOrSeveral {
        match ids.len() {
            1 => OneOrSeveral::One(ids.remove(0)),
            _ => OneOrSeveral::Several(ids),
        }
    }
}

impl From<&str> for FileIds {
    fn from(id: &str) -> FileIds {
        FileIds(vec![id.to_owned()])
    }
}

impl std::fmt::Display for FileIds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

impl JobRequest {
    /// Of a sweep and of its trials: how these are compared.
    pub fn sweep(&self) -> Option<Sweep> {
        let trials = match &self.place {
            Some(place) => place.of,
            None => self.trials.len(),
        };
        (trials > 0).then(|| Sweep::new(&self.settings, trials, self.validation_file.is_some()))
    }

    /// The name of the adapter that the job starts from, as it was asked.
    pub fn start_name(&self) -> Option<String> {
        self.start?;
        let named = self.settings.from_peft_checkpoint.as_ref();
        Some(named.unwrap_or(&self.model).clone())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    ValidatingFiles,
    Queued,
    /// Of a sweep: its trials wait or run.
    Sweeping,
    Running,
    Paused,
    Succeeded,
    Failed,
    Cancelled,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    pub id: JobId,
    pub created_at: i64,
    pub updated_at: i64,
    pub finished_at: Option<i64>,
    pub estimated_finish: Option<i64>,
    pub status: JobStatus,
    pub request: JobRequest,
    /// All numbers as chosen, once they are (after validation).
    pub hyper: Option<tandem_core::job::Hyper>,
    pub fine_tuned_model: Option<String>,
    pub trained_tokens: Option<u64>,
    pub result_files: Vec<String>,
    pub error: Option<JobError>,
    /// The sweep whose trial it is.
    pub parent: Option<String>,
    /// Of a sweep.
    pub trials: Vec<TrialRecord>,
}

/// What is known of a trial when something was decided of its sweep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrialRecord {
    /// From 1.
    pub number: usize,
    /// Its own job.
    pub job: String,
    pub varied: serde_json::Map<String, serde_json::Value>,
    pub status: TrialStatus,
    /// Rungs at which it was compared.
    pub rung: u32,
    pub step: u64,
    pub total_steps: Option<u64>,
    /// By which it was compared last.
    pub value: Option<f64>,
    pub train_loss: Option<f64>,
    pub valid_loss: Option<f64>,
    /// What it made.
    pub model: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrialStatus {
    Queued,
    Running,
    /// It lost at a rung.
    Stopped,
    Succeeded,
    Failed,
    Cancelled,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobError {
    /// `invalid_training_file`, `invalid_n_examples`, `server_error`, ...
    pub code: String,
    pub param: Option<String>,
    pub message: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct JobEventRecord {
    /// `ftevent-...`
    pub id: String,
    pub created_at: i64,
    pub level: Level,
    pub message: String,
    /// Metrics (step, train_loss, grad_norm, learning_rate, tokens_per_second, ...) or null.
    pub data: serde_json::Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Info,
    Warn,
    Error,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// `ftckpt_...`
    pub id: String,
    pub created_at: i64,
    pub step: u64,
    /// Usable as `model`.
    pub model: String,
    pub metrics: serde_json::Value,
}

/// A response that a client may name later. Its texts are JSON that only the edge reads.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptResponse {
    pub id: String,
    pub created_at: i64,
    /// The one that it goes on with.
    pub previous: Option<String>,
    pub input: String,
    pub response: String,
}

/// One page of a list.
pub struct Page<T> {
    pub data: Vec<T>,
    pub has_more: bool,
}

/// Why the router refused; `server/src/error.rs` maps each to a status and OpenAI's body.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    #[error("The model `{0}` does not exist or you do not have access to it.")]
    UnknownModel(String),
    #[error("No such File object: {0}")]
    UnknownFile(String),
    #[error("Could not find fine tune: {0}")]
    UnknownJob(String),
    #[error("No such {what}: {id}")]
    Unknown { what: &'static str, id: String },
    /// It was there, and is over.
    #[error("{0}")]
    Gone(String),
    #[error("Response with id '{0}' not found.")]
    UnknownResponse(String),
    /// A wrong value: `param` names the field.
    #[error("{message}")]
    Invalid {
        param: Option<String>,
        code: Option<&'static str>,
        message: String,
    },
    #[error("This model's maximum context length is {limit} tokens. However, {message}")]
    ContextLength { limit: u32, message: String },
    /// The state forbids it (cancel of an ended job, delete of a model in use, name taken). Deterministic: a retry
    /// cannot help.
    #[error("{0}")]
    Conflict(String),
    #[error("{message}")]
    Adapter { not_found: bool, message: String },
    #[error(transparent)]
    UsedUp(#[from] UsedUp),
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// What the key's limits do not let it ask.
    #[error("{0}")]
    Limited(String),
    #[error("the server is busy: {waiting} requests wait; try again in {retry_after_s} s")]
    Busy { waiting: u32, retry_after_s: u32 },
    /// Of places that tenants share.
    #[error(
        "your tenant has {own} {what}, as many as it leaves free of {places} for others: end some, or try again in \
         {retry_after_s} s"
    )]
    NoShare {
        what: &'static str,
        own: usize,
        places: usize,
        retry_after_s: u32,
    },
    #[error(transparent)]
    Engine(Fault),
    #[error(transparent)]
    Store(#[from] tandem_store::StoreError),
}

impl RouterError {
    /// The part of the store that was needed and does not answer now.
    pub fn away(&self) -> Option<Part> {
        match self {
            RouterError::Store(error) => error.away(),
            _ => None,
        }
    }

    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> RouterError {
        RouterError::Invalid {
            param: Some(param.to_owned()),
            code: Some("invalid_value"),
            message: message.into(),
        }
    }
}

impl From<BadSampling> for RouterError {
    fn from(BadSampling { param, message }: BadSampling) -> RouterError {
        RouterError::Invalid {
            param: Some(param.to_owned()),
            code: Some("invalid_value"),
            message,
        }
    }
}
