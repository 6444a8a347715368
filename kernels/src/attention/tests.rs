//! The fast paths against the references, and the promises about bits.

use tch::{Device, Kind, Tensor};

use super::*;
use crate::gpu;
use crate::places::PagedGroup;
use crate::rope::{Rope, RopeLayout, RopeScaling, RopeSpec};
use crate::weight::Precision;

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

fn options(head_dim: usize) -> Options<'static> {
    Options {
        scale: 1.0 / (head_dim as f64).sqrt(),
        window: None,
        cap: None,
        sinks: None,
    }
}

/// Some below and some above what the scores are.
fn sinks(heads: usize) -> Option<&'static Tensor> {
    Some(Box::leak(Box::new(
        Tensor::randn([heads as i64], FLOAT) * 3.0 + 1.0,
    )))
}

/// q, k and v as views of one fused tensor, already representable in bfloat16, so that only the rounding of
/// probabilities tells a reference in float64 from the fast path.
fn qkv(tokens: usize, heads: Heads) -> [Tensor; 3] {
    let Heads {
        heads,
        kv_heads,
        head_dim,
    } = heads;
    let widths = [heads, kv_heads, kv_heads].map(|n| (n * head_dim) as i64);
    let fused = Tensor::randn([tokens as i64, widths.iter().sum::<i64>() + 3], FLOAT) * 1.5;
    let fused = fused.to_kind(Kind::BFloat16).to_kind(Kind::Float);
    let mut start = 1;
    widths.map(|width| {
        start += width;
        fused.narrow(1, start - width, width)
    })
}

fn cache(heads: Heads, dtype: impl Into<CacheDtype>, blocks: usize) -> KvCache {
    let Heads {
        kv_heads, head_dim, ..
    } = heads;
    let shape = CacheShape {
        layers: 2,
        blocks,
        kv_heads,
        head_dim,
    };
    KvCache::new(shape, dtype, Device::Cpu).expect("a small cache")
}

/// Blocks in a scattered order with a run in it, different for each sequence.
fn tables(lens: &[usize]) -> Vec<Vec<u32>> {
    let total: usize = lens.iter().map(|len| len.div_ceil(BLOCK_SIZE)).sum();
    let mut free: Vec<u32> = (0..total as u32).collect();
    free.rotate_left(total / 3);
    free[..total / 2].reverse();
    lens.iter()
        .map(|len| free.drain(..len.div_ceil(BLOCK_SIZE)).collect())
        .collect()
}

