//! The application: all routes, what wraps them, and what they share. Not here: sockets, start-up, shutdown.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use axum::Router as Routes;
use axum::body::Bytes;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::get;
use tandem_openapi::error::ErrorResponse;
use tandem_router::Router;
use tandem_router::shares::Shares;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::openapi::extensions::ExtensionsBuilder;
use utoipa::openapi::path::PathItem;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::access::{self, Gate};
use crate::access_log::AccessLog;
use crate::audit::Audit;
use crate::convert::fine_tuning;
use crate::convert::sampling::Limits;
use crate::dialect;
use crate::fields::Strays;
use crate::http;
use crate::http::merge::Merges;
use crate::keys::Ring;
use crate::layers;
use crate::metrics::Metrics;
use crate::origins::{Guard, Origins};
use crate::roots::LoraRoots;
use crate::shares;
use crate::unread;

#[derive(Clone)]
pub struct App {
    pub router: Router,
    pub metrics: Arc<Metrics>,
    pub strays: Arc<Strays>,
    /// openapi.json
    pub document: Bytes,
    pub lora_roots: Arc<LoraRoots>,
    pub merges: Merges,
    pub shares: Arc<Shares>,
    stopping: Arc<AtomicBool>,
}

impl App {
    /// `strict_fields`: refuse what a request has and nobody knows.
    pub fn new(
        router: Router,
        strict_fields: bool,
        lora_roots: LoraRoots,
        merges: Merges,
    ) -> Result<App, prometheus::Error> {
        let metrics = Metrics::new(&router.config().served_model_name, router.info().max_loras)?;
        let strays = Strays::new(strict_fields, metrics.unknown_fields());
        let document = Bytes::from(document());
        Ok(App {
            router,
            metrics: Arc::new(metrics),
            strays: Arc::new(strays),
            document,
            lora_roots: Arc::new(lora_roots),
            merges,
            shares: Arc::default(),
            stopping: Arc::default(),
        })
    }

    pub fn limits(&self) -> Limits {
        Limits {
            max_model_len: self.router.info().max_model_len,
        }
    }

    pub fn organization(&self) -> &str {
        &self.router.config().organization
    }

    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

pub fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Tandem", description = "Serves a language model and fine-tunes it in tandem."),
    components(schemas(
        ErrorResponse,
        tandem_openapi::chat::ChatChunk,
        tandem_openapi::generate::GenerateError,
        tandem_openapi::messages::AnthropicError
    )),
    modifiers(&Key),
    security((), ("key" = [])),
)]
struct Document;

struct Key;

impl Modify for Key {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some(
                "One of --api-key, or of `tandem keys`; x-least-role says what its role must be",
            ))
            .build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(bearer));
    }
}

fn documented() -> OpenApiRouter<App> {
    use http::{
        adapters, batches, chat, completions, embeddings, files, fine_tunes, fine_tuning, generate, merge,
        messages, models, responses, scores, server, tokenize, uploads,
    };
    OpenApiRouter::with_openapi(Document::openapi())
        .merge(http::tinker::documented())
        .routes(routes!(chat::create))
        .routes(routes!(completions::create))
        .routes(routes!(messages::create))
        .routes(routes!(messages::count_tokens))
        .routes(routes!(responses::create))
        .routes(routes!(responses::input_tokens))
        .routes(routes!(responses::retrieve, responses::delete))
        .routes(routes!(responses::cancel))
        .routes(routes!(responses::input_items))
        .routes(routes!(generate::whole))
        .routes(routes!(generate::streamed))
        .routes(routes!(generate::either))
        .routes(routes!(generate::info))
        .routes(routes!(embeddings::create))
        .routes(routes!(scores::score))
        .routes(routes!(scores::score_too))
        .routes(routes!(scores::rerank))
        .routes(routes!(scores::rerank_too))
        .routes(routes!(scores::rerank_v2))
        .routes(routes!(models::list))
        .routes(routes!(models::retrieve, models::delete))
        .routes(routes!(files::list, files::create))
        .routes(routes!(files::retrieve, files::delete))
        .routes(routes!(files::content))
        .routes(routes!(uploads::create))
        .routes(routes!(uploads::part))
        .routes(routes!(uploads::complete))
        .routes(routes!(uploads::cancel))
        .routes(routes!(batches::list, batches::create))
        .routes(routes!(batches::retrieve))
        .routes(routes!(batches::cancel))
        .routes(routes!(fine_tuning::list, fine_tuning::create))
        .routes(routes!(fine_tuning::preview))
        .routes(routes!(fine_tuning::retrieve))
        .routes(routes!(fine_tuning::cancel))
        .routes(routes!(fine_tuning::pause))
        .routes(routes!(fine_tuning::resume))
        .routes(routes!(fine_tuning::events))
        .routes(routes!(fine_tuning::checkpoints))
        .routes(routes!(fine_tunes::list, fine_tunes::create))
        .routes(routes!(fine_tunes::retrieve, fine_tunes::delete))
        .routes(routes!(fine_tunes::cancel))
        .routes(routes!(fine_tunes::events))
        .routes(routes!(adapters::load))
        .routes(routes!(adapters::unload))
        .routes(routes!(adapters::download))
        .routes(routes!(merge::merge))
        .routes(routes!(tokenize::tokenize))
        .routes(routes!(tokenize::detokenize))
        .routes(routes!(tokenize::info))
        .routes(routes!(server::health))
        .routes(routes!(server::ready))
        .routes(routes!(server::version))
        .routes(routes!(server::metrics))
}

