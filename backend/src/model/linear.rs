//! A linear of the decoder as it runs in a pass: with the adapters of a served batch, or saved for a backward; and that
//! backward. Not here: which linears there are (family), how they multiply (kernels).

use std::ops::Range;
use std::sync::OnceLock;

use tandem_kernels::linear::{
    LoraModule, LoraRows, linear, linear_add, linear_backward, linear_grouped, linear_grouped_backward,
    linear_grouped_training, linear_training,
};
use tandem_kernels::matmul;
use tandem_kernels::weight::Weight;
use tch::Tensor;

use super::experts::{Group, Grouped};
use super::grads::{Grads, add};
use super::{Decoder, Dropout, TrainPass, Trainable};
use crate::family::{LinearId, ParamId};
use crate::lora::adapter::{Adapter, AdapterRows};
use crate::lora::dora::{self, Scaled};

pub(super) struct Linear {
    pub id: LinearId,
    pub weight: Weight,
    /// `[N]` float32
    pub bias: Option<Tensor>,
    /// Of the weight's rows, where somebody asked.
    pub squares: OnceLock<Vec<f32>>,
}

impl Linear {
    /// `||w||^2` of each row of the weight.
    pub fn row_squares(&self) -> &[f32] {
        self.squares.get_or_init(|| dora::row_squares(&self.weight))
    }

    /// What DoRA scales this linear's outputs by, where the adapter has magnitudes.
    fn scaled<'a>(&self, adapter: &'a Adapter) -> Option<&'a Scaled> {
        let magnitudes = adapter.magnitudes(self.id)?;
        let module = adapter.module(self.id)?;
        Some(magnitudes.scaled(module, &self.weight, self.row_squares()))
    }
}

/// What has magnitudes has a module.
const ADAPTED: &str = "it is adapted";

/// `(W + s B A) x` of all rows, without the bias.
fn adapted(of: &Linear, x: &Tensor, module: &LoraModule) -> Tensor {
    let rows = LoraRows {
        rows: 0..x.size()[0],
        module,
    };
    linear(x, &of.weight, None, &[rows])
}

/// What differs between serving a sublayer and saving it for a backward: LoRA.
pub(super) trait Project {
    fn project(&mut self, linear: &Linear, x: &Tensor) -> Tensor;
    /// `residual + project(x)`
    fn project_add(&mut self, linear: &Linear, x: &Tensor, residual: Option<Tensor>) -> Tensor;
    /// Rows laid out by expert, each through its expert's linear.
    fn project_grouped(&mut self, linears: &Grouped, x: &Tensor) -> Tensor;
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

    /// Adds to `y` what DoRA makes of its rows, and nothing of others'.
    fn add_dora(&self, of: &Linear, x: &Tensor, y: &Tensor) {
        for AdapterRows { rows, adapter } in self.lora {
            let (Some(scaled), Some(module)) = (of.scaled(adapter), adapter.module(of.id)) else {
                continue;
            };
            let own = |all: &Tensor| all.narrow(0, rows.start as i64, rows.len() as i64);
            let more = adapted(of, &own(x).contiguous(), module) * scaled.gain(x.device());
            let _ = own(y).g_add_(&more);
        }
    }
}

impl Project for Serving<'_> {
    fn project(&mut self, of: &Linear, x: &Tensor) -> Tensor {
        let y = linear(x, &of.weight, of.bias.as_ref(), &self.lora_rows(of.id));
        self.add_dora(of, x, &y);
        y
    }

    fn project_add(&mut self, of: &Linear, x: &Tensor, residual: Option<Tensor>) -> Tensor {
        let Some(mut residual) = residual else {
            return self.project(of, x);
        };
        let lora = self.lora_rows(of.id);
        linear_add(x, &of.weight, of.bias.as_ref(), &lora, &mut residual);
        self.add_dora(of, x, &residual);
        residual
    }

    fn project_grouped(&mut self, linears: &Grouped, x: &Tensor) -> Tensor {
        let tokens: Vec<Range<usize>> = self.lora.iter().map(|rows| rows.rows.clone()).collect();
        let lora = linears.lora(&tokens, |i, of| self.lora[i].adapter.module(of.id));
        linear_grouped(x, &linears.weights(), &lora)
    }
}

impl Project for Saving<'_> {
    fn project(&mut self, of: &Linear, x: &Tensor) -> Tensor {
        let Linear { id, weight, bias, .. } = of;
        let Some(module) = self.module(*id) else {
            return linear(x, weight, bias.as_ref(), &[]);
        };
        let dropped = self.dropped(x, *id);
        let (y, shrunk) = linear_training(x, weight, bias.as_ref(), module, &dropped);
        self.shrunk.0.push((*id, shrunk));
        match self.adapter().and_then(|adapter| of.scaled(adapter)) {
            Some(scaled) => y + adapted(of, &dropped, module) * scaled.gain(x.device()),
            None => y,
        }
    }

    fn project_add(&mut self, of: &Linear, x: &Tensor, residual: Option<Tensor>) -> Tensor {
        let y = self.project(of, x);
        match residual {
            Some(residual) => residual + y,
            None => y,
        }
    }

    fn project_grouped(&mut self, linears: &Grouped, x: &Tensor) -> Tensor {
        let everyone = 0..linears.routing.n_tokens();
        let lora = linears.lora(std::slice::from_ref(&everyone), |_, of| self.module(of.id));
        if lora.is_empty() {
            return linear_grouped(x, &linears.weights(), &[]);
        }
        let dropped = linears.groups.iter().map(|Group { rows, linear, .. }| {
            let x = x.narrow(0, rows.start, rows.end - rows.start);
            self.dropped(&x, linear.id)
        });
        let dropped = match self.trainable {
            Trainable::Lora { dropout: Some(_), .. } => Tensor::cat(&dropped.collect::<Vec<_>>(), 0),
            _ => x.shallow_clone(),
        };
        let (y, shrunk) = linear_grouped_training(x, &linears.weights(), &lora, &dropped);
        for Group { rows, linear, .. } in &linears.groups {
            if let Some(module) = self.module(linear.id) {
                let of_expert = shrunk.narrow(0, rows.start, rows.end - rows.start);
                self.shrunk
                    .0
                    .push((linear.id, of_expert.narrow(1, 0, module.a.n())));
            }
        }
        y
    }
}

