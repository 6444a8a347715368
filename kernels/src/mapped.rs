//! A read-only memory-mapped file, and tensors read out of it.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use tch::{Kind, Tensor};

use crate::KernelError;

pub struct MappedFile {
    map: Mmap,
}

impl MappedFile {
    pub fn open(path: &Path) -> std::io::Result<MappedFile> {
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
}
