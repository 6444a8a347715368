//! The micro-kernels every matrix product of this crate ends in: rows times a packed panel of 32 columns, and the
//! rounding of float32 rows to bfloat16. Knows neither tensors nor threads; `linear`, `matmul` and `attention` do.
//!
//! # Panels
//! A panel holds 32 columns, the reduction (K) outermost, so a step reads 128 adjacent bytes:
//! - bfloat16 `[K/2][32][2]`: the operand layout of VDPBF16PS, which multiplies pairs; an odd K is padded with a zero;
//! - float32 `[K][32]`.
//!
//! # One order of summation
//! Every output element is one accumulator that runs over K from first to last, whatever the number of rows or
//! columns of the call, so a row's bits do not depend on its neighbours. A reduction cut into pieces
//! ([`Sum::Continue`]) at multiples of [`GRAIN`] steps gives the same bits as one in a single call, and this file cuts long
//! ones itself, to keep the piece of the panel in the nearest cache for all rows. The latency of the chain is hidden by
//! more columns when rows are few, never by splitting K. (AVX2, AVX-512 and AMX round differently from one another: what
//! one instruction sums is a product, a pair, sixteen pairs. A machine uses one of them, for any number of rows.)

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod codes;
pub(crate) mod pack;
#[cfg(any(test, not(target_arch = "x86_64")))]
mod plain;

use half::f16;

use crate::gpu;
use crate::machine::features;
use crate::weight::Grid;
#[cfg(not(target_arch = "x86_64"))]
use {plain as amx, plain as avx2, plain as avx512};

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;
/// Steps of one pass over all rows, 128 bytes of each panel a step: a piece of a panel is then at hand for all rows.
pub(crate) const PASS_STEPS: usize = 256;

/// Steps that AMX sums apart from those before: cuts of K are at multiples of it, counted from the first value.
pub(crate) const GRAIN: usize = 16;

/// Up to this many rows a product is bound by reading its panels.
pub(crate) const FEW_ROWS: usize = 16;

/// Whether the functions of this file may be called.
pub(crate) fn available() -> bool {
    features().avx2 && gpu::emulating().is_none()
}

/// What happens to what stands in `c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sum {
    /// c = sum
    Set,
    /// The accumulators start from c: the next piece of a reduction cut along K.
    Continue,
    /// c = c + sum, the sum being formed alone first (a large c then costs the small terms no bits).
    Add,
    /// c = c + scale * sum + offset * total of the row's left side, for each group of a quantised weight in turn. The steps
    /// of all groups are at most [`PASS_STEPS`].
    Scaled(Scaling),
}

/// What the sums over one group of codes are multiplied with, by column, before they are added to c.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scaling {
    /// Steps of a group; those of the product are as many groups.
    pub group_steps: usize,
    /// 32 scales for the columns of the first panel, then those of the following groups.
    pub scales: *const f32,
    /// 32 offsets likewise, or null for none.
    pub offsets: *const f32,
    /// Between the scales, and the offsets, of neighbouring panels.
    pub panel_stride: usize,
    /// The sums of each row's left side over the groups, rows `totals_stride` apart. Not read without offsets.
    pub totals: *const f32,
    pub totals_stride: usize,
    /// The codes that are decoded next.
    pub ahead: Ahead,
}

/// What memory is asked for while a panel is multiplied: a line at each step of the first rows, which is a pace that memory
/// keeps. (All at once, while codes are decoded, the processor waits for most of it.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    pub line: *const u8,
    /// Bytes between what two steps ask for.
    pub stride: usize,
}

impl Ahead {
    /// Asks for what is at hand.
    pub fn nothing(line: *const u8) -> Ahead {
        Ahead { line, stride: 0 }
    }

    pub fn of_step(self, step: usize) -> Ahead {
        Ahead {
            line: self.line.wrapping_add(step * self.stride),
            ..self
        }
    }
}

impl Scaling {
    /// For the columns that begin with panel `index`.
    pub fn of_panel(self, index: usize) -> Scaling {
        self.skipping(index * self.panel_stride)
    }

    /// For the groups that begin with `index`.
    pub fn of_group(self, index: usize) -> Scaling {
        Scaling {
            totals: self.totals.wrapping_add(index),
            ahead: self.ahead.of_step(index * self.group_steps),
            ..self.skipping(index * PANEL)
        }
    }

