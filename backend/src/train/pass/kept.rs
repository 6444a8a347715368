//! What a pass keeps of each sublayer for its backward: all activations where there is room, else some inputs, from which layers
//! run again.

use tch::Tensor;

use crate::model::{Decoder, Saved, TrainPass};

/// Activations of the slices that are on their way that may be kept for their backward; beyond, layers run again in the
/// backward.
pub const KEEP_BYTES: i64 = 2 << 30;

/// Of the sublayers that a pass went through forward, and not yet backward.
#[derive(Default)]
pub(super) struct KeptSublayers(Vec<Kept>);

/// What the backward of a sublayer starts from.
enum Kept {
    All(Box<Saved>),
    /// Only its input: its forward runs again.
    Input(Tensor),
    /// Nothing: the one before it runs again, and is kept then.
    Nothing,
}

impl KeptSublayers {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The next sublayer forward: from its input to its output, `[T, H]`.
    pub fn forward(&mut self, decoder: &Decoder, input: Tensor, pass: &TrainPass, keeps_all: bool) -> Tensor {
        let i = self.0.len();
        let (output, saved) = decoder.sublayer_saving(i, input.shallow_clone(), pass);
        self.0.push(match keeps_all {
            true => Kept::All(Box::new(saved)),
            false if i.is_multiple_of(2) => Kept::Input(input),
            false => Kept::Nothing,
        });
        output
    }

    /// The last sublayer backward: from the gradient of its output to that of its input. Returned as it came when there is none.
    pub fn backward(
        &mut self,
        decoder: &Decoder,
        dhidden: Tensor,
        pass: &TrainPass,
    ) -> Result<Tensor, Tensor> {
        let Some(last) = self.0.pop() else {
            return Err(dhidden);
        };
        let i = self.0.len();
        let saved = match last {
            Kept::All(saved) => *saved,
            Kept::Input(input) => decoder.sublayer_saving(i, input, pass).1,
            Kept::Nothing => {
                let Some(Kept::Input(input)) = self.0.pop() else {
                    unreachable!("every other sublayer kept its input")
                };
                let (middle, before) = decoder.sublayer_saving(i - 1, input, pass);
                self.0.push(Kept::All(Box::new(before)));
                decoder.sublayer_saving(i, middle, pass).1
            }
        };
        Ok(decoder.sublayer_backward(i, saved, dhidden, pass))
    }
}

/// Whether a pass of so many rows keeps all activations.
pub(super) fn keeps_all(rows: usize, decoder: &Decoder, keep_bytes: i64) -> bool {
    activation_bytes(rows, decoder) <= keep_bytes
}

/// The bytes that passes of up to `rows` may keep, such that all of them keep their activations or none does.
pub fn all_or_nothing(rows: usize, decoder: &Decoder) -> i64 {
    match keeps_all(rows, decoder, KEEP_BYTES) {
        true => i64::MAX,
        false => 0,
    }
}

/// Activations are float32.
fn activation_bytes(rows: usize, decoder: &Decoder) -> i64 {
    4 * (decoder.saved_numbers() * rows) as i64
}
