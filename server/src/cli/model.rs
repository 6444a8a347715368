//! A replica: the model and how it runs.

use std::path::{Path, PathBuf};

use clap::Args;
use tandem_backend::ModelLen;

use crate::values::{bytes, count, model_len, share};

/// A replica: the model and how it runs.
#[derive(Clone, Debug, Args)]
pub struct ModelOptions {
    /// Folder with config.json, *.safetensors and tokenizer.json, or a name on the hub, ORG/NAME, which is looked for in its
    /// cache (HF_HOME, HF_HUB_CACHE) and downloaded (HF_TOKEN, HF_ENDPOINT), unless HF_HUB_OFFLINE is 1 [default: the
    /// embedded demo model]
    #[arg(value_name = "MODEL")]
    pub model_folder: Option<PathBuf>,
    /// The same as MODEL
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Names of the base model in the API, the first of which answers carry [default: the folder's name, or
    /// the hub's]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub served_model_name: Vec<String>,
    /// auto, cpu, cuda:N, or emu (a GPU emulated on the CPU, for tests); with several ranks on GPUs, each takes its own
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Ranks that divide the model [default: 1, or WORLD_SIZE where torchrun, Slurm or Kubernetes start the ranks]
    #[arg(long, value_name = "N", value_parser = count(1..=64))]
    pub tensor_parallel_size: Option<u32>,
    /// What ranks are that nobody else starts: thread (of this process) or mp (processes of their own) [default: thread
    /// on the CPU, mp on GPUs]
    #[arg(long, value_name = "KIND", value_parser = ["thread", "mp"])]
    pub distributed_executor_backend: Option<String>,
    /// Of the weights: auto (as the checkpoint is stored; float16 becomes bfloat16), bfloat16 or float32
    #[arg(long, default_value = "auto")]
    pub dtype: String,
    /// The linears in fewer bits, embedding and head as --dtype: int8 (a scale by rows), int4 (groups of 32) or nf4 (groups
    /// of 64, as bitsandbytes) [default: as the checkpoint has them, which may be quantised already]
    #[arg(long, value_name = "FORMAT")]
    pub quantization: Option<String>,
    /// Of keys and values: auto (as --dtype), bfloat16, float32, or int8, half of bfloat16's memory: twice as many tokens
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub kv_cache_dtype: String,
    /// On GPUs: an answer's bits do not depend on what is computed beside it, as they never do on the CPU. Products of many
    /// rows then run on kernels of this program, slower than the vendor's
    #[arg(long)]
    pub deterministic: bool,
    /// Guess tokens by what followed the last ones before (prompt lookup); right guesses cost nothing and change no answer,
    /// e.g. '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
    #[arg(long, value_name = "JSON")]
    pub speculative_config: Option<String>,
    /// Tokens of prompt and answer together, e.g. 4096, 4K or 4k (4000); auto: as many as the memory allows [default:
    /// what the model was made for]
    #[arg(long, value_name = "TOKENS", value_parser = model_len, allow_negative_numbers = true)]
    pub max_model_len: Option<ModelLen>,
    /// Sequences that run at once, 1 to 4096 [default: 64]
    #[arg(long, value_name = "N", value_parser = count(1..=4096))]
    pub max_num_seqs: Option<u32>,
    /// Tokens of one step, prompts and answers together [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = count(1..=u32::MAX))]
    pub max_num_batched_tokens: Option<u32>,
    /// Bytes of the KV cache on each rank, e.g. 4G (of 1024) or 500m (of 1000) [default: room for --max-num-seqs whole
    /// sequences, within half of the free memory, or 80 % of a GPU's]
    #[arg(long, alias = "kv-cache-memory", value_name = "BYTES", value_parser = bytes)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Adapters that are resident at once, 1 to 4096; others wait on disk [default: 16]
    #[arg(long, value_name = "N", value_parser = count(1..=4096))]
    pub max_loras: Option<u32>,
    /// Largest rank of an adapter, 1 to 4096 [default: 64]
    #[arg(long, value_name = "RANK", value_parser = count(1..=4096))]
    pub max_lora_rank: Option<u32>,
    /// Fine-tuning jobs that train at once, 1 to 64, as far as the memory allows; others wait [default: 4]
    #[arg(long, value_name = "N", value_parser = count(1..=64))]
    pub max_training_jobs: Option<u32>,
    /// Seconds fine-tuning jobs together may take for each second of serving, while there are requests: with 1 streams
    /// are half as fast beside a job. Without requests they have the machine [default: 0.25]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub training_share: Option<f64>,
    /// Milliseconds between two tokens of a stream that are quick enough: while streams only decode, a fine-tuning job also
    /// takes what a step leaves of them. Without it, its share alone
    #[arg(long, value_name = "MS", value_parser = count(1..=60_000))]
    pub target_itl_ms: Option<u32>,
    /// Compute threads [default: one per physical core that the process may use, within its cgroup's limit]
    #[arg(long, value_name = "N", value_parser = count(1..=4096))]
    pub threads: Option<u32>,
    /// Of requests that bring no seed [default: another one at each start]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

impl ModelOptions {
    /// Where the model lies, by whichever of the two it was said.
    pub fn folder(&self) -> Option<&Path> {
        self.model_folder.as_deref().or(self.model.as_deref())
    }
}
