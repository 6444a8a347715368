//! Accounts for KV blocks: who holds which, which still hold a known prefix, which to reuse next. Not here: the keys
//! and values themselves (kernels), who may have blocks (`sched`), which blocks a sequence needs ([`Groups`]).
//!
//! A full block is identified by SHA-256 over the block before it and its own tokens, beginning from a seed that
//! names what computed it (the adapter). So equal identity means equal tokens *and* equal weights all the way back:
//! SHA-256 collisions are not a case, and tokens need not be compared again. Of each group of layers there is a block of
//! that identity.

mod groups;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

pub use groups::{Groups, Table};
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

/// What a block can be found by: its group of layers, and its identity.
type Name = (u32, BlockHash);

#[derive(Clone, Debug)]
struct Block {
    /// Sequences that hold it. 0: free, and linked.
    refs: u32,
    /// Set while the pool can find it by this, held or free.
    name: Option<Name>,
    link: Link,
}

pub struct BlockPool {
    groups: Groups,
    blocks: Vec<Block>,
    by_name: HashMap<Name, BlockId>,
    /// Free blocks, least recently used first: a doubly linked list through `blocks`, so that a prefix hit takes its
    /// block out of the middle in O(1).
    oldest: BlockId,
    newest: BlockId,
    free: usize,
}

impl BlockPool {
    pub fn new(n_blocks: u32, groups: Groups) -> BlockPool {
        assert!(n_blocks < NONE, "{n_blocks} blocks");
        let unlinked = Block {
            refs: 0,
            name: None,
            link: Link {
                older: NONE,
                newer: NONE,
            },
        };
        let mut pool = BlockPool {
            groups,
            blocks: vec![unlinked; n_blocks as usize],
            by_name: HashMap::with_capacity(n_blocks as usize),
            oldest: NONE,
            newest: NONE,
            free: 0,
        };
        (0..n_blocks).for_each(|id| pool.link_newest(id));
        pool
    }

