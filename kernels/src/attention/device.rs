//! Attention on a device with kernels of ours: the pages, who launches what, and how a step is cut over the device
//! ([`Cut`]). The kernels are in `kernels/gpu/{pages,attention,attention_f32,segments}.cu`.
//!
//! A row's bits do not depend on the cut: it is free to follow the number of rows and the lengths.

use tch::{Kind, Tensor};

use crate::gpu::{self, Arg, Gpu, int};
use crate::places::{Ints, PagedGroup, PagedThere};
use crate::rope::{Rope, Turns};

use super::cache::{BLOCK_SIZE, CacheDtype, CacheShape, KvCache};
use super::{Heads, Options, PagedSeq, SEGMENT};

/// The head dimensions of `attention.cu`; float32 takes all multiples of 4 up to the last.
const HEAD_DIMS: [usize; 7] = [16, 32, 64, 80, 96, 128, 256];

pub(super) fn has_kernels(dtype: CacheDtype, head_dim: usize) -> bool {
    match dtype {
        CacheDtype::F32 => head_dim > 0 && head_dim.is_multiple_of(4) && head_dim <= 256,
        CacheDtype::Bf16 | CacheDtype::Int8 => HEAD_DIMS.contains(&head_dim),
    }
}

/// A head's keys and values of a block.
pub(super) fn page_bytes(dtype: CacheDtype, head_dim: usize) -> usize {
    let numbers = 2 * BLOCK_SIZE * head_dim;
    match dtype {
        CacheDtype::F32 => numbers * size_of::<f32>(),
        CacheDtype::Bf16 => numbers * size_of::<u16>(),
        CacheDtype::Int8 => numbers + super::codes::SCALES_LEN,
    }
}

/// [`super::write`] into the pages of a layer. A slot of -1 is a row of padding.
pub(super) fn write(pages: &Tensor, cache: &KvCache, k: &Tensor, v: &Tensor, slots: &Ints) {
    let CacheShape {
        kv_heads, head_dim, ..
    } = cache.shape();
    check_slots(cache, slots);
    put(
        k,
        v,
        pages,
        cache.dtype(),
        kv_heads,
        head_dim,
        &slots.on(pages.device()),
    );
}

/// Keys and values `[T, kv_heads * head_dim]` into pages, `slots` `[T]` int32 on the device.
pub(super) fn put(
    k: &Tensor,
    v: &Tensor,
    pages: &Tensor,
    dtype: CacheDtype,
    kv_heads: usize,
    head_dim: usize,
    slots: &Tensor,
) {
    let gpu = kernels(k);
    let ((k, k_stride), (v, v_stride)) = (readable(k), readable(v));
    let name = match dtype {
        CacheDtype::F32 => "kv_write_f32",
        CacheDtype::Bf16 => "kv_write_bf16",
        CacheDtype::Int8 => "kv_write_int8",
    };
    let args = [
        (&k).into(),
        (&v).into(),
        slots.into(),
        pages.into(),
        k_stride.into(),
        v_stride.into(),
        int(kv_heads),
        int(head_dim),
    ];
    let grid = [k.size()[0] as usize, kv_heads.div_ceil(4), 1];
    gpu.launch(name, grid, 4 * gpu.warp(), &args);
}

/// [`super::turn_and_write`] in one launch.
pub(super) fn turn_and_write(
    pages: &Tensor,
    cache: &KvCache,
    qkv: &Tensor,
    heads: Heads,
    rope: &Rope,
    positions: &Ints,
    slots: &Ints,
) {
    check_slots(cache, slots);
    let gpu = kernels(qkv);
    let name = match cache.dtype() {
        CacheDtype::F32 => "rope_kv_write_f32",
        CacheDtype::Bf16 => "rope_kv_write_bf16",
        CacheDtype::Int8 => "rope_kv_write_int8",
    };
    let device = pages.device();
    let (positions, slots) = (positions.on(device), slots.on(device));
    let Turns {
        table,
        half,
        interleaved,
    } = rope.turns();
    let args = [
        qkv.into(),
        table.into(),
        (&positions).into(),
        (&slots).into(),
        pages.into(),
        qkv.stride()[0].into(),
        int(heads.heads),
        int(heads.kv_heads),
        int(heads.head_dim),
        int(half),
        interleaved.into(),
    ];
    let grid = [
        qkv.size()[0] as usize,
        (heads.heads + heads.kv_heads).div_ceil(4),
        1,
    ];
    gpu.launch(name, grid, 4 * gpu.warp(), &args);
}

/// Whether rows of float32 can be read, and written, where they are.
pub(super) fn in_place(x: &Tensor) -> bool {
    let [stride, step] = x.stride()[..] else {
        return false;
    };
    let aligned = (x.data_ptr() as usize).is_multiple_of(16) && (stride % 4 == 0 || x.size()[0] <= 1);
    x.kind() == Kind::Float && step == 1 && aligned
}

fn check_slots(cache: &KvCache, slots: &Ints) {
    let limit = (cache.shape().blocks * BLOCK_SIZE) as i64;
    if let Some(slot) = slots.iter().find(|slot| !(-1..limit).contains(*slot)) {
        panic!("slot {slot} of a cache of {limit}");
    }
}

