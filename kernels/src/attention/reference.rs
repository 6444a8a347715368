//! Attention in plain tch, a sequence at a time, on any device: masked softmax over all scores. What the fast paths
//! are tested against, and what runs where there are none.

use tch::{Device, Kind, Tensor};

use crate::weight::Precision;

use super::cache::{BLOCK_SIZE, KvCache, PlainBlocks, Store};
use super::{Heads, Options, PackedOut, PagedSeq};

/// [`super::paged`] for a cache that keeps plain tensors.
pub fn paged_reference(
    q: &Tensor,
    cache: &KvCache,
    layer: usize,
    seqs: &[PagedSeq],
    heads: Heads,
    options: Options,
) -> Tensor {
    let Store::Plain(layers) = cache.store() else {
        panic!("this cache is kept in panels")
    };
    let [k, v] = &layers[layer];
    let out = q.zeros_like().contiguous();
    for seq in seqs {
        let blocks = seq.table[..seq.n_blocks()].iter();
        let blocks: Vec<i64> = blocks.map(|&block| i64::from(block)).collect();
        let blocks = Tensor::from_slice(&blocks).to_device(k.values.device());
        // What stands before them is seen by no row.
        let n_keys = (seq.kv_len - seq.first_block * BLOCK_SIZE) as i64;
        // [blocks, KVH, 32, D] -> [n_keys, KVH, D]
        let gather = |PlainBlocks { values, scales }: &PlainBlocks| {
            let values = values.index_select(0, &blocks);
            let x = match scales {
                Some(scales) => values.to_kind(q.kind()) * scales.index_select(0, &blocks).unsqueeze(-1),
                None => values,
            };
            let x = x.transpose(1, 2);
            let [_, _, kv_heads, head_dim] = x.size()[..] else {
                unreachable!("made with four dimensions")
            };
            x.reshape([-1, kv_heads, head_dim])
                .narrow(0, 0, n_keys)
                .to_kind(q.kind())
        };
        let rows = |x: &Tensor| x.narrow(0, seq.rows.start as i64, seq.rows.len() as i64);
        let (y, _) = attend(
            &rows(q),
            &gather(k),
            &gather(v),
            heads,
            options,
            cache.dtype().precision(),
        );
        rows(&out).copy_(&y);
    }
    out
}

/// [`super::packed`] on any device and in any dtype.
pub fn packed_reference(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[usize],
    heads: Heads,
    options: Options,
    precision: Precision,
) -> PackedOut {
    let kv = [-1, heads.kv_heads as i64, heads.head_dim as i64];
    let parts = cu_seqlens.windows(2).filter(|seq| seq[0] < seq[1]).map(|seq| {
        let part = |x: &Tensor| x.narrow(0, seq[0] as i64, (seq[1] - seq[0]) as i64);
        let (k, v) = (
            round(&part(k).reshape(kv), precision),
            round(&part(v).reshape(kv), precision),
        );
        attend(&part(q), &k, &v, heads, options, precision)
    });
    let (out, lse): (Vec<Tensor>, Vec<Tensor>) = parts.unzip();
    if out.is_empty() {
        return PackedOut {
            out: q.zeros_like(),
            lse: q.new_zeros([0, heads.heads as i64], (q.kind(), q.device())),
        };
    }
    PackedOut {
        out: Tensor::cat(&out, 0),
        lse: Tensor::cat(&lse, 0),
    }
}

