//! Which experts a row goes to and how their outputs become one row again, forward and backward (Shazeer et al., 2017).
//! The experts' own products are `linear_grouped` (`linear`); what the router's logits are made of is the model's.
//!
//! Rows are laid out by expert and, within one, by token, so that an expert's rows are one product and the rows of an
//! adapter within an expert are one range. A token's choices are summed in the order in which it made them, so its bits do
//! not depend on the other tokens.

mod gpu;
#[cfg(test)]
mod tests;

use std::ops::Range;

use gpu::{OnGpu, OnHost};
use tch::{Device, Kind, Tensor};

use crate::slice::Rows;
use crate::vector::{dot, exp, in_chunks, max, rows, rows_mut, sum_of, uninit, vectorised};

/// What a chosen expert's output is multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingWeights {
    /// Its share of the softmax over all experts; the weights of a token sum to less than one (Qwen 2 MoE, OLMoE).
    OfAll,
    /// Its share of the softmax over the chosen ones, which is the share of all, renormalised (Mixtral, Qwen 3 MoE,
    /// gpt-oss).
    OfChosen,
}

/// The experts of each token of a batch.
#[derive(Debug)]
pub struct Routing {
    kind: RoutingWeights,
    top_k: usize,
    /// The expert of each choice, a token's choices side by side, the largest logit first.
    chosen: Vec<u32>,
    /// The row of each choice in the layout by expert.
    row_of: Vec<u32>,
    /// The choice that a row belongs to: its token is this / top_k.
    choice_of: Vec<u32>,
    /// Where each expert's rows begin, and the end of the last.
    starts: Vec<usize>,
    /// By choice.
    weights: Vec<f32>,
    device: Device,
    /// The same where a GPU has kernels for it.
    on_gpu: Option<OnGpu>,
}

impl Routing {
    /// The `top_k` largest of each row of `logits` `[T, experts]`; of equal ones, the first.
    ///
    /// # Panics
    /// When there are fewer than `top_k` experts.
    pub fn new(logits: &Tensor, top_k: usize, kind: RoutingWeights) -> Routing {
        let experts = logits.size()[1];
        assert!(
            0 < top_k && top_k as i64 <= experts,
            "{top_k} of {experts} experts for each token"
        );
        let (host, on_gpu) = match crate::gpu::of(logits) {
            Some(gpu) => {
                let on_gpu = OnGpu::new(gpu, logits, top_k, kind);
                (on_gpu.on_host(), Some(on_gpu))
            }
            None => (decide(logits, top_k, kind), None),
        };
        let OnHost {
            chosen,
            row_of,
            choice_of,
            starts,
            weights,
        } = host;
        Routing {
            kind,
            top_k,
            chosen,
            row_of,
            choice_of,
            starts,
            weights,
            device: logits.device(),
            on_gpu,
        }
    }

    pub fn n_experts(&self) -> usize {
        self.starts.len() - 1
    }

    pub fn n_tokens(&self) -> usize {
        self.chosen.len() / self.top_k
    }

    /// The rows of an expert in the layout by expert, in order of their tokens.
    pub fn rows(&self, expert: usize) -> Range<i64> {
        self.starts[expert] as i64..self.starts[expert + 1] as i64
    }

    /// Those of them that belong to `tokens`: an adapter's share.
    pub fn rows_among(&self, expert: usize, tokens: &Range<usize>) -> Range<i64> {
        let (start, end) = (self.starts[expert], self.starts[expert + 1]);
        let before = |token: usize| {
            let rows = &self.choice_of[start..end];
            (start + rows.partition_point(|choice| (*choice as usize / self.top_k) < token)) as i64
        };
        before(tokens.start)..before(tokens.end)
    }

    /// The token of each row in the layout by expert.
    pub fn tokens(&self) -> impl Iterator<Item = usize> {
        self.choice_of.iter().map(|choice| *choice as usize / self.top_k)
    }

