//! An attention of the decoder: what it computes from normed rows, forward and backward side by side. Not here: the
//! attention of queries to keys itself (kernels).

use tandem_kernels::attention::{self, Heads, Options, PackedOut, packed_backward};
use tandem_kernels::rope::Rope;
use tandem_kernels::weight::Precision;
use tch::Tensor;

use super::linear::{Backward, Linear, Project};
use super::{Context, TrainPass};

pub(super) struct Attention {
    /// Of this rank.
    pub heads: Heads,
    pub scale: f64,
    /// Of the decoder's.
    pub rope: usize,
    /// Of the KV cache's layers.
    pub cache_layer: usize,
    pub qkv: Linear,
    pub output: Linear,
}

/// What the backward reads.
pub(super) struct Saved {
    /// After rope `[T, (heads + 2 kv_heads) D]`.
    qkv: Tensor,
    attended: PackedOut,
}

/// Where rows stand in their sequences, and what they see.
pub(super) struct Rows<'a> {
    /// `[T]`
    pub positions: &'a [i64],
    pub context: &'a Context<'a>,
    pub rope: &'a Rope,
    pub precision: Precision,
}

impl Attention {
    /// `residual + attention(x)` of `x [T, H]`; with several ranks its parts, to be summed.
    pub fn forward(&self, x: &Tensor, residual: Tensor, rows: &Rows, pass: &mut impl Project) -> Tensor {
        let (q, k, v) = self.split(&self.rotated(x, rows, pass));
        let out = match rows.context {
            Context::Packed { cu_seqlens } => {
                attention::packed(&q, &k, &v, cu_seqlens, self.heads, self.options(), rows.precision).out
            }
            Context::Paged { cache, slots, seqs } => {
                attention::write(cache, self.cache_layer, &k, &v, slots);
                attention::paged(&q, cache, self.cache_layer, seqs, self.heads, self.options())
            }
        };
        pass.project_add(&self.output, &out, residual)
    }

    /// The same of whole sequences, keeping what the backward reads.
    pub fn forward_saving(
        &self,
        x: &Tensor,
        residual: Tensor,
        rows: &Rows,
        cu_seqlens: &[usize],
        pass: &mut impl Project,
    ) -> (Tensor, Saved) {
        let qkv = self.rotated(x, rows, pass);
        let (q, k, v) = self.split(&qkv);
        let attended = attention::packed(&q, &k, &v, cu_seqlens, self.heads, self.options(), rows.precision);
        let output = pass.project_add(&self.output, &attended.out, residual);
        (output, Saved { qkv, attended })
    }

    /// `doutput [T, H]` to the gradient of `x`; with several ranks its parts, to be summed. `x` is made again when it is
    /// needed.
    pub fn backward(
        &self,
        saved: Saved,
        doutput: &Tensor,
        x: impl FnOnce() -> Tensor,
        rope: &Rope,
        back: &Backward,
    ) -> Tensor {
        let Saved { qkv, attended } = saved;
        let TrainPass {
            positions,
            cu_seqlens,
            ..
        } = *back.pass;
        let dattended = back.linear(&self.output, &attended.out, doutput);
        let (q, k, v) = self.split(&qkv);
        let (dq, dk, dv) = packed_backward(
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
        rope.apply_backward(&dq, positions);
        rope.apply_backward(&dk, positions);
        back.linear(&self.qkv, &x(), &Tensor::cat(&[dq, dk, dv], 1))
    }

    /// q, k and v after rope `[T, (heads + 2 kv_heads) D]`.
    fn rotated(&self, x: &Tensor, rows: &Rows, pass: &mut impl Project) -> Tensor {
        let qkv = pass.project(&self.qkv, x);
        let (q, k, _) = self.split(&qkv);
        rows.rope.apply(&q, rows.positions);
        rows.rope.apply(&k, rows.positions);
        qkv
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
            window: None,
            cap: None,
            sinks: None,
        }
    }

    /// Numbers per token that [`Attention::forward_saving`] keeps.
    pub fn saved_numbers(&self) -> usize {
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        2 * (heads + kv_heads) * head_dim
    }
}
