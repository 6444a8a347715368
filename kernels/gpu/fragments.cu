// Fragments of a product over 32: two steps of 16 (a step by itself where 16 are left). Which of the 32 a lane has in which
// step is free as long as both sides agree, so a lane takes 8 that lie side by side.
// Left sides are rows in shared memory, `stride` apart; right sides are tiles of pages.cu.
struct Deep { Half step[2]; };

// Nothing moves across it: the compiler fetches so far ahead that registers run out.
__device__ __forceinline__ void in_order() {
#if defined(GPU_AMD)
  __builtin_amdgcn_sched_barrier(0);
#endif
}

__device__ __forceinline__ u16x8 eight(const uint16_t* from) { return *(const u16x8*)from; }
__device__ __forceinline__ u16x4 four(const uint16_t* from) { return *(const u16x4*)from; }
// Codes are small whole numbers, which bf16 has exactly.
__device__ __forceinline__ uint16_t widened(int8 code) { F x; x.f = (float)code; return (uint16_t)(x.i >> 16); }
__device__ __forceinline__ u16x8 eight(const int8* from) {
  int8x8 codes = *(const int8x8*)from;
  u16x8 to;
#pragma unroll
  for (int i = 0; i < 8; ++i) to.v[i] = widened(codes.v[i]);
  return to;
}
struct alignas(4) int8x4 { int8 v[4]; };
__device__ __forceinline__ u16x4 four(const int8* from) {
  int8x4 codes = *(const int8x4*)from;
  u16x4 to;
#pragma unroll
  for (int i = 0; i < 4; ++i) to.v[i] = widened(codes.v[i]);
  return to;
}

