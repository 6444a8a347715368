//! A [`StepPlan`] as the decoder takes it: sequences of the cache, groups of rows by adapter, rows whose logits are
//! wanted. Not here: what to run (core), how (model).

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tandem_core::TokenId;
use tandem_core::id::{AdapterDigest, RequestId};
use tandem_core::message::Scored;
use tandem_core::sched::{GroupPlan, Row, RowTable, StepPlan};
use tandem_kernels::attention::{KvCache, PagedSeq};
use tandem_kernels::places::{PagedGroup, Places};
use tch::Tensor;

use crate::lora::adapter::{Adapter, AdapterRows};
use crate::model::{Batch, Context, Decoder};

/// What a [`Batch`] borrows beside the plan.
pub struct StepInputs<'a> {
    tokens: &'a [TokenId],
    places: Places<'a>,
    lora: Vec<AdapterRows<'a>>,
}

/// The flat arrays of a plan, and what each of its rows is, as far as a forward asks: what travels to other ranks.
pub struct Step<'a> {
    /// `[T]`
    pub tokens: &'a [TokenId],
    /// `[T]`
    pub positions: &'a [i64],
    pub groups: &'a [GroupPlan],
    pub rows: Vec<StepRow>,
}

/// A slice of one sequence, as [`tandem_core::sched::Row`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    pub adapter: Option<AdapterDigest>,
    /// Of the flat arrays.
    pub tokens: Range<usize>,
    pub kv_len: usize,
}

impl<'a> Step<'a> {
    pub fn of(plan: &'a StepPlan) -> Step<'a> {
        let row = |row: &Row| StepRow {
            adapter: row.adapter,
            tokens: row.tokens.clone(),
            kv_len: row.kv_len,
        };
        Step {
            tokens: &plan.tokens,
            positions: &plan.positions,
            groups: &plan.groups,
            rows: plan.rows.iter().map(row).collect(),
        }
    }
}

impl<'a> StepInputs<'a> {
    /// For `decoder` and its cache. `adapter` finds a resident adapter: a step names only such.
    pub fn new(
        step: Step<'a>,
        decoder: &Decoder,
        cache: &KvCache,
        adapter: impl Fn(AdapterDigest) -> &'a Adapter,
    ) -> StepInputs<'a> {
        let mut lora: Vec<(AdapterDigest, Range<usize>)> = vec![];
        for row in &step.rows {
            let Some(digest) = row.adapter else { continue };
            match lora.last_mut() {
                // The plan is sorted by adapter, so equal neighbours are one group.
                Some((last, rows)) if *last == digest => rows.end = row.tokens.end,
                _ => lora.push((digest, row.tokens.clone())),
            }
        }
        let lora = lora
            .into_iter()
            .map(|(digest, rows)| AdapterRows {
                rows,
                adapter: adapter(digest),
            })
            .collect();
        let seqs = |group: &'a GroupPlan| {
            let seq = |(row, table): (&StepRow, &RowTable)| PagedSeq {
                rows: row.tokens.clone(),
                table: &group.blocks[table.blocks.clone()],
                first_block: table.first,
                kv_len: row.kv_len,
            };
            step.rows.iter().zip(&group.tables).map(seq).collect()
        };
        let group = |(i, group): (usize, &'a GroupPlan)| {
            let shapes = decoder
                .heads_of(i)
                .into_iter()
                .map(|heads| (heads, cache.dtype()));
            PagedGroup::new(&group.slots, seqs(group)).attended(shapes)
        };
        let groups = step.groups.iter().enumerate().map(group).collect();
        StepInputs {
            tokens: step.tokens,
            places: Places::new(decoder.device(), step.tokens, step.positions, groups),
            lora,
        }
    }

    /// Logits `[S, V]` of the step's rows `rows` in `hidden [T, H]`, each under who answers it.
    pub fn logits(&self, decoder: &Decoder, hidden: &Tensor, rows: &[i64]) -> Tensor {
        decoder.head(&select(hidden, rows), &select_lora(&self.lora, rows))
    }

    pub fn batch(&'a self, cache: &'a KvCache) -> Batch<'a> {
        let context = Context::Paged {
            cache,
            groups: &self.places.groups,
        };
        Batch {
            tokens: self.tokens,
            positions: &self.places.positions,
            context,
            lora: &self.lora,
        }
    }
}

/// The rows that choose tokens.
pub fn sampling(plan: &StepPlan) -> impl Iterator<Item = &Row> {
    plan.rows.iter().filter(|row| row.samples > 0)
}

/// Flat indices of the rows that choose a next token, in the plan's order: those of a sequence follow each other.
pub fn sampled_rows(plan: &StepPlan) -> Vec<i64> {
    let last = |row: &Row| row.tokens.end - row.samples..row.tokens.end;
    plan.rows.iter().flat_map(last).map(|row| row as i64).collect()
}

/// Of the tokens chosen at a sequence's end and after each of its guesses: those up to the first that is not the guess.
/// What comes after it was chosen after a text that is not there.
pub fn until_wrong<E>(
    chosen: impl IntoIterator<Item = Result<Scored, E>>,
    guesses: &[TokenId],
) -> Result<Vec<Scored>, E> {
    let mut told = Vec::with_capacity(1 + guesses.len());
    for token in chosen {
        let token = token?;
        let held = guesses.get(told.len()) == Some(&token.token);
        told.push(token);
        if !held {
            break;
        }
    }
    Ok(told)
}

/// A prompt position whose logits score the prompt token after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoredRow {
    pub id: RequestId,
    /// Flat index of the hidden row.
    pub row: i64,
    /// The token that came.
    pub target: TokenId,
    pub n_top: u32,
}

/// `next(row, position)`: the prompt token after `position`, and how many alternatives its client wants; `None` for a prompt
/// that is not scored.
pub fn scored_rows(plan: &StepPlan, next: impl Fn(&Row, usize) -> Option<(TokenId, u32)>) -> Vec<ScoredRow> {
    let mut scored = vec![];
    for row in &plan.rows {
        for position in row.wanted.clone() {
            let Some((target, n_top)) = next(row, position) else {
                break;
            };
            let flat = row.tokens.start + position - row.start();
            scored.push(ScoredRow {
                id: row.id,
                row: flat as i64,
                target,
                n_top,
            });
        }
    }
    scored
}

/// `hidden [T, H]` -> `[rows.len(), H]`, without a copy when that is all of it.
pub fn select(hidden: &Tensor, rows: &[i64]) -> Tensor {
    let all = rows.len() as i64 == hidden.size()[0];
    match all {
        // Indices are ascending and distinct, so as many as there are is each of them.
        true => hidden.shallow_clone(),
        false => hidden.index_select(0, &Tensor::from_slice(rows).to_device(hidden.device())),
    }
}

/// The groups of `lora` among `rows`, whose indices are ascending.
fn select_lora<'a>(lora: &[AdapterRows<'a>], rows: &[i64]) -> Vec<AdapterRows<'a>> {
    let before = |end: usize| rows.partition_point(|&row| row < end as i64);
    let chosen = lora.iter().map(|group| AdapterRows {
        rows: before(group.rows.start)..before(group.rows.end),
        adapter: group.adapter,
    });
    chosen.filter(|group| !group.rows.is_empty()).collect()
}
