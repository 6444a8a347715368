//! Bodies, paths and queries out of requests, with every refusal in the envelope (axum's own answer in plain text).
//! Not here: what the values mean.

use std::ops::RangeInclusive;
use std::sync::Arc;

use axum::body::{self, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use futures::StreamExt;
use prost::Message;
use serde::de::DeserializeOwned;
use tandem_core::json;
use tandem_core::protobuf::{self, Field, Holds, Shape};
use tandem_openapi::tinker::proto;
use tandem_router::Order;

use crate::app::App;
use crate::convert::fine_tunes::JobName;
use crate::error::{ApiError, invalid, unreadable};
use crate::fields::{Rule, strays};
use crate::shares::Held;

/// A JSON body at most: a long prompt as token ids, with room.
pub const JSON_LIMIT_BYTES: u64 = 32 << 20;
/// What is read on a worker, in a few milliseconds; more has a thread of its own.
const AT_ONCE_BYTES: usize = 256 << 10;
/// Of a field's name in a message.
const NAME_CHARS: usize = 80;
/// An uploaded file at most.
pub const FILE_LIMIT_BYTES: u64 = 512 << 20;

/// A type that a JSON body is read into.
pub trait Body: DeserializeOwned + Send + 'static {
    /// Its name in the document.
    const SCHEMA: &'static str;
    /// What is known of fields that the document does not have. `None`: the type keeps them, and its conversion looks
    /// at them.
    const RULES: Option<&'static [&'static [Rule]]>;
}

/// A JSON body, and said to be one: text/plain is what a page of another origin may send without asking.
pub struct Json<T>(pub T);

impl<T: Body> FromRequest<App> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Json<T>, ApiError> {
        let (parts, body) = request.into_parts();
        must_be("application/json", &parts.headers)?;
        let held = parts.extensions.get::<Arc<Held>>();
        let bytes = read(&parts.headers, body, JSON_LIMIT_BYTES, held).await?;
        if let Some(held) = held {
            held.reach(bytes.len() + json::tree_bytes(&bytes))?;
        }
        if bytes.len() <= AT_ONCE_BYTES {
            return judged(&bytes, app).map(Json);
        }
        // The workers have other requests to answer meanwhile.
        let app = app.clone();
        let judged = tokio::task::spawn_blocking(move || judged(&bytes, &app)).await;
        let judged = judged.map_err(|error| ApiError::Internal(format!("a body was not read: {error}")))?;
        judged.map(Json)
    }
}

/// What of a call takes more than its bytes.
const FORWARD_BACKWARD: Shape = &[
    field(3, size_of::<proto::Datum>(), DATUM),
    field(5, MAP, &[]),
    field(7, MAP, &[]),
];
const DATUM: Shape = &[field(1, size_of::<proto::Chunk>(), &[]), field(2, MAP, &[])];
/// A map of one has a node of eleven places, of up to 96 bytes each.
const MAP: usize = 1024;

const fn field(number: usize, size: usize, shape: Shape) -> Field {
    let holds = Holds::Message(size, shape);
    Field { number, holds }
}

/// A protobuf body, and said to be one.
pub struct Proto(pub proto::ForwardBackwardRequest);

impl FromRequest<App> for Proto {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Proto, ApiError> {
        let (parts, body) = request.into_parts();
        must_be(proto::MEDIA_TYPE, &parts.headers)?;
        if let Some(coding) = parts.headers.get(header::CONTENT_ENCODING) {
            let message = format!("a body in the coding {coding:?} is not read: send it as it is");
            return Err(invalid("Content-Encoding", message));
        }
        let held = parts.extensions.get::<Arc<Held>>();
        let limit = app.router.config().tinker.call_bytes;
        let bytes = read(&parts.headers, body, limit, held).await?;
        if let Some(held) = held {
            held.reach(protobuf::tree_bytes(&bytes, FORWARD_BACKWARD))?;
        }
        let decoded = move || proto::ForwardBackwardRequest::decode(bytes.as_slice());
        let decoded = tokio::task::spawn_blocking(decoded).await;
        let decoded = decoded.map_err(|error| ApiError::Internal(format!("a body was not read: {error}")))?;
        let decoded =
            decoded.map_err(|error| ApiError::Body(format!("it is no such protobuf message: {error}")));
        decoded.map(Proto)
    }
}

fn judged<T: Body>(bytes: &[u8], app: &App) -> Result<T, ApiError> {
    let value = from_json(bytes);
    if let Some(name) = json::twice(bytes) {
        let name: String = name.chars().take(NAME_CHARS).collect();
        return Err(invalid(
            &name,
            format!("'{name}' is there twice in one object: which of them is meant?"),
        ));
    }
    // A field that is missing may only be misspelt, which says more.
    if let (Some(rules), Ok(_) | Err(ApiError::Invalid { .. })) = (T::RULES, &value) {
        app.strays.judge_all(strays(T::SCHEMA, bytes), rules)?;
    }
    value
}

