//! Looks at what is elsewhere: what other routers write to the same database (names, and everything about jobs), and
//! whether the parts of the store answer at all. Not here: who may write, what is done without a part.

use std::time::Duration;

use tandem_store::{Changes, PROBE_PERIOD, Part};

use crate::Router;

/// How long a name or a job's event of another router may stay unseen. A name that is asked for is looked up at once.
const PERIOD: Duration = Duration::from_secs(1);

/// How often a disk that was full is looked at.
const ROOM_PERIOD: Duration = Duration::from_secs(2);

/// As long as the router lives.
pub(crate) async fn run(router: Router) {
    let mut seen = Changes::default();
    let mut quiet = false;
    loop {
        tokio::time::sleep(PERIOD).await;
        let looked = look(&router, &mut seen).await;
        // Once per outage.
        if let (Err(error), false) = (&looked, quiet) {
            tracing::warn!(%error, "cannot see what other routers do; trying again");
        }
        quiet = looked.is_err();
    }
}

/// Asks the parts of the store that are elsewhere whether they answer, as long as the router lives.
pub(crate) async fn probe(router: Router) {
    loop {
        router.0.store.probe().await;
        tokio::time::sleep(PROBE_PERIOD).await;
    }
}

/// Looks for room on the disk while there is none, as long as the router lives.
pub(crate) async fn room(router: Router) {
    let store = &router.0.store;
    loop {
        tokio::time::sleep(ROOM_PERIOD).await;
        if store.away().contains(&Part::Room) {
            store.look_for_room().await;
        }
    }
}

async fn look(router: &Router, seen: &mut Changes) -> Result<(), crate::api::RouterError> {
    let found = router.0.store.changes().await?;
    if found.names != seen.names {
        router.refresh_names().await?;
    }
    if found.jobs != seen.jobs {
        router.0.signals.wake_all();
    }
    *seen = found;
    Ok(())
}
