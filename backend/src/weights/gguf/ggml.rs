//! ggml's types of numbers and what their bits mean. Reference: ggml/src/ggml-common.h (layouts) and ggml-quants.c (the
//! dequantize_row functions). Every quantised type is whole numbers of at most 8 bits, which neighbours of a row share a
//! scale of, and some an offset: `number * scale + offset`, in float32 and with ggml's own rounding of scales and offsets.

use half::{bf16, f16};
use tandem_kernels::weight::Grid;

/// How a tensor's numbers are stored.
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

struct Layout {
    /// In files (ggml.h, ggml_type).
    id: u32,
    kind: GgmlType,
    name: &'static str,
    /// Numbers that are stored together, and their bytes. A row is whole units.
    unit: usize,
    unit_bytes: usize,
    form: Form,
}

enum Form {
    Plain(fn(&[u8]) -> f32),
    Scaled(Scaled),
}

#[derive(Clone, Copy)]
pub struct Scaled {
    /// Numbers that share a scale.
    pub group: usize,
    pub has_offsets: bool,
    /// What the kernels keep them in.
    pub grid: Grid,
    /// What is taken from a number so that the grid holds it.
    pub shift: i8,
    read: fn(&[u8], &mut Unit),
}

/// A unit, read.
struct Unit<'a> {
    numbers: &'a mut [i8],
    /// One for each group.
    scales: &'a mut [f32],
    offsets: &'a mut [f32],
}

const fn plain(
    id: u32,
    kind: GgmlType,
    name: &'static str,
    unit_bytes: usize,
    read: fn(&[u8]) -> f32,
) -> Layout {
    Layout {
        id,
        kind,
        name,
        unit: 1,
        unit_bytes,
        form: Form::Plain(read),
    }
}

const fn scaled(
    id: u32,
    kind: GgmlType,
    name: &'static str,
    unit: usize,
    unit_bytes: usize,
    form: Scaled,
) -> Layout {
    Layout {
        id,
        kind,
        name,
        unit,
        unit_bytes,
        form: Form::Scaled(form),
    }
}

const fn signed(group: usize, grid: Grid, read: fn(&[u8], &mut Unit)) -> Scaled {
    Scaled {
        group,
        has_offsets: false,
        grid,
        shift: 0,
        read,
    }
}

const fn offset(group: usize, grid: Grid, shift: i8, read: fn(&[u8], &mut Unit)) -> Scaled {
    Scaled {
        group,
        has_offsets: true,
        grid,
        shift,
        read,
    }
}