/// The media type without its parameters.
pub fn must_be(wanted: &'static str, headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let given = String::from_utf8_lossy(given.unwrap_or_default());
    let kind = given.split(';').next().unwrap_or_default().trim();
    match kind.eq_ignore_ascii_case(wanted) {
        true => Ok(()),
        false => Err(ApiError::MediaType {
            wanted,
            given: kind.to_owned(),
        }),
    }
}

/// Announced and actual size are both held against the limit.
async fn read(
    headers: &HeaderMap,
    body: body::Body,
    limit_bytes: u64,
    held: Option<&Arc<Held>>,
) -> Result<Vec<u8>, ApiError> {
    let mut chunks = body.into_data_stream();
    let announced = announced_bytes(headers);
    if announced.is_some_and(|bytes| bytes > limit_bytes) {
        return Err(ApiError::TooLarge { limit_bytes });
    }
    let reach = |bytes| held.map_or(Ok(()), |held| held.reach(bytes));
    let announced = announced.unwrap_or(0) as usize;
    reach(announced)?;
    let mut bytes = Vec::with_capacity(announced);
    while let Some(chunk) = chunks.next().await {
        let chunk: Bytes = chunk.map_err(|error| unreadable(&error))?;
        if (bytes.len() + chunk.len()) as u64 > limit_bytes {
            return Err(ApiError::TooLarge { limit_bytes });
        }
        reach(bytes.len() + chunk.len())?;
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

pub fn announced_bytes(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// One JSON object; what is wrong with it is named by its path.
pub fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // A derived struct would also take an array, by position.
    match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') => {}
        Some(_) => return Err(ApiError::NotJson("It does not begin with '{'.".to_owned())),
        None => return Err(ApiError::NotJson("It is empty.".to_owned())),
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(named)?;
    deserializer
        .end()
        .map_err(|error| ApiError::NotJson(sentence(&error)))?;
    Ok(value)
}

fn named(error: serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    let path = error.path().to_string();
    let error = error.into_inner();
    if !error.is_data() {
        return ApiError::NotJson(sentence(&error));
    }
    let text = error.to_string();
    let text = text.split(" at line ").next().unwrap_or(&text);
    let inside = (path != "." && !path.is_empty()).then_some(path);
    let field = text
        .strip_prefix("missing field `")
        .and_then(|rest| rest.strip_suffix('`'));
    match (field, inside) {
        (Some(field), inside) => {
            let param = inside.map_or_else(|| field.to_owned(), |path| format!("{path}.{field}"));
            let message = format!("Missing required parameter: '{param}'.");
            ApiError::Invalid {
                param: Some(param),
                code: Some("missing_required_parameter"),
                message,
            }
        }
        (None, Some(param)) => {
            let message = format!("Invalid type for '{param}': {text}.");
            ApiError::Invalid {
                param: Some(param),
                code: Some("invalid_type"),
                message,
            }
        }
        (None, None) => ApiError::Invalid {
            param: None,
            code: Some("invalid_type"),
            message: text.to_owned(),
        },
    }
}

fn sentence(error: &serde_json::Error) -> String {
    format!("The parser says: {error}.")
}

/// One segment, or the rest, of the path, percent-decoded. (Not named Path: utoipa's macro would look inside.)
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Segment, ApiError> {
        match axum::extract::Path::<String>::from_request_parts(parts, state).await {
            // No id has a NUL, and Postgres takes none.
            Ok(axum::extract::Path(segment)) if !segment.contains('\0') => Ok(Segment(segment)),
            _ => Err(ApiError::Invalid {
                param: Some("id".to_owned()),
                code: Some("invalid_value"),
                message: "the id in the URL is not UTF-8 without NUL when percent-decoded".to_owned(),
            }),
        }
    }
}

/// The job that the path names.
pub struct JobSegment(pub JobName);

impl<S: Send + Sync> FromRequestParts<S> for JobSegment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<JobSegment, ApiError> {
        let Segment(name) = Segment::from_request_parts(parts, state).await?;
        Ok(JobSegment(JobName::new(name)))
    }
}

