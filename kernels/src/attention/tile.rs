//! Tiles of query rows against segments of keys: cutting the work, the softmax of a segment, merging segments. Knows
//! panels by address, neither caches nor tensors.

use std::cmp::Reverse;
use std::ops::Range;

use crate::pool::{self, scratch};
use crate::simd::{Element, PANEL, Product, Sum, product};
use crate::slice::{Plain, Rows, RowsMut, Shared};
use crate::vector::{exp, exp2_nonpositive, vectorised};

use super::cache::Geometry;
use super::codes;
use super::{Heads, SEGMENT, Scoring};

/// Rows of a tile's products (query rows x group): eight of the micro-kernel's tallest register tiles. A key panel read
/// from memory then serves 96 rows, and the tile's scores take 96 KiB of the second-level cache.
const TILE: usize = 96;
/// Elements between rows of scores and of probabilities: an odd number of cache lines (see [`Product::lda`]).
const SCORES_STRIDE: usize = SEGMENT + 16;
const PROBABILITIES_STRIDE: usize = SEGMENT + 32;

/// Up to this many rows of a tile the memory of the panels is what takes the time. The hardware's prefetch starts anew at
/// every panel, which is a page or two: a panel is therefore asked for while the one before it is used: decode from memory gains a third to a half.
const FEW_ROWS: usize = 16;

/// What all tiles of a call share.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub q: Rows<'a>,
    pub out: RowsMut<'a>,
    pub lse: Option<RowsMut<'a>>,
    pub heads: Heads,
    pub scoring: Scoring,
    /// [heads]
    pub sinks: Option<&'a [f32]>,
}

pub(super) struct Sequence<'a, T> {
    pub rows: Range<usize>,
    pub kv_len: usize,
    pub keys: Keys<'a, T>,
}

/// The panels of one sequence.
pub(super) struct Keys<'a, T> {
    pub blocks: Blocks<T>,
    pub geometry: Geometry,
    /// None: the blocks follow each other.
    pub table: Option<&'a [u32]>,
    /// Of the sequence's blocks the one that the table begins with.
    pub first_block: usize,
}

/// The first of the blocks, and what stands in them.
#[derive(Clone, Copy)]
pub(super) enum Blocks<T> {
    Panels(Shared<T>),
    /// See [`codes`]; how they become elements of panels.
    Codes(Shared<u8>, fn(&[u8], &mut [T])),
}

/// Which of a head's panels.
#[derive(Clone, Copy)]
enum Side {
    Keys,
    Values,
}

