//! The lookup of rows of a table on a GPU by the kernels of `gpu/embedding.cu`.

use tch::{Kind, Tensor};

use super::rows::{Matrix, THREADS};
use super::told::told;
use super::{Gpu, int};

/// Rows `ids` of `table` `[V, H]`, bfloat16 or float32, in float32.
pub(crate) fn gather(gpu: Gpu, table: &Tensor, ids: &[u32]) -> Tensor {
    let kernel = match table.kind() {
        Kind::BFloat16 => "embed",
        Kind::Float => "embed_f32",
        other => panic!("a table of {other:?}"),
    };
    let table = table.contiguous();
    let ids = told(
        ids.iter().map(|&id| i64::from(id)).collect(),
        Kind::Int,
        table.device(),
    );
    let &[rows, width] = table.size().as_slice() else {
        panic!("a table of two dimensions, not {:?}", table.size())
    };
    let out = Matrix::new(ids.numel(), width as usize, &table);
    let args = [
        (&table).into(),
        (&ids).into(),
        (&out).into(),
        int(0),
        int(rows),
        int(width),
        1.0f32.into(),
    ];
    gpu.launch(kernel, out.grid(), THREADS, &args);
    out.into_tensor()
}
