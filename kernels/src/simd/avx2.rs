//! The micro-kernels in AVX2 with FMA. 6 rows x 2 ymm are 12 accumulators, enough for two FMA units of latency 4; with
//! two panel registers, a broadcast and a mask that is all 16. Half a panel therefore goes through a tall tile of 4 to 6
//! rows, a whole one through a broad tile of 1 to 3.
//!
//! bfloat16 operands are widened on the way (a shift for the even value of a pair, a mask for the odd one): half the
//! bytes of float32 at the same rate of arithmetic. Products of two bfloat16 are exact in float32.
//!
//! The four inner loops are assembly, because all 16 registers are spoken for and the compiler, rescheduling the same
//! loop written with intrinsics, now and then needs a 17th: 0.95 or 0.6 of the FMA peak, by luck.

#![allow(clippy::needless_range_loop)] // Register tiles are indexed by row and column.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{Ahead, Element, PANEL, PASS_STEPS, Product, Scaling, Sum};

/// Rows of the largest register tile.
const MAX_TILE: usize = 6;
/// Rows of the largest tile over a whole panel.
pub(super) const MAX_BROAD_TILE: usize = 3;
/// Bytes of a panel's step, in either type.
const PANEL_STEP_BYTES: usize = 128;

/// The rows of a tile in float32, the even and the odd values of the pairs apart: a broadcast is then a plain load. The
/// widening is shared by all columns of the pass.
#[repr(align(64))]
struct Widened {
    #[allow(dead_code)] // Reached by pointer only: never initialised as a whole.
    values: [[[f32; PASS_STEPS]; 2]; MAX_TILE],
}

/// Calls `$tile::<M, Y>` with the loop of M rows and Y ymm of columns.
macro_rules! tile {
    ($tile:ident, $tall:ident, $broad:ident, $height:expr, $width:expr, ($($argument:expr),*)) => {
        match ($height, $width > 16) {
            (1, true) => $tile::<_, 1, 4>($($argument,)* $broad::rows_1),
            (2, true) => $tile::<_, 2, 4>($($argument,)* $broad::rows_2),
            (3, true) => $tile::<_, 3, 4>($($argument,)* $broad::rows_3),
            (1, false) => $tile::<_, 1, 2>($($argument,)* $tall::rows_1),
            (2, false) => $tile::<_, 2, 2>($($argument,)* $tall::rows_2),
            (3, false) => $tile::<_, 3, 2>($($argument,)* $tall::rows_3),
            (4, false) => $tile::<_, 4, 2>($($argument,)* $tall::rows_4),
            (5, false) => $tile::<_, 5, 2>($($argument,)* $tall::rows_5),
            (6, false) => $tile::<_, 6, 2>($($argument,)* $tall::rows_6),
            _ => unreachable!("a tile has 1..=6 rows, and at most 3 over a whole panel"),
        }
    };
}

/// `c (+)= a * panels` with bfloat16 operands and float32 sums.
///
/// # Safety
/// The CPU has AVX2 and FMA; as [`super::product`] with steps <= PASS_STEPS.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn pass_bf16(product: &Product<u16>) {
    let Product {
        m,
        steps,
        a,
        lda,
        n,
        panels,
        panel_stride,
        ..
    } = *product;
    let mut widened = std::mem::MaybeUninit::<Widened>::uninit();
    let widened: *mut f32 = widened.as_mut_ptr().cast();
    for (row, height) in tiles(m) {
        for r in 0..height {
            // SAFETY: a row of the caller's a into a row of the buffer, which holds PASS_STEPS pairs.
            unsafe { widen(a.add((row + r) * lda), steps, widened.add(r * 2 * PASS_STEPS)) };
        }
        for (column, width) in parts(n, height) {
            let panel = panels.wrapping_add(column / PANEL * panel_stride + column % PANEL * 2);
            let steps = Steps {
                a: widened,
                lda: 0,
                panel,
                steps,
                ahead: Ahead::of_tile(panel.cast(), steps, row, column),
            };
            let corner = Corner { row, column, width };
            // SAFETY: rows and columns inside m and n, for which the caller vouches, and `height` rows are widened.
            unsafe {
                tile!(
                    tile,
                    tall_bf16,
                    broad_bf16,
                    height,
                    width,
                    (product, corner, steps)
                )
            };
        }
    }
}