#if GPU_TILE == 4 || (defined(GPU_AMD) && defined(__GFX12__))
// RDNA4: a lane has 8 of a step.
constexpr int LANE_ROWS = 8;
__device__ __forceinline__ int lane_row(int j) { return j; }
__device__ __forceinline__ int number_of_row(int i) { return i; }
__device__ __forceinline__ int deep_k(int l, int step, int j) { return 16 * step + 8 * (l >> 4) + j; }
__device__ __forceinline__ Half step_of_rows(const uint16_t* rows, int stride) {
  Half x;
  *(u16x8*)x.v = eight(rows + (lane_() & 15) * stride + 8 * (lane_() >> 4));
  return x;
}
template <class E> __device__ __forceinline__ Half step_of_tile(const E* tile) {
  Half x;
  *(u16x8*)x.v = eight(tile + lane_() * 8);
  return x;
}
__device__ __forceinline__ Deep deep_of_rows(const uint16_t* rows, int stride) {
  return {step_of_rows(rows, stride), step_of_rows(rows + 16, stride)};
}
template <class E> __device__ __forceinline__ Deep deep_of_tile(const E* tile) {
  return {step_of_tile(tile), step_of_tile(tile + 256)};
}
#elif GPU_TILE == 2 || (defined(GPU_AMD) && !defined(__GFX9__))
// RDNA3: a lane has all 16 of a step.
constexpr int LANE_ROWS = 8;
__device__ __forceinline__ int lane_row(int j) { return j; }
__device__ __forceinline__ int number_of_row(int i) { return i; }
__device__ __forceinline__ int deep_k(int, int step, int j) { return 16 * step + j; }
__device__ __forceinline__ Half step_of_rows(const uint16_t* rows, int stride) {
  Half x;
#pragma unroll
  for (int h = 0; h < 2; ++h) *(u16x8*)(x.v + 8 * h) = eight(rows + (lane_() & 15) * stride + 8 * h);
  return x;
}
template <class E> __device__ __forceinline__ Half step_of_tile(const E* tile) {
  Half x;
#pragma unroll
  for (int h = 0; h < 2; ++h) *(u16x8*)(x.v + 8 * h) = eight(tile + (h * 16 + (lane_() & 15)) * 8);
  return x;
}
__device__ __forceinline__ Deep deep_of_rows(const uint16_t* rows, int stride) {
  return {step_of_rows(rows, stride), step_of_rows(rows + 16, stride)};
}
template <class E> __device__ __forceinline__ Deep deep_of_tile(const E* tile) {
  return {step_of_tile(tile), step_of_tile(tile + 256)};
}
#elif GPU_TILE == 3 || defined(GPU_NVIDIA)
// NVIDIA: a lane has 4 of each of two rows or columns.
constexpr int LANE_ROWS = 2;
__device__ __forceinline__ int lane_row(int j) { return (j >> 1) & 1; }
__device__ __forceinline__ int number_of_row(int i) { return 2 * i; }
__device__ __forceinline__ int deep_k(int l, int step, int j) { return 8 * (l & 3) + 4 * step + (j & 3); }
__device__ __forceinline__ Half of_rows(const uint16_t* low, const uint16_t* high) {
  return {{low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3]}};
}
__device__ __forceinline__ Half of_columns(const uint16_t* low, const uint16_t* high) {
  return {{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]}};
}
__device__ __forceinline__ Deep deep_of_rows(const uint16_t* rows, int stride) {
  rows += (lane_() >> 2) * stride + 8 * (lane_() & 3);
  u16x8 low = eight(rows), high = eight(rows + 8 * stride);
  return {of_rows(low.v, high.v), of_rows(low.v + 4, high.v + 4)};
}
template <class E> __device__ __forceinline__ Deep deep_of_tile(const E* tile) {
  tile += ((lane_() & 3) * 16 + (lane_() >> 2)) * 8;
  u16x8 low = eight(tile), high = eight(tile + 64);
  return {of_columns(low.v, high.v), of_columns(low.v + 4, high.v + 4)};
}
__device__ __forceinline__ Half step_of_rows(const uint16_t* rows, int stride) {
  rows += (lane_() >> 2) * stride + 4 * (lane_() & 3);
  u16x4 low = four(rows), high = four(rows + 8 * stride);
  return of_rows(low.v, high.v);
}
template <class E> __device__ __forceinline__ Half step_of_tile(const E* tile) {
  int q = lane_() & 3;
  tile += ((q >> 1) * 16 + (lane_() >> 2)) * 8 + 4 * (q & 1);
  u16x4 low = four(tile), high = four(tile + 64);
  return of_columns(low.v, high.v);
}
__device__ __forceinline__ Deep deep_of_left(const uint16_t* tile) {
  tile += ((lane_() & 3) * 16 + (lane_() >> 2)) * 8;
  u16x8 low = eight(tile), high = eight(tile + 64);
  return {of_rows(low.v, high.v), of_rows(low.v + 4, high.v + 4)};
}
__device__ __forceinline__ Half step_of_left(const uint16_t* tile) {
  int q = lane_() & 3;
  tile += ((q >> 1) * 16 + (lane_() >> 2)) * 8 + 4 * (q & 1);
  u16x4 low = four(tile), high = four(tile + 64);
  return of_rows(low.v, high.v);
}
#else
// CDNA: a lane has 4 of one row or column.
constexpr int LANE_ROWS = 4;
__device__ __forceinline__ int lane_row(int j) { return j; }
__device__ __forceinline__ int number_of_row(int i) { return i; }
__device__ __forceinline__ int deep_k(int l, int step, int j) { return 8 * (l >> 4) + 4 * step + j; }
__device__ __forceinline__ Deep both(const u16x8& x) {
  return {{{{x.v[0], x.v[1], x.v[2], x.v[3]}}, {{x.v[4], x.v[5], x.v[6], x.v[7]}}}};
}
__device__ __forceinline__ Deep deep_of_rows(const uint16_t* rows, int stride) {
  return both(eight(rows + (lane_() & 15) * stride + 8 * (lane_() >> 4)));
}
template <class E> __device__ __forceinline__ Deep deep_of_tile(const E* tile) { return both(eight(tile + lane_() * 8)); }
__device__ __forceinline__ Half step_of_rows(const uint16_t* rows, int stride) {
  u16x4 x = four(rows + (lane_() & 15) * stride + 4 * (lane_() >> 4));
  return {{x.v[0], x.v[1], x.v[2], x.v[3]}};
}
template <class E> __device__ __forceinline__ Half step_of_tile(const E* tile) {
  int q = lane_() >> 4;
  u16x4 x = four(tile + ((q >> 1) * 16 + (lane_() & 15)) * 8 + 4 * (q & 1));
  return {{x.v[0], x.v[1], x.v[2], x.v[3]}};
}
#endif
// Left sides out of tiles of pages.cu.
#ifdef B_SAME_AS_A
__device__ __forceinline__ Deep deep_of_left(const uint16_t* tile) { return deep_of_tile(tile); }
__device__ __forceinline__ Half step_of_left(const uint16_t* tile) { return step_of_tile(tile); }
#endif