/// [`super::paged`] over the pages of a layer.
pub(super) fn paged(
    q: &Tensor,
    pages: &Tensor,
    dtype: CacheDtype,
    group: &PagedGroup,
    heads: Heads,
    options: Options,
) -> Tensor {
    let attended: usize = group.seqs.iter().map(|seq| seq.rows.len()).sum();
    group.with_cut(pages.device(), heads, dtype, |there, cut| {
        attend(q, pages, dtype, (there, cut, attended), heads, options, None)
    })
}

/// Attention over pages as a step was cut, `attended` rows in all; `lse` `[T, heads]` is written where asked for.
pub(super) fn attend(
    q: &Tensor,
    pages: &Tensor,
    dtype: CacheDtype,
    (there, cut, attended): (&PagedThere, &CutThere, usize),
    heads: Heads,
    options: Options,
    lse: Option<&Tensor>,
) -> Tensor {
    let gpu = kernels(q);
    let device = pages.device();
    let Heads {
        heads: query_heads,
        kv_heads,
        head_dim,
    } = heads;
    let (q, q_stride) = readable(q);
    let size = [q.size()[0], (query_heads * head_dim) as i64];
    let out = match attended as i64 == size[0] {
        true => Tensor::empty(size, (Kind::Float, device)),
        false => Tensor::zeros(size, (Kind::Float, device)),
    };
    let sinks = options.sinks.map(|sinks| sinks.to_kind(Kind::Float).contiguous());
    let window = window_of(options);
    let record = (query_heads * (head_dim + 4)) as i64;
    let part = (cut.records > 0).then(|| Tensor::empty([cut.records as i64 * record], (Kind::Float, device)));
    let mut args: Vec<Arg> = vec![
        (&q).into(),
        pages.into(),
        (&there.tables).into(),
        (&there.seqs).into(),
        (&cut.items).into(),
        sinks.as_ref().into(),
        (&out).into(),
        part.as_ref().into(),
        lse.into(),
        q_stride.into(),
        int(query_heads),
        int(kv_heads),
        window.into(),
        (options.scale as f32).into(),
        (options.cap.unwrap_or(0.0) as f32).into(),
    ];
    let grid = [cut.n_items, kv_heads, 1];
    let tile = cut.tile;
    match dtype {
        CacheDtype::F32 => {
            args.push(int(head_dim));
            gpu.launch("attention_f32", grid, 256, &args);
        }
        CacheDtype::Bf16 => {
            let name = format!("attention_{tile}x{head_dim}");
            gpu.launch(&name, grid, 4 * gpu.warp(), &args);
        }
        CacheDtype::Int8 => {
            let name = format!("attention_{tile}x{head_dim}_int8");
            gpu.launch(&name, grid, 4 * gpu.warp(), &args);
        }
    }
    let args = [
        part.as_ref().into(),
        (&cut.merges).into(),
        sinks.as_ref().into(),
        (&out).into(),
        lse.into(),
        int(query_heads),
        int(head_dim),
        window.into(),
    ];
    gpu.launch("attention_merge", [cut.n_merges, query_heads, 1], 64, &args);
    out
}

/// As kernels take it: 0 for none.
pub(super) fn window_of(options: Options) -> i32 {
    match options.window {
        Some(window) if window < 1 << 30 => window.max(1) as i32,
        _ => 0,
    }
}

pub(super) fn kernels(x: &Tensor) -> Gpu {
    gpu::on(x.device())
        .unwrap_or_else(|| panic!("rows on {:?}, the cache on a device with kernels", x.device()))
}

/// Float32 rows that begin on 16 bytes, and how far apart they are.
pub(super) fn readable(x: &Tensor) -> (Tensor, i64) {
    let x = match in_place(x) {
        true => x.shallow_clone(),
        false => x.to_kind(Kind::Float).contiguous().copy(),
    };
    let stride = x.stride()[0];
    (x, stride)
}

/// How the rows of a step are cut over the device for heads of one shape.
#[derive(Debug, PartialEq)]
pub(crate) struct Cut {
    /// Folded rows (rows x query heads of a KV head) of a block of threads.
    pub tile: usize,
    /// Sequence, first folded row, first segment, the segment behind the last, and the first record of the sequence if its
    /// context is split, else -1.
    pub items: Vec<[i64; 5]>,
    /// Of split sequences each row, its position, its first record, 0.
    pub merges: Vec<[i64; 4]>,
    /// Results of segments, to be merged.
    pub records: usize,
}

/// Blocks of threads that keep a device busy: about two for each of its 100 to 300 processors.
const BUSY: usize = 512;
/// Of the records of a step.
const RECORD_BYTES: usize = 64 << 20;

