//! Accounts for KV blocks: who holds which, which still hold a known prefix, which to reuse next. Not here: the keys
//! and values themselves (kernels), who may have blocks (`sched`).
//!
//! A full block is identified by SHA-256 over the block before it and its own tokens, beginning from a seed that
//! names what computed it (the adapter). So equal identity means equal tokens *and* equal weights all the way back:
//! SHA-256 collisions are not a case, and tokens need not be compared again.

use std::collections::HashMap;

use sha2::{Digest as _, Sha256};

use crate::TokenId;
use crate::id::{AdapterDigest, Digest};

/// Index of a block in the KV cache.
pub type BlockId = u32;

/// Identity of a full block and of everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// Where the chain of a sequence begins. KV of another adapter, of another version of it, or of another salt can never
    /// match.
    pub fn seed(adapter: Option<AdapterDigest>, salt: Option<Digest>) -> BlockHash {
        let mut hasher = Sha256::new();
        match adapter {
            None => hasher.update(b"base"),
            Some(digest) => hasher.update(digest.0),
        }
        if let Some(salt) = salt {
            hasher.update(salt.0);
        }
        BlockHash(hasher.finalize().into())
    }

    /// The block of `tokens` after `self`.
    pub fn then(&self, tokens: &[TokenId]) -> BlockHash {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        BlockHash(hasher.finalize().into())
    }
}

/// Neighbours in the list of free blocks; `NONE` ends it.
#[derive(Clone, Copy, Debug)]
struct Link {
    older: BlockId,
    newer: BlockId,
}

const NONE: BlockId = BlockId::MAX;

#[derive(Clone, Debug)]
struct Block {
    /// Sequences that hold it. 0: free, and linked.
    refs: u32,
    /// Set while the pool can find it by this identity, held or free.
    hash: Option<BlockHash>,
    link: Link,
}

pub struct BlockPool {
    block_size: usize,
    blocks: Vec<Block>,
    by_hash: HashMap<BlockHash, BlockId>,
    /// Free blocks, least recently used first: a doubly linked list through `blocks`, so that a prefix hit takes its
    /// block out of the middle in O(1).
    oldest: BlockId,
    newest: BlockId,
    free: usize,
}

impl BlockPool {
    /// `block_size` tokens a block.
    pub fn new(n_blocks: u32, block_size: usize) -> BlockPool {
        assert!(
            n_blocks < NONE && block_size > 0,
            "{n_blocks} blocks of {block_size} tokens"
        );
        let unlinked = Block {
            refs: 0,
            hash: None,
            link: Link {
                older: NONE,
                newer: NONE,
            },
        };
        let mut pool = BlockPool {
            block_size,
            blocks: vec![unlinked; n_blocks as usize],
            by_hash: HashMap::with_capacity(n_blocks as usize),
            oldest: NONE,
            newest: NONE,
            free: 0,
        };
        (0..n_blocks).for_each(|id| pool.link_newest(id));
        pool
    }

    pub fn block_size(&self) -> usize {
        self.block_size
    }
    pub fn total(&self) -> usize {
        self.blocks.len()
    }
    /// Blocks that can be allocated; some of them still hold a prefix.
    pub fn free(&self) -> usize {
        self.free
    }
    /// Blocks held by sequences.
    pub fn used(&self) -> usize {
        self.blocks.len() - self.free
    }
    /// Blocks that `n_tokens` need.
    pub fn blocks_for(&self, n_tokens: usize) -> usize {
        n_tokens.div_ceil(self.block_size)
    }

    /// The longest known prefix of a chain: its blocks, in order, and how many of them are free now.
    pub fn lookup(&self, chain: &[BlockHash]) -> Prefix {
        let blocks: Vec<BlockId> = chain
            .iter()
            .map_while(|hash| self.by_hash.get(hash).copied())
            .collect();
        let free = blocks
            .iter()
            .filter(|&&id| self.blocks[id as usize].refs == 0)
            .count();
        Prefix { blocks, free }
    }

    /// A table of `n` blocks that begins with `prefix`; all or nothing.
    pub fn allocate(&mut self, prefix: Prefix, n: usize) -> Option<Vec<BlockId>> {
        let Prefix {
            blocks: mut table,
            free,
        } = prefix;
        let fresh = n
            .checked_sub(table.len())
            .expect("a prefix is no longer than its sequence");
        if free + fresh > self.free {
            return None;
        }
        // The prefix first: what it holds can no longer be taken as fresh.
        for &id in &table {
            if self.blocks[id as usize].refs == 0 {
                self.unlink(id);
            }
            self.blocks[id as usize].refs += 1;
        }
        table.extend((0..fresh).map(|_| self.take_oldest()));
        Some(table)
    }

