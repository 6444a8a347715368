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
//! Not here: which sequences (data), what is minimised (objective), the optimizer (learner).

mod labels;
mod look;

use std::ops::Range;

use tandem_kernels::loss::LogProbs;
use tch::Tensor;

pub use look::Look;

use super::data::Slice;
use super::noise::Noise;
use super::profile::Doing;
use crate::lora::adapter::{Adapter, AdapterRows};
use crate::lora::params::AdapterParams;
use crate::model::full::FullParams;
use crate::model::{Decoder, Dropout, HeadHere, Saved, TrainPass, Trainable, TrainedRows};
use labels::{Labels, rows_at_once};

/// Activations of the slices that are on their way that may be kept for their backward; beyond, layers run again in the
/// backward.
pub const KEEP_BYTES: i64 = 2 << 30;

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

/// A slice, and the tokens of its optimizer step that went before it, which make its dropout its own.
pub type Entry<'a> = (&'a Slice, u64);

/// Slices on their way forward and back, side by side.
pub struct Pass {
    /// All of them as one.
    slice: Slice,
    parts: Vec<Part>,
    /// Of each sublayer that it went through forward, and not yet backward.
    kept: Vec<Kept>,
    /// Of the labels that are done.
    found: LogProbs,
    at: At,
}

/// What one slice has of a pass.
#[derive(Clone)]
struct Part {
    rows: Range<usize>,
    labels: Range<usize>,
    rows_before: u64,
    /// Whether the weights of its labels are final.
    is_weighed: bool,
    /// Whether no row has several labels.
    is_row_once: bool,
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
    /// Labels have their log-probabilities, and wait for weights. Only after [`Pass::to_be_weighed`].
    Scored(Scored),
    /// Through: gradients were added. What was found of the labels of each slice.
    Through(Vec<LogProbs>),
}

