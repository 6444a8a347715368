//! What the router does beside requests, each in a task of its own as long as the router lives. A task that panics is
//! begun again after a pause that grows, and the router says so meanwhile. Not here: what they do.

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use tokio::task::{JoinError, JoinHandle};

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A task that ran this long is well again.
const CALM: Duration = Duration::from_secs(60);

/// Tasks that panicked and wait to be begun again. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Down(Arc<Mutex<BTreeSet<&'static str>>>);

impl Down {
    pub fn names(&self) -> Vec<&'static str> {
        self.lock().iter().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<&'static str>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins `run`, and begins it again whenever it panics.
    pub fn supervise<F>(&self, name: &'static str, run: impl Fn() -> F + Send + 'static) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let down = self.clone();
        tokio::spawn(async move {
            let mut pause = FIRST_PAUSE;
            loop {
                let began = Instant::now();
                // What it worked on is in the store, and is read again.
                let Err(panic) = AssertUnwindSafe(run()).catch_unwind().await else {
                    return;
                };
                if began.elapsed() > CALM {
                    pause = FIRST_PAUSE;
                }
                let why = said(panic.as_ref());
                tracing::error!(task = name, why, again_in = ?pause, "a task panicked; it is begun again");
                down.lock().insert(name);
                tokio::time::sleep(pause).await;
                down.lock().remove(name);
                pause = (2 * pause).min(LONGEST_PAUSE);
            }
        })
    }
}

/// What a task of one of them came to; its panic goes on here. `None`: it was aborted.
pub fn joined<T>(done: Result<T, JoinError>) -> Option<T> {
    match done.map_err(JoinError::try_into_panic) {
        Ok(done) => Some(done),
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        Err(Err(_aborted)) => None,
    }
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied())
        .unwrap_or("it did not say why")
}
