//! Keeps the lease of one job while somebody here works on it, and hears through it that the job is to end or to pause.
//! Not here: the work.

use std::time::Instant;

use tandem_core::replica::Command;
use tandem_store::{Asked, Lease, Renewal};
use tokio::sync::{mpsc, watch};

use crate::Router;

/// The lease is renewed until this is dropped or it is lost.
pub(crate) struct Keeper {
    lost: watch::Receiver<bool>,
    /// Closes with it. The task ends behind what it is writing.
    _stop: watch::Sender<()>,
}

impl Keeper {
    /// `replica`: who trains the job, to be told when it is to end or to pause.
    pub fn new(router: &Router, id: &str, lease: Lease, replica: Option<mpsc::Sender<Command>>) -> Keeper {
        let (sender, lost) = watch::channel(false);
        let (stop, stopped) = watch::channel(());
        let kept = keep(router.clone(), id.to_owned(), lease, replica, stopped);
        tokio::spawn(async move {
            kept.await;
            // Whoever worked may be gone already.
            let _ = sender.send(true);
        });
        Keeper { lost, _stop: stop }
    }

    /// When the job is somebody else's.
    pub async fn lost(&mut self) {
        // A task that ended without a word panicked: nobody renews.
        let _ = self.lost.wait_for(|&lost| lost).await;
    }
}

/// Until the lease is lost, or nobody needs it any more.
async fn keep(
    router: Router,
    id: String,
    lease: Lease,
    replica: Option<mpsc::Sender<Command>>,
    mut stopped: watch::Receiver<()>,
) {
    let store = &router.0.store;
    let mut asked_for = router.0.desk.asked.subscribe();
    let mut held_until = Instant::now() + store.lease_time();
    loop {
        asked_for.mark_unchanged();
        let renewed_at = Instant::now();
        match store.renew_lease(&id, lease).await {
            Ok(Renewal::Held { asked }) => {
                held_until = renewed_at + store.lease_time();
                if let (Some(replica), Ok(id)) = (&replica, id.parse()) {
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
                tracing::info!(job = id, epoch = lease.epoch(), "the job is no longer ours");
                return;
            }
            Err(error) if Instant::now() >= held_until => {
                tracing::error!(job = id, %error, "the lease ran out: the store did not answer in time");
                return;
            }
            Err(error) => tracing::warn!(job = id, %error, "the lease is not renewed; trying again"),
        }
        tokio::select! {
            _ = stopped.changed() => return,
            // Either is a reason to look.
            _ = tokio::time::timeout(store.renewal_period(), asked_for.changed()) => {}
        }
    }
}
