// One kernel source for AMD (clang, no HIP headers), NVIDIA (nvcc or NVRTC, no headers) and the CPU (fibers).
#pragma once
#if defined(GPU_EMU)
#  include "emu.h"
namespace { // Each layout of lanes has its own copy of everything.
#elif defined(__HIP__) || defined(__AMDGCN__)
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t; typedef unsigned long long uint64_t;
typedef int int32_t; typedef long long int64_t;
#  define KERNEL extern "C" __attribute__((global)) void
#  define __device__ __attribute__((device))
#  define __shared__ __attribute__((shared))
#  define __forceinline__ inline __attribute__((always_inline))
#  define LAUNCH(n, m) __attribute__((amdgpu_flat_work_group_size(n, n), amdgpu_waves_per_eu(m)))
#  define LAUNCH_UP_TO(n, m) __attribute__((amdgpu_flat_work_group_size(WARP, n), amdgpu_waves_per_eu(m)))
#  define GPU_AMD 1
#  if defined(__GFX9__)
#    define WARP 64
#  else
#    define WARP 32
#  endif
#  define TX ((int)__builtin_amdgcn_workitem_id_x())
#  define BX ((int)__builtin_amdgcn_workgroup_id_x())
#  define BY ((int)__builtin_amdgcn_workgroup_id_y())
#  define BZ ((int)__builtin_amdgcn_workgroup_id_z())
__device__ __forceinline__ void block_sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup"); __builtin_amdgcn_s_barrier(); __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
__device__ __forceinline__ void warp_sync() { __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront"); __builtin_amdgcn_wave_barrier(); __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront"); }
__device__ __forceinline__ int lane_() { return TX & (WARP - 1); }
__device__ __forceinline__ int shfl_i(int v, int src) { return __builtin_amdgcn_ds_bpermute(src << 2, v); }
__device__ __forceinline__ float exp2_(float x) { return __builtin_amdgcn_exp2f(x); }
__device__ __forceinline__ float log2_(float x) { return __builtin_amdgcn_logf(x); }
__device__ __forceinline__ float rsqrt_(float x) { return __builtin_amdgcn_rsqf(x); }
__device__ __forceinline__ float rcp_(float x) { return __builtin_amdgcn_rcpf(x); }
__device__ __forceinline__ float sqrt_(float x) { return __builtin_sqrtf(x); }
__device__ __forceinline__ float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__device__ __forceinline__ float max_(float a, float b) { return __builtin_fmaxf(a, b); }
__device__ __forceinline__ float min_(float a, float b) { return __builtin_fminf(a, b); }
__device__ __forceinline__ float rint_(float x) { return __builtin_rintf(x); }
#else
#  ifdef __CUDACC_RTC__
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t; typedef unsigned long long uint64_t;
typedef int int32_t; typedef long long int64_t;
#  else
#    include <stdint.h>
#  endif
#  define GPU_NVIDIA 1
#  define KERNEL extern "C" __global__ void
#  define WARP 32
#  define LAUNCH(n, m) __launch_bounds__(n, m)
#  define LAUNCH_UP_TO(n, m) __launch_bounds__(n, m)
#  define TX ((int)threadIdx.x)
#  define BX ((int)blockIdx.x)
#  define BY ((int)blockIdx.y)
#  define BZ ((int)blockIdx.z)
__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ int lane_() { return TX & 31; }
__device__ __forceinline__ int shfl_i(int v, int src) { return __shfl_sync(0xffffffffu, v, src); }
__device__ __forceinline__ float exp2_(float x) { return exp2f(x); }
__device__ __forceinline__ float log2_(float x) { return log2f(x); }
__device__ __forceinline__ float rsqrt_(float x) { return rsqrtf(x); }
__device__ __forceinline__ float rcp_(float x) { return 1.f / x; }
__device__ __forceinline__ float sqrt_(float x) { return sqrtf(x); }
__device__ __forceinline__ float fma_(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ float max_(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float min_(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float rint_(float x) { return rintf(x); }
#endif

union F { float f; uint32_t i; int s; };
__device__ __forceinline__ float shfl(float v, int src) { F x; x.f = v; x.s = shfl_i(x.s, src); return x.f; }
__device__ __forceinline__ float shfl_xor(float v, int m) { return shfl(v, lane_() ^ m); }
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int m = WARP / 2; m; m >>= 1) v += shfl_xor(v, m);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int m = WARP / 2; m; m >>= 1) v = max_(v, shfl_xor(v, m));
  return v;
}
template <int NT> __device__ __forceinline__ float block_reduce(float v, bool is_max, float* red) {
  v = is_max ? warp_max(v) : warp_sum(v);
  block_sync();
  if (lane_() == 0) red[TX / WARP] = v;
  block_sync();
  v = red[0];
#pragma unroll
  for (int w = 1; w < NT / WARP; ++w) v = is_max ? max_(v, red[w]) : v + red[w];
  return v;
}
// 64 bits by halves.
__device__ __forceinline__ uint64_t shfl_u64(uint64_t v, int src) {
  return (uint64_t)(uint32_t)shfl_i((int)(v >> 32), src) << 32 | (uint32_t)shfl_i((int)v, src);
}
// The upper 64 bits of a product of 128.
__device__ __forceinline__ uint64_t mul_high(uint64_t a, uint64_t b) {
  uint64_t al = (uint32_t)a, ah = a >> 32, bl = (uint32_t)b, bh = b >> 32, middle = ah * bl + (al * bl >> 32);
  return ah * bh + (middle >> 32) + ((al * bh + (uint32_t)middle) >> 32);
}
// A product that is rounded, never fused with the sum it goes into: for the CPU's bits.
__device__ __forceinline__ float mul_(float a, float b) {
#if defined(GPU_EMU)
  volatile float product = a * b;
  return product;
#elif defined(GPU_NVIDIA)
  return __fmul_rn(a, b);
#else
#pragma clang fp contract(off)
  return a * b;
#endif
}
// Adds to what a block shares. Of integers, so that the order does not matter.
template <class T> __device__ __forceinline__ T shared_add(T* to, T v) {
#if defined(GPU_EMU)
  T before = *to;
  *to += v;
  return before;
#elif defined(GPU_AMD)
  return __hip_atomic_fetch_add(to, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
#else
  if constexpr (sizeof(T) == 8) return atomicAdd((unsigned long long*)to, (unsigned long long)v);
  else return atomicAdd(to, v);
#endif
}
// bf16 as raw bits, rounded to nearest even: the same on all three.
__device__ __forceinline__ float bf(uint16_t b) { F x; x.i = (uint32_t)b << 16; return x.f; }
__device__ __forceinline__ uint16_t to_bf(float f) {
  F x; x.f = f;
  if (f != f) return (uint16_t)(x.i >> 16 | 0x40u); // NVIDIA's NaN is all ones, which rounding would carry over into -0.
  return (uint16_t)((x.i + 0x7fffu + ((x.i >> 16) & 1u)) >> 16);
}
struct alignas(16) u16x8 { uint16_t v[8]; };
struct alignas(16) f32x4 { float v[4]; };

#if defined(GPU_AMD)
// Four registers side by side, which the compiler does not take apart again.
typedef float Four __attribute__((ext_vector_type(4)));
__device__ __forceinline__ Four together(Four four) { asm("" : "+v"(four)); return four; }
#else
typedef f32x4 Four;
__device__ __forceinline__ Four together(const Four& four) { return four; }
#endif
__device__ __forceinline__ bool aligned(const void* p) { return ((uint64_t)p & 15) == 0; }
// Four neighbours from `i` of `n` numbers: all at once, which wants 16 bytes' alignment and all four to be there, or each by
// itself, zeros beyond the end.
template <bool WIDE> __device__ __forceinline__ f32x4 load4(const float* from, int64_t i, int64_t n) {
  if constexpr (WIDE) return __builtin_bit_cast(f32x4, together(*(const Four*)(from + i)));
  else {
    f32x4 to;
#pragma unroll
    for (int j = 0; j < 4; ++j) to.v[j] = i + j < n ? from[i + j] : 0.f;
    return to;
  }
}
template <bool WIDE> __device__ __forceinline__ void store4(float* to, int64_t i, int64_t n, const f32x4& from) {
  if constexpr (WIDE) *(Four*)(to + i) = together(__builtin_bit_cast(Four, from));
  else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + j < n) to[i + j] = from.v[j];
  }
}