impl<T: Plain> Keys<'_, T> {
    /// The panels of one head of a block of the sequence, those of codes made in `decoded`.
    fn panels(&self, block: usize, kv_head: usize, side: Side, decoded: &mut [T]) -> *const T {
        let (at, len) = self.place(block, kv_head, side);
        match self.blocks {
            Blocks::Panels(first) => first.get().wrapping_add(at),
            Blocks::Codes(first, decode) => {
                // SAFETY: the bytes of a head's panels, which nobody writes meanwhile.
                let codes = unsafe { std::slice::from_raw_parts(first.get().add(at), len) };
                decode(codes, &mut decoded[..len]);
                decoded.as_ptr()
            }
        }
    }

    /// Asks for panels to come into the second-level cache.
    fn prefetch(&self, block: usize, kv_head: usize, side: Side) {
        let (at, len) = self.place(block, kv_head, side);
        match self.blocks {
            Blocks::Panels(first) => prefetch(first.get().wrapping_add(at), len),
            Blocks::Codes(first, _) => prefetch(first.get().wrapping_add(at), len),
        }
    }

    /// Where panels begin, and their length, in elements.
    fn place(&self, block: usize, kv_head: usize, side: Side) -> (usize, usize) {
        let geometry = &self.geometry;
        let block = match self.table {
            Some(table) => table[block - self.first_block] as usize,
            None => block,
        };
        let head = block * geometry.block_len() + kv_head * geometry.head_len();
        match side {
            Side::Keys => (head, geometry.k_len()),
            Side::Values => (head + geometry.k_len(), geometry.panels_len() - geometry.k_len()),
        }
    }

    /// The scales of codes.
    fn scales(&self, blocks: Range<usize>, kv_head: usize) -> Option<Scales> {
        let Blocks::Codes(first, _) = self.blocks else {
            return None;
        };
        let mut scales = Scales {
            keys: [0.0; SEGMENT],
            values: [0.0; SEGMENT],
        };
        for (i, block) in blocks.enumerate() {
            let (at, _) = self.place(block, kv_head, Side::Keys);
            let (keys, values) = codes::scales(first.get().wrapping_add(at), &self.geometry);
            for (from, to) in [(keys, &mut scales.keys), (values, &mut scales.values)] {
                // SAFETY: the 32 scales of a head of a block, aligned because panels are whole cache lines.
                let from = unsafe { std::slice::from_raw_parts(from, PANEL) };
                to[i * PANEL..][..PANEL].copy_from_slice(from);
            }
        }
        Some(scales)
    }

    /// The end of the run of blocks from `block`, at most `end`, that lie one after the other in memory.
    fn run(&self, block: usize, end: usize) -> usize {
        if let Blocks::Codes(..) = self.blocks {
            return block + 1; // Decoded one at a time.
        }
        let Some(table) = self.table else { return end };
        let at = |block: usize| table[block - self.first_block] as usize;
        let follows = |next: &usize| at(*next) == at(block) + (next - block);
        (block + 1..end).find(|next| !follows(next)).unwrap_or(end)
    }
}

/// Of the keys of a segment.
struct Scales {
    keys: [f32; SEGMENT],
    values: [f32; SEGMENT],
}

/// Some query rows of one sequence and one KV head.
struct Tile {
    sequence: usize,
    kv_head: usize,
    rows: Range<usize>,
    /// Position of the first row.
    position: usize,
    segments: Range<usize>,
}

pub(super) fn attend<T: Element + Plain>(call: &Call, sequences: &[Sequence<T>]) {
    let Heads {
        kv_heads, head_dim, ..
    } = call.heads;
    let group = call.heads.group();
    let height = (TILE / group).max(1);
    let mut tiles = Vec::new();
    for (sequence, Sequence { rows, kv_len, .. }) in sequences.iter().enumerate() {
        for first in rows.clone().step_by(height) {
            let tile_rows = first..(first + height).min(rows.end);
            let position = kv_len - rows.len() + (first - rows.start);
            let end = position + tile_rows.len();
            let segments = call.scoring.first_key(position) / SEGMENT..end.div_ceil(SEGMENT);
            tiles.extend((0..kv_heads).map(|kv_head| Tile {
                sequence,
                kv_head,
                rows: tile_rows.clone(),
                position,
                segments: segments.clone(),
            }));
        }
    }
    // The longest first, so that the last to finish is a short one.
    tiles.sort_by_key(|tile| Reverse((tile.position + tile.rows.len()) * tile.rows.len()));
    let longest = tiles.iter().map(|tile| tile.segments.len()).max().unwrap_or(0);
    if tiles.len() >= 4 * pool::threads() || longest < 2 {
        pool::for_each(tiles.len(), |i| {
            let tile = &tiles[i];
            let mut whole = Partial::scratch(tile.rows.len() * group, head_dim);
            let mut part = Partial::scratch(tile.rows.len() * group, head_dim);
            whole.clear();
            let mut queries = Queries::new(call, tile, &sequences[tile.sequence]);
            for segment in tile.segments.clone() {
                queries.segment(segment, &mut part);
                whole.merge(&part, head_dim);
            }
            finish(call, tile, &whole);
        });
        return;
    }
    // Too few tiles for the threads: each segment is a task, and the merges come after.
    let tasks: Vec<(usize, usize)> = tiles
        .iter()
        .enumerate()
        .flat_map(|(i, tile)| tile.segments.clone().map(move |s| (i, s)))
        .collect();
    let part_len = |tile: &Tile| Partial::<&mut [f32]>::len(tile.rows.len() * group, head_dim);
    let mut starts = vec![0];
    for &(tile, _) in &tasks {
        starts.push(starts[starts.len() - 1] + part_len(&tiles[tile]));
    }
    let mut parts = scratch::<f32>(starts[tasks.len()]);
    let memory = Shared(parts.as_mut_ptr());
    let partial = |task: usize| {
        // SAFETY: the ranges of the tasks are disjoint parts of the scratch.
        let slice = unsafe {
            std::slice::from_raw_parts_mut(memory.get().add(starts[task]), starts[task + 1] - starts[task])
        };
        Partial::over(slice, tiles[tasks[task].0].rows.len() * group)
    };
    pool::for_each(tasks.len(), |task| {
        let (tile, segment) = (&tiles[tasks[task].0], tasks[task].1);
        let mut part = partial(task);
        Queries::new(call, tile, &sequences[tile.sequence]).segment(segment, &mut part);
    });
    let mut first_task = vec![0];
    first_task.extend(tiles.iter().scan(0, |sum, tile| {
        *sum += tile.segments.len();
        Some(*sum)
    }));
    let merge = |i: usize| {
        let tile = &tiles[i];
        let mut whole = Partial::scratch(tile.rows.len() * group, head_dim);
        whole.clear();
        for task in first_task[i]..first_task[i + 1] {
            whole.merge(&partial(task), head_dim);
        }
        finish(call, tile, &whole);
    };
    // Merging a decode step's few rows takes less time than handing it over.
    match starts[tasks.len()] < 64 * 1024 {
        true => (0..tiles.len()).for_each(merge),
        false => pool::for_each(tiles.len(), merge),
    }
}

