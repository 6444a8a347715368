//! The numbers of calls that wait, of all models: tenants share the memory that they take. Each has as much as it leaves free, and
//! half of that for calls that came before their turn, so that the one that all others wait for is taken.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tandem_store::Tenant;

use super::lock;

/// A gigabyte.
const MAX_NUMBERS: usize = 256 << 20;

#[derive(Default)]
pub(super) struct Waiting(Arc<Mutex<HashMap<Tenant, usize>>>);

/// Given back when it is dropped.
pub(super) struct Taken {
    all: Arc<Mutex<HashMap<Tenant, usize>>>,
    tenant: Tenant,
    numbers: usize,
}

impl Waiting {
    /// `None`: others' are to be done first.
    pub fn take(&self, tenant: &Tenant, numbers: usize, is_due: bool) -> Option<Taken> {
        let mut all = lock(&self.0);
        let had = all.get(tenant).copied().unwrap_or(0);
        let others = all.values().sum::<usize>() - had;
        let own = had + numbers;
        let most = MAX_NUMBERS.saturating_sub(others) / if is_due { 2 } else { 4 };
        // A call alone may be as large as a call may be.
        if own > most && had > 0 {
            return None;
        }
        all.insert(tenant.clone(), own);
        Some(Taken {
            all: self.0.clone(),
            tenant: tenant.clone(),
            numbers,
        })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        let left = all.get(&self.tenant).map_or(0, |own| own - self.numbers);
        match left {
            0 => drop(all.remove(&self.tenant)),
            _ => drop(all.insert(self.tenant.clone(), left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn early_calls_leave_room_for_those_that_are_due_and_for_other_tenants() {
        let waiting = Waiting::default();
        let [greedy, modest] = ["greedy", "modest"].map(|name| name.parse::<Tenant>().unwrap());
        let call = MAX_NUMBERS / 32;
        let take = |tenant: &Tenant, is_due| waiting.take(tenant, call, is_due);
        let early: Vec<Taken> = (0..100).map_while(|_| take(&greedy, false)).collect();
        assert_eq!(early.len(), 8);
        let due: Vec<Taken> = (0..100).map_while(|_| take(&greedy, true)).collect();
        assert_eq!(due.len(), 8);
        let theirs: Vec<Taken> = (0..100).map_while(|_| take(&modest, true)).collect();
        assert_eq!(theirs.len(), 8);
        drop((early, due, theirs));
        assert!(lock(&waiting.0).is_empty());
        assert!(
            waiting.take(&greedy, MAX_NUMBERS, false).is_some(),
            "a large one alone"
        );
    }
}
