//! A read-only memory-mapped file, and tensors read out of it.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::{Advice, Mmap};
use tch::{Kind, Tensor};

use crate::KernelError;

/// Rows and columns of a matrix.
pub struct Block {
    pub rows: Range<usize>,
    pub columns: Range<usize>,
}

pub struct MappedFile {
    map: Mmap,
}

impl MappedFile {
    pub fn open(path: &Path) -> std::io::Result<MappedFile> {
        // Opening a pipe would wait for who writes it.
        if !std::fs::metadata(path)?.is_file() {
            return Err(std::io::Error::other("it is not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the map is read-only and private to this process; like every program that maps a model we rely on
        // the operator not truncating the file underneath (that would be a SIGBUS, not silent damage).
        Ok(MappedFile {
            map: unsafe { Mmap::map(&file)? },
        })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Has the operating system begin to read the whole file. Only time is lost where it does not.
    pub fn read_ahead(&self) {
        let _ = self.map.advise(Advice::WillNeed);
    }

    /// `range` of the file as a CPU tensor. One copy: every weight is packed into another layout right after, and a
    /// tensor that owns its bytes cannot outlive the map by mistake.
    pub fn tensor(&self, range: Range<usize>, kind: Kind, shape: &[i64]) -> Result<Tensor, KernelError> {
        let bytes = &self.map[range];
        let elements: i64 = shape.iter().product();
        if bytes.len() as i64 != elements * kind.elt_size_in_bytes() as i64 {
            return Err(KernelError::Shape(format!(
                "{} bytes cannot be {shape:?} of {kind:?}",
                bytes.len()
            )));
        }
        Ok(Tensor::f_from_data_size(bytes, shape, kind)?)
    }

    /// A block of the matrix `[.., width]` that begins at byte `start`, as a CPU tensor `[rows, columns]`: no other bytes
    /// of the file are read.
    pub fn block(&self, start: usize, kind: Kind, width: usize, block: Block) -> Result<Tensor, KernelError> {
        let Block { rows, columns } = block;
        let bytes = kind.elt_size_in_bytes();
        let size = [rows.len() as i64, columns.len() as i64];
        let at = |row: usize, column: usize| start + (row * width + column) * bytes;
        if columns == (0..width) {
            return self.tensor(at(rows.start, 0)..at(rows.end, 0), kind, &size);
        }
        let mut picked = Vec::with_capacity(rows.len() * columns.len() * bytes);
        for row in rows {
            picked.extend_from_slice(&self.map[at(row, columns.start)..at(row, columns.end)]);
        }
        Ok(Tensor::f_from_data_size(&picked, &size, kind)?)
    }
}
