// The pages of the KV cache, and the writing of keys and values into them.
//
// A block holds 32 tokens of a sequence; a page is what one KV head has of a block, its keys and then its values:
// pages [blocks, kv_heads] of a layer, D the head's dimension.
//
// - bf16 and int8: keys and values are right sides of matrix units, so a page is laid out in the order in which lanes read
//   it. Element (n, k) of such a side with reduction over k = 0..K stands at
//     ((n / 16) * (K / 8) + k / 8) * 128 + n % 16 * 8 + k % 8,
//   tiles of 16 columns, in them eights of the reduction, side by side for one column. Of keys n is the key and k the
//   dimension (K = D), of values n is the dimension and k the key (K = 32). A lane of CDNA or NVIDIA takes 16 bytes at once
//   for two steps of its product, a lane of RDNA for half a step, and neighbours read neighbouring bytes.
//   int8: a byte a number, and behind them float32 scales of the 32 keys and of the 32 values.
// - float32: keys [D / 4][32 keys][4], values [32 keys][D].
constexpr int BLOCK = 32;

typedef signed char int8; // A code of 8 bits; its page has scales.

struct alignas(8) u16x4 { uint16_t v[4]; };
struct alignas(8) int8x8 { int8 v[8]; };

template <class E> __device__ __forceinline__ int64_t page_bytes(int dim) {
  return 2 * BLOCK * dim * (int64_t)sizeof(E) + (sizeof(E) == 1 ? 2 * BLOCK * 4 : 0);
}

__device__ __forceinline__ int tiled(int n, int k, int depth) {
  return ((n / 16) * (depth / 8) + k / 8) * 128 + n % 16 * 8 + k % 8;
}

// The three writers of a token's key and value, [dim] float32 each and on 16 bytes, by one warp.
__device__ __forceinline__ void put_token(uint16_t* page, int key, const float* k, const float* v, int dim) {
  uint16_t* values = page + BLOCK * dim;
  for (int d = lane_() * 8; d < dim; d += WARP * 8) {
    f32x4 low = *(const f32x4*)(k + d), high = *(const f32x4*)(k + d + 4);
    u16x8 eight;
    for (int i = 0; i < 4; ++i) {
      eight.v[i] = to_bf(low.v[i]);
      eight.v[4 + i] = to_bf(high.v[i]);
    }
    *(u16x8*)(page + tiled(key, d, dim)) = eight;
  }
  for (int d = lane_(); d < dim; d += WARP) values[tiled(d, key, BLOCK)] = to_bf(v[d]);
}

// The scale of a row's codes: its largest is 127. 0 for a row of nothing, not a number for one that holds such.
__device__ __forceinline__ float code_scale(const float* x, int dim) {
  float largest = 0, bad = 0;
  for (int d = lane_(); d < dim; d += WARP) {
    float size = x[d] < 0 ? -x[d] : x[d];
    if (!(size <= 3.4028234e38f)) bad = 1;
    largest = max_(largest, size);
  }
  float scale = warp_max(largest) / 127.f;
  F nan;
  nan.i = 0x7fc00000u;
  if (warp_max(bad) > 0) return nan.f;
  return scale < 1.17549435e-38f ? 0.f : scale;
}

__device__ __forceinline__ int8 code(float x, float scale) {
  if (!(scale > 0)) return 0;
  float steps = rint_(x / scale);
  return (int8)(int)max_(-127.f, min_(127.f, steps));
}

__device__ __forceinline__ void put_token(int8* page, int key, const float* k, const float* v, int dim) {
  int8* values = page + BLOCK * dim;
  float* scales = (float*)(page + 2 * BLOCK * dim);
  float k_scale = code_scale(k, dim), v_scale = code_scale(v, dim);
  for (int d = lane_() * 8; d < dim; d += WARP * 8) {
    int8x8 eight;
    for (int i = 0; i < 8; ++i) eight.v[i] = code(k[d + i], k_scale);
    *(int8x8*)(page + tiled(key, d, dim)) = eight;
  }
  for (int d = lane_(); d < dim; d += WARP) values[tiled(d, key, BLOCK)] = code(v[d], v_scale);
  if (lane_() == 0) {
    scales[key] = k_scale;
    scales[BLOCK + key] = v_scale;
  }
}

__device__ __forceinline__ void put_token(float* page, int key, const float* k, const float* v, int dim) {
  for (int d = lane_() * 4; d < dim; d += WARP * 4) {
    *(f32x4*)(page + d * BLOCK + key * 4) = *(const f32x4*)(k + d);
    *(f32x4*)(page + BLOCK * dim + key * dim + d) = *(const f32x4*)(v + d);
  }
}

template <class E> __device__ __forceinline__ E* page_of(void* pages, int64_t block, int head, int kv_heads, int dim) {
  return (E*)((char*)pages + (block * kv_heads + head) * page_bytes<E>(dim));
}

template <class E>
__device__ __forceinline__ void kv_write(const float* k, const float* v, const int* slots, void* pages, int64_t k_stride,
                                         int64_t v_stride, int kv_heads, int dim) {
  int head = BY * 4 + TX / WARP;
  int slot = slots[BX];
  if (slot < 0 || head >= kv_heads) return;
  E* page = page_of<E>(pages, slot / BLOCK, head, kv_heads, dim);
  put_token(page, slot % BLOCK, k + BX * k_stride + head * dim, v + BX * v_stride + head * dim, dim);
}

// Keys and values of rows, k and v [rows, kv_heads * dim] float32 with their strides (rows on 16 bytes), into pages;
// slots [rows]: block * 32 + place, or -1 for a row that is written nowhere. dim a multiple of 8 (float32: of 4).
// Bound by memory: each number is read and written once.
// launch: grid (rows, kv_heads / 4 rounded up), 4 warps.
KERNEL LAUNCH(4 * WARP, 4) kv_write_bf16(const float* k, const float* v, const int* slots, void* pages, int64_t k_stride,
                                         int64_t v_stride, int kv_heads, int dim) {
  kv_write<uint16_t>(k, v, slots, pages, k_stride, v_stride, kv_heads, dim);
}

// The same into pages of codes. launch: as kv_write_bf16.
KERNEL LAUNCH(4 * WARP, 4) kv_write_int8(const float* k, const float* v, const int* slots, void* pages, int64_t k_stride,
                                         int64_t v_stride, int kv_heads, int dim) {
  kv_write<int8>(k, v, slots, pages, k_stride, v_stride, kv_heads, dim);
}

// The same into pages of float32. launch: as kv_write_bf16.
KERNEL LAUNCH(4 * WARP, 4) kv_write_f32(const float* k, const float* v, const int* slots, void* pages, int64_t k_stride,
                                        int64_t v_stride, int kv_heads, int dim) {
  kv_write<float>(k, v, slots, pages, k_stride, v_stride, kv_heads, dim);
}
