//! One block of tiles of a pass: its assembly, and the way of its sums to c.

#![allow(clippy::needless_range_loop)] // Registers are indexed by group.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::offset_of;

use super::{Aligned, GRAIN, PANEL, PIECE, PREFETCH_BYTES, TILE};
use crate::simd::avx512::lanes;
use crate::simd::{Product, Scaling, Sum};

/// A last, shorter piece of K, padded; null where there is none.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Tail {
    /// `[32][16 steps]`
    pub rows: *const u16,
    /// Of this and the following panels.
    pub panels: *const u16,
}

impl Tail {
    pub fn of_panel(self, panel: usize) -> Tail {
        Tail {
            panels: self.panels.wrapping_add(panel * PIECE),
            ..self
        }
    }
}

/// Two tiles of rows and a panel, or one and up to two panels.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// The first row that is new.
    pub row: usize,
    /// The first rows of the tiles.
    pub firsts: [usize; 2],
    pub two_tiles: bool,
    /// Rows of a tile.
    pub height: usize,
    /// The first panel.
    pub panel: usize,
    /// Of 16 steps.
    pub pieces: usize,
    pub tail: Tail,
}

/// What the assembly reads from memory, for want of registers.
#[repr(C)]
struct Counts {
    /// Pieces of one sum.
    pieces: usize,
    /// Sums that follow one another along K.
    sums: usize,
    /// Bytes between the places of two sums.
    sum_bytes: usize,
    /// Whether a sum begins with what stands where it goes.
    continues: usize,
    tail: Tail,
}

/// Where the sums of the tiles go.
struct Place {
    tiles: [*mut f32; 2],
    stride: usize,
}

/// Sums over groups that wait, side by side, to be scaled.
const GROUPS: usize = 4;
/// Elements of the sums of a block.
const SUMS: usize = 2 * TILE * PANEL;