#[rustfmt::skip] // one type, one line
const LAYOUTS: [Layout; 13] = [
    plain(0, F32, "F32", 4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
    plain(1, F16, "F16", 2, |b| half_at(b, 0)),
    plain(30, Bf16, "BF16", 2, |b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
    scaled(2, Q4_0, "Q4_0", 32, 18, signed(32, Grid::Int4, q4_0)),
    scaled(3, Q4_1, "Q4_1", 32, 20, offset(32, Grid::Int4, 8, q4_1)),
    scaled(6, Q5_0, "Q5_0", 32, 22, signed(32, Grid::Int8, q5_0)),
    scaled(7, Q5_1, "Q5_1", 32, 24, offset(32, Grid::Int8, 0, q5_1)),
    scaled(8, Q8_0, "Q8_0", 32, 34, signed(32, Grid::Int8, q8_0)),
    scaled(10, Q2K, "Q2_K", 256, 84, offset(16, Grid::Int4, 0, q2_k)),
    scaled(11, Q3K, "Q3_K", 256, 110, signed(16, Grid::Int4, q3_k)),
    scaled(12, Q4K, "Q4_K", 256, 144, offset(32, Grid::Int4, 8, q4_k)),
    scaled(13, Q5K, "Q5_K", 256, 176, offset(32, Grid::Int8, 0, q5_k)),
    scaled(14, Q6K, "Q6_K", 256, 210, signed(16, Grid::Int8, q6_k)),
];

/// Types that are known by name only.
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
        match LAYOUTS.iter().find(|layout| layout.id == id) {
            Some(layout) => Ok(layout.kind),
            None => Err(match UNREAD.iter().find(|(known, _)| *known == id) {
                Some((_, name)) => (*name).to_owned(),
                None => format!("type {id}"),
            }),
        }
    }

    /// What is read, for errors.
    pub fn names() -> String {
        let names: Vec<&str> = LAYOUTS.iter().map(|layout| layout.name).collect();
        names.join(", ")
    }

    fn layout(self) -> &'static Layout {
        let layout = LAYOUTS.iter().find(|layout| layout.kind == self);
        layout.expect("every type is in the table")
    }

    /// In files.
    pub fn id(self) -> u32 {
        self.layout().id
    }

    pub fn name(self) -> &'static str {
        self.layout().name
    }

    /// Rows are whole units of so many numbers.
    pub fn unit(self) -> usize {
        self.layout().unit
    }

    /// Bytes of `numbers`, which are whole units.
    pub fn bytes(self, numbers: usize) -> usize {
        let Layout { unit, unit_bytes, .. } = self.layout();
        numbers / unit * unit_bytes
    }

    /// `None`: floating-point numbers.
    pub fn scaled(self) -> Option<Scaled> {
        match self.layout().form {
            Form::Plain(_) => None,
            Form::Scaled(scaled) => Some(scaled),
        }
    }

    /// The numbers of whole units.
    pub fn dequantise(self, bytes: &[u8], numbers: &mut [f32]) {
        let Layout {
            unit,
            unit_bytes,
            form,
            ..
        } = self.layout();
        assert_eq!(bytes.len() / unit_bytes, numbers.len() / unit, "whole units");
        let Scaled { group, .. } = match form {
            Form::Plain(read) => {
                for (bytes, number) in bytes.chunks_exact(*unit_bytes).zip(numbers) {
                    *number = read(bytes);
                }
                return;
            }
            Form::Scaled(scaled) => *scaled,
        };
        let mut codes = vec![0; numbers.len()];
        let mut scales = vec![0.0; numbers.len() / group];
        let mut offsets = scales.clone();
        self.split(bytes, &mut codes, &mut scales, &mut offsets);
        for (i, (numbers, codes)) in numbers
            .chunks_exact_mut(group)
            .zip(codes.chunks_exact(group))
            .enumerate()
        {
            for (number, &code) in numbers.iter_mut().zip(codes) {
                *number = f32::from(code) * scales[i] + offsets[i];
            }
        }
    }

    /// The whole numbers, scales and offsets of whole units of a quantised type. Offsets of a type without stay as they are.
    pub fn split(self, bytes: &[u8], numbers: &mut [i8], scales: &mut [f32], offsets: &mut [f32]) {
        let Layout {
            unit,
            unit_bytes,
            form,
            ..
        } = self.layout();
        let Form::Scaled(Scaled { group, read, .. }) = form else {
            panic!("{} has no scales", self.name());
        };
        let groups = unit / group;
        for (i, bytes) in bytes.chunks_exact(*unit_bytes).enumerate() {
            read(
                bytes,
                &mut Unit {
                    numbers: &mut numbers[i * unit..][..*unit],
                    scales: &mut scales[i * groups..][..groups],
                    offsets: &mut offsets[i * groups..][..groups],
                },
            );
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn low(byte: u8) -> i8 {
    (byte & 15) as i8
}

fn high(byte: u8) -> i8 {
    (byte >> 4) as i8
}

/// Scale; 16 bytes, whose low halves are the first 16 numbers.
fn q4_0(b: &[u8], unit: &mut Unit) {
    unit.scales[0] = half_at(b, 0);
    for (j, &q) in b[2..18].iter().enumerate() {
        unit.numbers[j] = low(q) - 8;
        unit.numbers[j + 16] = high(q) - 8;
    }
}

/// Scale, offset; as above.
fn q4_1(b: &[u8], unit: &mut Unit) {
    (unit.scales[0], unit.offsets[0]) = (half_at(b, 0), half_at(b, 2));
    for (j, &q) in b[4..20].iter().enumerate() {
        unit.numbers[j] = low(q);
        unit.numbers[j + 16] = high(q);
    }
}

/// The fifth bits of 32 numbers.
fn fifth_bits(b: &[u8], at: usize) -> impl Fn(usize) -> i8 {
    let bits = u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
    move |j| ((bits >> j & 1) << 4) as i8
}

/// Scale, fifth bits; as above.
fn q5_0(b: &[u8], unit: &mut Unit) {
    unit.scales[0] = half_at(b, 0);
    let fifth = fifth_bits(b, 2);
    for (j, &q) in b[6..22].iter().enumerate() {
        unit.numbers[j] = (low(q) | fifth(j)) - 16;
        unit.numbers[j + 16] = (high(q) | fifth(j + 16)) - 16;
    }
}

/// Scale, offset, fifth bits; as above.
fn q5_1(b: &[u8], unit: &mut Unit) {
    (unit.scales[0], unit.offsets[0]) = (half_at(b, 0), half_at(b, 2));
    let fifth = fifth_bits(b, 4);
    for (j, &q) in b[8..24].iter().enumerate() {
        unit.numbers[j] = low(q) | fifth(j);
        unit.numbers[j + 16] = high(q) | fifth(j + 16);
    }
}

/// Scale; 32 signed bytes.
fn q8_0(b: &[u8], unit: &mut Unit) {
    unit.scales[0] = half_at(b, 0);
    for (number, &q) in unit.numbers.iter_mut().zip(&b[2..34]) {
        *number = q as i8;
    }
}

/// 16 scales and offsets of 4 bits, 64 bytes of four 2-bit numbers, scale of scales, scale of offsets. A number's four
/// neighbours in a byte are 32 apart.
fn q2_k(b: &[u8], unit: &mut Unit) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, min) = (half_at(b, 80), half_at(b, 82));
    for (i, numbers) in unit.numbers.chunks_exact_mut(16).enumerate() {
        unit.scales[i] = d * f32::from(low(scales[i]));
        unit.offsets[i] = -(min * f32::from(high(scales[i])));
        let (half, shift) = (i / 8, i % 8 / 2 * 2);
        let from = half * 32 + i % 2 * 16;
        for (number, &q) in numbers.iter_mut().zip(&qs[from..from + 16]) {
            *number = (q >> shift & 3) as i8;
        }
    }
}