/// `c (+)= a * panels` in float32.
///
/// # Safety
/// The CPU has AVX2 and FMA; as [`super::product`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn pass_f32(product: &Product<f32>) {
    let Product {
        m,
        steps,
        a,
        lda,
        n,
        panels,
        panel_stride,
        ..
    } = *product;
    for (row, height) in tiles(m) {
        for (column, width) in parts(n, height) {
            let panel = panels.wrapping_add(column / PANEL * panel_stride + column % PANEL);
            let ahead = Ahead::of_tile(panel.cast(), steps, row, column);
            let steps = Steps {
                a: a.wrapping_add(row * lda),
                lda,
                panel,
                steps,
                ahead,
            };
            let corner = Corner { row, column, width };
            // SAFETY: rows and columns inside m and n, for which the caller vouches.
            unsafe { tile!(tile, tall_f32, broad_f32, height, width, (product, corner, steps)) };
        }
    }
}

/// Cuts m rows into tiles of nearly equal height: (first row, rows).
fn tiles(m: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = m.div_ceil(MAX_TILE);
    (0..tiles).map(move |tile| (tile * m / tiles, (tile + 1) * m / tiles - tile * m / tiles))
}

/// Cuts n columns into what a tile of this height holds: (first column, columns).
fn parts(n: usize, height: usize) -> impl Iterator<Item = (usize, usize)> {
    let widest = if height <= MAX_BROAD_TILE {
        PANEL
    } else {
        PANEL / 2
    };
    (0..n)
        .step_by(widest)
        .map(move |column| (column, widest.min(n - column)))
}

/// # Safety
/// AVX2; `from` holds 2 steps values, `to` two rows of PASS_STEPS >= steps.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen(from: *const u16, steps: usize, to: *mut f32) {
    for step in 0..steps {
        // SAFETY: inside what the caller vouches for.
        unsafe {
            let pair = from.add(2 * step).cast::<u32>().read_unaligned();
            to.add(step).write(f32::from_bits(pair << 16));
            to.add(PASS_STEPS + step)
                .write(f32::from_bits(pair & 0xffff_0000));
        }
    }
}

impl Ahead {
    /// Asks memory for the panel's next piece while this one is multiplied: the first tile of the rows does, at a pace that
    /// is done when the tile is. (Asking at a fixed distance instead leaves memory idle while the second half of the columns
    /// goes through: a quarter slower at 4 to 16 rows. Into the second-level cache; where float32 goes
    /// through whole panels into the first: found by trying, a third and a fifth.) `piece` is where the tile begins to read
    /// the panel: at its first column, or at the 17th.
    fn of_tile(piece: *const u8, steps: usize, row: usize, column: usize) -> Ahead {
        let next = piece.wrapping_add(steps * PANEL_STEP_BYTES);
        match (row, column % PANEL) {
            (0, 0) => Ahead {
                line: next,
                stride: PANEL_STEP_BYTES / 2,
            },
            (0, _) => Ahead {
                line: next.wrapping_add(steps * PANEL_STEP_BYTES / 2),
                stride: PANEL_STEP_BYTES / 2,
            },
            // Read already.
            _ => Ahead::nothing(piece),
        }
    }
}

/// What an inner loop runs over: rows of float32 `lda` apart (bfloat16: of [`Widened`]) and a panel.
#[derive(Clone, Copy)]
struct Steps<T> {
    a: *const f32,
    lda: usize,
    panel: *const T,
    steps: usize,
    ahead: Ahead,
}

/// Where in c a tile stands.
#[derive(Clone, Copy)]
struct Corner {
    row: usize,
    column: usize,
    width: usize,
}

