//! Who is next among requests of one priority: API keys in turns, by the tokens that each was given, and within a key its
//! adapters. Not here: places, blocks and budgets.

use std::collections::{BTreeMap, HashMap};

use crate::id::AdapterDigest;

/// What a token of an answer counts, where a token of a prompt counts 1: it takes a step of its own.
pub(super) const GENERATED: u64 = 2;

/// Of whom a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Payer {
    pub key: u64,
    pub adapter: Option<AdapterDigest>,
}

/// Virtual token counters ("Fairness in Serving Large Language Models", OSDI 2024), for keys and for each key's adapters.
#[derive(Default)]
pub(super) struct Shares {
    keys: Counters<u64>,
    adapters: HashMap<u64, Counters<Option<AdapterDigest>>>,
}

/// What each was given.
struct Counters<K> {
    /// What the last one to be let in had been given. Nobody who waits had less, and who comes now has not either: time in
    /// which nothing was asked earns nothing.
    floor: u64,
    /// Who was given more than that.
    above: BTreeMap<K, u64>,
}

impl Shares {
    /// Who has the least is next.
    pub fn given(&self, payer: Payer) -> (u64, u64) {
        let adapters = self.adapters.get(&payer.key);
        let of_adapter = adapters.map_or(0, |counters| counters.of(&payer.adapter));
        (self.keys.of(&payer.key), of_adapter)
    }

    pub fn charge(&mut self, payer: Payer, tokens: u64) {
        self.keys.charge(payer.key, tokens);
        let adapters = self.adapters.entry(payer.key).or_default();
        adapters.charge(payer.adapter, tokens);
    }

    /// It waited, and is let in.
    pub fn let_in(&mut self, payer: Payer) {
        self.keys.let_in(&payer.key);
        let adapters = self.adapters.entry(payer.key).or_default();
        adapters.let_in(&payer.adapter);
    }
}

impl<K: Ord> Counters<K> {
    fn of(&self, who: &K) -> u64 {
        self.above.get(who).copied().unwrap_or(self.floor)
    }

    fn charge(&mut self, who: K, tokens: u64) {
        let floor = self.floor;
        *self.above.entry(who).or_insert(floor) += tokens;
    }

    fn let_in(&mut self, who: &K) {
        self.floor = self.of(who);
        self.above.retain(|_, given| *given > self.floor);
    }
}

impl<K> Default for Counters<K> {
    fn default() -> Counters<K> {
        Counters {
            floor: 0,
            above: BTreeMap::new(),
        }
    }
}