    fn skipping(self, skipped: usize) -> Scaling {
        Scaling {
            scales: self.scales.wrapping_add(skipped),
            offsets: match self.offsets.is_null() {
                true => self.offsets,
                false => self.offsets.wrapping_add(skipped),
            },
            ..self
        }
    }
}

/// One product `c[m][n] (+)= a[m][K] * panels`, with `T` the bits of bfloat16 (`u16`) or `f32`.
#[derive(Clone, Copy)]
pub(crate) struct Product<T> {
    pub m: usize,
    /// Steps of the reduction, [`Element::steps`].
    pub steps: usize,
    pub a: *const T,
    /// Elements between rows of `a`. Rows a multiple of 4 KiB apart compete for one set of the first-level cache:
    /// where the caller chooses, an odd number of cache lines is best.
    pub lda: usize,
    /// The first panel; the panel of columns 32 j.. starts `j * panel_stride` elements behind it.
    pub panels: *const T,
    pub panel_stride: usize,
    /// Columns; the last panel may be used in part, and only n columns of c are touched.
    pub n: usize,
    pub c: *mut f32,
    /// Elements between rows of `c`.
    pub ldc: usize,
    pub sum: Sum,
}

/// What multiplies bfloat16.
#[derive(Clone, Copy)]
enum Unit {
    Amx,
    Avx512,
    Avx2,
}

fn bf16_unit() -> Unit {
    let features = features();
    match (features.amx, features.avx512bf16) {
        (true, _) => Unit::Amx,
        (_, true) => Unit::Avx512,
        _ => Unit::Avx2,
    }
}

/// Gives back what products hold of this thread's processor: behind a job, before other code computes.
pub(crate) fn rest() {
    #[cfg(target_arch = "x86_64")]
    amx::rest();
}

/// An operand type of the micro-kernels.
pub(crate) trait Element: Copy + Default + Send + Sync + 'static {
    /// Values of K in a step: 2 (a pair) for bfloat16, 1 for float32. A step of a panel is 32 times as many elements.
    const PER_STEP: usize;

    fn steps(k: usize) -> usize {
        k.div_ceil(Self::PER_STEP)
    }

    /// Elements of a panel over k values.
    fn panel_len(k: usize) -> usize {
        Self::steps(k) * Self::PER_STEP * PANEL
    }

    /// Rounds float32 to this type; `to` may be longer by a padding, which is zeroed.
    fn round(from: &[f32], to: &mut [Self]);

    /// Takes the bits of bfloat16, exactly; `to` may be longer by a padding, which is zeroed.
    fn from_bf16(from: &[u16], to: &mut [Self]);

    /// Rounds the bits of IEEE half precision; `to` may be longer by a padding, which is zeroed.
    fn from_f16(from: &[f16], to: &mut [Self]) {
        for (from, to) in from.chunks(PANEL).zip(to.chunks_mut(PANEL)) {
            let mut wide = [0.0; PANEL];
            from.iter()
                .zip(&mut wide)
                .for_each(|(from, wide)| *wide = from.to_f32());
            Self::round(&wide[..from.len()], to);
        }
        to[from.len()..].fill(Self::default());
    }

    /// As a float32, exactly.
    fn widen(self) -> f32;

    /// Lines of codes into a panel of levels of this type.
    ///
    /// # Safety
    /// As [`codes::to_bf16`].
    unsafe fn decode(grid: Grid, from: *const u8, lines: usize, to: *mut Self);

    /// The most columns [`Element::pass`] takes for m rows.
    fn pass_columns(m: usize) -> usize;

    /// The most steps it takes.
    fn pass_steps(m: usize) -> usize;

    /// Whether it takes several groups of as many steps, [`Sum::Scaled`].
    fn pass_groups(group_steps: usize) -> bool;

    /// All rows times a few panels in one pass over K, each panel's piece staying in the nearest caches.
    ///
    /// # Safety
    /// As [`product`], with n <= [`Element::pass_columns`] and steps <= [`Element::pass_steps`].
    unsafe fn pass(product: &Product<Self>);
}

impl Element for u16 {
    const PER_STEP: usize = 2;

    fn round(from: &[f32], to: &mut [Self]) {
        round_bf16(from, to);
    }

