//! Packed sequences on a device with kernels of ours: their keys and values become pages of a scratch cache, so the forward is
//! the one that serves, bit for bit; the backward (`kernels/gpu/attention_backward.cu`) reads queries and their gradients out
//! of pages, too.

use tch::{Device, Kind, Tensor};

use crate::gpu::told::told;
use crate::gpu::{self, Arg, int};
use crate::places::PagedThere;
use crate::weight::Precision;

use super::cache::{BLOCK_SIZE, CacheDtype};
use super::device::{Cut, CutThere, attend, has_kernels, kernels, page_bytes, put, readable, window_of};
use super::{Heads, Options, PackedOut, PagedSeq};

/// What pages such sequences lie in, if their device has kernels for such heads.
pub(super) fn pages_for(inputs: [&Tensor; 3], heads: Heads, precision: Precision) -> Option<CacheDtype> {
    let dtype = match precision {
        Precision::F32 => CacheDtype::F32,
        Precision::Bf16 => CacheDtype::Bf16,
    };
    let there = inputs.iter().all(|x| gpu::of(x).is_some());
    (there && has_kernels(dtype, heads.head_dim)).then_some(dtype)
}

/// Where the rows of sequences go that follow each other, each beginning with a block.
struct Layout {
    seqs: Vec<PagedSeq<'static>>,
    /// The first block of each sequence, and behind all.
    first_blocks: Vec<usize>,
    device: Device,
}

impl Layout {
    fn new(cu_seqlens: &[usize], device: Device) -> Layout {
        let mut first_blocks = vec![0];
        let seqs = cu_seqlens
            .windows(2)
            .filter(|ends| ends[0] < ends[1])
            .map(|ends| {
                let len = ends[1] - ends[0];
                first_blocks.push(first_blocks[first_blocks.len() - 1] + len.div_ceil(BLOCK_SIZE));
                PagedSeq {
                    rows: ends[0]..ends[1],
                    table: &[],
                    first_block: 0,
                    kv_len: len,
                }
            });
        Layout {
            seqs: seqs.collect(),
            first_blocks,
            device,
        }
    }

    fn blocks(&self) -> usize {
        self.first_blocks[self.seqs.len()]
    }

    fn rows(&self) -> usize {
        self.seqs.iter().map(|seq| seq.kv_len).sum()
    }

    /// Told once for all layers.
    fn tell(&self, numbers: impl IntoIterator<Item = i64>) -> Tensor {
        told(numbers.into_iter().collect(), Kind::Int, self.device)
    }

    /// `[tokens]` the slot of each row, -1 outside of all sequences.
    fn slots(&self, tokens: usize) -> Tensor {
        let mut slots = vec![-1; tokens];
        for (seq, first) in self.seqs.iter().zip(&self.first_blocks) {
            for (slot, i) in slots[seq.rows.clone()].iter_mut().zip(0..) {
                *slot = (first * BLOCK_SIZE) as i64 + i;
            }
        }
        self.tell(slots)
    }

    fn there(&self) -> PagedThere {
        let seqs = self.seqs.iter().zip(&self.first_blocks);
        let seqs = seqs.flat_map(|(seq, first)| [seq.rows.start, seq.kv_len, seq.kv_len, 0, *first]);
        PagedThere {
            seqs: self.tell(seqs.map(|n| n as i64)),
            tables: self.tell(0..self.blocks() as i64),
        }
    }

    fn cut(&self, heads: Heads, dtype: CacheDtype) -> CutThere {
        let cut = Cut::new(&self.seqs, heads, dtype);
        CutThere {
            tile: cut.tile,
            n_items: cut.items.len(),
            n_merges: cut.merges.len(),
            records: cut.records,
            items: self.tell(cut.items.into_iter().flatten()),
            merges: self.tell(cut.merges.into_iter().flatten()),
        }
    }

    /// `[blocks, 4]` for the backward: the first row of its sequence, the rows of that, which of its blocks, its first block.
    fn items(&self) -> Tensor {
        let of_seq = |(seq, first): (&PagedSeq, &usize)| {
            let (start, rows, first) = (seq.rows.start, seq.kv_len, *first);
            (0..rows.div_ceil(BLOCK_SIZE))
                .flat_map(move |block| [start, rows, block, first].map(|n| n as i64))
        };
        self.tell(self.seqs.iter().zip(&self.first_blocks).flat_map(of_seq))
    }

