// LoRA of many adapters in two launches (the grouping of S-LoRA and Punica): shrink s = x At, expand y += (scale s) Bt, for
// every adapter and every part of a fused linear at once. Few rows: bound by reading A and B once, and by latency; many rows
// of one adapter: by reading x and y.
//
// Rows are sorted by adapter and cut into tiles [n, 3] of int: first row, rows (at most 16), slot; a slot below 0 has no
// adapter. `modules` has a record of 16 + 32 `most` bytes a slot: a LoraModule and `most` LoraParts, of which it says how many
// there are. What is multiplied is rounded to the adapter's precision: bf16, or float32 in kernels named _f32.

struct LoraModule {
  uint64_t a; // The address of [ranks, k], or 0: this linear is as it is.
  int ranks, parts;
};

// y[:, column .. column + columns] += scale s[:, rank .. rank + ranks] Bt, of b, the address of [columns, ranks]. Columns of parts are disjoint.
struct LoraPart {
  uint64_t b;
  int column, columns, rank, ranks;
  float scale;
  int unused;
};

namespace lora {

constexpr int TILE = 16, RANKS = 32, COLUMNS = 256, WARPS = 256 / WARP;

__device__ __forceinline__ const LoraModule* module_of(const void* modules, int most, int slot) {
  return (const LoraModule*)((const char*)modules + (int64_t)slot * (16 + 32 * most));
}

// ---- Fragments of 32 columns of k, as two products of 16. Which columns the hardware calls k = 0, 1, ... does not matter as
// long as left and right agree: so a lane takes columns that lie side by side, 16 bytes of bf16 at a time.
constexpr int P = RUN < 4 ? 4 : RUN;   // Of a row of one product, how many a lane holds.
constexpr int SHARES = AN / P;         // Rows that a lane holds numbers of.
__device__ __forceinline__ int group(int l) { return RUN == 16 ? 0 : RUN == 2 ? l & 3 : l >> 4; }
__device__ __forceinline__ int left_at(int r, int c) { return SHARES == 1 ? c : (c & 1) + 2 * r + 4 * (c >> 1); }
__device__ __forceinline__ int right_at(int r, int c) { return P * r + c; }

// Eight numbers of a row of k, rounded, 0 beyond its end. WIDE: k is a multiple of 8 and the row begins at 16 bytes.
template <bool WIDE> __device__ __forceinline__ void eight(uint16_t* to, const float* row, int at, int k) {
  if constexpr (WIDE) {
    f32x4 a = {}, b = {};
    if (at < k) a = *(const f32x4*)(row + at), b = *(const f32x4*)(row + at + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = to_bf(a.v[i]), to[4 + i] = to_bf(b.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = at + i < k ? to_bf(row[at + i]) : (uint16_t)0;
  }
}
template <bool WIDE> __device__ __forceinline__ void eight(uint16_t* to, const uint16_t* row, int at, int k) {
  if constexpr (WIDE) {
    u16x8 a = {};
    if (at < k) a = *(const u16x8*)(row + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = a.v[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = at + i < k ? row[at + i] : (uint16_t)0;
  }
}

// Columns at .. at + 32 of `rows` rows, `stride` apart; beyond them the last one again, of which nothing is stored.
template <bool WIDE, bool LEFT, class T>
__device__ __forceinline__ void fragment(Half (&to)[2], const T* from, int64_t stride, int rows, int at, int k) {
  int l = lane_();
#pragma unroll
  for (int r = 0; r < SHARES; ++r) {
    int row = LEFT ? a_row(l, left_at(r, 0)) : b_col(l, right_at(r, 0));
    uint16_t v[2 * P];
    row = row < rows ? row : rows - 1;
#pragma unroll
    for (int i = 0; i < 2 * P; i += 8) eight<WIDE>(v + i, from + row * stride, at + group(l) * 2 * P + i, k);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int c = 0; c < P; ++c) to[h].v[LEFT ? left_at(r, c) : right_at(r, c)] = v[h * P + c];
  }
}

template <bool WIDE>
__device__ __forceinline__ void shrink(const float* x, int stride, int n, const uint16_t* a, int ranks, float* to, int width, int k, int from, int end,
                                       float (*sums)[TILE][TILE + 1]) {
  int warp = TX / WARP, l = lane_();
  Sum s[RANKS / 16];
#pragma unroll
  for (int t = 0; t < RANKS / 16; ++t)
#pragma unroll
    for (int j = 0; j < CN; ++j) s[t].v[j] = 0;
  for (int at = from + warp * 32; at < end; at += WARPS * 32) {
    Half left[2], right[RANKS / 16][2];
    fragment<WIDE, true>(left, x, stride, n, at, k);
#pragma unroll
    for (int t = 0; t < RANKS / 16; ++t)
      if (16 * t < ranks) fragment<WIDE, false>(right[t], a + (int64_t)16 * t * k, k, ranks - 16 * t, at, k);
#pragma unroll
    for (int t = 0; t < RANKS / 16; ++t)
      if (16 * t < ranks) {
        mma(s[t], left[0], right[t][0]);
        mma(s[t], left[1], right[t][1]);
      }
  }
#pragma unroll
  for (int t = 0; t < RANKS / 16; ++t) {
    if (16 * t >= ranks) break;
    block_sync();
#pragma unroll
    for (int j = 0; j < CN; ++j) sums[warp][c_row(l, j)][c_col(l, j)] = s[t].v[j];
    block_sync();
    int row = TX / 16, rank = TX % 16;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += sums[w][row][rank];
    if (row < n && 16 * t + rank < ranks) to[(int64_t)row * width + 16 * t + rank] = sum;
  }
}

// The shrunk rows of a part's ranks from .. from + ranks, summed over the splits in their order, scaled, for put(row, rank,
// number): all TILE rows, and ranks up to a multiple of 32, of which those that are none are 0.
template <class Put>
__device__ __forceinline__ void scaled(const float* partial, const int* tile, int rows, int width, int splits, int from, int ranks, float scale,
                                       float* shrunk, Put put) {
  for (int row = TX / 32; row < TILE; row += 8)
    for (int r = TX % 32; r < (ranks + 31) / 32 * 32; r += 32) {
      float sum = 0;
      if (row < tile[1] && r < ranks) {
        int64_t at = (int64_t)(tile[0] + row) * width + from + r;
        for (int i = 0; i < splits; ++i) sum += partial[(int64_t)i * rows * width + at];
        if (shrunk) shrunk[at] = sum;
      }
      put(row, r, scale * sum);
    }
}

constexpr int CHUNK = 256;                     // Ranks at a time.
constexpr int MINE = COLUMNS / 16 / WARPS;     // Tiles of 16 columns of a warp.

// `columns` columns of a part, its rows of b from the first of them on, onto y from the first of them on.
template <bool WIDE>
__device__ __forceinline__ void expand(const float* partial, const int* tile, int rows, int width, int splits, const LoraPart& part,
                                       const uint16_t* b, int columns, float* y, int y_stride, float* shrunk, uint16_t (*s)[CHUNK + 8]) {
  int warp = TX / WARP, l = lane_(), n = tile[1];
  Sum sums[MINE]; // y itself, so that its loads are under way with the others.
#pragma unroll
  for (int t = 0; t < MINE; ++t)
#pragma unroll
    for (int j = 0; j < CN; ++j) {
      int row = c_row(l, j), column = (warp + t * WARPS) * 16 + c_col(l, j);
      sums[t].v[j] = y[(int64_t)(row < n ? row : n - 1) * y_stride + (column < columns ? column : columns - 1)];
    }
  for (int chunk = 0; chunk < part.ranks; chunk += CHUNK) {
    int ranks = part.ranks - chunk < CHUNK ? part.ranks - chunk : CHUNK;
    Half right[MINE][2];
    auto get = [&](int at) {
#pragma unroll
      for (int t = 0; t < MINE; ++t) {
        int column = (warp + t * WARPS) * 16;
        if (column < columns)
          fragment<WIDE, false>(right[t], b + (int64_t)column * part.ranks + chunk, part.ranks, columns - column, at, ranks);
      }
    };
    get(0);
    block_sync();
    scaled(partial, tile, rows, width, splits, part.rank + chunk, ranks, part.scale, shrunk, [&](int row, int r, float v) { s[row][r] = to_bf(v); });
    block_sync();
    for (int at = 0; at < ranks; at += 32) {
      if (at) get(at);
      Half left[2];
      fragment<true, true>(left, &s[0][0], CHUNK + 8, TILE, at, CHUNK);
#pragma unroll
      for (int t = 0; t < MINE; ++t)
        if ((warp + t * WARPS) * 16 < columns) {
          mma(sums[t], left[0], right[t][0]);
          mma(sums[t], left[1], right[t][1]);
        }
    }
  }
#pragma unroll
  for (int t = 0; t < MINE; ++t)
#pragma unroll
    for (int j = 0; j < CN; ++j) {
      int row = c_row(l, j), column = (warp + t * WARPS) * 16 + c_col(l, j);
      if (row < n && column < columns) y[(int64_t)row * y_stride + column] = sums[t].v[j];
    }
}

// f(part, first of its columns in this block, how many) for each part with columns in block BY.
template <class F> __device__ __forceinline__ void parts_here(const LoraModule* module, F f) {
  const LoraPart* parts = (const LoraPart*)(module + 1);
  for (int p = 0; p < module->parts; ++p) {
    LoraPart part = parts[p];
    int from = part.column > BY * COLUMNS ? part.column : BY * COLUMNS, end = part.column + part.columns;
    end = end < (BY + 1) * COLUMNS ? end : (BY + 1) * COLUMNS;
    if (from < end) f(part, from, end - from);
  }
}

} // namespace lora

// partial [splits, rows, width] = the share of columns BZ k_each .. of k in x At, of x [rows, k], rows `stride` apart, for the rows
// of all tiles; width is that of the module with the most ranks, what lies beyond a module's own is left alone. k_each is a
// multiple of 32 and depends on k alone, so that a row's bits do too.
// launch: grid (tiles, width / 32, rounded up, k / k_each, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) lora_shrink(const float* x, int stride, const void* modules, int most, const int* tiles, float* partial, int rows, int width,
                                  int k, int k_each) {
  const int* tile = tiles + 3 * BX;
  const LoraModule* module = lora::module_of(modules, most, tile[2]);
  int first = BY * lora::RANKS;
  if (tile[2] < 0 || !module->a || first >= module->ranks) return;
  const float* from = x + (int64_t)tile[0] * stride;
  const uint16_t* a = global_memory<uint16_t>(module->a) + (int64_t)first * k;
  float* to = partial + ((int64_t)BZ * rows + tile[0]) * width + first;
  int end = (BZ + 1) * k_each < k ? (BZ + 1) * k_each : k;
  __shared__ float sums[lora::WARPS][lora::TILE][lora::TILE + 1];
  if (k % 8 == 0 && stride % 4 == 0 && wide(x) && module->a % 16 == 0) lora::shrink<true>(from, stride, tile[1], a, module->ranks - first, to, width, k, BZ * k_each, end, sums);
  else lora::shrink<false>(from, stride, tile[1], a, module->ranks - first, to, width, k, BZ * k_each, end, sums);
}

// y [rows, columns], rows y_stride apart, += the expansion of what lora_shrink left in partial. The shrunk rows, before scaling,
// go into shrunk [rows, width] where it is not null.
// launch: grid (tiles, columns / 256, rounded up), 256 threads. AMD loads 16 bytes a lane; NVIDIA 4, as its fragments lie.
KERNEL LAUNCH(256, 2) lora_expand(const float* partial, const void* modules, int most, const int* tiles, float* y, int y_stride, float* shrunk,
                                  int rows, int width, int splits) {
  __shared__ __attribute__((aligned(16))) uint16_t s[lora::TILE][lora::CHUNK + 8];
  const int* tile = tiles + 3 * BX;
  const LoraModule* module = lora::module_of(modules, most, tile[2]);
  if (tile[2] < 0 || !module->a) return;
  lora::parts_here(module, [&](const LoraPart& part, int from, int columns) {
    const uint16_t* b = global_memory<uint16_t>(part.b) + (int64_t)(from - part.column) * part.ranks;
    float* to = y + (int64_t)tile[0] * y_stride + from;
    float* keep = from == part.column ? shrunk : nullptr;
    if (part.ranks % 8 == 0 && part.b % 16 == 0) lora::expand<true>(partial, tile, rows, width, splits, part, b, columns, to, y_stride, keep, s);
    else lora::expand<false>(partial, tile, rows, width, splits, part, b, columns, to, y_stride, keep, s);
  });
}

// lora_shrink of float32 adapters: a warp takes a rank, its lanes share k.
// launch: as lora_shrink.
KERNEL LAUNCH(256, 2) lora_shrink_f32(const float* x, int stride, const void* modules, int most, const int* tiles, float* partial, int rows, int width,
                                      int k, int k_each) {
  const int* tile = tiles + 3 * BX;
  const LoraModule* module = lora::module_of(modules, most, tile[2]);
  if (tile[2] < 0 || !module->a) return;
  int end = (BZ + 1) * k_each < k ? (BZ + 1) * k_each : k, n = tile[1];
  const float* from = x + (int64_t)tile[0] * stride;
  for (int rank = BY * lora::RANKS + TX / WARP; rank < (BY + 1) * lora::RANKS && rank < module->ranks; rank += lora::WARPS) {
    const float* a = global_memory<float>(module->a) + (int64_t)rank * k;
    for (int first = 0; first < n; first += 4) { // Rows; beyond the last it is the last again.
      const float* row[4];
      float sums[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) row[i] = from + (int64_t)(first + i < n ? first + i : n - 1) * stride;
      for (int i = BZ * k_each + lane_(); i < end; i += WARP) {
        float v = a[i];
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[r] += v * row[r][i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float sum = warp_sum(sums[i]);
        if (first + i < n && lane_() == 0) partial[((int64_t)BZ * rows + tile[0] + first + i) * width + rank] = sum;
      }
    }
  }
}

// lora_expand of float32 adapters: a thread takes a column.
// launch: as lora_expand.
KERNEL LAUNCH(256, 2) lora_expand_f32(const float* partial, const void* modules, int most, const int* tiles, float* y, int y_stride, float* shrunk,
                                      int rows, int width, int splits) {
  __shared__ float s[lora::TILE][lora::CHUNK];
  const int* tile = tiles + 3 * BX;
  const LoraModule* module = lora::module_of(modules, most, tile[2]);
  if (tile[2] < 0 || !module->a) return;
  lora::parts_here(module, [&](const LoraPart& part, int from, int columns) {
    const float* b = global_memory<float>(part.b) + (int64_t)(from - part.column + TX) * part.ranks;
    float* to = y + (int64_t)tile[0] * y_stride + from + TX;
    float sums[lora::TILE];
#pragma unroll
    for (int row = 0; row < lora::TILE; ++row) sums[row] = row < tile[1] && TX < columns ? to[(int64_t)row * y_stride] : 0.f;
    for (int chunk = 0; chunk < part.ranks; chunk += lora::CHUNK) {
      int ranks = part.ranks - chunk < lora::CHUNK ? part.ranks - chunk : lora::CHUNK;
      block_sync();
      lora::scaled(partial, tile, rows, width, splits, part.rank + chunk, ranks, part.scale, from == part.column ? shrunk : nullptr,
                   [&](int row, int r, float v) { s[row][r] = v; });
      block_sync();
      if (TX < columns)
        for (int r = 0; r < ranks; ++r) {
          float v = b[chunk + r];
#pragma unroll
          for (int row = 0; row < lora::TILE; ++row) sums[row] += s[row][r] * v;
        }
    }
#pragma unroll
    for (int row = 0; row < lora::TILE; ++row)
      if (row < tile[1] && TX < columns) to[(int64_t)row * y_stride] = sums[row];
  });
}
