//! Codes of a few bits out of bytes.

use tch::Tensor;

/// `[.., bytes]` uint8 -> `[.., bytes * 8 / bits]` uint8, the lowest bits of each byte first.
pub(super) fn unpack(bytes: &Tensor, bits: i64) -> Tensor {
    if bits == 8 {
        return bytes.shallow_clone();
    }
    let codes: Vec<Tensor> = (0..8 / bits)
        .map(|i| {
            bytes
                .bitwise_right_shift_tensor_scalar(i * bits)
                .bitwise_and((1 << bits) - 1)
        })
        .collect();
    let last = bytes.size().len() as i64;
    Tensor::stack(&codes, last).flatten(last - 1, last)
}
