//! One slice through the sublayers and back, one at a time: the arithmetic of an optimizer step.

use std::ops::Add;

use tandem_core::job::{Hyper, Method};
use tandem_kernels::loss::LogProbs;
use tch::{Device, Tensor};

use super::data::{Label, Slice};
use crate::family::ParamId;
use crate::lora::adapter::{Adapter, AdapterRows};
use crate::model::{Batch, Context as Attention, Decoder, Dropout, Grads, Saved, TrainPass, Trainable};

/// Activations of one slice that may be kept for its backward; beyond, layers run again in the backward.
pub const KEEP_BYTES: i64 = 2 << 30;
/// Multiplications of the head in one go: what bounds the loss's part of a quantum as the slice bounds a layer's.
const HEAD_PRODUCTS: i64 = 1 << 28;

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
    /// [`KEEP_BYTES`]
    pub keep_bytes: i64,
}

/// A slice on its way.
pub struct Pass {
    slice: Slice,
    /// The step's tokens before it: dropout's counter.
    rows_before: u64,
    /// Of each sublayer that it went through forward, and not yet backward.
    kept: Vec<Kept>,
    at: At,
}

enum At {
    /// Hidden states.
    Forward(Tensor),
    /// With so many of its labels done, which have their rows of the gradient.
    Loss {
        hidden: Tensor,
        dhidden: Tensor,
        done: usize,
    },
    /// Gradient of hidden states.
    Backward(Tensor),
}

/// What the backward of a sublayer starts from.
enum Kept {
    All(Box<Saved>),
    /// Only its input: its forward runs again.
    Input(Tensor),
    /// Nothing: the one before it runs again, and is kept then.
    Nothing,
}

impl Pass {
    pub fn enter(slice: Slice, rows_before: u64, context: &Context) -> Pass {
        let hidden = context.decoder.embed(&slice.tokens);
        Pass {
            slice,
            rows_before,
            kept: vec![],
            at: At::Forward(hidden),
        }
    }

    /// A sublayer, or the loss of some rows, further. `None` when it is through; adds to `scores` and `grads`.
    pub fn advance(self, context: &Context, scores: &mut Scores, grads: &mut Grads) -> Option<Pass> {
        let Pass {
            slice,
            rows_before,
            mut kept,
            at,
        } = self;
        let decoder = context.decoder;
        let pass = train_pass(&slice, rows_before, context);
        let at = match at {
            At::Forward(input) => {
                let (hidden, saved) = decoder.sublayer_saving(kept.len(), input.shallow_clone(), &pass);
                kept.push(match keeps_all(&slice, context) {
                    true => Kept::All(Box::new(saved)),
                    false if kept.len().is_multiple_of(2) => Kept::Input(input),
                    false => Kept::Nothing,
                });
                match kept.len() == decoder.n_sublayers() {
                    true => At::Loss {
                        dhidden: hidden.zeros_like(),
                        hidden,
                        done: 0,
                    },
                    false => At::Forward(hidden),
                }
            }
            At::Loss { dhidden, done, .. } if done == slice.labels.len() => At::Backward(dhidden),
            At::Loss {
                hidden,
                mut dhidden,
                done,
            } => {
                let end = slice.labels.len().min(done + rows_at_once(decoder));
                let labels = Labels::of(&slice.labels[done..end], context.weight, decoder.device());
                *scores = *scores + loss(&labels, &hidden, &mut dhidden, context, grads);
                At::Loss {
                    hidden,
                    dhidden,
                    done: end,
                }
            }
            At::Backward(dhidden) => match kept.pop() {
                None => {
                    decoder.embed_backward(&slice.tokens, &dhidden, grads);
                    return None;
                }
                Some(last) => {
                    let i = kept.len();
                    let saved = match last {
                        Kept::All(saved) => *saved,
                        Kept::Input(input) => decoder.sublayer_saving(i, input, &pass).1,
                        Kept::Nothing => {
                            let Some(Kept::Input(input)) = kept.pop() else {
                                unreachable!("every other sublayer kept its input")
                            };
                            let (middle, before) = decoder.sublayer_saving(i - 1, input, &pass);
                            kept.push(Kept::All(Box::new(before)));
                            decoder.sublayer_saving(i, middle, &pass).1
                        }
                    };
                    At::Backward(decoder.sublayer_backward(i, saved, dhidden, &pass, grads))
                }
            },
        };
        Some(Pass {
            slice,
            rows_before,
            kept,
            at,
        })
    }
}

