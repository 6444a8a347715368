//! Slices through the sublayers and back, a sublayer at a time: what every objective is made of.
//!
//! An objective is a function of the log-probabilities of chosen tokens (labels), so an optimizer step is three things:
//!
//! 1. *Passes* go forward: a [`Look`] under anything that is not trained now (the base, a starting adapter, or what is
//!    trained where no gradient is wanted) gives log-probabilities; a [`Pass`] gives them too and keeps what its backward
//!    reads. Slices of several who train may go in one.
//! 2. Somebody *weighs*: from the log-probabilities of sequences that belong together to `d loss / d log p` of each label
//!    ([`super::objective`]; a client's own arithmetic does as well).
//! 3. The pass goes *backward* with these and adds to the gradient of each [`super::learner::Learner`]. How many passes
//!    add up before a learner's update is the caller's to say.
//!
//! Where weights are known before the forward (supervised training, any plain weighted sum), the loss and its gradient are
//! one product of the head instead of two: [`Pass::enter`] for that, [`Pass::enter_to_be_weighed`] otherwise.
//! Each `advance` is one quantum of a few milliseconds, so that requests are served in between. All of it runs on the
//! thread that owns the tensors, inside `tch::no_grad_guard()`, and on every rank alike: log-probabilities have the same
//! bits on all ranks, so whatever weighs them decides the same everywhere; gradients are summed over ranks by the update.
//!
//! ```text
//! let mut pass = Pass::enter_to_be_weighed((&slice, rows_before), &context);
//! let scored = loop {
//!     match pass.advance(&context) { Advanced::On(next) => pass = next, Advanced::Scored(scored) => break scored, .. }
//! };
//! let dlogp = weigh(scored.slice(), &scored.found().log_probs);     // one number a label
//! let mut pass = scored.weighed(&dlogp);
//! while let Advanced::On(next) = pass.advance(&context) { pass = next }
//! ```
//!
//! Not here: which sequences (plan, slice), what is minimised (objective), the optimizer (learner).

mod kept;
mod labels;
mod look;
mod packed;
mod scored;

use std::ops::Range;

use tandem_kernels::loss::LogProbs;
use tch::Tensor;

pub use kept::{KEEP_BYTES, all_or_nothing};
pub use look::Look;
pub use scored::Scored;

use super::noise::Noise;
use super::profile::Doing;
use super::slice::Slice;
use crate::lora::adapter::Adapter;
use crate::lora::params::AdapterParams;
use crate::model::full::FullParams;
use crate::model::{Decoder, Dropout, HeadHere, TrainPass, Trainable, TrainedRows};
use kept::{KeptSublayers, keeps_all};
use labels::Labels;
use packed::Packed;

/// What every quantum of a pass is given. The same one for all quanta of a pass: what it says must not change meanwhile.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub decoder: &'a Decoder,
    /// Of each slice of the pass.
    pub learns: &'a [Learns<'a>],
    /// [`KEEP_BYTES`], shared by the passes that are held at one time.
    pub keep_bytes: i64,
}

/// Who learns from a slice.
#[derive(Clone, Copy)]
pub struct Learns<'a> {
    pub trained: Trained<'a>,
    /// On the adapter's inputs. Its `row0` is not read: it is the slice's own.
    pub dropout: Option<Dropout>,
    /// On the embeddings.
    pub noise: Option<Noise>,
}

/// What is trained, as it is now, and where its gradient adds up.
#[derive(Clone, Copy)]
pub enum Trained<'a> {
    Adapter {
        adapter: &'a Adapter,
        gradient: &'a AdapterParams,
    },
    /// Every parameter: its slice is the only one of the pass.
    Model { gradient: &'a FullParams },
}

impl<'a> From<Trained<'a>> for Learns<'a> {
    /// Without dropout and noise.
    fn from(trained: Trained<'a>) -> Learns<'a> {
        Learns {
            trained,
            dropout: None,
            noise: None,
        }
    }
}

impl<'a> Learns<'a> {
    /// `before`: rows of the optimizer step before these.
    fn trained_rows(&self, rows: Range<usize>, before: u64) -> Option<TrainedRows<'a>> {
        let Trained::Adapter { adapter, gradient } = self.trained else {
            return None;
        };
        Some(TrainedRows {
            rows,
            adapter,
            dropout: self.dropout.map(|dropout| Dropout {
                row0: before,
                ..dropout
            }),
            gradient,
        })
    }
}

/// A slice, and the tokens of its optimizer step that went before it, which make its dropout its own.
pub type Entry<'a> = (&'a Slice, u64);

/// Slices on their way forward and back, side by side.
pub struct Pass {
    packed: Packed,
    kept: KeptSublayers,
    /// Of the labels that are done.
    found: LogProbs,
    at: At,
}

enum At {
    /// Hidden states.
    Forward(Tensor),
    /// Hidden states behind the last sublayer, of which the labels that have no weights yet are scored.
    Scoring { hidden: Tensor, head: HeadHere },
    /// The labels that are done have their rows of the gradient.
    Loss {
        hidden: Tensor,
        dhidden: Tensor,
        head: HeadHere,
    },
    /// Gradient of hidden states.
    Backward(Tensor),
}

/// A pass after a quantum.
pub enum Advanced {
    /// There is more to do.
    On(Pass),
    /// Labels have their log-probabilities, and wait for weights. Only after [`Pass::to_be_weighed`].
    Scored(Scored),
    /// Through: gradients were added. What was found of the labels of each slice.
    Through(Vec<LogProbs>),
}

impl Pass {
    /// What is next of it.
    pub fn doing(&self) -> Doing {
        match self.at {
            At::Forward(_) => Doing("forward", Some(self.kept.len())),
            At::Scoring { .. } | At::Loss { .. } => Doing("head and loss", None),
            At::Backward(_) => Doing("backward", self.kept.len().checked_sub(1)),
        }
    }

