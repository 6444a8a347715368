//! The channel to a replica: commands in, events out. The seam where tests drive the engine and where gRPC stands
//! between machines (crate rpc makes such a handle of a URL).

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use crate::TokenId;
use crate::id::{AdapterDigest, AdapterRef, Digest, JobId, RequestId};
use crate::job::{JobEvent, JobSpec};
use crate::learner::{Learn, LearnerId};
use crate::message::{Event, Fault, Generate};
use crate::stats::Stats;

/// Commands that may wait for the engine's next turn.
pub const COMMAND_QUEUE: usize = 1024;
/// Events that may wait for one request's client before its sequence is parked.
pub const EVENT_QUEUE: usize = 64;
/// Events that may wait for one job's supervisor before the job pauses.
pub const JOB_EVENT_QUEUE: usize = 256;

#[expect(clippy::large_enum_variant, reason = "nearly all of them are the largest")]
pub enum Command {
    /// A closed event channel aborts the request; a full one parks it. A channel that the replica closes without an end
    /// is a replica that was lost.
    Generate(Generate, mpsc::Sender<Event>),
    Abort(RequestId),
    /// Check the adapter and make it resident. Requests may name it without this: they load it on the way.
    LoadAdapter(AdapterRef, oneshot::Sender<Result<AdapterInfo, Fault>>),
    /// Forget it as soon as no running request uses it.
    UnloadAdapter(AdapterDigest),
    /// `max_training_jobs` train at once, as far as the memory allows; others hear `JobEvent::Refused`.
    StartJob(Box<JobSpec>, mpsc::Sender<JobEvent>),
    /// Between two quanta. Answered by `JobEvent::Cancelled`.
    CancelJob(JobId),
    /// Between two quanta: the job's state is written and the job leaves the replica. Answered by `JobEvent::Kept`; a channel
    /// that closes without it is a job that had nothing new to keep.
    PauseJob(JobId),
    /// Of one learner in the order it is sent. One that was lost answers nothing: its reply is dropped.
    Learn(LearnerId, Learn),
    /// Write the running jobs' states, fail what runs with `ShuttingDown`, end the thread. Over gRPC it only ends the
    /// session: a backend stops by its own process's signal.
    Stop,
}

/// The sending side, cheap to clone. Both channels close when the replica is gone.
#[derive(Clone)]
pub struct ReplicaHandle {
    pub info: ReplicaInfo,
    pub commands: mpsc::Sender<Command>,
    pub stats: watch::Receiver<Stats>,
}

/// What a replica is. Two replicas behind one router must agree on all but `device`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaInfo {
    pub model_folder: PathBuf,
    /// Of config.json and the weight files.
    pub base_digest: Digest,
    pub vocab_size: u32,
    pub hidden_size: u32,
    pub max_model_len: u32,
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    pub dtype: String,
    pub device: String,
    /// Ranks that compute it together.
    #[serde(default = "one")]
    pub tensor_parallel_size: u32,
    pub parameters: u64,
    pub weight_bytes: u64,
    pub kv_blocks: u32,
    pub block_size: u32,
    /// Tokens that the blocks hold in sequences of `max_model_len`; 0 where the replica is of an older version. (Layers with a
    /// sliding window have blocks of their own, and few of them.)
    #[serde(default)]
    pub kv_tokens: u64,
    pub kv_bytes: u64,
    pub max_loras: u32,
    pub max_lora_rank: u32,
    /// Fine-tuning jobs that train at once.
    #[serde(default = "one")]
    pub max_training_jobs: u32,
    /// `q_proj`, `k_proj`, ...: what an adapter may target beside the output layer, and what `all-linear` means.
    pub lora_targets: Vec<String>,
    /// Of everything that an adapter may target: its numbers at rank 1. Empty where the replica is of an older version.
    #[serde(default)]
    pub lora_sizes: BTreeMap<String, u64>,
    /// End-of-sequence tokens from generation_config.json or config.json.
    pub eos_tokens: Vec<TokenId>,
    /// Whether answers can be bound to a grammar: it knows the bytes of its tokens.
    #[serde(default)]
    pub grammars: bool,
}

impl ReplicaInfo {
    /// Tokens that so many of its blocks hold.
    pub fn tokens_in(&self, blocks: u32) -> u64 {
        match self.kv_tokens {
            0 => u64::from(blocks) * u64::from(self.block_size),
            all => (u128::from(all) * u128::from(blocks) / u128::from(self.kv_blocks.max(1))) as u64,
        }
    }
}

/// A checked, resident adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterInfo {
    pub digest: AdapterDigest,
    pub rank: u32,
    pub bytes: u64,
}

/// Of who does not say.
fn one() -> u32 {
    1
}
