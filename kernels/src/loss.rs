//! The head's product, the softmax over the vocabulary and the cross-entropy in one op (the idea of Liger's
//! FusedLinearCrossEntropy): logits exist for a few rows at a time, first as logits, then as their gradient in the same
//! memory. Only rows with a label come here; which those are, and what a token weighs, is the trainer's.

mod sharded;

use std::ops::Range;

use tch::{Kind, Tensor};

pub use sharded::{Vocabulary, sharded_cross_entropy, sharded_log_probs};

use crate::cap::{soft_cap, soft_cap_backward};
use crate::gpu::told::send;
use crate::gpu::{self, Gpu};
use crate::linear::{LoraRows, linear, linear_backward, linear_training};
use crate::pool;
use crate::slice::RowsMut;
use crate::vector::{available, exp, max, rows_mut, uninit, vectorised};
use crate::weight::Weight;

/// What makes logits of hidden rows.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// [V, H]
    pub weight: &'a Weight,
    /// Logits become cap * tanh(logit / cap).
    pub cap: Option<f64>,
    /// Of the hidden rows.
    pub lora: &'a [LoraRows<'a>],
    /// What the branches read instead of the hidden rows [R, H]: the same after dropout.
    pub lora_x: Option<&'a Tensor>,
}

impl<'a> Head<'a> {
    /// Without branches.
    pub fn plain(weight: &'a Weight, cap: Option<f64>) -> Head<'a> {
        Head {
            weight,
            cap,
            lora: &[],
            lora_x: None,
        }
    }

    /// Of the hidden rows from `start` on.
    fn logits(&self, hidden: &Tensor, start: usize) -> Tensor {
        let (start, n) = (start as i64, hidden.size()[0]);
        let own = start..start + n;
        let lora: Vec<LoraRows> = self.lora.iter().filter_map(|rows| rows.within(&own)).collect();
        let mut logits = match self.lora_x {
            Some(x) if !lora.is_empty() => {
                linear_training(hidden, self.weight, None, &lora, &x.narrow(0, start, n), None).0
            }
            _ => linear(hidden, self.weight, None, &lora),
        };
        if let Some(cap) = self.cap {
            soft_cap(&mut logits, cap);
        }
        logits
    }

    /// What [`Head::before_cap`] will read of `logits`, whose memory is about to be used for their gradient.
    fn kept(&self, logits: &Tensor) -> Option<Tensor> {
        self.cap.map(|_| logits.copy())
    }

    /// The gradient of logits to the gradient of what the product gave.
    fn before_cap(&self, dlogits: Tensor, kept: Option<Tensor>) -> Tensor {
        match (self.cap, kept) {
            (Some(cap), Some(logits)) => soft_cap_backward(&logits, &dlogits, cap),
            _ => dlogits,
        }
    }
}

pub struct LossOut {
    /// Sum of -weight * log p(label).
    pub loss_sum: f64,
    /// Of each row: whether its label has the largest logit.
    pub correct: Vec<bool>,
    /// log p(label) of each row, without its weight.
    pub log_probs: Vec<f32>,
    /// [R, H]
    pub dhidden: Tensor,
}

/// What [`linear_log_probs`] gives of each row.
#[derive(Default)]
pub struct LogProbs {
    pub log_probs: Vec<f32>,
    /// Whether its label has the largest logit.
    pub correct: Vec<bool>,
}

impl LogProbs {
    pub fn extend(&mut self, more: LogProbs) {
        self.log_probs.extend(more.log_probs);
        self.correct.extend(more.correct);
    }