/// One register tile: M rows, Y ymm of columns.
///
/// # Safety
/// AVX2 and FMA; as [`super::product`] for rows and columns of the corner, width <= 8 Y; `run` is the loop for them.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<T: Element, const M: usize, const Y: usize>(
    product: &Product<T>,
    corner: Corner,
    steps: Steps<T>,
    run: unsafe fn(&mut [[__m256; Y]; M], Steps<T>),
) {
    // SAFETY: the caller's contract.
    unsafe {
        let Sum::Scaled(scaling) = product.sum else {
            let mut acc = start::<T, M, Y>(product, corner);
            if steps.steps > 0 {
                run(&mut acc, steps);
            }
            return finish(acc, product, corner);
        };
        let mut totals = read::<T, M, Y>(product, corner);
        for group in 0..steps.steps / scaling.group_steps {
            let (skipped, scaling) = (group * scaling.group_steps, scaling.of_group(group));
            let mut sums = [[_mm256_setzero_ps(); Y]; M];
            let steps = Steps {
                a: steps.a.add(skipped),
                panel: steps.panel.add(skipped * T::PER_STEP * PANEL),
                steps: scaling.group_steps,
                // Levels of codes lie in a near cache.
                ahead: Ahead::nothing(steps.panel.cast()),
                ..steps
            };
            run(&mut sums, steps);
            for r in 0..M {
                for y in 0..Y {
                    let column = corner.column + 8 * y;
                    totals[r][y] = scaled(sums[r][y], totals[r][y], &scaling, corner.row + r, column);
                }
            }
        }
        write(totals, product, corner);
    }
}

/// The inner loops of M rows and half a panel: `acc[r] += a[r][k] panel[k]`. Registers: ymm0..11 accumulators, 12 and 13
/// the panel, 14 a broadcast, 15 the mask of odd values.
macro_rules! tall_bf16 {
    ($($name:ident: $m:literal [$($r:literal $low:tt $high:tt)*];)*) => {
        mod tall_bf16 {
            use super::*;
            $(
                /// # Safety
                /// AVX2 and FMA; steps >= 1; rows and panel are readable for all steps.
                #[target_feature(enable = "avx2,fma")]
                pub(super) unsafe fn $name(acc: &mut [[__m256; 2]; $m], Steps { a, panel, steps, ahead, .. }: Steps<u16>) {
                    // SAFETY: reads what the caller vouches for; writes only the registers named.
                    unsafe {
                        asm!(
                            "2:",
                            "prefetcht1 byte ptr [{ahead}]",
                            "vmovups ymm12, ymmword ptr [{panel}]",
                            "vmovups ymm13, ymmword ptr [{panel} + 32]",
                            "vpslld ymm12, ymm12, 16",
                            "vpslld ymm13, ymm13, 16",
                            $(
                                concat!("vbroadcastss ymm14, dword ptr [{a} + ", $r, "*{row}]"),
                                concat!("vfmadd231ps ", $low, ", ymm14, ymm12"),
                                concat!("vfmadd231ps ", $high, ", ymm14, ymm13"),
                            )*
                            "vandps ymm12, ymm15, ymmword ptr [{panel}]",
                            "vandps ymm13, ymm15, ymmword ptr [{panel} + 32]",
                            $(
                                concat!("vbroadcastss ymm14, dword ptr [{a} + ", $r, "*{row} + {odd}]"),
                                concat!("vfmadd231ps ", $low, ", ymm14, ymm12"),
                                concat!("vfmadd231ps ", $high, ", ymm14, ymm13"),
                            )*
                            "add {a}, 4",
                            "sub {panel}, -128",
                            "add {ahead}, {stride}",
                            "dec {steps}",
                            "jnz 2b",
                            a = inout(reg) a => _,
                            panel = inout(reg) panel => _,
                            steps = inout(reg) steps => _,
                            ahead = inout(reg) ahead.line => _,
                            stride = in(reg) ahead.stride,
                            row = const 2 * PASS_STEPS * 4,
                            odd = const PASS_STEPS * 4,
                            $(inout($low) acc[$r][0], inout($high) acc[$r][1],)*
                            out("ymm12") _, out("ymm13") _, out("ymm14") _,
                            in("ymm15") _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32 as i32)),
                            options(readonly, nostack),
                        );
                    }
                }
            )*
        }
    };
}