/// The query's pairs, in order. Names that the route does not know are layers.rs's.
#[derive(Debug, Default)]
pub struct Pairs(Vec<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Pairs {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Pairs, ApiError> {
        let axum::extract::Query(pairs): axum::extract::Query<Vec<(String, String)>> =
            axum::extract::Query::try_from_uri(&parts.uri).map_err(|error| ApiError::Invalid {
                param: None,
                code: None,
                message: error.to_string(),
            })?;
        match pairs
            .iter()
            .find(|(name, value)| name.contains('\0') || value.contains('\0'))
        {
            Some((name, _)) => Err(invalid(
                name.escape_default().to_string(),
                "the query has a NUL character",
            )),
            None => Ok(Pairs(pairs)),
        }
    }
}

impl Pairs {
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, value)| key == name && !value.is_empty())
            .map(|(_, value)| value.as_str())
    }

    pub fn integer(&self, name: &str, range: RangeInclusive<u32>, default: u32) -> Result<u32, ApiError> {
        let Some(text) = self.text(name) else {
            return Ok(default);
        };
        text.parse().ok().filter(|n| range.contains(n)).ok_or_else(|| {
            invalid(
                name,
                format!(
                    "{name} must be an integer from {} to {}, got {text:?}",
                    range.start(),
                    range.end()
                ),
            )
        })
    }

    /// `true`, `false`, `1`, `0`.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.text(name).map(str::to_ascii_lowercase).as_deref() {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(other) => Err(invalid(
                name,
                format!("{name} must be true or false, got {other:?}"),
            )),
        }
    }

    /// `order`: `desc`, which is also what nothing means, or `asc`.
    pub fn order(&self) -> Result<Order, ApiError> {
        match self.text("order") {
            None | Some("desc") => Ok(Order::Newest),
            Some("asc") => Ok(Order::Oldest),
            Some(other) => Err(invalid(
                "order",
                format!("order must be asc or desc, got {other:?}"),
            )),
        }
    }

    /// `name[key]=value` pairs.
    pub fn map(&self, name: &str) -> Vec<(String, String)> {
        let key = |full: &str| {
            Some(
                full.strip_prefix(name)?
                    .strip_prefix('[')?
                    .strip_suffix(']')?
                    .to_owned(),
            )
        };
        self.0
            .iter()
            .filter_map(|(full, value)| Some((key(full)?, value.clone())))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use prost::Message;
    use tandem_core::protobuf::tree_bytes;
    use tandem_openapi::tinker::proto::{Chunk, Datum, ForwardBackwardRequest, Tensor};

    use super::{FORWARD_BACKWARD, Pairs, from_json};

    #[derive(Debug, Deserialize)]
    struct Request {
        #[expect(dead_code, reason = "only its type matters")]
        model: String,
        #[serde(default)]
        #[expect(dead_code, reason = "only its type matters")]
        list: Vec<u32>,
    }

    #[test]
    fn a_wrong_body_is_named() {
        let cases: [(&[u8], Option<&str>, &str); 10] = [
            (b"", None, "HINT"),
            (b"[\"m\"]", None, "begin with"),
            (b"{", None, "HINT"),
            (b"{\"model\": \"\xff\"}", None, "HINT"),
            (b"{\"model\": \"\\ud800\"}", None, "HINT"),
            (b"{\"model\": \"m\", \"list\": [1e999]}", None, "HINT"),
            (b"{\"model\": \"m\"} x", None, "HINT"),
            (b"{}", Some("model"), "Missing required parameter: 'model'."),
            (b"{\"model\": 3}", Some("model"), "expected a string"),
            (b"{\"model\": \"m\", \"list\": [1, -2]}", Some("list[1]"), "-2"),
        ];
        for (body, param, text) in cases {
            let error = from_json::<Request>(body).unwrap_err().body().error;
            assert_eq!(error.param.as_deref(), param, "{}", error.message);
            assert!(error.message.contains(text), "{:?} lacks {text:?}", error.message);
        }
        let deep = [b"{\"model\": \"m\", \"x\": ".as_slice(), &b"[".repeat(10_000)].concat();
        assert!(from_json::<Request>(&deep).is_err());
        assert!(from_json::<Request>(b" {\"model\": \"m\", \"other\": null}").is_ok());
    }

    #[test]
    fn what_a_call_takes_is_known_before_it_is_read() {
        let input = |n: u8| (format!("target{n}"), Tensor::default());
        let datum = Datum {
            model_input: vec![Chunk::default(); 3],
            loss_fn_inputs: (0..2).map(input).collect(),
        };
        let request = ForwardBackwardRequest {
            model_id: "m".to_owned(),
            seq_id: 300,
            data: vec![datum; 200],
            loss_fn_config: [("a".to_owned(), 1.0)].into(),
            ..ForwardBackwardRequest::default()
        };
        let body = request.encode_to_vec();
        let of_datum = 2 * (size_of::<Datum>() + 3 * size_of::<Chunk>() + 2 * 1024);
        assert_eq!(
            tree_bytes(&body, FORWARD_BACKWARD),
            body.len() + 200 * of_datum + 2 * 1024
        );
    }

    #[test]
    fn queries_are_read() {
        let query = Pairs(vec![
            ("limit".into(), "7".into()),
            ("metadata[a b]".into(), "c".into()),
        ]);
        assert_eq!(query.integer("limit", 1..=10, 3).unwrap(), 7);
        assert!(query.integer("limit", 1..=6, 3).is_err());
        assert_eq!(query.integer("other", 1..=6, 3).unwrap(), 3);
        assert_eq!(query.map("metadata"), [("a b".to_owned(), "c".to_owned())]);
    }
}
