//! A matrix as a checkpoint holds it, and the weight that is made of it: the one interface between formats of files and the
//! kernels.
//!
//! A reader of a format answers [`Checkpoint::matrix`] for a name either with numbers in bfloat16, float16 or float32, or
//! with codes, scales and offsets ([`Quantised`]) where these stand for exactly what the file means. Its codes are then kept
//! in their bits, cut for ranks, put into fused products and multiplied without the reader's knowledge; so a new format is
//! its grid of levels (`Grid`: integers of 4 or 8 bits cover most), and a function from bytes to those tensors. What has no
//! such form (groups that do not lie along K, for example) is answered with its numbers in float32.

use std::ops::Range;

use tandem_kernels::weight::{Precision, Quantised, Recipe, Weight};
use tch::{Device, Tensor};

use super::{Checkpoint, LoadError};

#[derive(Debug)]
pub enum Matrix {
    /// Of any floating dtype.
    Dense(Tensor),
    Quantised(Quantised),
}

impl Checkpoint {
    /// Is it stored in codes?
    pub fn is_quantised(&self, name: &str) -> bool {
        let quantised = self.quantised.as_ref();
        quantised.is_some_and(|quantised| quantised.parts_of(name).is_some())
    }

    /// Some rows and columns of a matrix (or rows of a vector, as numbers) whose whole shape is `shape`.
    pub fn matrix(
        &self,
        name: &str,
        shape: &[i64],
        rows: Range<i64>,
        columns: Range<i64>,
    ) -> Result<Matrix, LoadError> {
        let whole = self
            .quantised
            .as_ref()
            .and_then(|quantised| quantised.read(self, name, shape));
        if let Some(held) = self.gguf_rows(name, shape, rows.clone())? {
            return Ok(Matrix::Quantised(held).columns(columns));
        }
        match whole {
            None => Ok(Matrix::Dense(self.part(name, shape, rows, columns)?)),
            Some(whole) => Ok(whole?.rows(rows).columns(columns)),
        }
    }
}

impl Matrix {
    /// Matrices over the same inputs one under the other. Formats that cannot stand in one weight become numbers.
    pub fn stack(mut parts: Vec<Matrix>) -> Matrix {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        let quantised: Option<Vec<&Quantised>> = parts.iter().map(Matrix::quantised).collect();
        match quantised.and_then(|parts| Quantised::cat(&parts)) {
            Some(whole) => Matrix::Quantised(whole),
            None => {
                let parts: Vec<Tensor> = parts.into_iter().map(Matrix::dense).collect();
                Matrix::Dense(Tensor::cat(&parts, 0))
            }
        }
    }

    fn quantised(&self) -> Option<&Quantised> {
        match self {
            Matrix::Dense(_) => None,
            Matrix::Quantised(quantised) => Some(quantised),
        }
    }

    /// As `recipe` makes it of numbers; what is quantised stays as it is.
    pub fn quantise(self, recipe: Recipe) -> Result<Matrix, LoadError> {
        Ok(match self {
            Matrix::Dense(numbers) => Matrix::Quantised(recipe.quantise(&numbers)?),
            quantised => quantised,
        })
    }

    /// Some of the rows.
    pub fn rows(self, rows: Range<i64>) -> Matrix {
        match self {
            Matrix::Dense(numbers) => Matrix::Dense(numbers.narrow(0, rows.start, rows.end - rows.start)),
            Matrix::Quantised(whole) => Matrix::Quantised(whole.rows(rows)),
        }
    }

    /// Every `step`-th row from `first` on, `count` of them.
    pub fn every(&self, first: i64, step: i64, count: i64) -> Matrix {
        let of = |tensor: &Tensor| tensor.slice(0, first, first + (count - 1) * step + 1, step);
        match self {
            Matrix::Dense(numbers) => Matrix::Dense(of(numbers)),
            Matrix::Quantised(whole) => Matrix::Quantised(Quantised {
                codes: of(&whole.codes),
                scales: of(&whole.scales),
                offsets: whole.offsets.as_ref().map(of),
                ..*whole
            }),
        }
    }

    /// Some of the columns.
    pub fn columns(self, columns: Range<i64>) -> Matrix {
        let narrow = |numbers: Tensor| numbers.narrow(1, columns.start, columns.end - columns.start);
        match self {
            Matrix::Dense(numbers) => Matrix::Dense(narrow(numbers)),
            Matrix::Quantised(whole) => match whole.columns(columns.clone()) {
                Some(part) => Matrix::Quantised(part),
                None => Matrix::Dense(narrow(whole.dense())),
            },
        }
    }

    pub fn weight(self, precision: Precision, device: Device) -> Result<Weight, LoadError> {
        Ok(match self {
            Matrix::Dense(numbers) => Weight::new(&numbers, precision, device)?,
            Matrix::Quantised(quantised) => Weight::quantised(&quantised, precision, device)?,
        })
    }

    /// Its numbers.
    pub fn dense(self) -> Tensor {
        match self {
            Matrix::Dense(numbers) => numbers,
            Matrix::Quantised(quantised) => quantised.dense(),
        }
    }
}
