//! One sequence and its two states. Not here: which of them runs.

use std::ops::Range;
use std::sync::Arc;

use super::lookup::Lookup;
use super::shares::Payer;
use crate::TokenId;
use crate::blocks::{BlockHash, BlockPool, Table};
use crate::id::{AdapterRef, Digest, RequestId};
use crate::message::{FinishReason, Generate, Guessed};
use crate::pooling::Pooling;
use crate::sampling::Sampling;
use crate::uses::Uses;

/// First who has the lower number, then who came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    pub priority: i32,
    pub arrival: u64,
}

/// What a sequence is in both states.
pub(super) struct Sequence {
    pub id: RequestId,
    pub turn: Turn,
    pub payer: Payer,
    prompt: Arc<[TokenId]>,
    output: Vec<TokenId>,
    /// Of prompt and output, where penalties ask for them.
    uses: Option<Uses>,
    /// Prompt positions whose outputs are asked for: to score the token after each, or to be pooled.
    wanted: Range<usize>,
    /// Of those, the ones before this were delivered.
    delivered: usize,
    /// Prompt tokens found in the cache when it was first admitted.
    pub cached: Option<usize>,
    pub flow: Flow,
    adapter: Option<AdapterRef>,
    salt: Option<Digest>,
    sampling: Sampling,
    pooling: Option<Pooling>,
    max_tokens: usize,
    stop_tokens: Vec<TokenId>,
    /// Its grammar allows nothing after so many tokens of output.
    whole_at: Option<usize>,
    /// Guesses of the next step, at most: twice as many as held last time, and one.
    reach: usize,
    pub guessed: Guessed,
    /// Identity of each full block of `tokens`, as far as somebody needed it.
    chain: Vec<BlockHash>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Free,
    Held,
}

/// Holds no block.
pub(super) struct Waiting {
    pub seq: Sequence,
}

/// Holds blocks for all its tokens but perhaps the newest.
pub(super) struct Running {
    pub seq: Sequence,
    /// Its tokens when it was let in.
    pub let_in_at: usize,
    /// Of each group of layers.
    pub tables: Vec<Table>,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
    /// Its first blocks, those that others can find.
    pub named: usize,
    /// Tokens of it in the step being planned, the guesses among them.
    pub planned: usize,
    /// What may come after all its tokens, to be computed in the same step.
    pub guesses: Vec<TokenId>,
}

/// A request as the sampler and the engine look at it.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub prompt: &'a [TokenId],
    /// Tokens before the one to choose, the prompt's not counted.
    pub generated: usize,
    pub adapter: Option<&'a AdapterRef>,
    pub sampling: &'a Sampling,
    pub pooling: Option<Pooling>,
    pub stop_tokens: &'a [TokenId],
    /// Where [`Sampling::has_penalties`].
    pub uses: Option<&'a Uses>,
}

impl Sequence {
    pub fn new(arrival: u64, request: Generate) -> Sequence {
        let Generate {
            id,
            prompt,
            adapter,
            sampling,
            // The engine follows them, and says when a grammar is at its end.
            grammar: _,
            thinking: _,
            priority,
            key,
            salt,
            max_tokens,
            pooling,
            stop_tokens,
            trace: _,
        } = request;
        let wanted = match (pooling, sampling.prompt_logprobs()) {
            (Some(pooling), _) => pooling.positions(prompt.len()),
            // Nothing comes after the last.
            (None, Some(_)) => 0..prompt.len() - 1,
            (None, None) => 0..0,
        };
        Sequence {
            id,
            turn: Turn { priority, arrival },
            payer: Payer {
                key,
                adapter: adapter.as_ref().map(|adapter| adapter.digest),
            },
            uses: sampling.has_penalties().then(|| Uses::of(&prompt)),
            prompt,
            output: vec![],
            delivered: wanted.start,
            wanted,
            cached: None,
            flow: Flow::Free,
            adapter,
            salt,
            sampling,
            pooling,
            max_tokens: max_tokens as usize,
            stop_tokens,
            whole_at: None,
            reach: usize::MAX,
            guessed: Guessed::default(),
            chain: vec![],
        }
    }

    pub fn len(&self) -> usize {
        self.prompt.len() + self.output.len()
    }

    pub fn prompt_len(&self) -> usize {
        self.prompt.len()
    }

    /// Adds tokens of prompt and output to `to`.
    pub fn copy_tokens(&self, range: Range<usize>, to: &mut Vec<TokenId>) {
        let end = self.prompt.len();
        to.extend(&self.prompt[range.start.min(end)..range.end.min(end)]);
        to.extend(&self.output[range.start.max(end) - end..range.end.max(end) - end]);
    }

    pub fn adapter(&self) -> Option<&AdapterRef> {
        self.adapter.as_ref()
    }

