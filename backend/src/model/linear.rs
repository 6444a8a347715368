//! A linear of the decoder as it runs in a pass: with the adapters of a served batch, or saved for a backward; and that
//! backward. Not here: which linears there are (family), how they multiply (kernels).

use std::ops::Range;
use std::sync::OnceLock;

use tandem_kernels::linear::{
    BranchBack, LoraModule, LoraRows, linear, linear_add, linear_backward, linear_backward_with,
    linear_grouped, linear_grouped_backward, linear_grouped_training, linear_training,
};
use tandem_kernels::matmul;
use tandem_kernels::weight::Weight;
use tch::{Kind, Tensor};

use super::experts::{Group, Grouped};
use super::gradient::{add, narrow_rows};
use super::stored::Stored;
use super::{Decoder, Dropout, TrainPass, Trainable, TrainedRows};
use crate::family::{LinearId, ParamId};
use crate::lora::adapter::{Adapter, AdapterRows};
use crate::lora::dora::{self, Scaled};
use crate::lora::params::AdapterParams;

pub(super) struct Linear {
    pub id: LinearId,
    pub weight: Stored,
    /// `[N]` float32
    pub bias: Option<Tensor>,
    /// Of the weight's rows, where somebody asked.
    pub squares: OnceLock<Vec<f32>>,
}

impl Linear {
    /// `||w||^2` of each row of its weight.
    pub fn row_squares(&self, weight: &Weight) -> &[f32] {
        self.squares.get_or_init(|| dora::row_squares(weight))
    }

    /// What DoRA scales this linear's outputs by, where the adapter has magnitudes.
    fn scaled<'a>(&self, weight: &Weight, adapter: &'a Adapter) -> Option<&'a Scaled> {
        let magnitudes = adapter.magnitudes(self.id)?;
        let module = adapter.module(self.id)?;
        Some(magnitudes.scaled(module, weight, self.row_squares(weight)))
    }
}

/// What has magnitudes has a module.
const ADAPTED: &str = "it is adapted";

/// `(W + s B A) x` of all rows, without the bias.
fn adapted(weight: &Weight, x: &Tensor, module: &LoraModule) -> Tensor {
    let rows = LoraRows {
        rows: 0..x.size()[0],
        module,
    };
    linear(x, weight, None, &[rows])
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

/// All rows have an adapter in training, or none has; what its gradients read is kept.
pub(super) struct Saving<'a> {
    pub decoder: &'a Decoder,
    pub trainable: Trainable<'a>,
    pub shrunk: Shrunk,
}

/// LoRA's `x At` of each adapted linear: all rows, as wide as the largest of their modules' ranks.
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
    fn add_dora(&self, of: &Linear, weight: &Weight, x: &Tensor, y: &Tensor) {
        for AdapterRows { rows, adapter } in self.lora {
            let (Some(scaled), Some(module)) = (of.scaled(weight, adapter), adapter.module(of.id)) else {
                continue;
            };
            let own = |all: &Tensor| all.narrow(0, rows.start as i64, rows.len() as i64);
            let more = adapted(weight, &own(x).contiguous(), module) * scaled.gain(x.device());
            let _ = own(y).g_add_(&more);
        }
    }
}

impl Project for Serving<'_> {
    fn project(&mut self, of: &Linear, x: &Tensor) -> Tensor {
        let weight = of.weight.whole();
        let y = linear(x, &weight, of.bias.as_ref(), &self.lora_rows(of.id));
        self.add_dora(of, &weight, x, &y);
        y
    }

    fn project_add(&mut self, of: &Linear, x: &Tensor, residual: Option<Tensor>) -> Tensor {
        let Some(mut residual) = residual else {
            return self.project(of, x);
        };
        let lora = self.lora_rows(of.id);
        let weight = of.weight.whole();
        linear_add(x, &weight, of.bias.as_ref(), &lora, &mut residual);
        self.add_dora(of, &weight, x, &residual);
        residual
    }

    fn project_grouped(&mut self, linears: &Grouped, x: &Tensor) -> Tensor {
        let tokens: Vec<Range<usize>> = self.lora.iter().map(|rows| rows.rows.clone()).collect();
        let lora = linears.lora(&tokens, |i, of| self.lora[i].adapter.module(of.id));
        linear_grouped(x, &linears.weights(&linears.whole()), &lora)
    }
}