    /// The weights of the slices are final: it minimises the sum of -weight * log p over their labels.
    ///
    /// # Panics
    /// When `context` has not one who learns for each slice.
    pub fn enter(slices: &[Entry], context: &Context) -> Pass {
        let Context { decoder, learns, .. } = *context;
        assert_eq!(slices.len(), learns.len(), "somebody learns from each slice");
        let packed = Packed::new(slices);
        Pass {
            at: At::Forward(packed.embed(slices, learns, decoder)),
            packed,
            kept: KeptSublayers::default(),
            found: LogProbs::default(),
        }
    }

    /// It stops when the labels of the slices of these numbers are scored, for [`Scored::weighed`].
    pub fn to_be_weighed(mut self, slices: impl IntoIterator<Item = usize>) -> Pass {
        for i in slices {
            self.packed.parts[i].is_weighed = false;
        }
        self
    }

    /// Of one slice, which is to be weighed.
    pub fn enter_to_be_weighed(slice: Entry, context: &Context) -> Pass {
        Pass::enter(&[slice], context).to_be_weighed([0])
    }

    /// A sublayer, or some labels, further.
    pub fn advance(self, context: &Context) -> Advanced {
        let Pass {
            packed,
            mut kept,
            mut found,
            at,
        } = self;
        let &Context {
            decoder,
            learns,
            keep_bytes,
        } = context;
        let trained = packed.trained_rows(learns);
        let pass = TrainPass {
            tokens: &packed.slice.tokens,
            positions: &(&packed.slice.positions).into(),
            cu_seqlens: &packed.slice.cu_seqlens,
            trainable: whole_model(learns).unwrap_or(Trainable::Lora(&trained)),
        };
        let at = match at {
            At::Forward(input) => {
                let keeps_all = keeps_all(packed.slice.tokens.len(), decoder, keep_bytes);
                let hidden = kept.forward(decoder, input, &pass, keeps_all);
                match kept.len() == decoder.n_sublayers() {
                    false => At::Forward(hidden),
                    true => At::behind_last(hidden, decoder, packed.is_weighed()),
                }
            }
            At::Scoring { hidden, head } => match packed.next_scored(decoder, &found) {
                None => {
                    return Advanced::Scored(Scored {
                        packed,
                        kept,
                        found,
                        hidden,
                        head,
                    });
                }
                Some(next) => {
                    let trained = packed.trained_labels(learns, &next);
                    let labels = Labels::of(&packed.slice.labels[next], decoder.device());
                    let normed = labels.normed(&hidden, decoder);
                    let branches = decoder.trained_head(&normed, Trainable::Lora(&trained));
                    found.extend(decoder.log_probs(&normed, &labels.tokens, &head, &branches));
                    At::Scoring { hidden, head }
                }
            },
            At::Loss { dhidden, .. } if found.log_probs.len() == packed.slice.labels.len() => {
                At::Backward(dhidden)
            }
            At::Loss {
                hidden,
                mut dhidden,
                head,
            } => {
                let next = packed.next_labels(learns, decoder, &found);
                let trained = packed.trained_labels(learns, &next);
                let trainable = whole_model(learns).unwrap_or(Trainable::Lora(&trained));
                let is_row_once = packed.is_row_once(&next);
                let labels = Labels::of(&packed.slice.labels[next], decoder.device());
                let out = loss(
                    &labels,
                    is_row_once,
                    &hidden,
                    &mut dhidden,
                    decoder,
                    &head,
                    trainable,
                );
                found.extend(out);
                At::Loss {
                    hidden,
                    dhidden,
                    head,
                }
            }
            At::Backward(dhidden) => match kept.backward(decoder, dhidden, &pass) {
                Ok(dhidden) => At::Backward(dhidden),
                Err(dhidden) => {
                    decoder.embed_backward(&dhidden, &pass);
                    let of_part = packed.parts.iter().map(|part| found.part(part.labels.clone()));
                    return Advanced::Through(of_part.collect());
                }
            },
        };
        Advanced::On(Pass {
            packed,
            kept,
            found,
            at,
        })
    }
}

impl At {
    fn behind_last(hidden: Tensor, decoder: &Decoder, is_weighed: bool) -> At {
        let head = decoder.head_here();
        match is_weighed {
            false => At::Scoring { hidden, head },
            true => At::Loss {
                dhidden: hidden.zeros_like(),
                hidden,
                head,
            },
        }
    }
}

/// Where the model itself is trained.
fn whole_model<'a>(learns: &[Learns<'a>]) -> Option<Trainable<'a>> {
    match learns {
        [
            Learns {
                trained: Trained::Model { gradient },
                ..
            },
        ] => Some(Trainable::Full(gradient)),
        _ => None,
    }
}

/// Log-probabilities of `labels`; adds gradients, and writes their rows of `dhidden [T, H]`.
fn loss(
    labels: &Labels,
    is_row_once: bool,
    hidden: &Tensor,
    dhidden: &mut Tensor,
    decoder: &Decoder,
    head: &HeadHere,
    trainable: Trainable,
) -> LogProbs {
    let rows = hidden.index_select(0, &labels.rows); // [R, H]
    let normed = decoder.final_norm(&rows);
    let out = decoder.cross_entropy(&normed, &labels.tokens, &labels.weights, head, trainable);
    let drows = decoder.final_norm_backward(&rows, &out.dhidden, trainable);
    let _ = match is_row_once {
        true => dhidden.index_copy_(0, &labels.rows, &drows),
        false => dhidden.index_add_(0, &labels.rows, &drows),
    };
    LogProbs {
        log_probs: out.log_probs,
        correct: out.correct,
    }
}
