//! The KV cache of all layers and the writing of new keys and values into it. Which block belongs to whom is the
//! scheduler's business.
//!
//! # Layout on a CPU
//! `[layers][blocks][kv_heads]` of a K part and a V part, both panels of the micro-kernels (see `simd`):
//! - K: one panel of 32 keys as columns, the reduction over D: `[D/2][32 keys][2]` bfloat16, `[D][32 keys]` float32;
//! - V: panels of 32 of the D columns, the reduction over keys: `[32 keys / 2][32][2]` or `[32 keys][32]` each.
//!
//! A head's block is contiguous (8 KiB for D = 64 in bfloat16), so decode reads it as one stream. On other devices, and
//! for head dimensions that are no multiple of 16: tensors `[blocks, kv_heads, 32, D]` a layer.

use tch::{Device, Kind, Tensor};

use crate::KernelError;
use crate::pool;
use crate::simd::{Element, PANEL};
use crate::slice::{Pages, Plain, Rows, Shared};
use crate::vector::rows;
use crate::weight::Precision;

use super::{MAX_HEAD_DIM, regular};

/// Tokens of a block: the columns of a panel.
pub const BLOCK_SIZE: usize = PANEL;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    pub layers: usize,
    pub blocks: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl CacheShape {
    /// Memory of one block in all layers.
    pub fn block_bytes(&self, precision: Precision) -> usize {
        let head = match regular(self.head_dim) {
            true => Geometry::new(1, self.head_dim).head_len(),
            false => 2 * BLOCK_SIZE * self.head_dim,
        };
        self.layers * self.kv_heads * head * precision.value_bytes()
    }
}

/// Keys and values of all layers, zero at first. Written through a shared reference by [`write`], hence not `Sync`.
pub struct KvCache {
    shape: CacheShape,
    precision: Precision,
    store: Store,
}

pub(super) enum Store {
    F32(Panels<f32>),
    Bf16(Panels<u16>),
    /// K and V of each layer, `[blocks, kv_heads, 32, D]`.
    Plain(Vec<(Tensor, Tensor)>),
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
}

impl Geometry {
    pub fn new(kv_heads: usize, head_dim: usize) -> Geometry {
        Geometry { kv_heads, head_dim }
    }

    /// The K panel; V follows it.
    pub fn k_len(&self) -> usize {
        PANEL * self.head_dim
    }

    /// One V panel: 32 keys, 32 columns.
    pub const V_PANEL: usize = PANEL * PANEL;

    pub fn head_len(&self) -> usize {
        self.k_len() + self.head_dim.div_ceil(PANEL) * Self::V_PANEL
    }

    pub fn block_len(&self) -> usize {
        self.kv_heads * self.head_len()
    }
}

impl KvCache {
    pub fn new(shape: CacheShape, precision: Precision, device: Device) -> Result<KvCache, KernelError> {
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
        let len = layers * blocks * Geometry::new(kv_heads, head_dim).block_len();
        let store = match precision {
            Precision::F32 if fast => Store::F32(Panels::zeroed(len)),
            Precision::Bf16 if fast => Store::Bf16(Panels::zeroed(len)),
            _ => {
                let size = [blocks, kv_heads, BLOCK_SIZE, head_dim].map(|n| n as i64);
                let zeros = || Tensor::f_zeros(size, (precision.kind(), device));
                let layers = (0..layers).map(|_| Ok((zeros()?, zeros()?)));
                Store::Plain(layers.collect::<Result<_, tch::TchError>>()?)
            }
        };
        Ok(KvCache {
            shape,
            precision,
            store,
        })
    }

    /// Reserved memory (the system maps a page when it is first written).
    pub fn bytes(&self) -> usize {
        self.shape.blocks * self.shape.block_bytes(self.precision)
    }

    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry::new(self.shape.kv_heads, self.shape.head_dim)
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

/// Writes the keys and values of some tokens, `k` and `v` [T, kv_heads * D], where `slots` says: block * BLOCK_SIZE +
/// offset. The tokens of a sequence come in order of position: writing an even position clears the values of the next
/// one, which in bfloat16 shares its words (whatever stood there, even a NaN of a dead sequence, must not meet a zero
/// probability).
///
/// # Panics
/// When a slot lies outside the cache or the shapes do not match.
pub fn write(cache: &KvCache, layer: usize, k: &Tensor, v: &Tensor, slots: &[i64]) {
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
        (Store::Plain(layers), ..) => {
            let (cache_k, cache_v) = &layers[layer];
            let slots = Tensor::from_slice(slots);
            let block = slots
                .divide_scalar_mode(BLOCK_SIZE as i64, "floor")
                .to_device(k.device());
            let offset = slots.remainder(BLOCK_SIZE as i64).to_device(k.device());
            for (to, from) in [(cache_k, k), (cache_v, v)] {
                let from = from
                    .reshape([-1, kv_heads as i64, head_dim as i64])
                    .to_kind(to.kind());
                let index = [Some(block.shallow_clone()), None, Some(offset.shallow_clone())];
                let _ = to.shallow_clone().index_put_(&index, &from, false);
            }
        }
        _ => panic!("k and v are on {:?}, the cache on the CPU", k.device()),
    }
}

fn write_panels<T: Element + Plain>(layer: *mut T, geometry: Geometry, k: Rows, v: Rows, slots: &[i64]) {
    let Geometry { kv_heads, head_dim } = geometry;
    let layer = Shared(layer);
    let head = |kv_head: usize| {
        let mut rounded = [T::default(); MAX_HEAD_DIM];
        let rounded = &mut rounded[..head_dim];
        for (row, &slot) in slots.iter().enumerate() {
            let (block, key) = (slot as usize / BLOCK_SIZE, slot as usize % BLOCK_SIZE);
            let columns = kv_head * head_dim..(kv_head + 1) * head_dim;
            // SAFETY: the slot lies in the layer (checked by `write`), and a head's panels are this task's alone.
            unsafe {
                let panel = layer
                    .get()
                    .add(block * geometry.block_len() + kv_head * geometry.head_len());
                T::round(&k.row(row)[columns.clone()], rounded);
                put_key(panel, key, rounded);
                T::round(&v.row(row)[columns], rounded);
                put_value(panel.add(geometry.k_len()), key, rounded);
            }
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
