//! One sublayer in a pass, `x + body(norm(x))`: the unit in which the decoder runs and trains. Its backward recomputes
//! what is cheap from its input and keeps what is not.

use tch::Tensor;

use super::attention::{self, Attention};
use super::linear::{Backward, Saving, Serving, Shrunk};
use super::mlp::{self, Mlp};
use super::{Batch, Context, Decoder, Grads, Norm, TrainPass};
use crate::family::ParamId;

pub(super) struct Sublayer {
    pub norm: Norm,
    pub body: Body,
}

pub(super) enum Body {
    Attention(Attention),
    Mlp(Mlp),
}

/// What the backward of a sublayer reads; everything else is recomputed from these.
pub struct Saved {
    /// `[T, H]`
    input: Tensor,
    body: SavedBody,
    shrunk: Shrunk,
}

enum SavedBody {
    Attention(attention::Saved),
    Mlp(mlp::Saved),
}

impl Decoder {
    pub fn n_sublayers(&self) -> usize {
        self.sublayers.len()
    }

    /// Hidden states `[T, H]` through sublayer `i`.
    pub fn sublayer(&self, i: usize, hidden: Tensor, batch: &Batch) -> Tensor {
        let Sublayer { norm, body } = &self.sublayers[i];
        let x = norm.apply(&hidden);
        let mut pass = Serving {
            decoder: self,
            lora: batch.lora,
        };
        let output = match body {
            Body::Attention(attn) => {
                let rows = self.rows(attn, batch.positions, &batch.context);
                attn.forward(&x, hidden, &rows, &mut pass)
            }
            Body::Mlp(mlp) => mlp.forward(&x, hidden, &mut pass).0,
        };
        self.summed(output)
    }

    /// The same, keeping what [`Decoder::sublayer_backward`] reads.
    pub fn sublayer_saving(&self, i: usize, input: Tensor, pass: &TrainPass) -> (Tensor, Saved) {
        let Sublayer { norm, body } = &self.sublayers[i];
        let x = norm.apply(&input);
        let residual = input.shallow_clone();
        let mut saving = Saving {
            decoder: self,
            trainable: pass.trainable,
            shrunk: Shrunk::default(),
        };
        let (output, body) = match body {
            Body::Attention(attn) => {
                let context = Context::Packed {
                    cu_seqlens: pass.cu_seqlens,
                };
                let rows = self.rows(attn, pass.positions, &context);
                let (output, saved) = attn.forward_saving(&x, residual, &rows, pass.cu_seqlens, &mut saving);
                (output, SavedBody::Attention(saved))
            }
            Body::Mlp(mlp) => {
                let (output, saved) = mlp.forward(&x, residual, &mut saving);
                (output, SavedBody::Mlp(saved))
            }
        };
        let shrunk = saving.shrunk;
        (self.summed(output), Saved { input, body, shrunk })
    }

    /// `doutput [T, H]` of sublayer `i` to `dinput [T, H]`; parameters' gradients are added to `grads`.
    pub fn sublayer_backward(
        &self,
        i: usize,
        saved: Saved,
        doutput: Tensor,
        pass: &TrainPass,
        grads: &mut Grads,
    ) -> Tensor {
        let Sublayer { norm, body } = &self.sublayers[i];
        let Saved {
            input,
            body: saved,
            shrunk,
        } = saved;
        let back = Backward {
            decoder: self,
            pass,
            shrunk,
            grads,
        };
        let x = || norm.apply(&input);
        let dx = match (body, saved) {
            (Body::Attention(attn), SavedBody::Attention(saved)) => {
                attn.backward(saved, &doutput, x, &self.ropes[attn.rope], &back)
            }
            (Body::Mlp(mlp), SavedBody::Mlp(saved)) => mlp.backward(saved, &doutput, x, &back),
            _ => unreachable!("what was saved is of the same sublayer"),
        };
        let dx = self.summed(dx);
        doutput + norm.backward(ParamId::Norm(i), &input, &dx, grads)
    }

    /// Numbers per token that [`Decoder::sublayer_saving`] keeps, in all sublayers.
    pub fn saved_numbers(&self) -> usize {
        let inner = |sublayer: &Sublayer| match &sublayer.body {
            Body::Attention(attn) => attn.saved_numbers(),
            Body::Mlp(mlp) => mlp.saved_numbers(),
        };
        let inputs = self.n_sublayers() * self.spec.hidden as usize;
        inputs + self.sublayers.iter().map(inner).sum::<usize>()
    }

    fn rows<'a>(
        &'a self,
        attn: &Attention,
        positions: &'a [i64],
        context: &'a Context<'a>,
    ) -> attention::Rows<'a> {
        attention::Rows {
            positions,
            context,
            rope: &self.ropes[attn.rope],
            precision: self.precision,
        }
    }
}
