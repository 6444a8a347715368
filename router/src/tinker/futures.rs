//! Results that clients come back for. A call is answered at once by a future's id; what becomes of it is kept until it has
//! been fetched, and a while longer, because an answer can be lost on its way. Not here: what is computed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tandem_store::Tenant;
use tokio::sync::watch;

use super::Outcome;

/// How long a result that was fetched can be fetched again.
const KEPT_AFTER_FETCH: Duration = Duration::from_secs(120);
/// How long a result waits for who asked.
const KEPT: Duration = Duration::from_secs(30 * 60);
/// Bytes of all results that wait. A tenant's take as much room as they leave free; beyond, its oldest go.
const MAX_BYTES: usize = 1 << 30;
/// What a result takes beside its numbers.
const OVERHEAD_BYTES: usize = 1 << 10;
/// After so many bytes of new results it is looked whether there are too many.
const LOOK_BYTES: usize = 32 << 20;

#[derive(Default)]
pub(crate) struct Futures {
    all: Mutex<HashMap<String, Arc<Future>>>,
    /// Since it was looked.
    fresh_bytes: Arc<AtomicUsize>,
}

pub(crate) struct Future {
    pub tenant: Tenant,
    outcome: watch::Sender<Option<Arc<Outcome>>>,
    times: Mutex<Times>,
    bytes: AtomicUsize,
    fresh_bytes: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Times {
    done: Option<Instant>,
    fetched: Option<Instant>,
}

/// The side that does the work.
pub(crate) struct Promise(Arc<Future>);

impl Promise {
    pub fn keep(self, outcome: Outcome) {
        self.0.set(outcome);
    }
}

impl Drop for Promise {
    /// Nobody is left waiting for what nobody does any more.
    fn drop(&mut self) {
        if self.0.outcome.borrow().is_none() {
            let lost = "the call was given up: its session has ended, or the server stops";
            self.0.set(Outcome::server_failed(lost));
        }
    }
}

impl Future {
    fn set(&self, outcome: Outcome) {
        lock(&self.times).done = Some(Instant::now());
        let bytes = OVERHEAD_BYTES + outcome.bytes();
        self.bytes.store(bytes, Ordering::Relaxed);
        self.fresh_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.outcome.send_replace(Some(Arc::new(outcome)));
    }

    /// `None`: not within `patience`.
    pub async fn outcome(&self, patience: Duration) -> Option<Arc<Outcome>> {
        let mut outcome = self.outcome.subscribe();
        let done = tokio::time::timeout(patience, outcome.wait_for(Option::is_some)).await;
        // The sender is this future's own.
        let done = done.ok()?.ok()?.clone();
        lock(&self.times).fetched = Some(Instant::now());
        done
    }

    fn is_over(&self) -> bool {
        let times = lock(&self.times);
        let since = |moment: Option<Instant>, kept| moment.is_some_and(|moment| moment.elapsed() > kept);
        since(times.fetched, KEPT_AFTER_FETCH) || since(times.done, KEPT)
    }
}

impl Futures {
    pub fn promise(&self, id: &str, tenant: &Tenant) -> Promise {
        if self.fresh_bytes.load(Ordering::Relaxed) > LOOK_BYTES {
            self.sweep_to(MAX_BYTES, 0);
        }
        let future = Arc::new(Future {
            tenant: tenant.clone(),
            outcome: watch::Sender::new(None),
            times: Mutex::default(),
            bytes: AtomicUsize::new(OVERHEAD_BYTES),
            fresh_bytes: self.fresh_bytes.clone(),
        });
        self.all().insert(id.to_owned(), future.clone());
        Promise(future)
    }

    pub fn get(&self, id: &str) -> Option<Arc<Future>> {
        self.all().get(id).cloned()
    }

    /// It was never promised to anybody.
    pub fn forget(&self, id: &str) {
        self.all().remove(id);
    }

    pub fn has(&self, id: &str) -> bool {
        self.all().contains_key(id)
    }

    /// `most` results fill the room, however small they are.
    pub fn sweep(&self, most: usize) {
        self.sweep_to(MAX_BYTES, MAX_BYTES / most.max(1));
    }

    fn sweep_to(&self, max_bytes: usize, least_bytes: usize) {
        let taken = |future: &Future| future.bytes.load(Ordering::Relaxed).max(least_bytes);
        self.fresh_bytes.store(0, Ordering::Relaxed);
        let mut all = self.all();
        all.retain(|_, future| !future.is_over());
        let mut total = 0;
        let mut tenants: HashMap<Tenant, usize> = HashMap::new();
        for future in all.values() {
            let bytes = taken(future);
            total += bytes;
            *tenants.entry(future.tenant.clone()).or_default() += bytes;
        }
        let mut tenants: Vec<(Tenant, usize)> = tenants.into_iter().collect();
        tenants.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        for (tenant, mut own) in tenants {
            // The others have less, which fits as well.
            if own <= max_bytes.saturating_sub(total) {
                return;
            }
            let done = |(id, future): (&String, &Arc<Future>)| Some((lock(&future.times).done?, id.clone()));
            let of_tenant = all.iter().filter(|(_, future)| future.tenant == tenant);
            let mut done: Vec<(Instant, String)> = of_tenant.filter_map(done).collect();
            done.sort_unstable();
            for (_, id) in done {
                if own <= max_bytes.saturating_sub(total) {
                    break;
                }
                let gone = all.remove(&id).map_or(0, |future| taken(&future));
                (own, total) = (own - gone, total - gone);
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Arc<Future>>> {
        lock(&self.all)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What one leaves, others keep.
    #[test]
    fn results_of_one_tenant_push_out_none_of_another() {
        let futures = Futures::default();
        let tenants: [Tenant; 2] = ["greedy", "modest"].map(|name| name.parse().unwrap());
        let keep = |id: String, tenant| futures.promise(&id, tenant).keep(Outcome::user_failed(""));
        keep("m".to_owned(), &tenants[1]);
        let waits = futures.promise("waits", &tenants[0]);
        for n in 0..20 {
            keep(format!("g{n:02}"), &tenants[0]);
        }
        futures.sweep_to(11 * OVERHEAD_BYTES, 0);
        let mut left: Vec<String> = futures.all().keys().cloned().collect();
        left.sort_unstable();
        assert_eq!(left, ["g16", "g17", "g18", "g19", "m", "waits"]);
        drop(waits);
    }
}
