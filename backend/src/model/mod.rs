//! The decoder: one forward that serves and trains, described by a [`DecoderSpec`]. Immutable while it serves;
//! adapters stand outside and travel in the batch. Not here: what to run (core), caches' sizes (engine), loss (train).
//!
//! With more ranks than one each holds a part of every linear ([`crate::family::shard`]) and runs the same code. What is
//! whole everywhere (hidden states, logits, losses) has the same bits everywhere: sums over ranks are taken in rank order.

mod backward;
pub mod full;
mod load;

use std::sync::Arc;

use tandem_core::TokenId;
use tandem_kernels::activation;
use tandem_kernels::attention::{self, Heads, KvCache, Options, PackedOut, PagedSeq};
use tandem_kernels::comm::Comm;
use tandem_kernels::dropout;
use tandem_kernels::linear::{LoraRows, linear, linear_add, linear_training};
use tandem_kernels::loss::{
    LogProbs, LossOut, Vocabulary, linear_cross_entropy, linear_log_probs, sharded_cross_entropy,
    sharded_log_probs,
};
use tandem_kernels::norm::rms_norm;
use tandem_kernels::rope::Rope;
use tandem_kernels::weight::{Precision, Weight};
use tch::{Device, Kind, Tensor};

pub use backward::Grads;

use crate::family::shard::Layout;
use crate::family::site::Site;
use crate::family::{AttnSpec, DecoderSpec};
use crate::lora::adapter::{Adapter, AdapterRows};

pub struct Decoder {
    /// Of the whole model.
    pub spec: DecoderSpec,
    /// What this rank holds of it.
    layout: Arc<Layout>,
    comm: Comm,
    precision: Precision,
    device: Device,
    embed: Weight,
    layers: Vec<Layer>,
    norm: Tensor,
    /// `None`: tied to `embed`.
    head: Option<Weight>,
    rope: Rope,
}

struct Layer {
    attn_norm: Tensor,
    mlp_norm: Tensor,
    /// By [`Site::index`].
    linears: [Linear; 4],
}

struct Linear {
    weight: Weight,
    /// `[N]` float32
    bias: Option<Tensor>,
}

/// Rows to compute in one forward.
pub struct Batch<'a> {
    /// `[T]`
    pub tokens: &'a [TokenId],
    /// `[T]`
    pub positions: &'a [i64],
    pub context: Context<'a>,
    /// Disjoint and in row order; rows in no group are the base model's and pay nothing.
    pub lora: &'a [AdapterRows<'a>],
}

/// What a row may attend to.
pub enum Context<'a> {
    /// Whole sequences side by side, no cache: scoring and training. `[0, len0, len0 + len1, ...]`
    Packed { cu_seqlens: &'a [usize] },
    /// Serving: rows append to cached sequences. `slots`: where each row's key and value go.
    Paged {
        cache: &'a KvCache,
        slots: &'a [i64],
        seqs: &'a [PagedSeq<'a>],
    },
}

/// Whole sequences of one training slice.
pub struct TrainPass<'a> {
    /// `[T]`
    pub tokens: &'a [TokenId],
    /// `[T]`
    pub positions: &'a [i64],
    pub cu_seqlens: &'a [usize],
    pub trainable: Trainable<'a>,
}

/// What a training pass differentiates.
#[derive(Clone, Copy)]
pub enum Trainable<'a> {
    Lora {
        adapter: &'a Adapter,
        dropout: Option<Dropout>,
    },
    Full,
}

/// Dropout on the input of every LoRA branch.
#[derive(Clone, Copy)]
pub struct Dropout {
    pub p: f64,
    pub seed: u64,
    /// Optimizer step; with `row0` it makes a mask of its own for every token of the run.
    pub step: u64,
    /// Number of the pass's first token within the step.
    pub row0: u64,
}

impl Dropout {
    /// Each linear drops its own elements. `x` holds the linear's inputs from `column` on.
    fn apply(self, x: &Tensor, layer: usize, site: Site, column: i64) -> Tensor {
        let stream = (layer * Site::ALL.len() + site.index()) as u64;
        dropout::apply(
            x,
            self.p,
            dropout::Key {
                seed: self.seed,
                step: self.step,
                stream,
            },
            dropout::Corner {
                row: self.row0,
                column: column as u32,
            },
        )
    }
}