impl Cut {
    pub fn new(seqs: &[PagedSeq], heads: Heads, dtype: CacheDtype) -> Cut {
        let group = heads.group();
        let tall = seqs.iter().any(|seq| seq.rows.len() * group > 16);
        let tile = match dtype {
            CacheDtype::Bf16 | CacheDtype::Int8 if tall && heads.head_dim >= 64 => 32,
            _ => 16,
        };
        let tiles = |seq: &PagedSeq| (seq.rows.len() * group).div_ceil(tile);
        let first = |seq: &PagedSeq| seq.first_block * BLOCK_SIZE / SEGMENT;
        let end = |seq: &PagedSeq| seq.kv_len.div_ceil(SEGMENT);
        let work: usize = seqs.iter().map(|seq| tiles(seq) * (end(seq) - first(seq))).sum();
        // So many segments each give every processor something, and no block of threads much more than others.
        let share = (work * heads.kv_heads).div_ceil(BUSY).max(1);
        let most_records = RECORD_BYTES / (heads.heads * (heads.head_dim + 4) * size_of::<f32>());
        let mut cut = Cut {
            tile,
            items: vec![],
            merges: vec![],
            records: 0,
        };
        for (i, seq) in seqs.iter().enumerate() {
            let (first, end, rows) = (first(seq), end(seq), seq.rows.len());
            let pieces = (end - first).div_ceil(share);
            let split = pieces > 1 && cut.records + rows * end <= most_records;
            let step = match split {
                true => (end - first).div_ceil(pieces),
                false => (end - first).max(1),
            };
            let record = if split { cut.records as i64 } else { -1 };
            for folded in (0..rows * group).step_by(tile) {
                for segment in (first..end).step_by(step) {
                    let to = (segment + step).min(end);
                    let [i, folded, segment, to] = [i, folded, segment, to].map(|n| n as i64);
                    cut.items.push([i, folded, segment, to, record]);
                }
            }
            if split {
                for row in 0..rows {
                    let position = seq.kv_len - rows + row;
                    cut.merges
                        .push([seq.rows.start + row, position, cut.records, 0].map(|n| n as i64));
                    cut.records += end;
                }
            }
        }
        cut
    }
}

/// [`Cut`] on the device, int32.
#[derive(Debug)]
pub(crate) struct CutThere {
    pub tile: usize,
    pub n_items: usize,
    pub n_merges: usize,
    pub records: usize,
    /// `[n_items, 5]`
    pub items: Tensor,
    /// `[n_merges, 4]`
    pub merges: Tensor,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seq(first: usize, rows: usize, first_block: usize, kv_len: usize) -> PagedSeq<'static> {
        PagedSeq {
            rows: first..first + rows,
            table: &[],
            first_block,
            kv_len,
        }
    }

    /// Each folded row meets each segment from the table's first block on once, and what is split is merged.
    #[test]
    fn a_cut_leaves_nothing_out() {
        let heads = |heads, kv_heads, head_dim| Heads {
            heads,
            kv_heads,
            head_dim,
        };
        let long = || {
            vec![
                seq(0, 1, 0, 70_000),
                seq(1, 40, 31, 9000),
                seq(41, 3, 0, 3),
                seq(44, 0, 0, 5),
            ]
        };
        let decode: Vec<PagedSeq> = (0..64).map(|i| seq(i, 1, 0, 1000 + i)).collect();
        // Sequences, heads, the tile and how many rows are to be merged.
        for (seqs, heads, tile, merged) in [
            (long(), heads(32, 8, 128), 32, 41),
            (long(), heads(20, 1, 32), 16, 41),
            (decode, heads(32, 8, 128), 16, 0),
            (vec![seq(0, 4096, 0, 4096)], heads(32, 8, 128), 32, 0),
            // Its records would take more than is allowed.
            (vec![seq(0, 200, 0, 400_000)], heads(32, 1, 256), 32, 0),
        ] {
            let cut = Cut::new(&seqs, heads, CacheDtype::Bf16);
            assert_eq!((cut.tile, cut.merges.len()), (tile, merged), "{heads:?}");
            let mut merges = cut.merges.iter();
            let mut records = 0;
            for (i, seq) in seqs.iter().enumerate() {
                let items: Vec<_> = cut.items.iter().filter(|item| item[0] as usize == i).collect();
                let (first, end) = (
                    seq.first_block * BLOCK_SIZE / SEGMENT,
                    seq.kv_len.div_ceil(SEGMENT),
                );
                let mut of_tile = vec![first as i64; (seq.rows.len() * heads.group()).div_ceil(tile)];
                for [_, folded, from, to, record] in items.iter().copied().copied() {
                    let reached = &mut of_tile[folded as usize / tile];
                    assert_eq!((folded as usize % tile, *reached), (0, from));
                    *reached = to;
                    assert!(record == -1 || record == records, "{record}");
                    assert!(record >= 0 || (from, to) == (first as i64, end as i64));
                }
                assert!(
                    of_tile.iter().all(|reached| *reached == end as i64),
                    "{of_tile:?}"
                );
                if items.first().is_some_and(|item| item[4] >= 0) {
                    for (row, position) in seq.rows.clone().zip(seq.kv_len - seq.rows.len()..) {
                        assert_eq!(merges.next(), Some(&[row as i64, position as i64, records, 0]));
                        records += end as i64;
                    }
                }
            }
            assert_eq!((merges.next(), cut.records as i64), (None, records));
        }
    }
}