/// [`super::packed_backward`] on any device and in any dtype, by the formulas of the softmax (no rounding but q, k, v).
#[expect(
    clippy::too_many_arguments,
    reason = "the forward's inputs, its result and its gradient"
)]
pub fn packed_backward_reference(
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
    let Heads {
        heads: h,
        kv_heads,
        head_dim,
    } = heads;
    let group = (h / kv_heads) as i64;
    let shape = |heads: usize| [-1, heads as i64, head_dim as i64];
    let (dq, dk, dv) = (
        q.zeros_like().contiguous(),
        k.zeros_like().contiguous(),
        v.zeros_like().contiguous(),
    );
    for seq in cu_seqlens.windows(2).filter(|seq| seq[0] < seq[1]) {
        let (start, len) = (seq[0] as i64, (seq[1] - seq[0]) as i64);
        let part = |x: &Tensor| x.narrow(0, start, len);
        // [H, L, D]; a KV head is repeated for its group.
        let of = |x: &Tensor, heads: usize| part(x).reshape(shape(heads)).transpose(0, 1);
        let spread =
            |x: &Tensor| round(&of(x, kv_heads), precision).repeat_interleave_self_int(group, 0, None);
        let (q, k, v) = (round(&of(q, h), precision), spread(k), spread(v));
        let (dout, out) = (of(dout, h), of(&attended.out, h));
        let raw = q.matmul(&k.transpose(1, 2)) * options.scale;
        let scores = capped(&raw, options);
        let lse = part(&attended.lse).tr().unsqueeze(2);
        let p = scores.masked_fill(&mask(len, len, options, q.device()), f64::NEG_INFINITY) - lse;
        let p = p.exp();
        let delta = (&dout * out).sum_dim_intlist([-1i64].as_slice(), true, q.kind());
        let mut ds = &p * (dout.matmul(&v.transpose(1, 2)) - delta) * options.scale;
        if let Some(cap) = options.cap {
            ds *= 1.0 - (scores / cap).square();
        }
        let gather = |x: Tensor| {
            x.view([kv_heads as i64, group, len, -1])
                .sum_dim_intlist([1i64].as_slice(), false, q.kind())
        };
        let rows = |x: Tensor| x.transpose(0, 1).reshape([len, -1]);
        part(&dq).copy_(&rows(ds.matmul(&k)));
        part(&dk).copy_(&rows(gather(ds.transpose(1, 2).matmul(&q))));
        part(&dv).copy_(&rows(gather(p.transpose(1, 2).matmul(&dout))));
    }
    (dq, dk, dv)
}

/// [`super::sinks_backward`] on any device and in any dtype.
pub fn sinks_backward_reference(
    sinks: &Tensor,
    attended: &PackedOut,
    dout: &Tensor,
    cu_seqlens: &[usize],
    heads: Heads,
) -> Tensor {
    let (first, end) = match cu_seqlens {
        [first, .., last] => (*first as i64, *last as i64),
        _ => return sinks.zeros_like(),
    };
    let part = |x: &Tensor| x.narrow(0, first, end - first);
    let delta = (part(dout) * part(&attended.out))
        .reshape([end - first, heads.heads as i64, -1])
        .sum_dim_intlist([-1i64].as_slice(), false, dout.kind());
    let p = (sinks - part(&attended.lse)).exp();
    -(p * delta).sum_dim_intlist([0i64].as_slice(), false, dout.kind())
}

/// One sequence: q [t, heads * D] at the last t of s positions, k and v [s, kv_heads, D] rounded already. Gives
/// [t, heads * D] and lse [t, heads].
fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    options: Options,
    precision: Precision,
) -> (Tensor, Tensor) {
    let (t, s) = (q.size()[0], k.size()[0]);
    let group = heads.group() as i64;
    let spread = |x: &Tensor| x.transpose(0, 1).repeat_interleave_self_int(group, 0, None); // [H, s, D]
    let q = round(q, precision)
        .reshape([t, heads.heads as i64, -1])
        .transpose(0, 1); // [H, t, D]
    let scores = capped(&(q.matmul(&spread(k).transpose(1, 2)) * options.scale), options);
    let scores = scores.masked_fill(&mask(t, s, options, q.device()), f64::NEG_INFINITY); // [H, t, s]
    let scores = match options.sinks {
        Some(sinks) => {
            let column = sinks.to_kind(scores.kind()).view([-1, 1, 1]);
            Tensor::cat(&[scores, column.expand([-1, t, 1], false)], -1)
        }
        None => scores,
    };
    let p = scores.softmax(-1, scores.kind()).narrow(-1, 0, s);
    let out = round(&p, precision)
        .matmul(&spread(v))
        .transpose(0, 1)
        .reshape([t, -1]);
    (out, scores.logsumexp([-1i64].as_slice(), false).tr().contiguous())
}

fn capped(scores: &Tensor, options: Options) -> Tensor {
    match options.cap {
        Some(cap) => (scores / cap).tanh() * cap,
        None => scores.shallow_clone(),
    }
}

/// [t, s], true where a query (the last t of s positions) does not see a key.
fn mask(t: i64, s: i64, options: Options, device: Device) -> Tensor {
    let key = Tensor::arange(s, (Kind::Int64, device)).unsqueeze(0);
    let query = Tensor::arange_start(s - t, s, (Kind::Int64, device)).unsqueeze(1);
    let future = key.gt_tensor(&query);
    match options.window {
        Some(window) => future.logical_or(&key.le_tensor(&(query - window.max(1)))),
        None => future,
    }
}

/// To the precision and back.
fn round(x: &Tensor, precision: Precision) -> Tensor {
    match precision {
        Precision::F32 => x.shallow_clone(),
        Precision::Bf16 => x.to_kind(Kind::BFloat16).to_kind(x.kind()),
    }
}