/// A slice on its way to its loss and no further: validation.
pub struct Look {
    hidden: Tensor,
    /// Sublayers it went through.
    sublayers: usize,
    /// Labels that are scored.
    done: usize,
}

impl Look {
    pub fn enter(slice: &Slice, decoder: &Decoder) -> Look {
        Look {
            hidden: decoder.embed(&slice.tokens),
            sublayers: 0,
            done: 0,
        }
    }

    /// A sublayer, or the loss of some rows, further. `None` when it is through; adds to `scores`.
    pub fn advance(
        self,
        slice: &Slice,
        decoder: &Decoder,
        adapter: Option<&Adapter>,
        scores: &mut Scores,
    ) -> Option<Look> {
        let Look {
            hidden,
            sublayers,
            done,
        } = self;
        if sublayers < decoder.n_sublayers() {
            let lora = adapter.map(|adapter| AdapterRows {
                rows: 0..slice.tokens.len(),
                adapter,
            });
            let batch = Batch {
                tokens: &slice.tokens,
                positions: &slice.positions,
                context: Attention::Packed {
                    cu_seqlens: &slice.cu_seqlens,
                },
                lora: lora.as_slice(),
            };
            return Some(Look {
                hidden: decoder.sublayer(sublayers, hidden, &batch),
                sublayers: sublayers + 1,
                done,
            });
        }
        if done == slice.labels.len() {
            return None;
        }
        let end = slice.labels.len().min(done + rows_at_once(decoder));
        let labels = Labels::of(&slice.labels[done..end], 1.0, decoder.device());
        let normed = decoder.final_norm(&hidden.index_select(0, &labels.rows));
        let LogProbs { log_probs, correct } = decoder.log_probs(&normed, &labels.tokens);
        let loss = log_probs
            .iter()
            .zip(&labels.weights)
            .map(|(&log_prob, &weight)| -f64::from(log_prob) * f64::from(weight));
        *scores = *scores + labels.scores(loss.sum(), correct, 1.0);
        Some(Look {
            hidden,
            sublayers,
            done: end,
        })
    }
}

/// Of some rows of `hidden [T, H]`; writes the same rows of `dhidden`.
fn loss(
    labels: &Labels,
    hidden: &Tensor,
    dhidden: &mut Tensor,
    context: &Context,
    grads: &mut Grads,
) -> Scores {
    let rows = hidden.index_select(0, &labels.rows); // [R, H]
    let normed = context.decoder.final_norm(&rows);
    let mut dweight = match grads {
        Grads::Full(grads) => Some(grads.view(if grads.shape.has(ParamId::Head) {
            ParamId::Head
        } else {
            ParamId::Embed
        })),
        Grads::Lora(_) => None,
    };
    let out = context
        .decoder
        .cross_entropy(&normed, &labels.tokens, &labels.weights, dweight.as_mut());
    let drows = context.decoder.final_norm_backward(&rows, &out.dhidden, grads);
    let _ = dhidden.index_copy_(0, &labels.rows, &drows);
    labels.scores(out.loss_sum, out.correct, context.weight)
}

/// A function of the model alone, like the slice: the same job must give the same bytes. A GPU wants many rows.
fn rows_at_once(decoder: &Decoder) -> usize {
    let per_row = decoder.spec.vocab * decoder.spec.hidden;
    match decoder.device() {
        Device::Cpu => (HEAD_PRODUCTS / per_row).clamp(64, 512) as usize,
        _ => 2048,
    }
}

/// Label rows of a slice, weights divided by the step's total.
struct Labels {
    rows: Tensor,
    tokens: Vec<u32>,
    weights: Vec<f32>,
}

impl Labels {
    fn of(labels: &[Label], total_weight: f64, device: Device) -> Labels {
        let rows: Vec<i64> = labels.iter().map(|&(row, _, _)| row).collect();
        let weight = |&(_, _, weight): &Label| (f64::from(weight) / total_weight) as f32;
        Labels {
            rows: Tensor::from_slice(&rows).to_device(device),
            tokens: labels.iter().map(|&(_, token, _)| token).collect(),
            weights: labels.iter().map(weight).collect(),
        }
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

/// Activations are float32.
fn keeps_all(slice: &Slice, context: &Context) -> bool {
    let numbers = context.decoder.saved_numbers() * slice.tokens.len();
    4 * numbers as i64 <= context.keep_bytes
}
