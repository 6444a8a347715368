//! An attention of the decoder: what it computes from normed rows, forward and backward side by side. Not here: the
//! attention of queries to keys itself (kernels).

use tandem_kernels::attention::{self, Heads, Options, PackedOut, packed_backward, sinks_backward};
use tandem_kernels::places::Ints;
use tandem_kernels::rope::Rope;
use tandem_kernels::weight::Precision;
use tch::Tensor;

use super::linear::{Backward, Linear, Project};
use super::norm::Norm;
use super::{Context, TrainPass};
use crate::family::{CachePlace, ParamId};

pub(super) struct Attention {
    /// Of this rank.
    pub heads: Heads,
    pub scale: f64,
    pub window: Option<i64>,
    pub cap: Option<f64>,
    /// `[heads]` float32
    pub sinks: Option<Tensor>,
    /// Of the decoder's.
    pub rope: Option<usize>,
    pub qk_norm: Option<QkNorm>,
    /// Of the decoder's: whose sinks they are.
    pub sublayer: usize,
    pub place: CachePlace,
    pub qkv: Linear,
    pub output: Linear,
}

/// Norms before the rotation.
pub(super) struct QkNorm {
    pub query: Norm,
    pub key: Norm,
}

/// What the backward reads.
pub(super) struct Saved {
    projected: Projected,
    attended: PackedOut,
}

/// What is attended.
struct Projected {
    /// The product `[T, (heads + 2 kv_heads) D]`; q and k are rotated in it where no norm stands between.
    qkv: Tensor,
    /// `[T, heads D]` and `[T, kv_heads D]`, normed and rotated.
    normed: Option<(Tensor, Tensor)>,
}

/// Where rows stand in their sequences, and what they see.
pub(super) struct Rows<'a> {
    /// `[T]`
    pub positions: &'a Ints<'a>,
    pub context: &'a Context<'a>,
    pub rope: Option<&'a Rope>,
    pub precision: Precision,
}

impl Attention {
    /// `residual + attention(x)` of `x [T, H]`; with several ranks its parts, to be summed.
    pub fn forward(
        &self,
        x: &Tensor,
        residual: Option<Tensor>,
        rows: &Rows,
        pass: &mut impl Project,
    ) -> Tensor {
        let out = match rows.context {
            Context::Packed { cu_seqlens } => {
                let (q, k, v) = self.attended(&self.project(x, rows, pass));
                attention::packed(&q, &k, &v, cu_seqlens, self.heads, self.options(), rows.precision).out
            }
            Context::Paged { cache, groups } => {
                let CachePlace { group, layer } = self.place;
                let group = &groups[group];
                let slots = &group.slots;
                let q = match (rows.rope, &self.qk_norm) {
                    // Nothing stands between the product and the rotation, nor between that and the cache.
                    (Some(rope), None) => {
                        let qkv = pass.project(&self.qkv, x);
                        let heads = self.heads;
                        attention::turn_and_write(cache, layer, &qkv, heads, rope, rows.positions, slots);
                        self.split(&qkv).0
                    }
                    _ => {
                        let (q, k, v) = self.attended(&self.project(x, rows, pass));
                        attention::write(cache, layer, &k, &v, slots);
                        q
                    }
                };
                attention::paged(&q, cache, layer, group, self.heads, self.options())
            }
        };
        pass.project_add(&self.output, &out, residual)
    }

    /// The same of whole sequences, keeping what the backward reads.
    pub fn forward_saving(
        &self,
        x: &Tensor,
        residual: Option<Tensor>,
        rows: &Rows,
        cu_seqlens: &[usize],
        pass: &mut impl Project,
    ) -> (Tensor, Saved) {
        let projected = self.project(x, rows, pass);
        let (q, k, v) = self.attended(&projected);
        let attended = attention::packed(&q, &k, &v, cu_seqlens, self.heads, self.options(), rows.precision);
        let output = pass.project_add(&self.output, &attended.out, residual);
        (output, Saved { projected, attended })
    }

    /// `doutput [T, H]` to the gradient of `x`; with several ranks its parts, to be summed. `x` is made again when it is
    /// needed.
    pub fn backward(
        &self,
        saved: Saved,
        doutput: &Tensor,
        x: impl FnOnce() -> Tensor,
        rope: Option<&Rope>,
        back: &Backward,
    ) -> Tensor {
        let Saved { projected, attended } = saved;
        let TrainPass {
            positions,
            cu_seqlens,
            ..
        } = *back.pass;
        let dattended = back.linear(&self.output, &attended.out, doutput);
        if let Some(sinks) = &self.sinks {
            let gradient = || sinks_backward(sinks, &attended, &dattended, cu_seqlens, self.heads);
            back.pass.trainable.add(ParamId::Sinks(self.sublayer), gradient);
        }
        let (q, k, v) = self.attended(&projected);
        let (mut dq, mut dk, dv) = packed_backward(
            &q,
            &k,
            &v,
            &attended,
            &dattended,
            cu_seqlens,
            self.heads,
            self.options(),
            back.decoder.precision(),
        );
        if let Some(rope) = rope {
            rope.apply_backward(&dq, positions);
            rope.apply_backward(&dk, positions);
        }
        if let Some(QkNorm { query, key }) = &self.qk_norm {
            let (q, k, _) = self.split(&projected.qkv);
            dq = query.backward(&q, &dq, back.pass.trainable);
            dk = key.backward(&k, &dk, back.pass.trainable);
        }
        back.linear(&self.qkv, &x(), &Tensor::cat(&[dq, dk, dv], 1))
    }

    fn project(&self, x: &Tensor, rows: &Rows, pass: &mut impl Project) -> Projected {
        let qkv = pass.project(&self.qkv, x);
        let (q, k, _) = self.split(&qkv);
        let normed = self
            .qk_norm
            .as_ref()
            .map(|norm| (norm.query.apply(&q), norm.key.apply(&k)));
        if let Some(rope) = rows.rope {
            let (q, k) = normed.as_ref().map_or((&q, &k), |(q, k)| (q, k));
            rope.apply(q, rows.positions);
            rope.apply(k, rows.positions);
        }
        Projected { qkv, normed }
    }

    fn attended(&self, Projected { qkv, normed }: &Projected) -> (Tensor, Tensor, Tensor) {
        let (q, k, v) = self.split(qkv);
        match normed {
            None => (q, k, v),
            Some((q, k)) => (q.shallow_clone(), k.shallow_clone(), v),
        }
    }

    /// Views of the fused projection: q `[T, heads D]`, k and v `[T, kv_heads D]`.
    fn split(&self, qkv: &Tensor) -> (Tensor, Tensor, Tensor) {
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        let (q, kv) = ((heads * head_dim) as i64, (kv_heads * head_dim) as i64);
        (
            qkv.narrow(1, 0, q),
            qkv.narrow(1, q, kv),
            qkv.narrow(1, q + kv, kv),
        )
    }

    fn options(&self) -> Options<'_> {
        Options {
            scale: self.scale,
            window: self.window,
            cap: self.cap,
            sinks: self.sinks.as_ref(),
        }
    }

    /// Numbers per token that [`Attention::forward_saving`] keeps.
    pub fn saved_numbers(&self) -> usize {
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        let normed = match self.qk_norm {
            Some(_) => heads + kv_heads,
            None => 0,
        };
        (2 * (heads + kv_heads) + normed) * head_dim
    }
}