/// A pass that went forward and waits to be weighed. Its activations are held meanwhile.
pub struct Scored {
    slice: Slice,
    parts: Vec<Part>,
    kept: Vec<Kept>,
    found: LogProbs,
    /// Behind the last sublayer.
    hidden: Tensor,
    head: HeadHere,
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
        let mut slice = Slice::default();
        let mut parts = vec![];
        for &(next, rows_before) in slices {
            let (first_row, first_label) = (slice.tokens.len(), slice.labels.len());
            slice.append(next);
            parts.push(Part {
                rows: first_row..slice.tokens.len(),
                labels: first_label..slice.labels.len(),
                rows_before,
                is_weighed: true,
                is_row_once: next.labels.windows(2).all(|pair| pair[0].0 < pair[1].0),
            });
        }
        let adapted = parts
            .iter()
            .zip(learns)
            .filter_map(|(part, learns)| match learns.trained {
                Trained::Adapter { adapter, .. } => Some(AdapterRows {
                    rows: part.rows.clone(),
                    adapter,
                }),
                Trained::Model { .. } => None,
            });
        let mut embedded = decoder.embed(&slice.tokens, &adapted.collect::<Vec<_>>());
        if learns.iter().any(|learns| learns.noise.is_some()) {
            let noisy = slices
                .iter()
                .zip(&parts)
                .zip(learns)
                .map(|((entry, part), learns)| {
                    let embedded = embedded.narrow(0, part.rows.start as i64, part.rows.len() as i64);
                    match learns.noise {
                        Some(noise) => noise.add(embedded, entry.0, entry.1),
                        None => embedded,
                    }
                });
            embedded = Tensor::cat(&noisy.collect::<Vec<_>>(), 0);
        }
        Pass {
            slice,
            parts,
            kept: vec![],
            found: LogProbs::default(),
            at: At::Forward(embedded),
        }
    }

    /// It stops when the labels of the slices of these numbers are scored, for [`Scored::weighed`].
    pub fn to_be_weighed(mut self, slices: impl IntoIterator<Item = usize>) -> Pass {
        for i in slices {
            self.parts[i].is_weighed = false;
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
            slice,
            parts,
            mut kept,
            mut found,
            at,
        } = self;
        let decoder = context.decoder;
        let trained = trained_rows(&parts, context.learns);
        let pass = TrainPass {
            tokens: &slice.tokens,
            positions: &slice.positions,
            cu_seqlens: &slice.cu_seqlens,
            trainable: match context.learns {
                [
                    Learns {
                        trained: Trained::Model { gradient },
                        ..
                    },
                ] => Trainable::Full(gradient),
                _ => Trainable::Lora(&trained),
            },
        };
        let at = match at {
            At::Forward(input) => {
                let (hidden, saved) = decoder.sublayer_saving(kept.len(), input.shallow_clone(), &pass);
                kept.push(match keeps_all(&slice, context) {
                    true => Kept::All(Box::new(saved)),
                    false if kept.len().is_multiple_of(2) => Kept::Input(input),
                    false => Kept::Nothing,
                });
                let is_weighed = parts.iter().all(|part| part.is_weighed);
                match (kept.len() == decoder.n_sublayers(), is_weighed) {
                    (false, _) => At::Forward(hidden),
                    (true, false) => At::Scoring {
                        hidden,
                        head: decoder.head_here(),
                    },
                    (true, true) => At::Loss {
                        dhidden: hidden.zeros_like(),
                        hidden,
                        head: decoder.head_here(),
                    },
                }
            }
            At::Scoring { hidden, head } => match next_scored(&parts, decoder, &found) {
                None => {
                    return Advanced::Scored(Scored {
                        slice,
                        parts,
                        kept,
                        found,
                        hidden,
                        head,
                    });
                }
                Some(next) => {
                    let trained = trained_labels(&parts, context.learns, &next);
                    let labels = Labels::of(&slice.labels[next], decoder.device());
                    let normed = labels.normed(&hidden, decoder);
                    let branches = decoder.trained_head(&normed, Trainable::Lora(&trained));
                    found.extend(decoder.log_probs(&normed, &labels.tokens, &head, &branches));
                    At::Scoring { hidden, head }
                }
            },
            At::Loss { dhidden, .. } if found.log_probs.len() == slice.labels.len() => At::Backward(dhidden),
            At::Loss {
                hidden,
                mut dhidden,
                head,
            } => {
                let next = next_labels(&parts, context, &found);
                let trained = trained_labels(&parts, context.learns, &next);
                let trainable = match pass.trainable {
                    Trainable::Lora(_) => Trainable::Lora(&trained),
                    whole => whole,
                };
                let is_within = |part: &&Part| part.labels.start < next.end && next.start < part.labels.end;
                let is_row_once = parts.iter().filter(is_within).all(|part| part.is_row_once);
                let labels = Labels::of(&slice.labels[next], decoder.device());
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
            At::Backward(dhidden) => match kept.pop() {
                None => {
                    decoder.embed_backward(&dhidden, &pass);
                    let of_part = |part: &Part| found.part(part.labels.clone());
                    return Advanced::Through(parts.iter().map(of_part).collect());
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
                    At::Backward(decoder.sublayer_backward(i, saved, dhidden, &pass))
                }
            },
        };
        Advanced::On(Pass {
            slice,
            parts,
            kept,
            found,
            at,
        })
    }
}

impl Scored {
    pub fn slice(&self) -> &Slice {
        &self.slice
    }

    /// log p of each label that is to be weighed, in order.
    pub fn found(&self) -> &LogProbs {
        &self.found
    }

    /// The same by slice, for those that are to be weighed: which, and what was found.
    pub fn by_slice(&self) -> impl Iterator<Item = (usize, &[f32])> {
        let mut before = 0;
        let later = self.parts.iter().enumerate().filter(|(_, part)| !part.is_weighed);
        later.map(move |(i, part)| {
            let start = before;
            before += part.labels.len();
            (i, &self.found.log_probs[start..before])
        })
    }

