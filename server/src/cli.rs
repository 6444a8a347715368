//! What can be asked on the command line, by environment and in the configuration file: each option is declared once,
//! here. Not here: where a value comes from (config.rs), what is done with it.

mod edge;
mod model;
mod process;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use reqwest::Url;
use tandem_store::{Role, Tenant};

pub use edge::{ConnectionOptions, EdgeOptions};
pub use model::ModelOptions;
pub use process::{
    ArtifactOptions, BackendSslOptions, ProcessOptions, SslOptions, StateOptions, TokenOptions,
};

use crate::extract::{FILE_LIMIT_BYTES, JSON_LIMIT_BYTES};
use crate::values::{LogFormat, address, bytes, count, host};

/// Serves a language model and fine-tunes it in tandem: one process, one copy of the base weights.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, about, after_help = BEGIN)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const BEGIN: &str = "\
To begin:
  tandem serve                          the embedded demo model, with a page to chat on http://127.0.0.1:8000/
  tandem serve HuggingFaceTB/SmolLM2-135M-Instruct
                                        a model by its name on the hub, or the folder of one
  tandem train recipe.yaml              fine-tune without a server; `tandem train help` lists the settings
  tandem COMMAND --help                 every option";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the OpenAI API, inference and fine-tuning: all in one process
    #[command(after_help = limits())]
    Serve(Box<Serve>),
    /// Run one replica for routers: the model without the API, over gRPC
    Backend(Box<Backend>),
    /// Serve the OpenAI API in front of backends
    #[command(after_help = limits())]
    Router(Box<Router>),
    /// Fine-tune without a server, from a YAML file and key=value overrides
    Train(Train),
    /// Loss and perplexity of a model, or of an adapter, over a file of rows
    Eval(Eval),
    /// Answer a prompt without a server
    Generate(Generate),
    /// List, copy and check recipes for `tandem train`
    #[command(subcommand)]
    Recipes(Recipes),
    /// Fetch a model or an adapter from the hub, and print its folder
    Download(Download),
    /// List, show and remove adapters: of folders, of a data folder, of a running server
    #[command(subcommand)]
    Adapters(Adapters),
    /// Write a model anew in fewer bits
    Quantize(Quantize),
    /// Write a model anew with an adapter in it
    Merge(Merge),
    /// Draw curves of runs as an SVG picture
    Plot(Plot),
    /// Copy what a server keeps, while it runs
    Backup(Backup),
    /// Make a data folder of such a copy
    Restore(Restore),
    /// Make, list, revoke and rotate API keys
    Keys(KeyOptions),
    /// Say what this machine offers and what is missing
    Doctor,
    /// Ask a running server, router or backend how it is; the exit code answers
    Health(Health),
    /// Print the OpenAPI document
    #[command(hide = true)]
    Openapi,
    /// One rank of a replica: rank 0 starts it
    #[command(hide = true)]
    Rank(Rank),
}

/// Linears in fewer bits; embedding, head and norms stay as they are. int8 (a scale by rows) and int4 (groups of 32) are
/// written as compressed-tensors has them, nf4 as bitsandbytes: vLLM and transformers read them, too.
#[derive(Clone, Debug, Args)]
pub struct Quantize {
    /// Folder with config.json and *.safetensors, or a name on the hub
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Folder to make
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    #[arg(long, value_name = "FORMAT", value_parser = ["int8", "int4", "nf4"])]
    pub format: String,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
}

/// The base's files under their names, each matrix that the adapter changes as W + scale B A; tokenizer and configuration are
/// copied. Or one GGUF file (OUT.gguf) with all of it. What comes out is a model like any other.
#[derive(Clone, Debug, Args)]
pub struct Merge {
    /// The base: a folder with config.json and *.safetensors, or a name on the hub
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// A PEFT folder, or a name on the hub
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,
    /// Folder, or *.gguf file, to make
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// [default: gguf if OUT is so called, else safetensors]
    #[arg(long, value_name = "FORMAT", value_parser = ["safetensors", "gguf"])]
    pub format: Option<String>,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
}