/// A block of tiles from its first load to its last store. `step` multiplies one piece; the tail is the same step once
/// more, elsewhere.
macro_rules! tiles {
    ($counts:expr, load [$($load:literal),*], zero [$($zero:literal),*], step [$($step:expr),*], next [$($next:literal),*],
     tail [$($at_tail:literal),*], store [$($store:literal),*], $($operands:tt)*) => {
        asm!(
            "7:", "cmp qword ptr [{counts} + {continues}], 0", "je 2f", $($load,)* "jmp 3f",
            "2:", $($zero,)*
            "3:", "mov {count}, [{counts} + {pieces}]", "test {count}, {count}", "jz 5f",
            "4:", $($step,)* $($next,)* "dec {count}", "jnz 4b",
            "5:", "cmp qword ptr [{counts} + {tail_rows}], 0", "je 6f",
            $($at_tail,)* "mov {a_stride}, 64", "mov {count}, 1", "mov qword ptr [{counts} + {tail_rows}], 0", "jmp 4b",
            "6:", $($store,)* "dec qword ptr [{counts} + {sums}]", "jnz 7b",
            counts = in(reg) &raw mut $counts,
            count = out(reg) _,
            b_stride = in(reg) 4 * PANEL,
            pieces = const offset_of!(Counts, pieces),
            sums = const offset_of!(Counts, sums),
            sum_bytes = const offset_of!(Counts, sum_bytes),
            continues = const offset_of!(Counts, continues),
            tail_rows = const offset_of!(Counts, tail.rows),
            tail_panels = const offset_of!(Counts, tail.panels),
            $($operands)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// Asks for the 32 lines of a piece of a panel.
macro_rules! ask_for {
    ($b:literal) => {
        concat!(
            ".irp line, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n",
            "prefetcht0 [{", $b, "} + {ahead} + 64 * \\line]\n",
            ".endr"
        )
    };
}

impl Block {
    /// All of the block's sums, brought to c.
    ///
    /// # Safety
    /// As [`super::pass_bf16`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub unsafe fn run(&self, product: &Product<u16>) {
        let Product { n, c, ldc, sum, .. } = *product;
        let Block {
            row,
            firsts,
            two_tiles,
            height,
            panel,
            pieces,
            tail,
        } = *self;
        let column = panel * PANEL;
        let width = if two_tiles { PANEL } else { 2 * PANEL };
        let columns = width.min(n - column);
        let again = firsts[usize::from(two_tiles)] < row + TILE * usize::from(two_tiles);
        let counts = Counts {
            pieces,
            sums: 1,
            sum_bytes: 0,
            continues: usize::from(sum == Sum::Continue),
            tail,
        };
        // SAFETY: the rows, the panels and the columns of c are the caller's.
        unsafe {
            if columns.is_multiple_of(PANEL) && (sum == Sum::Set || sum == Sum::Continue && !again) {
                let place = Place {
                    tiles: firsts.map(|row| c.wrapping_add(row * ldc + column)),
                    stride: ldc,
                };
                return self.tiles(product, 0, place, counts);
            }
            let mut apart = Aligned::<[f32; GROUPS * SUMS]>::new();
            let sums: *mut f32 = apart.ptr();
            let place = || Place {
                tiles: [sums, sums.wrapping_add(TILE * width)],
                stride: width,
            };
            // The new rows of each tile, and where the tile's sums lie.
            let new = [
                row..firsts[0] + height,
                (row + TILE).max(firsts[1])..firsts[1] + height,
            ];
            let new = new.into_iter().zip(firsts).zip(place().tiles);
            let new = new.take(1 + usize::from(two_tiles));
            if let Sum::Scaled(scaling) = sum {
                let group_pieces = scaling.group_steps / GRAIN;
                let groups = match tail.rows.is_null() {
                    true => pieces / group_pieces,
                    false => 1,
                };
                for group in (0..groups).step_by(GROUPS) {
                    let waiting = GROUPS.min(groups - group);
                    let counts = Counts {
                        pieces: pieces / groups,
                        sums: waiting,
                        sum_bytes: 4 * SUMS,
                        ..counts
                    };
                    self.tiles(product, group * group_pieces, place(), counts);
                    let scaling = scaling.of_group(group).of_panel(panel);
                    for ((rows, first), sums) in new.clone() {
                        let part = Waiting {
                            from: sums.wrapping_add((rows.start - first) * width),
                            stride: width,
                            to: c.wrapping_add(rows.start * ldc + column),
                            ldc,
                            columns,
                            scaling: Scaling {
                                totals: scaling.totals.wrapping_add(rows.start * scaling.totals_stride),
                                ..scaling
                            },
                            rows: rows.len(),
                        };
                        match waiting {
                            1 => part.scale::<1>(),
                            2 => part.scale::<2>(),
                            3 => part.scale::<3>(),
                            _ => part.scale::<GROUPS>(),
                        }
                    }
                }
                return;
            }
            if sum == Sum::Continue {
                for (first, to) in firsts
                    .into_iter()
                    .zip(place().tiles)
                    .take(1 + usize::from(two_tiles))
                {
                    for i in 0..height {
                        let from = c.wrapping_add((first + i) * ldc + column);
                        copy(from, columns, to.wrapping_add(i * width), width);
                    }
                }
            }
            self.tiles(product, 0, place(), counts);
            for ((rows, first), sums) in new {
                for row in rows {
                    let from = sums.wrapping_add((row - first) * width);
                    give(from, c.wrapping_add(row * ldc + column), columns, sum == Sum::Add);
                }
            }
        }
    }

    /// Sums from piece `skipped` on into their place.
    ///
    /// # Safety
    /// As [`super::pass_bf16`]; the place is as large as the tiles, for all sums of `counts`.
    #[inline]
    unsafe fn tiles(&self, product: &Product<u16>, skipped: usize, place: Place, mut counts: Counts) {
        let Place { tiles, stride } = place;
        let a = self
            .firsts
            .map(|row| product.a.wrapping_add(row * product.lda + skipped * 2 * GRAIN));
        let a_stride = 2 * product.lda;
        let b = product
            .panels
            .wrapping_add(self.panel * product.panel_stride + skipped * PIECE);
        let two_panels = product.n > (self.panel + 1) * PANEL;
        let levels = matches!(product.sum, Sum::Scaled(_));
        macro_rules! two_by_two {
            ([$($ask:tt)*], $($operands:tt)*) => {
                tiles!(
                    counts,
                    load [
                        "tileloadd tmm0, [{c0} + {c_stride}]", "tileloadd tmm1, [{c0} + {c_stride} + 64]",
                        "tileloadd tmm2, [{c1} + {c_stride}]", "tileloadd tmm3, [{c1} + {c_stride} + 64]"
                    ],
                    zero ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
                    step [
                        $($ask)*
                        "tileloadd tmm4, [{a0} + {a_stride}]",
                        "tileloadd tmm6, [{b} + {b_stride}]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{b} + {b_stride} + 64]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{a1} + {a_stride}]",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7"
                    ],
                    next ["add {a0}, 64", "add {a1}, 64", "add {b}, 2048"],
                    tail [
                        "mov {a0}, [{counts} + {tail_rows}]", "lea {a1}, [{a0} + 1024]",
                        "mov {b}, [{counts} + {tail_panels}]"
                    ],
                    store [
                        "tilestored [{c0} + {c_stride}], tmm0", "tilestored [{c0} + {c_stride} + 64], tmm1",
                        "tilestored [{c1} + {c_stride}], tmm2", "tilestored [{c1} + {c_stride} + 64], tmm3",
                        "add {c0}, [{counts} + {sum_bytes}]", "add {c1}, [{counts} + {sum_bytes}]"
                    ],
                    a0 = inout(reg) a[0] => _,
                    a1 = inout(reg) a[1] => _,
                    a_stride = inout(reg) a_stride => _,
                    b = inout(reg) b => _,
                    c0 = inout(reg) tiles[0] => _,
                    c1 = inout(reg) tiles[1] => _,
                    c_stride = in(reg) 4 * stride,
                    $($operands)*
                )
            };
        }
        macro_rules! one_by_four {
            ([$($ask:tt)*], $($operands:tt)*) => {
                tiles!(
                    counts,
                    load [
                        "tileloadd tmm0, [{c} + {c_stride}]", "tileloadd tmm1, [{c} + {c_stride} + 64]",
                        "tileloadd tmm2, [{c} + {c_stride} + 128]", "tileloadd tmm3, [{c} + {c_stride} + 192]"
                    ],
                    zero ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
                    step [
                        $($ask)*
                        "tileloadd tmm4, [{a} + {a_stride}]",
                        "tileloadd tmm6, [{b0} + {b_stride}]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{b0} + {b_stride} + 64]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm6, [{b1} + {b_stride}]",
                        "tdpbf16ps tmm2, tmm4, tmm6",
                        "tileloadd tmm7, [{b1} + {b_stride} + 64]",
                        "tdpbf16ps tmm3, tmm4, tmm7"
                    ],
                    next ["add {a}, 64", "add {b0}, 2048", "add {b1}, 2048"],
                    tail [
                        "mov {a}, [{counts} + {tail_rows}]", "mov {b0}, [{counts} + {tail_panels}]",
                        "lea {b1}, [{b0} + 2048]"
                    ],
                    store [
                        "tilestored [{c} + {c_stride}], tmm0", "tilestored [{c} + {c_stride} + 64], tmm1",
                        "tilestored [{c} + {c_stride} + 128], tmm2", "tilestored [{c} + {c_stride} + 192], tmm3",
                        "add {c}, [{counts} + {sum_bytes}]"
                    ],
                    a = inout(reg) a[0] => _,
                    a_stride = inout(reg) a_stride => _,
                    b0 = inout(reg) b => _,
                    b1 = inout(reg) b.wrapping_add(product.panel_stride) => _,
                    c = inout(reg) tiles[0] => _,
                    c_stride = in(reg) 4 * stride,
                    $($operands)*
                )
            };
        }
        // SAFETY: the caller's contract; the steps of a tail lie in buffers of whole pieces.
        unsafe {
            match (self.two_tiles, two_panels) {
                // The first rows find the panel in memory, those after them in a cache, and levels are there for all.
                (true, _) if self.row == 0 && !levels => {
                    two_by_two!([ask_for!("b"),], ahead = const PREFETCH_BYTES,)
                }
                (true, _) => two_by_two!([],),
                (_, true) if !levels => {
                    one_by_four!([ask_for!("b0"), ask_for!("b1"),], ahead = const PREFETCH_BYTES,)
                }
                (_, true) => one_by_four!([],),
                (false, false) => tiles!(
                    counts,
                    load ["tileloadd tmm0, [{c} + {c_stride}]", "tileloadd tmm1, [{c} + {c_stride} + 64]"],
                    zero ["tilezero tmm0", "tilezero tmm1"],
                    step [
                        ask_for!("b0"),
                        "tileloadd tmm4, [{a} + {a_stride}]",
                        "tileloadd tmm6, [{b0} + {b_stride}]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{b0} + {b_stride} + 64]",
                        "tdpbf16ps tmm1, tmm4, tmm7"
                    ],
                    next ["add {a}, 64", "add {b0}, 2048"],
                    tail ["mov {a}, [{counts} + {tail_rows}]", "mov {b0}, [{counts} + {tail_panels}]"],
                    store [
                        "tilestored [{c} + {c_stride}], tmm0", "tilestored [{c} + {c_stride} + 64], tmm1",
                        "add {c}, [{counts} + {sum_bytes}]"
                    ],
                    a = inout(reg) a[0] => _,
                    a_stride = inout(reg) a_stride => _,
                    b0 = inout(reg) b => _,
                    c = inout(reg) tiles[0] => _,
                    c_stride = in(reg) 4 * stride,
                    ahead = const PREFETCH_BYTES,
                ),
            }
        }
    }
}

/// Columns of c to a row of a place apart, whose other columns become zero.
///
/// # Safety
/// AVX-512; n columns are readable, and the row as wide as it is said to be.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn copy(from: *const f32, n: usize, to: *mut f32, width: usize) {
    for z in 0..width / 16 {
        // SAFETY: masked-off columns are not read.
        unsafe {
            let value = _mm512_maskz_loadu_ps(lanes(n, z), from.wrapping_add(16 * z));
            _mm512_storeu_ps(to.add(16 * z), value);
        }
    }
}

/// A row of sums to columns of c, or added to them.
///
/// # Safety
/// AVX-512; n columns are readable and writable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn give(from: *const f32, to: *mut f32, n: usize, add: bool) {
    for z in 0..n.div_ceil(16) {
        // SAFETY: masked-off columns are neither read nor written.
        unsafe {
            let (to, lanes) = (to.wrapping_add(16 * z), lanes(n, z));
            let mut value = _mm512_loadu_ps(from.add(16 * z));
            if add {
                value = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), value);
            }
            _mm512_mask_storeu_ps(to, lanes, value);
        }
    }
}