// ---- a 16 x 16 x 16 product of bf16 tiles with float32 sums: who holds what
#if GPU_TILE == 4 || (defined(GPU_AMD) && defined(__GFX12__))          // RDNA4 WMMA, 32 lanes: half a row of K each
constexpr int AN = 8, CN = 8, RUN = 8;
__device__ __forceinline__ int a_row(int l, int) { return l & 15; }
__device__ __forceinline__ int a_k(int l, int j) { return 8 * (l >> 4) + j; }
__device__ __forceinline__ int c_row(int l, int j) { return 8 * (l >> 4) + j; }
__device__ __forceinline__ int c_col(int l, int) { return l & 15; }
__device__ __forceinline__ float row_sum(float v) { for (int m = 8; m; m >>= 1) v += shfl_xor(v, m); return v; }
__device__ __forceinline__ float row_max(float v) { for (int m = 8; m; m >>= 1) v = max_(v, shfl_xor(v, m)); return v; }
#  define B_SAME_AS_A 1
#elif GPU_TILE == 2 || (defined(GPU_AMD) && !defined(__GFX9__))        // RDNA3 WMMA, 32 lanes
constexpr int AN = 16, CN = 8, RUN = 16;
__device__ __forceinline__ int a_row(int l, int) { return l & 15; }
__device__ __forceinline__ int a_k(int, int j) { return j; }
__device__ __forceinline__ int c_row(int l, int j) { return 2 * j + (l >> 4); }
__device__ __forceinline__ int c_col(int l, int) { return l & 15; }
__device__ __forceinline__ float row_sum(float v) { for (int m = 8; m; m >>= 1) v += shfl_xor(v, m); return v; }
__device__ __forceinline__ float row_max(float v) { for (int m = 8; m; m >>= 1) v = max_(v, shfl_xor(v, m)); return v; }
#  define B_SAME_AS_A 1
#elif GPU_TILE == 3 || defined(GPU_NVIDIA)                              // mma.sync m16n8k16, 32 lanes, twice
constexpr int AN = 8, CN = 8, RUN = 2;
__device__ __forceinline__ int a_row(int l, int j) { return (l >> 2) + 8 * ((j >> 1) & 1); }
__device__ __forceinline__ int a_k(int l, int j) { return (l & 3) * 2 + (j & 1) + 8 * (j >> 2); }
__device__ __forceinline__ int b_col(int l, int j) { return (l >> 2) + 8 * (j >> 2); }
__device__ __forceinline__ int b_k(int l, int j) { return (l & 3) * 2 + (j & 1) + 8 * ((j >> 1) & 1); }
__device__ __forceinline__ int c_row(int l, int j) { return (l >> 2) + 8 * ((j >> 1) & 1); }
__device__ __forceinline__ int c_col(int l, int j) { return (l & 3) * 2 + (j & 1) + 8 * (j >> 2); }
__device__ __forceinline__ float row_sum(float v) { v += shfl_xor(v, 1); return v + shfl_xor(v, 2); }
__device__ __forceinline__ float row_max(float v) { v = max_(v, shfl_xor(v, 1)); return max_(v, shfl_xor(v, 2)); }
#else                                                                   // CDNA MFMA, 64 lanes
constexpr int AN = 4, CN = 4, RUN = 4;
__device__ __forceinline__ int a_row(int l, int) { return l & 15; }
__device__ __forceinline__ int a_k(int l, int j) { return 4 * (l >> 4) + j; }
__device__ __forceinline__ int c_row(int l, int j) { return 4 * (l >> 4) + j; }
__device__ __forceinline__ int c_col(int l, int) { return l & 15; }
__device__ __forceinline__ float row_sum(float v) { for (int m = 8; m; m >>= 1) v += shfl_xor(v, m); return v; }
__device__ __forceinline__ float row_max(float v) { for (int m = 8; m; m >>= 1) v = max_(v, shfl_xor(v, m)); return v; }
#  define B_SAME_AS_A 1
#endif
#ifdef B_SAME_AS_A
__device__ __forceinline__ int b_col(int l, int j) { return a_row(l, j); }
__device__ __forceinline__ int b_k(int l, int j) { return a_k(l, j); }
#endif
// Rows of C that a lane has numbers of its own for: j and j ^ 1 share a row on NVIDIA.
struct alignas(2 * AN < 16 ? 2 * AN : 16) Half { uint16_t v[AN]; };
struct Sum { float v[CN]; };

