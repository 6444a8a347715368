//! Places that tenants take in turns: who finds none free waits behind its own tenant's only, and a place that becomes free goes
//! to the next tenant. Not here: places in the engine (scheduler).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tandem_store::Tenant;
use tokio::sync::oneshot;

pub(crate) struct Turns(Mutex<State>);

struct State {
    free: usize,
    /// Who waits, by tenant; the first tenant is next. None is empty.
    waiting: VecDeque<(Tenant, VecDeque<oneshot::Sender<Turn>>)>,
}

/// A place, until it is dropped.
pub(crate) struct Turn(Option<Arc<Turns>>);

impl Turns {
    pub fn new(places: usize) -> Arc<Turns> {
        Arc::new(Turns(Mutex::new(State {
            free: places,
            waiting: VecDeque::new(),
        })))
    }

    pub async fn wait(self: &Arc<Turns>, tenant: &Tenant) -> Turn {
        let given = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if state.free > 0 {
                state.free -= 1;
                return Turn(Some(self.clone()));
            }
            let (give, given) = oneshot::channel();
            match state.waiting.iter_mut().find(|(waiting, _)| waiting == tenant) {
                Some((_, queue)) => queue.push_back(give),
                None => state.waiting.push_back((tenant.clone(), [give].into())),
            }
            given
        };
        given.await.expect("who waits is given a place")
    }

    fn next(&self) -> Option<oneshot::Sender<Turn>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((tenant, mut queue)) = state.waiting.pop_front() else {
            state.free += 1;
            return None;
        };
        let next = queue.pop_front();
        if !queue.is_empty() {
            state.waiting.push_back((tenant, queue));
        }
        next
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(turns) = self.0.take() else { return };
        while let Some(next) = turns.next() {
            match next.send(Turn(Some(turns.clone()))) {
                Ok(()) => return,
                // Nobody waits there any more: the next one.
                Err(mut turn) => drop(turn.0.take()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn tenants_take_turns_and_who_goes_away_keeps_no_place() {
        let turns = Turns::new(1);
        let [greedy, modest]: [Tenant; 2] = ["greedy", "modest"].map(|name| name.parse().unwrap());
        let first = turns.wait(&greedy).await;
        let gone = Box::pin(turns.wait(&greedy));
        let (mut second, mut third) = (pin!(turns.wait(&greedy)), pin!(turns.wait(&greedy)));
        let mut other = pin!(turns.wait(&modest));
        let mut gone = gone;
        assert!(gone.as_mut().now_or_never().is_none());
        assert!(second.as_mut().now_or_never().is_none());
        assert!(third.as_mut().now_or_never().is_none());
        assert!(other.as_mut().now_or_never().is_none());
        drop(gone);
        drop(first);
        // The place of the one that went away went to the next tenant.
        assert!(second.as_mut().now_or_never().is_none());
        let place = other.as_mut().now_or_never().expect("its turn");
        drop(place);
        drop(second.as_mut().now_or_never().expect("its turn"));
        drop(third.as_mut().now_or_never().expect("its turn"));
        assert!(turns.wait(&modest).now_or_never().is_some());
    }
}