tall_bf16! {
    rows_1: 1 [0 "ymm0" "ymm1"];
    rows_2: 2 [0 "ymm0" "ymm1" 1 "ymm2" "ymm3"];
    rows_3: 3 [0 "ymm0" "ymm1" 1 "ymm2" "ymm3" 2 "ymm4" "ymm5"];
    rows_4: 4 [0 "ymm0" "ymm1" 1 "ymm2" "ymm3" 2 "ymm4" "ymm5" 3 "ymm6" "ymm7"];
    rows_5: 5 [0 "ymm0" "ymm1" 1 "ymm2" "ymm3" 2 "ymm4" "ymm5" 3 "ymm6" "ymm7" 4 "ymm8" "ymm9"];
    rows_6: 6 [0 "ymm0" "ymm1" 1 "ymm2" "ymm3" 2 "ymm4" "ymm5" 3 "ymm6" "ymm7" 4 "ymm8" "ymm9" 5 "ymm10" "ymm11"];
}

/// As `tall_bf16` in float32. Rows 3, 4, 5 are addressed from a second pointer.
macro_rules! tall_f32 {
    ($($name:ident: $m:literal [$($r:literal $at:tt $low:tt $high:tt)*];)*) => {
        mod tall_f32 {
            use super::*;
            $(
                /// # Safety
                /// AVX2 and FMA; steps >= 1; rows and panel are readable for all steps.
                #[target_feature(enable = "avx2,fma")]
                pub(super) unsafe fn $name(acc: &mut [[__m256; 2]; $m], Steps { a, lda, panel, steps, ahead }: Steps<f32>) {
                    // SAFETY: reads what the caller vouches for; writes only the registers named.
                    unsafe {
                        asm!(
                            "# {lda} {a3}", // A tile of one row has no other use for them.
                            "2:",
                            "prefetcht1 byte ptr [{ahead}]",
                            "vmovups ymm12, ymmword ptr [{panel}]",
                            "vmovups ymm13, ymmword ptr [{panel} + 32]",
                            $(
                                concat!("vbroadcastss ymm14, dword ptr [", $at, "]"),
                                concat!("vfmadd231ps ", $low, ", ymm14, ymm12"),
                                concat!("vfmadd231ps ", $high, ", ymm14, ymm13"),
                            )*
                            "add {a}, 4",
                            "add {a3}, 4",
                            "sub {panel}, -128",
                            "add {ahead}, {stride}",
                            "dec {steps}",
                            "jnz 2b",
                            a = inout(reg) a => _,
                            a3 = inout(reg) a.wrapping_add(3 * lda) => _,
                            lda = in(reg) 4 * lda,
                            panel = inout(reg) panel => _,
                            steps = inout(reg) steps => _,
                            ahead = inout(reg) ahead.line => _,
                            stride = in(reg) ahead.stride,
                            $(inout($low) acc[$r][0], inout($high) acc[$r][1],)*
                            out("ymm12") _, out("ymm13") _, out("ymm14") _,
                            options(readonly, nostack),
                        );
                    }
                }
            )*
        }
    };
}

tall_f32! {
    rows_1: 1 [0 "{a}" "ymm0" "ymm1"];
    rows_2: 2 [0 "{a}" "ymm0" "ymm1" 1 "{a} + {lda}" "ymm2" "ymm3"];
    rows_3: 3 [0 "{a}" "ymm0" "ymm1" 1 "{a} + {lda}" "ymm2" "ymm3" 2 "{a} + 2*{lda}" "ymm4" "ymm5"];
    rows_4: 4 [0 "{a}" "ymm0" "ymm1" 1 "{a} + {lda}" "ymm2" "ymm3" 2 "{a} + 2*{lda}" "ymm4" "ymm5" 3 "{a3}" "ymm6" "ymm7"];
    rows_5: 5 [0 "{a}" "ymm0" "ymm1" 1 "{a} + {lda}" "ymm2" "ymm3" 2 "{a} + 2*{lda}" "ymm4" "ymm5" 3 "{a3}" "ymm6" "ymm7" 4 "{a3} + {lda}" "ymm8" "ymm9"];
    rows_6: 6 [0 "{a}" "ymm0" "ymm1" 1 "{a} + {lda}" "ymm2" "ymm3" 2 "{a} + 2*{lda}" "ymm4" "ymm5" 3 "{a3}" "ymm6" "ymm7" 4 "{a3} + {lda}" "ymm8" "ymm9" 5 "{a3} + 2*{lda}" "ymm10" "ymm11"];
}

