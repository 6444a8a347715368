//! Experts out of tensors that hold all of a layer's: dense ones `[experts, inputs, outputs]` as gpt-oss multiplies with them,
//! quantised ones `[experts, outputs, inputs]` as it is published. Source: transformers 5.23 models/gpt_oss and
//! integrations/mxfp4.py.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use crate::family::Among;
use crate::weights::{Checkpoint, LoadError, Matrix};

pub(super) struct ExpertTensors<'a> {
    checkpoint: &'a Checkpoint,
    /// Quantised tensors are unpacked whole: those of the layer that is being read.
    unpacked: RefCell<VecDeque<(String, Rc<Matrix>)>>,
}

/// Tensors of a layer's experts.
const OF_A_LAYER: usize = 2;

impl<'a> ExpertTensors<'a> {
    pub fn new(checkpoint: &'a Checkpoint) -> ExpertTensors<'a> {
        ExpertTensors {
            checkpoint,
            unpacked: RefCell::default(),
        }
    }

    /// Some rows and columns of what an expert's part is, `shape` as a whole: a matrix, or a vector as numbers.
    pub fn matrix(
        &self,
        name: &str,
        shape: &[i64],
        among: &Among,
        rows: Range<i64>,
        columns: Range<i64>,
    ) -> Result<Matrix, LoadError> {
        let Among {
            expert,
            experts,
            outputs,
            first,
            step,
            ..
        } = *among;
        let of_expert = match *shape {
            [_] => {
                let stored = [experts, outputs];
                let row = self
                    .checkpoint
                    .part(name, &stored, expert..expert + 1, 0..outputs)?;
                Matrix::Dense(row.view([-1]))
            }
            [_, inputs] if self.checkpoint.is_quantised(name) => {
                let all = self.unpacked(name, &[experts, outputs, inputs])?;
                all.every(expert * outputs, 1, outputs)
            }
            [_, inputs] => {
                let (stored, numbers) = ([experts, inputs, outputs], inputs * outputs);
                let one = self
                    .checkpoint
                    .part(name, &stored, expert..expert + 1, 0..numbers)?;
                Matrix::Dense(one.view([inputs, outputs]).tr())
            }
            _ => unreachable!("an expert's parameter is a matrix or a vector"),
        };
        let part = of_expert.every(first + rows.start * step, step, rows.end - rows.start);
        Ok(match shape.len() {
            1 => part,
            _ => part.columns(columns),
        })
    }

    fn unpacked(&self, name: &str, shape: &[i64]) -> Result<Rc<Matrix>, LoadError> {
        let mut unpacked = self.unpacked.borrow_mut();
        if let Some((_, whole)) = unpacked.iter().find(|(of, _)| of == name) {
            return Ok(Rc::clone(whole));
        }
        if unpacked.len() == OF_A_LAYER {
            unpacked.pop_front();
        }
        let rows = shape[0] * shape[1];
        let whole = Rc::new(self.checkpoint.matrix(name, shape, 0..rows, 0..shape[2])?);
        unpacked.push_back((name.to_owned(), Rc::clone(&whole)));
        Ok(whole)
    }
}
