//! Which member saw which prompt's beginning lately, so that the same beginning goes where its KV blocks probably still
//! are. Approximate on purpose: what a replica really holds only it knows. Not here: the choice (`choice`).

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use tandem_core::TokenId;
use tandem_core::id::AdapterDigest;

/// Blocks of a prompt that are looked at; a longer match changes no choice.
const CHAIN_BLOCKS: usize = 64;
/// Blocks that are remembered of one member, at most twice as many; 8 bytes each.
const MEMORY_BLOCKS: usize = 1 << 16;

/// One number per full block of the prompt's beginning, each of all tokens up to it and of the adapter: KV of another
/// adapter is never shared.
pub fn chain(prompt: &[TokenId], adapter: Option<AdapterDigest>, block_size: usize) -> Vec<u64> {
    let mut hasher = DefaultHasher::new();
    adapter.hash(&mut hasher);
    let blocks = prompt.chunks_exact(block_size.max(1)).take(CHAIN_BLOCKS);
    blocks
        .map(|block| {
            block.hash(&mut hasher);
            hasher.finish()
        })
        .collect()
}

/// What one member saw. Two generations: when the young one is full it becomes the old one, and the old one goes.
#[derive(Default)]
pub struct Memory {
    young: HashSet<u64>,
    old: HashSet<u64>,
}

impl Memory {
    /// Blocks at the beginning of `chain` that were seen.
    pub fn seen(&self, chain: &[u64]) -> usize {
        let known = |block: &&u64| self.young.contains(block) || self.old.contains(block);
        chain.iter().take_while(known).count()
    }

    pub fn remember(&mut self, chain: &[u64]) {
        if self.young.len() + chain.len() > MEMORY_BLOCKS {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.extend(chain);
    }
}

#[cfg(test)]
mod tests {
    use tandem_core::id::Digest;

    use super::*;

    #[test]
    fn a_beginning_is_known_up_to_where_it_differs() {
        let prompt: Vec<TokenId> = (0..40).collect();
        let mut other = prompt.clone();
        other[20] = 99;
        let mut memory = Memory::default();
        memory.remember(&chain(&prompt, None, 8));
        for (prompt, adapter, blocks) in [
            (&prompt[..], None, 5),
            (&prompt[..39], None, 4),
            (&other[..], None, 2),
            (&prompt[..], Some(Digest([1; 32])), 0),
            (&prompt[1..], None, 0),
            (&[][..], None, 0),
        ] {
            assert_eq!(memory.seen(&chain(prompt, adapter, 8)), blocks);
        }
    }

    #[test]
    fn the_memory_is_bounded_and_forgets_the_oldest() {
        let mut memory = Memory::default();
        let one = |seed: u32| chain(&[seed, seed + 1], None, 2);
        memory.remember(&one(0));
        for seed in 1..3 * MEMORY_BLOCKS as u32 {
            memory.remember(&one(seed));
            debug_assert!(memory.young.len() + memory.old.len() <= 2 * MEMORY_BLOCKS);
        }
        assert!(memory.young.len() + memory.old.len() <= 2 * MEMORY_BLOCKS);
        assert_eq!(memory.seen(&one(0)), 0);
        assert_eq!(memory.seen(&one(3 * MEMORY_BLOCKS as u32 - 1)), 1);
    }
}