/// The inner loops of up to 3 rows and a whole panel. Registers: ymm0..11 accumulators, 12..14 a broadcast of each row, 15
/// the panel. The mask of odd values is in 14 where that is free, else in memory.
macro_rules! broad_bf16 {
    ($($name:ident: $m:literal ($odd:literal $mask:literal) [$($r:literal $x:tt)*] $([$y:literal $($i:literal $acc:tt $by:tt)*])*;)*) => {
        mod broad_bf16 {
            use super::*;
            $(
                /// # Safety
                /// AVX2 and FMA; steps >= 1; rows and panel are readable for all steps.
                #[target_feature(enable = "avx2,fma")]
                pub(super) unsafe fn $name(acc: &mut [[__m256; 4]; $m], Steps { a, panel, steps, ahead, .. }: Steps<u16>) {
                    static ODD: [u32; 8] = [0xffff_0000; 8];
                    // SAFETY: reads what the caller vouches for; writes only the registers named.
                    unsafe {
                        asm!(
                            "vmovups ymm14, ymmword ptr [{odds}]",
                            "2:",
                            "prefetcht1 byte ptr [{ahead}]",
                            "prefetcht1 byte ptr [{ahead} + {stride}]",
                            $(concat!("vbroadcastss ", $x, ", dword ptr [{a} + ", $r, "*{row}]"),)*
                            $(
                                concat!("vmovups ymm15, ymmword ptr [{panel} + 32*", $y, "]"),
                                "vpslld ymm15, ymm15, 16",
                                $(concat!("vfmadd231ps ", $acc, ", ", $by, ", ymm15"),)*
                            )*
                            $(concat!("vbroadcastss ", $x, ", dword ptr [{a} + ", $r, "*{row} + {odd}]"),)*
                            $(
                                concat!($odd, ", ymmword ptr [{panel} + 32*", $y, "]"),
                                $mask,
                                $(concat!("vfmadd231ps ", $acc, ", ", $by, ", ymm15"),)*
                            )*
                            "add {a}, 4",
                            "sub {panel}, -128",
                            "lea {ahead}, [{ahead} + 2*{stride}]",
                            "dec {steps}",
                            "jnz 2b",
                            a = inout(reg) a => _,
                            panel = inout(reg) panel => _,
                            steps = inout(reg) steps => _,
                            ahead = inout(reg) ahead.line => _,
                            stride = in(reg) ahead.stride,
                            odds = in(reg) &ODD,
                            row = const 2 * PASS_STEPS * 4,
                            odd = const PASS_STEPS * 4,
                            $($(inout($acc) acc[$i][$y],)*)*
                            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                            options(readonly, nostack),
                        );
                    }
                }
            )*
        }
    };
}

broad_bf16! {
    rows_1: 1 ("vandps ymm15, ymm14" "") [0 "ymm12"]
        [0 0 "ymm0" "ymm12"] [1 0 "ymm1" "ymm12"] [2 0 "ymm2" "ymm12"] [3 0 "ymm3" "ymm12"];
    rows_2: 2 ("vandps ymm15, ymm14" "") [0 "ymm12" 1 "ymm13"]
        [0 0 "ymm0" "ymm12" 1 "ymm4" "ymm13"] [1 0 "ymm1" "ymm12" 1 "ymm5" "ymm13"] [2 0 "ymm2" "ymm12" 1 "ymm6" "ymm13"] [3 0 "ymm3" "ymm12" 1 "ymm7" "ymm13"];
    rows_3: 3 ("vmovups ymm15" "vandps ymm15, ymm15, ymmword ptr [{odds}]") [0 "ymm12" 1 "ymm13" 2 "ymm14"]
        [0 0 "ymm0" "ymm12" 1 "ymm4" "ymm13" 2 "ymm8" "ymm14"] [1 0 "ymm1" "ymm12" 1 "ymm5" "ymm13" 2 "ymm9" "ymm14"] [2 0 "ymm2" "ymm12" 1 "ymm6" "ymm13" 2 "ymm10" "ymm14"] [3 0 "ymm3" "ymm12" 1 "ymm7" "ymm13" 2 "ymm11" "ymm14"];
}

