//! What tokens weigh. A mass is an integer, in units of 2^-44, and comes from a float32 exp whose every operation is rounded
//! by itself: sums have no order, so a draw is the same on every device (`kernels/gpu/logits.cu` has the same arithmetic).

/// The mass of the weight 1. A vocabulary of 2^20 tokens of it fits a `u64`.
pub(super) const ONE: f64 = (1u64 << 44) as f64;
/// The weight of mass 1. What weighs less is never drawn.
pub(super) const LIGHTEST: f32 = 1.0 / (1u64 << 44) as f32;
/// 1.5 * 2^23: adding it rounds to an integer.
const MAGIC: f32 = 12_582_912.0;

/// Of a weight from 0 to 1, rounded.
pub(super) fn mass(weight: f32) -> u64 {
    joined(halves(weight), 1)
}

/// Sum of the masses of `weight` over all values.
pub(super) fn total(values: &[f32], weight: impl Fn(f32) -> f32) -> u64 {
    // So few that no half overflows.
    let run = |run: &[f32]| {
        // Independent sums, so that the compiler vectorises them.
        let (mut high, mut low) = ([0u32; 16], [0u32; 16]);
        for values in run.chunks(high.len()) {
            for ((high, low), &value) in high.iter_mut().zip(&mut low).zip(values) {
                let halves = halves(weight(value));
                *high = high.wrapping_add(halves.0);
                *low = low.wrapping_add(halves.1);
            }
        }
        let sum = |lanes: [u32; 16]| lanes.into_iter().fold(0, u32::wrapping_add);
        joined((sum(high), sum(low)), run.len())
    };
    values.chunks(256).map(run).sum()
}

/// In units of 2^-22 and 2^-44, each beside the bits of [`MAGIC`].
fn halves(weight: f32) -> (u32, u32) {
    const SCALE: f32 = (1 << 22) as f32;
    let scaled = weight * SCALE;
    let high = scaled + MAGIC;
    let low = (scaled - (high - MAGIC)) * SCALE + MAGIC;
    (high.to_bits(), low.to_bits())
}

/// The sum of `n` masses by their halves. The lower ones have signs.
fn joined((high, low): (u32, u32), n: usize) -> u64 {
    let integer = |bits: u32| bits.wrapping_sub(MAGIC.to_bits().wrapping_mul(n as u32)) as i32;
    ((i64::from(integer(high)) << 22) + i64::from(integer(low))) as u64
}

/// The part of a mass that is `fraction` in units of 2^-64.
pub(super) fn part(fraction: u64, of: u64) -> u64 {
    ((u128::from(fraction) * u128::from(of)) >> 64) as u64
}

/// exp for `x <= 0`, relative error below 3e-7; 0 below -87. Free of branches and calls, so the compiler vectorises it
/// (libm's is 5 times slower over a vocabulary).
pub(super) fn exp(x: f32) -> f32 {
    let rounded = x.max(-87.0) * std::f32::consts::LOG2_E + MAGIC;
    let n = rounded - MAGIC;
    let r = (x.max(-87.0) - n * 0.693_359_4) + n * 2.121_944_4e-4; // ln 2 in two parts
    // Cephes expf
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exp() {
        for i in 0..200_000 {
            let x = -f64::from(i) * 5e-4;
            let (ours, exact) = (f64::from(exp(x as f32)), f64::from(x as f32).exp());
            assert!(
                (ours - exact).abs() <= 3e-7 * exact + 1e-37,
                "exp({x}) = {ours}, not {exact}"
            );
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY)), (1.0, 0.0));
    }

    #[test]
    fn a_mass_is_its_weight_rounded() {
        let weights: Vec<f32> = (0..5000).map(|i| exp(i as f32 * -0.007)).collect();
        let exact = weights
            .iter()
            .map(|&weight| (f64::from(weight) * ONE).round_ties_even() as u64);
        for (&weight, exact) in weights.iter().zip(exact.clone()) {
            assert_eq!(mass(weight), exact, "{weight}");
        }
        assert_eq!(total(&weights, |weight| weight), exact.sum::<u64>());
        assert_eq!((mass(0.0), mass(LIGHTEST), mass(1.0)), (0, 1, ONE as u64));
        assert_eq!(total(&[1.0; 1 << 18], |weight| weight), 1 << 62);
    }
}
