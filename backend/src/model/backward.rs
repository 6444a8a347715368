//! The backward of a layer's halves, written out: the mirrors of `attention_half` and `mlp_half`, read them beside
//! those. Base weights are frozen (`dx = dy W` only) unless everything is trained. Checked against peft's gradients
//! (tests/numerics).

use tandem_kernels::activation::{gated, gated_backward};
use tandem_kernels::attention::packed_backward;
use tandem_kernels::linear::linear_backward;
use tandem_kernels::matmul;
use tandem_kernels::norm::{rms_norm, rms_norm_backward_input, rms_norm_backward_weight};
use tch::Tensor;

use super::full::{FullParams, Slot};
use super::{Decoder, Inner, Saved, TrainPass, Trainable, heads, options, split_qkv};
use crate::family::site::Site;
use crate::lora::params::AdapterParams;

/// Where gradients are added: shaped like what is trained.
pub enum Grads {
    Lora(AdapterParams),
    Full(FullParams),
}

impl Grads {
    /// All of them, `[P]` float32.
    pub fn flat(&self) -> &Tensor {
        match self {
            Grads::Lora(grads) => &grads.flat,
            Grads::Full(grads) => &grads.flat,
        }
    }

    fn add(&self, slot: Slot, gradient: impl FnOnce() -> Tensor) {
        if let Grads::Full(grads) = self {
            add(&grads.view(slot), gradient());
        }
    }
}

impl Decoder {
    /// `doutput [T, H]` of half a layer to `dinput [T, H]`; parameters' gradients are added to `grads`.
    pub fn half_backward(
        &self,
        half: usize,
        saved: Saved,
        doutput: Tensor,
        pass: &TrainPass,
        grads: &mut Grads,
    ) -> Tensor {
        let Saved { input, inner, shrunk } = saved;
        let i = half / 2;
        let (layer, spec, eps) = (&self.layers[i], &self.layout.local.layers[i], self.spec.norm_eps);
        let site = |site: Site, x: &Tensor, dy: &Tensor| {
            self.linear_site_backward(i, site, x, shrunk[site.index()].as_ref(), dy, pass, grads)
        };
        let (slot, weight, dx) = match inner {
            Inner::Mlp { gate_up } => {
                let activated = gated(&gate_up, spec.mlp.activation);
                let dactivated = site(Site::Down, &activated, &doutput);
                drop(activated);
                let dgate_up = gated_backward(&gate_up, &dactivated, spec.mlp.activation);
                drop((gate_up, dactivated));
                let x = rms_norm(&input, &layer.mlp_norm, eps);
                (
                    Slot::MlpNorm(i),
                    &layer.mlp_norm,
                    site(Site::GateUp, &x, &dgate_up),
                )
            }
            Inner::Attention { qkv, attended } => {
                let dattended = site(Site::Output, &attended.out, &doutput);
                let (q, k, v) = split_qkv(&qkv, &spec.attn);
                let (dq, dk, dv) = packed_backward(
                    &q,
                    &k,
                    &v,
                    &attended,
                    &dattended,
                    pass.cu_seqlens,
                    heads(&spec.attn),
                    options(&spec.attn),
                    self.precision,
                );
                self.rope.apply_inverse(&dq, pass.positions);
                self.rope.apply_inverse(&dk, pass.positions);
                let dqkv = Tensor::cat(&[dq, dk, dv], 1);
                let x = rms_norm(&input, &layer.attn_norm, eps);
                (Slot::AttnNorm(i), &layer.attn_norm, site(Site::Qkv, &x, &dqkv))
            }
        };
        let dx = self.summed(dx);
        doutput + self.norm_backward(slot, &input, weight, &dx, grads)
    }

    /// `y = x Wt + bias + scale (drop(x) At) Bt`: returns dx, adds the gradients of what is trained. With several ranks
    /// dx is this rank's share of a sum where outputs are divided, its own columns where inputs are; gradients are shares
    /// of a sum, zero where another rank is responsible.
    #[expect(
        clippy::too_many_arguments,
        reason = "a linear's whole context, used four times above"
    )]
    fn linear_site_backward(
        &self,
        layer: usize,
        site: Site,
        x: &Tensor,
        shrunk: Option<&Tensor>,
        dy: &Tensor,
        pass: &TrainPass,
        grads: &Grads,
    ) -> Tensor {
        let linear = self.linear_of(layer, site);
        let mut dx = linear_backward(dy, &linear.weight);
        grads.add(Slot::Linear(layer, site), || matmul::tn(dy, x));
        if linear.bias.is_some() {
            grads.add(Slot::Bias(layer, site), || {
                dy.sum_dim_intlist([0i64].as_slice(), false, None)
            });
        }
        let (Trainable::Lora { adapter, dropout }, Grads::Lora(grads)) = (pass.trainable, grads) else {
            return dx;
        };
        let (Some(module), Some(shrunk)) = (adapter.module(layer, site), shrunk) else {
            return dx;
        };
        let shape = grads
            .shape
            .site(layer, site)
            .expect("gradients are shaped like the adapter");
        let held = self.layout.site(layer, site);
        // dshrunk [T, R]: each part's columns of dy through its B.
        let dshrunk: Vec<Tensor> = module
            .parts
            .iter()
            .zip(&shape.parts)
            .map(|(part, shape)| {
                let rows = held.part(&shape.path);
                let dy = dy.narrow(1, rows.columns.start, rows.n_rows());
                let shrunk = shrunk.narrow(1, shape.ranks.start, shape.rank());
                let b = grads.b(shape).narrow(0, rows.rows.start, rows.n_rows());
                add(&b, matmul::tn(&dy, &shrunk) * part.scale);
                linear_backward(&dy, &part.b) * part.scale
            })
            .collect();
        let dshrunk = Tensor::cat(&dshrunk, 1);
        let dropped = |x: &Tensor| self.dropped(x, dropout, layer, site);
        let a = grads.a(shape).narrow(1, held.inputs.start, held.n_inputs());
        add(&a, matmul::tn(&dshrunk, &dropped(x)));
        dx += dropped(&linear_backward(&dshrunk, &module.a));
        dx
    }

    /// Through the final norm: `d(norm(hidden)) [R, H]` to `dhidden [R, H]`.
    pub fn final_norm_backward(&self, hidden: &Tensor, dnormed: &Tensor, grads: &mut Grads) -> Tensor {
        self.norm_backward(Slot::FinalNorm, hidden, &self.norm, dnormed, grads)
    }

    /// `d(norm(x))` to `dx`. The norm's own gradient is computed only where it is trained.
    fn norm_backward(&self, slot: Slot, x: &Tensor, weight: &Tensor, dy: &Tensor, grads: &Grads) -> Tensor {
        let eps = self.spec.norm_eps;
        grads.add(slot, || rms_norm_backward_weight(x, weight, eps, dy));
        rms_norm_backward_input(x, weight, eps, dy)
    }

    /// The embedding's gradient (nothing when it is frozen).
    pub fn embed_backward(&self, tokens: &[u32], dhidden: &Tensor, grads: &mut Grads) {
        if let Grads::Full(grads) = grads {
            let rows: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
            let mut embed = grads.view(Slot::Embed);
            let _ = embed.index_add_(
                0,
                &Tensor::from_slice(&rows).to_device(embed.device()),
                &dhidden.to_device(embed.device()),
            );
        }
    }
}

/// Gradients are kept where AdamW steps, on the CPU, wherever they were computed.
fn add(to: &Tensor, gradient: Tensor) {
    let _ = to.shallow_clone().g_add_(&gradient.to_device(to.device()));
}
