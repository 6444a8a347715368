//! The loss where every rank holds some rows of the vocabulary: ranks tell each other three numbers a row (the largest
//! logit, the sum of exponentials, the label's logit) and never a logit more (Megatron-LM's vocabulary-parallel
//! cross-entropy). Every rank ends with the same bits.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{Head, LogProbs, LossOut, chunk_rows, through};
use crate::comm::Comm;

/// Where this rank's rows of the head stand in the vocabulary.
pub struct Vocabulary<'a> {
    pub comm: &'a Comm,
    /// The first row that is held here.
    pub start: i64,
    /// Rows of the largest shard.
    pub widest: i64,
    /// All rows.
    pub total: i64,
}

/// As [`super::linear_cross_entropy`], of a head of which `shard` (a weight `[v, H]`) stands here: `backward` is told gradients
/// `[r, v]`. `hidden` is the same on every rank; so is the result.
///
/// # Panics
/// When a label lies outside the vocabulary, the numbers of rows differ, or a rank is lost.
pub fn sharded_cross_entropy(
    hidden: &Tensor,
    shard: Head,
    vocabulary: &Vocabulary,
    labels: &[u32],
    weights: &[f32],
    mut backward: impl FnMut(Range<usize>, &Tensor) -> Option<Tensor>,
) -> LossOut {
    assert_eq!(labels.len(), weights.len(), "a weight for each label");
    let mut dhidden = Vec::new();
    let LogProbs { log_probs, correct } = in_chunks(hidden, shard, vocabulary, labels, |chunk, start| {
        let rows = start..start + chunk.rows.len();
        let gradient = chunk.gradient(shard, &weights[rows.clone()]);
        dhidden.push(through(shard, &gradient, backward(rows, &gradient)));
    });
    let losses = log_probs
        .iter()
        .zip(weights)
        .map(|(log_prob, weight)| -f64::from(*weight) * f64::from(*log_prob));
    let loss_sum = losses.sum();
    let mut dhidden = match dhidden.len() {
        0 => hidden.zeros_like(),
        1 => dhidden.remove(0),
        _ => Tensor::cat(&dhidden, 0),
    };
    vocabulary.comm.all_reduce(&mut dhidden);
    LossOut {
        loss_sum,
        correct,
        log_probs,
        dhidden,
    }
}

/// As [`super::linear_log_probs`].
pub fn sharded_log_probs(hidden: &Tensor, shard: Head, vocabulary: &Vocabulary, labels: &[u32]) -> LogProbs {
    in_chunks(hidden, shard, vocabulary, labels, |_, _| ())
}

/// Some rows, and what the softmax over all ranks made of them.
struct Chunk {
    /// exp(logit - largest logit here), `[r, v]`.
    exponentials: Tensor,
    /// What the gradient through a cap reads.
    kept: Option<Tensor>,
    /// The label's column here, 0 where it stands elsewhere.
    columns: Vec<i64>,
    rows: Vec<Row>,
}

struct Row {
    log_prob: f32,
    correct: bool,
    /// What makes probabilities of this rank's exponentials.
    factor: f32,
    /// 1 where the label stands here, else 0.
    owned: f32,
}

impl Chunk {
    /// weight * (softmax - onehot(label)) of the columns held here, through the cap, `[r, v]`.
    fn gradient(self, shard: Head, weights: &[f32]) -> Tensor {
        let device = self.exponentials.device();
        let column = |number: &dyn Fn(&Row, f32) -> f32| {
            let numbers = self
                .rows
                .iter()
                .zip(weights)
                .map(|(row, &weight)| number(row, weight));
            Tensor::from_slice(&numbers.collect::<Vec<f32>>())
                .to_device(device)
                .unsqueeze(1)
        };
        let factors = column(&|row, weight| row.factor * weight);
        let labels = column(&|row, weight| -row.owned * weight);
        let columns = Tensor::from_slice(&self.columns).to_device(device).unsqueeze(1);
        let mut gradient = self.exponentials;
        gradient *= factors;
        shard.before_cap(gradient.scatter_add_(1, &columns, &labels), self.kept)
    }
}

fn in_chunks(
    hidden: &Tensor,
    shard: Head,
    vocabulary: &Vocabulary,
    labels: &[u32],
    mut chunk: impl FnMut(Chunk, usize),
) -> LogProbs {
    let n = hidden.size()[0] as usize;
    assert_eq!(labels.len(), n, "a label for each row");
    if let Some(label) = labels.iter().find(|label| i64::from(**label) >= vocabulary.total) {
        panic!("label {label} of a vocabulary of {}", vocabulary.total);
    }
    // Every rank cuts alike.
    let height = chunk_rows(vocabulary.widest);
    let (mut log_probs, mut correct) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for start in (0..n).step_by(height) {
        let rows = height.min(n - start);
        let part = hidden.narrow(0, start as i64, rows as i64);
        let done = softmax(&part, start, shard, vocabulary, &labels[start..start + rows]);
        log_probs.extend(done.rows.iter().map(|row| row.log_prob));
        correct.extend(done.rows.iter().map(|row| row.correct));
        chunk(done, start);
    }
    LogProbs { log_probs, correct }
}

