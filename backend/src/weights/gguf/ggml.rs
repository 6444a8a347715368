//! ggml's types of numbers and what their bits mean. Reference: ggml/src/ggml-common.h (layouts) and ggml-quants.c (the
//! dequantize_row functions). Sums and products are taken in float32 and in ggml's order, so that results have its bits.

use half::{bf16, f16};

/// How a tensor's numbers are stored. Groups of a row share their scales; K types have 256 numbers in a group, the others
/// 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

use GgmlType::{Bf16, F16, F32, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};

/// Number in files, name, numbers of a group, bytes of a group.
const TYPES: [(u32, GgmlType, &str, usize, usize); 13] = [
    (0, F32, "F32", 1, 4),
    (1, F16, "F16", 1, 2),
    (30, Bf16, "BF16", 1, 2),
    (2, Q4_0, "Q4_0", 32, 18),
    (3, Q4_1, "Q4_1", 32, 20),
    (6, Q5_0, "Q5_0", 32, 22),
    (7, Q5_1, "Q5_1", 32, 24),
    (8, Q8_0, "Q8_0", 32, 34),
    (10, Q2K, "Q2_K", 256, 84),
    (11, Q3K, "Q3_K", 256, 110),
    (12, Q4K, "Q4_K", 256, 144),
    (13, Q5K, "Q5_K", 256, 176),
    (14, Q6K, "Q6_K", 256, 210),
];

/// Types that are known by name only. (ggml.h, ggml_type.)
const UNREAD: [(u32, &str); 20] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

impl GgmlType {
    /// An error is the type's name.
    pub fn of(id: u32) -> Result<GgmlType, String> {
        match TYPES.iter().find(|(known, ..)| *known == id) {
            Some((_, kind, ..)) => Ok(*kind),
            None => Err(match UNREAD.iter().find(|(known, _)| *known == id) {
                Some((_, name)) => (*name).to_owned(),
                None => format!("type {id}"),
            }),
        }
    }

    /// What is read, for errors.
    pub fn names() -> String {
        let names: Vec<&str> = TYPES.iter().map(|(_, _, name, ..)| *name).collect();
        names.join(", ")
    }

    fn row(self) -> &'static (u32, GgmlType, &'static str, usize, usize) {
        let row = TYPES.iter().find(|(_, kind, ..)| *kind == self);
        row.expect("every type is in the table")
    }

    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Numbers of a group, which rows consist of.
    pub fn group(self) -> usize {
        self.row().3
    }

    pub fn group_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of `numbers`, which are whole groups.
    pub fn bytes(self, numbers: usize) -> usize {
        numbers / self.group() * self.group_bytes()
    }

    /// The numbers of whole groups.
    pub fn dequantise(self, bytes: &[u8], numbers: &mut [f32]) {
        let (_, _, _, group, group_bytes) = *self.row();
        assert_eq!(bytes.len() / group_bytes, numbers.len() / group, "whole groups");
        let one: fn(&[u8], &mut [f32]) = match self {
            F32 => |b, y| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            F16 => |b, y| y[0] = half_at(b, 0),
            Bf16 => |b, y| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Q4_0 => q4_0,
            Q4_1 => q4_1,
            Q5_0 => q5_0,
            Q5_1 => q5_1,
            Q8_0 => q8_0,
            Q2K => q2_k,
            Q3K => q3_k,
            Q4K => q4_k,
            Q5K => q5_k,
            Q6K => q6_k,
        };
        for (bytes, numbers) in bytes
            .chunks_exact(group_bytes)
            .zip(numbers.chunks_exact_mut(group))
        {
            one(bytes, numbers);
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn low(byte: u8) -> i32 {
    i32::from(byte & 15)
}

fn high(byte: u8) -> i32 {
    i32::from(byte >> 4)
}

/// Scale; 16 bytes, whose low halves are the first 16 numbers.
fn q4_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    for (j, &q) in b[2..18].iter().enumerate() {
        y[j] = (low(q) - 8) as f32 * d;
        y[j + 16] = (high(q) - 8) as f32 * d;
    }
}

/// Scale, least; as above.
fn q4_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for (j, &q) in b[4..20].iter().enumerate() {
        y[j] = low(q) as f32 * d + m;
        y[j + 16] = high(q) as f32 * d + m;
    }
}

/// The fifth bits of 32 numbers.
fn fifth_bits(b: &[u8], at: usize) -> impl Fn(usize) -> i32 {
    let bits = u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
    move |j| ((bits >> j & 1) << 4) as i32
}

/// Scale, fifth bits; as above.
fn q5_0(b: &[u8], y: &mut [f32]) {
    let (d, fifth) = (half_at(b, 0), fifth_bits(b, 2));
    for (j, &q) in b[6..22].iter().enumerate() {
        y[j] = ((low(q) | fifth(j)) - 16) as f32 * d;
        y[j + 16] = ((high(q) | fifth(j + 16)) - 16) as f32 * d;
    }
}

