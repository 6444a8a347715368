//! The KV cache of all layers and the writing of new keys and values into it. Which block belongs to whom is the
//! scheduler's business.
//!
//! # Layout on a CPU
//! `[layers][blocks][kv_heads]` of a K part and a V part, both panels of the micro-kernels (see `simd`):
//! - K: one panel of 32 keys as columns, the reduction over D: `[D/2][32 keys][2]` bfloat16, `[D][32 keys]` float32;
//! - V: panels of 32 of the D columns, the reduction over keys: `[32 keys / 2][32][2]` or `[32 keys][32]` each.
//!
//! A head's block is contiguous (8 KiB for D = 64 in bfloat16), so decode reads it as one stream. On a device with kernels
//! of ours: the pages of `kernels/gpu/pages.cu`. Else, and for head dimensions without kernels: tensors
//! `[blocks, kv_heads, 32, D]` a layer. 8 bits are in [`codes`].

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::KernelError;
use crate::gpu;
use crate::places::Ints;
use crate::pool;
use crate::rope::Rope;
use crate::simd::{Element, PANEL};
use crate::slice::{Pages, Plain, Rows, Shared};
use crate::vector::rows;
use crate::weight::Precision;

use super::codes::{self, SCALES_LEN};
use super::device;
use super::{Heads, MAX_HEAD_DIM, regular};

/// Tokens of a block: the columns of a panel.
pub const BLOCK_SIZE: usize = PANEL;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheDtype {
    F32,
    Bf16,
    /// A byte a number and a scale for each token and head.
    Int8,
}

impl CacheDtype {
    pub const ALL: [CacheDtype; 3] = [CacheDtype::F32, CacheDtype::Bf16, CacheDtype::Int8];

    /// What queries and probabilities are rounded to.
    pub fn precision(self) -> Precision {
        match self {
            CacheDtype::F32 => Precision::F32,
            CacheDtype::Bf16 | CacheDtype::Int8 => Precision::Bf16,
        }
    }

    /// As vLLM's `--kv-cache-dtype` spells it.
    pub fn name(self) -> &'static str {
        match self {
            CacheDtype::F32 => "float32",
            CacheDtype::Bf16 => "bfloat16",
            CacheDtype::Int8 => "int8",
        }
    }
}