    /// One more block for a sequence that grows.
    pub fn allocate_one(&mut self) -> Option<BlockId> {
        (self.free > 0).then(|| self.take_oldest())
    }

    /// Declares that `id`, held and full, is `hash` from now on. When another block is that already, `id` stays
    /// anonymous: it serves its holder and is forgotten after.
    pub fn name(&mut self, id: BlockId, hash: BlockHash) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.refs > 0 && block.hash.is_none());
        self.by_hash.entry(hash).or_insert_with(|| {
            block.hash = Some(hash);
            id
        });
    }

    /// Gives a sequence's blocks back. Its tail becomes the oldest of them: the head of a prefix is worth more.
    pub fn release(&mut self, table: &[BlockId]) {
        for &id in table.iter().rev() {
            let block = &mut self.blocks[id as usize];
            block.refs = block.refs.checked_sub(1).expect("a table holds its blocks");
            match (block.refs, block.hash) {
                (0, Some(_)) => self.link_newest(id),
                // Nothing can find it again: reuse it before any prefix is lost.
                (0, None) => self.link_oldest(id),
                _ => {}
            }
        }
    }

    /// Checks every count and link against the tables that should hold the blocks.
    pub fn audit<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) -> Result<(), String> {
        let mut refs = vec![0; self.blocks.len()];
        tables.flatten().for_each(|&id| refs[id as usize] += 1);
        let mut listed = vec![false; self.blocks.len()];
        let (mut id, mut older, mut n) = (self.oldest, NONE, 0);
        while id != NONE {
            let block = &self.blocks[id as usize];
            if listed[id as usize] || block.link.older != older {
                return Err(format!("the free list is broken at block {id}"));
            }
            listed[id as usize] = true;
            (older, id, n) = (id, block.link.newer, n + 1);
        }
        if n != self.free || older != self.newest {
            return Err(format!(
                "{n} blocks are in the free list, {} are counted",
                self.free
            ));
        }
        for (id, block) in self.blocks.iter().enumerate() {
            if block.refs != refs[id] || (block.refs == 0) != listed[id] {
                return Err(format!(
                    "block {id} counts {} holders, {} tables hold it",
                    block.refs, refs[id]
                ));
            }
            if block
                .hash
                .is_some_and(|hash| self.by_hash.get(&hash) != Some(&(id as BlockId)))
            {
                return Err(format!("block {id} has a name that does not find it"));
            }
        }
        match self.blocks.iter().filter(|block| block.hash.is_some()).count() {
            named if named == self.by_hash.len() => Ok(()),
            named => Err(format!(
                "{named} blocks have names, {} names are known",
                self.by_hash.len()
            )),
        }
    }

    /// A free block, held once. Takes its name away.
    fn take_oldest(&mut self) -> BlockId {
        let id = self.oldest;
        assert_ne!(id, NONE, "the caller saw a free block");
        self.unlink(id);
        let block = &mut self.blocks[id as usize];
        block.refs = 1;
        if let Some(hash) = block.hash.take() {
            self.by_hash.remove(&hash);
        }
        id
    }

    fn link_newest(&mut self, id: BlockId) {
        let older = std::mem::replace(&mut self.newest, id);
        self.blocks[id as usize].link = Link { older, newer: NONE };
        match older {
            NONE => self.oldest = id,
            _ => self.blocks[older as usize].link.newer = id,
        }
        self.free += 1;
    }

    fn link_oldest(&mut self, id: BlockId) {
        let newer = std::mem::replace(&mut self.oldest, id);
        self.blocks[id as usize].link = Link { older: NONE, newer };
        match newer {
            NONE => self.newest = id,
            _ => self.blocks[newer as usize].link.older = id,
        }
        self.free += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Link { older, newer } = self.blocks[id as usize].link;
        match older {
            NONE => self.oldest = newer,
            _ => self.blocks[older as usize].link.newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            _ => self.blocks[newer as usize].link.older = older,
        }
        self.free -= 1;
    }
}

/// What [`BlockPool::lookup`] found. Not held yet: use it before the pool changes.
#[derive(Debug, Default)]
pub struct Prefix {
    blocks: Vec<BlockId>,
    free: usize,
}

