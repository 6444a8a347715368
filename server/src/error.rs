//! Why a request was not served, and the only place that chooses a status code. Every error a client sees, on any
//! route and inside a stream, is made here. Not here: the checks that find the errors.

use std::io::ErrorKind;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use tandem_core::message::Fault;
use tandem_openapi::error::{ErrorObject, ErrorResponse};
use tandem_router::api::{Part, RouterError};
use tandem_store::{Role, StoreError};
use tracing::error;

use crate::hub::HubError;
use crate::unread::Stalled;

/// Characters of a message at most: what a client sent may be part of it.
const MESSAGE_CHARS: usize = 1000;
/// The clients of OpenAI obey it, and retry 409 and every 5xx without it.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error(transparent)]
    Router(#[from] RouterError),
    /// As `Router`, where the prompt is this field.
    #[error("{0}")]
    Prompt(RouterError, &'static str),
    /// A value is wrong; `param` is the field's path.
    #[error("{message}")]
    Invalid {
        param: Option<String>,
        code: Option<&'static str>,
        message: String,
    },
    /// A field that asks for what is not built. Better said than ignored.
    #[error("{param} is not supported by this server{hint}")]
    NotBuilt { param: String, hint: String },
    #[error(
        "We could not parse the JSON body of your request. (HINT: the body must be one JSON object. {0})"
    )]
    NotJson(String),
    #[error("the request body is larger than {limit_bytes} bytes, the limit of this route")]
    TooLarge { limit_bytes: u64 },
    #[error(
        "the request body has so many values that they would take about {bytes} bytes of memory, at most {limit_bytes} are \
         taken: send it in parts"
    )]
    TooDense { bytes: usize, limit_bytes: usize },
    #[error(
        "the body must be sent with the header Content-Type: {wanted}{}",
        instead_of(given)
    )]
    MediaType { wanted: &'static str, given: String },
    /// Of a future. A client that reads 408 asks again at once.
    #[error("it is not done yet: ask again")]
    NotYet,
    #[error("the request body could not be read: {0}")]
    Body(String),
    #[error("the request body did not go on coming: {0}, and longer is not waited for it")]
    SlowBody(String),
    #[error("You didn't provide an API key. Send it in the header: Authorization: Bearer YOUR_KEY")]
    NoKey,
    #[error("Incorrect API key provided.")]
    WrongKey,
    #[error(
        "You have insufficient permissions for this operation: this key's role is {role}, {wanted} is needed."
    )]
    Forbidden { role: Role, wanted: Role },
    #[error(
        "A page of {0} may not use this server, which has no API key. If it should: --allowed-origins '[\"{0}\"]', or \
         --api-key"
    )]
    ForeignPage(String),
    #[error(
        "This server has no API key and serves its own machine, where {0:?} is not one of its names. If it should be: \
         --allowed-origins '[\"http://{0}\"]', or --api-key"
    )]
    UnknownHost(String),
    #[error("Invalid URL ({0} {1})")]
    UnknownUrl(Method, String),
    #[error("Not allowed to {0} on {1}")]
    WrongMethod(Method, String),
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The base and the adapter are not made one model.
    #[error("not merged: {0}")]
    CannotMerge(String),
    #[error("the server is shutting down")]
    Stopping,
    #[error("this router waits for the first of its backends (--backend) to answer; try again")]
    NoBackend,
    /// For the log; a client learns only that it happened.
    #[error("{0}")]
    Internal(String),
}

/// A wrong value of `param`.
pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> ApiError {
    ApiError::Invalid {
        param: Some(param.into()),
        code: Some("invalid_value"),
        message: message.into(),
    }
}

impl ApiError {
    /// In the words of an API that chat answers under other names: each `(chat's, its)` is replaced, in the field's path and in
    /// the text.
    pub fn in_words(mut self, words: &[(&str, &str)]) -> ApiError {
        let say = |text: &mut String| {
            for (ours, theirs) in words {
                *text = text.replace(ours, theirs);
            }
        };
        match &mut self {
            ApiError::Invalid { param, message, .. }
            | ApiError::Router(RouterError::Invalid { param, message, .. }) => {
                param.iter_mut().for_each(say);
                say(message);
            }
            ApiError::NotBuilt { param, hint } => {
                say(param);
                say(hint);
            }
            _ => {}
        }
        self
    }
}

/// Why no more of a body could be read.
pub fn unreadable(error: &(dyn std::error::Error + 'static)) -> ApiError {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(stalled) = error.downcast_ref::<Stalled>() {
            return ApiError::SlowBody(stalled.to_string());
        }
        cause = error.source();
    }
    ApiError::Body(error.to_string())
}

fn instead_of(given: &str) -> String {
    match given {
        "" => ", and has none".to_owned(),
        given => format!(", not {given:?}"),
    }
}

enum Retry {
    AsStatusSays,
    Never,
    AfterSeconds(u32),
}

