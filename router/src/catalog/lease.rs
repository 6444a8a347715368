//! Sequences that came in, as long as they live; and those whose client does not read meanwhile.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tandem_core::id::{AdapterDigest, RequestId};
use tokio::sync::oneshot;

use super::Catalog;
use crate::api::Client;

/// `n` admitted sequences of one model; they end when this is dropped.
pub(crate) struct Lease {
    pub adapter: Option<AdapterDigest>,
    pub(super) client: Client,
    pub(super) ids: Range<u64>,
    pub(super) catalog: Arc<Catalog>,
}

impl Lease {
    pub fn client(&self) -> &Client {
        &self.client
    }
}

/// Sequences whose client does not read: they keep no place from others until this is dropped.
pub(crate) struct Parked<'a> {
    lease: &'a Lease,
    number: u64,
    full: oneshot::Receiver<()>,
}

impl Parked<'_> {
    /// When too many are parked, and none longer than this.
    pub async fn crowded_out(&mut self) {
        // The sender goes only with this, or to tell it.
        let _ = (&mut self.full).await;
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        let Lease { client, catalog, .. } = self.lease;
        catalog.parked().remove(&self.number);
        catalog.join(client, self.lease.n());
    }
}

impl Lease {
    fn n(&self) -> u32 {
        u32::try_from(self.ids.end - self.ids.start).expect("n was a u32")
    }

    pub fn park(&self) -> Parked<'_> {
        let catalog = &self.catalog;
        catalog.leave(&self.client, self.n());
        let number = catalog.parkings.fetch_add(1, Ordering::Relaxed);
        let (tell, full) = oneshot::channel();
        let mut parked = catalog.parked();
        parked.insert(number, tell);
        if parked.len() > catalog.max_parked
            && let Some((_, longest)) = parked.pop_first()
        {
            // It may have gone on just now.
            let _ = longest.send(());
        }
        drop(parked);
        Parked {
            lease: self,
            number,
            full,
        }
    }

    pub fn ids(&self) -> impl Iterator<Item = RequestId> + use<> {
        self.ids.clone().map(RequestId)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        for id in self.ids() {
            self.catalog.live.remove(&id);
        }
        self.catalog.leave(&self.client, self.n());
        if self
            .adapter
            .is_some_and(|digest| self.catalog.unnamed().retired.contains(&digest))
        {
            self.catalog.retiring.notify_one();
        }
    }
}