    fn from_bf16(from: &[u16], to: &mut [Self]) {
        let (to, padding) = to.split_at_mut(from.len());
        to.copy_from_slice(from);
        padding.fill(0);
    }

    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    unsafe fn decode(grid: Grid, from: *const u8, lines: usize, to: *mut Self) {
        // SAFETY: the caller's contract.
        unsafe { codes::to_bf16(grid, from, lines, to) }
    }

    fn pass_columns(m: usize) -> usize {
        match bf16_unit() {
            Unit::Amx => amx::pass_columns(m),
            Unit::Avx512 => avx512::pass_columns(m),
            // Rows are widened once for all columns of a pass; few rows rather leave the panels one stream of memory.
            Unit::Avx2 if m <= FEW_ROWS => PANEL,
            Unit::Avx2 => 4 * PANEL,
        }
    }

    fn pass_steps(m: usize) -> usize {
        match bf16_unit() {
            Unit::Amx => amx::pass_steps(m),
            Unit::Avx512 => avx512::pass_steps(m),
            Unit::Avx2 => PASS_STEPS,
        }
    }

    fn pass_groups(group_steps: usize) -> bool {
        match bf16_unit() {
            Unit::Amx => group_steps.is_multiple_of(GRAIN),
            _ => true,
        }
    }

    unsafe fn pass(product: &Product<Self>) {
        // SAFETY: the instruction sets were asked for; the rest is the caller's contract.
        unsafe {
            match bf16_unit() {
                Unit::Amx => amx::pass_bf16(product),
                Unit::Avx512 => avx512::pass_bf16(product),
                Unit::Avx2 => avx2::pass_bf16(product),
            }
        }
    }
}

impl Element for f32 {
    const PER_STEP: usize = 1;

    fn round(from: &[f32], to: &mut [Self]) {
        let (to, padding) = to.split_at_mut(from.len());
        to.copy_from_slice(from);
        padding.fill(0.0);
    }

    fn from_bf16(from: &[u16], to: &mut [Self]) {
        let (to, padding) = to.split_at_mut(from.len());
        from.iter().zip(to).for_each(|(&from, to)| *to = from.widen());
        padding.fill(0.0);
    }

    fn widen(self) -> f32 {
        self
    }

    unsafe fn decode(grid: Grid, from: *const u8, lines: usize, to: *mut Self) {
        // SAFETY: the caller's contract.
        unsafe { codes::to_f32(grid, from, lines, to) }
    }

    fn pass_columns(m: usize) -> usize {
        match features().avx512f {
            true => avx512::pass_columns(m),
            false => {
                if m == 1 {
                    2 * PANEL
                } else {
                    PANEL
                }
            }
        }
    }

    fn pass_steps(m: usize) -> usize {
        match features().avx512f {
            true => avx512::pass_steps(m),
            // One tile, and nothing to share between passes.
            false if m <= avx2::MAX_BROAD_TILE => usize::MAX,
            false => PASS_STEPS,
        }
    }

    fn pass_groups(_group_steps: usize) -> bool {
        true
    }

    unsafe fn pass(product: &Product<Self>) {
        // SAFETY: the instruction sets were asked for; the rest is the caller's contract.
        unsafe {
            match features().avx512f {
                true => avx512::pass_f32(product),
                false => avx2::pass_f32(product),
            }
        }
    }
}