/// The softmax over some of the keys, for m rows: maxima (of scores times log2 e), sums, and sums of values.
struct Partial<S> {
    m: usize,
    /// [m] maxima, [m] sums, [m][D] values.
    memory: S,
}

impl Partial<pool::Scratch<f32>> {
    fn scratch(m: usize, head_dim: usize) -> Self {
        Partial {
            m,
            memory: scratch(Partial::<&mut [f32]>::len(m, head_dim)),
        }
    }
}

impl<'a> Partial<&'a mut [f32]> {
    fn len(m: usize, head_dim: usize) -> usize {
        m * (head_dim + 2)
    }

    fn over(memory: &'a mut [f32], m: usize) -> Self {
        Partial { m, memory }
    }
}

impl<S: std::ops::DerefMut<Target = [f32]>> Partial<S> {
    fn parts(&self) -> (&[f32], &[f32], &[f32]) {
        let (maxima, rest) = self.memory.split_at(self.m);
        let (sums, values) = rest.split_at(self.m);
        (maxima, sums, values)
    }

    fn parts_mut(&mut self) -> (&mut [f32], &mut [f32], &mut [f32]) {
        let (maxima, rest) = self.memory.split_at_mut(self.m);
        let (sums, values) = rest.split_at_mut(self.m);
        (maxima, sums, values)
    }

    /// No keys yet.
    fn clear(&mut self) {
        let (maxima, sums, values) = self.parts_mut();
        maxima.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        values.fill(0.0);
    }

    /// Adds the keys of `part`, which come later. Rows that saw none of them are left as they are.
    fn merge<P: std::ops::DerefMut<Target = [f32]>>(&mut self, part: &Partial<P>, head_dim: usize) {
        let (maxima, sums, values) = self.parts_mut();
        let (part_maxima, part_sums, part_values) = part.parts();
        for row in 0..maxima.len() {
            if part_maxima[row] > f32::NEG_INFINITY {
                let range = row * head_dim..(row + 1) * head_dim;
                let old = (maxima[row], sums[row]);
                let new = (part_maxima[row], part_sums[row]);
                (maxima[row], sums[row]) =
                    merge_row(&mut values[range.clone()], old, &part_values[range], new);
            }
        }
    }
}

