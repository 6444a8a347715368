//! The forward over panels, for a paged cache and for packed sequences: where the panels come from. The arithmetic is
//! in `tile`.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::places::PagedGroup;
use crate::pool::{self, scratch};
use crate::simd::{Element, PANEL, pack};
use crate::slice::{Plain, Rows, Shared};
use crate::vector::{self, rows, rows_mut, uninit};
use crate::weight::Precision;

use super::cache::{BLOCK_SIZE, Geometry, KvCache, Store};
use super::codes;
use super::device;
use super::reference::{packed_reference, paged_reference};
use super::tile::{Blocks, Call, Keys, Sequence, attend};
use super::{Heads, Options, PackedOut, PagedSeq};

/// `q` [T, heads * D] against the cache: [T, heads * D], rows outside of all sequences zero. The keys and values of all
/// rows are written already ([`super::write`]).
pub fn paged(
    q: &Tensor,
    cache: &KvCache,
    layer: usize,
    group: &PagedGroup,
    heads: Heads,
    options: Options,
) -> Tensor {
    let seqs = &group.seqs;
    heads.check(q);
    options.check(heads);
    let shape = cache.shape();
    assert_eq!(
        (shape.kv_heads, shape.head_dim),
        (heads.kv_heads, heads.head_dim),
        "not this cache's heads"
    );
    for seq in seqs {
        let PagedSeq {
            rows,
            table,
            first_block,
            kv_len,
        } = seq;
        assert!(
            rows.end <= q.size()[0] as usize && rows.len() <= *kv_len,
            "rows {rows:?} of {kv_len} positions"
        );
        let first_key = options.scoring().first_key(kv_len - rows.len());
        assert!(
            first_block * BLOCK_SIZE <= first_key,
            "the key of position {first_key} is seen, the blocks begin with {}",
            first_block * BLOCK_SIZE
        );
        let n_blocks = seq.n_blocks();
        assert!(
            n_blocks <= table.len(),
            "{kv_len} positions in {} blocks from {first_block} on",
            table.len()
        );
        let outside = table[..n_blocks]
            .iter()
            .find(|block| **block as usize >= shape.blocks);
        assert!(outside.is_none(), "block {outside:?} of {}", shape.blocks);
    }
    if let Store::Device(layers) = cache.store() {
        return device::paged(q, &layers[layer], cache.dtype(), group, heads, options);
    }
    let copy;
    let from = match rows(q) {
        Some(from) => Some(from),
        None if vector::available() && q.device() == Device::Cpu => {
            copy = q.to_kind(Kind::Float).contiguous();
            rows(&copy)
        }
        None => None,
    };
    let out = |from: &Rows| match seqs.iter().map(|seq| seq.rows.len()).sum::<usize>() == from.rows {
        true => uninit(from.rows, from.width),
        false => Tensor::zeros([from.rows as i64, from.width as i64], (Kind::Float, Device::Cpu)),
    };
    let geometry = cache.geometry();
    match (cache.store(), from, options.sink_values()) {
        (Store::Plain(_), ..) => paged_reference(q, cache, layer, seqs, heads, options),
        (store, Some(q), Some(sinks)) => {
            let mut out = out(&q);
            let call = Call {
                q,
                out: rows_mut(&mut out),
                lse: None,
                heads,
                scoring: options.scoring(),
                sinks,
            };
            match store {
                Store::F32(panels) => {
                    let blocks = Blocks::Panels(Shared(cache.layer(panels, layer)));
                    paged_panels(&call, blocks, geometry, seqs)
                }
                Store::Bf16(panels) => {
                    let blocks = Blocks::Panels(Shared(cache.layer(panels, layer)));
                    paged_panels(&call, blocks, geometry, seqs)
                }
                Store::Int8(panels) => {
                    let blocks = Blocks::Codes(Shared(cache.layer(panels, layer)), codes::decode);
                    paged_panels(&call, blocks, geometry, seqs)
                }
                Store::Plain(_) | Store::Device(_) => unreachable!("taken above"),
            }
            out
        }
        _ => panic!(
            "q on {:?} or its sinks are not where the cache is, on the CPU",
            q.device()
        ),
    }
}

/// Sequences side by side, `q` [T, heads * D], `k` and `v` [T, kv_heads * D]; sequence i has the rows
/// cu_seqlens[i]..cu_seqlens[i + 1] and sees itself only. Rows before the first and after the last are undefined.
pub fn packed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[usize],
    heads: Heads,
    options: Options,
    precision: Precision,
) -> PackedOut {
    heads.check(q);
    options.check(heads);
    super::backward::check_packed(q, [k, v], cu_seqlens, heads);
    let (Some(q_rows), Some(k_rows), Some(v_rows), Some(sinks)) =
        (rows(q), rows(k), rows(v), options.sink_values())
    else {
        if let Some(dtype) = super::packed::pages_for([q, k, v], heads, precision) {
            return super::packed::packed(q, k, v, cu_seqlens, heads, options, dtype);
        }
        return packed_reference(q, k, v, cu_seqlens, heads, options, precision);
    };
    if !heads.regular() {
        return packed_reference(q, k, v, cu_seqlens, heads, options, precision);
    }
    let (mut out, mut lse) = (
        uninit(q_rows.rows, q_rows.width),
        uninit(q_rows.rows, heads.heads),
    );
    let call = Call {
        q: q_rows,
        out: rows_mut(&mut out),
        lse: Some(rows_mut(&mut lse)),
        heads,
        scoring: options.scoring(),
        sinks,
    };
    match precision {
        Precision::F32 => packed_panels::<f32>(&call, k_rows, v_rows, cu_seqlens),
        Precision::Bf16 => packed_panels::<u16>(&call, k_rows, v_rows, cu_seqlens),
    }
    PackedOut { out, lse }
}

