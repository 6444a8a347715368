//! The raw memory behind the fast paths: row views of float32 CPU tensors, and pages for packed weights, caches and
//! scratch. The only place where a `Tensor` becomes a pointer; no arithmetic.

use std::alloc::Layout;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, Weak};

use tch::{Device, Kind, Tensor};

/// Rows of a float32 CPU tensor `[rows, width]`: contiguous within a row, `stride` elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub ptr: *const f32,
    pub rows: usize,
    pub width: usize,
    pub stride: usize,
    tensor: PhantomData<&'a Tensor>,
}

// SAFETY: a shared view of plain floats, as good as `&[f32]`; the tensor itself is not touched through it.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above.
unsafe impl Sync for Rows<'_> {}

impl<'a> Rows<'a> {
    /// None where only the reference can go: another device, another dtype, a column stride other than 1.
    pub fn of(tensor: &'a Tensor) -> Option<Rows<'a>> {
        let (rows, width, stride) = shape(tensor)?;
        Some(Rows {
            ptr: tensor.data_ptr() as *const f32,
            rows,
            width,
            stride,
            tensor: PhantomData,
        })
    }

    pub fn row(&self, row: usize) -> &'a [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the tensor holds `width` floats from here, and outlives 'a.
        unsafe { std::slice::from_raw_parts(self.ptr.add(row * self.stride), self.width) }
    }

    pub fn at(&self, row: usize, column: usize) -> *const f32 {
        self.ptr.wrapping_add(row * self.stride + column)
    }

    /// Some of the rows.
    pub fn part(self, rows: Range<usize>) -> Rows<'a> {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?} of {}",
            self.rows
        );
        Rows {
            ptr: self.ptr.wrapping_add(rows.start * self.stride),
            rows: rows.len(),
            ..self
        }
    }
}

/// Rows of a float32 CPU tensor that tasks of one job write, each its own part.
#[derive(Clone, Copy)]
pub(crate) struct RowsMut<'a> {
    pub ptr: *mut f32,
    pub rows: usize,
    pub width: usize,
    pub stride: usize,
    tensor: PhantomData<&'a mut Tensor>,
}

// SAFETY: plain floats; every access through it is `unsafe` and promises that no other task touches the same floats.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    /// None where only the reference can go, as [`Rows::of`].
    pub fn of(tensor: &'a mut Tensor) -> Option<RowsMut<'a>> {
        let (rows, width, stride) = shape(tensor)?;
        Some(RowsMut {
            ptr: tensor.data_ptr() as *mut f32,
            rows,
            width,
            stride,
            tensor: PhantomData,
        })
    }

    pub fn at(&self, row: usize, column: usize) -> *mut f32 {
        self.ptr.wrapping_add(row * self.stride + column)
    }

    /// # Safety
    /// No other reference to this row lives while the returned one does.
    pub unsafe fn row(&self, row: usize) -> &'a mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the tensor holds `width` floats from here and outlives 'a; the caller promises that nobody else looks.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(row * self.stride), self.width) }
    }

    /// Columns of a row.
    ///
    /// # Safety
    /// No other reference to these columns of this row lives while the returned one does.
    pub unsafe fn columns(&self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        let Range { start, end } = columns;
        assert!(
            row < self.rows && start <= end && end <= self.width,
            "columns {start}..{end} of row {row}"
        );
        // SAFETY: inside the row, as above.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(row * self.stride + start), end - start) }
    }
}

fn shape(tensor: &Tensor) -> Option<(usize, usize, usize)> {
    let (size, stride) = (tensor.size(), tensor.stride());
    let (&[rows, width], &[row_stride, column_stride]) = (size.as_slice(), stride.as_slice()) else {
        return None;
    };
    let plain = tensor.device() == Device::Cpu && tensor.kind() == Kind::Float;
    // A stride below the width is an expanded or overlapping view; with one row or column torch may say anything.
    let strided = (column_stride == 1 || width <= 1) && (row_stride >= width || rows <= 1);
    (plain && strided).then_some((rows as usize, width as usize, row_stride.max(width) as usize))
}

