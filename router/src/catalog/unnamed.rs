//! Adapters that no name points to: held by who is about to name them, pinned by live requests, or free to go. Not here: deleting
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tandem_core::id::AdapterDigest;
use tandem_store::NameRow;

use super::{Catalog, is_named};

/// Adapters in the store that no name may point to.
#[derive(Default)]
pub(super) struct Unnamed {
    /// How many are about to name each.
    pub(super) held: BTreeMap<AdapterDigest, u32>,
    /// Lost their last name, or never got one; go when nobody holds them and no live request pins them.
    pub(super) retired: BTreeSet<AdapterDigest>,
    /// Being deleted.
    pub(super) leaving: BTreeSet<AdapterDigest>,
}

/// As long as it lives nobody deletes the adapter, though no name points to it yet. If none does then, it retires.
pub(crate) struct Hold {
    pub digest: AdapterDigest,
    catalog: Arc<Catalog>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let names = self.catalog.read();
        let mut unnamed = self.catalog.unnamed();
        let held = unnamed.held.get_mut(&self.digest).expect("it is held by this");
        *held -= 1;
        if *held == 0 {
            unnamed.held.remove(&self.digest);
        }
        if !is_named(&names, self.digest) {
            unnamed.retired.insert(self.digest);
            self.catalog.retiring.notify_one();
        }
    }
}

/// An adapter that its owner deletes. Whoever wants to hold it waits until this is dropped.
pub(crate) struct Leaving {
    pub digest: AdapterDigest,
    catalog: Arc<Catalog>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.catalog.unnamed().leaving.remove(&self.digest);
        self.catalog.gone.notify_waiters();
    }
}

impl Catalog {
    /// For who is about to name an adapter, or to look whether it is in the store.
    pub async fn hold(self: &Arc<Catalog>, digest: AdapterDigest) -> Hold {
        loop {
            // Made before the look, so that it hears of an end right after it.
            let gone = self.gone.notified();
            {
                let mut unnamed = self.unnamed();
                if !unnamed.leaving.contains(&digest) {
                    *unnamed.held.entry(digest).or_default() += 1;
                    let catalog = self.clone();
                    return Hold { digest, catalog };
                }
            }
            gone.await;
        }
    }

    /// When an adapter may have become free to go.
    pub async fn retiring(&self) {
        self.retiring.notified().await;
    }

    /// Retired adapters that nothing pins, for the caller to delete.
    pub fn take_free(self: &Arc<Catalog>) -> Vec<Leaving> {
        // Also held by `admit` from name to live entry.
        let names = self.write();
        let pinned: BTreeSet<AdapterDigest> = self.live.iter().filter_map(|entry| *entry.value()).collect();
        let mut unnamed = self.unnamed();
        let Unnamed {
            held,
            retired,
            leaving,
        } = &mut *unnamed;
        retired.retain(|digest| !is_named(&names, *digest));
        let is_used = |digest: &AdapterDigest| pinned.contains(digest) || held.contains_key(digest);
        let free: Vec<AdapterDigest> = retired
            .iter()
            .copied()
            .filter(|digest| !is_used(digest))
            .collect();
        retired.retain(is_used);
        leaving.extend(&free);
        let leave = |digest| Leaving {
            digest,
            catalog: self.clone(),
        };
        free.into_iter().map(leave).collect()
    }

    /// Adapters without a name that requests, waiting or running, still have.
    pub fn used_unnamed(&self) -> BTreeSet<AdapterDigest> {
        let names = self.read();
        let live: BTreeSet<AdapterDigest> = self.live.iter().filter_map(|entry| *entry.value()).collect();
        let held = self.unnamed().held.keys().copied().collect();
        let used = live.union(&held).copied();
        used.filter(|digest| !is_named(&names, *digest)).collect()
    }

    pub(super) fn retire_unnamed(&self, names: &BTreeMap<String, NameRow>, old: Option<NameRow>) {
        let Some(old) = old else { return };
        if !is_named(names, old.digest) {
            self.unnamed().retired.insert(old.digest);
            self.retiring.notify_one();
        }
    }
}