// RUN elements of a fragment lie side by side in memory.
template <int N> struct alignas(2 * N < 16 ? 2 * N : 16) Run { uint16_t v[N]; };
__device__ __forceinline__ void load_run(Half& to, int j, const uint16_t* from) { *(Run<RUN>*)(to.v + j) = *(const Run<RUN>*)from; }

__device__ __forceinline__ void mma(Sum& c, const Half& a, const Half& b) {
#if defined(GPU_EMU)
  int me = TX, first = me / WARP * WARP;
  memcpy(emu::left[me], a.v, sizeof a.v);
  memcpy(emu::right[me], b.v, sizeof b.v);
  memcpy(emu::sums[me], c.v, sizeof c.v);
  emu::pass(emu::warp(), WARP, [first] { // Once for all lanes, each sum in the order of k.
    float x[16][16], y[16][16], z[16][16];
    for (int l = 0; l < WARP; ++l) {
      for (int j = 0; j < AN; ++j) {
        x[a_row(l, j)][a_k(l, j)] = bf(emu::left[first + l][j]);
        y[b_k(l, j)][b_col(l, j)] = bf(emu::right[first + l][j]);
      }
      for (int j = 0; j < CN; ++j) z[c_row(l, j)][c_col(l, j)] = emu::sums[first + l][j];
    }
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 16; ++n) z[r][n] += x[r][k] * y[k][n];
    for (int l = 0; l < WARP; ++l)
      for (int j = 0; j < CN; ++j) emu::sums[first + l][j] = z[c_row(l, j)][c_col(l, j)];
  });
  memcpy(c.v, emu::sums[me], sizeof c.v);