/// What the backward of half a layer reads; everything else is recomputed from these.
pub struct Saved {
    /// `[T, H]`
    input: Tensor,
    inner: Inner,
    /// LoRA's `x At` of each site `[T, R]`.
    shrunk: [Option<Tensor>; 4],
}

enum Inner {
    Attention {
        /// After rope `[T, (heads + 2 kv_heads) D]`.
        qkv: Tensor,
        attended: PackedOut,
    },
    /// `[T, 2 I]`
    Mlp { gate_up: Tensor },
}

impl Decoder {
    /// Rows' final hidden states `[T, H]`, before the final norm.
    pub fn forward(&self, batch: &Batch) -> Tensor {
        let mut hidden = self.embed(batch.tokens);
        for half in 0..self.n_halves() {
            hidden = self.half(half, hidden, batch);
        }
        hidden
    }

    /// `[T, H]`
    pub fn embed(&self, tokens: &[TokenId]) -> Tensor {
        if self.comm.world() == 1 {
            return self.embed.gather(tokens);
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
        let _ = embedded.index_copy_(0, &rows, &self.embed.gather(&here));
        self.summed(embedded)
    }

    /// Logits `[S, V]` of selected hidden rows `[S, H]`, on every rank.
    pub fn head(&self, hidden: &Tensor) -> Tensor {
        let logits = linear(&self.final_norm(hidden), self.head_weight(), None, &[]);
        let Layout { widest, .. } = *self.layout;
        if self.comm.world() == 1 {
            return logits;
        }
        // Shares of one width: the last one's may be smaller.
        let padded = logits.constant_pad_nd([0, widest - logits.size()[1]]);
        let all = self.comm.all_gather(&padded).permute([1, 0, 2]); // [S, world, widest]
        let all = all.reshape([logits.size()[0], -1]);
        all.narrow(1, 0, self.spec.vocab).contiguous()
    }

    /// Loss and gradient of rows `[R, H]` behind the final norm, the same on every rank. The gradient of the head is
    /// added into `dweight`, where asked for (with one rank only).
    pub fn cross_entropy(
        &self,
        normed: &Tensor,
        labels: &[TokenId],
        weights: &[f32],
        dweight: Option<&mut Tensor>,
    ) -> LossOut {
        match self.vocabulary() {
            None => linear_cross_entropy(normed, self.head_weight(), labels, weights, dweight),
            Some(vocabulary) => {
                assert!(dweight.is_none(), "the base is trained by one rank alone");
                sharded_cross_entropy(normed, self.head_weight(), &vocabulary, labels, weights)
            }
        }
    }

    /// log p(label) of rows `[R, H]` behind the final norm, the same on every rank.
    pub fn log_probs(&self, normed: &Tensor, labels: &[TokenId]) -> LogProbs {
        match self.vocabulary() {
            None => linear_log_probs(normed, self.head_weight(), labels),
            Some(vocabulary) => sharded_log_probs(normed, self.head_weight(), &vocabulary, labels),
        }
    }

    fn vocabulary(&self) -> Option<Vocabulary<'_>> {
        (self.comm.world() > 1).then(|| Vocabulary {
            comm: &self.comm,
            start: self.layout.vocabulary.start,
            widest: self.layout.widest,
            total: self.spec.vocab,
        })
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
        if self.comm.world() > 1 {
            let sum = self.summed(x.to_device(self.device));
            x.shallow_clone().copy_(&sum);
            // On the CPU the sum has failed itself; on a GPU it was only queued when its call returned.
            if self.device != Device::Cpu {
                self.comm.check();
            }
        }
    }

    /// What the head multiplies `[S, H]`.
    pub fn final_norm(&self, hidden: &Tensor) -> Tensor {
        rms_norm(hidden, &self.norm, self.spec.norm_eps)
    }

