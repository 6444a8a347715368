//! One slice through the layers and back, a layer at a time: the arithmetic of an optimizer step.

use std::ops::Add;

use tandem_core::job::{Hyper, Method};
use tandem_kernels::loss::LogProbs;
use tch::{Device, Tensor};

use super::data::Slice;
use crate::lora::adapter::{Adapter, AdapterRows};
use crate::model::full::Slot;
use crate::model::{Batch, Context as Attention, Decoder, Dropout, Grads, Saved, TrainPass, Trainable};

/// Activations of one slice that may be kept for its backward; beyond, layers run again in the backward.
const KEEP_BYTES: i64 = 2 << 30;

/// Sums over label tokens.
#[derive(Clone, Copy, Default)]
pub struct Scores {
    /// Weighted negative log-likelihood, nats.
    pub loss: f64,
    pub weight: f64,
    pub correct: u64,
    pub labels: u64,
}

impl Scores {
    /// Share of label tokens that were the most likely ones.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.labels.max(1) as f64
    }
}

impl Add for Scores {
    type Output = Scores;

    fn add(self, other: Scores) -> Scores {
        Scores {
            loss: self.loss + other.loss,
            weight: self.weight + other.weight,
            correct: self.correct + other.correct,
            labels: self.labels + other.labels,
        }
    }
}

/// What every quantum of a step shares.
pub struct Context<'a> {
    pub decoder: &'a Decoder,
    /// `None`: all parameters are trained.
    pub adapter: Option<&'a Adapter>,
    pub hyper: &'a Hyper,
    /// Optimizer step, 0-based.
    pub step: u64,
    /// Total label weight of the step: its loss is the mean over it.
    pub weight: f64,
}

/// A slice on its way. `rows_before` counts the step's tokens before it (dropout's counter).
pub enum Pass {
    Idle {
        rows_before: u64,
    },
    Forward {
        slice: Slice,
        rows_before: u64,
        hidden: Tensor,
        kept: Vec<Kept>,
    },
    Loss {
        slice: Slice,
        rows_before: u64,
        hidden: Tensor,
        kept: Vec<Kept>,
    },
    Backward {
        slice: Slice,
        rows_before: u64,
        dhidden: Tensor,
        kept: Vec<Kept>,
    },
}

/// What a layer's backward starts from.
pub enum Kept {
    All(Box<Saved>),
    /// Only the layer's input: its forward runs again.
    Input(Tensor),
}

impl Pass {
    pub fn enter(slice: Slice, rows_before: u64, context: &Context) -> Pass {
        let hidden = context.decoder.embed(&slice.tokens);
        Pass::Forward {
            slice,
            rows_before,
            hidden,
            kept: vec![],
        }
    }

    /// One layer, or the loss, further.
    pub fn advance(self, context: &Context, scores: Scores, grads: &mut Grads) -> (Pass, Scores) {
        match self {
            Pass::Idle { .. } => (self, scores),
            Pass::Forward {
                slice,
                rows_before,
                hidden,
                mut kept,
            } => {
                let decoder = context.decoder;
                let (output, saved) =
                    decoder.layer_saving(kept.len(), &hidden, &train_pass(&slice, rows_before, context));
                kept.push(match keeps_all(&slice, decoder) {
                    true => Kept::All(Box::new(saved)),
                    false => Kept::Input(hidden),
                });
                let pass = match kept.len() == decoder.n_layers() {
                    true => Pass::Loss {
                        slice,
                        rows_before,
                        hidden: output,
                        kept,
                    },
                    false => Pass::Forward {
                        slice,
                        rows_before,
                        hidden: output,
                        kept,
                    },
                };
                (pass, scores)
            }
            Pass::Loss {
                slice,
                rows_before,
                hidden,
                kept,
            } => {
                let (dhidden, scored) = loss(&slice, &hidden, context, grads);
                (
                    Pass::Backward {
                        slice,
                        rows_before,
                        dhidden,
                        kept,
                    },
                    scores + scored,
                )
            }
            Pass::Backward {
                slice,
                rows_before,
                dhidden,
                mut kept,
            } => {
                let pass = train_pass(&slice, rows_before, context);
                let Some(last) = kept.pop() else {
                    context.decoder.embed_backward(&slice.tokens, &dhidden, grads);
                    return (
                        Pass::Idle {
                            rows_before: rows_before + slice.tokens.len() as u64,
                        },
                        scores,
                    );
                };
                let layer = kept.len();
                let saved = match last {
                    Kept::All(saved) => *saved,
                    Kept::Input(input) => context.decoder.layer_saving(layer, &input, &pass).1,
                };
                let dhidden = context
                    .decoder
                    .layer_backward(layer, saved, dhidden, &pass, grads);
                (
                    Pass::Backward {
                        slice,
                        rows_before,
                        dhidden,
                        kept,
                    },
                    scores,
                )
            }
        }
    }
}