    pub fn part(&self, rows: Range<usize>) -> LogProbs {
        LogProbs {
            log_probs: self.log_probs[rows.clone()].to_vec(),
            correct: self.correct[rows].to_vec(),
        }
    }
}

/// Loss and gradient of `hidden` [R, H] through `head`, row i having the label labels[i] and the weight
/// weights[i]. `backward` is told rows and the gradient of what the head's product gave for them, [r, V], for the gradients of
/// the head itself, and returns what goes through its branches to the rows.
///
/// # Panics
/// When a label lies outside the vocabulary or the numbers of rows differ.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    head: Head,
    labels: &[u32],
    weights: &[f32],
    mut backward: impl FnMut(Range<usize>, &Tensor) -> Option<Tensor>,
) -> LossOut {
    assert_eq!(labels.len(), weights.len(), "a weight for each label");
    let mut dhidden = Vec::new();
    let LogProbs { log_probs, correct } = in_chunks(hidden, head, labels, |hidden, mut logits, start| {
        let end = start + hidden.size()[0] as usize;
        let kept = head.kept(&logits);
        let out = to_gradient(&mut logits, &labels[start..end], &weights[start..end]);
        let gradient = head.before_cap(logits, kept);
        dhidden.push(through(head, &gradient, backward(start..end, &gradient)));
        out
    });
    let losses = log_probs
        .iter()
        .zip(weights)
        .map(|(log_prob, weight)| -f64::from(*weight) * f64::from(*log_prob));
    let dhidden = match dhidden.len() {
        0 => hidden.zeros_like(),
        1 => dhidden.remove(0),
        _ => Tensor::cat(&dhidden, 0),
    };
    LossOut {
        loss_sum: losses.sum(),
        correct,
        log_probs,
        dhidden,
    }
}

/// The gradient of rows through the head's weight and its branches.
fn through(head: Head, gradient: &Tensor, branches: Option<Tensor>) -> Tensor {
    let dhidden = linear_backward(gradient, head.weight);
    match branches {
        Some(more) => dhidden + more,
        None => dhidden,
    }
}

/// log p(label) of each row of `hidden` [R, H], without gradients: validation, and objectives whose weights depend on
/// the probabilities of a whole sequence.
pub fn linear_log_probs(hidden: &Tensor, head: Head, labels: &[u32]) -> LogProbs {
    let zero = vec![0.0; labels.len()];
    in_chunks(hidden, head, labels, |hidden, mut logits, start| {
        let range = start..start + hidden.size()[0] as usize;
        if let Some(gpu) = gpu::of(&logits) {
            return cross_entropy_gpu(gpu, &logits.contiguous(), &labels[range], None);
        }
        to_gradient(&mut logits, &labels[range.clone()], &zero[range])
    })
}

/// Logits that exist at one time. A chunk also shares one pass of the head's backward over its panels, so it should not
/// be small.
const CHUNK_BYTES: usize = 64 << 20;
const MIN_CHUNK: usize = 64;
const MAX_CHUNK: usize = 256;

/// Rows of a chunk whose logits have so many columns.
fn chunk_rows(columns: i64) -> usize {
    (CHUNK_BYTES / (4 * columns as usize)).clamp(MIN_CHUNK, MAX_CHUNK)
}

/// Calls `chunk` with some rows of `hidden`, their logits and the number of the first row. A row's result does not
/// depend on how the rows are cut.
fn in_chunks(
    hidden: &Tensor,
    head: Head,
    labels: &[u32],
    mut chunk: impl FnMut(&Tensor, Tensor, usize) -> Vec<Row>,
) -> LogProbs {
    let n = hidden.size()[0] as usize;
    assert_eq!(labels.len(), n, "a label for each row");
    if let Some(label) = labels.iter().find(|label| i64::from(**label) >= head.weight.n()) {
        panic!("label {label} of a vocabulary of {}", head.weight.n());
    }
    let height = chunk_rows(head.weight.n());
    let mut rows = Vec::with_capacity(n);
    for start in (0..n).step_by(height) {
        let part = hidden.narrow(0, start as i64, height.min(n - start) as i64);
        let logits = head.logits(&part, start);
        rows.extend(chunk(&part, logits, start));
    }
    LogProbs {
        correct: rows.iter().map(|row| row.correct).collect(),
        log_probs: rows.into_iter().map(|row| row.log_prob).collect(),
    }
}