impl<'a> Saving<'a> {
    fn adapter(&self) -> Option<&'a Adapter> {
        match self.trainable {
            Trainable::Lora { adapter, .. } => Some(adapter),
            Trainable::Full => None,
        }
    }

    fn module(&self, id: LinearId) -> Option<&'a LoraModule> {
        self.adapter()?.module(id)
    }

    /// What the branch of a linear reads of its input.
    fn dropped(&self, x: &Tensor, id: LinearId) -> Tensor {
        match self.trainable {
            Trainable::Lora { dropout, .. } => self.decoder.dropped(x, dropout, id),
            Trainable::Full => x.shallow_clone(),
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
        if let Trainable::Lora { adapter, dropout } = self.pass.trainable
            && let Some(scaled) = of.scaled(adapter)
        {
            let outputs = adapted(
                of,
                &self.decoder.dropped(x, dropout, of.id),
                adapter.module(of.id).expect(ADAPTED),
            );
            self.magnitudes(of.id, &(dy * outputs), scaled);
            return self.dora(of, x, dy, dropout, &scaled.gain(dy.device()));
        }
        let mut dx = linear_backward(dy, &of.weight);
        self.parameters(of, x, dy);
        if let Some(of_branch) = self.branch(of.id, x, dy) {
            dx += of_branch;
        }
        dx
    }

    /// `y = x Wt + bias + gain * drop(x) (W + s B A)t + s (drop(x) At) Bt`, see [`dora`]: all but the magnitudes' gradient.
    fn dora(&self, of: &Linear, x: &Tensor, dy: &Tensor, dropout: Option<Dropout>, gain: &Tensor) -> Tensor {
        let gained = dy * gain;
        let through = dy + &gained;
        let dropped = |x: &Tensor| self.decoder.dropped(x, dropout, of.id);
        let mut dx = match dropout {
            None => linear_backward(&through, &of.weight),
            Some(_) => linear_backward(dy, &of.weight) + dropped(&linear_backward(&gained, &of.weight)),
        };
        if let Some(of_branch) = self.branch(of.id, x, &through) {
            dx += of_branch;
        }
        dx
    }

    /// `by_output [T, N]`: the gradient times what each magnitude scales, before its norm.
    fn magnitudes(&self, id: LinearId, by_output: &Tensor, scaled: &Scaled) {
        let Grads::Lora(grads) = self.grads else { return };
        let sum = by_output.sum_dim_intlist([0i64].as_slice(), false, None);
        let gradients = sum * scaled.inverse_norm(by_output.device()); // [N]
        let shape = grads
            .shape
            .linear(id)
            .expect("gradients are shaped like the adapter");
        for part in &shape.parts {
            if let Some(gradient) = grads.magnitude(part) {
                add(&gradient, gradients.narrow(0, part.columns.start, part.width()));
            }
        }
    }

    /// The same of rows laid out by expert.
    pub fn linear_grouped(&self, linears: &Grouped, x: &Tensor, dy: &Tensor) -> Tensor {
        let dx = linear_grouped_backward(dy, &linears.weights());
        for Group { rows, linear, .. } in &linears.groups {
            let part = |x: &Tensor| x.narrow(0, rows.start, rows.end - rows.start);
            self.parameters(linear, &part(x), &part(dy));
            if let Some(of_branch) = self.branch(linear.id, &part(x), &part(dy)) {
                let _ = part(&dx).g_add_(&of_branch);
            }
        }
        dx
    }

    /// Gradients of the base's own weight and bias, where they are trained.
    fn parameters(&self, of: &Linear, x: &Tensor, dy: &Tensor) {
        self.grads.add(ParamId::Linear(of.id), || matmul::tn(dy, x));
        if of.bias.is_some() {
            let sum = || dy.sum_dim_intlist([0i64].as_slice(), false, None);
            self.grads.add(ParamId::Bias(of.id), sum);
        }
    }

    /// Gradients of A and B, where there is an adapter, and what goes through them to the input.
    fn branch(&self, id: LinearId, x: &Tensor, dy: &Tensor) -> Option<Tensor> {
        let (Trainable::Lora { adapter, dropout }, Grads::Lora(grads)) = (self.pass.trainable, self.grads)
        else {
            return None;
        };
        let (module, shrunk) = (adapter.module(id)?, self.shrunk.of(id)?);
        let shape = grads
            .shape
            .linear(id)
            .expect("gradients are shaped like the adapter");
        let held = self.decoder.layout().linear(id);
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
        let dropped = |x: &Tensor| self.decoder.dropped(x, dropout, id);
        let a = grads.a(shape).narrow(1, held.inputs.start, held.n_inputs());
        add(&a, matmul::tn(&dshrunk, &dropped(x)));
        Some(dropped(&linear_backward(&dshrunk, &module.a)))
    }
}

impl Decoder {
    /// A LoRA branch's input, with some elements dropped: each linear drops its own.
    fn dropped(&self, x: &Tensor, dropout: Option<Dropout>, id: LinearId) -> Tensor {
        match dropout {
            Some(dropout) => dropout.apply(x, id, self.layout.linear(id).inputs.start),
            None => x.shallow_clone(),
        }
    }
}
