//! Counter-based random numbers: a value depends on a seed and where it is used, never on what was drawn before. So
//! a preempted request, a resumed job or another batch draws the same. Not for secrets.

/// SplitMix64's finaliser (Steele, Lea, Flood 2014): 64 well-mixed bits of `z`.
fn finalise(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 64 random bits of draw `counter` in stream `stream` of `seed`.
pub fn bits(seed: u64, stream: u64, counter: u64) -> u64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let key = finalise(finalise(seed.wrapping_add(GOLDEN)) ^ stream.wrapping_mul(GOLDEN));
    finalise(key.wrapping_add(counter.wrapping_mul(GOLDEN)))
}

/// Uniform in [0, 1), 53 bits.
pub fn uniform(seed: u64, stream: u64, counter: u64) -> f64 {
    (bits(seed, stream, counter) >> 11) as f64 / (1u64 << 53) as f64
}

/// Standard normal (Box-Muller; two draws of the stream's doubled counter).
pub fn normal(seed: u64, stream: u64, counter: u64) -> f64 {
    let u = 1.0 - uniform(seed, stream, 2 * counter);
    let v = uniform(seed, stream, 2 * counter + 1);
    (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
}

/// A permutation of `0..n` (Fisher-Yates).
pub fn permutation(n: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let j = (uniform(seed, stream, i as u64) * (i + 1) as f64) as usize;
        order.swap(i, j);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_look_uniform_and_normal() {
        let n = 20_000;
        let mean = (0..n).map(|i| uniform(7, 3, i)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let (sum, squares) = (0..n)
            .map(|i| normal(7, 4, i))
            .fold((0.0, 0.0), |(s, q), x| (s + x, q + x * x));
        assert!((sum / n as f64).abs() < 0.03 && (squares / n as f64 - 1.0).abs() < 0.05);
        let mut order = permutation(100, 1, 2);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
        assert_ne!(bits(1, 0, 0), bits(0, 1, 0));
    }
}
