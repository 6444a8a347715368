//! Sums over ranks in rank order: the arithmetic that makes an all-reduce the same bits everywhere. No waiting.

use half::bf16;

/// An element as float32 and back, rounded to nearest.
pub(super) trait Element: Copy {
    fn wide(self) -> f32;
    fn narrow(wide: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(wide: f32) -> f32 {
        wide
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(wide: f32) -> bf16 {
        bf16::from_f32(wide)
    }
}

/// Elements summed at a time: what of every rank stays in the first-level cache.
const BLOCK: usize = 1024;

/// The sums over all of `parts` (one per rank, of one length), a block at a time: `take(offset, sums)`. Parts are read
/// only before the block they lie in is taken, so `take` may overwrite it.
///
/// # Safety
/// Each part points to `len` elements that nobody else writes meanwhile.
pub(super) unsafe fn in_rank_order<T: Element>(
    parts: &[*const T],
    len: usize,
    mut take: impl FnMut(usize, &[T]),
) {
    let mut sums = [0f32; BLOCK];
    let mut narrow = [T::narrow(0.0); BLOCK];
    let (first, others) = parts.split_first().expect("a group has a rank");
    for offset in (0..len).step_by(BLOCK) {
        let n = BLOCK.min(len - offset);
        let sums = &mut sums[..n];
        // SAFETY: offset + n <= len elements that nobody writes (the caller's contract).
        let part = |part: *const T| unsafe { std::slice::from_raw_parts(part.add(offset), n) };
        for (sum, x) in sums.iter_mut().zip(part(*first)) {
            *sum = x.wide();
        }
        others.iter().for_each(|&other| add(sums, part(other)));
        let narrow = &mut narrow[..n];
        for (narrow, &sum) in narrow.iter_mut().zip(&*sums) {
            *narrow = T::narrow(sum);
        }
        take(offset, narrow);
    }
}

fn add<T: Element>(sums: &mut [f32], part: &[T]) {
    for (sum, x) in sums.iter_mut().zip(part) {
        *sum += x.wide();
    }
}
