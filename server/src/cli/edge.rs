//! The HTTP side.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use tandem_router::tinker::Limits;
use tandem_text::reasoning::ReasoningFormat;
use tandem_text::tools::ToolFormat;

use super::SslOptions;
use crate::connection::RootPath;
use crate::values::{
    ChatTemplate, LoraModule, LoraModules, Parser as Format, SchedulingPolicy, bytes, bytes_or_none,
    chat_template, count, host, lora_modules, reasoning_parser, root_path, scheduling_policy,
    tool_call_parser,
};

/// The HTTP side.
#[derive(Clone, Debug, Args)]
pub struct EdgeOptions {
    /// Address or name to listen on; 0.0.0.0 is every network
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS", value_parser = host)]
    pub host: IpAddr,
    /// 0: any free port; the line "listening" says which
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Every route but /health, /ready and the two pages then wants one of them, as a bearer token or x-api-key; repeat
    /// it, or separate by commas. These open everything; `tandem keys` makes others, with roles and tenants
    #[arg(long, value_name = "KEY", value_delimiter = ',', hide_env_values = true)]
    pub api_key: Vec<String>,
    /// Keys as of --api-key, one a line, from a file such as a secret of Compose or Kubernetes. /dev/null: none
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// A file to which a line of JSON is appended for everything that changes something: who, what, and what came of it.
    /// The log has the same lines (target audit)
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Where a container's port is published, which --host does not say. Beyond 127.0.0.1 other machines come in: then
    /// keys are wanted
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub published: Option<String>,
    /// Web pages that may use the server beside its own and those of localhost: a JSON list such as
    /// '["https://chat.example.com"]', or '["*"]' for all
    #[arg(long, value_name = "ORIGINS")]
    pub allowed_origins: Vec<String>,
    /// Sampling parameters of a request that does not say: auto (the model's generation_config.json), vllm (none), or a
    /// folder with a generation_config.json
    #[arg(long, default_value = "auto", value_name = "auto|vllm|DIR")]
    pub generation_config: String,
    /// Chat template instead of the model's own: a file with Jinja, or the template itself, in which \n is a new line.
    /// Requests and fine-tuning jobs use it
    #[arg(long, value_name = "FILE", value_parser = chat_template)]
    pub chat_template: Option<ChatTemplate>,
    /// How the model writes tool calls, by vLLM's names (hermes, llama3_json, mistral, ...), or none: they stay in the text
    /// [default: what the chat template shows]
    #[arg(long, value_name = "NAME", value_parser = tool_call_parser)]
    pub tool_call_parser: Option<Format<ToolFormat>>,
    /// How the model writes its reasoning, by vLLM's names (qwen3, deepseek_r1, ...), or none: it stays in the text [default:
    /// what the chat template shows]
    #[arg(long, value_name = "NAME", value_parser = reasoning_parser)]
    pub reasoning_parser: Option<Format<ReasoningFormat>>,
    /// Refuse a request that has a field of which nothing is known, instead of logging the field's name once
    #[arg(long)]
    pub strict_fields: bool,
    /// Adapters to serve from the start: PEFT folders or names on the hub, several of them by spaces or commas; or vLLM's
    /// JSON, '{"name": "a", "path": "DIR"}'
    #[arg(long, value_name = "NAME=DIR", num_args = 1.., value_parser = lora_modules)]
    pub lora_modules: Vec<LoraModules>,
    /// Folder below which /v1/load_lora_adapter may read adapters, links resolved; repeat it, or separate by commas. Names
    /// on the hub need none [default: none but --data-dir and the folders of --lora-modules]
    #[arg(long, value_name = "DIR", value_delimiter = ',')]
    pub lora_root: Vec<PathBuf>,
    /// Bytes of responses (/v1/responses) kept of each tenant, so that clients can name them later; beyond them the oldest go. 0:
    /// none are kept
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = bytes_or_none)]
    pub response_store_bytes: u64,
    /// Days that a response is kept
    #[arg(long, value_name = "DAYS", default_value_t = 30, value_parser = count(1..=36_500))]
    pub response_store_days: u32,
    #[command(flatten)]
    pub tinker: TinkerOptions,
    #[command(flatten)]
    pub ssl: SslOptions,
    /// Path under which a proxy shows the server: requests may have it before theirs
    #[arg(long, value_name = "PATH", default_value = "/", value_parser = root_path)]
    pub root_path: RootPath,
    /// Write no line of the log for each request
    #[arg(long)]
    pub disable_uvicorn_access_log: bool,
    /// Paths of whose requests no line is written, such as /health,/metrics
    #[arg(long, value_name = "PATHS", value_delimiter = ',')]
    pub disable_access_log_for_endpoints: Vec<String>,
    /// Whether a request's `priority` may go below 0, before requests that say nothing: under `priority` every client may say
    /// so. What is above 0 goes behind them in either case
    #[arg(long, value_name = "fcfs|priority", default_value = "fcfs", value_parser = scheduling_policy)]
    pub scheduling_policy: SchedulingPolicy,
    /// Requests that may wait for a place among the running; more are answered 429
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_waiting: u32,
    /// Seconds that a request waits for a replica while none answers; then it is answered 503
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub replica_wait: u64,
    #[command(flatten)]
    pub connections: ConnectionOptions,
}