/// Sums over groups, [`SUMS`] apart, and where they are added to, scaled.
struct Waiting {
    from: *const f32,
    stride: usize,
    rows: usize,
    to: *mut f32,
    ldc: usize,
    columns: usize,
    /// Of the first group and row.
    scaling: Scaling,
}

impl Waiting {
    /// # Safety
    /// AVX-512; the columns are readable and writable, and the scaling is readable for them and N groups.
    #[target_feature(enable = "avx512f")]
    unsafe fn scale<const N: usize>(&self) {
        let Waiting { scaling, .. } = *self;
        for z in 0..self.columns.div_ceil(16) {
            let lanes = lanes(self.columns, z);
            // SAFETY: masked-off columns are neither read nor written; a panel has 32 scales of each group.
            unsafe {
                let at = z / 2 * scaling.panel_stride + z % 2 * 16;
                let scales: [__m512; N] =
                    std::array::from_fn(|group| _mm512_loadu_ps(scaling.scales.add(at + group * PANEL)));
                for row in 0..self.rows {
                    let from = self.from.wrapping_add(row * self.stride + 16 * z);
                    let to = self.to.wrapping_add(row * self.ldc + 16 * z);
                    let mut value = _mm512_maskz_loadu_ps(lanes, to);
                    for group in 0..N {
                        let sum = _mm512_loadu_ps(from.wrapping_add(group * SUMS));
                        value = _mm512_fmadd_ps(sum, scales[group], value);
                        if !scaling.offsets.is_null() {
                            let offsets = _mm512_loadu_ps(scaling.offsets.add(at + group * PANEL));
                            let total = *scaling.totals.add(row * scaling.totals_stride + group);
                            value = _mm512_fmadd_ps(_mm512_set1_ps(total), offsets, value);
                        }
                    }
                    _mm512_mask_storeu_ps(to, lanes, value);
                }
            }
        }
    }
}
