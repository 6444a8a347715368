//! What tenants share, so that one alone could take it all: memory, room, anything that is counted. Who takes says how much its
//! tenant may have, seeing what the others have. Not here: how much that is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tandem_store::Tenant;

/// What is taken, by whom.
#[derive(Default)]
pub struct Shares(Mutex<HashMap<Tenant, u64>>);

/// What one request, call or upload has taken of its tenant's. It is given back when it is dropped.
pub struct Share {
    shares: Arc<Shares>,
    tenant: Tenant,
    taken: Mutex<u64>,
}

/// What a tenant may have that leaves as much as it takes: one alone gets half, and there is always some for another.
pub fn as_much_as_it_leaves(all: u64, others: u64) -> u64 {
    all.saturating_sub(others) / 2
}

impl Shares {
    /// Nothing yet.
    pub fn of(self: &Arc<Shares>, tenant: Tenant) -> Share {
        Share {
            shares: self.clone(),
            tenant,
            taken: Mutex::default(),
        }
    }
}

impl Share {
    /// So much, with what it had before. `most`: what its tenant may have, of what the others have. The error is what the
    /// tenant has.
    pub fn reach(&self, amount: u64, most: impl FnOnce(u64) -> u64) -> Result<(), u64> {
        let mut taken = lock(&self.taken);
        let more = amount.saturating_sub(*taken);
        if more == 0 {
            return Ok(());
        }
        let mut all = lock(&self.shares.0);
        let own = all.get(&self.tenant).copied().unwrap_or(0);
        let others = all.values().sum::<u64>() - own;
        if own.saturating_add(more) > most(others) {
            return Err(own);
        }
        all.insert(self.tenant.clone(), own + more);
        *taken = amount;
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut all = lock(&self.shares.0);
        let left = all.get(&self.tenant).map_or(0, |own| own - *lock(&self.taken));
        match left {
            0 => drop(all.remove(&self.tenant)),
            _ => drop(all.insert(self.tenant.clone(), left)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_what_it_may_and_gives_it_back() {
        let shares = Arc::new(Shares::default());
        let [one, two, other] =
            ["greedy", "greedy", "modest"].map(|tenant| shares.of(tenant.parse().unwrap()));
        let most = |others| as_much_as_it_leaves(100, others);
        one.reach(48, most).unwrap();
        assert_eq!(two.reach(3, most), Err(48), "half of all");
        two.reach(2, most).unwrap();
        two.reach(1, |_| 0).unwrap();
        assert_eq!(other.reach(26, most), Err(0), "half of what is left");
        other.reach(25, most).unwrap();
        drop(one);
        two.reach(37, most).unwrap();
        assert_eq!(two.reach(38, most), Err(37));
        drop((two, other));
        assert!(lock(&shares.0).is_empty());
    }
}