impl Project for Saving<'_> {
    fn project(&mut self, of: &Linear, x: &Tensor) -> Tensor {
        self.around(of, x, None)
    }

    fn project_add(&mut self, of: &Linear, x: &Tensor, residual: Option<Tensor>) -> Tensor {
        self.around(of, x, residual.as_ref())
    }

    fn project_grouped(&mut self, linears: &Grouped, x: &Tensor) -> Tensor {
        let trained = self.trainable.adapted();
        let tokens: Vec<Range<usize>> = trained.iter().map(|rows| rows.rows.clone()).collect();
        let lora = linears.lora(&tokens, |i, of| trained[i].adapter.module(of.id));
        let whole = linears.whole();
        let weights = linears.weights(&whole);
        if lora.is_empty() {
            return linear_grouped(x, &weights, &[]);
        }
        let dropped = linears.groups.iter().map(|group| {
            let own = |rows| (rows, narrow_rows(x, linears.rows_of(group, rows)));
            self.dropped(
                &narrow_rows(x, group.rows.clone()),
                group.linear.id,
                trained.iter().map(own),
            )
        });
        let dropped = match drops(trained) {
            true => Tensor::cat(&dropped.collect::<Vec<_>>(), 0),
            false => x.shallow_clone(),
        };
        let (y, shrunk) = linear_grouped_training(x, &weights, &lora, &dropped, None);
        for Group { rows, linear, .. } in &linears.groups {
            self.shrunk
                .0
                .push((linear.id, narrow_rows(&shrunk, rows.clone())));
        }
        y
    }
}

impl Saving<'_> {
    /// `residual + project(x)`
    fn around(&mut self, of: &Linear, x: &Tensor, residual: Option<&Tensor>) -> Tensor {
        let Linear { id, weight, bias, .. } = of;
        let weight = weight.whole();
        let trained = self.trainable.adapted();
        let lora = trained.iter().filter_map(|rows| {
            let module = rows.adapter.module(*id)?;
            Some(LoraRows {
                rows: rows.rows.start as i64..rows.rows.end as i64,
                module,
            })
        });
        let lora: Vec<LoraRows> = lora.collect();
        if lora.is_empty() {
            let y = linear(x, &weight, bias.as_ref(), &[]);
            return match residual {
                Some(residual) => residual + y,
                None => y,
            };
        }
        let dropped = self.dropped(x, *id, trained.iter().map(|rows| (rows, rows.of(x))));
        let (y, shrunk) = linear_training(x, &weight, bias.as_ref(), &lora, &dropped, residual);
        self.shrunk.0.push((*id, shrunk));
        for rows in trained {
            if let (Some(scaled), Some(module)) = (of.scaled(&weight, rows.adapter), rows.adapter.module(*id))
            {
                let more = adapted(&weight, &rows.of(&dropped), module) * scaled.gain(x.device());
                let _ = rows.of(&y).g_add_(&more);
            }
        }
        y
    }
}

fn drops(trained: &[TrainedRows]) -> bool {
    trained.iter().any(|rows| rows.dropout.is_some())
}

impl Saving<'_> {
    /// What the branches of a linear read of its input `x`, which is `parts` one after the other.
    fn dropped<'r>(
        &self,
        x: &Tensor,
        id: LinearId,
        parts: impl Iterator<Item = (&'r TrainedRows<'r>, Tensor)>,
    ) -> Tensor {
        if !drops(self.trainable.adapted()) {
            return x.shallow_clone();
        }
        let dropped: Vec<Tensor> = parts
            .map(|(rows, x)| self.decoder.dropped(&x, rows.dropout, id))
            .collect();
        match &dropped[..] {
            [all] => all.shallow_clone(),
            parts => Tensor::cat(parts, 0),
        }
    }
}

/// What the backward of every linear of a sublayer reads.
pub(super) struct Backward<'a> {
    pub decoder: &'a Decoder,
    pub pass: &'a TrainPass<'a>,
    pub shrunk: Shrunk,
}

/// Rows of one adapter on their way back through a linear.
pub(super) struct Own<'a> {
    pub rows: &'a TrainedRows<'a>,
    pub x: Tensor,
    /// The gradient of what the branch gave.
    pub dy: Tensor,
    /// The branch's `drop(x) At`.
    pub shrunk: Tensor,
}