    /// `x` `[T, H]` laid out by expert, `[T * top_k, H]`.
    pub fn gather(&self, x: &Tensor) -> Tensor {
        self.check(x, self.n_tokens());
        let Some(from) = rows(x) else {
            return match self.on_gpu(x) {
                Some(on_gpu) => on_gpu.gather(x),
                None => self.gather_reference(x),
            };
        };
        let mut y = uninit(self.chosen.len(), from.width);
        let to = rows_mut(&mut y);
        let (choice_of, top_k) = (&self.choice_of, self.top_k);
        in_chunks(to.rows, to.width, |rows| {
            for row in rows {
                // SAFETY: the row is this task's alone.
                unsafe { to.row(row) }.copy_from_slice(from.row(choice_of[row] as usize / top_k));
            }
        });
        y
    }

    /// The gradient of [`Routing::gather`]: `[T, H]` from `dy` `[T * top_k, H]`.
    pub fn gather_backward(&self, dy: &Tensor) -> Tensor {
        self.sum_choices(dy, |_| 1.0)
            .or_else(|| Some(self.on_gpu(dy)?.sum_choices(dy, false)))
            .unwrap_or_else(|| self.gather_backward_reference(dy))
    }

    /// The experts' outputs `[T * top_k, H]`, each times its weight, summed over each token's choices: `[T, H]`.
    pub fn combine(&self, outputs: &Tensor) -> Tensor {
        let weights = &self.weights;
        self.sum_choices(outputs, |choice| weights[choice])
            .or_else(|| Some(self.on_gpu(outputs)?.sum_choices(outputs, true)))
            .unwrap_or_else(|| self.combine_reference(outputs))
    }

    /// The gradients of [`Routing::combine`] from `dy` `[T, H]`: of `outputs`, `[T * top_k, H]`, and of the weights, by
    /// choice `[T, top_k]`.
    pub fn combine_backward(&self, outputs: &Tensor, dy: &Tensor) -> (Tensor, Tensor) {
        self.check(outputs, self.chosen.len());
        self.check(dy, self.n_tokens());
        let (Some(from), Some(grad)) = (rows(outputs), rows(dy)) else {
            return match self.on_gpu(outputs) {
                Some(on_gpu) => on_gpu.combine_backward(outputs, dy),
                None => self.combine_backward_reference(outputs, dy),
            };
        };
        let mut doutputs = uninit(from.rows, from.width);
        let mut dweights = uninit(self.n_tokens(), self.top_k);
        let (to, to_weights) = (rows_mut(&mut doutputs), rows_mut(&mut dweights));
        let (row_of, weights, top_k) = (&self.row_of, &self.weights, self.top_k);
        in_chunks(self.n_tokens(), top_k * from.width, |tokens| {
            for token in tokens {
                // SAFETY: a token's weights, and below the rows of its choices, are this task's alone.
                let dweights = unsafe { to_weights.row(token) };
                for (choice, dweight) in (token * top_k..).zip(dweights) {
                    let row = row_of[choice] as usize;
                    *dweight = row_dot(from.row(row), grad.row(token));
                    // SAFETY: as above.
                    scale(weights[choice], grad.row(token), unsafe { to.row(row) });
                }
            }
        });
        (doutputs, dweights)
    }

