//! A place in the fleet and how it is filled: in this process, or by a backend elsewhere.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use futures::future::BoxFuture;
use tandem_core::histogram::Histogram;
use tandem_core::replica::ReplicaHandle;
use tandem_rpc::{ClientTls, ModelFiles, Token};

/// A place in the fleet and how it is filled.
pub struct Member {
    pub(super) name: String,
    pub(super) make: Make,
}

pub(super) type Make = Box<dyn Fn() -> BoxFuture<'static, Result<Made, String>> + Send + Sync>;

/// A replica that answers, and what must be alike in all of a fleet.
pub struct Made {
    pub replica: ReplicaHandle,
    pub files: ModelFiles,
    /// What it calls the base model.
    pub model_name: String,
    /// Time from the replica to the router; a replica of this process has none.
    pub hop: Option<Arc<Histogram>>,
}

impl Member {
    /// `make` is called again, with a pause, whenever the replica it made is gone.
    pub fn new<F>(name: impl Into<String>, make: impl Fn() -> F + Send + Sync + 'static) -> Member
    where
        F: Future<Output = Result<Made, String>> + Send + 'static,
    {
        Member {
            name: name.into(),
            make: Box::new(move || Box::pin(make())),
        }
    }

    /// The backend at `url`, which is shown the token; one at `https://` by `tls`.
    pub fn remote(url: &str, token: Option<Token>, tls: Option<ClientTls>, data_dir: &Path) -> Member {
        let (address, data_dir) = (url.to_owned(), data_dir.to_owned());
        Member::new(url, move || {
            let (address, token, tls, data_dir) =
                (address.clone(), token.clone(), tls.clone(), data_dir.clone());
            async move {
                let remote = tandem_rpc::connect(&address, token.as_ref(), tls.as_ref(), &data_dir).await;
                let tandem_rpc::Remote {
                    replica,
                    files,
                    model_name,
                    hop,
                } = remote.map_err(|error| error.message)?;
                Ok(Made {
                    replica,
                    files,
                    model_name,
                    hop: Some(hop),
                })
            }
        })
    }
}
