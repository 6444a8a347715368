//! The API in front of a fleet, whichever fleet it is: what `serve` and `router` share. Not here: routes, the fleet.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tandem_router::Keep;
use tandem_router::{Defaults, Fleet, Router};
use tandem_store::{Keys, Places, Store, Strays};
use tandem_text::Tokenizer;
use tandem_text::reasoning::ReasoningFormat;
use tandem_text::tools::ToolFormat;
use tracing::{info, warn};

use super::greeting::{self, Greeting};
use crate::access_log::AccessLog;
use crate::app::{self, Access, App};
use crate::audit::Audit;
use crate::cli::{ArtifactOptions, ConnectionOptions, EdgeOptions, ProcessOptions, StateOptions};
use crate::connection::{Patience, Site};
use crate::exit::WrongSetting;
use crate::http::merge::Merges;
use crate::hub::{self, Content};
use crate::keys::Ring;
use crate::listen::Limits;
use crate::origins::Origins;
use crate::roots::LoraRoots;
use crate::tls::{self, Tls};
use crate::values::{ChatTemplate, LoraModule, Parser, SchedulingPolicy};
use crate::{convert, exposure, http, listen};

/// A socket that is bound, and who may come in by it: what can be wrong with either is found before a model is loaded.
pub struct Door {
    listener: TcpListener,
    address: SocketAddr,
    access: Access,
    tls: Option<Tls>,
    /// Whether other machines come in without a key is known; else once the database has been opened.
    is_judged: bool,
}

impl ConnectionOptions {
    pub fn limits(&self) -> Limits {
        Limits {
            all: self.max_connections,
            per_address: self.max_connections_per_address,
        }
    }

    fn patience(&self) -> Patience {
        let seconds = |n: u32| Duration::from_secs(n.into());
        Patience {
            idle: seconds(self.idle_timeout),
            read: seconds(self.read_timeout),
            write: seconds(self.write_timeout),
        }
    }
}

impl Door {
    /// For pages that are served behind it before the API is.
    pub fn site(&self, routes: axum::Router, options: &EdgeOptions) -> Site {
        Site {
            routes,
            root: options.root_path.clone(),
            tls: self.tls.clone(),
            patience: options.connections.patience(),
        }
    }

    pub fn listener(&self) -> &TcpListener {
        &self.listener
    }

    pub fn open(address: SocketAddr, options: &EdgeOptions, state: &StateOptions) -> Result<Door> {
        let keys = exposure::keys(&options.api_key, options.api_key_file.as_deref())?;
        let ring = Ring::new(keys.iter().map(String::as_str))
            .map_err(|error| WrongSetting(format!("--api-key: {error}")))?;
        // Those of the database are seen when it is opened, and this is looked at again.
        let may_have_keys = state.database_url.is_some() || Keys::may_lie_in(&state.artifacts.data_dir);
        let is_judged = ring.is_wanted() || !may_have_keys;
        if is_judged {
            exposure::check(options.published.as_deref(), address.ip(), ring.is_wanted())?;
        }
        let files = tls::Files::given(&options.ssl)?;
        let tls = files.map(Tls::open).transpose()?;
        let audit = Audit::open(options.audit_log.as_deref()).context("--audit-log")?;
        let origins = Origins::parse(&options.allowed_origins).context("--allowed-origins")?;
        let listener = listen::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        let address = listener.local_addr().context("the socket has no address")?;
        let access = Access {
            ring,
            origins,
            is_local: address.ip().is_loopback(),
            audit,
            log: AccessLog {
                off: options.disable_uvicorn_access_log,
                silent: options.disable_access_log_for_endpoints.clone(),
            },
        };
        Ok(Door {
            listener,
            address,
            access,
            tls,
            is_judged,
        })
    }
}

/// Make it, and see that it can be written: a volume that belongs to somebody else is found at once, by its name.
pub fn make_data_dir(data_dir: &Path) -> Result<()> {
    if data_dir.is_file() {
        bail!(WrongSetting(format!(
            "--data-dir {} is a file: it must be a folder, or a name that is free",
            data_dir.display()
        )));
    }
    let trial = data_dir.join(format!(".trial-{}", std::process::id()));
    std::fs::create_dir_all(data_dir)
        .and_then(|()| File::create(&trial))
        .and_then(|_| std::fs::remove_file(&trial))
        .with_context(|| match owner(data_dir) {
            Some(owner) => format!("cannot write to --data-dir {}, {owner}", data_dir.display()),
            None => format!("cannot make --data-dir {}", data_dir.display()),
        })
}