    /// The gradient of the logits `[T, experts]` this routing was made from, given that of the weights `[T, top_k]`. Which
    /// experts are chosen has none.
    pub fn logits_backward(&self, logits: &Tensor, dweights: &Tensor) -> Tensor {
        if let Some(on_gpu) = self.on_gpu(logits) {
            return on_gpu.logits_backward(logits, dweights);
        }
        let (on_cpu, dweights) = (on_cpu(logits), on_cpu(dweights));
        let mut dlogits = Tensor::zeros([self.n_tokens() as i64, self.n_experts() as i64], FLOAT);
        let (logits, dweights) = (Rows::of(&on_cpu), Rows::of(&dweights));
        let (logits, dweights) = (logits.expect("float32"), dweights.expect("float32"));
        let to = rows_mut(&mut dlogits);
        for token in 0..self.n_tokens() {
            let choices = token * self.top_k..(token + 1) * self.top_k;
            let (chosen, weights) = (&self.chosen[choices.clone()], &self.weights[choices]);
            let dweights = dweights.row(token);
            let mean: f32 = weights.iter().zip(dweights).map(|(w, d)| w * d).sum();
            // SAFETY: no other reference to this row lives.
            let dlogits = unsafe { to.row(token) };
            if self.kind == RoutingWeights::OfAll {
                // Those not chosen lower the share of those that are.
                dlogits.copy_from_slice(logits.row(token));
                softmax_of(dlogits, logits.row(token));
                dlogits.iter_mut().for_each(|p| *p *= -mean);
            }
            for ((expert, weight), dweight) in chosen.iter().zip(weights).zip(dweights) {
                dlogits[*expert as usize] = weight * (dweight - mean);
            }
        }
        dlogits.to_device(self.device)
    }

    /// `y[t] = sum over t's choices of weight(choice) * x[row of the choice]`; None where only the reference can go.
    fn sum_choices(&self, x: &Tensor, weight: impl Fn(usize) -> f32 + Sync) -> Option<Tensor> {
        self.check(x, self.chosen.len());
        let from = rows(x)?;
        let mut y = uninit(self.n_tokens(), from.width);
        let to = rows_mut(&mut y);
        let (row_of, top_k) = (&self.row_of, self.top_k);
        in_chunks(to.rows, to.width * top_k, |tokens| {
            for token in tokens {
                // SAFETY: the row is this task's alone.
                let y = unsafe { to.row(token) };
                let choices = token * top_k..(token + 1) * top_k;
                for (i, choice) in choices.enumerate() {
                    let x = from.row(row_of[choice] as usize);
                    match i {
                        0 => scale(weight(choice), x, y),
                        _ => add_scaled(weight(choice), x, y),
                    }
                }
            }
        });
        Some(y)
    }

    /// Where kernels of the GPU can go on with it.
    fn on_gpu(&self, x: &Tensor) -> Option<&OnGpu> {
        crate::gpu::of(x).and(self.on_gpu.as_ref())
    }

    fn check(&self, x: &Tensor, n: usize) {
        let size = x.size();
        assert!(
            size.len() == 2 && size[0] as usize == n,
            "{size:?} for {n} rows of {} tokens",
            self.n_tokens()
        );
    }
}

/// The same in plain tch, on any device.
impl Routing {
    pub fn gather_reference(&self, x: &Tensor) -> Tensor {
        let tokens: Vec<i64> = self.tokens().map(|token| token as i64).collect();
        x.index_select(0, &Tensor::from_slice(&tokens).to_device(x.device()))
    }

    pub fn gather_backward_reference(&self, dy: &Tensor) -> Tensor {
        self.by_choice(dy)
            .sum_dim_intlist([1i64].as_slice(), false, dy.kind())
    }

    pub fn combine_reference(&self, outputs: &Tensor) -> Tensor {
        let weighted = self.by_choice(outputs) * self.weights_like(outputs).unsqueeze(2);
        weighted.sum_dim_intlist([1i64].as_slice(), false, outputs.kind())
    }

    pub fn combine_backward_reference(&self, outputs: &Tensor, dy: &Tensor) -> (Tensor, Tensor) {
        let dweights =
            (self.by_choice(outputs) * dy.unsqueeze(1)).sum_dim_intlist([-1i64].as_slice(), false, dy.kind());
        let by_row: Vec<i64> = self.choice_of.iter().map(|choice| i64::from(*choice)).collect();
        let by_row = Tensor::from_slice(&by_row).to_device(dy.device());
        let weights = self.weights_like(dy).view([-1, 1]).index_select(0, &by_row);
        (self.gather_reference(dy) * weights, dweights)
    }