/// A pointer that tasks of one job share, each touching its own part.
pub(crate) struct Shared<T>(pub *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: a pointer is only a number; every use of it is unsafe and argues for itself.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// (A method, so that closures capture the whole and not the bare pointer in it.)
    pub fn get(&self) -> *mut T {
        self.0
    }
}

/// Types for which any bytes are a value, zeroes in particular.
pub(crate) trait Plain: Copy + Send + Sync + 'static {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f32 {}

/// Zero-initialised memory, aligned to a cache line, on 2 MiB pages where it is large: reading weights through 4 KiB
/// pages costs a third of the bandwidth (a page walk every 64 lines, and hardware prefetch stops at page ends).
/// The system maps huge pages by itself only if asked, and only for whole aligned 2 MiB ranges, so buffers of a few
/// hundred KiB to a few MiB share chunks, unless they are to go before the others ([`Stay::Short`]).
pub(crate) struct Pages<T: Plain> {
    ptr: *mut T,
    len: usize,
    owner: Owner,
}

#[allow(dead_code)] // Held for their Drop.
enum Owner {
    Heap(Layout),
    Mapped(Mapping),
    Chunk(Arc<Mapping>),
}

const CACHE_LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;
/// Below this a buffer comes from the heap.
const CHUNKED_BYTES: usize = 256 << 10;
/// From this on a buffer has a mapping of its own.
const MAPPED_BYTES: usize = 8 << 20;
/// A chunk lives as long as one of its buffers. Its untouched end occupies no memory.
const CHUNK_BYTES: usize = 32 << 20;

// SAFETY: it owns its memory, as a Box<[T]> of plain values does.
unsafe impl<T: Plain> Send for Pages<T> {}
// SAFETY: shared access is read-only through Deref.
unsafe impl<T: Plain> Sync for Pages<T> {}

/// How long a buffer is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stay {
    /// As long as the model, or the thread.
    Long,
    /// It comes and goes beside others that stay, as adapters do: in a chunk with them it would hold all of it.
    Short,
}

impl<T: Plain> Pages<T> {
    pub fn zeroed(len: usize) -> Pages<T> {
        Pages::placed(len, Stay::Long)
    }

    pub fn placed(len: usize, stay: Stay) -> Pages<T> {
        let bytes = (len * size_of::<T>()).max(1).next_multiple_of(CACHE_LINE);
        let heaped = match stay {
            Stay::Long => CHUNKED_BYTES,
            Stay::Short => MAPPED_BYTES,
        };
        let (ptr, owner) = if bytes < heaped || !cfg!(target_os = "linux") {
            heap(bytes)
        } else if bytes < MAPPED_BYTES {
            chunked(bytes)
        } else {
            let mapping = Mapping::new(bytes);
            (mapping.start, Owner::Mapped(mapping))
        };
        Pages {
            ptr: ptr.cast(),
            len,
            owner,
        }
    }

    pub fn as_ptr(&self) -> *const T {
        self.ptr
    }

    /// For tasks of one job that each write their own part.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.ptr
    }
}

impl<T: Plain> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised values (zeroes at first) owned by self.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl<T: Plain> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl<T: Plain> Drop for Pages<T> {
    fn drop(&mut self) {
        if let Owner::Heap(layout) = self.owner {
            // SAFETY: allocated by `heap` with this layout.
            unsafe { std::alloc::dealloc(self.ptr.cast(), layout) }
        }
    }
}

fn heap(bytes: usize) -> (*mut u8, Owner) {
    let layout = Layout::from_size_align(bytes, CACHE_LINE).expect("buffers are far below isize::MAX");
    // SAFETY: the size is not zero.
    let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
    if ptr.is_null() {
        std::alloc::handle_alloc_error(layout);
    }
    (ptr, Owner::Heap(layout))
}

