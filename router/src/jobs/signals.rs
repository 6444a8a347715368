//! Where those who work on jobs and those who watch them wake each other. Not here: what they then read (the rows).

use tokio::sync::{Notify, watch};

use crate::Router;

pub(crate) struct Signals {
    /// A job was created: for `prepare`.
    pub(super) created: Notify,
    /// A job is queued: for the supervisor.
    pub(super) queued: Notify,
    /// Some job changed.
    changed: watch::Sender<()>,
    /// Somebody may want a running job to end or to pause: for its keeper.
    asked: watch::Sender<()>,
}

impl Signals {
    pub fn new() -> Signals {
        Signals {
            created: Notify::new(),
            queued: Notify::new(),
            changed: watch::Sender::new(()),
            asked: watch::Sender::new(()),
        }
    }

    /// Another router changed some job: everybody looks.
    pub fn wake_all(&self) {
        self.wake_preparer();
        self.wake_supervisor();
        self.wake_readers();
        self.wake_keepers();
    }

    pub(super) fn wake_preparer(&self) {
        self.created.notify_one();
    }

    pub fn wake_supervisor(&self) {
        self.queued.notify_one();
    }

    pub(super) fn wake_readers(&self) {
        self.changed.send_replace(());
    }

    /// Something that somebody works on may be to be cancelled.
    pub fn wake_keepers(&self) {
        self.asked.send_replace(());
    }

    /// Wakes after every change of any job.
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Wakes with the keepers.
    pub(super) fn watch_asked(&self) -> watch::Receiver<()> {
        self.asked.subscribe()
    }
}

impl Router {
    /// When there may be work: somebody says so, or another router's lease may have run out.
    pub(super) async fn wait_for(&self, work: &Notify) {
        match self.0.store.is_shared() {
            false => work.notified().await,
            true => {
                let period = self.0.store.renewal_period();
                // Either is a reason to look.
                let _ = tokio::time::timeout(period, work.notified()).await;
            }
        }
    }
}
