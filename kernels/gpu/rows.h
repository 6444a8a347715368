// What kernels on rows share: W floats in one load, whether a row can be read so, the sum over the threads of a run.
#pragma once

template <int W> struct alignas(4 * W) Floats { float v[W]; };
template <int W> struct alignas(2 * W) Halves { uint16_t v[W]; };

template <int W> __device__ __forceinline__ Floats<W> load(const float* from) { return *(const Floats<W>*)from; }
template <int W> __device__ __forceinline__ void store(float* to, const Floats<W>& v) { *(Floats<W>*)to = v; }
template <int W> __device__ __forceinline__ void store(uint16_t* to, const Floats<W>& v) {
  Halves<W> h;
#pragma unroll
  for (int i = 0; i < W; ++i) h.v[i] = to_bf(v.v[i]);
  *(Halves<W>*)to = h;
}

// An address that was read from memory. That it is global memory AMD's compiler can not know by itself, and would look at
// the block's own memory too.
template <class T> __device__ __forceinline__ const T* global_memory(uint64_t address) {
#if defined(GPU_AMD)
  return (const T*)(const __attribute__((address_space(1))) T*)address;
#else
  return (const T*)address;
#endif
}

// Whether 16 bytes at a time can be moved there; a pointer that is none does not stand against it.
__device__ __forceinline__ bool wide(const void* p) { return ((uint64_t)p & 15) == 0; }

// The sum over the T threads that share a run: all 256 of a block, or 32 lanes. Fixed order; all get it.
template <int T> __device__ __forceinline__ float run_sum(float v) {
  if constexpr (T == 32) {
#pragma unroll
    for (int m = 16; m; m >>= 1) v += shfl_xor(v, m);
    return v;
  } else {
    __shared__ float sums[256 / WARP];
    return block_reduce<256>(v, false, sums);
  }
}
