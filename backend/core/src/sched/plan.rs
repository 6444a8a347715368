//! One step, laid out as the forward wants it: flat arrays and a row for each sequence. Not here: tensors.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::sequence::Running;
use crate::TokenId;
use crate::blocks::{BlockId, Groups};
use crate::id::{AdapterDigest, RequestId};

/// Tokens to compute in one forward. Goes back to the scheduler by value, in `commit` or `abandon`.
#[derive(Debug)]
pub struct StepPlan {
    /// Sorted by adapter, base model first, so that each adapter's tokens are contiguous.
    pub rows: Vec<Row>,
    /// `[T]`
    pub tokens: Vec<TokenId>,
    /// `[T]`
    pub positions: Vec<i64>,
    /// Where its keys and values are, in each group of layers.
    pub groups: Vec<GroupPlan>,
}

/// A step in the blocks of one group of layers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPlan {
    /// `[T]` block * block_size + offset: where each token's key and value go.
    pub slots: Vec<i64>,
    /// Block tables, one after the other.
    pub blocks: Vec<BlockId>,
    /// Of each row.
    pub tables: Vec<RowTable>,
}

/// The blocks that a row's tokens see and stand in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowTable {
    /// Which of the sequence's blocks is the first: those before it are behind the window.
    pub first: usize,
    /// Of the group's `blocks`; the last one has position `kv_len - 1`.
    pub blocks: Range<usize>,
}

/// A slice of one sequence.
#[derive(Clone, Debug)]
pub struct Row {
    pub id: RequestId,
    pub adapter: Option<AdapterDigest>,
    /// Of the plan's flat arrays.
    pub tokens: Range<usize>,
    /// Tokens in the cache after this step.
    pub kv_len: usize,
    /// Positions in the sequence whose outputs are asked for, to score the prompt token after each or to be pooled; all lie
    /// in this slice.
    pub wanted: Range<usize>,
    /// How many of its last logits choose tokens: none before the sequence's end, one there, and one more for each
    /// guess behind it.
    pub samples: usize,
    pub(super) seat: usize,
}

impl Row {
    /// Position in the sequence of its first token here.
    pub fn start(&self) -> usize {
        self.kv_len - self.tokens.len()
    }
}

impl StepPlan {
    /// Tokens that choose no other: pieces of prompts, without the last token of each. 0: it only decodes.
    pub fn prompt_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.tokens.len() - row.samples).sum()
    }

    /// What a row computes beyond its sequence's own tokens.
    pub fn guesses(&self, row: &Row) -> &[TokenId] {
        let tokens = &self.tokens[row.tokens.clone()];
        &tokens[tokens.len() - row.samples.saturating_sub(1)..]
    }

    pub(super) fn new(running: &[Running], groups: &Groups) -> Option<StepPlan> {
        let block_size = groups.block_size();
        let mut seats: Vec<usize> = (0..running.len())
            .filter(|&seat| running[seat].planned > 0)
            .collect();
        let adapter = |seat: usize| running[seat].seq.adapter().map(|adapter| adapter.digest);
        seats.sort_by_key(|&seat| adapter(seat));
        let n_tokens = seats.iter().map(|&seat| running[seat].planned).sum();
        let mut plan = StepPlan {
            rows: Vec::with_capacity(seats.len()),
            tokens: Vec::with_capacity(n_tokens),
            positions: Vec::with_capacity(n_tokens),
            groups: vec![GroupPlan::default(); groups.count()],
        };
        for seat in seats {
            let Running {
                seq,
                tables,
                computed,
                planned,
                guesses,
                ..
            } = &running[seat];
            let (start, kv_len) = (*computed, computed + planned);
            let first_token = plan.tokens.len();
            seq.copy_tokens(start..kv_len - guesses.len(), &mut plan.tokens);
            plan.tokens.extend(guesses);
            plan.positions
                .extend((start..kv_len).map(|position| position as i64));
            for (group, table) in plan.groups.iter_mut().zip(tables) {
                let slot = |position: usize| {
                    table.id(position / block_size) as usize * block_size + position % block_size
                };
                group
                    .slots
                    .extend((start..kv_len).map(|position| slot(position) as i64));
                let first_block = group.blocks.len();
                let seen = kv_len.div_ceil(block_size) - table.first;
                group.blocks.extend(&table.blocks[..seen]);
                group.tables.push(RowTable {
                    first: table.first,
                    blocks: first_block..group.blocks.len(),
                });
            }
            let owed = seq.owed();
            let (owed_from, owed_to) = (owed.start.max(start), owed.end.min(kv_len));
            plan.rows.push(Row {
                id: seq.id,
                adapter: adapter(seat),
                tokens: first_token..plan.tokens.len(),
                kv_len,
                wanted: owed_from.min(owed_to)..owed_to,
                samples: match kv_len >= seq.len() && seq.samples() {
                    true => 1 + guesses.len(),
                    false => 0,
                },
                seat,
            });
        }
        (!plan.rows.is_empty()).then_some(plan)
    }
}
