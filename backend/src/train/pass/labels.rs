//! Labels of a slice as the head takes them: some rows at a time.

use tch::{Device, Tensor};

use crate::model::Decoder;
use crate::train::slice::Label;

/// Multiplications of the head in one go: what bounds the loss's part of a quantum as the slice bounds a layer's.
const HEAD_PRODUCTS: i64 = 1 << 28;

/// A function of the model alone, like the slice: the same job must give the same bytes. A GPU wants many rows.
pub fn rows_at_once(decoder: &Decoder) -> usize {
    let per_row = decoder.spec.vocab * decoder.spec.hidden;
    match decoder.device() {
        Device::Cpu => (HEAD_PRODUCTS / per_row).clamp(64, 512) as usize,
        _ => 2048,
    }
}

/// Label rows of a slice.
pub struct Labels {
    pub rows: Tensor,
    pub tokens: Vec<u32>,
    pub weights: Vec<f32>,
}

impl Labels {
    pub fn of(labels: &[Label], device: Device) -> Labels {
        let rows: Vec<i64> = labels.iter().map(|&(row, _, _)| row).collect();
        Labels {
            rows: Tensor::from_slice(&rows).to_device(device),
            tokens: labels.iter().map(|&(_, token, _)| token).collect(),
            weights: labels.iter().map(|&(_, _, weight)| weight).collect(),
        }
    }

    /// What the head multiplies `[R, H]`.
    pub fn normed(&self, hidden: &Tensor, decoder: &Decoder) -> Tensor {
        decoder.final_norm(&hidden.index_select(0, &self.rows))
    }
}
