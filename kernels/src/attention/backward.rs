//! The gradient of packed attention (FlashAttention-2's backward, Dao 2023): probabilities are computed again from the
//! saved lse, key strip by query block, and never exist whole.
//!
//! Everything is computed transposed, [keys][32 queries]: the probabilities and their gradients are then rows for the
//! products that sum over queries (dK, dV), and two of their rows interleaved are a panel step for the one that sums
//! over keys (dQ), so nothing is transposed in the inner loop.
//!
//! A task is one query head of one sequence and writes dq and its own share of dk and dv; the shares of a group are
//! summed afterwards in order. So the result depends neither on threads nor on other sequences.

use std::cmp::Reverse;
use std::ops::Range;

use tch::Tensor;

use crate::pool::{self, scratch};
use crate::simd::{Element, PANEL, Product, Sum, pack, product};
use crate::slice::{Plain, Rows, RowsMut, Shared};
use crate::vector::{dot, exp, exp2_nonpositive, rows, rows_mut, uninit, vector, vectorised};
use crate::weight::Precision;

use super::cache::Geometry;
use super::forward::pack_columns;
use super::reference::{packed_backward_reference, sinks_backward_reference};
use super::{Heads, MAX_HEAD_DIM, Options, PackedOut, Scoring};

/// Keys of a strip. Its scores, probabilities and their gradients are 56 KiB in bfloat16.
const STRIP: usize = 128;

/// The gradients (dq [T, heads * D], dk and dv [T, kv_heads * D]) of [`super::packed`], whose arguments and result
/// these are, from `dout` [T, heads * D]. Rows of no sequence are zero. Sinks are in the lse, so nothing here asks for
/// them; [`sinks_backward`] gives their own gradient.
#[expect(
    clippy::too_many_arguments,
    reason = "the forward's inputs, its result and its gradient"
)]
pub fn packed_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attended: &PackedOut,
    dout: &Tensor,
    cu_seqlens: &[usize],
    heads: Heads,
    options: Options,
    precision: Precision,
) -> (Tensor, Tensor, Tensor) {
    heads.check(q);
    options.check(heads);
    check_packed(q, [k, v], cu_seqlens, heads);
    let PackedOut { out, lse } = attended;
    let inputs = (|| {
        let [q, k, v, out, lse, dout] = [rows(q)?, rows(k)?, rows(v)?, rows(out)?, rows(lse)?, rows(dout)?];
        heads.regular().then_some(Inputs {
            q,
            k,
            v,
            out,
            lse,
            dout,
            heads,
            scoring: options.scoring(),
        })
    })();
    let Some(inputs) = inputs else {
        if let Some(dtype) = super::packed::pages_for([q, k, v], heads, precision) {
            return super::packed::packed_backward(
                q, k, v, attended, dout, cu_seqlens, heads, options, dtype,
            );
        }
        return packed_backward_reference(q, k, v, attended, dout, cu_seqlens, heads, options, precision);
    };
    match precision {
        Precision::F32 => backward::<f32>(&inputs, cu_seqlens),
        Precision::Bf16 => backward::<u16>(&inputs, cu_seqlens),
    }
}

/// The gradient [heads] of the sinks of [`super::packed`], whose result `attended` is, from `dout` [T, heads * D]. A sink
/// has no value, so its probability only takes from the others: -p (dout out), summed over rows in order.
pub fn sinks_backward(
    sinks: &Tensor,
    attended: &PackedOut,
    dout: &Tensor,
    cu_seqlens: &[usize],
    heads: Heads,
) -> Tensor {
    heads.check(dout);
    let PackedOut { out, lse } = attended;
    let (Some(sinks_row), Some(out), Some(lse), Some(dout_rows)) =
        (vector(sinks), rows(out), rows(lse), rows(dout))
    else {
        return sinks_backward_reference(sinks, attended, dout, cu_seqlens, heads);
    };
    assert_eq!(sinks_row.len(), heads.heads, "one sink for each head");
    let rows = match cu_seqlens {
        [first, .., last] => *first..*last,
        _ => 0..0,
    };
    let mut gradient = uninit(heads.heads, 1);
    let to = rows_mut(&mut gradient);
    pool::for_each(heads.heads, |head| {
        let columns = head * heads.head_dim..(head + 1) * heads.head_dim;
        let mut sum = 0.0;
        for row in rows.clone() {
            let delta = row_dot(
                &dout_rows.row(row)[columns.clone()],
                &out.row(row)[columns.clone()],
            );
            sum -= sink_probability(sinks_row[head], lse.row(row)[head]) * delta;
        }
        // SAFETY: one task a head.
        unsafe { to.row(head)[0] = sum };
    });
    gradient.view([heads.heads as i64])
}

