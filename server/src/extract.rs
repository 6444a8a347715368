//! Bodies, paths and queries out of requests, with every refusal in the envelope (axum's own answer in plain text).
//! Not here: what the values mean.

use std::ops::RangeInclusive;
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use futures::StreamExt;
use serde::de::DeserializeOwned;

use crate::error::{ApiError, invalid};

/// A JSON body at most: a long prompt as token ids, with room.
pub const JSON_LIMIT_BYTES: u64 = 32 << 20;
/// An uploaded file at most.
pub const FILE_LIMIT_BYTES: u64 = 512 << 20;
/// See [`drain`].
const DRAIN_LIMIT_BYTES: u64 = 64 << 20;
pub const DRAIN_TIME: Duration = Duration::from_secs(5);

/// A JSON body. The content type is not looked at: half of all clients get it wrong, and nothing else could be meant.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Json<T>, ApiError> {
        let (parts, body) = request.into_parts();
        let bytes = read(&parts.headers, body, JSON_LIMIT_BYTES).await?;
        from_json(&bytes).map(Json)
    }
}

/// Announced and actual size are both held against the limit.
async fn read(headers: &HeaderMap, body: Body, limit_bytes: u64) -> Result<Vec<u8>, ApiError> {
    let mut chunks = body.into_data_stream();
    let announced = announced_bytes(headers);
    if announced.is_some_and(|bytes| bytes > limit_bytes) {
        drain(chunks);
        return Err(ApiError::TooLarge { limit_bytes });
    }
    let mut bytes = Vec::with_capacity(announced.unwrap_or(0) as usize);
    while let Some(chunk) = chunks.next().await {
        let chunk: Bytes = chunk.map_err(|error| ApiError::Body(error.to_string()))?;
        if (bytes.len() + chunk.len()) as u64 > limit_bytes {
            drain(chunks);
            return Err(ApiError::TooLarge { limit_bytes });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

pub fn announced_bytes(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads and drops the rest of a refused body in the background, up to [`DRAIN_LIMIT_BYTES`] and [`DRAIN_TIME`], so
/// that a client that is still writing reads the answer and not a reset connection.
pub fn drain(mut chunks: BodyDataStream) {
    let rest = async move {
        let mut left = DRAIN_LIMIT_BYTES;
        while let Some(Ok(chunk)) = chunks.next().await {
            match left.checked_sub(chunk.len() as u64) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    tokio::spawn(tokio::time::timeout(DRAIN_TIME, rest));
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

/// The same for a part of a body that was set aside as JSON.
pub fn from_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(named)
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

/// The query's pairs, in order. Names that no route knows are ignored.
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

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Body {
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
            let error = from_json::<Body>(body).unwrap_err().body().error;
            assert_eq!(error.param.as_deref(), param, "{}", error.message);
            assert!(error.message.contains(text), "{:?} lacks {text:?}", error.message);
        }
        let deep = [b"{\"model\": \"m\", \"x\": ".as_slice(), &b"[".repeat(10_000)].concat();
        assert!(from_json::<Body>(&deep).is_err());
        assert!(from_json::<Body>(b" {\"model\": \"m\", \"other\": null}").is_ok());
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