/// Scale, least, fifth bits; as above.
fn q5_1(b: &[u8], y: &mut [f32]) {
    let (d, m, fifth) = (half_at(b, 0), half_at(b, 2), fifth_bits(b, 4));
    for (j, &q) in b[8..24].iter().enumerate() {
        y[j] = (low(q) | fifth(j)) as f32 * d + m;
        y[j + 16] = (high(q) | fifth(j + 16)) as f32 * d + m;
    }
}

/// Scale; 32 signed bytes.
fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    for (y, &q) in y.iter_mut().zip(&b[2..34]) {
        *y = f32::from(q as i8) * d;
    }
}

/// 16 scales and leasts of 4 bits, 64 bytes of four 2-bit numbers, scale of scales, scale of leasts. A number's four
/// neighbours in a byte are 32 apart.
fn q2_k(b: &[u8], y: &mut [f32]) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, min) = (half_at(b, 80), half_at(b, 82));
    for (i, y) in y.chunks_exact_mut(16).enumerate() {
        let (half, shift) = (i / 8, i % 8 / 2 * 2);
        let (dl, ml) = (d * low(scales[i]) as f32, min * high(scales[i]) as f32);
        let from = half * 32 + i % 2 * 16;
        for (y, &q) in y.iter_mut().zip(&qs[from..from + 16]) {
            *y = dl * f32::from(q >> shift & 3) - ml;
        }
    }
}

/// 32 bytes of third bits (one bit for each 32 numbers), 64 bytes as above, 16 scales of 6 bits in 12 bytes, scale.
fn q3_k(b: &[u8], y: &mut [f32]) {
    let (third, qs, packed) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half_at(b, 108);
    for (i, y) in y.chunks_exact_mut(16).enumerate() {
        let four = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
        let two = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        let dl = d * (i32::from(two << 4 | four) - 32) as f32;
        let (half, shift, side) = (i / 8, i % 8 / 2 * 2, i % 2 * 16);
        for (l, y) in y.iter_mut().enumerate() {
            let q = i32::from(qs[half * 32 + side + l] >> shift & 3);
            let lowered = if third[side + l] >> (i / 2) & 1 == 1 { 0 } else { 4 };
            *y = dl * (q - lowered) as f32;
        }
    }
}

/// Scale and least `i` of the eight of Q4_K and Q5_K, 6 bits each, in 12 bytes.
fn six_bits(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, least) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (
            packed[i + 4] & 15 | packed[i - 4] >> 6 << 4,
            packed[i + 4] >> 4 | packed[i] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(least))
}

/// Scale of scales, scale of leasts, 8 scales and leasts, 128 bytes; a byte's halves are 32 numbers apart.
fn q4_k(b: &[u8], y: &mut [f32]) {
    let (d, min, packed, qs) = (half_at(b, 0), half_at(b, 2), &b[4..16], &b[16..144]);
    for (i, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, least) = six_bits(packed, i);
        let (dl, ml) = (d * scale, min * least);
        for (y, &q) in y.iter_mut().zip(&qs[i / 2 * 32..][..32]) {
            let q = if i % 2 == 0 { low(q) } else { high(q) };
            *y = dl * q as f32 - ml;
        }
    }
}

/// As Q4_K, with 32 bytes of fifth bits (one bit for each 32 numbers) before the 128.
fn q5_k(b: &[u8], y: &mut [f32]) {
    let (d, min, packed) = (half_at(b, 0), half_at(b, 2), &b[4..16]);
    let (fifth, qs) = (&b[16..48], &b[48..176]);
    for (i, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, least) = six_bits(packed, i);
        let (dl, ml) = (d * scale, min * least);
        for (l, (y, &q)) in y.iter_mut().zip(&qs[i / 2 * 32..][..32]).enumerate() {
            let q = if i % 2 == 0 { low(q) } else { high(q) };
            let fifth = i32::from(fifth[l] >> i & 1) << 4;
            *y = dl * (q | fifth) as f32 - ml;
        }
    }
}

/// 128 bytes of low halves, 64 bytes of fifth and sixth bits, 16 signed scales, scale.
fn q6_k(b: &[u8], y: &mut [f32]) {
    let (lows, highs, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half_at(b, 208);
    for (i, y) in y.chunks_exact_mut(16).enumerate() {
        // Of a half of 128 numbers: which 32, and which side of these.
        let (half, quarter, side) = (i / 8, i % 8 / 2, i % 2 * 16);
        let dl = d * f32::from(scales[i] as i8);
        for (l, y) in y.iter_mut().enumerate() {
            let q = lows[half * 64 + quarter % 2 * 32 + side + l];
            let q = if quarter < 2 { low(q) } else { high(q) };
            let high = i32::from(highs[half * 32 + side + l] >> (quarter * 2) & 3) << 4;
            *y = dl * ((q | high) - 32) as f32;
        }
    }
}
