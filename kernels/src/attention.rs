//! Causal attention: over the pages of a KV cache for serving ([`paged`]), over packed sequences for training
//! ([`packed`], [`packed_backward`]). Grouped queries, sliding windows, score caps and sinks; no position encoding, no
//! projections.
//!
//! # One arithmetic
//! Keys are cut into segments of [`SEGMENT`] at fixed positions. A query row takes the softmax of a segment in one
//! piece (maximum, exponentials, sum, product with the values, keys in order), and the segments' results are merged in
//! order. Which rows are computed together, how a prompt was cut into chunks, and whether a long context is split over
//! threads therefore changes no bit of a row; [`packed`] lays its keys out like the cache and gives the same bits.
//!
//! # Layout
//! The query heads of one KV head are folded into the rows of one product (rows x group), so a key panel read once
//! serves the whole group: FlashDecoding's answer to decode being bound by the cache's bytes (Dao et al., 2023). Keys
//! and values lie in the micro-kernels' panels, see [`cache`].

mod backward;
#[cfg(test)]
mod bench;
mod cache;
mod codes;
pub(crate) mod device;
mod forward;
mod packed;
mod reference;
#[cfg(test)]
mod tests;
mod tile;

use std::ops::Range;

use tch::Tensor;

use crate::vector::vector;

pub use backward::{packed_backward, sinks_backward};
pub use cache::{BLOCK_SIZE, CacheDtype, CacheShape, KvCache, turn_and_write, write};
pub use forward::{packed, paged};
pub use reference::{packed_backward_reference, packed_reference, paged_reference, sinks_backward_reference};

/// Keys whose softmax is taken in one piece. 8 blocks: enough to amortise a merge, few enough to split a context of
/// 1024 over threads; the scores of a tile stay in the second-level cache.
pub const SEGMENT: usize = 256;

/// The head dimensions the fast paths are written for are multiples of 16 up to this.
const MAX_HEAD_DIM: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`; query head h reads KV head h / (heads / kv_heads).
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options<'a> {
    /// Multiplies q k; positive, usually 1 / sqrt(head_dim).
    pub scale: f64,
    /// A query at position p sees the keys in (p - window, p].
    pub window: Option<i64>,
    /// Scores become cap * tanh(score / cap) (Gemma 2).
    pub cap: Option<f64>,
    /// [heads] float32: a learned score per query head, neither scaled nor capped, that joins the softmax's denominator
    /// without a value (gpt-oss).
    pub sinks: Option<&'a Tensor>,
}

/// [`Options`] without tensors, for the tasks of a job.
#[derive(Clone, Copy)]
struct Scoring {
    scale: f64,
    window: Option<i64>,
    cap: Option<f64>,
}

/// One sequence of a step: its rows are the last `rows.len()` of `kv_len` positions, whose keys are written already.
#[derive(Clone, Debug)]
pub struct PagedSeq<'a> {
    pub rows: Range<usize>,
    /// The blocks of the sequence in order, from its block `first_block` on: position p is slot p % BLOCK_SIZE of block
    /// table[p / BLOCK_SIZE - first_block].
    pub table: &'a [u32],
    /// The blocks before it lie behind the window of all rows, and may be others' by now.
    pub first_block: usize,
    pub kv_len: usize,
}

/// What [`packed`] gives, and what its backward needs of it.
#[derive(Debug)]
pub struct PackedOut {
    /// [T, heads * D]
    pub out: Tensor,
    /// Natural logarithm of the softmax's denominator, [T, heads].
    pub lse: Tensor,
}

impl PagedSeq<'_> {
    /// Blocks of the table that the sequence fills.
    fn n_blocks(&self) -> usize {
        self.kv_len.div_ceil(BLOCK_SIZE) - self.first_block
    }
}

impl Heads {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Whether the fast paths take this head dimension.
    fn regular(&self) -> bool {
        regular(self.head_dim)
    }

    fn check(&self, q: &Tensor) {
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = *self;
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "{heads} heads cannot share {kv_heads} KV heads"
        );
        let size = q.size();
        assert!(
            size.len() == 2 && size[1] as usize == heads * head_dim,
            "q {size:?} is not [T, {heads} * {head_dim}]"
        );
    }
}

/// Whether attention with this head dimension runs on kernels of this crate, where the processor has them; else on
/// libtorch's ops: slower, and a row's bits then depend on the rows beside it.
pub fn has_kernels(head_dim: usize) -> bool {
    regular(head_dim)
}

fn regular(head_dim: usize) -> bool {
    head_dim > 0 && head_dim.is_multiple_of(16) && head_dim <= MAX_HEAD_DIM
}

impl<'a> Options<'a> {
    fn scoring(&self) -> Scoring {
        let Options {
            scale,
            window,
            cap,
            sinks: _,
        } = *self;
        Scoring { scale, window, cap }
    }

    fn check(&self, heads: Heads) {
        if let Some(sinks) = self.sinks {
            let size = sinks.size();
            assert!(
                size == [heads.heads as i64],
                "sinks {size:?} for {} heads",
                heads.heads
            );
        }
    }

    /// The sinks, if any; None where only the reference can go.
    fn sink_values(&self) -> Option<Option<&'a [f32]>> {
        self.sinks.map_or(Some(None), |sinks| vector(sinks).map(Some))
    }
}

impl Scoring {
    /// The first key a query at `position` sees.
    fn first_key(&self, position: usize) -> usize {
        match self.window {
            Some(window) => (position + 1).saturating_sub(window.max(1) as usize),
            None => 0,
        }
    }
}