/// As `broad_bf16` in float32.
macro_rules! broad_f32 {
    ($($name:ident: $m:literal [$($at:tt $x:tt)*] $([$y:literal $($i:literal $acc:tt $by:tt)*])*;)*) => {
        mod broad_f32 {
            use super::*;
            $(
                /// # Safety
                /// AVX2 and FMA; steps >= 1; rows and panel are readable for all steps.
                #[target_feature(enable = "avx2,fma")]
                pub(super) unsafe fn $name(acc: &mut [[__m256; 4]; $m], Steps { a, lda, panel, steps, ahead }: Steps<f32>) {
                    // SAFETY: reads what the caller vouches for; writes only the registers named.
                    unsafe {
                        asm!(
                            "# {lda}", // A tile of one row has no other use for it.
                            "2:",
                            "prefetcht0 byte ptr [{ahead}]",
                            "prefetcht0 byte ptr [{ahead} + {stride}]",
                            $(concat!("vbroadcastss ", $x, ", dword ptr [", $at, "]"),)*
                            $(
                                concat!("vmovups ymm15, ymmword ptr [{panel} + 32*", $y, "]"),
                                $(concat!("vfmadd231ps ", $acc, ", ", $by, ", ymm15"),)*
                            )*
                            "add {a}, 4",
                            "sub {panel}, -128",
                            "lea {ahead}, [{ahead} + 2*{stride}]",
                            "dec {steps}",
                            "jnz 2b",
                            a = inout(reg) a => _,
                            lda = in(reg) 4 * lda,
                            panel = inout(reg) panel => _,
                            steps = inout(reg) steps => _,
                            ahead = inout(reg) ahead.line => _,
                            stride = in(reg) ahead.stride,
                            $($(inout($acc) acc[$i][$y],)*)*
                            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                            options(readonly, nostack),
                        );
                    }
                }
            )*
        }
    };
}

broad_f32! {
    rows_1: 1 ["{a}" "ymm12"]
        [0 0 "ymm0" "ymm12"] [1 0 "ymm1" "ymm12"] [2 0 "ymm2" "ymm12"] [3 0 "ymm3" "ymm12"];
    rows_2: 2 ["{a}" "ymm12" "{a} + {lda}" "ymm13"]
        [0 0 "ymm0" "ymm12" 1 "ymm4" "ymm13"] [1 0 "ymm1" "ymm12" 1 "ymm5" "ymm13"] [2 0 "ymm2" "ymm12" 1 "ymm6" "ymm13"] [3 0 "ymm3" "ymm12" 1 "ymm7" "ymm13"];
    rows_3: 3 ["{a}" "ymm12" "{a} + {lda}" "ymm13" "{a} + 2*{lda}" "ymm14"]
        [0 0 "ymm0" "ymm12" 1 "ymm4" "ymm13" 2 "ymm8" "ymm14"] [1 0 "ymm1" "ymm12" 1 "ymm5" "ymm13" 2 "ymm9" "ymm14"] [2 0 "ymm2" "ymm12" 1 "ymm6" "ymm13" 2 "ymm10" "ymm14"] [3 0 "ymm3" "ymm12" 1 "ymm7" "ymm13" 2 "ymm11" "ymm14"];
}

/// The lanes of register y that are columns of c, as the sign bits VMASKMOVPS looks at.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn lanes(n: usize, y: usize) -> __m256i {
    let count = n as i32 - 8 * y as i32;
    _mm256_cmpgt_epi32(
        _mm256_set1_epi32(count),
        _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
    )
}

/// The sums of a tile that stand in c.
///
/// # Safety
/// AVX2; c is readable where the corner says.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn read<T: Copy, const M: usize, const Y: usize>(
    product: &Product<T>,
    Corner {
        row,
        column,
        width: n,
    }: Corner,
) -> [[__m256; Y]; M] {
    let Product { c, ldc, .. } = *product;
    let mut sums = [[_mm256_setzero_ps(); Y]; M];
    for r in 0..M {
        for y in 0..Y {
            let c = c.wrapping_add((row + r) * ldc + column + 8 * y);
            // SAFETY: masked-off columns are not read; the others are the caller's.
            sums[r][y] = unsafe {
                match n == 8 * Y {
                    true => _mm256_loadu_ps(c),
                    // A masked load or store is some twenty operations on Zen: only where columns are missing.
                    false => _mm256_maskload_ps(c, lanes(n, y)),
                }
            };
        }
    }
    sums
}