/// Of rows from `first` on.
fn softmax(hidden: &Tensor, first: usize, shard: Head, vocabulary: &Vocabulary, labels: &[u32]) -> Chunk {
    let Vocabulary { comm, start, .. } = *vocabulary;
    let logits = shard.logits(hidden, first); // [r, v]
    let kept = shard.kept(&logits);
    let device = logits.device();
    let places: Vec<Option<i64>> = labels
        .iter()
        .map(|&label| Some(i64::from(label) - start).filter(|place| (0..shard.weight.n()).contains(place)))
        .collect();
    let columns: Vec<i64> = places.iter().map(|place| place.unwrap_or(0)).collect();
    let owned: Vec<bool> = places.iter().map(Option::is_some).collect();
    let index = Tensor::from_slice(&columns).to_device(device).unsqueeze(1);
    let mask = Tensor::from_slice(&owned).to_device(device).unsqueeze(1);
    let largest = logits.amax([1i64].as_slice(), true);
    let of_label = logits
        .gather(1, &index, false)
        .where_scalarother(&mask, f64::NEG_INFINITY);
    let exponentials = (logits - &largest).exp();
    let sums = exponentials.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
    let said = comm.all_gather(&Tensor::cat(&[largest, sums, of_label], 1)); // [world, r, 3]
    let said = Vec::<f32>::try_from(said.view([-1]).to_device(Device::Cpu)).expect("a flat float32 tensor");
    let of = |rank: usize, row: usize| -> [f32; 3] {
        let at = (rank * labels.len() + row) * 3;
        said[at..at + 3].try_into().expect("three numbers")
    };
    let row = |row: usize| {
        let ranks = || (0..comm.world()).map(|rank| of(rank, row));
        let largest = ranks()
            .map(|[largest, ..]| largest)
            .fold(f32::NEG_INFINITY, f32::max);
        let of_label = ranks().map(|[.., label]| label).fold(f32::NEG_INFINITY, f32::max);
        // A NaN among the logits is in its rank's sum.
        let sum: f32 = ranks().map(|[own, sum, _]| sum * (own - largest).exp()).sum();
        Row {
            log_prob: of_label - largest - sum.ln(),
            correct: of_label >= largest,
            factor: (of(comm.rank(), row)[0] - largest).exp() / sum,
            owned: f32::from(u8::from(owned[row])),
        }
    };
    Chunk {
        exponentials,
        kept,
        columns,
        rows: (0..labels.len()).map(row).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::{linear_cross_entropy, linear_log_probs};
    use crate::weight::{Precision, Weight};

    #[test]
    fn ranks_together_are_one() {
        let (rows, vocabulary, width) = (300, 101, 32);
        let float = (Kind::Float, Device::Cpu);
        let hidden = Tensor::randn([rows, width], float);
        let head = Tensor::randn([vocabulary, width], float) * 0.5;
        let labels: Vec<u32> = (0..rows).map(|row| ((row * 7919) % vocabulary) as u32).collect();
        let weights: Vec<f32> = (0..rows).map(|row| (row % 3) as f32 * 0.5).collect();
        let weight = &Weight::new(&head, Precision::F32, Device::Cpu).expect("a matrix");
        let cap = Some(3.0);
        let whole = Head::plain(weight, cap);
        let expected = linear_cross_entropy(&hidden, whole, &labels, &weights, |_, _| None);
        let alone = linear_log_probs(&hidden, whole, &labels);
        for world in [2, 3, 4] {
            let widest = (vocabulary + world - 1) / world;
            let rank = |comm: Comm, hidden: Tensor, head: Tensor| {
                let start = comm.rank() as i64 * widest;
                let held = head.narrow(0, start, widest.min(vocabulary - start));
                let weight = &Weight::new(&held, Precision::F32, Device::Cpu).expect("a matrix");
                let shard = Head::plain(weight, cap);
                let place = Vocabulary {
                    comm: &comm,
                    start,
                    widest,
                    total: vocabulary,
                };
                let loss = sharded_cross_entropy(&hidden, shard, &place, &labels, &weights, |_, _| None);
                (loss, sharded_log_probs(&hidden, shard, &place, &labels))
            };
            let results: Vec<(LossOut, LogProbs)> = std::thread::scope(|scope| {
                let started: Vec<_> = Comm::threads(world as usize)
                    .into_iter()
                    .map(|comm| {
                        let (hidden, head) = (hidden.copy(), head.copy());
                        let rank = &rank;
                        scope.spawn(move || rank(comm, hidden, head))
                    })
                    .collect();
                started
                    .into_iter()
                    .map(|rank| rank.join().expect("it computes"))
                    .collect()
            });
            for (loss, log_probs) in &results {
                let far =
                    |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!((loss.loss_sum - expected.loss_sum).abs() < 1e-5 * expected.loss_sum);
                assert_eq!(loss.correct, expected.correct);
                assert_eq!(
                    (&log_probs.log_probs, &log_probs.correct),
                    (&loss.log_probs, &loss.correct)
                );
                let first = &results[0].0;
                assert_eq!(
                    (&loss.log_probs, &loss.dhidden),
                    (&first.log_probs, &first.dhidden)
                );
                assert!(
                    far(&loss.log_probs, &alone.log_probs) < 1e-5,
                    "{world} ranks: log-probabilities"
                );
                let worst = (&loss.dhidden - &expected.dhidden).abs().max().double_value(&[]);
                assert!(worst < 1e-5, "{world} ranks: gradients differ by {worst}");
            }
        }
    }
}
