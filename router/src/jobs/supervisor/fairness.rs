//! Tenants take turns for the places of training: where all are taken, who has several gives one to who has fewer.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::Router;
use crate::api::RouterError;

/// How long a tenant's last job is trained before it makes room for that of a tenant of whom none is.
const TURN: Duration = Duration::from_secs(600);
/// Between two looks whether somebody is to make room, and between two words to a replica that has not heard.
pub(super) const FAIR: Duration = Duration::from_secs(2);

/// A job in training here.
pub(super) struct Held {
    tenant: String,
    since: Instant,
    /// It is to be kept and to wait again.
    gives_up: watch::Sender<bool>,
}

impl Held {
    /// And what tells whether it is to give up its place, for [`give_up`].
    pub fn new(tenant: String) -> (Held, watch::Receiver<bool>) {
        let (gives_up, to_give_up) = watch::channel(false);
        let held = Held {
            tenant,
            since: Instant::now(),
            gives_up,
        };
        (held, to_give_up)
    }
}

/// Where every place is taken and a tenant waits who has fewer than another, the other's newest job gives up its own. Where that is
/// the other's last one, after its turn.
pub(super) async fn share_places(
    router: &Router,
    held: &mut HashMap<String, Held>,
) -> Result<(), RouterError> {
    let is_over = held.values().any(|held| *held.gives_up.borrow());
    if held.is_empty() || is_over || router.job_seat().is_some() {
        return Ok(());
    }
    let of_tenants = router.0.store.jobs_of_tenants(router.info().base_digest).await?;
    let waiting = of_tenants.iter().filter(|(_, waiting, _)| *waiting > 0);
    let Some(fewest) = waiting.map(|(_, _, trained)| *trained).min() else {
        return Ok(());
    };
    let trained: HashMap<&str, u64> = of_tenants
        .iter()
        .map(|(tenant, _, trained)| (tenant.as_str(), *trained))
        .collect();
    let rich = held.iter().filter(|(_, held)| {
        let trained = trained.get(held.tenant.as_str()).copied().unwrap_or(0);
        trained > fewest + 1 || trained > fewest && held.since.elapsed() >= TURN
    });
    let newest = rich.max_by_key(|(_, held)| (trained.get(held.tenant.as_str()), held.since));
    if let Some((id, held)) = newest {
        tracing::info!(job = id, "the job gives up its place to another tenant's");
        held.gives_up.send_replace(true);
    }
    Ok(())
}

/// Returns when it is to be said that the job gives up its place: again and again.
pub(super) async fn give_up(to_give_up: &mut watch::Receiver<bool>) {
    if *to_give_up.borrow_and_update() {
        tokio::time::sleep(FAIR).await;
    }
    if to_give_up.wait_for(|&gives_up| gives_up).await.is_err() {
        std::future::pending().await
    }
}