/// # Safety
/// AVX2; c is writable where the corner says.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn write<T: Copy, const M: usize, const Y: usize>(
    sums: [[__m256; Y]; M],
    product: &Product<T>,
    Corner {
        row,
        column,
        width: n,
    }: Corner,
) {
    let Product { c, ldc, .. } = *product;
    for r in 0..M {
        for y in 0..Y {
            let c = c.wrapping_add((row + r) * ldc + column + 8 * y);
            // SAFETY: masked-off columns are not written; the others are the caller's.
            unsafe {
                match n == 8 * Y {
                    true => _mm256_storeu_ps(c, sums[r][y]),
                    false => _mm256_maskstore_ps(c, lanes(n, y), sums[r][y]),
                }
            }
        }
    }
}

/// # Safety
/// AVX2; for [`Sum::Continue`], c is readable where the corner says.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn start<T: Copy, const M: usize, const Y: usize>(
    product: &Product<T>,
    corner: Corner,
) -> [[__m256; Y]; M] {
    match product.sum {
        // SAFETY: the caller's contract.
        Sum::Continue => unsafe { read(product, corner) },
        _ => [[_mm256_setzero_ps(); Y]; M],
    }
}

/// # Safety
/// AVX2; c is readable and writable where the corner says.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn finish<T: Copy, const M: usize, const Y: usize>(
    mut acc: [[__m256; Y]; M],
    product: &Product<T>,
    corner: Corner,
) {
    // SAFETY: the caller's contract.
    unsafe {
        if product.sum == Sum::Add {
            let before = read::<T, M, Y>(product, corner);
            for r in 0..M {
                for y in 0..Y {
                    acc[r][y] = _mm256_add_ps(before[r][y], acc[r][y]);
                }
            }
        }
        write(acc, product, corner);
    }
}

/// `before + scale * sum + offset * total` of a row's 8 columns from `column`.
///
/// # Safety
/// AVX2 and FMA; the scaling is readable for the row and the columns' panel.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn scaled(
    sum: __m256,
    before: __m256,
    scaling: &Scaling,
    row: usize,
    column: usize,
) -> __m256 {
    let at = column / PANEL * scaling.panel_stride + column % PANEL;
    // SAFETY: all 32 columns of a panel have scales, and offsets if there are any: the caller vouches.
    unsafe {
        let value = _mm256_fmadd_ps(sum, _mm256_loadu_ps(scaling.scales.add(at)), before);
        if scaling.offsets.is_null() {
            return value;
        }
        let total = _mm256_set1_ps(*scaling.totals.add(row * scaling.totals_stride));
        _mm256_fmadd_ps(total, _mm256_loadu_ps(scaling.offsets.add(at)), value)
    }
}

/// # Safety
/// The CPU has AVX2. The slices are equally long.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn round_bf16(from: &[f32], to: &mut [u16]) {
    // Plain arithmetic, which the compiler vectorises. Adding 0x7fff plus the lowest kept bit carries into the kept
    // half exactly when round-to-nearest-even goes up; a NaN is made quiet instead, or the carry could make it infinite.
    for (from, to) in from.iter().zip(to) {
        let bits = from.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let nan = bits >> 16 | 0x40;
        *to = (if from.is_nan() { nan } else { rounded }) as u16;
    }
}

/// # Safety
/// The CPU has AVX2 and F16C. The slices are equally long.
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn widen_f16(from: &[u16], to: &mut [f32]) {
    let (blocks, rest) = from.as_chunks::<8>();
    let (to_blocks, to_rest) = to.as_chunks_mut::<8>();
    for (from, to) in blocks.iter().zip(to_blocks) {
        // SAFETY: 8 halves are read and 8 floats written, the lengths of the arrays.
        unsafe {
            let halves = _mm_loadu_si128(from.as_ptr().cast());
            _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(halves));
        }
    }
    for (from, to) in rest.iter().zip(to_rest) {
        *to = half::f16::from_bits(*from).to_f32();
    }
}