fn slots(table: &[u32], positions: Range<usize>) -> Vec<i64> {
    let slot = |position: usize| table[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE;
    positions.map(|position| slot(position) as i64).collect()
}

fn close(got: &Tensor, want: &Tensor, tolerance: f64, what: &str) {
    let scale = want.abs().max().double_value(&[]).max(1.0);
    let worst = (got.to_kind(Kind::Double) - want).abs().max().double_value(&[]);
    assert!(worst <= tolerance * scale, "{what}: off by {worst} of {scale}");
}

/// The same bits; the references, and devices beside them, promise nearness only.
fn same(got: &Tensor, want: &Tensor, what: &str) {
    match crate::vector::available() || gpu::emulating().is_some() {
        true => assert_eq!(got, want, "{what}"),
        false => close(got, &want.to_kind(Kind::Double), 4e-3, what),
    }
}

/// Heads, lengths and options of the cases: groups 1, 3, 7, 8; D 16 to 256; lengths around blocks and segments, and
/// over several segments with windows that end at their borders.
fn cases() -> Vec<(Heads, Vec<usize>, Options<'static>)> {
    let heads = |heads, kv_heads, head_dim| Heads {
        heads,
        kv_heads,
        head_dim,
    };
    let mut cases = Vec::new();
    for (heads, lens) in [
        (heads(1, 1, 16), vec![1, 2, 31, 32, 33]),
        (heads(9, 3, 64), vec![1, 70, 300, 5]),
        (heads(7, 1, 32), vec![64, 257, 3]),
        (heads(16, 2, 128), vec![40, 130]),
        (heads(4, 4, 80), vec![35, 96]),
        (heads(2, 1, 256), vec![50]),
    ] {
        for (window, cap, sink) in [
            (None, None, false),
            (None, None, true),
            (Some(1), None, true),
            (Some(45), None, false),
            (None, Some(3.0), true),
            (Some(100), Some(20.0), false),
        ] {
            let options = Options {
                window,
                cap,
                sinks: sink.then(|| sinks(heads.heads)).flatten(),
                ..options(heads.head_dim)
            };
            cases.push((heads, lens.clone(), options));
        }
    }
    let (block, segment) = (BLOCK_SIZE as i64, SEGMENT as i64);
    for window in [block, block + 1, segment - 1, segment, segment + 1, 3 * segment] {
        let options = Options {
            window: Some(window),
            sinks: sinks(2),
            ..options(16)
        };
        cases.push((heads(2, 1, 16), vec![900, 290], options));
    }
    cases
}

/// Of the cases each fifth on an emulated device, which takes its time: all heads, and all options with some of them.
fn cases_here() -> Vec<(Heads, Vec<usize>, Options<'static>)> {
    let step = if gpu::emulating().is_some() { 5 } else { 1 };
    cases().into_iter().step_by(step).collect()
}

fn cu_seqlens(lens: &[usize]) -> Vec<usize> {
    let mut ends = vec![0];
    lens.iter().for_each(|len| ends.push(ends[ends.len() - 1] + len));
    ends
}

/// Float32 within 2e-6 of the largest value of the float64 reference, bfloat16 (probabilities rounded to 8 bits) within
/// 4e-3; lse within 1e-5.
#[test]
fn packed_agrees_with_the_reference() {
    gpu::everywhere(judge_packed);
}

fn judge_packed() {
    for (heads, lens, options) in cases_here() {
        let [q, k, v] = qkv(lens.iter().sum(), heads);
        let ends = cu_seqlens(&lens);
        let double = [&q, &k, &v].map(|x| x.to_kind(Kind::Double));
        let [dq, dk, dv] = &double;
        let want = packed_reference(dq, dk, dv, &ends, heads, options, Precision::F32);
        for precision in BOTH {
            let got = packed(&q, &k, &v, &ends, heads, options, precision);
            let what = format!("{heads:?} {options:?} {precision:?}");
            let tolerance = if precision == Precision::F32 { 2e-6 } else { 4e-3 };
            close(&got.out, &want.out, tolerance, &what);
            close(&got.lse, &want.lse, 1e-5, &what);
        }
    }
}

/// The explicit formulas against autograd through the forward, in float64.
#[test]
fn reference_backward_is_autograd() {
    let heads = Heads {
        heads: 6,
        kv_heads: 2,
        head_dim: 8,
    };
    let ends = [0, 5, 5, 17];
    for (window, cap, sink) in [
        (None, None, false),
        (Some(4), None, true),
        (None, Some(2.0), false),
        (Some(4), Some(2.0), true),
    ] {
        let learned = Tensor::randn([6], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let options = Options {
            window,
            cap,
            sinks: sink.then_some(&learned),
            ..options(8)
        };
        let inputs = qkv(17, heads).map(|x| x.to_kind(Kind::Double).contiguous().set_requires_grad(true));
        let [q, k, v] = &inputs;
        let forward = packed_reference(q, k, v, &ends, heads, options, Precision::F32);
        let dout = forward.out.randn_like();
        let loss = (&forward.out * &dout).sum(Kind::Double);
        let sources = [q, k, v].into_iter().chain(options.sinks).collect::<Vec<_>>();
        let want = Tensor::run_backward(&[loss], &sources, false, false);
        let [q, k, v] = inputs.each_ref().map(Tensor::detach);
        let attended = PackedOut {
            out: forward.out.detach(),
            lse: forward.lse.detach(),
        };
        let f32 = Precision::F32;
        let got = packed_backward_reference(&q, &k, &v, &attended, &dout, &ends, heads, options, f32);
        for (got, want) in [got.0, got.1, got.2].iter().zip(&want) {
            close(got, want, 1e-12, "reference");
        }
        if sink {
            let got = sinks_backward_reference(&learned.detach(), &attended, &dout, &ends, heads);
            close(&got, &want[3], 1e-12, "sinks");
        }
    }
}

/// Float32 within 1e-5 of the largest gradient of the float64 reference, bfloat16 within 2e-2.
#[test]
fn packed_backward_agrees_with_the_reference() {
    gpu::everywhere(judge_packed_backward);
}

fn judge_packed_backward() {
    for (heads, lens, options) in cases_here() {
        let tokens: usize = lens.iter().sum();
        let [q, k, v] = qkv(tokens, heads);
        let ends = cu_seqlens(&lens);
        let dout = Tensor::randn([tokens as i64, (heads.heads * heads.head_dim) as i64], FLOAT);
        let dout = dout.to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let [q64, k64, v64, dout64] = [&q, &k, &v, &dout].map(|x| x.to_kind(Kind::Double));
        let f32 = Precision::F32;
        let attended64 = packed_reference(&q64, &k64, &v64, &ends, heads, options, f32);
        let want =
            packed_backward_reference(&q64, &k64, &v64, &attended64, &dout64, &ends, heads, options, f32);
        for precision in BOTH {
            let attended = packed(&q, &k, &v, &ends, heads, options, precision);
            let got = packed_backward(&q, &k, &v, &attended, &dout, &ends, heads, options, precision);
            let tolerance = if precision == f32 { 1e-5 } else { 2e-2 };
            if let Some(sinks) = options.sinks {
                let got = sinks_backward(sinks, &attended, &dout, &ends, heads);
                let want = sinks_backward_reference(sinks, &attended64, &dout64, &ends, heads);
                // A sum over all rows, so their roundings add up.
                close(
                    &got,
                    &want,
                    3.0 * tolerance,
                    &format!("sinks {heads:?} {precision:?}"),
                );
            }
            for (name, got, want) in [
                ("dq", got.0, &want.0),
                ("dk", got.1, &want.1),
                ("dv", got.2, &want.2),
            ] {
                close(
                    &got,
                    want,
                    tolerance,
                    &format!("{name} {heads:?} {options:?} {precision:?}"),
                );
            }
        }
    }
}

/// Whole prompts through the cache, in a mixed batch and a scattered order, give the bits of the packed path.
#[test]
fn paged_is_packed_bit_for_bit() {
    gpu::everywhere(judge_paged_by_packed);
}

fn judge_paged_by_packed() {
    for (heads, lens, options) in cases_here() {
        let [q, k, v] = qkv(lens.iter().sum(), heads);
        let (ends, tables) = (cu_seqlens(&lens), tables(&lens));
        for precision in BOTH {
            let cache = cache(heads, precision, tables.iter().map(Vec::len).sum());
            let all: Vec<i64> = tables
                .iter()
                .zip(&lens)
                .flat_map(|(table, len)| slots(table, 0..*len))
                .collect();
            write(&cache, 1, &k, &v, &all);
            let seqs: Vec<PagedSeq> = (0..lens.len())
                .map(|i| PagedSeq {
                    rows: ends[i]..ends[i + 1],
                    table: &tables[i],
                    first_block: 0,
                    kv_len: lens[i],
                })
                .collect();
            let got = paged(&q, &cache, 1, &seqs, heads, options);
            let want = packed(&q, &k, &v, &ends, heads, options, precision).out;
            let what = format!("{heads:?} {options:?} {precision:?}");
            same(&got, &want, &what);
            if precision == Precision::F32 {
                close(&got, &want.to_kind(Kind::Double), 4e-6, &what);
            }
        }
    }
}

/// However a prompt is cut into chunks, down to single tokens, alone or beside others, on one thread or many: the same
/// bits. The blocks hold the remains (NaN) of an earlier owner, and of a later one as soon as a window left them behind.
#[test]
fn chunks_neighbours_and_threads_change_no_bit() {
    gpu::everywhere(judge_chunks);
}

fn judge_chunks() {
    let (many, two) = (
        Heads {
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
        },
        Heads {
            heads: 2,
            kv_heads: 2,
            head_dim: 16,
        },
    );
    for (heads, window, sink) in [
        (many, None, false),
        (many, Some(77), true),
        (two, None, true),
        (two, Some(BLOCK_SIZE as i64), false),
        (two, Some(SEGMENT as i64), true),
        (two, Some(SEGMENT as i64 + 1), false),
    ] {
        let options = Options {
            window,
            sinks: sink.then(|| sinks(heads.heads)).flatten(),
            ..options(heads.head_dim)
        };
        let len = if gpu::emulating().is_some() { 300 } else { 700 };
        let [q, k, v] = qkv(len, heads);
        let table: Vec<u32> = (0..len.div_ceil(BLOCK_SIZE) as u32)
            .map(|block| (block * 7) % 22)
            .collect();
        for dtype in [CacheDtype::F32, CacheDtype::Bf16, CacheDtype::Int8] {
            let want = match dtype {
                _ if gpu::emulating().is_some() => whole(&q, &k, &v, heads, options, dtype),
                CacheDtype::Int8 => whole(&q, &k, &v, heads, options, dtype),
                _ => packed(&q, &k, &v, &[0, len], heads, options, dtype.precision()).out,
            };
            let chunks: &[usize] = if gpu::emulating().is_some() {
                &[7, 256]
            } else {
                &[1, 37, 256, 700]
            };
            for &chunk in chunks {
                let cache = cache(heads, dtype, 22);
                let every: Vec<i64> = (0..22 * BLOCK_SIZE as i64).collect();
                let nan = Tensor::full([every.len() as i64, k.size()[1]], f64::NAN, FLOAT);
                write(&cache, 0, &nan, &nan, &every);
                for start in (0..len).step_by(chunk) {
                    let rows = start..(start + chunk).min(len);
                    let part = |x: &Tensor| x.narrow(0, rows.start as i64, rows.len() as i64);
                    write(&cache, 0, &part(&k), &part(&v), &slots(&table, rows.clone()));
                    let first_block = options.scoring().first_key(rows.start) / BLOCK_SIZE;
                    let behind = slots(&table, 0..first_block * BLOCK_SIZE);
                    let nan = nan.narrow(0, 0, behind.len() as i64);
                    write(&cache, 0, &nan, &nan, &behind);
                    let seq = PagedSeq {
                        rows: 0..rows.len(),
                        table: &table[first_block..],
                        first_block,
                        kv_len: rows.end,
                    };
                    let got = paged(&part(&q), &cache, 0, &[seq], heads, options);
                    let what = format!("chunk {chunk} rows {rows:?} {options:?} {dtype:?}");
                    match gpu::emulating() {
                        Some(_) => assert_eq!(got, part(&want), "{what}"),
                        None => same(&got, &part(&want), &what),
                    }
                }
            }
        }
    }
}

fn write(cache: &KvCache, layer: usize, k: &Tensor, v: &Tensor, slots: &[i64]) {
    super::write(cache, layer, k, v, &slots.into());
}

fn paged(
    q: &Tensor,
    cache: &KvCache,
    layer: usize,
    seqs: &[PagedSeq],
    heads: Heads,
    options: Options,
) -> Tensor {
    let group = PagedGroup::new(&[][..], seqs.to_vec());
    super::paged(q, cache, layer, &group, heads, options)
}

/// One sequence through a cache of its own.
fn whole(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, options: Options, dtype: CacheDtype) -> Tensor {
    let len = q.size()[0] as usize;
    let table = &tables(&[len])[0];
    let cache = cache(heads, dtype, table.len());
    write(&cache, 1, k, v, &slots(table, 0..len));
    let seq = PagedSeq {
        rows: 0..len,
        table,
        first_block: 0,
        kv_len: len,
    };
    paged(q, &cache, 1, &[seq], heads, options)
}

/// `[T, heads * D]` through 8 bits: the largest of each token and head is 127 steps.
fn through_codes(x: &Tensor, head_dim: usize) -> Tensor {
    let heads = x.reshape([x.size()[0], -1, head_dim as i64]);
    let (codes, scales) = super::codes::encode_reference(&heads);
    let back = codes.to_kind(Kind::Float) * scales.unsqueeze(-1);
    let step = heads.abs().amax([-1i64].as_slice(), true) / 127.0;
    let off = ((&back - &heads).abs() / step).max().double_value(&[]);
    assert!(off < 0.5001, "half a step at most, not {off}");
    back.reshape(x.size())
}

/// An int8 cache stands for code times scale, exactly: within the rounding of probabilities to bfloat16 of a float64
/// reference that is given those. On the plain path too.
#[test]
fn int8_is_its_definition() {
    gpu::everywhere(judge_int8);
}

fn judge_int8() {
    let irregular = Heads {
        heads: 4,
        kv_heads: 2,
        head_dim: 12,
    };
    let plain = (irregular, vec![70], options(12));
    for (heads, lens, options) in cases_here().into_iter().chain([plain]) {
        for len in lens {
            let [q, k, v] = qkv(len, heads);
            let got = whole(&q, &k, &v, heads, options, CacheDtype::Int8);
            let [k, v] = [&k, &v].map(|x| through_codes(x, heads.head_dim).to_kind(Kind::Double));
            let q = q.to_kind(Kind::Double);
            let want = packed_reference(&q, &k, &v, &[0, len], heads, options, Precision::F32).out;
            close(&got, &want, 4e-3, &format!("{heads:?} {len} {options:?}"));
        }
    }
}

/// A value that is no number makes the rows that see it no numbers, as in the other dtypes.
#[test]
fn int8_hides_no_nan() {
    gpu::everywhere(judge_nan);
}

fn judge_nan() {
    for head_dim in [16, 12] {
        let heads = Heads {
            heads: 2,
            kv_heads: 1,
            head_dim,
        };
        for bad in [f64::NAN, f64::INFINITY] {
            let [q, k, v] = qkv(40, heads);
            let v = v.contiguous();
            let _ = v.narrow(0, 20, 1).narrow(1, 3, 1).fill_(bad);
            let got = whole(&q, &k, &v, heads, options(head_dim), CacheDtype::Int8).isfinite();
            let after = bool::try_from(got.narrow(0, 20, 20).any()).expect("a boolean");
            assert!(!after, "D {head_dim} {bad}");
        }
    }
}

/// Blocks that lie before the window of every row are not read, neither for a decoded token nor for a chunk, whatever
/// stands in them: time and memory follow the window.
#[test]
fn blocks_before_the_window_are_not_read() {
    gpu::everywhere(judge_unread_blocks);
}

fn judge_unread_blocks() {
    let heads = Heads {
        heads: 6,
        kv_heads: 2,
        head_dim: 32,
    };
    let (len, window) = (900, 200);
    let options = Options {
        window: Some(window as i64),
        ..options(32)
    };
    let [q, k, v] = qkv(len, heads);
    let table = &tables(&[len])[0];
    for precision in BOTH {
        let want = packed(&q, &k, &v, &[0, len], heads, options, precision).out;
        for rows in [len - 1..len, 860..900, 640..900] {
            let cache = cache(heads, precision, table.len());
            write(&cache, 0, &k, &v, &slots(table, 0..len));
            let unread = (rows.start + 1 - window) / BLOCK_SIZE * BLOCK_SIZE;
            let nan = Tensor::full([unread as i64, k.size()[1]], f64::NAN, FLOAT);
            write(&cache, 0, &nan, &nan, &slots(table, 0..unread));
            let part = |x: &Tensor| x.narrow(0, rows.start as i64, rows.len() as i64);
            let seq = PagedSeq {
                rows: 0..rows.len(),
                table,
                first_block: 0,
                kv_len: len,
            };
            let got = paged(&part(&q), &cache, 0, &[seq], heads, options);
            same(&got, &part(&want), &format!("rows {rows:?} {precision:?}"));
        }
    }
}

/// The gradients of a sequence do not depend on the others of the batch.
#[test]
fn a_sequence_alone_has_the_gradients_it_has_in_a_batch() {
    let heads = Heads {
        heads: 6,
        kv_heads: 2,
        head_dim: 32,
    };
    let lens = [90, 33, 200];
    let ends = cu_seqlens(&lens);
    let [q, k, v] = qkv(ends[3], heads);
    let dout = Tensor::randn([ends[3] as i64, 6 * 32], FLOAT);
    for precision in BOTH {
        let run = |range: Range<usize>, ends: &[usize]| {
            let part = |x: &Tensor| x.narrow(0, range.start as i64, range.len() as i64);
            let (q, k, v) = (part(&q), part(&k), part(&v));
            let attended = packed(&q, &k, &v, ends, heads, options(32), precision);
            packed_backward(
                &q,
                &k,
                &v,
                &attended,
                &part(&dout),
                ends,
                heads,
                options(32),
                precision,
            )
        };
        let all = run(0..ends[3], &ends);
        for seq in ends.windows(2) {
            let alone = run(seq[0]..seq[1], &[0, seq[1] - seq[0]]);
            let part = |x: &Tensor| x.narrow(0, seq[0] as i64, (seq[1] - seq[0]) as i64);
            assert!(
                alone.0 == part(&all.0) && alone.1 == part(&all.1) && alone.2 == part(&all.2),
                "{seq:?}"
            );
        }
    }
}

/// Head dimensions without a fast path go through the plain cache and the references: the same numbers.
#[test]
fn other_head_dimensions_take_the_reference() {
    let heads = Heads {
        heads: 4,
        kv_heads: 2,
        head_dim: 12,
    };
    let [q, k, v] = qkv(50, heads);
    for precision in BOTH {
        let cache = cache(heads, precision, 4);
        let table = [3, 1];
        write(&cache, 0, &k, &v, &slots(&table, 0..50));
        let seq = PagedSeq {
            rows: 10..20,
            table: &table,
            first_block: 0,
            kv_len: 50,
        };
        let got = paged(&q, &cache, 0, &[seq], heads, options(12));
        let q = Tensor::cat(&[q.narrow(0, 0, 40), q.narrow(0, 10, 10)], 0);
        let want = packed(&q, &k, &v, &[0, 50], heads, options(12), precision).out;
        assert!(
            (got.narrow(0, 10, 10) - want.narrow(0, 40, 10))
                .abs()
                .max()
                .double_value(&[])
                < 1e-5
        );
        assert_eq!(got.narrow(0, 0, 10).abs().max().double_value(&[]), 0.0);
        // Block 0 is behind the window of all rows.
        let nan = Tensor::full([32, k.size()[1]], f64::NAN, FLOAT);
        write(&cache, 0, &nan, &nan, &slots(&table, 0..32));
        let seq = PagedSeq {
            rows: 0..10,
            table: &table[1..],
            first_block: 1,
            kv_len: 50,
        };
        let options = Options {
            window: Some(8),
            ..options(12)
        };
        let got = paged(&q.narrow(0, 40, 10), &cache, 0, &[seq], heads, options);
        let want = packed(&q, &k, &v, &[0, 50], heads, options, precision).out;
        let off = (got - want.narrow(0, 40, 10)).abs().max().double_value(&[]);
        assert!(off < 1e-5, "off by {off}");
    }
}

#[test]
#[should_panic(expected = "the key of position 31 is seen, the blocks begin with 32")]
fn no_table_begins_behind_a_key_that_is_seen() {
    let heads = Heads {
        heads: 1,
        kv_heads: 1,
        head_dim: 16,
    };
    let seq = PagedSeq {
        rows: 0..1,
        table: &[0],
        first_block: 1,
        kv_len: 40,
    };
    let options = Options {
        window: Some(9),
        ..options(16)
    };
    let cache = cache(heads, Precision::F32, 1);
    drop(paged(
        &Tensor::zeros([1, 16], FLOAT),
        &cache,
        0,
        &[seq],
        heads,
        options,
    ));
}

#[test]
fn bytes_are_what_is_stored() {
    let shape = CacheShape {
        layers: 2,
        blocks: 10,
        kv_heads: 3,
        head_dim: 64,
    };
    let cache = KvCache::new(shape, Precision::Bf16, Device::Cpu).expect("a small cache");
    assert_eq!(cache.bytes(), 2 * 10 * 3 * 64 * 2 * BLOCK_SIZE * 2);
    assert_eq!(shape.block_bytes(Precision::F32) * 10, 2 * cache.bytes());
    let scales = 2 * 10 * 3 * 2 * BLOCK_SIZE * 4;
    assert_eq!(
        shape.block_bytes(CacheDtype::Int8) * 10,
        cache.bytes() / 2 + scales
    );
}

/// Turning and writing at once is one after the other, also where rows cannot be read in place.
#[test]
fn turning_and_writing_is_both() {
    gpu::everywhere(|| {
        let heads = Heads {
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
        };
        let spec = RopeSpec {
            theta: 1e4,
            rotary_dim: 32,
            layout: RopeLayout::Half,
            scaling: RopeScaling::None,
        };
        let rope = Rope::new(&spec, 64, 64, Device::Cpu).expect("a small table");
        let (positions, table) = ((0..40).collect::<Vec<i64>>(), [1, 0]);
        let slots = slots(&table, 0..40);
        let seq = || PagedSeq {
            rows: 0..40,
            table: &table,
            first_block: 0,
            kv_len: 40,
        };
        for (dtype, gap) in [
            (CacheDtype::F32, 0),
            (CacheDtype::Bf16, 4),
            (CacheDtype::Int8, 0),
            (CacheDtype::Bf16, 1),
        ] {
            let apart = Tensor::randn([40, 8 * 64 + gap], FLOAT).narrow(1, 0, 8 * 64);
            let at_once = Tensor::randn([40, 8 * 64 + gap], FLOAT).narrow(1, 0, 8 * 64);
            at_once.shallow_clone().copy_(&apart);
            let [first, second] = [(); 2].map(|()| cache(heads, dtype, 2));
            rope.apply(&apart.narrow(1, 0, 6 * 64), &(&positions).into());
            write(
                &first,
                1,
                &apart.narrow(1, 4 * 64, 128),
                &apart.narrow(1, 6 * 64, 128),
                &slots,
            );
            turn_and_write(
                &second,
                1,
                &at_once,
                heads,
                &rope,
                &(&positions).into(),
                &(&slots).into(),
            );
            let [want, got] = [(&apart, &first), (&at_once, &second)]
                .map(|(qkv, cache)| paged(&qkv.narrow(1, 0, 4 * 64), cache, 1, &[seq()], heads, options(64)));
            assert_eq!(got, want, "{dtype:?} {gap}");
        }
    });
}
