//! The bfloat16 micro-kernel in AMX: a tile register holds 16 rows of 64 bytes, and one instruction multiplies 16 rows of
//! pairs with 16 lines of a panel. Two tiles of rows times two of columns need four loads for four products, which is what
//! keeps the unit busy; few rows take one tile of rows and up to four of columns, and wait for memory.
//!
//! # Order of summation
//! TDPBF16PS sums 16 steps apart (the even values of K in one chain, the odd ones in another, then both together) and adds
//! that to the accumulator. So sums depend on where K is cut into sixteens, and nobody cuts it elsewhere ([`super::GRAIN`]).
//! The last, shorter piece is padded with zeroes, which change no sum.
//!
//! # Tile registers
//! Stable Rust has no AMX: a block of tiles is one piece of assembly from its first load to its last store, so that no
//! value lives in a tile register between two of them. What does live on is the shape of the tiles, which takes about as
//! long to set as twenty products: a thread sets it when it changes and gives it back behind a job ([`rest`]), before
//! anything else computes on that thread. Columns and steps of all tiles are 16; rows are 16 too, or fewer for a product
//! of fewer. Of more rows that are no multiple of 16 the last 16 are computed, some of them for the second time.

mod block;

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;

use super::{FEW_ROWS, GRAIN, PANEL, PASS_STEPS, Product};
use crate::machine::tiles;
use block::{Block, Tail};

/// Rows, and columns, of a tile.
const TILE: usize = 16;
/// Elements of 16 steps of a panel.
const PIECE: usize = GRAIN * 2 * PANEL;
/// Columns of a pass over many rows: a piece of the rows of two tiles then stays in the nearest cache for four panels.
const WIDE: usize = 4 * PANEL;
/// How far ahead of its use a panel line is asked for when rows are few.
const PREFETCH_BYTES: usize = 8192;

const _: () = assert!(FEW_ROWS == TILE);

thread_local! {
    /// Rows of this thread's tiles; 0: they have no shape.
    static HEIGHT: Cell<usize> = const { Cell::new(0) };
}

/// What LDTILECFG reads: palette 1, of each of eight tiles the bytes of a row and the rows.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// # Safety
/// The CPU has AMX, and the process the permission.
unsafe fn shape(height: usize) {
    if HEIGHT.get() == height {
        return;
    }
    let mut shape = Shape {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    shape.row_bytes[..8].fill(64);
    // Sums and rows are of the height, tiles 6 and 7 are pieces of panels.
    shape.rows[..8].fill(height as u8);
    shape.rows[6..8].fill(TILE as u8);
    // SAFETY: reads the 64 bytes of a valid shape; tile registers hold nothing (see the head of this file).
    unsafe {
        asm!("ldtilecfg [{shape}]", shape = in(reg) &raw const shape, options(nostack, preserves_flags, readonly));
    }
    HEIGHT.set(height);
}

/// Gives this thread's tiles back, so that the system need not save them, and other code finds them as it expects.
pub(super) fn rest() {
    if HEIGHT.replace(0) != 0 {
        // SAFETY: tiles have a shape, so the CPU has AMX; they hold nothing.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// As many times four products of 16 rows as fast as the unit can, of nothing: for measuring.
pub(crate) fn multiply(rounds: usize) {
    assert!(tiles::permitted(), "the caller asked");
    // SAFETY: permitted; the sums are never looked at.
    unsafe {
        shape(TILE);
        asm!(
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}", "jnz 2b",
            rounds = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, nomem),
        );
    }
    rest();
}

pub(super) fn pass_columns(m: usize) -> usize {
    if m <= FEW_ROWS { 2 * PANEL } else { WIDE }
}

pub(super) fn pass_steps(m: usize) -> usize {
    if m <= FEW_ROWS { usize::MAX } else { PASS_STEPS }
}

#[repr(align(64))]
struct Aligned<T>(MaybeUninit<T>);

impl<T> Aligned<T> {
    fn new() -> Aligned<T> {
        Aligned(MaybeUninit::uninit())
    }

    fn ptr<E>(&mut self) -> *mut E {
        self.0.as_mut_ptr().cast()
    }
}

/// `c (+)= a * panels` with bfloat16 operands and float32 sums.
///
/// # Safety
/// The CPU has AMX-BF16 and AVX-512, the process the permission; as [`super::product`] with n <= [`pass_columns`] and
/// steps <= [`pass_steps`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pass_bf16(product: &Product<u16>) {
    let Product {
        m,
        steps,
        a,
        lda,
        panels,
        panel_stride,
        n,
        ..
    } = *product;
    let n_panels = n.div_ceil(PANEL);
    let (pieces, rest) = (steps / GRAIN, steps % GRAIN);
    // The last steps of the panels, and of the rows of a block, with zeroes behind them.
    let mut panel_ends = Aligned::<[[u16; PIECE]; WIDE / PANEL]>::new();
    let mut row_ends = Aligned::<[[u16; 2 * GRAIN]; 2 * TILE]>::new();
    // SAFETY: rows, steps and columns are those for which the caller vouches; the ends have room for all panels of a pass
    // and all rows of a block.
    unsafe {
        shape(m.min(TILE));
        let mut tail = Tail {
            rows: std::ptr::null(),
            panels: std::ptr::null(),
        };
        if rest > 0 {
            let ends: *mut u16 = panel_ends.ptr();
            for panel in 0..n_panels {
                let (from, to) = (
                    panels.add(panel * panel_stride + pieces * PIECE),
                    ends.add(panel * PIECE),
                );
                std::ptr::copy_nonoverlapping(from, to, rest * 2 * PANEL);
                std::ptr::write_bytes(to.add(rest * 2 * PANEL), 0, PIECE - rest * 2 * PANEL);
            }
            tail = Tail {
                rows: row_ends.ptr::<u16>(),
                panels: ends,
            };
        }
        for row in (0..m).step_by(2 * TILE) {
            let two = m - row > TILE;
            let height = m.min(TILE);
            // The last tile ends with the last row.
            let firsts = [row, row + TILE].map(|row| row.min(m - height));
            if rest > 0 {
                let ends = row_ends.ptr::<u16>();
                for (tile, first) in firsts.into_iter().enumerate().take(1 + usize::from(two)) {
                    let from = a.add(first * lda + pieces * 2 * GRAIN);
                    fill_ends(from, lda, height, rest, ends.add(tile * TILE * 2 * GRAIN));
                }
            }
            for panel in (0..n_panels).step_by(if two { 1 } else { 2 }) {
                let block = Block {
                    row,
                    firsts,
                    two_tiles: two,
                    height,
                    panel,
                    pieces,
                    tail: tail.of_panel(panel),
                };
                block.run(product);
            }
        }
    }
}

/// The last steps of some rows, zeroes behind them.
///
/// # Safety
/// AVX-512; `from` is readable for the steps of n rows, `to` writable for n rows of 16 steps.
#[target_feature(enable = "avx512f")]
unsafe fn fill_ends(from: *const u16, lda: usize, n: usize, steps: usize, to: *mut u16) {
    let lanes = ((1u32 << steps) - 1) as u16;
    for row in 0..n {
        // SAFETY: masked-off steps are not read.
        unsafe {
            let steps = _mm512_maskz_loadu_epi32(lanes, from.add(row * lda).cast());
            _mm512_storeu_si512(to.add(row * 2 * GRAIN).cast(), steps);
        }
    }
}