    pub fn view(&self) -> View<'_> {
        let Sequence {
            prompt,
            output,
            adapter,
            sampling,
            pooling,
            stop_tokens,
            uses,
            ..
        } = self;
        View {
            prompt,
            generated: output.len(),
            adapter: adapter.as_ref(),
            sampling,
            pooling: *pooling,
            stop_tokens,
            uses: uses.as_ref(),
        }
    }

    /// Full blocks that may come from the cache: not the last token, whose logits are needed, and nothing whose
    /// outputs are still owed.
    pub fn reusable(&mut self, block_size: usize) -> &[BlockHash] {
        let last = self.len() - 1;
        let owed = self.owed();
        let tokens = match owed.is_empty() {
            true => last,
            false => last.min(owed.start),
        };
        self.chain_to(tokens / block_size, block_size)
    }

    /// Prompt positions whose outputs are still owed.
    pub fn owed(&self) -> Range<usize> {
        self.delivered..self.wanted.end
    }

    /// Does the last token's step end with a new token?
    pub fn samples(&self) -> bool {
        self.max_tokens > 0
    }

    /// Its grammar allows nothing after the next `tokens` that are committed.
    pub fn is_whole_after(&mut self, tokens: usize) {
        self.whole_at = Some(self.output.len() + tokens);
    }

    /// Guesses at the tokens after the one that the next step chooses.
    pub fn guess(&self, lookup: &Lookup) -> Vec<TokenId> {
        // The last token is chosen, never computed.
        let left = self.max_tokens.saturating_sub(self.output.len() + 1);
        match lookup.tokens.min(left).min(self.reach) {
            0 => vec![],
            n => lookup.guess(&self.prompt, &self.output, n),
        }
    }

    /// Of `tokens` guesses the first `accepted` were right.
    pub fn judge_guesses(&mut self, tokens: usize, accepted: usize) {
        if tokens > 0 {
            self.guessed.tokens += tokens as u32;
            self.guessed.accepted += accepted as u32;
            self.reach = 2 * accepted + 1;
        }
    }

    fn chain_to(&mut self, n_blocks: usize, block_size: usize) -> &[BlockHash] {
        let mut block = Vec::with_capacity(block_size);
        for i in self.chain.len()..n_blocks {
            let before = self.chain.last().copied();
            let before = before.unwrap_or_else(|| {
                BlockHash::seed(self.adapter.as_ref().map(|adapter| adapter.digest), self.salt)
            });
            block.clear();
            self.copy_tokens(i * block_size..(i + 1) * block_size, &mut block);
            self.chain.push(before.then(&block));
        }
        &self.chain[..n_blocks]
    }
}

impl Running {
    /// Tokens still to compute.
    pub fn pending(&self) -> usize {
        self.seq.len() - self.computed
    }

    /// `n` more tokens are in the cache: blocks they filled become findable, and blocks that windows leave behind go back.
    pub fn advance(&mut self, n: usize, pool: &mut BlockPool) {
        self.computed += n;
        self.seq.delivered = self.seq.delivered.max(self.computed.min(self.seq.wanted.end));
        let full = self.computed / pool.block_size();
        let chain = self.seq.chain_to(full, pool.block_size());
        for (block, &hash) in chain.iter().enumerate().skip(self.named) {
            pool.name(&self.tables, block, hash);
        }
        self.named = full;
        pool.slide(&mut self.tables, self.computed);
    }

    /// A prompt that is only scored or pooled ends with its last token.
    pub fn ends_unsampled(&self) -> Option<FinishReason> {
        (self.pending() == 0 && !self.seq.samples()).then_some(FinishReason::Length)
    }

    /// Takes a sampled token. Says whether it is the last.
    pub fn append(&mut self, token: TokenId) -> Option<FinishReason> {
        self.seq.output.push(token);
        if let Some(uses) = &mut self.seq.uses {
            uses.generated(token);
        }
        let generated = self.seq.output.len();
        if self.seq.stop_tokens.contains(&token) {
            return Some(FinishReason::Stop(token));
        }
        if self.seq.whole_at == Some(generated) {
            return Some(FinishReason::Complete);
        }
        (generated >= self.seq.max_tokens).then_some(FinishReason::Length)
    }

    /// Gives back blocks that only guesses needed.
    pub fn drop_guesses(&mut self, pool: &mut BlockPool) {
        if self.guesses.is_empty() {
            return;
        }
        self.guesses.clear();
        pool.shrink(&mut self.tables, self.computed, self.seq.len());
    }

    /// Blocks of all groups.
    pub fn n_blocks(&self) -> usize {
        self.tables.iter().map(|table| table.blocks.len()).sum()
    }

    pub fn audit(&self, pool: &BlockPool) -> Result<(), String> {
        let Running {
            seq,
            let_in_at: _,
            tables,
            computed,
            named,
            planned: _,
            guesses,
        } = self;
        let (id, len) = (seq.id, seq.len());
        let has_right_blocks = |(group, table): (usize, &Table)| {
            let groups = pool.groups();
            let most = groups.needed(group, *computed, len + guesses.len());
            // One that grows has what its newest tokens need with the next plan.
            let least = match groups.has_window(group) {
                true => *computed,
                false => (len - 1).max(*computed),
            };
            let ends = least.div_ceil(pool.block_size())..=most.end;
            table.first == most.start && ends.contains(&table.end())
        };
        let has_blocks =
            tables.len() == pool.groups().count() && tables.iter().enumerate().all(has_right_blocks);
        if *computed >= len || !has_blocks || *named != computed / pool.block_size() {
            return Err(format!(
                "{id:?}: {len} tokens, {computed} computed, blocks {tables:?}, {named} of them named"
            ));
        }
        Ok(())
    }
}
