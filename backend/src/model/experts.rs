//! A mixture of experts of the decoder, forward and backward side by side. Which rows go where is the kernels' routing.

use std::ops::Range;

use tandem_kernels::activation::sigmoid;
use tandem_kernels::experts::{Routing, RoutingWeights};
use tandem_kernels::linear::{LoraRows, WeightRows};
use tch::{Kind, Tensor};

use super::TrainedRows;
use super::linear::{Backward, Linear, Project};
use super::mlp::{self, Mlp};
use super::stored::Whole;

pub(super) struct Experts {
    pub top_k: usize,
    pub weights: RoutingWeights,
    pub router: Linear,
    pub experts: Vec<Mlp>,
    pub shared: Option<Shared>,
    /// Ranks that share parameters go through all experts, whichever of them have rows of theirs.
    pub all_in_step: bool,
}

/// What every token goes through, by as much as its gate lets.
pub(super) struct Shared {
    pub gate: Linear,
    pub mlp: Mlp,
}

/// What the backward reads.
pub(super) struct Saved {
    /// `[T, experts]`
    logits: Tensor,
    routing: Routing,
    /// By row of the layout by expert: `[T top_k, up's columns]`.
    up: Tensor,
    /// `[T top_k, H]`; with several ranks its part.
    outputs: Tensor,
    shared: Option<SavedShared>,
}

struct SavedShared {
    /// `[T, 1]`
    gate: Tensor,
    mlp: mlp::Saved,
    /// `[T, H]`; with several ranks its part.
    output: Tensor,
}

impl Experts {
    /// `residual + sum of weight * expert(x) + shared(x)` of `x [T, H]`, and what the backward reads; with several ranks
    /// parts of the sum.
    pub fn forward(&self, x: &Tensor, residual: Option<Tensor>, pass: &mut impl Project) -> (Tensor, Saved) {
        let logits = pass.project(&self.router, x);
        let routing = Routing::new(&logits, self.top_k, self.weights);
        let up = pass.project_grouped(&self.grouped(&routing, |mlp| &mlp.up), &routing.gather(x));
        let activated = self.experts[0].activated(&up);
        let outputs = pass.project_grouped(&self.grouped(&routing, |mlp| &mlp.down), &activated);
        let mut sum = routing.combine(&outputs);
        if let Some(residual) = residual {
            sum += residual;
        }
        let shared = self.shared.as_ref().map(|Shared { gate, mlp }| {
            let gate = sigmoid(&pass.project(gate, x));
            let (output, saved) = mlp.forward(x, None, pass);
            sum += &gate * &output;
            SavedShared {
                gate,
                mlp: saved,
                output,
            }
        });
        let saved = Saved {
            logits,
            routing,
            up,
            outputs,
            shared,
        };
        (sum, saved)
    }

    /// `doutput [T, H]` to the gradient of `x`; with several ranks its parts, to be summed. `x` is made again when it is
    /// needed.
    pub fn backward(
        &self,
        saved: Saved,
        doutput: &Tensor,
        x: impl FnOnce() -> Tensor,
        back: &Backward,
    ) -> Tensor {
        let Saved {
            logits,
            routing,
            up,
            outputs,
            shared,
        } = saved;
        let x = x();
        let (doutputs, dweights) = routing.combine_backward(&outputs, doutput);
        drop(outputs);
        let activated = self.experts[0].activated(&up);
        let dactivated = back.linear_grouped(&self.grouped(&routing, |mlp| &mlp.down), &activated, &doutputs);
        let dup = self.experts[0].up_gradient(&up, &dactivated);
        let gathered = routing.gather(&x);
        let dgathered = back.linear_grouped(&self.grouped(&routing, |mlp| &mlp.up), &gathered, &dup);
        let mut dx = routing.gather_backward(&dgathered);
        dx += back.linear(&self.router, &x, &routing.logits_backward(&logits, &dweights));
        if let (Some(Shared { gate, mlp }), Some(saved)) = (&self.shared, shared) {
            let dgate = (doutput * saved.output).sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
            let dgate = dgate * &saved.gate * (1.0 - &saved.gate);
            dx += back.linear(gate, &x, &dgate);
            dx += mlp.backward(saved.mlp, &(doutput * saved.gate), || x.shallow_clone(), back);
        }
        dx
    }

    /// One linear of every expert that has rows, or of every expert.
    fn grouped<'a>(&'a self, routing: &'a Routing, linear: impl Fn(&'a Mlp) -> &'a Linear) -> Grouped<'a> {
        let groups = self.experts.iter().enumerate().map(|(e, mlp)| Group {
            expert: e,
            rows: routing.rows(e),
            linear: linear(mlp),
        });
        Grouped {
            routing,
            groups: groups
                .filter(|group| self.all_in_step || !group.rows.is_empty())
                .collect(),
        }
    }

    /// Numbers per token that [`Experts::forward`] keeps.
    pub fn saved_numbers(&self) -> usize {
        let Mlp { up, down, .. } = &self.experts[0];
        let of_choice = (up.weight.n() + down.weight.n()) as usize;
        let shared = |shared: &Shared| shared.mlp.saved_numbers() + shared.mlp.down.weight.n() as usize;
        self.experts.len() + self.top_k * of_choice + self.shared.as_ref().map_or(0, shared)
    }
}

/// The same linear of several experts, and the rows that each multiplies.
pub(super) struct Grouped<'a> {
    pub routing: &'a Routing,
    pub groups: Vec<Group<'a>>,
}

pub(super) struct Group<'a> {
    pub expert: usize,
    /// Of the layout by expert.
    pub rows: Range<i64>,
    pub linear: &'a Linear,
}

impl<'a> Grouped<'a> {
    /// The groups' weights, for [`Grouped::weights`].
    pub fn whole(&self) -> Vec<Whole<'a>> {
        self.groups
            .iter()
            .map(|group| group.linear.weight.whole())
            .collect()
    }

    pub fn weights<'w>(&'w self, whole: &'w [Whole]) -> Vec<WeightRows<'w>> {
        let groups = self.groups.iter().zip(whole);
        let weights = groups.map(|(group, weight)| WeightRows {
            rows: group.rows.clone(),
            weight,
            bias: group.linear.bias.as_ref(),
        });
        weights.collect()
    }

    /// The rows of a group that belong to an adapter in training.
    pub fn rows_of(&self, group: &Group, trained: &TrainedRows) -> Range<i64> {
        self.routing.rows_among(group.expert, &trained.rows)
    }

    /// The rows of each expert that belong to an adapter's tokens. `of` gives an adapter's module of a linear.
    pub fn lora<'m>(
        &self,
        tokens: &[Range<usize>],
        of: impl Fn(usize, &Linear) -> Option<&'m tandem_kernels::linear::LoraModule>,
    ) -> Vec<LoraRows<'m>> {
        let mut rows = vec![];
        for group in &self.groups {
            for (i, tokens) in tokens.iter().enumerate() {
                let Some(module) = of(i, group.linear) else {
                    continue;
                };
                let of_adapter = self.routing.rows_among(group.expert, tokens);
                if !of_adapter.is_empty() {
                    rows.push(LoraRows {
                        rows: of_adapter,
                        module,
                    });
                }
            }
        }
        rows
    }
}
