//! Results as plain slices, for readers outside this crate (the sampler). No arithmetic.

use tch::{Device, Kind, Tensor};

use crate::slice::Rows;

/// Calls `read` with the rows of `tensor [S, V]`. A tensor on another device, or not of contiguous float32 rows, is
/// copied first.
pub fn with_rows<T>(tensor: &Tensor, read: impl FnOnce(&[&[f32]]) -> T) -> T {
    let copied;
    let rows = match Rows::of(tensor) {
        Some(rows) => rows,
        None => {
            copied = tensor.to_device(Device::Cpu).to_kind(Kind::Float).contiguous();
            Rows::of(&copied).expect("a contiguous float32 CPU matrix has rows")
        }
    };
    let rows: Vec<&[f32]> = (0..rows.rows).map(|row| rows.row(row)).collect();
    read(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_the_numbers_of_any_layout() {
        let plain = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let half = plain.to_kind(Kind::BFloat16);
        let turned = plain.tr().contiguous().tr();
        for tensor in [&plain, &half, &turned] {
            with_rows(tensor, |rows| {
                assert_eq!(rows, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
            });
        }
    }
}