/// 32 bytes of third bits (one bit for each 32 numbers), 64 bytes as above, 16 scales of 6 bits in 12 bytes, scale.
fn q3_k(b: &[u8], unit: &mut Unit) {
    let (third, qs, packed) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half_at(b, 108);
    for (i, numbers) in unit.numbers.chunks_exact_mut(16).enumerate() {
        let four = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
        let two = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        unit.scales[i] = d * f32::from((two << 4 | four) as i8 - 32);
        let (half, shift, side) = (i / 8, i % 8 / 2 * 2, i % 2 * 16);
        for (l, number) in numbers.iter_mut().enumerate() {
            let q = (qs[half * 32 + side + l] >> shift & 3) as i8;
            let has_third = third[side + l] >> (i / 2) & 1 == 1;
            *number = if has_third { q } else { q - 4 };
        }
    }
}

/// Scale and offset `i` of the eight of Q4_K and Q5_K, 6 bits each, in 12 bytes.
fn six_bits(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, offset) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (
            packed[i + 4] & 15 | packed[i - 4] >> 6 << 4,
            packed[i + 4] >> 4 | packed[i] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(offset))
}

/// Scale of scales, scale of offsets, 8 scales and offsets, 128 bytes; a byte's halves are 32 numbers apart.
fn q4_k(b: &[u8], unit: &mut Unit) {
    let (d, min, packed, qs) = (half_at(b, 0), half_at(b, 2), &b[4..16], &b[16..144]);
    for (i, numbers) in unit.numbers.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = six_bits(packed, i);
        (unit.scales[i], unit.offsets[i]) = (d * scale, -(min * offset));
        for (number, &q) in numbers.iter_mut().zip(&qs[i / 2 * 32..][..32]) {
            *number = if i % 2 == 0 { low(q) } else { high(q) };
        }
    }
}

/// As Q4_K, with 32 bytes of fifth bits (one bit for each 32 numbers) before the 128.
fn q5_k(b: &[u8], unit: &mut Unit) {
    let (d, min, packed) = (half_at(b, 0), half_at(b, 2), &b[4..16]);
    let (fifth, qs) = (&b[16..48], &b[48..176]);
    for (i, numbers) in unit.numbers.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = six_bits(packed, i);
        (unit.scales[i], unit.offsets[i]) = (d * scale, -(min * offset));
        for (l, (number, &q)) in numbers.iter_mut().zip(&qs[i / 2 * 32..][..32]).enumerate() {
            let four = if i % 2 == 0 { low(q) } else { high(q) };
            *number = four | ((fifth[l] >> i & 1) << 4) as i8;
        }
    }
}

/// 128 bytes of low halves, 64 bytes of fifth and sixth bits, 16 signed scales, scale.
fn q6_k(b: &[u8], unit: &mut Unit) {
    let (lows, highs, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half_at(b, 208);
    for (i, numbers) in unit.numbers.chunks_exact_mut(16).enumerate() {
        unit.scales[i] = d * f32::from(scales[i] as i8);
        // Of a half of 128 numbers: which 32, and which side of these.
        let (half, quarter, side) = (i / 8, i % 8 / 2, i % 2 * 16);
        for (l, number) in numbers.iter_mut().enumerate() {
            let q = lows[half * 64 + quarter % 2 * 32 + side + l];
            let four = if quarter < 2 { low(q) } else { high(q) };
            let two = highs[half * 32 + side + l] >> (quarter * 2) & 3;
            *number = (four | (two << 4) as i8) - 32;
        }
    }
}
