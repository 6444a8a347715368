//! A matrix as kernels read it: rows whose numbers lie side by side, the rows a fixed distance apart.

use tch::{Kind, Tensor};

use super::{Arg, int};

/// Threads of a block of the kernels on rows.
pub(crate) const THREADS: u32 = 256;
/// Columns that a block of an element-wise kernel takes.
const COLUMNS: usize = 2048;

pub(crate) struct Matrix {
    tensor: Tensor,
    pub rows: usize,
    pub width: usize,
}

impl Matrix {
    /// Copies what does not lie so.
    pub fn of(x: &Tensor) -> Matrix {
        let [rows, width] = x.size()[..] else {
            panic!("not a matrix: {:?}", x.size())
        };
        let tensor = match x.stride()[1] {
            1 => x.shallow_clone(),
            _ => x.contiguous(),
        };
        Matrix {
            tensor,
            rows: rows as usize,
            width: width as usize,
        }
    }

    /// One to be written, float32 on the device of `beside`.
    pub fn new(rows: usize, width: usize, beside: &Tensor) -> Matrix {
        Matrix::of(&Tensor::empty(
            [rows as i64, width as i64],
            (Kind::Float, beside.device()),
        ))
    }

    /// One of its shape to be written.
    pub fn like(&self) -> Matrix {
        Matrix::new(self.rows, self.width, &self.tensor)
    }

    /// The grid of an element-wise kernel.
    pub fn grid(&self) -> [usize; 3] {
        [self.rows, self.width.div_ceil(COLUMNS), 1]
    }

    /// Numbers from one row to the next.
    pub fn stride(&self) -> Arg<'static> {
        int(self.tensor.stride()[0])
    }

    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }
}

impl<'a> From<&'a Matrix> for Arg<'a> {
    fn from(matrix: &'a Matrix) -> Arg<'a> {
        Arg::Tensor(&matrix.tensor)
    }
}
