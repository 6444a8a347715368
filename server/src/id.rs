//! Identifiers of things that live as long as one exchange: requests and completions. Stored things (files, jobs) get
//! theirs from the store.

use std::hash::{BuildHasher, RandomState};

use tandem_text::chat::CallIds;

/// `prefix` and 24 characters of base 36. Unique, not secret.
pub fn fresh(prefix: &str) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut id = String::with_capacity(prefix.len() + 24);
    id.push_str(prefix);
    for _ in 0..2 {
        // A RandomState is seeded by the system once a thread and stepped from there: the hash of nothing is its draw.
        let mut bits = RandomState::new().hash_one(());
        for _ in 0..12 {
            id.push(char::from(DIGITS[(bits % 36) as usize]));
            bits /= 36;
        }
    }
    id
}

/// Of a tool call: as the model's chat template takes it back.
pub fn of_call(prefix: &str, ids: CallIds) -> String {
    match ids {
        CallIds::Any => fresh(prefix),
        CallIds::NineCharacters => fresh("").split_off(15),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ids_differ() {
        let ids: std::collections::HashSet<_> = (0..10_000).map(|_| super::fresh("x-")).collect();
        assert_eq!(ids.len(), 10_000);
        assert!(ids.iter().all(|id| id.len() == 26));
    }
}