#elif defined(GPU_AMD) && defined(__GFX9__)
  typedef short v4s __attribute__((ext_vector_type(4))); typedef float v4f __attribute__((ext_vector_type(4)));
  v4s x = __builtin_bit_cast(v4s, a), y = __builtin_bit_cast(v4s, b); v4f z = __builtin_bit_cast(v4f, c);
  z = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x, y, z, 0, 0, 0);
  c = __builtin_bit_cast(Sum, z);
#elif defined(GPU_AMD) && defined(__GFX12__)
  typedef short v8s __attribute__((ext_vector_type(8))); typedef float v8f __attribute__((ext_vector_type(8)));
  v8s x = __builtin_bit_cast(v8s, a), y = __builtin_bit_cast(v8s, b); v8f z = __builtin_bit_cast(v8f, c);
  z = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(x, y, z);
  c = __builtin_bit_cast(Sum, z);
#elif defined(GPU_AMD)
  typedef short v16s __attribute__((ext_vector_type(16))); typedef float v8f __attribute__((ext_vector_type(8)));
  v16s x = __builtin_bit_cast(v16s, a), y = __builtin_bit_cast(v16s, b); v8f z = __builtin_bit_cast(v8f, c);
  z = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(x, y, z);
  c = __builtin_bit_cast(Sum, z);
#else
  const uint32_t* x = (const uint32_t*)a.v; const uint32_t* y = (const uint32_t*)b.v;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c.v[4 * h]), "+f"(c.v[4 * h + 1]), "+f"(c.v[4 * h + 2]), "+f"(c.v[4 * h + 3])
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[2 * h]), "r"(y[2 * h + 1]));
#endif
}

#if defined(GPU_EMU)
}
#endif