    /// Goes backward with `dlogp`: the derivative of what is minimised by the log-probability of each label that was to be
    /// weighed, in order.
    ///
    /// # Panics
    /// When there is not one number for each.
    pub fn weighed(self, dlogp: &[f32]) -> Pass {
        let Scored {
            mut slice,
            mut parts,
            kept,
            found,
            hidden,
            head,
        } = self;
        assert_eq!(dlogp.len(), found.log_probs.len(), "a number for each label");
        let mut dlogp = dlogp.iter();
        for part in parts.iter_mut().filter(|part| !part.is_weighed) {
            part.is_weighed = true;
            let labels = &mut slice.labels[part.labels.clone()];
            labels
                .iter_mut()
                .zip(&mut dlogp)
                .for_each(|(label, dlogp)| label.2 = -dlogp);
        }
        Pass {
            slice,
            parts,
            kept,
            // The head runs again, to the same bits: the gradient of logits needs all of them.
            found: LogProbs::default(),
            at: At::Loss {
                dhidden: hidden.zeros_like(),
                hidden,
                head,
            },
        }
    }
}

/// The labels that are scored in the next quantum: of slices that lie side by side.
fn next_scored(parts: &[Part], decoder: &Decoder, found: &LogProbs) -> Option<Range<usize>> {
    let mut before = found.log_probs.len();
    let mut later = parts.iter().filter(|part| !part.is_weighed);
    let first = later.find(|part| match before < part.labels.len() {
        true => true,
        false => {
            before -= part.labels.len();
            false
        }
    })?;
    let start = first.labels.start + before;
    let end = later.fold(first.labels.end, |end, part| match part.labels.start == end {
        true => part.labels.end,
        false => end,
    });
    Some(start..end.min(start + rows_at_once(decoder)))
}

/// The labels that are done in the next quantum. None reaches over the end of a slice where the head is adapted, because gradients
/// of the adapter are sums over rows, or where a row has several labels: these sums must be the same alone and beside others.
fn next_labels(parts: &[Part], context: &Context, found: &LogProbs) -> Range<usize> {
    let &Context { decoder, learns, .. } = context;
    let done = found.log_probs.len();
    let all = parts.last().map_or(0, |part| part.labels.end);
    let adapts_head = |learns: &Learns| match learns.trained {
        Trained::Adapter { adapter, .. } => decoder.adapts_head(adapter),
        Trained::Model { .. } => false,
    };
    let has_sums = learns.iter().any(adapts_head) || !parts.iter().all(|part| part.is_row_once);
    let end = match has_sums {
        true => parts.iter().map(|part| part.labels.end).find(|&end| end > done),
        false => None,
    };
    done..end.unwrap_or(all).min(done + rows_at_once(decoder))
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

/// None where the model itself is trained.
fn trained_rows<'a>(parts: &[Part], learns: &[Learns<'a>]) -> Vec<TrainedRows<'a>> {
    let rows =
        |(part, learns): (&Part, &Learns<'a>)| learns.trained_rows(part.rows.clone(), part.rows_before);
    parts.iter().zip(learns).filter_map(rows).collect()
}

/// The same of the rows before the head, one for each of `labels`. A slice has no more labels than rows where something drops
/// out, so these are numbered as its rows are.
fn trained_labels<'a>(parts: &[Part], learns: &[Learns<'a>], labels: &Range<usize>) -> Vec<TrainedRows<'a>> {
    let rows = |(part, learns): (&Part, &Learns<'a>)| {
        let own = part.labels.start.max(labels.start)..part.labels.end.min(labels.end);
        if own.is_empty() {
            return None;
        }
        let before = part.rows_before + (own.start - part.labels.start) as u64;
        learns.trained_rows(own.start - labels.start..own.end - labels.start, before)
    };
    parts.iter().zip(learns).filter_map(rows).collect()
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

fn keeps_all(slice: &Slice, context: &Context) -> bool {
    activation_bytes(slice.tokens.len(), context.decoder) <= context.keep_bytes
}

/// The bytes that passes of up to `rows` may keep, such that all of them keep their activations or none does.
pub fn all_or_nothing(rows: usize, decoder: &Decoder) -> i64 {
    match activation_bytes(rows, decoder) <= KEEP_BYTES {
        true => i64::MAX,
        false => 0,
    }
}

/// Activations are float32.
fn activation_bytes(rows: usize, decoder: &Decoder) -> i64 {
    4 * (decoder.saved_numbers() * rows) as i64
}