    /// `[v, H]`: this rank's rows.
    fn head_weight(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    pub fn n_layers(&self) -> usize {
        self.layers.len()
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

    /// Steps through the layers: attention of a layer, then its MLP.
    pub fn n_halves(&self) -> usize {
        2 * self.layers.len()
    }

    pub fn half(&self, half: usize, hidden: Tensor, batch: &Batch) -> Tensor {
        let Batch {
            tokens: _,
            positions,
            context,
            lora,
        } = batch;
        let i = half / 2;
        let attend = |q: &Tensor, k: &Tensor, v: &Tensor, attn: &AttnSpec| match context {
            Context::Packed { cu_seqlens } => {
                attention::packed(q, k, v, cu_seqlens, heads(attn), options(attn), self.precision).out
            }
            Context::Paged { cache, slots, seqs } => {
                attention::write(cache, i, k, v, slots);
                attention::paged(q, cache, i, seqs, heads(attn), options(attn))
            }
        };
        let mut pass = Serving {
            decoder: self,
            layer: i,
            lora,
            attend,
        };
        match half.is_multiple_of(2) {
            true => self.attention_half(i, hidden, positions, &mut pass).0,
            false => self.mlp_half(i, hidden, &mut pass).0,
        }
    }

    /// The same, keeping what [`Decoder::half_backward`] reads.
    pub fn half_saving(&self, half: usize, input: Tensor, pass: &TrainPass) -> (Tensor, Saved) {
        let mut saving = Saving {
            decoder: self,
            layer: half / 2,
            pass,
            attended: None,
            shrunk: [const { None }; 4],
        };
        let hidden = input.shallow_clone();
        let (output, inner) = if half.is_multiple_of(2) {
            let (output, qkv) = self.attention_half(half / 2, hidden, pass.positions, &mut saving);
            let attended = saving.attended.take().expect("it attended");
            (output, Inner::Attention { qkv, attended })
        } else {
            let (output, gate_up) = self.mlp_half(half / 2, hidden, &mut saving);
            (output, Inner::Mlp { gate_up })
        };
        let Saving { shrunk, .. } = saving;
        (output, Saved { input, inner, shrunk })
    }

    /// The first half of a pre-norm layer, for every kind of pass, and its q, k and v after rope.
    fn attention_half(
        &self,
        i: usize,
        hidden: Tensor,
        positions: &[i64],
        pass: &mut impl Pass,
    ) -> (Tensor, Tensor) {
        let (layer, attn) = (&self.layers[i], &self.layout.local.layers[i].attn);
        let x = rms_norm(&hidden, &layer.attn_norm, self.spec.norm_eps);
        let qkv = pass.project(Site::Qkv, &x); // [T, (heads + 2 kv_heads) D]
        let (q, k, v) = split_qkv(&qkv, attn);
        self.rope.apply(&q, positions);
        self.rope.apply(&k, positions);
        let attended = pass.attend(&q, &k, &v, attn); // [T, heads D]
        (
            self.summed(pass.project_add(Site::Output, &attended, hidden)),
            qkv,
        )
    }

    /// The second half, and what its activation reads.
    fn mlp_half(&self, i: usize, hidden: Tensor, pass: &mut impl Pass) -> (Tensor, Tensor) {
        let x = rms_norm(&hidden, &self.layers[i].mlp_norm, self.spec.norm_eps);
        let gate_up = pass.project(Site::GateUp, &x); // [T, 2 I]
        let activated = activation::gated(&gate_up, self.layout.local.layers[i].mlp.activation); // [T, I]
        (
            self.summed(pass.project_add(Site::Down, &activated, hidden)),
            gate_up,
        )
    }

    /// A residual is in the sum over ranks once: rank 0 brings it.
    fn brings_residual(&self) -> bool {
        self.comm.rank() == 0
    }

    /// A LoRA branch's input.
    fn dropped(&self, x: &Tensor, dropout: Option<Dropout>, layer: usize, site: Site) -> Tensor {
        let column = self.layout.site(layer, site).inputs.start;
        match dropout {
            Some(dropout) => dropout.apply(x, layer, site, column),
            None => x.shallow_clone(),
        }
    }

    fn linear_of(&self, layer: usize, site: Site) -> &Linear {
        &self.layers[layer].linears[site.index()]
    }
}

/// What differs between serving a layer and saving it for a backward: LoRA and attention.
trait Pass {
    fn project(&mut self, site: Site, x: &Tensor) -> Tensor;
    /// `residual + project(x)`; with several ranks its parts, to be summed
    fn project_add(&mut self, site: Site, x: &Tensor, residual: Tensor) -> Tensor;
    fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, attn: &AttnSpec) -> Tensor;
}

struct Serving<'a, F> {
    decoder: &'a Decoder,
    layer: usize,
    lora: &'a [AdapterRows<'a>],
    attend: F,
}