impl Backward<'_> {
    /// `y = x Wt + bias + scale (drop(x) At) Bt`: returns dx, adds the gradients of what is trained. With several ranks
    /// dx is this rank's share of a sum where outputs are divided, its own columns where inputs are; gradients are shares
    /// of a sum, zero where another rank is responsible.
    pub fn linear(&self, of: &Linear, x: &Tensor, dy: &Tensor) -> Tensor {
        let trained = self.pass.trainable.adapted();
        let weight = of.weight.whole();
        let gained = trained.iter().map(|rows| self.gained(of, &weight, rows, x, dy));
        let gained: Vec<Option<Tensor>> = gained.collect();
        self.parameters(of, x, dy);
        let mut branches = vec![];
        for (rows, gained) in trained.iter().zip(&gained) {
            let Some(shrunk) = self.shrunk.of(of.id) else {
                continue;
            };
            let own = Own {
                rows,
                x: rows.of(x),
                dy: match gained {
                    Some(gained) => rows.of(dy) + gained,
                    None => rows.of(dy),
                },
                shrunk: rows.of(shrunk),
            };
            if let Some(dshrunk) = self.decoder.branch_gradients(of.id, &own) {
                branches.push((rows, dshrunk, &rows.adapter.module(of.id).expect(ADAPTED).a));
            }
        }
        // A branch that reads what W reads goes back with it.
        let at_once = branches.iter().filter(|(rows, ..)| rows.dropout.is_none());
        let at_once = at_once.map(|(rows, dshrunk, a)| BranchBack {
            rows: rows.rows.start as i64..rows.rows.end as i64,
            dshrunk,
            a,
        });
        let into_weight = into_weight(trained, &gained, dy);
        let dx = linear_backward_with(&into_weight, &weight, &at_once.collect::<Vec<_>>());
        let add_dropped = |rows: &TrainedRows, through: &Tensor| {
            let _ = rows
                .of(&dx)
                .g_add_(&self.decoder.dropped(through, rows.dropout, of.id));
        };
        for (rows, gained) in trained.iter().zip(&gained) {
            if let (Some(gained), Some(_)) = (gained, rows.dropout) {
                add_dropped(rows, &linear_backward(gained, &weight));
            }
        }
        for (rows, dshrunk, a) in &branches {
            if rows.dropout.is_some() {
                add_dropped(rows, &linear_backward(dshrunk, a));
            }
        }
        dx
    }

    /// What DoRA makes of `dy`: `y` of its rows has `+ gain * drop(x) (W + s B A)t`, see [`dora`]. Adds the magnitudes'
    /// gradient.
    fn gained(
        &self,
        of: &Linear,
        weight: &Weight,
        rows: &TrainedRows,
        x: &Tensor,
        dy: &Tensor,
    ) -> Option<Tensor> {
        let scaled = of.scaled(weight, rows.adapter)?;
        let dy = rows.of(dy);
        let dropped = self.decoder.dropped(&rows.of(x), rows.dropout, of.id);
        let outputs = adapted(weight, &dropped, rows.adapter.module(of.id).expect(ADAPTED));
        magnitudes(rows.gradient, of.id, &(&dy * outputs), scaled);
        Some(&dy * scaled.gain(dy.device()))
    }

    /// The same of rows laid out by expert.
    pub fn linear_grouped(&self, linears: &Grouped, x: &Tensor, dy: &Tensor) -> Tensor {
        let dx = linear_grouped_backward(dy, &linears.weights(&linears.whole()));
        for group in &linears.groups {
            let Group { rows, linear, .. } = group;
            self.parameters(
                linear,
                &narrow_rows(x, rows.clone()),
                &narrow_rows(dy, rows.clone()),
            );
            let Some(shrunk) = self.shrunk.of(linear.id) else {
                continue;
            };
            for trained in self.pass.trainable.adapted() {
                let own = linears.rows_of(group, trained);
                if own.is_empty() {
                    continue;
                }
                let of_branch = self.decoder.branch(
                    linear.id,
                    Own {
                        rows: trained,
                        x: narrow_rows(x, own.clone()),
                        dy: narrow_rows(dy, own.clone()),
                        shrunk: narrow_rows(shrunk, own.start - rows.start..own.end - rows.start),
                    },
                );
                if let Some(of_branch) = of_branch {
                    let _ = narrow_rows(&dx, own).g_add_(&of_branch);
                }
            }
        }
        dx
    }

    /// Gradients of the base's own weight and bias, where they are trained.
    fn parameters(&self, of: &Linear, x: &Tensor, dy: &Tensor) {
        let trainable = self.pass.trainable;
        trainable.add(ParamId::Linear(of.id), || match x.size()[0] {
            0 => Tensor::zeros([dy.size()[1], x.size()[1]], (Kind::Float, x.device())),
            _ => matmul::tn(dy, x),
        });
        if of.bias.is_some() {
            let sum = || dy.sum_dim_intlist([0i64].as_slice(), false, None);
            trainable.add(ParamId::Bias(of.id), sum);
        }
    }
}