    /// Pages of rows `x` and `y` `[T, heads * D]` as keys and values, zero behind the end of a sequence.
    fn pages(&self, x: &Tensor, y: &Tensor, dtype: CacheDtype, heads: usize, head_dim: usize) -> Tensor {
        let size = [self.blocks(), heads, page_bytes(dtype, head_dim)].map(|n| n as i64);
        let pages = Tensor::zeros(size, (Kind::Uint8, self.device));
        put(
            x,
            y,
            &pages,
            dtype,
            heads,
            head_dim,
            &self.slots(x.size()[0] as usize),
        );
        pages
    }
}

/// [`super::packed`].
pub(super) fn packed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[usize],
    heads: Heads,
    options: Options,
    dtype: CacheDtype,
) -> PackedOut {
    let layout = Layout::new(cu_seqlens, q.device());
    let pages = layout.pages(k, v, dtype, heads.kv_heads, heads.head_dim);
    let lse = Tensor::zeros([q.size()[0], heads.heads as i64], (Kind::Float, q.device()));
    let step = (&layout.there(), &layout.cut(heads, dtype), layout.rows());
    let out = attend(q, &pages, dtype, step, heads, options, Some(&lse));
    PackedOut { out, lse }
}

/// [`super::packed_backward`].
#[expect(
    clippy::too_many_arguments,
    reason = "the forward's inputs, its result and its gradient"
)]
pub(super) fn packed_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attended: &PackedOut,
    dout: &Tensor,
    cu_seqlens: &[usize],
    heads: Heads,
    options: Options,
    dtype: CacheDtype,
) -> (Tensor, Tensor, Tensor) {
    let Heads {
        heads: query_heads,
        kv_heads,
        head_dim,
    } = heads;
    let gpu = kernels(q);
    let layout = Layout::new(cu_seqlens, q.device());
    let tokens = q.size()[0];
    let whole = layout.rows() as i64 == tokens;
    let gradient = |heads: usize| {
        let (size, options) = ([tokens, (heads * head_dim) as i64], (Kind::Float, q.device()));
        if whole {
            Tensor::empty(size, options)
        } else {
            Tensor::zeros(size, options)
        }
    };
    let (out, dout) = (attended.out.contiguous(), readable(&dout.contiguous()).0);
    let lse = attended.lse.contiguous();
    let delta = Tensor::empty([tokens, query_heads as i64], (Kind::Float, q.device()));
    let args = [
        (&out).into(),
        (&dout).into(),
        (&delta).into(),
        int(query_heads),
        int(head_dim),
    ];
    let grid = [tokens as usize, query_heads.div_ceil(4), 1];
    gpu.launch("attention_delta", grid, 4 * gpu.warp(), &args);

    let pages = |x: &Tensor, y: &Tensor, heads: usize| layout.pages(x, y, dtype, heads, head_dim);
    let (q_pages, dout_pages) = (pages(q, &dout, query_heads), pages(&dout, q, query_heads));
    let (k_pages, v_pages) = (pages(k, v, kv_heads), pages(v, k, kv_heads));
    let items = layout.items();
    let (dq, dk, dv) = (gradient(query_heads), gradient(kv_heads), gradient(kv_heads));
    let launch = |side: &str, own_heads: usize, to: &[&Tensor]| {
        let inputs = [&q_pages, &dout_pages, &k_pages, &v_pages, &items, &lse, &delta];
        let mut args: Vec<Arg> = inputs
            .into_iter()
            .chain(to.iter().copied())
            .map(Arg::from)
            .collect();
        args.extend([int(query_heads), int(kv_heads), window_of(options).into()]);
        args.extend([options.scale, options.cap.unwrap_or(0.0)].map(|x| Arg::Float(x as f32)));
        let grid = [layout.blocks(), own_heads, 1];
        match dtype {
            CacheDtype::F32 => {
                args.push(int(head_dim));
                gpu.launch(&format!("attention_back_{side}_f32"), grid, 256, &args);
            }
            _ => gpu.launch(
                &format!("attention_back_{side}_{head_dim}"),
                grid,
                4 * gpu.warp(),
                &args,
            ),
        }
    };
    launch("queries", query_heads, &[&dq]);
    launch("keys", kv_heads, &[&dk, &dv]);
    (dq, dk, dv)
}
