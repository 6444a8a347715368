//! The micro-kernels in plain Rust. On x86-64 the tests hold the others against it; elsewhere it stands where they
//! would, for whoever compiles there. (Nobody calls it there: [`super::available`] is false, and ops run their references.)

use half::bf16;

use super::{Element, PANEL, Product, Scaling, Sum};

// How a product is cut for these; on x86-64 for the others.
#[cfg(not(target_arch = "x86_64"))]
pub(super) const MAX_BROAD_TILE: usize = 3;

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn pass_columns(_rows: usize) -> usize {
    PANEL
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn pass_steps(_rows: usize) -> usize {
    usize::MAX
}

/// # Safety
/// As [`super::product`].
pub(super) unsafe fn pass_bf16(product: &Product<u16>) {
    // SAFETY: the caller's contract.
    unsafe { pass(product, |bits| f32::from_bits(u32::from(bits) << 16)) }
}

/// # Safety
/// As [`super::product`].
pub(super) unsafe fn pass_f32(product: &Product<f32>) {
    // SAFETY: the caller's contract.
    unsafe { pass(product, |value| value) }
}

/// # Safety
/// None; so that it is called as the others are.
pub(super) unsafe fn round_bf16(from: &[f32], to: &mut [u16]) {
    for (from, to) in from.iter().zip(to) {
        *to = bf16::from_f32(*from).to_bits();
    }
}

/// # Safety
/// As [`super::product`].
unsafe fn pass<T: Element>(product: &Product<T>, widen: impl Fn(T) -> f32) {
    let Product {
        m,
        steps,
        a,
        lda,
        panels,
        panel_stride,
        n,
        c,
        ldc,
        sum,
    } = *product;
    for row in 0..m {
        for column in 0..n {
            // SAFETY: row < m, column < n, and a step has PER_STEP values of K: the caller vouches for all of them.
            unsafe {
                let a = a.add(row * lda);
                let panel = panels.add(column / PANEL * panel_stride + column % PANEL * T::PER_STEP);
                let c = c.add(row * ldc + column);
                let mut total = if sum == Sum::Continue { *c } else { 0.0 };
                for step in 0..steps {
                    for k in 0..T::PER_STEP {
                        let (left, right) = (
                            *a.add(step * T::PER_STEP + k),
                            *panel.add(step * PANEL * T::PER_STEP + k),
                        );
                        total = widen(left).mul_add(widen(right), total);
                    }
                }
                *c = match sum {
                    Sum::Set | Sum::Continue => total,
                    Sum::Add => *c + total,
                    Sum::Scaled(scaling) => scaled(total, *c, &scaling, row, column),
                };
            }
        }
    }
}

/// `before + scale * sum + offset * total` of one column of a row.
///
/// # Safety
/// The scaling is readable for the row and the column's panel.
unsafe fn scaled(sum: f32, before: f32, scaling: &Scaling, row: usize, column: usize) -> f32 {
    let at = column / PANEL * scaling.panel_stride + column % PANEL;
    // SAFETY: the caller's contract.
    unsafe {
        let value = sum.mul_add(*scaling.scales.add(at), before);
        if scaling.offsets.is_null() {
            return value;
        }
        let total = *scaling.totals.add(row * scaling.totals_stride);
        total.mul_add(*scaling.offsets.add(at), value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Ahead, GRAIN};

    /// Small whole numbers: every order of summation gives the same.
    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + seed * 13) % 11) as f32 - 5.0).collect()
    }

    fn agrees<T: Element>(plain: unsafe fn(&Product<T>)) {
        for (m, k, n) in [
            (1, 1, 1),
            (3, 16, 32),
            (7, 33, 40),
            (20, 64, 96),
            (16, 224, 70),
            (33, 96, 130),
            (75, 160, 40),
        ] {
            let (steps, lda) = (T::steps(k), T::steps(k) * T::PER_STEP);
            let rounded = |rows: usize, seed: usize| -> Vec<T> {
                let mut all = vec![T::default(); rows * lda];
                let numbers = numbers(rows * k, seed);
                for (from, to) in numbers.chunks(k).zip(all.chunks_mut(lda)) {
                    T::round(from, to);
                }
                all
            };
            let (a, b) = (rounded(m, 1), rounded(n, 2));
            let mut panels = vec![T::default(); n.div_ceil(PANEL) * T::panel_len(k)];
            for (rows, panel) in b.chunks(PANEL * lda).zip(panels.chunks_mut(T::panel_len(k))) {
                // SAFETY: rows of whole steps, and a whole panel.
                unsafe {
                    super::super::pack::pack_rows(
                        rows.as_ptr(),
                        lda,
                        rows.len() / lda,
                        steps,
                        panel.as_mut_ptr(),
                    )
                };
            }
            let n_panels = n.div_ceil(PANEL);
            // One group, or several that may be multiplied at once.
            let groups = if steps.is_multiple_of(GRAIN) {
                steps / GRAIN
            } else {
                1
            };
            let [scales, offsets] = [4, 5].map(|seed| numbers(n_panels * groups * PANEL, seed));
            let totals = numbers(m * groups, 6);
            let scaling = Scaling {
                group_steps: steps / groups,
                scales: scales.as_ptr(),
                offsets: std::ptr::null(),
                panel_stride: groups * PANEL,
                totals: totals.as_ptr(),
                totals_stride: groups,
                ahead: Ahead::nothing(a.as_ptr().cast()),
            };
            let shifted = Scaling {
                offsets: offsets.as_ptr(),
                ..scaling
            };
            for sum in [
                Sum::Set,
                Sum::Continue,
                Sum::Add,
                Sum::Scaled(scaling),
                Sum::Scaled(shifted),
            ] {
                let mut results = [numbers(m * n, 3), numbers(m * n, 3)];
                for (result, is_plain) in results.iter_mut().zip([true, false]) {
                    let product = Product {
                        m,
                        steps,
                        a: a.as_ptr(),
                        lda,
                        panels: panels.as_ptr(),
                        panel_stride: T::panel_len(k),
                        n,
                        c: result.as_mut_ptr(),
                        ldc: n,
                        sum,
                    };
                    // SAFETY: all of it as long as it says.
                    unsafe {
                        match is_plain {
                            true => match sum {
                                Sum::Scaled(scaling) => (0..groups).for_each(|group| {
                                    let skipped = group * scaling.group_steps * T::PER_STEP;
                                    plain(&Product {
                                        steps: scaling.group_steps,
                                        a: product.a.add(skipped),
                                        panels: product.panels.add(skipped * PANEL),
                                        sum: Sum::Scaled(scaling.of_group(group)),
                                        ..product
                                    })
                                }),
                                _ => plain(&product),
                            },
                            false => super::super::product(&product),
                        }
                    }
                }
                assert_eq!(results[0], results[1], "[{m}, {k}] x [{k}, {n}] {sum:?}");
            }
        }
    }

    #[test]
    fn the_fast_ones_say_the_same() {
        if super::super::available() {
            agrees::<u16>(pass_bf16);
            agrees::<f32>(pass_f32);
            // Halfway cases go to the even neighbour.
            let from = [
                0.0,
                -1.0,
                3.3,
                257.0 / 256.0,
                259.0 / 256.0,
                -2.5e-20,
                6.5e30,
                f32::INFINITY,
            ];
            let [mut plain, mut fast] = [[0u16; 8]; 2];
            // SAFETY: it has no condition.
            unsafe { round_bf16(&from, &mut plain) };
            super::super::round_bf16(&from, &mut fast);
            assert_eq!(plain, fast);
        }
    }
}