struct Row {
    log_prob: f32,
    correct: bool,
}

/// Replaces logits [r, V] by weight * (softmax - onehot(label)).
fn to_gradient(logits: &mut Tensor, labels: &[u32], weights: &[f32]) -> Vec<Row> {
    if let Some(gpu) = gpu::of(logits)
        && logits.is_contiguous()
    {
        return cross_entropy_gpu(gpu, logits, labels, Some(weights));
    }
    if !available() {
        return to_gradient_reference(logits, labels, weights);
    }
    let mut results = uninit(labels.len(), 2);
    {
        let Some(rows) = RowsMut::of(logits) else {
            return to_gradient_reference(logits, labels, weights);
        };
        let results = rows_mut(&mut results);
        pool::for_each(labels.len(), |row| {
            // SAFETY: the rows are this task's alone.
            let (logits, result) = unsafe { (rows.row(row), results.row(row)) };
            let (log_prob, correct) = gradient_row(logits, labels[row] as usize, weights[row]);
            result.copy_from_slice(&[log_prob, f32::from(correct)]);
        });
    }
    read_rows(&results)
}

/// Without weights the logits stay.
fn cross_entropy_gpu(gpu: Gpu, logits: &Tensor, labels: &[u32], weights: Option<&[f32]>) -> Vec<Row> {
    let device = logits.device();
    // Labels are below the vocabulary, which a kernel counts in 31 bits.
    let labels: Vec<i32> = labels.iter().map(|&label| label as i32).collect();
    let labels = send(&Tensor::from_slice(&labels), device);
    let weights = weights.map(|weights| send(&Tensor::from_slice(weights), device));
    let [rows, vocabulary] = [0, 1].map(|dim| logits.size()[dim]);
    let results = Tensor::empty([rows, 2], (Kind::Float, device));
    let args = [
        logits.into(),
        (&labels).into(),
        weights.as_ref().into(),
        (&results).into(),
        gpu::int(vocabulary),
    ];
    gpu.launch("cross_entropy", [rows as usize, 1, 1], 1024, &args);
    read_rows(&results)
}

/// Of [R, 2]: log-probabilities, and 1 where a row is correct.
fn read_rows(results: &Tensor) -> Vec<Row> {
    let results = Vec::<f32>::try_from(results.view([-1])).expect("a flat float tensor");
    results
        .chunks_exact(2)
        .map(|row| Row {
            log_prob: row[0],
            correct: row[1] == 1.0,
        })
        .collect()
}

/// The same in plain tch, on any device.
fn to_gradient_reference(logits: &mut Tensor, labels: &[u32], weights: &[f32]) -> Vec<Row> {
    let labels: Vec<i64> = labels.iter().map(|&label| i64::from(label)).collect();
    let labels = Tensor::from_slice(&labels)
        .to_device(logits.device())
        .unsqueeze(1);
    let weights = Tensor::from_slice(weights)
        .to_device(logits.device())
        .to_kind(logits.kind())
        .unsqueeze(1);
    let log_p = logits.log_softmax(-1, logits.kind());
    let floats =
        |x: Tensor| Vec::<f32>::try_from(x.to_kind(Kind::Float).view([-1])).expect("a flat float tensor");
    let correct = floats(
        logits
            .gather(1, &labels, false)
            .ge_tensor(&logits.amax([1i64].as_slice(), true)),
    );
    let log_probs = floats(log_p.gather(1, &labels, false));
    let onehot = logits.zeros_like().scatter_value(1, &labels, 1.0);
    logits.copy_(&((log_p.exp() - onehot) * weights));
    log_probs
        .into_iter()
        .zip(correct)
        .map(|(log_prob, correct)| Row {
            log_prob,
            correct: correct == 1.0,
        })
        .collect()
}