/// Takes `bytes` from the chunk in use, or begins another.
fn chunked(bytes: usize) -> (*mut u8, Owner) {
    static CHUNK: Mutex<(Weak<Mapping>, usize)> = Mutex::new((Weak::new(), 0));
    let mut chunk = CHUNK.lock().expect("nothing panics while holding it");
    let (mapping, used) = match (chunk.0.upgrade(), chunk.1) {
        (Some(mapping), used) if used + bytes <= CHUNK_BYTES => (mapping, used),
        _ => (Arc::new(Mapping::new(CHUNK_BYTES)), 0),
    };
    *chunk = (Arc::downgrade(&mapping), used + bytes);
    (mapping.start.wrapping_add(used), Owner::Chunk(mapping))
}

/// An anonymous private mapping whose usable part starts on a huge page.
struct Mapping {
    base: *mut libc::c_void,
    mapped_bytes: usize,
    start: *mut u8,
}

// SAFETY: only an address range; who may touch which part is decided by the buffers in it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(bytes: usize) -> Mapping {
        let mapped_bytes = bytes + HUGE_PAGE;
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let base = unsafe {
            let (protection, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                protection,
                flags | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            let layout =
                Layout::from_size_align(bytes, CACHE_LINE).expect("buffers are far below isize::MAX");
            std::alloc::handle_alloc_error(layout);
        }
        let start: *mut u8 = base
            .cast::<u8>()
            .wrapping_add(base.cast::<u8>().align_offset(HUGE_PAGE));
        // A kernel without huge pages refuses, and 4 KiB pages are then what there is.
        #[cfg(target_os = "linux")]
        // SAFETY: advice about our own mapping.
        let _ = unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
        Mapping {
            base,
            mapped_bytes,
            start,
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, whose last buffer is gone.
        unsafe { libc::munmap(self.base, self.mapped_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_zeroed_aligned_and_apart() {
        let sizes = [
            0,
            1,
            1000,
            CHUNKED_BYTES,
            3 << 20,
            CHUNK_BYTES / 4 - 64,
            MAPPED_BYTES,
            9 << 20,
        ];
        let mut all: Vec<Pages<u8>> = sizes.iter().map(|&bytes| Pages::zeroed(bytes)).collect();
        all.extend((0..20).map(|_| Pages::zeroed(5 << 20)));
        for (i, pages) in all.iter_mut().enumerate() {
            assert_eq!(pages.as_ptr().align_offset(CACHE_LINE), 0);
            assert!(pages.iter().all(|&byte| byte == 0), "buffer {i}");
            pages.fill(i as u8 + 1);
        }
        for (i, pages) in all.iter().enumerate() {
            assert!(
                pages.iter().all(|&byte| byte == i as u8 + 1),
                "buffer {i} overlaps another"
            );
        }
    }

    #[test]
    fn what_comes_and_goes_shares_no_chunk() {
        for (bytes, in_chunk) in [
            (1000, false),
            (1 << 20, true),
            (MAPPED_BYTES - 64, true),
            (9 << 20, false),
        ] {
            let is_chunk = |pages: &Pages<u8>| matches!(pages.owner, Owner::Chunk(_));
            assert_eq!(is_chunk(&Pages::placed(bytes, Stay::Long)), in_chunk, "{bytes}");
            assert!(!is_chunk(&Pages::placed(bytes, Stay::Short)), "{bytes}");
        }
    }

    #[test]
    fn rows_follow_strides() {
        let whole = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([4, 6]);
        let narrow = whole.narrow(1, 2, 3);
        let rows = Rows::of(&narrow).expect("a column range of a float tensor");
        assert_eq!((rows.rows, rows.width, rows.stride), (4, 3, 6));
        assert_eq!(rows.row(2), [14.0, 15.0, 16.0]);
        assert!(Rows::of(&whole.tr()).is_none());
        assert!(Rows::of(&whole.to_kind(Kind::Double)).is_none());
        assert!(Rows::of(&whole.select(0, 0).expand([3, 6], false)).is_none());
    }
}
