//! Of what runs until a signal: its certificates and tokens, where it keeps what, how it logs and stops.

use std::path::PathBuf;

use clap::Args;
use reqwest::Url;

use crate::otlp;
use crate::tls::CertReqs;
use crate::values::{LogFormat, cert_reqs, log_format};

/// TLS of whoever listens.
#[derive(Clone, Debug, Args)]
pub struct SslOptions {
    /// Certificate of the server (PEM, with those between it and the root behind it): all is then served over TLS alone.
    /// SIGHUP reads the files again
    #[arg(long, value_name = "FILE")]
    pub ssl_certfile: Option<PathBuf>,
    /// Its private key (PEM, without a password) [default: in the file of --ssl-certfile]
    #[arg(long, value_name = "FILE")]
    pub ssl_keyfile: Option<PathBuf>,
    /// Certificates (PEM) of those who sign clients' certificates
    #[arg(long, value_name = "FILE")]
    pub ssl_ca_certs: Option<PathBuf>,
    /// 0: no client's certificate is asked for, 1: one may be shown, 2: one must be
    #[arg(long, value_name = "0|1|2", default_value = "0", value_parser = cert_reqs)]
    pub ssl_cert_reqs: CertReqs,
}

/// TLS of a router to its backends.
#[derive(Clone, Debug, Args)]
pub struct BackendSslOptions {
    /// Certificates (PEM) of those who sign backends', for backends at https://
    #[arg(long, value_name = "FILE")]
    pub backend_ssl_ca_certs: Option<PathBuf>,
    /// Certificate (PEM) that the router shows to backends which want one (their --ssl-cert-reqs 2)
    #[arg(long, value_name = "FILE")]
    pub backend_ssl_certfile: Option<PathBuf>,
    /// Its private key (PEM, without a password) [default: in the file of --backend-ssl-certfile]
    #[arg(long, value_name = "FILE")]
    pub backend_ssl_keyfile: Option<PathBuf>,
}

/// What router and backend both know.
#[derive(Clone, Debug, Args)]
pub struct TokenOptions {
    /// The same for routers and backends, 16 characters or more: a backend that has one obeys nobody else, and one that
    /// listens beyond this machine needs one
    #[arg(long, value_name = "TOKEN", hide_env_values = true)]
    pub backend_token: Option<String>,
    /// The token from a file, such as a secret of Compose or Kubernetes; it wins over --backend-token
    #[arg(long, value_name = "FILE")]
    pub backend_token_file: Option<PathBuf>,
}

/// Where bytes are kept.
#[derive(Clone, Debug, Args)]
pub struct ArtifactOptions {
    /// Files, jobs and adapters live here
    #[arg(long, value_name = "DIR", default_value = "./tandem-data")]
    pub data_dir: PathBuf,
    /// s3://BUCKET/PREFIX (and the usual AWS_* variables) or file:///DIR: bytes that others see too, of which --data-dir
    /// is then a cache [default: --data-dir]
    #[arg(long, value_name = "URL")]
    pub artifact_url: Option<String>,
}

/// What is kept.
#[derive(Clone, Debug, Args)]
pub struct StateOptions {
    #[command(flatten)]
    pub artifacts: ArtifactOptions,
    /// postgres://USER:PASSWORD@HOST/NAME: files, jobs and names of several routers; wants an --artifact-url that all of
    /// them see [default: SQLite in --data-dir]
    #[arg(long, value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// Start although the database is new, or older than the files and adapters beside it: what it does not know of moves to
    /// DATA_DIR/quarantine. Without this such a start is refused
    #[arg(long)]
    pub quarantine_strays: bool,
}

/// The process.
#[derive(Clone, Debug, Args)]
pub struct ProcessOptions {
    /// Seconds that running streams are given at shutdown
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub shutdown_grace: u64,
    /// How the log is written: text, or json with an object a line
    #[arg(long, value_name = "text|json", default_value = "text", value_parser = log_format)]
    pub log_format: LogFormat,
    /// Where OpenTelemetry traces are sent, in OTLP over HTTP (JSON), such as http://localhost:4318/v1/traces: from a request
    /// to the engine's steps, and of training. OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and OTEL_EXPORTER_OTLP_HEADERS are
    /// read, too
    #[arg(long, value_name = "URL", value_parser = otlp::endpoint)]
    pub otlp_traces_endpoint: Option<Url>,
    /// TOML file with any of these options
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}