/// A tile's rows, rounded, and the buffers of its products.
struct Queries<'a, T: Element + Plain> {
    call: &'a Call<'a>,
    tile: &'a Tile,
    sequence: &'a Sequence<'a, T>,
    /// [m][D], m = rows x group.
    rounded: pool::Scratch<T>,
    scores: pool::Scratch<f32>,
    probabilities: pool::Scratch<T>,
    /// Panels of a head made of codes.
    decoded: pool::Scratch<T>,
}

impl<'a, T: Element + Plain> Queries<'a, T> {
    fn new(call: &'a Call<'a>, tile: &'a Tile, sequence: &'a Sequence<'a, T>) -> Queries<'a, T> {
        let (group, head_dim) = (call.heads.group(), call.heads.head_dim);
        let m = tile.rows.len() * group;
        let mut rounded = scratch::<T>(m * head_dim);
        let width = group * head_dim;
        for (row, to) in tile.rows.clone().zip(rounded.chunks_exact_mut(width)) {
            T::round(&call.q.row(row)[tile.kv_head * width..][..width], to);
        }
        let (scores, probabilities) = (scratch(m * SCORES_STRIDE), scratch(m * PROBABILITIES_STRIDE));
        let decoded = match sequence.keys.blocks {
            Blocks::Panels(_) => 0,
            Blocks::Codes(..) => head_dim.next_multiple_of(PANEL) * PANEL,
        };
        Queries {
            call,
            tile,
            sequence,
            rounded,
            scores,
            probabilities,
            decoded: scratch(decoded),
        }
    }

    /// The softmax over one segment for all rows of the tile.
    fn segment<S: std::ops::DerefMut<Target = [f32]>>(&mut self, segment: usize, part: &mut Partial<S>) {
        let Queries {
            call, tile, sequence, ..
        } = *self;
        let Call {
            heads: Heads { head_dim, .. },
            scoring,
            ..
        } = *call;
        let group = call.heads.group();
        let m = part.m;
        let keys = &sequence.keys;
        let end_position = tile.position + tile.rows.len();
        let first_key = scoring.first_key(tile.position).max(segment * SEGMENT) / PANEL * PANEL;
        let end_key = end_position.min((segment + 1) * SEGMENT);
        let blocks = first_key / PANEL..end_key.div_ceil(PANEL);
        // Rows before a block's first key do not see it; rows are in order of position.
        let first_row = |block: usize| (block * PANEL).saturating_sub(tile.position) * group;
        let begin = first_row(blocks.start).min(m);
        let kv_head = tile.kv_head;
        let scales = keys.scales(blocks.clone(), kv_head);
        let few = m <= FEW_ROWS;

        let mut block = blocks.start;
        while block < blocks.end {
            let row = first_row(block);
            // Blocks that all rows see go through one product, as far as memory is regular; for few rows one at a time,
            // the next panel on its way meanwhile.
            let end = if few || row != begin {
                block + 1
            } else {
                keys.run(block, blocks.end)
            };
            let end = (block + 1..end)
                .find(|next| first_row(*next) != row)
                .unwrap_or(end);
            if few {
                match end < blocks.end {
                    true => keys.prefetch(end, kv_head, Side::Keys),
                    false => keys.prefetch(blocks.start, kv_head, Side::Values),
                }
            }
            let column = (block - blocks.start) * PANEL;
            let scores = Product {
                m: m - row,
                steps: T::steps(head_dim),
                a: self.rounded[row * head_dim..].as_ptr(),
                lda: head_dim,
                panels: keys.panels(block, kv_head, Side::Keys, &mut self.decoded),
                panel_stride: keys.geometry.block_len(),
                n: (end - block) * PANEL,
                c: self.scores[row * SCORES_STRIDE + column..].as_mut_ptr(),
                ldc: SCORES_STRIDE,
                sum: Sum::Set,
            };
            // SAFETY: fast paths exist, or there were no panels; whole K panels of blocks below kv_len; rows row..m of
            // queries and scores.
            unsafe { product(&scores) };
            block = end;
        }

        let width = blocks.len() * PANEL;
        let base_key = blocks.start * PANEL;
        let (maxima, sums, values) = part.parts_mut();
        maxima[..begin].fill(f32::NEG_INFINITY);
        let scale = match scoring.cap {
            Some(_) => std::f32::consts::LOG2_E,
            None => (scoring.scale * std::f64::consts::LOG2_E) as f32,
        };
        for row in begin..m {
            let position = tile.position + row / group;
            let scores = &mut self.scores[row * SCORES_STRIDE..][..width];
            // The mask: keys before the window and after the row itself. Whole blocks of 32 outside are no keys at all.
            let seen = scoring.first_key(position).saturating_sub(base_key).min(width)
                ..(position + 1).saturating_sub(base_key).min(width);
            if seen.is_empty() {
                scores.fill(0.0);
                (maxima[row], sums[row]) = (f32::NEG_INFINITY, 0.0);
            } else {
                if let Some(scales) = &scales {
                    multiply(&mut scores[seen.clone()], &scales.keys[seen.clone()]);
                }
                let whole = seen.start / PANEL * PANEL..seen.end.next_multiple_of(PANEL);
                scores[..whole.start].fill(0.0);
                scores[whole.start..seen.start].fill(f32::NEG_INFINITY);
                scores[seen.end..whole.end].fill(f32::NEG_INFINITY);
                scores[whole.end..].fill(0.0);
                if let Some(cap) = scoring.cap {
                    cap_row(
                        &mut scores[whole.clone()],
                        (scoring.scale / cap) as f32,
                        cap as f32,
                    );
                }
                (maxima[row], sums[row]) = softmax_row(&mut scores[whole], scale);
                if let Some(scales) = &scales {
                    multiply(&mut scores[seen.clone()], &scales.values[seen]);
                }
            }
            T::round(
                scores,
                &mut self.probabilities[row * PROBABILITIES_STRIDE..][..width],
            );
        }

        for block in blocks.clone() {
            let row = first_row(block).min(m);
            if few {
                let next_segment = (segment + 1) * SEGMENT / PANEL;
                match block + 1 < blocks.end {
                    true => keys.prefetch(block + 1, kv_head, Side::Values),
                    false if next_segment * PANEL < end_position => {
                        keys.prefetch(next_segment, kv_head, Side::Keys)
                    }
                    false => {}
                }
            }
            let product_of = Product {
                m: m - row,
                // Behind the last key stands what an earlier owner of the block left.
                steps: T::steps(PANEL.min(sequence.kv_len - block * PANEL)),
                a: self.probabilities[row * PROBABILITIES_STRIDE + (block - blocks.start) * PANEL..].as_ptr(),
                lda: PROBABILITIES_STRIDE,
                panels: keys.panels(block, kv_head, Side::Values, &mut self.decoded),
                panel_stride: Geometry::V_PANEL,
                n: head_dim,
                c: values[row * head_dim..].as_mut_ptr(),
                ldc: head_dim,
                sum: if block == blocks.start {
                    Sum::Set
                } else {
                    Sum::Continue
                },
            };
            // SAFETY: as above, with the V panels; rows row..m of probabilities and values.
            unsafe { product(&product_of) };
        }
    }
}

/// Asks for `len` elements to come into the second-level cache.
#[cfg(target_arch = "x86_64")]
fn prefetch<T>(from: *const T, len: usize) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    for line in (0..len * size_of::<T>()).step_by(64) {
        // SAFETY: a hint, which any address may have.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast::<i8>().wrapping_add(line)) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch<T>(_from: *const T, _len: usize) {}

/// Divides by the sums and writes the tile's rows.
fn finish<S: std::ops::DerefMut<Target = [f32]>>(call: &Call, tile: &Tile, whole: &Partial<S>) {
    let (group, head_dim) = (call.heads.group(), call.heads.head_dim);
    let (maxima, sums, values) = whole.parts();
    for (i, row) in tile.rows.clone().enumerate() {
        // SAFETY: no other tile has these rows and heads, and only the slices below, this tile's part, are touched.
        let out = unsafe {
            let first = call
                .out
                .ptr
                .add(row * call.out.stride + tile.kv_head * group * head_dim);
            std::slice::from_raw_parts_mut(first, group * head_dim)
        };
        for (in_group, to) in out.chunks_exact_mut(head_dim).enumerate() {
            let (head, micro) = (tile.kv_head * group + in_group, i * group + in_group);
            let (mut maximum, mut sum, mut factor) = (maxima[micro], sums[micro], 1.0 / sums[micro]);
            if let Some(sinks) = call.sinks {
                let keep;
                (maximum, sum, keep) = with_sink(maximum, sum, sinks[head] * std::f32::consts::LOG2_E);
                factor = keep / sum;
            }
            scale_row(&values[micro * head_dim..][..head_dim], factor, to);
            if let Some(lse) = call.lse {
                // SAFETY: as above.
                unsafe {
                    *lse.ptr.add(row * lse.stride + head) = maximum * std::f32::consts::LN_2 + sum.ln();
                }
            }
        }
    }
}

vectorised!(
    /// Replaces scores (a multiple of 32, masked ones -infinity) by 2^(scale (score - maximum)); gives the maximum times
    /// scale and the sum.
    fn softmax_row(scores: &mut [f32], scale: f32) -> (f32, f32) {
        let (blocks, _) = scores.as_chunks_mut::<PANEL>();
        let mut best = [f32::NEG_INFINITY; PANEL];
        for block in blocks.iter() {
            for lane in 0..PANEL {
                best[lane] = if block[lane] > best[lane] {
                    block[lane]
                } else {
                    best[lane]
                };
            }
        }
        let best = tree(best, |a, b| if a > b { a } else { b });
        let maximum = best * scale;
        let mut sums = [0.0f32; PANEL];
        for block in blocks {
            for lane in 0..PANEL {
                let p = exp2_nonpositive(block[lane].mul_add(scale, -maximum));
                block[lane] = p;
                sums[lane] += p;
            }
        }
        (maximum, tree(sums, |a, b| a + b))
    }
);

#[inline(always)]
fn tree(mut lanes: [f32; PANEL], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = PANEL;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}

vectorised!(
    /// cap * tanh(scale * score), with tanh y = 1 - 2 / (1 + e^2y).
    fn cap_row(scores: &mut [f32], scale: f32, cap: f32) {
        for score in scores {
            let masked = *score == f32::NEG_INFINITY;
            let capped = cap - 2.0 * cap / (1.0 + exp(2.0 * scale * *score));
            *score = if masked { *score } else { capped };
        }
    }
);

vectorised!(
    fn multiply(x: &mut [f32], factors: &[f32]) {
        for (x, factor) in x.iter_mut().zip(factors) {
            *x *= factor;
        }
    }
);

vectorised!(
    /// Two softmaxes (maximum, sum) and their values into one.
    fn merge_row(values: &mut [f32], old: (f32, f32), part: &[f32], new: (f32, f32)) -> (f32, f32) {
        let maximum = old.0.max(new.0);
        let (keep, add) = (
            exp2_nonpositive(old.0 - maximum),
            exp2_nonpositive(new.0 - maximum),
        );
        for (value, part) in values.iter_mut().zip(part) {
            *value = *value * keep + part * add;
        }
        (maximum, old.1 * keep + new.1 * add)
    }
);

vectorised!(
    /// A softmax (maximum, sum) with one score more that has no value: the new two, and what the values so far are
    /// multiplied by.
    fn with_sink(maximum: f32, sum: f32, sink: f32) -> (f32, f32, f32) {
        let new = maximum.max(sink);
        let keep = exp2_nonpositive(maximum - new);
        (new, sum * keep + exp2_nonpositive(sink - new), keep)
    }
);

vectorised!(
    fn scale_row(from: &[f32], factor: f32, to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from * factor;
        }
    }
);
