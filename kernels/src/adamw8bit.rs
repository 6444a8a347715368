//! AdamW whose moments are stored in 8 bits, blocks of 256 with a scale each (Dettmers et al., arXiv 2110.02861): the numbers,
//! the codes and the rounding of bitsandbytes' AdamW8bit on a CPU. A step is AdamW's own on moments that are unpacked for it.

use std::sync::LazyLock;

use tch::Tensor;

use crate::adamw::{AdamW, update};
use crate::flat::{Flat, PIECE, plain};
use crate::pool;

/// Numbers of a scale.
pub const BLOCK: usize = 256;
/// A parameter of fewer numbers keeps moments of 32 bits.
pub const LEAST: i64 = 4096;

/// Of one parameter: codes [N] of 8 bits, and a scale for each block, float32. All zero at the start.
pub struct Moment<'a> {
    pub codes: &'a Tensor,
    pub scales: &'a Tensor,
}

/// What 256 codes stand for, from the least to the greatest.
struct Map([f32; 256]);

static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(true));
static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(false));

/// One step of one parameter, the `step`-th from 1, in place.
pub fn step(adamw: &AdamW, params: &Tensor, grads: &Tensor, m: &Moment, v: &Moment, lr: f64, step: u64) {
    let coefficients = adamw.coefficients(lr, step);
    let (params, grads): (Flat<f32>, Flat<f32>) = (plain(params), plain(grads));
    let moments = [m, v].map(|moment| (plain::<u8>(moment.codes), plain::<f32>(moment.scales)));
    let n = params.len;
    for (codes, scales) in moments {
        assert!(
            grads.len == n && codes.len == n && scales.len == n.div_ceil(BLOCK),
            "a parameter of {n} has {} gradients, {} codes and {} scales",
            grads.len,
            codes.len,
            scales.len
        );
    }
    pool::for_each(params.pieces(), |piece| {
        const { assert!(PIECE.is_multiple_of(BLOCK)) };
        for start in params.range(piece).step_by(BLOCK) {
            let range = start..n.min(start + BLOCK);
            // SAFETY: blocks are disjoint, and nobody else touches the tensors meanwhile.
            let block = unsafe {
                let moments = moments.map(|(codes, scales)| {
                    let block = start / BLOCK..start / BLOCK + 1;
                    (codes.part_mut(range.clone()), &mut scales.part_mut(block)[0])
                });
                (params.part_mut(range.clone()), grads.part(range), moments)
            };
            let (params, grads, [(m_codes, m_scale), (v_codes, v_scale)]) = block;
            let mut m = [0.0; BLOCK];
            let mut v = [0.0; BLOCK];
            let (m, v) = (&mut m[..params.len()], &mut v[..params.len()]);
            SIGNED.unpack(m_codes, *m_scale, m);
            UNSIGNED.unpack(v_codes, *v_scale, v);
            update(params, grads, m, v, coefficients);
            *m_scale = SIGNED.pack(m, m_codes);
            *v_scale = UNSIGNED.pack(v, v_codes);
        }
    });
}

impl Map {
    /// The dynamic tree: seven decades below 1, each half as finely divided as the next greater one; 0 and 1 themselves.
    fn new(is_signed: bool) -> Map {
        let mut values = vec![0.0, 1.0];
        for decade in 0..7i32 {
            let n = 1 << if is_signed { decade } else { decade + 1 };
            let edge = |i: i32| 0.1 + 0.9 * f64::from(i) / f64::from(n);
            for i in 0..n {
                let value = ((edge(i) + edge(i + 1)) / 2.0 * 10f64.powi(decade - 6)) as f32;
                values.push(value);
                if is_signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        Map(values.try_into().expect("there are 256"))
    }

    /// Of the nearest value.
    fn code(&self, x: f32) -> u8 {
        let above = self.0.partition_point(|&value| value <= x);
        let Some(below) = above.checked_sub(1) else {
            return 0;
        };
        let is_nearer = self
            .0
            .get(above)
            .is_some_and(|above| above - x < x - self.0[below]);
        (below + usize::from(is_nearer)) as u8
    }

    fn unpack(&self, codes: &[u8], scale: f32, values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = self.0[usize::from(*code)] * scale;
        }
    }

    /// The scale.
    fn pack(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let scale = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (code, value) in codes.iter_mut().zip(values) {
            *code = self.code(value * factor);
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// The largest number is its scale, others are off by at most half a step of their decade.
    #[test]
    fn numbers_come_back() {
        for (map, is_signed) in [(&SIGNED, true), (&UNSIGNED, false)] {
            let numbers = Tensor::randn([256], (Kind::Float, Device::Cpu)) * 1e-3;
            let numbers = if is_signed { numbers } else { numbers.square() };
            let numbers = Vec::<f32>::try_from(numbers).expect("floats");
            let (mut codes, mut back) = ([0; 256], [0.0; 256]);
            let scale = map.pack(&numbers, &mut codes);
            map.unpack(&codes, scale, &mut back);
            let step = if is_signed { 0.9 / 64.0 } else { 0.9 / 128.0 };
            for (number, back) in numbers.iter().zip(back) {
                assert!(
                    (number - back).abs() <= 0.51 * step * scale,
                    "{number} came back as {back}"
                );
            }
            assert_eq!(map.pack(&[0.0; 256], &mut codes), 0.0);
            assert_eq!(map.0[usize::from(codes[7])], 0.0);
        }
    }

    /// Twenty steps are those of float32 moments, within what 8 bits leave of them; a block's numbers are its own.
    #[test]
    fn it_is_nearly_adamw() {
        let adamw = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        };
        let n = 70_001;
        let start = Tensor::randn([n], (Kind::Float, Device::Cpu));
        let (exact, m, v) = (start.copy(), start.zeros_like(), start.zeros_like());
        let eight = start.copy();
        let codes = [(); 2].map(|()| Tensor::zeros([n], (Kind::Uint8, Device::Cpu)));
        let blocks = (n as u64).div_ceil(BLOCK as u64) as i64;
        let scales = [(); 2].map(|()| Tensor::zeros([blocks], (Kind::Float, Device::Cpu)));
        let [of_m, of_v] = [0, 1].map(|i| Moment {
            codes: &codes[i],
            scales: &scales[i],
        });
        for number in 1..=20 {
            let grads = start.randn_like() + 0.5;
            adamw.step(&exact, &grads, &m, &v, 1e-2, number);
            step(&adamw, &eight, &grads, &of_m, &of_v, 1e-2, number);
        }
        let moved = (&exact - &start).abs().mean(Kind::Float).double_value(&[]);
        let far = (exact - eight).abs().mean(Kind::Float).double_value(&[]);
        assert!(moved > 0.01 && far < 0.05 * moved, "{far} of {moved}");
    }
}
