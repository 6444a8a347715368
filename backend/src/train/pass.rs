//! Slices through the sublayers and back, a sublayer at a time: what every objective is made of.
//!
//! An objective is a function of the log-probabilities of chosen tokens (labels), so an optimizer step is three things:
//!
//! 1. *Passes* go forward: a [`Look`] under anything that is not trained now (the base, a starting adapter, or what is
//!    trained where no gradient is wanted) gives log-probabilities; a [`Pass`] gives them too and keeps what its backward
//!    reads.
//! 2. Somebody *weighs*: from the log-probabilities of sequences that belong together to `d loss / d log p` of each label
//!    ([`super::objective`]; a client's own arithmetic does as well).
//! 3. The pass goes *backward* with these and adds to the gradient of a [`super::learner::Learner`]. How many passes add
//!    up before the learner's update is the caller's to say.
//!
//! Where weights are known before the forward (supervised training, any plain weighted sum), the loss and its gradient are
//! one product of the head instead of two: [`Pass::enter`] for that, [`Pass::enter_to_be_weighed`] otherwise.
//! Each `advance` is one quantum of a few milliseconds, so that requests are served in between. All of it runs on the
//! thread that owns the tensors, inside `tch::no_grad_guard()`, and on every rank alike: log-probabilities have the same
//! bits on all ranks, so whatever weighs them decides the same everywhere; gradients are summed over ranks by the update.
//!
//! ```text
//! let mut pass = Pass::enter_to_be_weighed(slice, rows_before, &context);
//! let scored = loop {
//!     match pass.advance(&context, grads) { Advanced::On(next) => pass = next, Advanced::Scored(scored) => break scored, .. }
//! };
//! let dlogp = weigh(scored.slice(), &scored.found().log_probs);     // one number a label
//! let mut pass = scored.weighed(&dlogp);
//! while let Advanced::On(next) = pass.advance(&context, grads) { pass = next }
//! ```
//!
//! Not here: which sequences (data), what is minimised (objective), the optimizer (learner).

use tandem_kernels::loss::LogProbs;
use tch::{Device, Tensor};

use super::data::{Label, Slice};
use super::noise::Noise;
use crate::family::ParamId;
use crate::lora::adapter::{Adapter, AdapterRows};
use crate::model::{Batch, Context as Attention, Decoder, Dropout, Grads, Saved, TrainPass, Trainable};

/// Activations of the slices that are on their way that may be kept for their backward; beyond, layers run again in the
/// backward.
pub const KEEP_BYTES: i64 = 2 << 30;
/// Multiplications of the head in one go: what bounds the loss's part of a quantum as the slice bounds a layer's.
const HEAD_PRODUCTS: i64 = 1 << 28;

/// What every quantum of a pass is given. The same one for all quanta of a pass: what it says must not change meanwhile.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub decoder: &'a Decoder,
    /// What is trained, as it is now. `None`: all parameters are.
    pub adapter: Option<&'a Adapter>,
    /// On the adapter's inputs. Its `row0` is not read: it is the pass's own.
    pub dropout: Option<Dropout>,
    /// On the embeddings.
    pub noise: Option<Noise>,
    /// [`KEEP_BYTES`], shared by the passes that are held at one time.
    pub keep_bytes: i64,
}

/// A slice on its way forward and back.
pub struct Pass {
    slice: Slice,
    /// The step's tokens before it: dropout's counter.
    rows_before: u64,
    /// Of each sublayer that it went through forward, and not yet backward.
    kept: Vec<Kept>,
    /// Whether the weights of `slice` are final.
    is_weighed: bool,
    /// Of the labels that are done.
    found: LogProbs,
    at: At,
}

