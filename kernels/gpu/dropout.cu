// Dropout whose mask is a hash of (seed, step, stream, row, column), the one of kernels/src/dropout.rs to the bit: nothing
// is kept for the backward, which is the same kernel over the gradient.

// SplitMix64 absorbing one word.
__device__ __forceinline__ uint64_t absorbed(uint64_t state, int64_t word) {
  state = (state ^ (uint64_t)word) + 0x9e3779b97f4a7c15ull;
  state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ull;
  state = (state ^ (state >> 27)) * 0x94d049bb133111ebull;
  return state ^ (state >> 31);
}

// 32 bits of an element: lowbias32 between the halves of its row's key.
__device__ __forceinline__ uint32_t element_hash(uint64_t row_key, uint32_t column) {
  uint32_t x = column * 0x9e3779b9u ^ (uint32_t)row_key;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + (uint32_t)(row_key >> 32)) * 0x846ca68bu;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  return x ^ (x >> 15);
}

template <bool WIDE>
__device__ __forceinline__ void dropped(const float* x, float* y, int width, uint64_t row_key, uint32_t column0, uint32_t threshold, float scale) {
  for (int i = TX * 4; i < width; i += 256 * 4) {
    f32x4 v = load4<WIDE>(x, i, width);
#pragma unroll
    for (int j = 0; j < 4; ++j) v.v[j] = element_hash(row_key, column0 + (uint32_t)(i + j)) >= threshold ? v.v[j] * scale : 0.f;
    store4<WIDE>(y, i, width, v);
  }
}

// y = x * keep * scale, x and y [rows, width] float32 (y may be x), which begin at (row0, column0) of the stream's matrix. An
// element is kept where its hash is not below the threshold, as unsigned numbers. Bound by memory: 8 bytes an element.
// launch: grid (rows), 256 threads.
KERNEL LAUNCH(256, 4) dropout(const float* x, float* y, int width, int64_t seed, int64_t step, int64_t stream, int64_t row0, int column0, int threshold,
                              float scale) {
  uint64_t key = absorbed(absorbed(absorbed(absorbed(0, seed), step), stream), row0 + BX);
  x += (int64_t)BX * width;
  y += (int64_t)BX * width;
  if (width % 4 == 0 && aligned(x) && aligned(y)) dropped<true>(x, y, width, key, (uint32_t)column0, (uint32_t)threshold, scale);
  else dropped<false>(x, y, width, key, (uint32_t)column0, (uint32_t)threshold, scale);
}