/// A line for each run and, dashed, one for its validations.
#[derive(Clone, Debug, Args)]
pub struct Plot {
    /// Files that `tandem train` writes into its output_dir, or such folders
    #[arg(value_name = "METRICS.jsonl", required = true)]
    pub metrics: Vec<PathBuf>,
    /// The picture
    #[arg(long, short, value_name = "FILE.svg")]
    pub output: PathBuf,
    /// Of the numbers that a run reports
    #[arg(long, value_name = "NAME", default_value = "loss")]
    pub metric: String,
}

/// Also by environment (TANDEM_MODEL, TANDEM_PORT, ...) and in the TOML file of --config (same names). A flag wins over
/// the environment, the environment over the file.
#[derive(Clone, Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub edge: EdgeOptions,
    #[command(flatten)]
    pub state: StateOptions,
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// Also by environment (TANDEM_LISTEN, TANDEM_MODEL, ...) and in the TOML file of --config (same names). A flag wins over
/// the environment, the environment over the file.
#[derive(Clone, Debug, Args)]
pub struct Backend {
    /// gRPC for routers, which show a token (--backend-token), and GET /health, /ready and /metrics for everybody. Port 0:
    /// any free one; the line "listening" says which
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "ADDRESS:PORT", value_parser = address)]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub token: TokenOptions,
    #[command(flatten)]
    pub ssl: SslOptions,
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub artifacts: ArtifactOptions,
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// Also by environment (TANDEM_BACKEND, TANDEM_PORT, ...) and in the TOML file of --config (same names). A flag wins over
/// the environment, the environment over the file.
#[derive(Clone, Debug, Args)]
pub struct Router {
    /// A backend's address, e.g. http://10.0.0.7:8001, or https:// (the same as grpcs://) where it serves over TLS; repeat it, or
    /// separate by commas
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub backend: Vec<String>,
    #[command(flatten)]
    pub token: TokenOptions,
    #[command(flatten)]
    pub backend_ssl: BackendSslOptions,
    /// Names of the base model in the API, the first of which answers carry [default: what the first backend calls it]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub served_model_name: Vec<String>,
    #[command(flatten)]
    pub edge: EdgeOptions,
    #[command(flatten)]
    pub state: StateOptions,
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// Database, files, adapters and the states of running jobs as one folder, with a list of their digests. The server that
/// uses the data folder may go on. A Postgres is copied by its own tools.
#[derive(Clone, Debug, Args)]
pub struct Backup {
    /// A folder to make
    #[arg(value_name = "DIR")]
    pub target: PathBuf,
    /// That of the server
    #[arg(
        long,
        value_name = "DIR",
        env = "TANDEM_DATA_DIR",
        default_value = "./tandem-data"
    )]
    pub data_dir: PathBuf,
    /// That of the server: what lies there is fetched into the copy
    #[arg(long, value_name = "URL", env = "TANDEM_ARTIFACT_URL")]
    pub artifact_url: Option<String>,
    /// Refused: pg_dump copies it
    #[arg(long, value_name = "URL", env = "TANDEM_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

/// Every file is held against the digest in the copy. A server started on the folder answers by the same adapters and goes
/// on with the jobs; it needs no --artifact-url.
#[derive(Clone, Debug, Args)]
pub struct Restore {
    /// A folder that `tandem backup` made
    #[arg(value_name = "DIR")]
    pub source: PathBuf,
    /// A folder to make: new, or empty
    #[arg(
        long,
        value_name = "DIR",
        env = "TANDEM_DATA_DIR",
        default_value = "./tandem-data"
    )]
    pub data_dir: PathBuf,
}