pub(super) fn check_packed(q: &Tensor, kv: [&Tensor; 2], cu_seqlens: &[usize], heads: Heads) {
    let (tokens, columns) = (q.size()[0], (heads.kv_heads * heads.head_dim) as i64);
    for x in kv {
        assert_eq!(x.size(), [tokens, columns], "k or v does not match q");
    }
    assert!(cu_seqlens.is_sorted(), "cu_seqlens {cu_seqlens:?} fall");
    let end = cu_seqlens.last().copied().unwrap_or(0);
    assert!(
        end <= tokens as usize,
        "sequences end at {end} of {tokens} tokens"
    );
}

struct Inputs<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    out: Rows<'a>,
    lse: Rows<'a>,
    dout: Rows<'a>,
    heads: Heads,
    scoring: Scoring,
}

fn backward<T: Element + Plain>(inputs: &Inputs, cu_seqlens: &[usize]) -> (Tensor, Tensor, Tensor) {
    let Heads {
        heads,
        kv_heads,
        head_dim,
    } = inputs.heads;
    let group = heads / kv_heads;
    let mut sequences: Vec<Range<usize>> = cu_seqlens
        .windows(2)
        .map(|seq| seq[0]..seq[1])
        .filter(|seq| !seq.is_empty())
        .collect();
    // The longest first, so that the last to finish is a short one.
    sequences.sort_by_key(|seq| Reverse(seq.len()));

    let layouts: Vec<KeyLayout> = sequences
        .iter()
        .map(|seq| KeyLayout::new::<T>(seq.len(), head_dim))
        .collect();
    let mut starts = vec![0];
    for layout in &layouts {
        starts.push(starts[starts.len() - 1] + kv_heads * layout.len());
    }
    let mut keys = scratch::<T>(starts[sequences.len()]);
    let memory = Shared(keys.as_mut_ptr());
    let keys_of = |sequence: usize, kv_head: usize| {
        memory
            .get()
            .wrapping_add(starts[sequence] + kv_head * layouts[sequence].len())
    };
    pool::for_each(sequences.len() * kv_heads, |task| {
        let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
        // SAFETY: the part of one sequence and head, this task's alone.
        let to =
            unsafe { std::slice::from_raw_parts_mut(keys_of(sequence, kv_head), layouts[sequence].len()) };
        layouts[sequence].fill(inputs, &sequences[sequence], kv_head, to);
    });

    let tokens = inputs.q.rows;
    let covered: usize = sequences.iter().map(|seq| seq.len()).sum();
    let empty = |width: usize| match covered == tokens {
        true => uninit(tokens, width),
        false => Tensor::zeros(
            [tokens as i64, width as i64],
            (tch::Kind::Float, tch::Device::Cpu),
        ),
    };
    let (mut dq, mut dk_shares, mut dv_shares) = (
        empty(heads * head_dim),
        uninit(tokens, heads * head_dim),
        uninit(tokens, heads * head_dim),
    );
    let outputs = Outputs {
        dq: rows_mut(&mut dq),
        dk: rows_mut(&mut dk_shares),
        dv: rows_mut(&mut dv_shares),
    };
    pool::for_each(sequences.len() * heads, |task| {
        let (sequence, head) = (task / heads, task % heads);
        let keys = Keys {
            first: keys_of(sequence, head / group),
            layout: layouts[sequence],
        };
        Head::<T>::new(inputs, &outputs, sequences[sequence].clone(), head, keys).run();
    });

    let (mut dk, mut dv) = (empty(kv_heads * head_dim), empty(kv_heads * head_dim));
    for (shares, total, factor) in [
        (&dk_shares, &mut dk, inputs.scoring.scale as f32),
        (&dv_shares, &mut dv, 1.0),
    ] {
        let (shares, total) = (rows(shares).expect("made above"), rows_mut(total));
        for seq in &sequences {
            crate::vector::in_chunks(seq.len(), shares.width, |rows| {
                for row in rows.start + seq.start..rows.end + seq.start {
                    // SAFETY: the row is this task's alone.
                    let total = unsafe { total.row(row) };
                    for (to, from) in total
                        .chunks_exact_mut(head_dim)
                        .zip(shares.row(row).chunks_exact(group * head_dim))
                    {
                        sum_shares(from, factor, to);
                    }
                }
            });
        }
    }
    (dq, dk, dv)
}

