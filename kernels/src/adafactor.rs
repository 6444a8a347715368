//! Adafactor (Shazeer and Stern, arXiv 1804.04235): of a matrix the second moments are kept as the means of its rows and its
//! columns alone. The arithmetic of transformers' Adafactor with `relative_step=False` and no first moment.

use tch::{Kind, Tensor};

use crate::adamw::sum_of_squares;
use crate::flat::plain;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// The rate is a part of the parameter's own root mean square.
    pub scale_parameter: bool,
    pub weight_decay: f64,
}

/// transformers' eps: added to squares, and the least root mean square of a parameter that scales.
const EPSILON: f32 = 1e-30;
const LEAST_SCALE: f64 = 1e-3;
/// Of an update's root mean square at most.
const CLIP: f64 = 1.0;
const DECAY: f64 = -0.8;

/// Of one parameter.
pub enum Squares<'a> {
    /// Means of the squares of its rows [R] and of its columns [C].
    OfMatrix { rows: &'a Tensor, columns: &'a Tensor },
    /// Of each number.
    Each(&'a Tensor),
}

impl Adafactor {
    /// One step of one parameter, the `step`-th from 1, in place: float32 on the CPU, a matrix [R, C] row after row.
    pub fn step(&self, params: &Tensor, grads: &Tensor, squares: &Squares, lr: f64, step: u64) {
        // SAFETY: the caller's tensors are borrowed, and each is another one.
        let (params, grads) = unsafe {
            let (params, grads) = (plain::<f32>(params), plain::<f32>(grads));
            (params.part_mut(0..params.len), grads.part(0..grads.len))
        };
        assert_eq!(params.len(), grads.len(), "numbers and gradients");
        let kept = 1.0 - (step as f64).powf(DECAY);
        let mut update = vec![0.0f32; grads.len()];
        match squares {
            Squares::OfMatrix { rows, columns } => {
                let (rows, columns) = (plain::<f32>(rows), plain::<f32>(columns));
                assert_eq!(rows.len * columns.len, grads.len(), "rows times columns");
                // SAFETY: as above.
                let (rows, columns) =
                    unsafe { (rows.part_mut(0..rows.len), columns.part_mut(0..columns.len)) };
                add_means(grads, rows, columns, kept);
                let mean = rows.iter().map(|&row| f64::from(row)).sum::<f64>() / rows.len() as f64;
                let of_columns: Vec<f32> = columns.iter().map(|column| column.sqrt().recip()).collect();
                let lines = update.chunks_mut(columns.len()).zip(grads.chunks(columns.len()));
                for ((update, grads), row) in lines.zip(rows) {
                    let of_row = ((f64::from(*row) / mean) as f32).sqrt().recip();
                    for ((update, grad), of_column) in update.iter_mut().zip(grads).zip(&of_columns) {
                        *update = of_row * of_column * grad;
                    }
                }
            }
            Squares::Each(squares) => {
                let squares = plain::<f32>(squares);
                // SAFETY: as above.
                let squares = unsafe { squares.part_mut(0..squares.len) };
                assert_eq!(squares.len(), grads.len(), "squares and gradients");
                for ((update, grad), square) in update.iter_mut().zip(grads).zip(squares) {
                    *square = *square * kept as f32 + (grad * grad + EPSILON) * (1.0 - kept) as f32;
                    *update = square.sqrt().recip() * grad;
                }
            }
        }
        let lr = match self.scale_parameter {
            true => lr * root_mean_square(params).max(LEAST_SCALE),
            false => lr,
        };
        let factor = (lr / (root_mean_square(&update) / CLIP).max(1.0)) as f32;
        let decay = (1.0 - lr * self.weight_decay) as f32;
        for (param, update) in params.iter_mut().zip(update) {
            *param = *param * decay - update * factor;
        }
    }

    /// [`Adafactor::step`] of a matrix in plain tch.
    pub fn step_reference(
        &self,
        params: &Tensor,
        grads: &Tensor,
        rows: &Tensor,
        columns: &Tensor,
        lr: f64,
        step: u64,
    ) {
        let rms = |x: &Tensor| x.square().mean(Kind::Float).sqrt().double_value(&[]);
        let lr = match self.scale_parameter {
            true => lr * rms(params).max(LEAST_SCALE),
            false => lr,
        };
        let kept = 1.0 - (step as f64).powf(DECAY);
        let squares = grads.square() + f64::from(EPSILON);
        for (mean, dim) in [(rows, -1i64), (columns, -2)] {
            let new = squares.mean_dim(dim, false, Kind::Float);
            mean.shallow_clone().copy_(&(mean * kept + new * (1.0 - kept)));
        }
        let of_rows = (rows / rows.mean(Kind::Float)).rsqrt().unsqueeze(-1);
        let update = of_rows * columns.rsqrt().unsqueeze(0) * grads;
        let update = &update / (rms(&update) / CLIP).max(1.0);
        let stepped = params * (1.0 - lr * self.weight_decay) - update * lr;
        params.shallow_clone().copy_(&stepped);
    }
}

/// Takes the means of the squares of rows and columns in.
fn add_means(grads: &[f32], rows: &mut [f32], columns: &mut [f32], kept: f64) {
    let (n_rows, n_columns) = (rows.len(), columns.len());
    let mut of_columns = vec![0.0f64; n_columns];
    let blend =
        |old: f32, new: f64| (f64::from(old) * kept + (new + f64::from(EPSILON)) * (1.0 - kept)) as f32;
    for (row, grads) in rows.iter_mut().zip(grads.chunks(n_columns)) {
        *row = blend(*row, sum_of_squares(grads) / n_columns as f64);
        for (sum, grad) in of_columns.iter_mut().zip(grads) {
            *sum += f64::from(*grad) * f64::from(*grad);
        }
    }
    for (column, sum) in columns.iter_mut().zip(of_columns) {
        *column = blend(*column, sum / n_rows as f64);
    }
}

/// In a fixed order, whatever the threads.
fn root_mean_square(x: &[f32]) -> f64 {
    (sum_of_squares(x) / x.len().max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn it_is_the_reference() {
        const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
        for scale_parameter in [false, true] {
            let adafactor = Adafactor {
                scale_parameter,
                weight_decay: 0.1,
            };
            let start = Tensor::randn([48, 130], FLOAT);
            let means = || (Tensor::zeros([48], FLOAT), Tensor::zeros([130], FLOAT));
            let (fast, (rows, columns)) = (start.copy(), means());
            let (reference, (of_rows, of_columns)) = (start.copy(), means());
            for step in 1..=5 {
                let grads = start.randn_like() * 10f64.powi(step);
                let squares = Squares::OfMatrix {
                    rows: &rows,
                    columns: &columns,
                };
                adafactor.step(&fast, &grads, &squares, 0.05, step as u64);
                adafactor.step_reference(&reference, &grads, &of_rows, &of_columns, 0.05, step as u64);
            }
            let worst = (fast - reference).abs().max().double_value(&[]);
            assert!(worst < 5e-6, "{worst}");
        }
    }
}