/// A running server takes changes within seconds, and once there was a key nobody comes in without one. Of a key only its
/// SHA-256 is kept.
#[derive(Clone, Debug, Args)]
pub struct KeyOptions {
    #[command(subcommand)]
    pub command: KeyCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it, this once
    Create {
        /// Whose files, jobs and models it sees: letters, digits, -, _ and .
        #[arg(long, default_value = Tenant::DEFAULT)]
        tenant: Tenant,
        /// infer (ask models), train (files, jobs and models, too) or admin (everything, of every tenant)
        #[arg(long)]
        role: Role,
        /// For people
        #[arg(long, default_value = "")]
        name: String,
        /// Days until it opens nothing any more [default: never]
        #[arg(long, value_name = "DAYS", value_parser = count(1..=36_500))]
        expires_days: Option<u32>,
        /// Requests that ask a model [default: as many as it likes]
        #[arg(long, value_name = "N", value_parser = count(1..=u32::MAX))]
        requests_per_minute: Option<u32>,
        /// Tokens of prompts and answers [default: as many as it likes]
        #[arg(long, value_name = "N", value_parser = count(1..=u32::MAX))]
        tokens_per_minute: Option<u32>,
        /// Tokens that its jobs and its calls train, in a day (UTC), on all routers of the database [default: as many as it likes]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        training_tokens_per_day: Option<u64>,
        /// Bytes that its tenant may have of files, uploads, answers of batches, data and states of jobs, adapters and checkpoints,
        /// e.g. 20G [default: as many as it likes]
        #[arg(long, value_name = "BYTES", value_parser = bytes)]
        stored_bytes: Option<u64>,
        #[command(flatten)]
        place: KeyPlace,
    },
    /// Id, state, role, tenant, name, when each was made and ends, and its limits, by tabs
    List {
        #[command(flatten)]
        place: KeyPlace,
    },
    /// A key opens nothing any more
    Revoke {
        id: String,
        #[command(flatten)]
        place: KeyPlace,
    },
    /// Make another key with the same tenant, role, name and limits in place of one
    Rotate {
        id: String,
        /// For which the old one goes on
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        overlap_seconds: u64,
        #[command(flatten)]
        place: KeyPlace,
    },
}

#[derive(Clone, Debug, Args)]
pub struct KeyPlace {
    /// That of the server
    #[arg(
        long,
        value_name = "DIR",
        env = "TANDEM_DATA_DIR",
        default_value = "./tandem-data"
    )]
    pub data_dir: PathBuf,
    /// That of the servers
    #[arg(long, value_name = "URL", env = "TANDEM_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct Train {
    /// A YAML file of settings, and settings that win over it; --key value is taken, too. `tandem train help` lists all
    #[arg(
        value_name = "FILE.yaml | key=value",
        required = true,
        allow_hyphen_values = true
    )]
    pub settings: Vec<String>,
}

/// Rows are read as `tandem train` reads a validation_file, and the loss is that of its validations.
#[derive(Clone, Debug, Args)]
pub struct Eval {
    /// A model and a file of rows (or a recipe of `tandem train`), and settings; --key value is taken, too. `tandem eval help`
    /// lists all
    #[arg(
        value_name = "MODEL DATA | FILE.yaml | key=value",
        required = true,
        allow_hyphen_values = true
    )]
    pub settings: Vec<String>,
}