/// A sequence's keys and values of one head as the products want them, in elements: K and V by rows [L][D], and K
/// transposed [D][L], its rows an odd number of cache lines apart.
#[derive(Clone, Copy)]
struct KeyLayout {
    len: usize,
    head_dim: usize,
    transposed_stride: usize,
}

impl KeyLayout {
    fn new<T>(len: usize, head_dim: usize) -> KeyLayout {
        let line = 64 / size_of::<T>();
        // Padded to whole strips' pairs, with one line more where the number of lines is even.
        let lines = len.next_multiple_of(PANEL).div_ceil(line) | 1;
        KeyLayout {
            len,
            head_dim,
            transposed_stride: lines * line,
        }
    }

    fn len(&self) -> usize {
        2 * self.len * self.head_dim + self.head_dim * self.transposed_stride
    }

    fn fill<T: Element + Plain>(&self, inputs: &Inputs, tokens: &Range<usize>, kv_head: usize, to: &mut [T]) {
        let KeyLayout {
            len,
            head_dim,
            transposed_stride,
        } = *self;
        let (k, rest) = to.split_at_mut(len * head_dim);
        let (v, transposed) = rest.split_at_mut(len * head_dim);
        let columns = kv_head * head_dim..(kv_head + 1) * head_dim;
        for (from, to) in [(&inputs.k, &mut *k), (&inputs.v, v)] {
            for (token, to) in tokens.clone().zip(to.chunks_exact_mut(head_dim)) {
                T::round(&from.row(token)[columns.clone()], to);
            }
        }
        for (d, row) in transposed.chunks_exact_mut(transposed_stride).enumerate() {
            for (key, to) in row[..len].iter_mut().enumerate() {
                *to = k[key * head_dim + d];
            }
            row[len..].fill(T::default());
        }
    }
}

#[derive(Clone, Copy)]
struct Keys<T> {
    first: *const T,
    layout: KeyLayout,
}

impl<T> Keys<T> {
    fn k(&self, key: usize) -> *const T {
        self.first.wrapping_add(key * self.layout.head_dim)
    }

    fn v(&self, key: usize) -> *const T {
        self.k(self.layout.len + key)
    }

    fn transposed(&self, key: usize) -> *const T {
        self.k(2 * self.layout.len).wrapping_add(key)
    }
}

/// `dk` and `dv` are shares: [T, heads * D], to be summed over groups, dk still without the scale.
struct Outputs<'a> {
    dq: RowsMut<'a>,
    dk: RowsMut<'a>,
    dv: RowsMut<'a>,
}