/// `c (+)= a * panels`, sums in float32.
///
/// # Safety
/// [`available`]. `a` is readable for m rows of steps * PER_STEP elements (an odd K padded with a zero, in bfloat16),
/// every touched panel for 32 times as many; `c` is readable and writable for m rows of n and overlaps neither.
pub(crate) unsafe fn product<T: Element>(product: &Product<T>) {
    let Product {
        m,
        steps,
        a,
        panels,
        panel_stride,
        n,
        c,
        sum,
        ..
    } = *product;
    if m == 0 {
        return;
    }
    if sum == Sum::Add && steps > T::pass_steps(m) {
        // SAFETY: the caller's contract.
        return unsafe { add_long(product) };
    }
    if let Sum::Scaled(scaling) = sum {
        let group_steps = scaling.group_steps;
        debug_assert!(
            steps <= PASS_STEPS && steps.is_multiple_of(group_steps),
            "{steps} steps are groups of {group_steps} for one pass"
        );
        if steps > group_steps && !T::pass_groups(group_steps) {
            for group in 0..steps / group_steps {
                let skipped = group * group_steps * T::PER_STEP;
                // SAFETY: a part of the steps for which the caller vouches.
                unsafe {
                    self::product(&Product {
                        steps: group_steps,
                        a: a.wrapping_add(skipped),
                        panels: panels.wrapping_add(skipped * PANEL),
                        sum: Sum::Scaled(scaling.of_group(group)),
                        ..*product
                    });
                }
            }
            return;
        }
    }
    let group = T::pass_columns(m);
    let (groups, passes) = (n.div_ceil(group), steps.div_ceil(T::pass_steps(m)).max(1));
    for turn in 0..groups * passes {
        // Few rows: through a panel from end to end, one stream of memory. More: all columns before the next piece of K,
        // so that the piece of the rows is found in the second-level cache.
        let (column, pass) = match m <= FEW_ROWS {
            true => (turn / passes * group, turn % passes),
            false => (turn % groups * group, turn / groups),
        };
        // Nearly equal passes: a short last one would cost as much around its loop as a long one.
        let [step, end] =
            [pass, pass + 1].map(|pass| (pass * steps / passes).next_multiple_of(GRAIN).min(steps));
        let part = Product {
            steps: end - step,
            a: a.wrapping_add(step * T::PER_STEP),
            panels: panels.wrapping_add(column / PANEL * panel_stride + step * T::PER_STEP * PANEL),
            n: group.min(n - column),
            c: c.wrapping_add(column),
            sum: match sum {
                _ if pass > 0 => Sum::Continue,
                Sum::Scaled(scaling) => Sum::Scaled(scaling.of_panel(column / PANEL)),
                sum => sum,
            },
            ..*product
        };
        // SAFETY: a part of the rows, panels and columns for which the caller vouches.
        unsafe { T::pass(&part) };
    }
}

/// [`Sum::Add`] of a sum of several passes, which must be whole before c is touched.
///
/// # Safety
/// As [`product`].
unsafe fn add_long<T: Element>(whole: &Product<T>) {
    const ROWS: usize = 12;
    let Product {
        m,
        a,
        lda,
        panels,
        panel_stride,
        n,
        c,
        ldc,
        ..
    } = *whole;
    let mut sum = [[0.0; PANEL]; ROWS];
    for row in (0..m).step_by(ROWS) {
        for column in (0..n).step_by(PANEL) {
            let (rows, columns) = (ROWS.min(m - row), PANEL.min(n - column));
            let part = Product {
                m: rows,
                a: a.wrapping_add(row * lda),
                panels: panels.wrapping_add(column / PANEL * panel_stride),
                n: columns,
                c: sum.as_mut_ptr().cast(),
                ldc: PANEL,
                sum: Sum::Set,
                ..*whole
            };
            // SAFETY: a part of what the caller vouches for, into a local tile; then the same part of c.
            unsafe {
                product(&part);
                for (r, sum) in sum.iter().take(rows).enumerate() {
                    let c = std::slice::from_raw_parts_mut(c.add((row + r) * ldc + column), columns);
                    c.iter_mut().zip(sum).for_each(|(c, sum)| *c += sum);
                }
            }
        }
    }
}

/// Rounds to bfloat16, nearest, ties to even (subnormals may become zero, as they do in the dot product). `to` may be
/// longer than `from` by a padding, which is zeroed: an odd K, or the unused columns of a panel.
///
/// # Panics
/// When [`available`] is false, or `to` is shorter than `from`.
pub(crate) fn round_bf16(from: &[f32], to: &mut [u16]) {
    assert!(available(), "the caller chose a fast path this CPU lacks");
    let (to, padding) = to.split_at_mut(from.len());
    // SAFETY: the instruction sets were asked for.
    unsafe {
        match features().avx512bf16 {
            true => avx512::round_bf16(from, to),
            false => avx2::round_bf16(from, to),
        }
    }
    padding.fill(0);
}

/// The bits of half precision as float32, exactly.
///
/// # Panics
/// When the slices are not equally long.
pub(crate) fn widen_f16(from: &[u16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    if features().avx2 {
        // SAFETY: the instruction sets were asked for.
        return unsafe { avx2::widen_f16(from, to) };
    }
    from.iter()
        .zip(to)
        .for_each(|(from, to)| *to = f16::from_bits(*from).to_f32());
}
