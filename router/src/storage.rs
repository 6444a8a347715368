//! What a tenant may store, by the key that asks: looked at before bytes are taken in and while they come. Not here: what is
//! stored (store).

use tandem_store::{Storage, StorageExceeded, StoreError};

use crate::api::{Client, RouterError};
use crate::shares::Share;
use crate::{Router, View};

/// Of an error, and of a job or a line of a batch that failed by it.
pub const STORAGE_LIMIT: &str = "storage_limit_exceeded";

/// Bytes on their way into the store: those of all uploads of a tenant together are within what is left.
pub struct Incoming(Option<(Storage, Share)>);

impl Incoming {
    /// So many have come.
    pub fn reach(&self, bytes: u64) -> Result<(), RouterError> {
        let Some((storage, share)) = &self.0 else {
            return Ok(());
        };
        let exceeded = |coming: u64| StorageExceeded {
            storage: *storage,
            wanted: coming.saturating_add(bytes),
        };
        share
            .reach(bytes, |_| storage.left())
            .map_err(|coming| StoreError::from(exceeded(coming)).into())
    }
}

impl View {
    /// An error where nothing more may come.
    pub async fn incoming(&self) -> Result<Incoming, RouterError> {
        let (router, client) = (&self.router, &self.client);
        let Some(storage) = router.check_storage(client).await? else {
            return Ok(Incoming(None));
        };
        let share = router.0.incoming.of(client.tenant.clone());
        Ok(Incoming(Some((storage, share))))
    }
}

impl Router {
    /// Whether anything more may be stored. `None`: nothing limits it.
    pub(crate) async fn check_storage(&self, client: &Client) -> Result<Option<Storage>, RouterError> {
        match client.stored_bytes() {
            None => Ok(None),
            Some(limit) => checked(Some(self.0.store.storage(&client.tenant, limit).await?)),
        }
    }

    /// The same by the id of a key.
    pub(crate) async fn check_storage_by(&self, key: Option<&str>) -> Result<Option<Storage>, RouterError> {
        checked(self.storage_by(key).await?)
    }

    pub(crate) async fn storage_by(&self, key: Option<&str>) -> Result<Option<Storage>, RouterError> {
        match key {
            None => Ok(None),
            Some(key) => Ok(self.0.store.storage_by(key).await?),
        }
    }
}

fn checked(storage: Option<Storage>) -> Result<Option<Storage>, RouterError> {
    if let Some(storage) = storage {
        storage.check(0).map_err(StoreError::from)?;
    }
    Ok(storage)
}
