//! Which blocks of a sequence each group of layers needs. Layers that see alike are a group, and the groups of a model have
//! as many layers each: so their blocks are of one size and come from one pool (vLLM's hybrid KV cache manager). Layers
//! with a sliding window need the blocks in it alone, however long the sequence is. Not here: who has which block
//! ([`super::BlockPool`]), which layers are together (the engine).

use std::ops::Range;

use super::BlockId;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Groups {
    block_size: usize,
    /// Of each group: the token at position p sees the keys in (p - window, p]. `None`: all up to its own.
    windows: Vec<Option<usize>>,
    /// Tokens of one sequence that a step computes at most.
    stride: usize,
}

/// The blocks of one sequence in one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Which of the sequence's blocks comes first here: those before it lie behind the window.
    pub first: usize,
    pub blocks: Vec<BlockId>,
}

impl Table {
    /// The block of the sequence behind the last one here.
    pub fn end(&self) -> usize {
        self.first + self.blocks.len()
    }

    /// # Panics
    /// When `block` lies behind the window, or is not there yet.
    pub fn id(&self, block: usize) -> BlockId {
        let at = block.checked_sub(self.first);
        let id = at.and_then(|at| self.blocks.get(at));
        *id.unwrap_or_else(|| panic!("block {block} is not in {}..{}", self.first, self.end()))
    }
}

impl Groups {
    /// Blocks of `block_size` tokens; a step computes at most `stride` tokens of a sequence.
    pub fn new(block_size: usize, windows: Vec<Option<usize>>, stride: usize) -> Groups {
        assert!(
            block_size > 0 && !windows.is_empty() && stride > 0,
            "groups {windows:?}, blocks of {block_size} tokens, {stride} tokens a step"
        );
        // A token sees itself.
        let windows = windows
            .into_iter()
            .map(|window| window.map(|window| window.max(1)));
        Groups {
            block_size,
            windows: windows.collect(),
            stride,
        }
    }

    /// All layers see everything.
    pub fn one(block_size: usize) -> Groups {
        Groups::new(block_size, vec![None], usize::MAX)
    }

    pub fn count(&self) -> usize {
        self.windows.len()
    }
    pub fn block_size(&self) -> usize {
        self.block_size
    }
    pub fn stride(&self) -> usize {
        self.stride
    }
    pub fn has_window(&self, group: usize) -> bool {
        self.windows[group].is_some()
    }

    /// The first block that tokens from position `computed` on see.
    pub fn first(&self, group: usize, computed: usize) -> usize {
        let behind = |window: usize| (computed + 1).saturating_sub(window) / self.block_size;
        self.windows[group].map_or(0, behind)
    }

    /// The blocks that go on with a sequence of `len` tokens, of which `computed` are in the cache: where there is a
    /// window, as many as the longest step needs at most, so that a long prompt has blocks for its next step, not for all of
    /// it, and never needs more of them than at its start.
    pub fn needed(&self, group: usize, computed: usize, len: usize) -> Range<usize> {
        let first = self.first(group, computed);
        let end = len.div_ceil(self.block_size);
        first..match self.windows[group] {
            None => end,
            // What lies between the first key that the step's first token sees, and its last token.
            Some(window) => end.min(first + self.spanned(window - 1 + self.stride)),
        }
    }

    /// Blocks of all groups that a sequence holds at most on its way to `len` tokens.
    pub fn most(&self, len: usize) -> usize {
        (0..self.count())
            .map(|group| self.needed(group, 0, len).len())
            .sum()
    }

    /// Tokens of the longest sequence of which a pool of `blocks` is sure to hold all that is needed.
    pub fn longest(&self, blocks: usize) -> usize {
        let fits = |n_blocks: usize| self.most(n_blocks * self.block_size) <= blocks;
        // Each block of tokens takes at least one, until all windows are full.
        if fits(blocks + 1) {
            return usize::MAX;
        }
        let (mut fit, mut not) = (0, blocks + 1);
        while not - fit > 1 {
            let middle = fit + (not - fit) / 2;
            match fits(middle) {
                true => fit = middle,
                false => not = middle,
            }
        }
        fit * self.block_size
    }

    /// Tokens that a pool of `blocks` holds in sequences of `len`.
    pub fn capacity(&self, blocks: usize, len: usize) -> u64 {
        let tokens = len.max(1).next_multiple_of(self.block_size);
        (blocks as u128 * tokens as u128 / self.most(tokens) as u128) as u64
    }

    /// Blocks that `n` tokens in a row lie in at most, one or more of them.
    fn spanned(&self, n: usize) -> usize {
        (n - 1).div_ceil(self.block_size) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_covers_what_is_seen() {
        for (block_size, window, stride) in [(4, 1, 1), (4, 6, 5), (1, 3, 2), (32, 512, 100), (3, 7, 40)] {
            let groups = Groups::new(block_size, vec![None, Some(window)], stride);
            for len in 1..900 {
                for computed in (0..len).step_by(1 + len / 40) {
                    assert_eq!(groups.needed(0, computed, len), 0..len.div_ceil(block_size));
                    let needed = groups.needed(1, computed, len);
                    let seen = (computed + 1).saturating_sub(window)..len.min(computed + stride);
                    assert!(
                        needed.start == seen.start / block_size && needed.end * block_size >= seen.end,
                        "{groups:?}, {computed} of {len}: {needed:?} for {seen:?}"
                    );
                    assert!(needed.len() + groups.needed(0, computed, len).len() <= groups.most(len));
                }
            }
        }
    }

    /// 26 layers of Gemma 3 1B, one of six of which sees everything: by 2 of them, a window of 512.
    #[test]
    fn windows_hold_several_times_as_much() {
        let mut windows = vec![Some(512); 11];
        windows.extend([None; 2]);
        let groups = Groups::new(32, windows, 512);
        let all = Groups::one(32);
        // 13 blocks of 2 layers are one of 26.
        let (blocks, len) = (1024, 32 * 1024);
        assert_eq!(all.capacity(blocks, len), 32 * 1024);
        assert_eq!(groups.most(len), 11 * 33 + 2 * 1024);
        assert_eq!(groups.capacity(13 * blocks, len), 180923);
        assert_eq!(
            (all.longest(blocks), groups.longest(13 * blocks)),
            (32_768, 207_168)
        );
        // Windows alone never fill up.
        let windows = Groups::new(32, vec![Some(512)], 512);
        assert_eq!((windows.longest(33), windows.longest(32)), (usize::MAX, 32 * 32));
    }
}
