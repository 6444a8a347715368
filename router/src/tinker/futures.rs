//! Results that clients come back for. A call is answered at once by a future's id; what becomes of it is kept until it has
//! been fetched, and a while longer, because an answer can be lost on its way. Not here: what is computed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tandem_store::Tenant;
use tokio::sync::watch;

use super::Outcome;

/// How long a result that was fetched can be fetched again.
const KEPT_AFTER_FETCH: Duration = Duration::from_secs(120);
/// How long a result waits for who asked.
const KEPT: Duration = Duration::from_secs(30 * 60);

#[derive(Default)]
pub(crate) struct Futures(Mutex<HashMap<String, Arc<Future>>>);

pub(crate) struct Future {
    pub tenant: Tenant,
    outcome: watch::Sender<Option<Arc<Outcome>>>,
    times: Mutex<Times>,
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
        let future = Arc::new(Future {
            tenant: tenant.clone(),
            outcome: watch::Sender::new(None),
            times: Mutex::default(),
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

    /// At most `most` results wait; beyond, the oldest go.
    pub fn sweep(&self, most: usize) {
        let mut all = self.all();
        all.retain(|_, future| !future.is_over());
        if all.len() > most {
            let done = |(id, future): (&String, &Arc<Future>)| Some((lock(&future.times).done?, id.clone()));
            let mut done: Vec<(Instant, String)> = all.iter().filter_map(done).collect();
            done.sort_unstable();
            let too_many = all.len() - most;
            for (_, id) in done.into_iter().take(too_many) {
                all.remove(&id);
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Arc<Future>>> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