vectorised!(
    fn gradient_row(logits: &mut [f32], label: usize, weight: f32) -> (f32, bool) {
        let (of_label, maximum) = (logits[label], max(logits));
        let mut sums = [0.0f32; 32];
        let (blocks, rest) = logits.as_chunks_mut::<32>();
        for block in blocks {
            for (logit, sum) in block.iter_mut().zip(&mut sums) {
                *logit = exp(*logit - maximum);
                *sum += *logit;
            }
        }
        for (logit, sum) in rest.iter_mut().zip(&mut sums) {
            *logit = exp(*logit - maximum);
            *sum += *logit;
        }
        let sum: f32 = sums.iter().sum();
        let factor = weight / sum;
        for logit in logits.iter_mut() {
            *logit *= factor;
        }
        logits[label] -= weight;
        (of_label - maximum - sum.ln(), of_label >= maximum)
    }
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::{LoraModule, LoraPart};
    use crate::matmul;
    use crate::weight::Precision;
    use tch::Device;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn case(rows: i64, vocabulary: i64, hidden: i64) -> (Tensor, Tensor, Vec<u32>, Vec<f32>) {
        let labels = (0..rows).map(|row| ((row * 7919) % vocabulary) as u32).collect();
        let weights = (0..rows).map(|row| (row % 3) as f32 * 0.5).collect();
        let x = Tensor::randn([rows, hidden], FLOAT);
        (
            x,
            Tensor::randn([vocabulary, hidden], FLOAT) * 0.3,
            labels,
            weights,
        )
    }

    /// Against autograd in float64: loss 1e-6, gradients 1e-5 of the largest.
    #[test]
    fn agrees_with_autograd() {
        for (rows, vocabulary, width, cap) in [
            (1, 2, 4, None),
            (5, 1000, 64, None),
            (300, 333, 32, Some(2.0)),
            (300, 333, 32, None),
            (70, 40_000, 16, None),
        ] {
            let (x, w, labels, weights) = case(rows, vocabulary, width);
            let weight = &Weight::new(&w, Precision::F32, Device::Cpu).expect("a matrix");
            // The rows behind the first third have a branch, which reads the doubled rows.
            let (first, scale, lora_x) = (rows / 3, 0.7, &x * 2.0);
            let (a, b) = (
                Tensor::randn([3, width], FLOAT) * 0.3,
                Tensor::randn([vocabulary, 3], FLOAT),
            );
            let packed = |x: &Tensor| Weight::new(x, Precision::F32, Device::Cpu).expect("a matrix");
            let part = LoraPart {
                columns: 0..vocabulary,
                ranks: 0..3,
                b: packed(&b),
                scale,
            };
            let module = &LoraModule {
                a: packed(&a),
                parts: vec![part],
            };
            let head = Head {
                lora: &[LoraRows {
                    rows: first..rows,
                    module,
                }],
                lora_x: Some(&lora_x),
                ..Head::plain(weight, cap)
            };
            let delta = b.to_kind(Kind::Double).matmul(&a.to_kind(Kind::Double)) * (2.0 * scale); // [V, H]
            let mut dweight = Tensor::ones([vocabulary, width], FLOAT);
            let got = linear_cross_entropy(&x, head, &labels, &weights, |rows, dlogits| {
                let n = rows.len() as i64;
                let _ = dweight.g_add_(&matmul::tn(dlogits, &x.narrow(0, rows.start as i64, n)));
                let has_branch =
                    Tensor::arange_start(rows.start as i64, rows.end as i64, FLOAT).ge(first as f64);
                let through = dlogits.to_kind(Kind::Double).matmul(&delta) * has_branch.unsqueeze(1);
                Some(through.to_kind(Kind::Float))
            });

            let [x64, w64] = [&x, &w].map(|x| x.to_kind(Kind::Double).set_requires_grad(true));
            let index: Vec<i64> = labels.iter().map(|&label| i64::from(label)).collect();
            let index = Tensor::from_slice(&index);
            let behind = x64.narrow(0, first, rows - first).matmul(&delta.tr());
            let logits = x64.matmul(&w64.tr()) + behind.pad([0, 0, first, 0], "constant", 0.0);
            let logits = match cap {
                Some(cap) => (logits / cap).tanh() * cap,
                None => logits,
            };
            let log_p = logits
                .log_softmax(-1, Kind::Double)
                .gather(1, &index.unsqueeze(1), false)
                .squeeze_dim(1);
            let loss = -(&log_p * Tensor::from_slice(&weights)).sum(Kind::Double);
            let want = Tensor::run_backward(&[&loss], &[&x64, &w64], false, false);
            let want_loss = loss.double_value(&[]);
            assert!(
                (got.loss_sum - want_loss).abs() <= 1e-6 * want_loss.abs().max(1.0),
                "{}",
                got.loss_sum
            );
            close(&got.dhidden, &want[0]);
            close(&(dweight - 1.0), &want[1]);
            close(&Tensor::from_slice(&got.log_probs), &log_p.detach());
            // Where a cap is near, logits that differ in float64 may be equal in float32: either is right then.
            let (best, _) = logits.topk(2, -1, true, true);
            let of_label = logits.gather(1, &index.unsqueeze(1), false).squeeze_dim(1);
            let count = |rows: Tensor| rows.sum(Kind::Int64).int64_value(&[]);
            let surely = count(of_label.gt_tensor(&(best.select(1, 1) + 1e-5)));
            let perhaps = count(of_label.ge_tensor(&(best.select(1, 0) - 1e-5)));
            let correct = got.correct.iter().filter(|&&is| is).count() as i64;
            assert!(
                (surely..=perhaps).contains(&correct),
                "{surely} to {perhaps}, got {correct}"
            );

            let forward = linear_log_probs(&x, head, &labels);
            assert_eq!((forward.log_probs, forward.correct), (got.log_probs, got.correct));
        }
    }

    #[test]
    fn fast_gradient_agrees_with_the_reference() {
        gpu::everywhere(judge_by_the_reference);
    }

    fn judge_by_the_reference() {
        let (_, _, labels, weights) = case(40, 777, 1);
        let mut fast = Tensor::randn([40, 777], FLOAT) * 10.0;
        let mut reference = fast.to_kind(Kind::Double);
        let got = to_gradient(&mut fast, &labels, &weights);
        let want = to_gradient_reference(&mut reference, &labels, &weights);
        close(&fast, &reference);
        for (got, want) in got.iter().zip(want) {
            assert!((got.log_prob - want.log_prob).abs() < 1e-5 && got.correct == want.correct);
        }
    }

    #[test]
    fn a_row_alone_is_the_row_in_a_batch() {
        if !available() {
            return; // The references promise nearness only.
        }
        let (x, w, labels, weights) = case(300, 500, 48);
        for precision in [Precision::F32, Precision::Bf16] {
            let weight = &Weight::new(&w, precision, Device::Cpu).expect("a matrix");
            let head = Head::plain(weight, Some(5.0));
            let all = linear_cross_entropy(&x, head, &labels, &weights, |_, _| None);
            for row in [0usize, 1, 17, 255, 256, 299] {
                let range = row..row + 1;
                let part = x.narrow(0, row as i64, 1);
                let one =
                    linear_cross_entropy(&part, head, &labels[range.clone()], &weights[range], |_, _| None);
                assert_eq!(one.log_probs[0], all.log_probs[row]);
                assert_eq!(one.dhidden, all.dhidden.narrow(0, row as i64, 1));
            }
        }
    }

    fn close(got: &Tensor, want: &Tensor) {
        // What is added to ones is rounded as they are, however small it is.
        let scale = want.abs().max().double_value(&[]).max(1e-2);
        let worst = (got.to_kind(Kind::Double) - want).abs().max().double_value(&[]);
        assert!(worst <= 1e-5 * scale, "{worst} of {scale}");
    }
}