const SHAPED: &str = "gradients are shaped like the adapter";

/// What goes back through W at once: `dy`, and with it what DoRA made of it where it reads the same input as W.
fn into_weight(trained: &[TrainedRows], gained: &[Option<Tensor>], dy: &Tensor) -> Tensor {
    let at_once = |(rows, gained): (&TrainedRows, &Option<Tensor>)| match gained {
        Some(gained) if rows.dropout.is_none() => rows.of(dy) + gained,
        _ => rows.of(dy),
    };
    match gained.iter().all(Option::is_none) {
        true => dy.shallow_clone(),
        false => Tensor::cat(&trained.iter().zip(gained).map(at_once).collect::<Vec<_>>(), 0),
    }
}

/// `by_output [T, N]`: the gradient times what each magnitude scales, before its norm.
fn magnitudes(gradient: &AdapterParams, id: LinearId, by_output: &Tensor, scaled: &Scaled) {
    let sum = by_output.sum_dim_intlist([0i64].as_slice(), false, None);
    let by_magnitude = sum * scaled.inverse_norm(by_output.device()); // [N]
    for part in &gradient.shape.linear(id).expect(SHAPED).parts {
        if let Some(magnitude) = gradient.magnitude(part) {
            add(
                &magnitude,
                by_magnitude.narrow(0, part.columns.start, part.width()),
            );
        }
    }
}

impl Decoder {
    /// Gradients of A and B, where the adapter has them, and what goes through them to the input.
    pub(super) fn branch(&self, id: LinearId, own: Own) -> Option<Tensor> {
        let dshrunk = self.branch_gradients(id, &own)?;
        let through = linear_backward(&dshrunk, &own.rows.adapter.module(id)?.a);
        Some(self.dropped(&through, own.rows.dropout, id))
    }

    /// Gradients of A and B, where the adapter has them, and that of `drop(x) At [T, R]`.
    fn branch_gradients(&self, id: LinearId, own: &Own) -> Option<Tensor> {
        let Own { rows, x, dy, shrunk } = own;
        let module = rows.adapter.module(id)?;
        let gradient = rows.gradient;
        let shape = gradient.shape.linear(id).expect(SHAPED);
        let held = self.layout.linear(id);
        // dshrunk [T, R]: each part's columns of dy through its B.
        let dshrunk: Vec<Tensor> = module
            .parts
            .iter()
            .zip(&shape.parts)
            .map(|(part, shape)| {
                let rows = held.part(&shape.path);
                let dy = dy.narrow(1, rows.columns.start, rows.n_rows());
                let shrunk = shrunk.narrow(1, shape.ranks.start, shape.rank());
                let b = gradient.b(shape);
                rows.add(&b, &(matmul::tn(&dy, &shrunk) * part.scale).to_device(b.device()));
                linear_backward(&dy, &part.b) * part.scale
            })
            .collect();
        let dshrunk = Tensor::cat(&dshrunk, 1);
        let a = gradient.a(shape).narrow(1, held.inputs.start, held.n_inputs());
        add(&a, matmul::tn(&dshrunk, &self.dropped(x, rows.dropout, id)));
        Some(dshrunk)
    }

    /// A LoRA branch's input, with some elements dropped: each linear drops its own.
    pub(super) fn dropped(&self, x: &Tensor, dropout: Option<Dropout>, id: LinearId) -> Tensor {
        match dropout {
            Some(dropout) => dropout.apply(x, id, self.layout.linear(id).inputs.start),
            None => x.shallow_clone(),
        }
    }
}
