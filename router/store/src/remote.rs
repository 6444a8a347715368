//! The shared place for artifacts: keys in a bucket (S3 and what speaks like it) or in a folder that others see too, and
//! streams between them and local files. Not here: what the artifacts mean, the local folders.
//!
//! ```text
//! <prefix>/store.json
//!          files/<id>
//!          adapters/<digest>/{adapter_config.json, adapter_model.safetensors, README.md, complete}
//!          jobs/<id>/{train.tokens, valid.tokens}
//!          jobs/<id>/<epoch>/<step>/state.safetensors
//!          tinker/<run>/<kind>/<name>/<random>/state.safetensors
//! ```
//! An object appears whole or not at all; `complete` is written last and deleted first, so half an adapter is no adapter.

use std::io;
use std::path::Path;
use std::sync::{Arc, Once};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientConfigKey, Error, ObjectStore, ObjectStoreExt, RetryConfig};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::{StoreError, io_at};
use crate::health::{Health, Part};

/// Larger files go up in parts of this size (S3 allows 5 MiB at least), so no file is in memory whole.
const PART_BYTES: usize = 8 << 20;
/// Parts of one file in flight.
const PARTS_AT_ONCE: usize = 2;
const READ_BYTES: usize = 1 << 20;
/// A bucket that cannot be reached is an error for a request soon; a job, which can wait, tries for longer (artifacts.rs).
const RETRY_TIMEOUT: Duration = Duration::from_secs(1);
const RETRIES: usize = 3;
/// In object_store's words, each with the variable by which an operator may say otherwise. An answer that stops coming
/// for the time of a read will not come.
const TIMEOUTS: [(ClientConfigKey, &str, &str); 2] = [
    (ClientConfigKey::ConnectTimeout, "800ms", "AWS_CONNECT_TIMEOUT"),
    (ClientConfigKey::ReadTimeout, "10s", "AWS_READ_TIMEOUT"),
];

pub(crate) struct Remote {
    store: Arc<dyn ObjectStore>,
    prefix: Key,
    /// For messages.
    url: String,
    health: Health,
}

/// Chooses the cryptography of every TLS client of the process (reqwest has none of its own here). That another part of the
/// process chose before is fine.
pub fn use_ring() {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
}