struct Answer {
    status: StatusCode,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    retry: Retry,
    /// What to say when the error's own text is not for clients.
    instead: Option<&'static str>,
}

impl ApiError {
    /// The table.
    fn answer(&self) -> Answer {
        use Retry::{AfterSeconds, Never};
        use StatusCode as S;
        let with = |status, kind, param: Option<&str>, code| Answer {
            status,
            kind,
            param: param.map(str::to_owned),
            code,
            retry: Retry::AsStatusSays,
            instead: None,
        };
        let bad = |param: Option<&str>, code| with(S::BAD_REQUEST, INVALID, param, code);
        let failed = |retry, instead| Answer {
            retry,
            instead,
            ..with(S::INTERNAL_SERVER_ERROR, SERVER, None, None)
        };
        let busy = |seconds| Answer {
            retry: AfterSeconds(seconds),
            ..with(
                S::TOO_MANY_REQUESTS,
                "rate_limit_error",
                None,
                Some("rate_limit_exceeded"),
            )
        };
        let stopping = || Answer {
            retry: AfterSeconds(5),
            ..with(S::SERVICE_UNAVAILABLE, SERVER, None, None)
        };

        let full = || Answer {
            retry: AfterSeconds(5),
            instead: Some(
                "This server's disk is full; files, jobs and new models wait for room. Delete files or models, or make \
                 room, and try again.",
            ),
            ..with(S::INSUFFICIENT_STORAGE, SERVER, None, Some("storage_full"))
        };
        let away = |part| {
            let (code, instead) = match part {
                Part::Room => return full(),
                Part::Database => (
                    "database_unavailable",
                    "The database of this server does not answer now; files, jobs and new models wait for it. Try again.",
                ),
                Part::Storage => (
                    "storage_unavailable",
                    "The artifact store of this server does not answer now; files, jobs and new models wait for it. Try \
                     again.",
                ),
            };
            Answer {
                code: Some(code),
                instead: Some(instead),
                ..stopping()
            }
        };

        let (error, prompt) = match self {
            ApiError::Router(error) => (error, None),
            ApiError::Prompt(error, param) => (error, Some(*param)),
            ApiError::Invalid { param, code, .. } => return bad(param.as_deref(), *code),
            ApiError::NotBuilt { param, .. } => return bad(Some(param), Some("unsupported_parameter")),
            ApiError::NotJson(_) | ApiError::Body(_) => return bad(None, None),
            ApiError::NotYet => return with(S::REQUEST_TIMEOUT, INVALID, None, Some("not_yet")),
            ApiError::SlowBody(_) => {
                return with(S::REQUEST_TIMEOUT, INVALID, None, Some("request_timeout"));
            }
            ApiError::TooLarge { .. } | ApiError::TooDense { .. } => {
                return with(S::PAYLOAD_TOO_LARGE, INVALID, None, Some("request_too_large"));
            }
            ApiError::MediaType { .. } => {
                return with(
                    S::UNSUPPORTED_MEDIA_TYPE,
                    INVALID,
                    None,
                    Some("unsupported_media_type"),
                );
            }
            ApiError::NoKey | ApiError::WrongKey => {
                return with(
                    S::UNAUTHORIZED,
                    "authentication_error",
                    None,
                    Some("invalid_api_key"),
                );
            }
            ApiError::Forbidden { .. } => {
                return with(S::FORBIDDEN, INVALID, None, Some("insufficient_permissions"));
            }
            ApiError::ForeignPage(_) | ApiError::UnknownHost(_) => {
                return with(S::FORBIDDEN, INVALID, None, Some("origin_not_allowed"));
            }
            ApiError::UnknownUrl(..) => return with(S::NOT_FOUND, INVALID, None, Some("unknown_url")),
            ApiError::WrongMethod(..) => {
                return with(S::METHOD_NOT_ALLOWED, INVALID, None, Some("method_not_allowed"));
            }
            ApiError::Hub(error) if error.is_unknown() => {
                return with(
                    S::NOT_FOUND,
                    INVALID,
                    Some("lora_path"),
                    Some("adapter_not_found"),
                );
            }
            ApiError::Hub(HubError::Away { .. } | HubError::Cut { .. }) => {
                return Answer {
                    code: Some("hub_unavailable"),
                    ..stopping()
                };
            }
            ApiError::Hub(HubError::Disk { error, .. })
                if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) =>
            {
                return full();
            }
            ApiError::Hub(HubError::Disk { .. } | HubError::Client(_)) => {
                return failed(
                    Retry::AsStatusSays,
                    Some("The server could not keep the adapter's files."),
                );
            }
            ApiError::Hub(_) => return bad(Some("lora_path"), Some("invalid_adapter")),
            ApiError::CannotMerge(_) => return bad(Some("name"), Some("cannot_merge")),
            ApiError::Stopping => return stopping(),
            ApiError::NoBackend => {
                return Answer {
                    code: Some("no_backend"),
                    ..stopping()
                };
            }
            ApiError::Internal(_) => return failed(Retry::AsStatusSays, Some("The server had an error.")),
        };
        match error {
            RouterError::UnknownModel(_) => {
                with(S::NOT_FOUND, INVALID, Some("model"), Some("model_not_found"))
            }
            RouterError::UnknownFile(_) => with(S::NOT_FOUND, INVALID, Some("id"), None),
            RouterError::UnknownJob(_) => with(
                S::NOT_FOUND,
                INVALID,
                Some("fine_tune_id"),
                Some("fine_tune_not_found"),
            ),
            RouterError::Unknown { .. } => with(S::NOT_FOUND, INVALID, Some("id"), Some("not_found")),
            RouterError::Gone(_) => with(S::GONE, INVALID, Some("id"), Some("gone")),
            RouterError::UnknownResponse(_) => with(S::NOT_FOUND, INVALID, Some("id"), None),
            RouterError::Invalid { param, code, .. } => bad(param.as_deref(), *code),
            RouterError::ContextLength { .. } => bad(prompt, Some("context_length_exceeded")),
            RouterError::Conflict(_) => Answer {
                retry: Never,
                ..with(S::CONFLICT, INVALID, None, Some("conflict"))
            },
            RouterError::Adapter { not_found: true, .. } => with(
                S::NOT_FOUND,
                INVALID,
                Some("lora_path"),
                Some("adapter_not_found"),
            ),
            RouterError::Adapter { not_found: false, .. } => bad(Some("lora_path"), Some("invalid_adapter")),
            RouterError::Busy { retry_after_s, .. } | RouterError::NoShare { retry_after_s, .. } => {
                busy(*retry_after_s)
            }
            RouterError::UsedUp(used_up) => busy(used_up.retry_after_s),
            RouterError::Quota(exceeded) => Answer {
                code: Some("exceeded_quota"),
                ..busy(u32::try_from(exceeded.quota.renews_after_s).unwrap_or(u32::MAX))
            },
            RouterError::Limited(_) => with(S::FORBIDDEN, INVALID, None, Some("key_limited")),
            RouterError::Engine(Fault::Overloaded { .. } | Fault::Unread) => busy(1),
            RouterError::Engine(Fault::Refused(_)) => bad(prompt, Some("request_too_large")),
            RouterError::Engine(Fault::Grammar(_)) => bad(None, Some("invalid_grammar")),
            RouterError::Engine(Fault::Adapter(_)) => failed(Never, Some("The adapter could not be loaded.")),
            // The text is libtorch's, with its source lines.
            RouterError::Engine(Fault::Step(_)) => failed(
                Retry::AsStatusSays,
                Some("The engine failed a step; the request is lost."),
            ),
            RouterError::Engine(Fault::ShuttingDown) => stopping(),
            // Why may name devices, backends and places.
            RouterError::Engine(Fault::ReplicaLost(_)) => Answer {
                code: Some("replica_lost"),
                instead: Some(
                    "The engine that worked on this request was lost, or there is none now; try again.",
                ),
                ..stopping()
            },
            RouterError::Store(error) if let Some(part) = error.away() => away(part),
            RouterError::Store(StoreError::OverLimit(_)) => {
                with(S::FORBIDDEN, INVALID, None, Some("storage_limit_exceeded"))
            }
            RouterError::Store(StoreError::Altered { .. }) => Answer {
                code: Some("file_damaged"),
                ..failed(Never, None)
            },
            RouterError::Store(_) => failed(
                Retry::AsStatusSays,
                Some("The server could not reach its storage."),
            ),
        }
    }

    pub fn status(&self) -> StatusCode {
        self.answer().status
    }

    /// What a stream sends when it cannot go on.
    pub fn body(&self) -> ErrorResponse {
        let Answer {
            status,
            kind,
            param,
            code,
            instead,
            ..
        } = self.answer();
        if status.is_server_error() {
            error!(%status, error = %self, "request failed");
        }
        let mut message = instead.map_or_else(|| self.to_string(), str::to_owned);
        if let Some((end, _)) = message.char_indices().nth(MESSAGE_CHARS) {
            message.truncate(end);
            message.push_str("...");
        }
        ErrorResponse {
            error: ErrorObject {
                message,
                kind: kind.to_owned(),
                param,
                code: code.map(str::to_owned),
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Answer { status, retry, .. } = self.answer();
        let body = self.body();
        let mut response = (status, Json(&body)).into_response();
        // Some routes speak another dialect.
        response.extensions_mut().insert(body.error);
        let headers = response.headers_mut();
        match retry {
            Retry::AsStatusSays => {}
            Retry::Never => drop(headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"))),
            Retry::AfterSeconds(seconds) => {
                drop(headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds)))
            }
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