impl<F> Serving<'_, F> {
    fn lora_rows(&self, site: Site) -> Vec<LoraRows<'_>> {
        let rows = self.lora.iter().filter_map(|AdapterRows { rows, adapter }| {
            let module = adapter.module(self.layer, site)?;
            Some(LoraRows {
                rows: rows.start as i64..rows.end as i64,
                module,
            })
        });
        rows.collect()
    }
}

impl<F: FnMut(&Tensor, &Tensor, &Tensor, &AttnSpec) -> Tensor> Pass for Serving<'_, F> {
    fn project(&mut self, site: Site, x: &Tensor) -> Tensor {
        let Linear { weight, bias } = self.decoder.linear_of(self.layer, site);
        linear(x, weight, bias.as_ref(), &self.lora_rows(site))
    }

    fn project_add(&mut self, site: Site, x: &Tensor, mut residual: Tensor) -> Tensor {
        if !self.decoder.brings_residual() {
            return self.project(site, x);
        }
        let Linear { weight, bias } = self.decoder.linear_of(self.layer, site);
        linear_add(x, weight, bias.as_ref(), &self.lora_rows(site), &mut residual);
        residual
    }

    fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, attn: &AttnSpec) -> Tensor {
        (self.attend)(q, k, v, attn)
    }
}

struct Saving<'a> {
    decoder: &'a Decoder,
    layer: usize,
    pass: &'a TrainPass<'a>,
    attended: Option<PackedOut>,
    shrunk: [Option<Tensor>; 4],
}

impl Pass for Saving<'_> {
    fn project(&mut self, site: Site, x: &Tensor) -> Tensor {
        let Linear { weight, bias } = self.decoder.linear_of(self.layer, site);
        let module = match self.pass.trainable {
            Trainable::Lora { adapter, dropout } => {
                adapter.module(self.layer, site).map(|module| (module, dropout))
            }
            Trainable::Full => None,
        };
        let Some((module, dropout)) = module else {
            return linear(x, weight, bias.as_ref(), &[]);
        };
        let (y, shrunk) = match dropout {
            Some(_) => {
                let dropped = self.decoder.dropped(x, dropout, self.layer, site);
                linear_training(x, weight, bias.as_ref(), module, &dropped)
            }
            None => linear_training(x, weight, bias.as_ref(), module, x),
        };
        self.shrunk[site.index()] = Some(shrunk);
        y
    }

    fn project_add(&mut self, site: Site, x: &Tensor, residual: Tensor) -> Tensor {
        match self.decoder.brings_residual() {
            true => residual + self.project(site, x),
            false => self.project(site, x),
        }
    }

    fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, attn: &AttnSpec) -> Tensor {
        let cu_seqlens = self.pass.cu_seqlens;
        let attended = attention::packed(
            q,
            k,
            v,
            cu_seqlens,
            heads(attn),
            options(attn),
            self.decoder.precision,
        );
        self.attended.insert(attended).out.shallow_clone()
    }
}

/// Views of the fused projection: q `[T, heads D]`, k and v `[T, kv_heads D]`.
fn split_qkv(qkv: &Tensor, attn: &AttnSpec) -> (Tensor, Tensor, Tensor) {
    let (q, kv) = (attn.heads * attn.head_dim, attn.kv_heads * attn.head_dim);
    (
        qkv.narrow(1, 0, q),
        qkv.narrow(1, q, kv),
        qkv.narrow(1, q + kv, kv),
    )
}

fn heads(attn: &AttnSpec) -> Heads {
    let size = |n: i64| n as usize;
    Heads {
        heads: size(attn.heads),
        kv_heads: size(attn.kv_heads),
        head_dim: size(attn.head_dim),
    }
}

fn options(attn: &AttnSpec) -> Options {
    Options {
        scale: attn.scale,
        window: None,
        cap: None,
    }
}
