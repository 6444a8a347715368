//! NEFTune (Jain et al., arXiv 2310.05914): in training, a row's embeddings get uniform noise of at most
//! alpha / sqrt(tokens x width), as transformers' integrations/neftune.py adds it to what the embedding layer gives. A
//! function of seed, step and place, so that a job that goes on draws what it would have drawn. Not here: when there is none
//! (validation, whatever is not supervised).

use tandem_core::rng;
use tch::Tensor;

use super::slice::Slice;

/// Keeps these draws apart from those of initialisation, shuffling and dropout; each step has its own.
const STREAM: u64 = 0x4ef7_0000_0000;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noise {
    pub alpha: f64,
    pub seed: u64,
    /// Optimizer steps done.
    pub step: u64,
}

impl Noise {
    /// On `embedded [T, H]`, the rows of `slice`, before which the step had `rows_before`.
    pub fn add(&self, embedded: Tensor, slice: &Slice, rows_before: u64) -> Tensor {
        let width = embedded.size()[1] as usize;
        let mut noise = vec![0f32; slice.tokens.len() * width];
        for ends in slice.cu_seqlens.windows(2) {
            // The last token of a row is no input, but one of its tokens.
            let tokens = ends[1] - ends[0] + 1;
            let most = self.alpha / ((tokens * width) as f64).sqrt();
            let first = ends[0] * width;
            let row = &mut noise[first..ends[1] * width];
            for (i, noise) in row.iter_mut().enumerate() {
                let counter = rows_before * width as u64 + (first + i) as u64;
                let draw = rng::uniform(self.seed, STREAM + self.step, counter);
                *noise = ((2.0 * draw - 1.0) * most) as f32;
            }
        }
        let noise = Tensor::from_slice(&noise).view([-1, width as i64]);
        &embedded + noise.to_device(embedded.device())
    }
}
