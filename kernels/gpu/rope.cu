// Rotary positions: pairs of a head's first dimensions turn by the angle of their row's position.

// The two of pair i: i and i + half, or side by side.
__device__ __forceinline__ int first_of(int i, int interleaved) { return interleaved ? 2 * i : i; }
__device__ __forceinline__ int second_of(int i, int half, int interleaved) { return interleaved ? 2 * i + 1 : i + half; }

__device__ __forceinline__ void turn(float& x, float& y, float cos, float sin) {
  float first = x * cos - y * sin;
  y = y * cos + x * sin;
  x = first;
}

// Turns pairs i to i + 4 of a head.
__device__ __forceinline__ void turn_pairs(const float* from, float* to, const float* cos, const float* sin, int i, int half,
                                           int interleaved, float sign, bool wide) {
  if (!wide) {
    for (int end = i + 4 < half ? i + 4 : half; i < end; ++i) {
      int first = first_of(i, interleaved), second = second_of(i, half, interleaved);
      float x = from[first], y = from[second];
      turn(x, y, cos[i], sin[i] * sign);
      to[first] = x;
      to[second] = y;
    }
    return;
  }
  int low = first_of(i, interleaved), high = interleaved ? low + 4 : low + half;
  f32x4 a = *(const f32x4*)(from + low), b = *(const f32x4*)(from + high);
  f32x4 c = *(const f32x4*)(cos + i), s = *(const f32x4*)(sin + i);
#pragma unroll
  for (int j = 0; j < 4; ++j) s.v[j] *= sign;
  if (interleaved) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      turn(a.v[2 * j], a.v[2 * j + 1], c.v[j], s.v[j]);
      turn(b.v[2 * j], b.v[2 * j + 1], c.v[2 + j], s.v[2 + j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) turn(a.v[j], b.v[j], c.v[j], s.v[j]);
  }
  *(f32x4*)(to + low) = a;
  *(f32x4*)(to + high) = b;
}

// Whether a head's pairs can be read four at a time.
__device__ __forceinline__ bool wide_heads(const float* x, int64_t stride, int dim, int half) {
  return ((uint64_t)x % 16 | (uint64_t)(stride % 4) | (uint64_t)(dim % 4) | (uint64_t)(half % 4)) == 0;
}

// x [rows, heads * dim] float32, `stride` apart, in place: row t turns by table[positions[t]] (cosines [half], then sines).
// table [positions, 2 * half]; dimensions behind 2 * half stay. sign -1 turns back. Bound by memory: one pass.
// launch: grid (rows, heads * (half / 4 rounded up) / 256 rounded up), 256 threads.
KERNEL LAUNCH(256, 4) rope(float* x, const float* table, const int* positions, int64_t stride, int heads, int dim, int half,
                           int interleaved, float sign) {
  int fours = (half + 3) / 4, at = BY * 256 + TX, head = at / fours;
  if (head >= heads) return;
  const float* cos = table + (int64_t)positions[BX] * 2 * half;
  float* mine = x + BX * stride + head * dim;
  turn_pairs(mine, mine, cos, cos + half, at % fours * 4, half, interleaved, sign, wide_heads(x, stride, dim, half));
}

template <class E>
__device__ __forceinline__ void rope_kv_write(float* qkv, const float* table, const int* positions, const int* slots,
                                              void* pages, int64_t stride, int heads, int kv_heads, int dim, int half,
                                              int interleaved) {
  __shared__ __attribute__((aligned(16))) float keys[4][256];
  int warp = TX / WARP, head = BY * 4 + warp, kv_head = head - heads;
  const float* cos = table + (int64_t)positions[BX] * 2 * half;
  float* x = qkv + BX * stride + head * dim;
  int slot = slots[BX];
  bool wide = wide_heads(qkv, stride, dim, half);
  if (head < heads)
    for (int i = lane_() * 4; i < half; i += WARP * 4) turn_pairs(x, x, cos, cos + half, i, half, interleaved, 1.f, wide);
  if (kv_head < 0 || kv_head >= kv_heads || slot < 0) return;
  for (int i = lane_() * 4; i < half; i += WARP * 4) turn_pairs(x, keys[warp], cos, cos + half, i, half, interleaved, 1.f, wide);
  for (int d = 2 * half + lane_(); d < dim; d += WARP) keys[warp][d] = x[d];
  warp_sync();
  E* page = page_of<E>(pages, slot / BLOCK, kv_head, kv_heads, dim);
  put_token(page, slot % BLOCK, keys[warp], x + kv_heads * dim, dim);
}

// Both at once, where no norm stands between the product and the rotation: qkv [rows, (heads + 2 kv_heads) * dim] float32,
// `stride` apart (rows on 16 bytes). Queries turn in place; keys turn and go with their values into the pages (kv_write_bf16),
// and stay unturned in qkv. dim at most 256. Bound by memory.
// launch: grid (rows, (heads + kv_heads) / 4 rounded up), 4 warps.
KERNEL LAUNCH(4 * WARP, 4) rope_kv_write_bf16(float* qkv, const float* table, const int* positions, const int* slots,
                                              void* pages, int64_t stride, int heads, int kv_heads, int dim, int half,
                                              int interleaved) {
  rope_kv_write<uint16_t>(qkv, table, positions, slots, pages, stride, heads, kv_heads, dim, half, interleaved);
}

// The same into pages of codes. launch: as rope_kv_write_bf16.
KERNEL LAUNCH(4 * WARP, 4) rope_kv_write_int8(float* qkv, const float* table, const int* positions, const int* slots,
                                              void* pages, int64_t stride, int heads, int kv_heads, int dim, int half,
                                              int interleaved) {
  rope_kv_write<int8>(qkv, table, positions, slots, pages, stride, heads, kv_heads, dim, half, interleaved);
}

// The same into pages of float32. launch: as rope_kv_write_bf16.
KERNEL LAUNCH(4 * WARP, 4) rope_kv_write_f32(float* qkv, const float* table, const int* positions, const int* slots,
                                             void* pages, int64_t stride, int heads, int kv_heads, int dim, int half,
                                             int interleaved) {
  rope_kv_write<float>(qkv, table, positions, slots, pages, stride, heads, kv_heads, dim, half, interleaved);
}