enum At {
    /// Hidden states.
    Forward(Tensor),
    /// Hidden states behind the last sublayer, of which labels are scored.
    Scoring(Tensor),
    /// The labels that are done have their rows of the gradient.
    Loss { hidden: Tensor, dhidden: Tensor },
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

/// A pass after a quantum.
pub enum Advanced {
    /// There is more to do.
    On(Pass),
    /// All labels have their log-probabilities, and wait for weights. Only after [`Pass::enter_to_be_weighed`].
    Scored(Scored),
    /// Through: its gradient was added. The slice comes back, with the log-probabilities of its labels.
    Through(Slice, LogProbs),
}

/// A pass that went forward and waits to be weighed. Its activations are held meanwhile.
pub struct Scored {
    slice: Slice,
    rows_before: u64,
    kept: Vec<Kept>,
    found: LogProbs,
    /// Behind the last sublayer.
    hidden: Tensor,
}

impl Pass {
    /// The weights of `slice` are final: it minimises the sum of -weight * log p over its labels. `rows_before`: tokens
    /// of the optimizer step that went before it, which make its dropout its own.
    pub fn enter(slice: Slice, rows_before: u64, context: &Context) -> Pass {
        let embedded = context.decoder.embed(&slice.tokens);
        let embedded = match context.noise {
            Some(noise) => noise.add(embedded, &slice, rows_before),
            None => embedded,
        };
        Pass {
            rows_before,
            kept: vec![],
            is_weighed: true,
            found: nothing_found(),
            at: At::Forward(embedded),
            slice,
        }
    }

    /// It stops when its labels are scored, for [`Scored::weighed`].
    pub fn enter_to_be_weighed(slice: Slice, rows_before: u64, context: &Context) -> Pass {
        Pass {
            is_weighed: false,
            ..Pass::enter(slice, rows_before, context)
        }
    }

