//! Who asks: the keys that open this server, and whether a request shows one of them. Keys come from the command line (of
//! the default tenant, with every right) and from the database (`tandem keys`), which is looked at again and again, so that
//! a key that is made or revoked counts within [`PERIOD`]. Not here: what a key opens (access), where options are read from.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use tandem_core::id::Digest;
use tandem_router::View;
use tandem_router::api::{Client, Meter, Reach, Work};
use tandem_store::{KEY_PREFIX, KeyRow, Keys, Role, StoreError, Tenant, key_hash};

use crate::access_log::Exchange;
use crate::app::{App, now};
use crate::connection::ConnectionId;

/// How long a change of the database's keys may stay unseen. While the database is away, the keys of before count.
pub const PERIOD: Duration = Duration::from_secs(2);

/// Why a text cannot be a key. It never shows the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    #[error(
        "is empty: give a key, or leave the option (or the variable TANDEM_API_KEY) away to serve everybody without one"
    )]
    Empty,
    #[error("holds a control character, which no HTTP header can carry")]
    Control,
}

/// What a key is known by, and what it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub id: String,
    pub name: String,
    pub tenant: Tenant,
    pub role: Role,
    pub meter: Option<Meter>,
    expires_at: Option<i64>,
}

/// The keys that open something. Keys are looked up by their SHA-256, so that how long it takes says nothing of a key.
#[derive(Clone)]
pub struct Ring(Arc<Inner>);

struct Inner {
    given: HashMap<Digest, Grant>,
    stored: RwLock<Stored>,
}

#[derive(Default)]
struct Stored {
    /// There are rows, though perhaps none that opens: a server whose last key was revoked is not open to all.
    any: bool,
    grants: HashMap<Digest, Grant>,
}

impl Ring {
    /// Space around a key goes, and the newline with which files and secrets end.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Result<Ring, BadKey> {
        let mut given = HashMap::new();
        for (i, key) in keys.into_iter().enumerate() {
            let key = match key.trim() {
                "" => return Err(BadKey::Empty),
                key if key.chars().any(char::is_control) => return Err(BadKey::Control),
                key => key,
            };
            let grant = Grant {
                id: format!("given-{}", i + 1),
                name: "--api-key".to_owned(),
                tenant: Tenant::default(),
                role: Role::Admin,
                meter: None,
                expires_at: None,
            };
            given.insert(key_hash(key.as_bytes()), grant);
        }
        Ok(Ring(Arc::new(Inner {
            given,
            stored: RwLock::default(),
        })))
    }

    /// Whether a request must show a key. Without one, whoever comes is the default tenant and may do everything.
    pub fn is_wanted(&self) -> bool {
        !self.0.given.is_empty() || self.stored().any
    }

    pub fn find(&self, key: &[u8]) -> Option<Grant> {
        let hash = key_hash(key);
        let stored = self.stored();
        let grant = self.0.given.get(&hash).or_else(|| stored.grants.get(&hash))?;
        let ended = grant.expires_at.is_some_and(|end| end <= now());
        (!ended).then(|| grant.clone())
    }

    fn stored(&self) -> std::sync::RwLockReadGuard<'_, Stored> {
        self.0.stored.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The database's keys as they are now.
    pub async fn take(&self, keys: &Keys) -> Result<(), StoreError> {
        let rows = keys.list().await?;
        let any = !rows.is_empty();
        // What was used stays used, whatever else changed.
        let known: HashMap<Digest, Meter> = {
            let grants = &self.stored().grants;
            let meters = grants
                .iter()
                .filter_map(|(hash, grant)| Some((*hash, grant.meter.clone()?)));
            meters.collect()
        };
        let grant = |row: KeyRow| {
            let KeyRow {
                id,
                hash,
                name,
                tenant,
                role,
                limits,
                created_at: _,
                expires_at,
                revoked_at: _,
            } = row;
            let meter = known.get(&hash).filter(|meter| meter.limits() == limits);
            let grant = Grant {
                meter: meter.cloned().or_else(|| Meter::new(&id, limits)),
                id,
                name,
                tenant,
                role,
                expires_at,
            };
            (hash, grant)
        };
        let opening = rows.into_iter().filter(|row| row.revoked_at.is_none());
        let grants = opening.map(grant).collect();
        *self.0.stored.write().unwrap_or_else(PoisonError::into_inner) = Stored { any, grants };
        Ok(())
    }

    /// As long as the server runs.
    pub async fn follow(self, keys: Keys) {
        let mut seen = None;
        let mut quiet = false;
        loop {
            let looked = async {
                let changes = keys.changes().await?;
                if seen != Some(changes) {
                    self.take(&keys).await?;
                    seen = Some(changes);
                }
                Ok::<_, StoreError>(())
            };
            let looked = looked.await;
            // Once per outage.
            if let (Err(error), false) = (&looked, quiet) {
                tracing::warn!(%error, "cannot see whether keys changed; those of before count");
            }
            quiet = looked.is_err();
            tokio::time::sleep(PERIOD).await;
        }
    }
}

