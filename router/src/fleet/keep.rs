//! A member is made, watched, ejected when it is gone, and made again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tandem_rpc::ModelFiles;

use super::affinity::Memory;
use super::member::Made;
use super::place::{Place, State};
use super::{Facts, Inner, Phase, lock, read};

/// Between two tries to make a lost member again: the first, doubled up to the last.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// A member that lived as long begins again at the first.
const STABLE: Duration = Duration::from_secs(10);

/// Makes a member, watches it, ejects it when it is gone, and makes it again, as long as the fleet runs.
pub(super) async fn keep(fleet: Arc<Inner>, index: usize) {
    let place = &fleet.places[index];
    let mut phase = fleet.phase.subscribe();
    let mut pause = FIRST_RETRY;
    while *phase.borrow() == Phase::Runs {
        let made = (place.make)().await;
        match made.and_then(|made| fleet.agree(made)) {
            Ok(Made { replica, hop, .. }) => {
                let came = Instant::now();
                tracing::info!(
                    replica = place.name,
                    device = replica.info.device,
                    "a replica is up"
                );
                let handle = replica.clone();
                place.stops.store(false, Ordering::Release);
                place.set(State::Up(replica, hop));
                fleet.changed.send_replace(());
                handle.commands.closed().await;
                fleet.eject(place);
                if came.elapsed() > STABLE {
                    pause = FIRST_RETRY;
                }
            }
            Err(why) => {
                // Said once; it is tried for as long as it takes.
                let known = matches!(&*read(&place.state), State::Down(before) if *before == why);
                if !known {
                    tracing::warn!(replica = place.name, why, "a replica cannot be had");
                    place.set(State::Down(why));
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = phase.changed() => {}
        }
        pause = (pause * 2).min(LAST_RETRY);
    }
}

impl Inner {
    /// Replicas of one fleet answer the same; whoever differs is not let in.
    fn agree(&self, made: Made) -> Result<Made, String> {
        let first = self.facts.get_or_init(|| Facts {
            info: made.replica.info.clone(),
            files: made.files.clone(),
            model_name: made.model_name.clone(),
        });
        let (ours, its) = (&first.info, &made.replica.info);
        let differ = |what: &str, ours: String, its: String| match ours == its {
            true => Ok(()),
            false => Err(format!("its {what} is {its}, the fleet's is {ours}")),
        };
        differ(
            "base model",
            ours.base_digest.to_string(),
            its.base_digest.to_string(),
        )?;
        differ(
            "vocabulary",
            ours.vocab_size.to_string(),
            its.vocab_size.to_string(),
        )?;
        let text = |files: &ModelFiles| files.text_digest().to_string();
        differ(
            "tokenizer and chat template",
            text(&first.files),
            text(&made.files),
        )?;
        differ("dtype", ours.dtype.clone(), its.dtype.clone())?;
        differ(
            "max_model_len",
            ours.max_model_len.to_string(),
            its.max_model_len.to_string(),
        )?;
        differ(
            "max_lora_rank",
            ours.max_lora_rank.to_string(),
            its.max_lora_rank.to_string(),
        )?;
        differ(
            "list of LoRA targets",
            ours.lora_targets.join(" "),
            its.lora_targets.join(" "),
        )?;
        Ok(made)
    }

    fn eject(&self, place: &Place) {
        let down = State::Down("it was lost and has not come back".to_owned());
        let before = {
            let mut state = place.state.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *state, down)
        };
        let State::Up(replica, hop) = before else { return };
        let last = replica.stats.borrow().clone();
        lock(&self.buried).add_counters(&last);
        if let Some(hop) = hop {
            lock(&place.past_hops).add(&hop.counted());
        }
        // Whatever comes back begins with an empty cache.
        *lock(&place.memory) = Memory::default();
        place.ejections.fetch_add(1, Ordering::Relaxed);
        self.changed.send_replace(());
        match (*self.phase.borrow(), last.draining) {
            (Phase::Stops, _) => {}
            (Phase::Runs, true) => tracing::info!(replica = place.name, "a replica has drained and left"),
            (Phase::Runs, false) => tracing::warn!(replica = place.name, "a replica is lost"),
        }
    }
}