/// Whose a folder is and who we are, for who has to mend it.
fn owner(folder: &Path) -> Option<String> {
    let (folder, own) = (folder.metadata().ok()?, Path::new("/proc/self").metadata().ok()?);
    Some(format!(
        "which belongs to user {} and group {} (mode {:o}); this process is user {}, group {}",
        folder.uid(),
        folder.gid(),
        folder.mode() & 0o7777,
        own.uid(),
        own.gid()
    ))
}

/// What `run` serves.
pub struct Edge {
    pub door: Door,
    pub behind: Behind,
    pub options: EdgeOptions,
    pub state: StateOptions,
    pub process: ProcessOptions,
}

/// What the API stands on.
pub struct Behind {
    pub fleet: Fleet,
    pub tokenizer: Tokenizer,
    /// Where the base's weights are, if this process has them.
    pub base: Option<PathBuf>,
    /// Of the base model; at least one.
    pub names: Vec<String>,
    /// Name and folder of each that --lora-modules names.
    pub adapters: Vec<(String, PathBuf)>,
}

/// The model's tokenizer, with the chat template that was asked for.
pub fn tokenizer(model: &Path, options: &EdgeOptions) -> Result<Tokenizer> {
    let Some(ChatTemplate { given, source }) = &options.chat_template else {
        let tokenizer = Tokenizer::open(model).context("the model's tokenizer")?;
        if let Some(error) = tokenizer.broken_template() {
            tracing::warn!(model = %model.display(), %error, "chats will be refused; --chat-template FILE takes another");
        }
        return Ok(tokenizer);
    };
    Tokenizer::with_chat_template(model, source.clone()).with_context(|| format!("--chat-template {given}"))
}

/// What --lora-modules names, downloaded where it is the hub's.
pub fn adapters(options: &EdgeOptions) -> Result<Vec<(String, PathBuf)>> {
    let found = options.adapters().map(|LoraModule { name, path, .. }| {
        let found =
            hub::find(path, None, Content::Adapter).with_context(|| format!("--lora-modules {name}"))?;
        Ok((name.clone(), found.folder))
    });
    found.collect()
}

/// Until a signal, and the grace after it.
pub async fn run(edge: Edge) -> Result<()> {
    let Edge {
        door:
            Door {
                listener,
                address,
                access,
                tls,
                is_judged,
            },
        behind,
        options,
        state,
        process,
    } = edge;
    let StateOptions {
        artifacts: ArtifactOptions {
            data_dir,
            artifact_url,
        },
        database_url,
        quarantine_strays,
    } = state;
    let places = Places {
        database_url,
        artifact_url,
        strays: match quarantine_strays {
            true => Strays::Quarantine,
            false => Strays::Refuse,
        },
        ..Places::local(&data_dir)
    };
    let ProcessOptions {
        shutdown_grace,
        log_format: _,
        otlp_traces_endpoint: _,
        config: _,
    } = process;
    let store = Store::open(&places).await.context("the store")?;
    let (ring, keys) = (access.ring.clone(), store.keys());
    ring.take(&keys).await.context("the keys")?;
    if !is_judged {
        exposure::check(options.published.as_deref(), address.ip(), ring.is_wanted())?;
    }
    tokio::spawn(ring.follow(keys));
    let names = behind.names.clone();
    let app = open(store, behind, &options, &data_dir).await?;
    app.router.answer_batches(http::batches::answers(app.clone()));
    let greeting = Greeting {
        address,
        names: &names,
        replica: app.router.info(),
        door: greeting::Door::Api {
            is_secure: tls.is_some(),
            wants_key: access.ring.is_wanted(),
        },
    };
    let (limits, patience) = (options.connections.limits(), options.connections.patience());
    let routes = app::routes(app.clone(), access, patience.read);
    greeting.say();
    let grace = Duration::from_secs(shutdown_grace);
    let site = Site {
        routes,
        root: options.root_path,
        tls,
        patience,
    };
    listen::serve(listener, site, app, limits, grace).await?;
    info!("stopped");
    Ok(())
}

