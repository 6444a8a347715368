//! Codes of quantised weights into panels of an operand type, without their scales: a code becomes its level, a number
//! that the type holds (exactly, or rounded as [`Element::round`] does: NF4's in bfloat16).
//!
//! # Layout
//! A panel of codes has 32 columns, as every panel, in lines of 64 bytes:
//! - 4 bits: a line is 4 values of K. The code of value k and column j is nibble `2 (k % 4 / 2) + j / 16` of the 16-bit
//!   word `2 (j % 16) + k % 2`. So shifting a line by 0, 4, 8 and 12 bits leaves, in the low bits of its words, the codes of
//!   the four registers of two steps in bfloat16; in the low bits of its 32-bit lanes, those of a row of 16 columns.
//! - 8 bits: a line is 2 values of K, `[32][2]` bytes: a step of bfloat16 with bytes in place of halves.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod few;

use super::PANEL;
#[cfg(target_arch = "x86_64")]
use crate::machine::features;
use crate::weight::Grid;

/// Bytes of a line of codes.
pub(crate) const LINE: usize = 64;

/// Values of K in a line.
pub(crate) fn line_values(grid: Grid) -> usize {
    match grid.bits() {
        4 => 4,
        _ => 2,
    }
}

/// Bytes of a panel of codes over k values.
pub(crate) fn panel_bytes(grid: Grid, k: usize) -> usize {
    k.div_ceil(line_values(grid)) * LINE
}

/// Where the code of value k and column `column` lies in a panel: its byte, and how far it is shifted there.
pub(crate) fn place(grid: Grid, k: usize, column: usize) -> (usize, usize) {
    match grid.bits() {
        4 => {
            let nibble = k % 4 / 2 * 2 + column / 16;
            let byte = k / 4 * LINE + column % 16 * 4 + k % 2 * 2 + nibble / 2;
            (byte, nibble % 2 * 4)
        }
        _ => (k / 2 * LINE + column * 2 + k % 2, 0),
    }
}

/// Lines of codes into a panel of bfloat16 or float32.
///
/// # Safety
/// [`super::available`]. `from` is readable for `lines` lines, `to` writable for a panel of as many values.
pub(crate) unsafe fn to_bf16(grid: Grid, from: *const u8, lines: usize, to: *mut u16) {
    // SAFETY: the instruction sets were asked for; the rest is the caller's contract.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        match (grid.bits(), features().avx512bf16) {
            (4, true) => avx512::nibbles_to_bf16(grid.bf16_levels(), from, lines, to),
            (4, false) => avx2::nibbles_to_bf16(grid.bf16_levels(), from, lines, to),
            (_, true) if grid == Grid::Int8 => avx512::int8_to_bf16(from, lines, to),
            (_, true) => avx512::fp8_to_bf16(from, lines, to),
            (_, false) => avx2::bytes_to_bf16(avx2::Bytes::of(grid), from, lines, to),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's contract.
    unsafe {
        plain(grid, grid.bf16_levels(), from, lines, 2, to)
    }
}

/// As [`to_bf16`].
///
/// # Safety
/// As there.
pub(crate) unsafe fn to_f32(grid: Grid, from: *const u8, lines: usize, to: *mut f32) {
    // SAFETY: the instruction sets were asked for; the rest is the caller's contract.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        match (grid.bits(), features().avx512f) {
            (4, true) => avx512::nibbles_to_f32(grid.levels(), from, lines, to),
            (4, false) => avx2::nibbles_to_f32(grid.levels(), from, lines, to),
            _ => avx2::bytes_to_f32(avx2::Bytes::of(grid), from, lines, to),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's contract.
    unsafe {
        plain(grid, grid.levels(), from, lines, 1, to)
    }
}

/// Lines of codes into a panel of bfloat16, each level scaled and shifted in float32 and then rounded: what [`to_bf16`] leaves
/// to the sums. Whether there is such a way here; else nothing was written.
///
/// # Safety
/// As [`to_bf16`].
pub(crate) unsafe fn numbers_to_bf16(
    grid: Grid,
    from: *const u8,
    lines: usize,
    scales_and_offsets: [&[f32; PANEL]; 2],
    to: *mut u16,
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if features().avx512bf16 {
        // SAFETY: the instruction sets were asked for; the rest is the caller's contract.
        unsafe { avx512::numbers_to_bf16(grid, from, lines, scales_and_offsets, to) };
        return true;
    }
    let _ = (grid, from, lines, scales_and_offsets, to);
    false
}

/// In plain Rust: the tests hold the others against it.
///
/// # Safety
/// As [`to_bf16`]; `levels` has a level for each code.
#[cfg(any(test, not(target_arch = "x86_64")))]
unsafe fn plain<T: Copy>(
    grid: Grid,
    levels: &[T],
    from: *const u8,
    lines: usize,
    per_step: usize,
    to: *mut T,
) {
    for k in 0..lines * line_values(grid) {
        for column in 0..PANEL {
            let (byte, shift) = place(grid, k, column);
            // SAFETY: inside the lines and the panel, for which the caller vouches.
            unsafe {
                let code = *from.add(byte) >> shift & (((1u16 << grid.bits()) - 1) as u8);
                let at = (k / per_step * PANEL + column) * per_step + k % per_step;
                *to.add(at) = levels[code as usize];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_is_the_plain_one() {
        if !super::super::available() {
            return;
        }
        for grid in Grid::ALL {
            let lines = 67;
            let values = lines * line_values(grid);
            let codes: Vec<u8> = (0..lines * LINE).map(|i| (i * 37 + i / 64 * 11) as u8).collect();
            let [mut fast, mut slow] = [(); 2].map(|()| vec![0u16; values * PANEL]);
            let [mut fast_f32, mut slow_f32] = [(); 2].map(|()| vec![0f32; values * PANEL]);
            // SAFETY: as many lines and values as said.
            unsafe {
                to_bf16(grid, codes.as_ptr(), lines, fast.as_mut_ptr());
                plain(
                    grid,
                    grid.bf16_levels(),
                    codes.as_ptr(),
                    lines,
                    2,
                    slow.as_mut_ptr(),
                );
                to_f32(grid, codes.as_ptr(), lines, fast_f32.as_mut_ptr());
                plain(
                    grid,
                    grid.levels(),
                    codes.as_ptr(),
                    lines,
                    1,
                    slow_f32.as_mut_ptr(),
                );
            }
            assert_eq!(fast, slow, "{grid:?} in bfloat16");
            let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&fast_f32), bits(&slow_f32), "{grid:?} in float32");
        }
    }
}