/// openapi.json, as it is committed: pretty, with a last newline.
pub fn document() -> String {
    let mut document = documented().into_openapi();
    let components = document.components.get_or_insert_default();
    components
        .schemas
        .insert("TrainingSettings".to_owned(), fine_tuning::schema());
    // axum's wildcard is a plain parameter to everybody else, and an operation's id must be unique.
    let paths = std::mem::take(&mut document.paths.paths).into_iter();
    document.paths.paths = paths.map(|(path, item)| named(path, item)).collect();
    document
        .to_pretty_json()
        .expect("the document has string keys only")
        + "\n"
}

fn named(path: String, mut item: PathItem) -> (String, PathItem) {
    let words = path
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty());
    let name = words.collect::<Vec<_>>().join("_");
    for (method, operation) in [
        ("get", &mut item.get),
        ("post", &mut item.post),
        ("put", &mut item.put),
        ("delete", &mut item.delete),
    ] {
        if let Some(operation) = operation {
            operation.operation_id = Some(format!("{method}_{name}"));
            let least = access::least(method, &path);
            let extension = ExtensionsBuilder::new().add("x-least-role", least.name()).build();
            operation.extensions = Some(extension);
        }
    }
    (path.replace("{*", "{"), item)
}

/// Who may use the server.
pub struct Access {
    pub ring: Ring,
    pub origins: Origins,
    /// It listens on a loopback address.
    pub is_local: bool,
    pub audit: Audit,
    pub log: AccessLog,
}

/// The routes alone, for requests that come from within: lines of batches.
pub fn inner(app: App) -> Routes {
    let (routes, _) = documented().split_for_parts();
    routes
        .route_layer(from_fn_with_state(app.clone(), shares::hold))
        .layer(DefaultBodyLimit::disable())
        .with_state(app)
        .layer(CatchPanicLayer::custom(layers::panicked))
}

/// `body_patience`: for the next piece of a request's body.
pub fn routes(app: App, access: Access, body_patience: Duration) -> Routes {
    let Access {
        ring,
        origins,
        is_local,
        audit,
        log,
    } = access;
    let cors = origins.cors();
    let (routes, _) = documented().split_for_parts();
    let routes = routes
        .merge(http::fine_tunes::second_spelling())
        .route_layer(from_fn_with_state(app.clone(), layers::query))
        .route_layer(from_fn_with_state(app.clone(), shares::hold))
        .route("/", get(http::pages::index))
        .route("/ui/{part}", get(http::pages::part))
        .route("/docs", get(http::pages::docs))
        .route("/openapi.json", get(http::pages::openapi))
        .fallback(layers::unknown_url)
        .method_not_allowed_fallback(layers::wrong_method)
        // Each extractor has its own limit, named in extract.rs.
        .layer(DefaultBodyLimit::disable())
        .with_state(app);
    let gate = Gate {
        ring,
        guard: Guard { origins, is_local },
        audit,
    };
    routes
        .layer(from_fn_with_state(gate, access::gate))
        .layer(cors)
        .layer(CatchPanicLayer::custom(layers::panicked))
        .layer(from_fn_with_state(body_patience, unread::drain))
        .layer(from_fn(dialect::translate))
        .layer(from_fn_with_state(log, layers::request_id))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use crate::fields::strays;

    #[test]
    fn the_committed_document_is_the_served_one() {
        let document = super::document();
        assert!(
            document == tandem_openapi::COMMITTED,
            "openapi/openapi.json is stale: run `tandem openapi > openapi/openapi.json` and review the difference"
        );
    }

    /// /docs begins with them.
    #[test]
    fn examples_of_bodies_are_whole_and_known() {
        let document: Value = serde_json::from_str(tandem_openapi::COMMITTED).expect("JSON");
        let mut bodies = 0;
        for item in document["paths"].as_object().expect("paths").values() {
            let body = &item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"];
            let Some(name) = body.as_str().and_then(|reference| reference.rsplit('/').next()) else {
                continue;
            };
            let schema = &document["components"]["schemas"][name];
            let parts = schema["allOf"].as_array().map_or(&[][..], Vec::as_slice);
            let required = [schema]
                .into_iter()
                .chain(parts)
                .filter_map(|part| part["required"].as_array());
            let example = schema
                .get("example")
                .or_else(|| parts.iter().find_map(|part| part.get("example")));
            let example = example.unwrap_or_else(|| panic!("{name} has no example"));
            for field in required.flatten().filter_map(Value::as_str) {
                assert!(
                    example.get(field).is_some(),
                    "the example of {name} lacks {field}"
                );
            }
            assert_eq!(strays(name, example.to_string().as_bytes()), [], "{name}");
            bodies += 1;
        }
        assert_eq!(bodies, 42);
    }
}
