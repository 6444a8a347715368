//! Keeps the lease of one job or batch while somebody here works on it, and hears through it that it is to end or to pause.
//! Not here: the work.

use std::time::Instant;

use tandem_core::replica::Command;
use tandem_store::{Asked, Lease, Renewal};
use tokio::sync::{mpsc, watch};

use crate::Router;

/// The lease is renewed until this is dropped or it is lost.
pub(crate) struct Keeper {
    state: watch::Receiver<State>,
    /// Closes with it. The task ends behind what it is writing.
    _stop: watch::Sender<()>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Held,
    /// Somebody wants it cancelled.
    ToCancel,
    Lost,
}

/// What is kept.
enum Kept {
    /// With who trains it, to be told when it is to be cancelled.
    Job(Option<mpsc::Sender<Command>>),
    Batch,
}

impl Keeper {
    /// `replica`: who trains the job, to be told when it is to end or to pause.
    pub fn new(router: &Router, id: &str, lease: Lease, replica: Option<mpsc::Sender<Command>>) -> Keeper {
        Keeper::begin(router, id, lease, Kept::Job(replica))
    }

    pub fn of_batch(router: &Router, id: &str, lease: Lease) -> Keeper {
        Keeper::begin(router, id, lease, Kept::Batch)
    }

    fn begin(router: &Router, id: &str, lease: Lease, kept: Kept) -> Keeper {
        let (sender, state) = watch::channel(State::Held);
        let (stop, stopped) = watch::channel(());
        let (router, id) = (router.clone(), id.to_owned());
        tokio::spawn(async move {
            keep(router, id, lease, kept, &sender, stopped).await;
            sender.send_replace(State::Lost);
        });
        Keeper { state, _stop: stop }
    }

    /// When it is somebody else's.
    pub async fn lost(&mut self) {
        // A task that ended without a word panicked: nobody renews.
        let _ = self.state.wait_for(|&state| state == State::Lost).await;
    }

    /// When it is to be cancelled, or somebody else's.
    pub async fn cancelled(&mut self) {
        let _ = self.state.wait_for(|&state| state != State::Held).await;
    }

    pub fn is_lost(&self) -> bool {
        *self.state.borrow() == State::Lost || self.state.has_changed().is_err()
    }
}

/// Until the lease is lost, or nobody needs it any more.
async fn keep(
    router: Router,
    id: String,
    lease: Lease,
    kept: Kept,
    state: &watch::Sender<State>,
    mut stopped: watch::Receiver<()>,
) {
    let store = &router.0.store;
    let mut asked_for = router.0.signals.watch_asked();
    let mut held_until = Instant::now() + store.lease_time();
    loop {
        asked_for.mark_unchanged();
        let renewed_at = Instant::now();
        let renewed = match kept {
            Kept::Job(_) => store.renew_lease(&id, lease).await,
            Kept::Batch => store.renew_batch(&id, lease).await,
        };
        match renewed {
            Ok(Renewal::Held { asked }) => {
                held_until = renewed_at + store.lease_time();
                if asked == Asked::Cancel {
                    state.send_replace(State::ToCancel);
                }
                if let (Kept::Job(Some(replica)), Ok(id)) = (&kept, id.parse()) {
                    let command = match asked {
                        Asked::Nothing => None,
                        Asked::Cancel => Some(Command::CancelJob(id)),
                        Asked::Pause => Some(Command::PauseJob(id)),
                    };
                    if let Some(command) = command {
                        // A replica that is gone trains nothing. One that has not begun yet is told again.
                        let _ = replica.send(command).await;
                    }
                }
            }
            Ok(Renewal::Lost) => {
                tracing::info!(id, epoch = lease.epoch(), "a job or batch is no longer ours");
                return;
            }
            Err(error) if Instant::now() >= held_until => {
                tracing::error!(id, %error, "a lease ran out: the store did not answer in time");
                return;
            }
            Err(error) => tracing::warn!(id, %error, "a lease is not renewed; trying again"),
        }
        tokio::select! {
            _ = stopped.changed() => return,
            // Either is a reason to look.
            _ = tokio::time::timeout(store.renewal_period(), asked_for.changed()) => {}
        }
    }
}