/// Who asks, by the key it shows, whether one is wanted or not.
pub struct Asker(pub Client);

impl<S: Sync> FromRequestParts<S> for Asker {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Asker, Infallible> {
        // A line of a batch comes from within.
        if let Some(client) = parts.extensions.get::<Client>() {
            return Ok(Asker(client.clone()));
        }
        // The same on every router, so that a backend sees one key in what comes from several.
        let of = |key: &[u8]| *key_hash(key).0.first_chunk().expect("a digest has 32 bytes");
        let key = given_key(&parts.headers).map(|key| u64::from_le_bytes(of(key)));
        let connection = parts.extensions.get().copied().unwrap_or(ConnectionId(0));
        let (tenant, role, meter) = match parts.extensions.get::<Grant>() {
            Some(grant) => (grant.tenant.clone(), grant.role, grant.meter.clone()),
            // No key is wanted.
            None => (Tenant::default(), Role::Admin, None),
        };
        Ok(Asker(Client {
            tenant,
            reach: match role {
                Role::Admin => Reach::All,
                Role::Infer | Role::Train => Reach::Own,
            },
            key: key.unwrap_or_default(),
            connection: connection.0,
            work: Work::Live,
            meter,
            trace: Exchange::current().and_then(|exchange| exchange.trace()),
        }))
    }
}

/// Files, jobs and models of whoever asks.
pub struct Own(pub View);

impl FromRequestParts<App> for Own {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Own, Infallible> {
        let Asker(client) = Asker::from_request_parts(parts, app).await?;
        Ok(Own(app.router.of(&client)))
    }
}

/// OpenAI's clients send a bearer token, Anthropic's older ones and Tinker's `x-api-key`. Tinker's SDK takes no key but those
/// that begin with `tml-`: before one of ours that is not part of it.
pub fn given_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    bearer.or_else(|| {
        let key = headers.get("x-api-key")?.as_bytes();
        let ours = key
            .strip_prefix(b"tml-")
            .filter(|key| key.starts_with(KEY_PREFIX.as_bytes()));
        Some(ours.unwrap_or(key))
    })
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    #[test]
    fn a_key_is_read_where_clients_put_it() {
        let headers = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])
        };
        for (headers, expected) in [
            (headers("authorization", "Bearer k"), Some("k")),
            (headers("authorization", "bearer  k "), Some("k")),
            (headers("authorization", "Basic k"), None),
            (headers("x-api-key", "k"), Some("k")),
            (headers("x-api-key", "tml-k"), Some("tml-k")),
            (headers("x-api-key", "tml-sk-tandem-k"), Some("sk-tandem-k")),
            (HeaderMap::new(), None),
        ] {
            assert_eq!(given_key(&headers), expected.map(str::as_bytes));
        }
    }

    #[test]
    fn keys_are_trimmed_and_never_empty() {
        for (keys, given, expected) in [
            (&["one", "two"][..], "two", Ok(true)),
            (&["one", "two"], "three", Ok(false)),
            (&["sekret"], "sekre", Ok(false)),
            (&["sekret"], "sekrets", Ok(false)),
            (&["sekret"], "", Ok(false)),
            // As a secret's file ends.
            (&["one\n"], "one", Ok(true)),
            (&[" one\r\n"], "one", Ok(true)),
            (&[""], "", Err(BadKey::Empty)),
            (&["\n"], "", Err(BadKey::Empty)),
            (&["one", " "], "one", Err(BadKey::Empty)),
            (&["one\ntwo"], "one", Err(BadKey::Control)),
        ] {
            let ring = Ring::new(keys.iter().copied());
            let fits = ring.map(|ring| ring.is_wanted() && ring.find(given.as_bytes()).is_some());
            assert_eq!(fits, expected, "{keys:?}");
        }
        assert!(!Ring::new([]).expect("no keys are no mistake").is_wanted());
    }
}