    /// `[T * top_k, H]` by expert to `[T, top_k, H]` by choice.
    fn by_choice(&self, x: &Tensor) -> Tensor {
        let row_of: Vec<i64> = self.row_of.iter().map(|row| i64::from(*row)).collect();
        x.index_select(0, &Tensor::from_slice(&row_of).to_device(x.device()))
            .view([self.n_tokens() as i64, self.top_k as i64, -1])
    }

    /// `[T, top_k]`, of the dtype and on the device of `x`.
    fn weights_like(&self, x: &Tensor) -> Tensor {
        Tensor::from_slice(&self.weights)
            .view([-1, self.top_k as i64])
            .to_kind(x.kind())
            .to_device(x.device())
    }
}

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// As [`Routing::new`], by the host.
fn decide(logits: &Tensor, top_k: usize, kind: RoutingWeights) -> OnHost {
    let on_cpu = on_cpu(logits);
    let logits_of = Rows::of(&on_cpu).expect("a float32 matrix on the CPU");
    let (n_tokens, n_experts) = (logits_of.rows, logits_of.width);
    let mut chosen = Vec::with_capacity(n_tokens * top_k);
    let mut weights = Vec::with_capacity(n_tokens * top_k);
    let mut by_logit: Vec<u32> = Vec::with_capacity(n_experts);
    for token in 0..n_tokens {
        let logits = logits_of.row(token);
        by_logit.clear();
        by_logit.extend(0..n_experts as u32);
        let before = |a: &u32, b: &u32| {
            let (of_a, of_b) = (logits[*a as usize], logits[*b as usize]);
            of_b.total_cmp(&of_a).then(a.cmp(b))
        };
        by_logit.select_nth_unstable_by(top_k - 1, before);
        by_logit[..top_k].sort_unstable_by(before);
        let first = weights.len();
        chosen.extend_from_slice(&by_logit[..top_k]);
        weights.extend(by_logit[..top_k].iter().map(|expert| logits[*expert as usize]));
        let weights = &mut weights[first..];
        match kind {
            RoutingWeights::OfAll => softmax_of(weights, logits),
            RoutingWeights::OfChosen => {
                let logits = weights.to_vec();
                softmax_of(weights, &logits);
            }
        }
    }

    let mut starts = vec![0; n_experts + 1];
    for expert in &chosen {
        starts[*expert as usize + 1] += 1;
    }
    for expert in 0..n_experts {
        starts[expert + 1] += starts[expert];
    }
    let mut next = starts.clone();
    let (mut row_of, mut choice_of) = (vec![0; chosen.len()], vec![0; chosen.len()]);
    for (choice, expert) in chosen.iter().enumerate() {
        let row = &mut next[*expert as usize];
        (row_of[choice], choice_of[*row]) = (*row as u32, choice as u32);
        *row += 1;
    }
    OnHost {
        chosen,
        row_of,
        choice_of,
        starts,
        weights,
    }
}

/// Where a device has no kernels for it, the host decides on the routing, whose groups shape the products that follow.
fn on_cpu(x: &Tensor) -> Tensor {
    x.detach()
        .to_device(Device::Cpu)
        .to_kind(Kind::Float)
        .contiguous()
}

vectorised!(
    /// Replaces each of `chosen`, some of `logits`, by its share of their softmax.
    fn softmax_of(chosen: &mut [f32], logits: &[f32]) {
        let largest = max(logits);
        let sum = sum_of(logits, |logit| exp(logit - largest));
        for share in chosen {
            *share = exp(*share - largest) / sum;
        }
    }
);

vectorised!(
    fn row_dot(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }
);

vectorised!(
    fn scale(factor: f32, from: &[f32], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = factor * from;
        }
    }
);

vectorised!(
    fn add_scaled(factor: f32, from: &[f32], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = factor.mul_add(*from, *to);
        }
    }
);