impl Prefix {
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }
    /// Blocks of it that no sequence holds: allocating the prefix takes them off the free list.
    pub fn n_free(&self) -> usize {
        self.free
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;

    fn chain(adapter: Option<AdapterDigest>, tokens: &[TokenId], block_size: usize) -> Vec<BlockHash> {
        let mut last = BlockHash::seed(adapter, None);
        let next = |block: &[TokenId]| {
            last = last.then(block);
            last
        };
        tokens.chunks_exact(block_size).map(next).collect()
    }

    #[test]
    fn a_prefix_is_found_only_under_its_own_adapter_and_past() {
        let mut pool = BlockPool::new(8, 2);
        let salts = [None, Some(Digest([1; 32])), Some(Digest([2; 32]))];
        for (i, one) in salts.iter().enumerate() {
            for other in &salts[..i] {
                assert_ne!(BlockHash::seed(None, *one), BlockHash::seed(None, *other));
                let adapter = Some(Digest([1; 32]));
                assert_ne!(BlockHash::seed(adapter, *one), BlockHash::seed(adapter, *other));
            }
        }
        let hashes = chain(None, &[1, 2, 3, 4], 2);
        let table = pool.allocate(Prefix::default(), 2).unwrap();
        table
            .iter()
            .zip(&hashes)
            .for_each(|(&id, &hash)| pool.name(id, hash));
        let one = Some(Digest([1; 32]));
        let cases: [(Option<AdapterDigest>, &[TokenId], usize); 5] = [
            (None, &[1, 2, 3, 4, 5, 6], 2),
            (None, &[1, 2, 3, 5], 1),
            (None, &[3, 4], 0),
            (None, &[1], 0),
            (one, &[1, 2, 3, 4], 0),
        ];
        for (adapter, tokens, found) in cases {
            assert_eq!(
                pool.lookup(&chain(adapter, tokens, 2)).n_blocks(),
                found,
                "{adapter:?} {tokens:?}"
            );
        }
        pool.release(&table);
        assert_eq!(
            (pool.lookup(&hashes).n_blocks(), pool.used()),
            (2, 0),
            "free blocks remember"
        );
        // A taken prefix and fresh blocks never overlap, and more than there is is refused whole.
        assert!(pool.allocate(pool.lookup(&hashes), 9).is_none());
        let all = pool.allocate(pool.lookup(&hashes), 8).unwrap();
        assert_eq!(all[..2], table[..]);
        pool.audit([&all[..]].into_iter()).unwrap();
        pool.release(&all);
        pool.audit(std::iter::empty()).unwrap();
    }

    #[test]
    fn anonymous_blocks_go_first_then_tails_then_heads() {
        let mut pool = BlockPool::new(4, 1);
        let hashes = chain(None, &[7, 8, 9], 1);
        let table = pool.allocate(Prefix::default(), 4).unwrap();
        table
            .iter()
            .zip(&hashes)
            .for_each(|(&id, &hash)| pool.name(id, hash));
        pool.release(&table);
        for left in [3, 2, 1, 0] {
            pool.allocate_one().unwrap();
            assert_eq!(pool.lookup(&hashes).n_blocks(), left);
        }
        assert_eq!(pool.allocate_one(), None);
    }

    #[test]
    fn any_history_balances() {
        for seed in 0..20 {
            let mut draws = 0;
            let mut below = |n: usize| {
                draws += 1;
                (rng::uniform(seed, 0, draws) * n as f64) as usize
            };
            let mut pool = BlockPool::new(16, 2);
            let mut held: Vec<Vec<BlockId>> = vec![];
            for _ in 0..2000 {
                if below(3) == 0 && !held.is_empty() {
                    let table = held.swap_remove(below(held.len()));
                    pool.release(&table);
                } else {
                    let tokens: Vec<TokenId> = (0..below(14)).map(|_| below(2) as TokenId).collect();
                    let hashes = chain(None, &tokens, 2);
                    let prefix = pool.lookup(&hashes);
                    let known = prefix.n_blocks();
                    let Some(table) = pool.allocate(prefix, pool.blocks_for(tokens.len())) else {
                        continue;
                    };
                    table
                        .iter()
                        .zip(&hashes)
                        .skip(known)
                        .for_each(|(&id, &hash)| pool.name(id, hash));
                    held.push(table);
                }
                pool.audit(held.iter().map(Vec::as_slice)).unwrap();
            }
        }
    }
}