impl From<Precision> for CacheDtype {
    fn from(precision: Precision) -> CacheDtype {
        match precision {
            Precision::F32 => CacheDtype::F32,
            Precision::Bf16 => CacheDtype::Bf16,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    pub layers: usize,
    pub blocks: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl CacheShape {
    /// Memory of one block in all layers.
    pub fn block_bytes(&self, dtype: impl Into<CacheDtype>) -> usize {
        let numbers = match regular(self.head_dim) {
            true => Geometry::new(1, self.head_dim).panels_len(),
            false => 2 * BLOCK_SIZE * self.head_dim,
        };
        let head = match dtype.into() {
            CacheDtype::F32 => numbers * size_of::<f32>(),
            CacheDtype::Bf16 => numbers * size_of::<u16>(),
            CacheDtype::Int8 => numbers + SCALES_LEN,
        };
        self.layers * self.kv_heads * head
    }
}

/// Keys and values of all layers, zero at first. Written through a shared reference by [`write`], hence not `Sync`.
pub struct KvCache {
    shape: CacheShape,
    dtype: CacheDtype,
    store: Store,
}

pub(super) enum Store {
    F32(Panels<f32>),
    Bf16(Panels<u16>),
    /// Bytes, see [`codes`].
    Int8(Panels<u8>),
    /// `[blocks, kv_heads, bytes of a page]` of each layer, for kernels of ours.
    Device(Vec<Tensor>),
    /// K and V of each layer.
    Plain(Vec<[PlainBlocks; 2]>),
}

/// Keys, or values, as tensors.
pub(super) struct PlainBlocks {
    /// `[blocks, kv_heads, 32, D]`
    pub values: Tensor,
    /// `[blocks, kv_heads, 32]` float32, where values are codes.
    pub scales: Option<Tensor>,
}

/// Pages and their address: only ever touched through the address, since writers hold no `&mut`.
pub(super) struct Panels<T: Plain> {
    first: *mut T,
    _pages: Pages<T>,
}

// SAFETY: an owner of plain memory; only the pointer field keeps the compiler from seeing it.
unsafe impl<T: Plain> Send for Panels<T> {}

impl<T: Plain> Panels<T> {
    fn zeroed(len: usize) -> Panels<T> {
        let mut pages = Pages::zeroed(len);
        Panels {
            first: pages.as_mut_ptr(),
            _pages: pages,
        }
    }
}

/// Where a head's panels of a block lie, in elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Elements behind a head's panels.
    pub scales_len: usize,
}

impl Geometry {
    pub fn new(kv_heads: usize, head_dim: usize) -> Geometry {
        Geometry {
            kv_heads,
            head_dim,
            scales_len: 0,
        }
    }

    /// The K panel; V follows it.
    pub fn k_len(&self) -> usize {
        PANEL * self.head_dim
    }

    /// One V panel: 32 keys, 32 columns.
    pub const V_PANEL: usize = PANEL * PANEL;

    pub fn panels_len(&self) -> usize {
        self.k_len() + self.head_dim.div_ceil(PANEL) * Self::V_PANEL
    }

    pub fn head_len(&self) -> usize {
        self.panels_len() + self.scales_len
    }

    pub fn block_len(&self) -> usize {
        self.kv_heads * self.head_len()
    }
}

impl KvCache {
    pub fn new(
        shape: CacheShape,
        dtype: impl Into<CacheDtype>,
        device: Device,
    ) -> Result<KvCache, KernelError> {
        let dtype = dtype.into();
        let CacheShape {
            layers,
            blocks,
            kv_heads,
            head_dim,
        } = shape;
        if blocks > u32::MAX as usize {
            return Err(KernelError::Shape(format!(
                "{blocks} blocks do not fit a block table of 32 bits"
            )));
        }
        let fast = crate::simd::available() && device == Device::Cpu && regular(head_dim);
        let len = layers * blocks * geometry(shape, dtype).block_len();
        let store = match dtype {
            CacheDtype::F32 if fast => Store::F32(Panels::zeroed(len)),
            CacheDtype::Bf16 if fast => Store::Bf16(Panels::zeroed(len)),
            CacheDtype::Int8 if fast => Store::Int8(Panels::zeroed(len)),
            _ if gpu::on(device).is_some() && device::has_kernels(dtype, head_dim) => {
                let size = [blocks, kv_heads, device::page_bytes(dtype, head_dim)].map(|n| n as i64);
                let zeros = |_| Tensor::f_zeros(size, (Kind::Uint8, device));
                Store::Device((0..layers).map(zeros).collect::<Result<_, _>>()?)
            }
            _ => {
                let size = [blocks, kv_heads, BLOCK_SIZE, head_dim].map(|n| n as i64);
                let (kind, has_scales) = match dtype {
                    CacheDtype::F32 | CacheDtype::Bf16 => (dtype.precision().kind(), false),
                    CacheDtype::Int8 => (Kind::Int8, true),
                };
                let zeros = || {
                    let scales = has_scales.then(|| Tensor::f_zeros(&size[..3], (Kind::Float, device)));
                    Ok::<_, tch::TchError>(PlainBlocks {
                        values: Tensor::f_zeros(size, (kind, device))?,
                        scales: scales.transpose()?,
                    })
                };
                let layers = (0..layers).map(|_| Ok([zeros()?, zeros()?]));
                Store::Plain(layers.collect::<Result<_, tch::TchError>>()?)
            }
        };
        Ok(KvCache { shape, dtype, store })
    }

    /// Reserved memory (the system maps a page when it is first written).
    pub fn bytes(&self) -> usize {
        self.shape.blocks * self.shape.block_bytes(self.dtype)
    }

    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    pub fn dtype(&self) -> CacheDtype {
        self.dtype
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn geometry(&self) -> Geometry {
        geometry(self.shape, self.dtype)
    }

    /// The first block of a layer.
    pub(super) fn layer<T: Plain>(&self, panels: &Panels<T>, layer: usize) -> *mut T {
        assert!(
            layer < self.shape.layers,
            "layer {layer} of {}",
            self.shape.layers
        );
        panels
            .first
            .wrapping_add(layer * self.shape.blocks * self.geometry().block_len())
    }
}

fn geometry(shape: CacheShape, dtype: CacheDtype) -> Geometry {
    let scales_len = match dtype {
        CacheDtype::F32 | CacheDtype::Bf16 => 0,
        CacheDtype::Int8 => SCALES_LEN,
    };
    Geometry {
        scales_len,
        ..Geometry::new(shape.kv_heads, shape.head_dim)
    }
}

/// Writes the keys and values of some tokens, `k` and `v` [T, kv_heads * D], where `slots` says: block * BLOCK_SIZE +
/// offset. The tokens of a sequence come in order of position: writing an even position clears the values of the next
/// one, which in bfloat16 shares its words (whatever stood there, even a NaN of a dead sequence, must not meet a zero
/// probability).
///
/// # Panics
/// When a slot lies outside the cache or the shapes do not match.
pub fn write(cache: &KvCache, layer: usize, k: &Tensor, v: &Tensor, slots: &Ints) {
    let CacheShape {
        blocks,
        kv_heads,
        head_dim,
        ..
    } = cache.shape;
    let size = [slots.len() as i64, (kv_heads * head_dim) as i64];
    assert!(
        k.size() == size && v.size() == size,
        "k {:?} and v {:?} for {size:?}",
        k.size(),
        v.size()
    );
    if let Store::Device(layers) = &cache.store {
        return device::write(&layers[layer], cache, k, v, slots);
    }
    let limit = (blocks * BLOCK_SIZE) as i64;
    if let Some(slot) = slots.iter().find(|slot| !(0..limit).contains(*slot)) {
        panic!("slot {slot} of a cache of {limit}");
    }
    let copies; // What the fast path cannot read in place.
    let (k_rows, v_rows) = match (rows(k), rows(v)) {
        (Some(k), Some(v)) => (Some(k), Some(v)),
        _ => {
            copies = [k, v].map(|x| x.to_kind(Kind::Float).contiguous());
            (rows(&copies[0]), rows(&copies[1]))
        }
    };
    match (&cache.store, k_rows, v_rows) {
        (Store::F32(panels), Some(k), Some(v)) => {
            write_panels(cache.layer(panels, layer), cache.geometry(), k, v, slots);
        }
        (Store::Bf16(panels), Some(k), Some(v)) => {
            write_panels(cache.layer(panels, layer), cache.geometry(), k, v, slots);
        }
        (Store::Int8(panels), Some(k), Some(v)) => {
            let geometry = cache.geometry();
            for_each_head(
                cache.layer(panels, layer),
                geometry,
                slots,
                |head, key, row, columns| {
                    // SAFETY: a head's bytes of a block in the layer, this task's alone.
                    unsafe {
                        codes::write(
                            head,
                            &geometry,
                            key,
                            &k.row(row)[columns.clone()],
                            &v.row(row)[columns],
                        )
                    };
                },
            );
        }
        (Store::Plain(layers), ..) => {
            let slots = Tensor::from_slice(slots);
            let block = slots
                .divide_scalar_mode(BLOCK_SIZE as i64, "floor")
                .to_device(k.device());
            let offset = slots.remainder(BLOCK_SIZE as i64).to_device(k.device());
            let put = |to: &Tensor, from: &Tensor| {
                let index = [Some(block.shallow_clone()), None, Some(offset.shallow_clone())];
                let _ = to
                    .shallow_clone()
                    .index_put_(&index, &from.to_kind(to.kind()), false);
            };
            for (PlainBlocks { values, scales }, from) in layers[layer].iter().zip([k, v]) {
                let from = from.reshape([-1, kv_heads as i64, head_dim as i64]);
                match scales {
                    Some(scales) => {
                        let (codes, own) = codes::encode_reference(&from);
                        put(values, &codes);
                        put(scales, &own);
                    }
                    None => put(values, &from),
                }
            }
        }
        _ => panic!("k and v are on {:?}, the cache on the CPU", k.device()),
    }
}

/// Turns queries and keys in `qkv` [T, (heads + 2 kv_heads) D] by their positions, in place, and writes the keys and values
/// as [`write`] does. Where kernels of ours do it at once, the keys stay unturned in `qkv`.
///
/// # Panics
/// As [`write`] and [`Rope::apply`] do.
pub fn turn_and_write(
    cache: &KvCache,
    layer: usize,
    qkv: &Tensor,
    heads: Heads,
    rope: &Rope,
    positions: &Ints,
    slots: &Ints,
) {
    let Heads {
        heads: query_heads,
        kv_heads,
        head_dim,
    } = heads;
    rope.check(qkv, positions);
    let width = (query_heads + 2 * kv_heads) * head_dim;
    assert_eq!(qkv.size()[1] as usize, width, "qkv of {heads:?}");
    if let Store::Device(layers) = &cache.store
        && device::in_place(qkv)
    {
        return device::turn_and_write(&layers[layer], cache, qkv, heads, rope, positions, slots);
    }
    let turned = ((query_heads + kv_heads) * head_dim) as i64;
    let (q, kv) = ((query_heads * head_dim) as i64, (kv_heads * head_dim) as i64);
    rope.apply(&qkv.narrow(1, 0, turned), positions);
    write(
        cache,
        layer,
        &qkv.narrow(1, q, kv),
        &qkv.narrow(1, turned, kv),
        slots,
    );
}

fn write_panels<T: Element + Plain>(layer: *mut T, geometry: Geometry, k: Rows, v: Rows, slots: &[i64]) {
    for_each_head(layer, geometry, slots, |head, key, row, columns| {
        let mut rounded = [T::default(); MAX_HEAD_DIM];
        let rounded = &mut rounded[..geometry.head_dim];
        // SAFETY: a head's panels of a block in the layer, this task's alone.
        unsafe {
            T::round(&k.row(row)[columns.clone()], rounded);
            put_key(head, key, rounded);
            T::round(&v.row(row)[columns], rounded);
            put_value(head.add(geometry.k_len()), key, rounded);
        }
    });
}

/// Calls `write` with a head's part of a block, the key's place in it, and the row and columns it comes from, for each
/// slot (inside of the layer) in order and each head, of which one task has all.
fn for_each_head<T: Plain>(
    layer: *mut T,
    geometry: Geometry,
    slots: &[i64],
    write: impl Fn(*mut T, usize, usize, Range<usize>) + Sync,
) {
    let Geometry {
        kv_heads, head_dim, ..
    } = geometry;
    let layer = Shared(layer);
    let head = |kv_head: usize| {
        for (row, &slot) in slots.iter().enumerate() {
            let (block, key) = (slot as usize / BLOCK_SIZE, slot as usize % BLOCK_SIZE);
            let at = block * geometry.block_len() + kv_head * geometry.head_len();
            let columns = kv_head * head_dim..(kv_head + 1) * head_dim;
            write(layer.get().wrapping_add(at), key, row, columns);
        }
    };
    // A hand-over to another thread is worth some thousand elements.
    match slots.len() * kv_heads * head_dim < 16 * 1024 {
        true => (0..kv_heads).for_each(head),
        false => pool::for_each(kv_heads, head),
    }
}

/// A column of a K panel. A step of a column is one 32-bit word in both types.
///
/// # Safety
/// `panel` is a K panel of as many dimensions as `rounded` has, and nobody else touches it.
unsafe fn put_key<T: Element>(panel: *mut T, key: usize, rounded: &[T]) {
    let (to, from): (*mut u32, *const u32) = (panel.cast(), rounded.as_ptr().cast());
    for step in 0..T::steps(rounded.len()) {
        // SAFETY: head_dim is even, so the words are whole; the panel has `steps` rows of 32 words.
        unsafe { to.add(step * PANEL + key).write(from.add(step).read_unaligned()) };
    }
}

/// A row of the V panels.
///
/// # Safety
/// `panels` are the V panels of as many dimensions as `rounded` has, and nobody else touches them.
unsafe fn put_value<T: Element>(panels: *mut T, key: usize, rounded: &[T]) {
    for (panel, columns) in rounded.chunks(PANEL).enumerate() {
        // SAFETY: inside a V panel: 32 keys by 32 columns, keys in pairs for bfloat16.
        unsafe {
            let step = panels.add(panel * Geometry::V_PANEL + key / T::PER_STEP * T::PER_STEP * PANEL);
            if T::PER_STEP == 1 {
                std::ptr::copy_nonoverlapping(columns.as_ptr(), step, columns.len());
                continue;
            }
            let from: *const u16 = columns.as_ptr().cast();
            for column in 0..columns.len() {
                let (word, bits) = (step.cast::<u32>().add(column), u32::from(*from.add(column)));
                word.write(if key.is_multiple_of(2) {
                    bits
                } else {
                    word.read() & 0xffff | bits << 16
                });
            }
        }
    }
}