/// Loss and accuracy of a slice without a backward.
pub fn score(decoder: &Decoder, adapter: Option<&Adapter>, slice: &Slice) -> Scores {
    let lora: Vec<AdapterRows> = adapter
        .into_iter()
        .map(|adapter| AdapterRows {
            rows: 0..slice.tokens.len(),
            adapter,
        })
        .collect();
    let batch = Batch {
        tokens: &slice.tokens,
        positions: &slice.positions,
        context: Attention::Packed {
            cu_seqlens: &slice.cu_seqlens,
        },
        lora: &lora,
    };
    let hidden = decoder.forward(&batch);
    let Some(labels) = Labels::of(slice, 1.0, hidden.device()) else {
        return Scores::default();
    };
    let normed = decoder.final_norm(&hidden.index_select(0, &labels.rows));
    let LogProbs { log_probs, correct } = decoder.log_probs(&normed, &labels.tokens);
    let loss = log_probs
        .iter()
        .zip(&labels.weights)
        .map(|(&log_prob, &weight)| -f64::from(log_prob) * f64::from(weight));
    labels.scores(loss.sum(), correct, 1.0)
}

fn loss(slice: &Slice, hidden: &Tensor, context: &Context, grads: &mut Grads) -> (Tensor, Scores) {
    let dhidden = hidden.zeros_like();
    let Some(labels) = Labels::of(slice, context.weight, hidden.device()) else {
        return (dhidden, Scores::default());
    };
    let rows = hidden.index_select(0, &labels.rows); // [R, H]
    let normed = context.decoder.final_norm(&rows);
    let mut dweight = match grads {
        Grads::Full(grads) => Some(grads.view(if grads.shape.has(Slot::Head) {
            Slot::Head
        } else {
            Slot::Embed
        })),
        Grads::Lora(_) => None,
    };
    let out = context
        .decoder
        .cross_entropy(&normed, &labels.tokens, &labels.weights, dweight.as_mut());
    let drows = context.decoder.final_norm_backward(&rows, &out.dhidden, grads);
    let dhidden = dhidden.index_copy(0, &labels.rows, &drows);
    (dhidden, labels.scores(out.loss_sum, out.correct, context.weight))
}

/// The label rows of a slice, weights divided by the step's total.
struct Labels {
    rows: Tensor,
    tokens: Vec<u32>,
    weights: Vec<f32>,
}

impl Labels {
    fn of(slice: &Slice, total_weight: f64, device: Device) -> Option<Labels> {
        let rows: Vec<i64> = slice.labels.iter().map(|&(row, _, _)| row).collect();
        (!rows.is_empty()).then(|| Labels {
            rows: Tensor::from_slice(&rows).to_device(device),
            tokens: slice.labels.iter().map(|&(_, token, _)| token).collect(),
            weights: slice
                .labels
                .iter()
                .map(|&(_, _, weight)| (f64::from(weight) / total_weight) as f32)
                .collect(),
        })
    }

    fn scores(&self, loss: f64, correct: usize, total_weight: f64) -> Scores {
        let weight = self
            .weights
            .iter()
            .map(|&weight| f64::from(weight) * total_weight)
            .sum();
        Scores {
            loss: loss * total_weight,
            weight,
            correct: correct as u64,
            labels: self.tokens.len() as u64,
        }
    }
}

fn train_pass<'a>(slice: &'a Slice, rows_before: u64, context: &Context<'a>) -> TrainPass<'a> {
    let trainable = match (context.adapter, &context.hyper.method) {
        (Some(adapter), Method::Lora(lora)) => {
            let Hyper { seed, .. } = *context.hyper;
            let dropout = Dropout {
                p: lora.dropout,
                seed,
                step: context.step,
                row0: rows_before,
            };
            Trainable::Lora {
                adapter,
                dropout: (lora.dropout > 0.0).then_some(dropout),
            }
        }
        _ => Trainable::Full,
    };
    TrainPass {
        tokens: &slice.tokens,
        positions: &slice.positions,
        cu_seqlens: &slice.cu_seqlens,
        trainable,
    }
}

/// Kept per token and layer: input, qkv, attention out, middle, gate and up (float32).
fn keeps_all(slice: &Slice, decoder: &Decoder) -> bool {
    let numbers = |layer: &crate::family::LayerSpec| {
        2 * decoder.spec.hidden
            + layer.attn.qkv_columns()
            + layer.attn.heads * layer.attn.head_dim
            + 2 * layer.mlp.inner
    };
    let per_token: i64 = decoder.layout().local.layers.iter().map(numbers).sum();
    4 * per_token * slice.tokens.len() as i64 <= KEEP_BYTES
}
