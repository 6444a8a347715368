//! The decoder: one forward that serves and trains, described by a [`DecoderSpec`]. Immutable while it serves;
//! adapters stand outside and travel in the batch. Not here: what to run (core), caches' sizes (engine), loss (train).
//!
//! With more ranks than one each holds a part of every linear ([`crate::family::shard`]) and runs the same code. What is
//! whole everywhere (hidden states, logits, losses) has the same bits everywhere: sums over ranks are taken in rank order.

mod attention;
mod embedding;
mod expert_tensors;
mod experts;
pub mod full;
mod gradient;
mod head;
mod linear;
mod load;
mod mlp;
mod norm;
mod stored;
mod sublayer;

use std::ops::Range;
use std::sync::Arc;

use tandem_core::TokenId;
use tandem_kernels::attention::KvCache;
use tandem_kernels::comm::Comm;
use tandem_kernels::dropout;
use tandem_kernels::places::{Ints, PagedGroup};
use tandem_kernels::rope::Rope;
use tandem_kernels::weight::Precision;
use tch::{Device, Kind, Tensor};

pub use head::{HeadBranches, HeadHere};
pub use load::{WeightOptions, planned_bytes};
pub use sublayer::Saved;

use crate::family::shard::Layout;
use crate::family::{DecoderSpec, LinearId};
use crate::lora::adapter::{Adapter, AdapterRows};
use crate::lora::fit::Fit;
use crate::lora::params::AdapterParams;
use full::FullParams;
use norm::Norm;
use stored::Stored;
use sublayer::Sublayer;

pub struct Decoder {
    /// Of the whole model.
    pub spec: DecoderSpec,
    /// What this rank holds of it.
    layout: Arc<Layout>,
    comm: Comm,
    precision: Precision,
    device: Device,
    embed: Stored,
    /// In the precision's dtype, as the reference models multiply.
    embed_scale: f64,
    sublayers: Vec<Sublayer>,
    norm: Norm,
    /// `None`: tied to `embed`.
    head: Option<Stored>,
    /// By [`crate::family::AttnSpec::rope`].
    ropes: Vec<Rope>,
}

/// Rows to compute in one forward.
pub struct Batch<'a> {
    /// `[T]`
    pub tokens: &'a [TokenId],
    /// `[T]`
    pub positions: &'a Ints<'a>,
    pub context: Context<'a>,
    /// Disjoint and in row order; rows in no group are the base model's and pay nothing.
    pub lora: &'a [AdapterRows<'a>],
}

/// What a row may attend to.
pub enum Context<'a> {
    /// Whole sequences side by side, no cache: scoring and training. `[0, len0, len0 + len1, ...]`
    Packed { cu_seqlens: &'a [usize] },
    /// Serving: rows append to cached sequences, which stand in blocks of their own in each group of layers.
    Paged {
        cache: &'a KvCache,
        groups: &'a [PagedGroup<'a>],
    },
}

/// Whole sequences of one training slice.
pub struct TrainPass<'a> {
    /// `[T]`
    pub tokens: &'a [TokenId],
    /// `[T]`
    pub positions: &'a Ints<'a>,
    pub cu_seqlens: &'a [usize],
    pub trainable: Trainable<'a>,
}

/// What a training pass differentiates, and where its backward adds the gradient (checked against peft's and torch's,
/// tests/numerics).
#[derive(Clone, Copy)]
pub enum Trainable<'a> {
    /// Adapters, each of some rows: one after the other, all rows together.
    Lora(&'a [TrainedRows<'a>]),
    /// Every parameter of the model.
    Full(&'a FullParams),
}

/// Rows of a training pass that have one adapter.
pub struct TrainedRows<'a> {
    pub rows: Range<usize>,
    pub adapter: &'a Adapter,
    /// Its `row0` is the number of the first of `rows`.
    pub dropout: Option<Dropout>,
    pub gradient: &'a AdapterParams,
}