impl Remote {
    /// `s3://bucket/prefix`; where and who is said by `builder`.
    pub fn bucket(url: &str, builder: AmazonS3Builder) -> Result<Remote, StoreError> {
        use_ring();
        let refused = |why: String| StoreError::Url {
            url: url.to_owned(),
            why,
        };
        let (_, place) = url
            .split_once("://")
            .ok_or_else(|| refused("it has no scheme".to_owned()))?;
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        if bucket.is_empty() {
            return Err(refused("it names no bucket".to_owned()));
        }
        let limits = TIMEOUTS
            .into_iter()
            .filter(|(_, _, variable)| std::env::var_os(variable).is_none());
        let store = limits
            .fold(builder, |builder, (key, time, _)| {
                builder.with_config(AmazonS3ConfigKey::Client(key), time)
            })
            .with_bucket_name(bucket)
            .with_retry(RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: Duration::from_millis(50),
                    max_backoff: Duration::from_millis(400),
                    base: 2.0,
                },
                max_retries: RETRIES,
                retry_timeout: RETRY_TIMEOUT,
            })
            .build()
            .map_err(|error| refused(error.to_string()))?;
        let prefix = Key::parse(prefix).map_err(|error| refused(error.to_string()))?;
        Ok(Remote {
            store: Arc::new(store),
            prefix,
            url: url.to_owned(),
            health: Health::new(Part::Storage),
        })
    }

    /// A folder that other machines or processes see as well.
    pub fn folder(folder: &Path) -> Result<Remote, StoreError> {
        let store = LocalFileSystem::new_with_prefix(folder)
            .map_err(|error| StoreError::Url {
                url: folder.display().to_string(),
                why: error.to_string(),
            })?
            .with_fsync(true)
            .with_automatic_cleanup(true);
        Ok(Remote {
            store: Arc::new(store),
            prefix: Key::default(),
            url: folder.display().to_string(),
            health: Health::new(Part::Storage),
        })
    }

    /// Ask for something that need not be there.
    pub async fn probe(&self) {
        let key = self.key(&["probe"]);
        let asked = self.store.head(&key);
        let probe = async {
            match asked.await {
                // Who may read known keys only is told "forbidden" for a key that is not there: an answer all the same.
                Ok(_)
                | Err(
                    Error::NotFound { .. } | Error::PermissionDenied { .. } | Error::Unauthenticated { .. },
                ) => Ok(()),
                Err(error) => Err(self.failed("looking for", &["probe"], error)),
            }
        };
        self.health.note(probe).await;
    }

    pub fn is_away(&self) -> bool {
        self.health.why().is_some()
    }

    /// Upload a local file under `parts`.
    pub async fn put(&self, source: &Path, parts: &[&str]) -> Result<u64, StoreError> {
        self.health.check()?;
        let mut input = File::open(source).await.map_err(io_at("opening", source))?;
        let key = self.key(parts);
        let mut output =
            BufWriter::with_capacity(self.store.clone(), key, PART_BYTES).with_max_concurrency(PARTS_AT_ONCE);
        match pour(&mut input, &mut output).await {
            Ok(bytes) => Ok(bytes),
            Err(error) => {
                // Parts that went up cost money until they are given up. There is nothing more to do if that fails.
                let what = format!("uploading {} to {}", source.display(), self.name(parts));
                if error.gave_up {
                    let _ = output.abort().await;
                }
                // The writer wraps what the store said.
                Err(match error.source.downcast::<Error>() {
                    Ok(source) => StoreError::Remote { what, source },
                    Err(source) => StoreError::Io { what, source },
                })
            }
        }
    }

    /// Write a small object.
    pub async fn mark(&self, parts: &[&str], text: &str) -> Result<(), StoreError> {
        self.health.check()?;
        let put = self.store.put(&self.key(parts), text.to_owned().into()).await;
        put.map(drop)
            .map_err(|error| self.failed("writing", parts, error))
    }

    /// Read a small object. `None`: there is no such object.
    pub async fn read(&self, parts: &[&str]) -> Result<Option<Vec<u8>>, StoreError> {
        self.health.check()?;
        let read = async { self.store.get(&self.key(parts)).await?.bytes().await };
        match read.await {
            Ok(bytes) => Ok(Some(bytes.to_vec())),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("reading", parts, error)),
        }
    }

    /// Whether there is an object under `parts`.
    pub async fn has_any(&self, parts: &[&str]) -> Result<bool, StoreError> {
        self.health.check()?;
        match self.store.list(Some(&self.key(parts))).next().await {
            None => Ok(false),
            Some(Ok(_)) => Ok(true),
            Some(Err(error)) => Err(self.failed("listing", parts, error)),
        }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Download an object into a new file, durable. `false`: there is no such object.
    pub async fn get(&self, parts: &[&str], target: &Path) -> Result<bool, StoreError> {
        self.health.check()?;
        let found = match self.store.get(&self.key(parts)).await {
            Ok(found) => found,
            Err(Error::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(self.failed("reading", parts, error)),
        };
        let writing = || io_at("writing", target);
        let mut output = File::create(target).await.map_err(io_at("making", target))?;
        let mut stream = found.into_stream();
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|error| self.failed("reading", parts, error))?;
            output.write_all(&bytes).await.map_err(writing())?;
        }
        output.flush().await.map_err(writing())?;
        output.sync_all().await.map_err(writing())?;
        Ok(true)
    }

    pub async fn has(&self, parts: &[&str]) -> Result<bool, StoreError> {
        Ok(self.size(parts).await?.is_some())
    }

    /// Bytes of an object. `None`: there is no such object.
    pub async fn size(&self, parts: &[&str]) -> Result<Option<u64>, StoreError> {
        self.health.check()?;
        match self.store.head(&self.key(parts)).await {
            Ok(found) => Ok(Some(found.size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("looking for", parts, error)),
        }
    }

    /// The objects under `parts`, each as the parts of its key.
    pub async fn list(&self, parts: &[&str]) -> Result<Vec<Vec<String>>, StoreError> {
        self.health.check()?;
        let above = self.prefix.parts().count();
        let found = self.store.list(Some(&self.key(parts)));
        let parts_of = |key: Key| {
            let parts = key.parts().skip(above);
            parts.map(|part| part.as_ref().to_owned()).collect()
        };
        let found = found.map_ok(|object| parts_of(object.location));
        found
            .try_collect()
            .await
            .map_err(|error| self.failed("listing", parts, error))
    }

    /// That it is gone already is fine.
    pub async fn delete(&self, parts: &[&str]) -> Result<(), StoreError> {
        self.health.check()?;
        match self.store.delete(&self.key(parts)).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed("deleting", parts, error)),
        }
    }

    /// Delete all objects under `parts`.
    pub async fn delete_all(&self, parts: &[&str]) -> Result<(), StoreError> {
        self.health.check()?;
        let failed = |error| self.failed("deleting", parts, error);
        let found = self.store.list(Some(&self.key(parts)));
        let keys: Vec<Key> = found
            .map_ok(|object| object.location)
            .try_collect()
            .await
            .map_err(failed)?;
        for key in keys {
            match self.store.delete(&key).await {
                Ok(()) | Err(Error::NotFound { .. }) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    fn key(&self, parts: &[&str]) -> Key {
        parts
            .iter()
            .fold(self.prefix.clone(), |key, &part| key.join(part))
    }

    fn name(&self, parts: &[&str]) -> String {
        format!("{}/{}", self.url.trim_end_matches('/'), parts.join("/"))
    }

    fn failed(&self, doing: &str, parts: &[&str], source: Error) -> StoreError {
        StoreError::Remote {
            what: format!("{doing} {}", self.name(parts)),
            source,
        }
    }
}

struct Spilled {
    source: io::Error,
    /// The upload had not been closed.
    gave_up: bool,
}

async fn pour(input: &mut File, output: &mut BufWriter) -> Result<u64, Spilled> {
    let before = |source| Spilled {
        source,
        gave_up: true,
    };
    let mut buffer = vec![0; READ_BYTES];
    let mut bytes = 0;
    loop {
        match input.read(&mut buffer).await.map_err(before)? {
            0 => break,
            n => {
                output.write_all(&buffer[..n]).await.map_err(before)?;
                bytes += n as u64;
            }
        }
    }
    output.shutdown().await.map_err(|source| Spilled {
        source,
        gave_up: false,
    })?;
    Ok(bytes)
}