/// One query head of one sequence.
struct Head<'a, T: Element + Plain> {
    inputs: &'a Inputs<'a>,
    outputs: &'a Outputs<'a>,
    tokens: Range<usize>,
    head: usize,
    keys: Keys<T>,
    /// Of the block's queries and of their dout: panels over D [D / 2][32 queries][2], and over queries, 32 of D each.
    q_panel: pool::Scratch<T>,
    q_columns: pool::Scratch<T>,
    dout_panel: pool::Scratch<T>,
    dout_columns: pool::Scratch<T>,
    /// [keys][32]: scores, then probabilities; gradients of probabilities, then of scores.
    p: pool::Scratch<f32>,
    ds: pool::Scratch<f32>,
    p_rounded: pool::Scratch<T>,
    ds_rounded: pool::Scratch<T>,
    /// [keys / 2][32][2]
    ds_panel: pool::Scratch<T>,
    /// [D][32]
    dq: pool::Scratch<f32>,
}

/// What a block's columns bring to the softmax.
#[derive(Clone, Copy)]
struct Columns {
    /// lse * log2 e; infinite for a column that is no query.
    lse: [f32; PANEL],
    /// Sum of dout * out.
    delta: [f32; PANEL],
}

impl<'a, T: Element + Plain> Head<'a, T> {
    fn new(
        inputs: &'a Inputs<'a>,
        outputs: &'a Outputs<'a>,
        tokens: Range<usize>,
        head: usize,
        keys: Keys<T>,
    ) -> Head<'a, T> {
        let head_dim = inputs.heads.head_dim;
        let columns = head_dim.next_multiple_of(PANEL) * PANEL;
        Head {
            inputs,
            outputs,
            tokens,
            head,
            keys,
            q_panel: scratch(PANEL * head_dim),
            q_columns: scratch(columns),
            dout_panel: scratch(PANEL * head_dim),
            dout_columns: scratch(columns),
            p: scratch(STRIP * PANEL),
            ds: scratch(STRIP * PANEL),
            p_rounded: scratch(STRIP * PANEL),
            ds_rounded: scratch(STRIP * PANEL),
            ds_panel: scratch(STRIP * PANEL),
            dq: scratch(head_dim * PANEL),
        }
    }

    fn run(mut self) {
        let head_dim = self.inputs.heads.head_dim;
        let columns = self.head * head_dim..(self.head + 1) * head_dim;
        for token in self.tokens.clone() {
            for share in [self.outputs.dk, self.outputs.dv] {
                // SAFETY: only this head's columns of the sequence's rows, which no other task has.
                let part = unsafe {
                    let first = share.ptr.add(token * share.stride + columns.start);
                    std::slice::from_raw_parts_mut(first, head_dim)
                };
                part.fill(0.0);
            }
        }
        for first in (0..self.tokens.len()).step_by(PANEL) {
            self.block(first..(first + PANEL).min(self.tokens.len()));
        }
    }

    /// 32 query positions against all keys they see.
    fn block(&mut self, queries: Range<usize>) {
        let head_dim = self.inputs.heads.head_dim;
        let columns = self.prepare(queries.clone());
        self.dq.fill(0.0);
        let first_key = self.inputs.scoring.first_key(queries.start) / PANEL * PANEL;
        for strip in (first_key..queries.end).step_by(STRIP) {
            self.strip(strip..(strip + STRIP).min(queries.end), queries.start, &columns);
        }
        // [D][32] back to rows.
        let mut rows = scratch::<f32>(PANEL * head_dim);
        let from = pack::Words {
            ptr: self.dq.as_ptr().cast(),
            stride: PANEL,
        };
        // SAFETY: D rows of 32 words in, 32 rows of D words out, both whole buffers.
        unsafe { pack::transpose(from, head_dim, PANEL, rows.as_mut_ptr().cast(), head_dim) };
        for (query, from) in queries.zip(rows.chunks_exact(head_dim)) {
            let dq = self.outputs.dq;
            // SAFETY: only this head's columns of one of the sequence's rows, which no other task has.
            let to = unsafe {
                let first = dq
                    .ptr
                    .add((self.tokens.start + query) * dq.stride + self.head * head_dim);
                std::slice::from_raw_parts_mut(first, head_dim)
            };
            sum_shares(from, self.inputs.scoring.scale as f32, to);
        }
    }

    /// Rounds and packs the block's queries and dout.
    fn prepare(&mut self, queries: Range<usize>) -> Columns {
        let Inputs {
            q,
            dout,
            out,
            lse,
            heads: Heads { head_dim, .. },
            ..
        } = *self.inputs;
        let range = self.head * head_dim..(self.head + 1) * head_dim;
        let tokens = queries.start + self.tokens.start..queries.end + self.tokens.start;
        let mut rounded = scratch::<T>(PANEL * head_dim);
        for (from, panel, columns) in [
            (q, &mut self.q_panel, &mut self.q_columns),
            (dout, &mut self.dout_panel, &mut self.dout_columns),
        ] {
            for (token, to) in tokens.clone().zip(rounded.chunks_exact_mut(head_dim)) {
                T::round(&from.row(token)[range.clone()], to);
            }
            // SAFETY: up to 32 rows of head_dim (even) in, one panel over head_dim out.
            unsafe {
                pack::pack_rows(
                    rounded.as_ptr(),
                    head_dim,
                    tokens.len(),
                    T::steps(head_dim),
                    panel.as_mut_ptr(),
                );
            }
            pack_columns(&rounded[..tokens.len() * head_dim], head_dim, columns);
        }
        let mut columns = Columns {
            lse: [f32::INFINITY; PANEL],
            delta: [0.0; PANEL],
        };
        for (i, token) in tokens.enumerate() {
            columns.lse[i] = lse.row(token)[self.head] * std::f32::consts::LOG2_E;
            columns.delta[i] = row_dot(&dout.row(token)[range.clone()], &out.row(token)[range.clone()]);
        }
        columns
    }

    /// One strip of keys against the block whose first query is `query`.
    fn strip(&mut self, keys: Range<usize>, query: usize, columns: &Columns) {
        let Inputs {
            heads: Heads { head_dim, .. },
            scoring,
            ..
        } = *self.inputs;
        let m = keys.len();
        let over_dims = |a: *const T, panel: &[T], c: &mut [f32]| {
            let (panels, c) = (panel.as_ptr(), c.as_mut_ptr());
            let steps = T::steps(head_dim);
            let sum = Sum::Set;
            let product_of = Product {
                m,
                steps,
                a,
                lda: head_dim,
                panels,
                panel_stride: 0,
                n: PANEL,
                c,
                ldc: PANEL,
                sum,
            };
            // SAFETY: fast paths exist; m rows of the sequence's keys or values, one panel, m rows of 32.
            unsafe { product(&product_of) }
        };
        over_dims(self.keys.k(keys.start), &self.q_panel, &mut self.p);
        over_dims(self.keys.v(keys.start), &self.dout_panel, &mut self.ds);

        // Keys behind a query and before its window. Most strips need no mask.
        let last_query = query + PANEL - 1;
        if keys.end > query + 1 || scoring.first_key(last_query) > keys.start {
            for (key, scores) in keys.clone().zip(self.p.chunks_exact_mut(PANEL)) {
                for (query, score) in (query..).zip(scores) {
                    if key > query || key < scoring.first_key(query) {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
        let (p, ds) = (&mut self.p[..m * PANEL], &mut self.ds[..m * PANEL]);
        match scoring.cap {
            None => score_gradients(p, ds, (scoring.scale * std::f64::consts::LOG2_E) as f32, columns),
            Some(cap) => capped_score_gradients(p, ds, (scoring.scale / cap) as f32, cap as f32, columns),
        }
        T::round(p, &mut self.p_rounded[..m * PANEL]);
        T::round(ds, &mut self.ds_rounded[..m * PANEL]);

        let group_width = self.outputs.dk.stride;
        let at = (self.tokens.start + keys.start) * group_width + self.head * head_dim;
        for (a, panels, share) in [
            (&self.ds_rounded, &self.q_columns, self.outputs.dk),
            (&self.p_rounded, &self.dout_columns, self.outputs.dv),
        ] {
            let over_queries = Product {
                m,
                steps: T::steps(PANEL),
                a: a.as_ptr(),
                lda: PANEL,
                panels: panels.as_ptr(),
                panel_stride: Geometry::V_PANEL,
                n: head_dim,
                c: share.ptr.wrapping_add(at),
                ldc: group_width,
                sum: Sum::Continue,
            };
            // SAFETY: m rows of 32; panels of all of D; this head's columns of the strip's rows, which no other task
            // has.
            unsafe { product(&over_queries) };
        }

        let zero = [T::default(); PANEL]; // The other half of an odd last key's pair.
        let (gradients, _) = self.ds_rounded[..m * PANEL].as_chunks::<PANEL>();
        let steps = self.ds_panel.chunks_exact_mut(PANEL * T::PER_STEP);
        for (rows, step) in gradients.chunks(T::PER_STEP).zip(steps) {
            pack::pack_step([&rows[0], rows.get(1).unwrap_or(&zero)], step);
        }
        let over_keys = Product {
            m: head_dim,
            steps: T::steps(m),
            a: self.keys.transposed(keys.start),
            lda: self.keys.layout.transposed_stride,
            panels: self.ds_panel.as_ptr(),
            panel_stride: 0,
            n: PANEL,
            c: self.dq.as_mut_ptr(),
            ldc: PANEL,
            sum: Sum::Continue,
        };
        // SAFETY: D rows of K transposed, zero behind the last key; the panel just packed; D rows of 32.
        unsafe { product(&over_keys) };
    }
}

vectorised!(
    /// Scores [keys][32] become probabilities 2^(scale score - lse); gradients of probabilities become p (dp - delta).
    fn score_gradients(scores: &mut [f32], gradients: &mut [f32], scale: f32, columns: &Columns) {
        let Columns { lse, delta } = *columns;
        let (scores, _) = scores.as_chunks_mut::<PANEL>();
        let (gradients, _) = gradients.as_chunks_mut::<PANEL>();
        for (scores, gradients) in scores.iter_mut().zip(gradients) {
            for lane in 0..PANEL {
                let p = exp2_nonpositive(scores[lane].mul_add(scale, -lse[lane]));
                scores[lane] = p;
                gradients[lane] = p * (gradients[lane] - delta[lane]);
            }
        }
    }
);

vectorised!(
    /// The same through score' = cap * tanh(scale * score), whose derivative is 1 - tanh^2.
    fn capped_score_gradients(
        scores: &mut [f32],
        gradients: &mut [f32],
        scale: f32,
        cap: f32,
        columns: &Columns,
    ) {
        let Columns { lse, delta } = *columns;
        let (scores, _) = scores.as_chunks_mut::<PANEL>();
        let (gradients, _) = gradients.as_chunks_mut::<PANEL>();
        for (scores, gradients) in scores.iter_mut().zip(gradients) {
            for lane in 0..PANEL {
                let masked = scores[lane] == f32::NEG_INFINITY;
                let tanh = 1.0 - 2.0 / (1.0 + exp(2.0 * scale * scores[lane]));
                let p = exp2_nonpositive((cap * std::f32::consts::LOG2_E).mul_add(tanh, -lse[lane]));
                let p = if masked { 0.0 } else { p };
                scores[lane] = p;
                gradients[lane] = p * (gradients[lane] - delta[lane]) * (1.0 - tanh * tanh);
            }
        }
    }
);

vectorised!(
    fn sink_probability(sink: f32, lse: f32) -> f32 {
        exp(sink - lse)
    }
);

vectorised!(
    fn row_dot(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }
);

vectorised!(
    /// to = factor * the sum of the parts of `from`, each as long as `to`.
    fn sum_shares(from: &[f32], factor: f32, to: &mut [f32]) {
        let mut parts = from.chunks_exact(to.len());
        to.copy_from_slice(parts.next().expect("a group has a head"));
        for part in parts {
            for (to, from) in to.iter_mut().zip(part) {
                *to += from;
            }
        }
        for to in to {
            *to *= factor;
        }
    }
);

const _: () = assert!(STRIP.is_multiple_of(PANEL) && MAX_HEAD_DIM.is_multiple_of(PANEL));
