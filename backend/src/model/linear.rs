//! A linear of the decoder as it runs in a pass: with the adapters of a served batch, or saved for a backward; and that
//! backward. Not here: which linears there are (family), how they multiply (kernels).

use tandem_kernels::linear::{LoraRows, linear, linear_add, linear_backward, linear_training};
use tandem_kernels::matmul;
use tandem_kernels::weight::Weight;
use tch::Tensor;

use super::grads::{Grads, add};
use super::{Decoder, Dropout, TrainPass, Trainable};
use crate::family::{LinearId, ParamId};
use crate::lora::adapter::AdapterRows;

pub(super) struct Linear {
    pub id: LinearId,
    pub weight: Weight,
    /// `[N]` float32
    pub bias: Option<Tensor>,
}

/// What differs between serving a sublayer and saving it for a backward: LoRA.
pub(super) trait Project {
    fn project(&mut self, linear: &Linear, x: &Tensor) -> Tensor;
    /// `residual + project(x)`
    fn project_add(&mut self, linear: &Linear, x: &Tensor, residual: Option<Tensor>) -> Tensor;
}

/// Some rows have adapters; nothing is kept.
pub(super) struct Serving<'a> {
    pub lora: &'a [AdapterRows<'a>],
}

/// All rows have the adapter in training, or none; what its gradients read is kept.
pub(super) struct Saving<'a> {
    pub decoder: &'a Decoder,
    pub trainable: Trainable<'a>,
    pub shrunk: Shrunk,
}

/// LoRA's `x At` of each adapted linear `[T, R]`.
#[derive(Default)]
pub struct Shrunk(Vec<(LinearId, Tensor)>);

impl Shrunk {
    fn of(&self, id: LinearId) -> Option<&Tensor> {
        self.0.iter().find(|(of, _)| *of == id).map(|(_, shrunk)| shrunk)
    }
}

impl Serving<'_> {
    fn lora_rows(&self, id: LinearId) -> Vec<LoraRows<'_>> {
        let rows = self.lora.iter().filter_map(|AdapterRows { rows, adapter }| {
            let module = adapter.module(id)?;
            Some(LoraRows {
                rows: rows.start as i64..rows.end as i64,
                module,
            })
        });
        rows.collect()
    }
}

impl Project for Serving<'_> {
    fn project(&mut self, of: &Linear, x: &Tensor) -> Tensor {
        linear(x, &of.weight, of.bias.as_ref(), &self.lora_rows(of.id))
    }

    fn project_add(&mut self, of: &Linear, x: &Tensor, residual: Option<Tensor>) -> Tensor {
        let Some(mut residual) = residual else {
            return self.project(of, x);
        };
        let lora = self.lora_rows(of.id);
        linear_add(x, &of.weight, of.bias.as_ref(), &lora, &mut residual);
        residual
    }
}

impl Project for Saving<'_> {
    fn project(&mut self, of: &Linear, x: &Tensor) -> Tensor {
        let Linear { id, weight, bias } = of;
        let module = match self.trainable {
            Trainable::Lora { adapter, dropout } => adapter.module(*id).map(|module| (module, dropout)),
            Trainable::Full => None,
        };
        let Some((module, dropout)) = module else {
            return linear(x, weight, bias.as_ref(), &[]);
        };
        let dropped = dropout.map(|dropout| self.decoder.dropped(x, dropout, *id));
        let (y, shrunk) = linear_training(x, weight, bias.as_ref(), module, dropped.as_ref().unwrap_or(x));
        self.shrunk.0.push((*id, shrunk));
        y
    }

    fn project_add(&mut self, of: &Linear, x: &Tensor, residual: Option<Tensor>) -> Tensor {
        let y = self.project(of, x);
        match residual {
            Some(residual) => residual + y,
            None => y,
        }
    }
}

/// What the backward of every linear of a sublayer reads.
pub(super) struct Backward<'a> {
    pub decoder: &'a Decoder,
    pub pass: &'a TrainPass<'a>,
    pub shrunk: Shrunk,
    pub grads: &'a Grads,
}

impl Backward<'_> {
    /// `y = x Wt + bias + scale (drop(x) At) Bt`: returns dx, adds the gradients of what is trained. With several ranks
    /// dx is this rank's share of a sum where outputs are divided, its own columns where inputs are; gradients are shares
    /// of a sum, zero where another rank is responsible.
    pub fn linear(&self, of: &Linear, x: &Tensor, dy: &Tensor) -> Tensor {
        let Linear { id, weight, bias } = of;
        let mut dx = linear_backward(dy, weight);
        self.grads.add(ParamId::Linear(*id), || matmul::tn(dy, x));
        if bias.is_some() {
            let sum = || dy.sum_dim_intlist([0i64].as_slice(), false, None);
            self.grads.add(ParamId::Bias(*id), sum);
        }
        let (Trainable::Lora { adapter, dropout }, Grads::Lora(grads)) = (self.pass.trainable, self.grads)
        else {
            return dx;
        };
        let (Some(module), Some(shrunk)) = (adapter.module(*id), self.shrunk.of(*id)) else {
            return dx;
        };
        let shape = grads
            .shape
            .linear(*id)
            .expect("gradients are shaped like the adapter");
        let held = self.decoder.layout().linear(*id);
        // dshrunk [T, R]: each part's columns of dy through its B.
        let dshrunk: Vec<Tensor> = module
            .parts
            .iter()
            .zip(&shape.parts)
            .map(|(part, shape)| {
                let rows = held.part(&shape.path);
                let dy = dy.narrow(1, rows.columns.start, rows.n_rows());
                let shrunk = shrunk.narrow(1, shape.ranks.start, shape.rank());
                let b = grads.b(shape);
                rows.add(&b, &(matmul::tn(&dy, &shrunk) * part.scale).to_device(b.device()));
                linear_backward(&dy, &part.b) * part.scale
            })
            .collect();
        let dshrunk = Tensor::cat(&dshrunk, 1);
        let dropped = |x: &Tensor| match dropout {
            Some(dropout) => self.decoder.dropped(x, dropout, *id),
            None => x.shallow_clone(),
        };
        let a = grads.a(shape).narrow(1, held.inputs.start, held.n_inputs());
        add(&a, matmul::tn(&dshrunk, &dropped(x)));
        dx += dropped(&linear_backward(&dshrunk, &module.a));
        dx
    }
}

impl Decoder {
    /// A LoRA branch's input, with some elements dropped: each linear drops its own.
    fn dropped(&self, x: &Tensor, dropout: Dropout, id: LinearId) -> Tensor {
        dropout.apply(x, id, self.layout.linear(id).inputs.start)
    }
}