    /// A sublayer, or some labels, further. Adds to `grads`.
    pub fn advance(self, context: &Context, grads: &mut Grads) -> Advanced {
        let Pass {
            slice,
            rows_before,
            mut kept,
            is_weighed,
            mut found,
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
                match (kept.len() == decoder.n_sublayers(), is_weighed) {
                    (false, _) => At::Forward(hidden),
                    (true, false) => At::Scoring(hidden),
                    (true, true) => At::Loss {
                        dhidden: hidden.zeros_like(),
                        hidden,
                    },
                }
            }
            At::Scoring(hidden) if found.log_probs.len() == slice.labels.len() => {
                return Advanced::Scored(Scored {
                    slice,
                    rows_before,
                    kept,
                    found,
                    hidden,
                });
            }
            At::Scoring(hidden) => {
                score(next_labels(&slice, &found, decoder), &hidden, decoder, &mut found);
                At::Scoring(hidden)
            }
            At::Loss { dhidden, .. } if found.log_probs.len() == slice.labels.len() => At::Backward(dhidden),
            At::Loss { hidden, mut dhidden } => {
                let labels = next_labels(&slice, &found, decoder);
                loss(labels, &hidden, &mut dhidden, decoder, grads, &mut found);
                At::Loss { hidden, dhidden }
            }
            At::Backward(dhidden) => match kept.pop() {
                None => {
                    decoder.embed_backward(&slice.tokens, &dhidden, grads);
                    return Advanced::Through(slice, found);
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
        Advanced::On(Pass {
            slice,
            rows_before,
            kept,
            is_weighed,
            found,
            at,
        })
    }
}

impl Scored {
    pub fn slice(&self) -> &Slice {
        &self.slice
    }

    /// log p of each label of the slice, in order.
    pub fn found(&self) -> &LogProbs {
        &self.found
    }

    /// Goes backward with `dlogp`: the derivative of what is minimised by the log-probability of each label, in order.
    ///
    /// # Panics
    /// When there is not one number for each label.
    pub fn weighed(self, dlogp: &[f32]) -> Pass {
        let Scored {
            mut slice,
            rows_before,
            kept,
            found: _,
            hidden,
        } = self;
        assert_eq!(dlogp.len(), slice.labels.len(), "a number for each label");
        for (label, dlogp) in slice.labels.iter_mut().zip(dlogp) {
            label.2 = -dlogp;
        }
        Pass {
            slice,
            rows_before,
            kept,
            is_weighed: true,
            // The head runs again, to the same bits: the gradient of logits needs all of them.
            found: nothing_found(),
            at: At::Loss {
                dhidden: hidden.zeros_like(),
                hidden,
            },
        }
    }
}

/// A slice on its way to the log-probabilities of its labels and no further: validation, references. No dropout.
pub struct Look {
    hidden: Tensor,
    /// Sublayers it went through.
    sublayers: usize,
    found: LogProbs,
}

impl Look {
    pub fn enter(slice: &Slice, decoder: &Decoder) -> Look {
        Look {
            hidden: decoder.embed(&slice.tokens),
            sublayers: 0,
            found: nothing_found(),
        }
    }

    /// A sublayer, or some labels, further, under `adapter` or the base. The log-probabilities of all labels, in order,
    /// when it is through.
    pub fn advance(
        self,
        slice: &Slice,
        decoder: &Decoder,
        adapter: Option<&Adapter>,
    ) -> Result<LogProbs, Look> {
        let Look {
            hidden,
            sublayers,
            mut found,
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
            return Err(Look {
                hidden: decoder.sublayer(sublayers, hidden, &batch),
                sublayers: sublayers + 1,
                found,
            });
        }
        if found.log_probs.len() == slice.labels.len() {
            return Ok(found);
        }
        score(next_labels(slice, &found, decoder), &hidden, decoder, &mut found);
        Err(Look {
            hidden,
            sublayers,
            found,
        })
    }
}

fn nothing_found() -> LogProbs {
    LogProbs {
        log_probs: vec![],
        correct: 0,
    }
}

/// The labels that are done in the next quantum.
fn next_labels<'a>(slice: &'a Slice, found: &LogProbs, decoder: &Decoder) -> &'a [Label] {
    let done = found.log_probs.len();
    &slice.labels[done..slice.labels.len().min(done + rows_at_once(decoder))]
}

/// Appends the log-probabilities of `labels` to `found`.
fn score(labels: &[Label], hidden: &Tensor, decoder: &Decoder, found: &mut LogProbs) {
    let labels = Labels::of(labels, decoder.device());
    let normed = decoder.final_norm(&hidden.index_select(0, &labels.rows));
    let LogProbs { log_probs, correct } = decoder.log_probs(&normed, &labels.tokens);
    found.log_probs.extend(log_probs);
    found.correct += correct;
}

/// The same, and writes the rows of `dhidden [T, H]` that `labels` stand in.
fn loss(
    labels: &[Label],
    hidden: &Tensor,
    dhidden: &mut Tensor,
    decoder: &Decoder,
    grads: &mut Grads,
    found: &mut LogProbs,
) {
    let labels = Labels::of(labels, decoder.device());
    let rows = hidden.index_select(0, &labels.rows); // [R, H]
    let normed = decoder.final_norm(&rows);
    let mut dweight = match grads {
        Grads::Full(grads) => Some(grads.view(if grads.shape.has(ParamId::Head) {
            ParamId::Head
        } else {
            ParamId::Embed
        })),
        Grads::Lora(_) => None,
    };
    let out = decoder.cross_entropy(&normed, &labels.tokens, &labels.weights, dweight.as_mut());
    let drows = decoder.final_norm_backward(&rows, &out.dhidden, grads);
    let _ = match labels.is_row_once {
        true => dhidden.index_copy_(0, &labels.rows, &drows),
        false => dhidden.index_add_(0, &labels.rows, &drows),
    };
    found.log_probs.extend(out.log_probs);
    found.correct += out.correct;
}

/// A function of the model alone, like the slice: the same job must give the same bytes. A GPU wants many rows.
fn rows_at_once(decoder: &Decoder) -> usize {
    let per_row = decoder.spec.vocab * decoder.spec.hidden;
    match decoder.device() {
        Device::Cpu => (HEAD_PRODUCTS / per_row).clamp(64, 512) as usize,
        _ => 2048,
    }
}

/// Label rows of a slice.
struct Labels {
    rows: Tensor,
    tokens: Vec<u32>,
    weights: Vec<f32>,
    is_row_once: bool,
}

impl Labels {
    fn of(labels: &[Label], device: Device) -> Labels {
        let rows: Vec<i64> = labels.iter().map(|&(row, _, _)| row).collect();
        Labels {
            is_row_once: rows.windows(2).all(|pair| pair[0] < pair[1]),
            rows: Tensor::from_slice(&rows).to_device(device),
            tokens: labels.iter().map(|&(_, token, _)| token).collect(),
            weights: labels.iter().map(|&(_, _, weight)| weight).collect(),
        }
    }
}

fn train_pass<'a>(slice: &'a Slice, rows_before: u64, context: &Context<'a>) -> TrainPass<'a> {
    let trainable = match context.adapter {
        Some(adapter) => Trainable::Lora {
            adapter,
            dropout: context.dropout.map(|dropout| Dropout {
                row0: rows_before,
                ..dropout
            }),
        },
        None => Trainable::Full,
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