/// The answer is the one that a server gives to the same request.
#[derive(Clone, Debug, Args)]
pub struct Generate {
    /// A model or a YAML file of settings, and settings that win over it; --key value is taken, too. `tandem generate help`
    /// lists all
    #[arg(
        value_name = "MODEL | FILE.yaml | key=value",
        required = true,
        allow_hyphen_values = true
    )]
    pub settings: Vec<String>,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Recipes {
    /// List the recipes that are shipped
    Ls,
    /// Copy one into a file
    Cp {
        /// As `tandem recipes ls` has it
        name: String,
        file: PathBuf,
        /// Write over a file that is there
        #[arg(long)]
        force: bool,
    },
    /// Read settings without running them
    Validate {
        /// A YAML file or a recipe's name, and settings that win over it
        #[arg(value_name = "FILE.yaml | NAME | key=value", required = true)]
        words: Vec<String>,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub enum Adapters {
    /// What each is called, its rank, base, modules, size and who made it, by tabs
    Ls {
        /// PEFT folders below it, and in data folders what has a name [default: ./tandem-data, else .]
        #[arg(value_name = "DIR")]
        folder: Option<PathBuf>,
        #[command(flatten)]
        server: AdapterServer,
    },
    /// All that is known of one
    Show {
        /// A PEFT folder, or a name of the data folder or of the server
        #[arg(value_name = "NAME | DIR")]
        adapter: String,
        /// That of the server
        #[arg(
            long,
            value_name = "DIR",
            env = "TANDEM_DATA_DIR",
            default_value = "./tandem-data"
        )]
        data_dir: PathBuf,
        #[command(flatten)]
        server: AdapterServer,
    },
    /// Remove a PEFT folder, or a name of a running server; never what a server has in its data folder
    Rm {
        #[arg(value_name = "NAME | DIR")]
        adapter: String,
        #[command(flatten)]
        server: AdapterServer,
    },
}

/// A running server.
#[derive(Clone, Debug, Args)]
pub struct AdapterServer {
    /// Ask the server there, such as http://localhost:8000
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// A key of it
    #[arg(long, value_name = "KEY", env = "TANDEM_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct Download {
    /// Of a model or an adapter on the hub (HF_ENDPOINT, HF_TOKEN). Safetensors, JSON and templates come, no pickles
    #[arg(value_name = "ORG/NAME")]
    pub name: String,
    /// Branch, tag or commit [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// A folder to put the files into, instead of the hub's cache (HF_HOME, HF_HUB_CACHE)
    #[arg(long, value_name = "DIR")]
    pub local_dir: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct Rank {
    /// cpu or cuda
    #[arg(long)]
    pub device: String,
    /// Of all ranks together
    #[arg(long)]
    pub threads: Option<u32>,
}

#[derive(Clone, Debug, Args)]
pub struct Health {
    /// Where it listens
    #[arg(long, default_value = "127.0.0.1", value_parser = host)]
    pub host: IpAddr,
    #[arg(long, default_value_t = 8000, env = "TANDEM_PORT")]
    pub port: u16,
    /// It serves over TLS: whatever certificate it shows is taken
    #[arg(long, value_name = "FILE", env = "TANDEM_SSL_CERTFILE")]
    pub ssl_certfile: Option<PathBuf>,
    /// Ask whether it takes requests, not only whether it is well
    #[arg(long)]
    pub ready: bool,
}

impl Command {
    /// Of those that run until a signal.
    fn process(&self) -> Option<&ProcessOptions> {
        match self {
            Command::Serve(options) => Some(&options.process),
            Command::Backend(options) => Some(&options.process),
            Command::Router(options) => Some(&options.process),
            _ => None,
        }
    }

    pub fn log_format(&self) -> LogFormat {
        self.process()
            .map_or(LogFormat::Text, |process| process.log_format)
    }

    /// What the log says at least: commands that end by themselves say what they do on their own.
    pub fn least_log(&self) -> &'static str {
        match self {
            Command::Generate(_) | Command::Eval(_) => "warn",
            _ => "info",
        }
    }

    pub fn otlp_traces_endpoint(&self) -> Option<Url> {
        self.process()?.otlp_traces_endpoint.clone()
    }
}

fn limits() -> String {
    format!(
        "Limits of a request: JSON body {} MiB, uploaded file {} MiB, {} choices, {} stop strings, text to /tokenize {} MiB.",
        JSON_LIMIT_BYTES >> 20,
        FILE_LIMIT_BYTES >> 20,
        crate::convert::sampling::MAX_CHOICES,
        crate::convert::sampling::MAX_STOP_STRINGS,
        tandem_router::MAX_TEXT_BYTES >> 20,
    )
}