impl EdgeOptions {
    /// Name and folder of each adapter, or its name on the hub.
    pub fn adapters(&self) -> impl Iterator<Item = &LoraModule> {
        self.lora_modules.iter().flat_map(|LoraModules(modules)| modules)
    }
}

/// What clients that train call by call (Tinker's API) may have.
#[derive(Clone, Debug, Args)]
pub struct TinkerOptions {
    /// Sessions of Tinker clients at once; more are told to come back
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.sessions, value_parser = count(1..=1 << 20))]
    pub tinker_max_sessions: u32,
    /// Models that one session of a Tinker client trains at a time
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.models, value_parser = count(1..=4096))]
    pub tinker_max_models: u32,
    /// Calls of one model of a Tinker client that wait for their turn; more are told to come back
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.queued_calls, value_parser = count(1..=1 << 20))]
    pub tinker_max_queued_calls: u32,
    /// Bytes of one forward_backward of a Tinker client, which cuts its calls into parts of 5 MB where it can
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = bytes)]
    pub tinker_max_call_bytes: u64,
    /// Results of Tinker clients' calls that are kept until they are fetched; beyond, the oldest go
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.kept_results, value_parser = count(1..=100_000_000))]
    pub tinker_max_kept_results: u32,
}

impl TinkerOptions {
    pub fn limits(&self) -> Limits {
        let &TinkerOptions {
            tinker_max_sessions: sessions,
            tinker_max_models: models,
            tinker_max_queued_calls: queued_calls,
            tinker_max_call_bytes: call_bytes,
            tinker_max_kept_results: kept_results,
        } = self;
        Limits {
            sessions,
            models,
            queued_calls,
            call_bytes,
            kept_results,
        }
    }
}

/// How many connections, and how long is waited for who holds one.
#[derive(Clone, Debug, Args)]
pub struct ConnectionOptions {
    /// Connections at once, of the API; no more than open files are allowed (ulimit -Hn) less 256. Others wait
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = count(1..=1 << 20))]
    pub max_connections: u32,
    /// Connections at once from one address; more are closed. Behind a proxy all come from one
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = count(1..=1 << 20))]
    pub max_connections_per_address: u32,
    /// Seconds that a connection may be open without a request under way
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = count(1..=86_400))]
    pub idle_timeout: u32,
    /// Seconds that a new connection has for its first request's headers, and a client for the next piece of a body
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = count(1..=86_400))]
    pub read_timeout: u32,
    /// Seconds after which an answer is given up of which the client takes nothing in
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = count(1..=86_400))]
    pub write_timeout: u32,
}