/// Dropout on the input of every LoRA branch.
#[derive(Clone, Copy)]
pub struct Dropout {
    pub p: f64,
    pub seed: u64,
    /// Optimizer step; with `row0` it makes a mask of its own for every token of the run.
    pub step: u64,
    /// Number of the first token within the step.
    pub row0: u64,
}

impl Dropout {
    /// Each linear drops its own elements. `x` holds the linear's inputs from `column` on.
    fn apply(self, x: &Tensor, id: LinearId, column: i64) -> Tensor {
        dropout::apply(
            x,
            self.p,
            dropout::Key {
                seed: self.seed,
                step: self.step,
                stream: id.0 as u64,
            },
            dropout::Corner {
                row: self.row0,
                column: column as u32,
            },
        )
    }
}

impl Decoder {
    /// Rows' final hidden states `[T, H]`, before the final norm.
    pub fn forward(&self, batch: &Batch) -> Tensor {
        let mut hidden = self.embed(batch.tokens, batch.lora);
        for i in 0..self.n_sublayers() {
            hidden = self.sublayer(i, hidden, batch);
        }
        hidden
    }

    /// The base's rows `[T, H]`, not scaled.
    fn embedded(&self, tokens: &[TokenId]) -> Tensor {
        if self.comm.world() == 1 {
            return self.embed.whole().gather(tokens);
        }
        let held = &self.layout.vocabulary;
        let (rows, here): (Vec<i64>, Vec<TokenId>) = (0i64..)
            .zip(tokens)
            .filter(|(_, token)| held.contains(&i64::from(**token)))
            .map(|(row, token)| (row, token - held.start as TokenId))
            .unzip();
        let mut embedded = Tensor::zeros(
            [tokens.len() as i64, self.spec.hidden],
            (Kind::Float, self.device),
        );
        let rows = Tensor::from_slice(&rows).to_device(self.device);
        let _ = embedded.index_copy_(0, &rows, &self.embed.whole().gather(&here));
        self.summed(embedded)
    }

    /// The sum over ranks of what each computed from its part.
    fn summed(&self, mut x: Tensor) -> Tensor {
        if self.comm.world() > 1 {
            self.comm.all_reduce(&mut x);
        }
        x
    }

    /// Sums `x` over ranks in place, wherever it is kept.
    pub fn sum_over_ranks(&self, x: &Tensor) {
        sum_over(&self.comm, self.device, x);
    }

    /// What the head multiplies `[S, H]`: the factor on logits is in it.
    pub fn final_norm(&self, hidden: &Tensor) -> Tensor {
        scaled(&self.normed(hidden), self.spec.logits.scale)
    }

    /// What transformers calls the last hidden state `[S, H]`.
    pub fn normed(&self, hidden: &Tensor) -> Tensor {
        self.norm.apply(hidden)
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }
    pub fn device(&self) -> Device {
        self.device
    }
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }
    pub fn comm(&self) -> &Comm {
        &self.comm
    }
    /// What adapters beside it must fit.
    pub fn fit(&self) -> Fit {
        Fit {
            spec: self.spec.clone(),
            layout: Arc::clone(&self.layout),
            precision: self.precision,
            device: self.device,
        }
    }
}

/// Sums `x` over the ranks of `comm` in place, on `device`, wherever it is kept.
///
/// # Panics
/// When a rank was lost.
pub(crate) fn sum_over(comm: &Comm, device: Device, x: &Tensor) {
    if comm.world() > 1 {
        let mut sum = x.to_device(device);
        comm.all_reduce(&mut sum);
        x.shallow_clone().copy_(&sum);
        // On the CPU the sum has failed itself; on a GPU it was only queued when its call returned.
        if device != Device::Cpu {
            comm.check();
        }
    }
}

/// `x * scale`, `x` itself where that is the same.
fn scaled(x: &Tensor, scale: f64) -> Tensor {
    match scale {
        1.0 => x.shallow_clone(),
        scale => x * scale,
    }
}
