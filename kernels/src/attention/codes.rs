//! Keys and values in 8 bits: each token's key, and value, of a head is 127 steps of its own scale to either side. A scale
//! for each token and head, because a token's codes then depend on nothing but the token: what was written stays as it is
//! when its block fills up, and a prompt has the same bits however it was cut into chunks. (A scale for a block would be
//! set by the largest of its tokens, some of which are not there yet.)
//!
//! Scales never meet a code in the products: a key's scale multiplies its scores, a value's its probabilities, both in
//! float32, and codes are whole numbers up to 127, which bfloat16 holds exactly. So what a query sees is exactly code times
//! scale.
//!
//! # Layout
//! The panels of [`super::cache`] for bfloat16, a byte an element, and behind a head's panels 32 scales of keys and 32 of
//! values in float32.

use tch::{Kind, Tensor};

use crate::simd::PANEL;
use crate::vector::vectorised;

use super::cache::Geometry;

/// Bytes of a head's scales.
pub(super) const SCALES_LEN: usize = 2 * PANEL * size_of::<f32>();
const LARGEST: f32 = 127.0;

/// Where the scales of keys and values stand in a head's bytes.
pub(super) fn scales(head: *const u8, geometry: &Geometry) -> (*const f32, *const f32) {
    let keys = head.wrapping_add(geometry.panels_len()).cast::<f32>();
    (keys, keys.wrapping_add(PANEL))
}

/// Writes the key and the value of one token.
///
/// # Safety
/// `head` is a head's bytes of a block, and nobody else touches them; `k` and `v` are head_dim long.
pub(super) unsafe fn write(head: *mut u8, geometry: &Geometry, key: usize, k: &[f32], v: &[f32]) {
    let mut codes = [0u8; super::MAX_HEAD_DIM];
    let codes = &mut codes[..k.len()];
    let (k_scales, v_scales) = scales(head, geometry);
    let k_scale = encode(k, codes);
    let pair = |at: usize, lane: usize| at / 2 * 2 * PANEL + lane * 2 + at % 2;
    for (d, code) in codes.iter().enumerate() {
        // SAFETY: [D / 2][32 keys][2], inside the K panel; then the scales behind all panels.
        unsafe { *head.add(pair(d, key)) = *code };
    }
    let v_scale = {
        // SAFETY: as above.
        unsafe { *k_scales.cast_mut().add(key) = k_scale };
        encode(v, codes)
    };
    for (d, code) in codes.iter().enumerate() {
        let panel = geometry.k_len() + d / PANEL * Geometry::V_PANEL;
        // SAFETY: [32 keys / 2][32][2], inside the V panel of this column; then the scales behind all panels.
        unsafe { *head.add(panel + pair(key, d % PANEL)) = *code };
    }
    // SAFETY: as above.
    unsafe { *v_scales.cast_mut().add(key) = v_scale };
}

vectorised!(
    /// Codes (the bits of i8) of a row, and their scale. What holds a number that is none has a scale that is none.
    fn encode(x: &[f32], codes: &mut [u8]) -> f32 {
        let mut largest = 0.0f32;
        let mut finite = true;
        for x in x {
            finite &= x.is_finite();
            largest = if x.abs() > largest { x.abs() } else { largest };
        }
        if !finite {
            codes.fill(0);
            return f32::NAN;
        }
        let scale = largest / LARGEST;
        if scale < f32::MIN_POSITIVE {
            codes.fill(0);
            return 0.0;
        }
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (x / scale).round_ties_even().clamp(-LARGEST, LARGEST) as i8 as u8;
        }
        scale
    }
);

vectorised!(
    /// Codes as the bits of bfloat16, exactly.
    fn widen(codes: &[u8], to: &mut [u16]) {
        for (to, code) in to.iter_mut().zip(codes) {
            *to = (f32::from(*code as i8).to_bits() >> 16) as u16;
        }
    }
);

/// See [`super::tile::Blocks`].
pub(super) fn decode(codes: &[u8], to: &mut [u16]) {
    widen(codes, to);
}

/// The same in plain tch, on any device: codes of `[T, heads, D]` and their scales `[T, heads]`.
pub(super) fn encode_reference(x: &Tensor) -> (Tensor, Tensor) {
    let x = x.to_kind(Kind::Float);
    let scale = x.abs().amax([-1i64].as_slice(), true) / f64::from(LARGEST); // NaN and infinity stay
    let scale = scale.where_self(&scale.isfinite(), &scale.full_like(f64::NAN));
    let nothing = scale.lt(f64::from(f32::MIN_POSITIVE));
    let scale = scale.masked_fill(&nothing, 0.0);
    let codes = (x / &scale)
        .round()
        .nan_to_num(0.0, 0.0, 0.0)
        .clamp(f64::from(-LARGEST), f64::from(LARGEST));
    (codes.to_kind(Kind::Int8), scale.squeeze_dim(-1))
}