    pub fn groups(&self) -> &Groups {
        &self.groups
    }
    /// Tokens of a block.
    pub fn block_size(&self) -> usize {
        self.groups.block_size()
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

    /// The longest known prefix of a chain, of which every group has what the token behind it sees.
    pub fn lookup(&self, chain: &[BlockHash]) -> Prefix {
        let find = |group: usize, block: usize| self.by_name.get(&(group as u32, chain[block])).copied();
        let groups = 0..self.groups.count();
        let (windows, whole): (Vec<usize>, Vec<usize>) =
            groups.clone().partition(|&group| self.groups.has_window(group));
        let mut n_blocks = chain.len();
        for group in whole {
            n_blocks = (0..n_blocks)
                .take_while(|&block| find(group, block).is_some())
                .count();
        }
        let first = |group: usize, n_blocks: usize| self.groups.first(group, n_blocks * self.block_size());
        // A window lacks a block of every prefix that ends before it is past.
        let lacks = |n_blocks: usize| {
            windows
                .iter()
                .flat_map(|&group| {
                    (first(group, n_blocks)..n_blocks)
                        .rev()
                        .map(move |block| (group, block))
                })
                .find(|&(group, block)| find(group, block).is_none())
        };
        while let Some((_, missing)) = lacks(n_blocks) {
            n_blocks = missing;
        }
        let table = |group: usize| {
            let first = first(group, n_blocks);
            let known = |block| find(group, block).expect("looked for above");
            Table {
                first,
                blocks: (first..n_blocks).map(known).collect(),
            }
        };
        let tables: Vec<Table> = groups.map(table).collect();
        let all = tables.iter().flat_map(|table| &table.blocks);
        let free = all.filter(|&&id| self.blocks[id as usize].refs == 0).count();
        Prefix {
            n_blocks,
            tables,
            free,
        }
    }

    /// The tables of a sequence of `len` tokens that begins with `prefix`, if `reserve` blocks are free still; all or nothing.
    pub fn allocate(&mut self, prefix: Prefix, len: usize, reserve: usize) -> Option<Vec<Table>> {
        let Prefix {
            n_blocks,
            mut tables,
            free,
        } = prefix;
        let computed = n_blocks * self.block_size();
        if free + self.lacking(&tables, computed, len) + reserve > self.free {
            return None;
        }
        // The prefix first: what it holds can no longer be taken as fresh.
        for &id in tables.iter().flat_map(|table| &table.blocks) {
            if self.blocks[id as usize].refs == 0 {
                self.unlink(id);
            }
            self.blocks[id as usize].refs += 1;
        }
        let has_all = self.extend(&mut tables, computed, len);
        assert!(has_all, "counted above");
        Some(tables)
    }

    /// The blocks that a sequence of `len` tokens lacks to go on behind `computed` of them, if there are as many.
    pub fn extend(&mut self, tables: &mut [Table], computed: usize, len: usize) -> bool {
        if self.lacking(tables, computed, len) > self.free {
            return false;
        }
        for (group, table) in tables.iter_mut().enumerate() {
            let end = self.groups.needed(group, computed, len).end;
            table
                .blocks
                .extend((table.end()..end).map(|_| self.take_oldest()));
        }
        true
    }

    fn lacking(&self, tables: &[Table], computed: usize, len: usize) -> usize {
        let lacking = |(group, table): (usize, &Table)| {
            let end = self.groups.needed(group, computed, len).end;
            end.saturating_sub(table.end())
        };
        tables.iter().enumerate().map(lacking).sum()
    }

    /// Gives back what lies behind those that [`BlockPool::extend`] would have there.
    pub fn shrink(&mut self, tables: &mut [Table], computed: usize, len: usize) {
        for (group, table) in tables.iter_mut().enumerate() {
            let end = self.groups.needed(group, computed, len).end;
            let behind = table
                .blocks
                .split_off((end - table.first).min(table.blocks.len()));
            behind.iter().rev().for_each(|&id| self.let_go(id));
        }
    }

    /// Gives back what the windows have left behind, now that `computed` tokens are in the cache. It remains a known prefix
    /// until somebody takes it.
    pub fn slide(&mut self, tables: &mut [Table], computed: usize) {
        for (group, table) in tables.iter_mut().enumerate() {
            let first = self.groups.first(group, computed);
            for id in table.blocks.drain(..first - table.first) {
                self.let_go(id);
            }
            table.first = first;
        }
    }

    /// Declares that block `block` of a sequence, held and full, is `hash` from now on. Where another block is that already,
    /// this one stays anonymous: it serves its holder and is forgotten after.
    pub fn name(&mut self, tables: &[Table], block: usize, hash: BlockHash) {
        for (group, table) in tables.iter().enumerate() {
            let (id, name) = (table.id(block), (group as u32, hash));
            let block = &mut self.blocks[id as usize];
            debug_assert!(block.refs > 0 && block.name.is_none());
            self.by_name.entry(name).or_insert_with(|| {
                block.name = Some(name);
                id
            });
        }
    }

    /// Gives a sequence's blocks back. Its tail becomes the oldest of them: the head of a prefix is worth more.
    pub fn release(&mut self, tables: &[Table]) {
        let end = tables.iter().map(Table::end).max().unwrap_or(0);
        let first = tables.iter().map(|table| table.first).min().unwrap_or(0);
        for block in (first..end).rev() {
            for table in tables
                .iter()
                .filter(|table| (table.first..table.end()).contains(&block))
            {
                self.let_go(table.id(block));
            }
        }
    }

    fn let_go(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        block.refs = block.refs.checked_sub(1).expect("a table holds its blocks");
        match (block.refs, block.name) {
            (0, Some(_)) => self.link_newest(id),
            // Nothing can find it again: reuse it before any prefix is lost.
            (0, None) => self.link_oldest(id),
            _ => {}
        }
    }

    /// Checks every count and link against the tables that should hold the blocks.
    pub fn audit<'a>(&self, tables: impl Iterator<Item = &'a Table>) -> Result<(), String> {
        let mut refs = vec![0; self.blocks.len()];
        tables
            .flat_map(|table| &table.blocks)
            .for_each(|&id| refs[id as usize] += 1);
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
                .name
                .is_some_and(|name| self.by_name.get(&name) != Some(&(id as BlockId)))
            {
                return Err(format!("block {id} has a name that does not find it"));
            }
        }
        match self.blocks.iter().filter(|block| block.name.is_some()).count() {
            named if named == self.by_name.len() => Ok(()),
            named => Err(format!(
                "{named} blocks have names, {} names are known",
                self.by_name.len()
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
        if let Some(name) = block.name.take() {
            self.by_name.remove(&name);
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
#[derive(Debug)]
pub struct Prefix {
    n_blocks: usize,
    /// Of each group, what its window sees of them.
    tables: Vec<Table>,
    /// Of those, the ones that no sequence holds: allocating the prefix takes them off the free list.
    free: usize,
}

impl Prefix {
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }
}