fn paged_panels<T: Element + Plain>(call: &Call, blocks: Blocks<T>, geometry: Geometry, seqs: &[PagedSeq]) {
    let sequences: Vec<Sequence<T>> = seqs
        .iter()
        .map(|seq| Sequence {
            rows: seq.rows.clone(),
            kv_len: seq.kv_len,
            keys: Keys {
                blocks,
                geometry,
                table: Some(seq.table),
                first_block: seq.first_block,
            },
        })
        .collect();
    attend(call, &sequences);
}

fn packed_panels<T: Element + Plain>(call: &Call, k: Rows, v: Rows, cu_seqlens: &[usize]) {
    let heads = call.heads;
    let geometry = Geometry::new(heads.kv_heads, heads.head_dim);
    // Block numbers of the sequences in a scratch cache of one layer.
    let mut first_block = vec![0];
    for seq in cu_seqlens.windows(2) {
        first_block.push(first_block[first_block.len() - 1] + (seq[1] - seq[0]).div_ceil(BLOCK_SIZE));
    }
    let n_blocks = first_block[first_block.len() - 1];
    let mut panels = scratch::<T>(n_blocks * geometry.block_len());
    let blocks = Shared(panels.as_mut_ptr());
    let of_block: Vec<Range<usize>> = cu_seqlens
        .windows(2)
        .flat_map(|seq| {
            (seq[0]..seq[1])
                .step_by(BLOCK_SIZE)
                .map(|first| first..(first + BLOCK_SIZE).min(seq[1]))
        })
        .collect();
    pool::for_each(n_blocks, |block| {
        for kv_head in 0..heads.kv_heads {
            let at = block * geometry.block_len() + kv_head * geometry.head_len();
            // SAFETY: a block's panels are this task's alone; the scratch has n_blocks of them.
            unsafe {
                pack_block(
                    k,
                    v,
                    of_block[block].clone(),
                    kv_head,
                    &geometry,
                    blocks.get().add(at),
                )
            };
        }
    });
    let sequences: Vec<Sequence<T>> = cu_seqlens
        .windows(2)
        .zip(&first_block)
        .map(|(seq, first)| Sequence {
            rows: seq[0]..seq[1],
            kv_len: seq[1] - seq[0],
            keys: Keys {
                blocks: Blocks::Panels(Shared(blocks.get().wrapping_add(first * geometry.block_len()))),
                geometry,
                table: None,
                first_block: 0,
            },
        })
        .collect();
    attend(call, &sequences);
}

/// Packs up to 32 keys and values of one head as the cache would hold them, with zeroes behind the last.
///
/// # Safety
/// `panels` is writable for a head's panels.
unsafe fn pack_block<T: Element + Plain>(
    k: Rows,
    v: Rows,
    tokens: Range<usize>,
    kv_head: usize,
    geometry: &Geometry,
    panels: *mut T,
) {
    let head_dim = geometry.head_dim;
    let columns = kv_head * head_dim..(kv_head + 1) * head_dim;
    let mut rounded = scratch::<T>(BLOCK_SIZE * head_dim);
    for (row, token) in rounded.chunks_exact_mut(head_dim).zip(tokens.clone()) {
        T::round(&k.row(token)[columns.clone()], row);
    }
    // SAFETY: 32 rows of head_dim (even) in, a K panel out.
    unsafe {
        pack::pack_rows(
            rounded.as_ptr(),
            head_dim,
            tokens.len(),
            T::steps(head_dim),
            panels,
        )
    };
    for (row, token) in rounded.chunks_exact_mut(head_dim).zip(tokens.clone()) {
        T::round(&v.row(token)[columns.clone()], row);
    }
    // SAFETY: the V panels of this head, behind its K panel.
    let to = unsafe {
        std::slice::from_raw_parts_mut(
            panels.add(geometry.k_len()),
            geometry.panels_len() - geometry.k_len(),
        )
    };
    pack_columns(&rounded[..tokens.len() * head_dim], head_dim, to);
}

/// Packs up to 32 rows of a matrix [n, D] as panels whose reduction runs over the rows: [32 rows / 2][32][2] or
/// [32 rows][32] for each 32 columns, missing rows and columns zero.
pub(super) fn pack_columns<T: Element + Plain>(matrix: &[T], head_dim: usize, panels: &mut [T]) {
    // A row's columns of one panel, with zeroes behind its end.
    let row = |row: usize, columns: Range<usize>| {
        let mut padded = [T::default(); PANEL];
        if row * head_dim < matrix.len() {
            padded[..columns.len()].copy_from_slice(&matrix[row * head_dim..][columns]);
        }
        padded
    };
    for (panel, first) in panels
        .chunks_exact_mut(Geometry::V_PANEL)
        .zip((0..head_dim).step_by(PANEL))
    {
        let columns = first..(first + PANEL).min(head_dim);
        for (step, to) in panel.chunks_exact_mut(PANEL * T::PER_STEP).enumerate() {
            let key = step * T::PER_STEP;
            pack::pack_step([&row(key, columns.clone()), &row(key + 1, columns.clone())], to);
        }
    }
}