/// The API, without a door to it.
pub async fn open(store: Store, behind: Behind, options: &EdgeOptions, data_dir: &Path) -> Result<App> {
    let Behind {
        fleet,
        tokenizer,
        base,
        names,
        adapters: lora_modules,
    } = behind;
    for LoraModule {
        name,
        base_model_name,
        ..
    } in options.adapters()
    {
        if let Some(base) = base_model_name.as_ref().filter(|base| !names.contains(base)) {
            info!(
                adapter = name,
                base_model_name = base,
                serves = names[0],
                "its base here is the one that is served"
            );
        }
    }
    let EdgeOptions {
        host: _,
        port: _,
        api_key: _,
        api_key_file: _,
        audit_log: _,
        published: _,
        allowed_origins: _,
        generation_config,
        chat_template: _,
        tool_call_parser,
        reasoning_parser,
        strict_fields,
        lora_modules: _,
        lora_root,
        response_store_bytes,
        response_store_days,
        tinker,
        ssl: _,
        root_path: _,
        disable_uvicorn_access_log: _,
        disable_access_log_for_endpoints: _,
        scheduling_policy,
        max_waiting,
        replica_wait: _,
        connections: _,
    } = options;
    let named = lora_modules.iter().map(|(_, folder)| folder.as_path());
    let lora_roots = LoraRoots::new(lora_root, named.chain([data_dir])).context("--lora-root")?;
    let defaults = defaults(generation_config, &fleet)?;
    let tool_format = match tool_call_parser {
        Some(Parser::None) => None,
        Some(Parser::Named(format)) => Some(*format),
        None => tokenizer.tool_template_source().and_then(ToolFormat::of_template),
    };
    let reasoning_format = match reasoning_parser {
        Some(Parser::None) => None,
        Some(Parser::Named(format)) => Some(*format),
        None => tokenizer
            .chat_template_source()
            .and_then(ReasoningFormat::of_template),
    };
    info!(
        tool_calls = tool_format.map_or("none", |format| format.names[0]),
        tool_calls_by = if tool_call_parser.is_some() {
            "--tool-call-parser"
        } else {
            "the chat template"
        },
        reasoning = reasoning_format.map_or("none", |format| format.names[0]),
        reasoning_by = if reasoning_parser.is_some() {
            "--reasoning-parser"
        } else {
            "the chat template"
        },
        "how answers are read"
    );
    let config = tandem_router::Config {
        tool_format,
        reasoning_format,
        calls_as_content: matches!(tool_call_parser, Some(Parser::None)),
        served_model_name: names[0].clone(),
        other_model_names: names[1..].to_vec(),
        keep_responses: Keep {
            bytes: *response_store_bytes,
            age_s: u64::from(*response_store_days) * 24 * 3600,
        },
        tinker: tinker.limits(),
        overtaking: *scheduling_policy == SchedulingPolicy::Priority,
        max_waiting: *max_waiting,
        max_choices: convert::sampling::MAX_CHOICES,
        lora_modules,
        defaults,
        ..tandem_router::Config::default()
    };
    let router = Router::open(store, tokenizer, fleet, config).await?;
    App::new(router, *strict_fields, lora_roots, Merges::of(base)).context("the metrics")
}

/// What --generation-config says that a request gets which does not say.
fn defaults(source: &str, fleet: &Fleet) -> Result<Defaults> {
    const FILE: &str = "generation_config.json";
    let (content, place) = match source {
        "vllm" => return Ok(Defaults::default()),
        "auto" => (
            fleet.facts().files.content(FILE).map(<[u8]>::to_vec),
            format!("the model's {FILE}"),
        ),
        folder => {
            let path = Path::new(folder).join(FILE);
            let content = std::fs::read(&path)
                .with_context(|| format!("--generation-config {folder}: cannot read {}", path.display()))?;
            (Some(content), path.display().to_string())
        }
    };
    let Some(content) = content else {
        return Ok(Defaults::default());
    };
    let defaults = Defaults::read(&content)
        .map_err(WrongSetting)
        .with_context(|| format!("{place} (--generation-config vllm goes without it)"))?;
    let not_applied = Defaults::not_applied(&content);
    if !not_applied.is_empty() {
        warn!("of {place} these are not applied: {}", not_applied.join(", "));
    }
    let shown = defaults.to_string();
    if !shown.is_empty() {
        info!(
            "requests that do not say get {shown}, from {place}; --generation-config vllm goes without them"
        );
    }
    Ok(defaults)
}
