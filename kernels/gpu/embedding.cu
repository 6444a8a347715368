// The lookup of tokens in a table. Bound by memory: a row is read once, 16 bytes at a time where its width allows.

namespace embedding {

__device__ __forceinline__ float number(uint16_t v) { return bf(v); }
__device__ __forceinline__ float number(float v) { return v; }

// This thread's eight of the 2048 columns of its block.
template <class T> __device__ __forceinline__ void row(const T* from, bool here, float* to, int width, bool by_eight, float scale) {
  int first = BY * 2048 + TX * 8;
  if (by_eight) {
    if (first >= width) return;
    f32x4 y[2];
    if constexpr (sizeof(T) == 2) {
      u16x8 v = {};
      if (here) v = *(const u16x8*)(from + first);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i / 4].v[i % 4] = number(v.v[i]) * scale;
    } else {
      y[0] = {}, y[1] = {};
      if (here) y[0] = *(const f32x4*)(from + first), y[1] = *(const f32x4*)(from + first + 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i / 4].v[i % 4] *= scale;
    }
    *(f32x4*)(to + first) = y[0];
    *(f32x4*)(to + first + 4) = y[1];
    return;
  }
  for (int i = first; i < first + 8 && i < width; ++i) to[i] = here ? number(from[i]) * scale : 0.f;
}

template <class T> __device__ __forceinline__ void look_up(const T* table, const int* ids, float* out, int first, int rows, int width, float scale) {
  int id = ids[BX] - first;
  bool here = id >= 0 && id < rows;
  row(table + (here ? (int64_t)id * width : 0), here, out + (int64_t)BX * width, width, width % 8 == 0 && wide(table) && wide(out), scale);
}

} // namespace embedding

// out [tokens, width] float32 = scale times the rows of the table [rows, width] of ids [tokens], whose first row is that of id
// `first`; ids of other tables (of other ranks) give 0. embed reads bf16, embed_f32 float32.
// launch: grid (tokens, width / 2048, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) embed(const uint16_t* table, const int* ids, float* out, int first, int rows, int width, float scale) {
  embedding::look_up(table, ids, out, first, rows, width, scale);
}

// launch: as embed. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) embed_f32(const float* table, const int* ids, float* out, int first, int rows, int width, float scale) {
  embedding::look_up(table, ids, out, first, rows, width, scale);
}
