// Products with a weight, y = x Wt and dx = dy W, whose rows have the same bits however many there are.
//
// The reduction is cut into segments of 512 at fixed places. Each is summed from zero in steps of 32 by the matrix units,
// and the segments are added in order: so does the kernel for few rows, whose warps take segments side by side, and so
// does the one for many. The left side is float32 and rounded to bfloat16 as it is read.

constexpr int SEGMENT = 512, STEP = 32;

// Eight elements of a row, of which `left` are there; none without a row.
__device__ __forceinline__ u16x8 eight(const uint16_t* from, int left) {
  if (from && left >= 8 && ((uint64_t)from & 15) == 0) return *(const u16x8*)from;
  u16x8 to;
#pragma unroll
  for (int i = 0; i < 8; ++i) to.v[i] = from && i < left ? from[i] : (uint16_t)0;
  return to;
}
__device__ __forceinline__ u16x8 eight(const float* from, int left) {
  u16x8 to;
  if (from && left >= 8 && ((uint64_t)from & 15) == 0) {
    f32x4 a = *(const f32x4*)from, b = *(const f32x4*)(from + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) to.v[i] = to_bf(a.v[i]), to.v[4 + i] = to_bf(b.v[i]);
    return to;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) to.v[i] = from && i < left ? to_bf(from[i]) : (uint16_t)0;
  return to;
}

// The fragments of a step, which is two products. A lane reads runs of eight and gives four of each to either product:
// 16 bytes at once. Both sides do so; the order within a step is therefore another than in memory, and one for all.
// `row(r, k)` is what stands in row r of the tile from k of the step on, as eight elements.
template <class Row> __device__ __forceinline__ void left_step(Half (&to)[2], Row row) {
  int l = lane_();
  if constexpr (AN == 16) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < AN; j += 8) {
        u16x8 e = row(l & 15, 16 * h + j);
#pragma unroll
        for (int i = 0; i < 8; ++i) to[h].v[j + i] = e.v[i];
      }
  } else if constexpr (RUN == 8) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      u16x8 e = row(l & 15, 16 * (l >> 4) + 8 * h);
#pragma unroll
      for (int i = 0; i < 8; ++i) to[h].v[i] = e.v[i];
    }
  } else if constexpr (RUN == 2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      u16x8 e = row((l >> 2) + 8 * r, 8 * (l & 3));
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[h].v[(i & 1) + 2 * r + 4 * (i >> 1)] = e.v[4 * h + i];
    }
  } else {
    u16x8 e = row(l & 15, 8 * (l >> 4));
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[h].v[i] = e.v[4 * h + i];
  }
}
// The right side: its columns are `row`'s rows.
template <class Row> __device__ __forceinline__ void right_step(Half (&to)[2], Row row) {
  if constexpr (RUN == 2) {
    int l = lane_();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      u16x8 e = row((l >> 2) + 8 * c, 8 * (l & 3));
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[h].v[i + 4 * c] = e.v[4 * h + i];
    }
  } else {
    left_step(to, row);
  }
}

// y [rows, n] = x Wt + bias + residual, x [rows, k] float32 with rows x_stride apart, W [n, k] bfloat16; bias [n] and
// residual [rows, n] float32 or null, the rows of y and of residual (which may be y) y_stride apart. Bound by reading W: 16 rows read it once.
// launch: grid (n / 16 up, rows / 16 up), as many warps as there are segments, up to 8.
KERNEL LAUNCH_UP_TO(8 * WARP, 1) gemm_few(const float* x, int64_t x_stride, const uint16_t* w, const float* bias, const float* residual, float* y,
                                     int64_t y_stride, int rows, int n, int k, int warps) {
  __shared__ float parts[8][256];
  int warp = TX / WARP, l = lane_(), row0 = BY * 16, column0 = BX * 16;
  constexpr int AHEAD = AN == 16 ? 2 : 4;  // Steps that are read at once.
  constexpr int MOST = 256 / WARP;         // Elements of the tile that a thread sums, with one warp.
  float total[MOST];
#pragma unroll
  for (int i = 0; i < MOST; ++i) total[i] = 0;
  for (int group = 0; group < k; group += warps * SEGMENT) {
    int from = group + warp * SEGMENT, to = from + SEGMENT < k ? from + SEGMENT : k;
    Sum sum;
#pragma unroll
    for (int j = 0; j < CN; ++j) sum.v[j] = 0;
    for (int next = from; next < to; next += AHEAD * STEP) { // Steps behind the end add zeros.
      Half a[AHEAD][2], b[AHEAD][2];
#pragma unroll
      for (int s = 0; s < AHEAD; ++s) {
        int k0 = next + s * STEP;
        left_step(a[s], [&](int r, int i) { return eight(row0 + r < rows ? x + (row0 + r) * x_stride + k0 + i : nullptr, to - k0 - i); });
        right_step(b[s], [&](int c, int i) { return eight(column0 + c < n ? w + (int64_t)(column0 + c) * k + k0 + i : nullptr, to - k0 - i); });
      }
#pragma unroll
      for (int s = 0; s < AHEAD; ++s) mma(sum, a[s][0], b[s][0]), mma(sum, a[s][1], b[s][1]);
    }
    block_sync(); // The last group's parts were read.
#pragma unroll
    for (int j = 0; j < CN; ++j) parts[warp][c_row(l, j) * 16 + c_col(l, j)] = sum.v[j];
    block_sync();
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      int e = TX + i * warps * WARP;
      if (e < 256)
        for (int s = 0; s < warps && group + s * SEGMENT < k; ++s) total[i] += parts[s][e];
    }
  }
#pragma unroll
  for (int i = 0; i < MOST; ++i) {
    int e = TX + i * warps * WARP, row = row0 + e / 16, column = column0 + e % 16;
    if (e >= 256 || row >= rows || column >= n) continue;
    float v = total[i];
    if (bias) v += bias[column];
    if (residual) v += residual[row * y_stride + column];
    y[row * y_stride + column] = v;
  }
}

// The same for many rows, and the gradient dx = dy W: then `left` is dy [rows, n], and W's rows are the reduction.
// Tiles of 64 x 64 through shared memory, four warps of 32 x 32 each. Bound by the matrix units.
template <bool TURNED> __device__ __forceinline__ void gemm_tiles(const float* left, int64_t stride, const uint16_t* w, const float* bias,
                                                                  const float* residual, float* y, int64_t y_stride, int rows, int columns,
                                                                  int k) {
  constexpr int T = 64, PITCH = STEP + 8, THREADS = 4 * WARP;
  __shared__ __attribute__((aligned(16))) uint16_t as[T][PITCH], bs[T][PITCH];
  int warp = TX / WARP, l = lane_(), row0 = BY * T, column0 = BX * T, wr = (warp >> 1) * 32, wc = (warp & 1) * 32;
  Sum total[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < CN; ++j) total[i >> 1][i & 1].v[j] = 0;
  for (int segment = 0; segment < k; segment += SEGMENT) {
    int end = segment + SEGMENT < k ? segment + SEGMENT : k;
    Sum sum[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < CN; ++j) sum[i >> 1][i & 1].v[j] = 0;
    for (int k0 = segment; k0 < end; k0 += STEP) {
      block_sync();
#pragma unroll
      for (int i = TX; i < T * STEP / 8; i += THREADS) {
        int r = i / 4, c = i % 4 * 8;
        *(u16x8*)&as[r][c] = eight(row0 + r < rows ? left + (row0 + r) * stride + k0 + c : nullptr, end - k0 - c);
        if (!TURNED) {
          *(u16x8*)&bs[r][c] = eight(column0 + r < columns ? w + (int64_t)(column0 + r) * k + k0 + c : nullptr, end - k0 - c);
        } else {
          int from = i / 8, at = i % 8 * 8;
          u16x8 e = eight(k0 + from < end ? w + (int64_t)(k0 + from) * columns + column0 + at : nullptr, columns - column0 - at);
#pragma unroll
          for (int j = 0; j < 8; ++j) bs[at + j][from] = e.v[j];
        }
      }
      block_sync();
      Half a[2][2], b[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        left_step(a[i], [&](int r, int c) { return *(const u16x8*)&as[wr + 16 * i + r][c]; });
        right_step(b[i], [&](int r, int c) { return *(const u16x8*)&bs[wc + 16 * i + r][c]; });
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) mma(sum[i >> 1][i & 1], a[i >> 1][h], b[i & 1][h]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < CN; ++j) total[i >> 1][i & 1].v[j] += sum[i >> 1][i & 1].v[j];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < CN; ++j) {
      int row = row0 + wr + 16 * (i >> 1) + c_row(l, j), column = column0 + wc + 16 * (i & 1) + c_col(l, j);
      if (row >= rows || column >= columns) continue;
      float v = total[i >> 1][i & 1].v[j];
      if (bias) v += bias[column];
      if (residual) v += residual[row * y_stride + column];
      y[row * y_stride + column] = v;
    }
}
// As gemm_few. launch: grid (n / 64 up, rows / 64 up), 4 warps.
KERNEL LAUNCH(4 * WARP, 1) gemm_many(const float* x, int64_t x_stride, const uint16_t* w, const float* bias, const float* residual, float* y,
                                      int64_t y_stride, int rows, int n, int k) {
  gemm_tiles<false>(x, x_stride, w, bias, residual, y, y_stride, rows, n, k);
}
// dx [rows, k] = dy W + residual, dy [rows, n] float32 rounded to bfloat16, W [n, k]. launch: grid (k / 64 up, rows / 64 up), 4 warps.
KERNEL LAUNCH(4 * WARP, 1) gemm_back(const float* dy, int64_t dy_stride, const uint16_t* w, const float* residual, float* dx, int64_t dx_stride,
                                      int rows, int n, int k) {
  gemm_tiles<true>(dy, dy_stride, w, nullptr, residual, dx, dx_stride, rows, k, n);
}

// The same in float32, each element one chain over the reduction: for models in float32, not for speed.
template <bool TURNED> __device__ __forceinline__ void gemm_float(const float* left, int64_t stride, const float* w, const float* bias,
                                                                  const float* residual, float* y, int64_t y_stride, int rows, int columns,
                                                                  int k) {
  __shared__ float as[16][17], bs[16][17];
  int r = TX / 16, c = TX % 16, row = BY * 16 + r, column = BX * 16 + c;
  float sum = 0;
  for (int k0 = 0; k0 < k; k0 += 16) {
    block_sync();
    as[r][c] = row < rows && k0 + c < k ? left[row * stride + k0 + c] : 0;
    int n = TURNED ? column : BX * 16 + r, at = TURNED ? k0 + r : k0 + c;
    float e = n < columns && at < k ? (TURNED ? w[(int64_t)at * columns + n] : w[(int64_t)n * k + at]) : 0;
    if (TURNED) bs[c][r] = e;
    else bs[r][c] = e;
    block_sync();
#pragma unroll
    for (int i = 0; i < 16; ++i) sum = fma_(as[r][i], bs[c][i], sum);
  }
  if (row >= rows || column >= columns) return;
  if (bias) sum += bias[column];
  if (residual) sum += residual[row * y_stride + column];
  y[row * y_stride + column] = sum;
}
// As gemm_few, W [n, k] float32. launch: grid (n / 16 up, rows / 16 up), 256 threads.
KERNEL LAUNCH(256, 1) gemm_f32(const float* x, int64_t x_stride, const float* w, const float* bias, const float* residual, float* y,
                                int64_t y_stride, int rows, int n, int k) {
  gemm_float<false>(x, x_stride, w, bias, residual, y, y_stride, rows, n, k);
}
// As gemm_back, W float32. launch: grid (k / 16 up, rows / 16 up), 256 threads.
KERNEL LAUNCH(256, 1) gemm_back_f32(const float* dy, int64_t dy_stride, const float* w, const float* residual, float* dx, int64_t dx_stride, int rows,
                                     int n, int k) {
  gemm_float<true>(dy, dy_stride, w, nullptr, residual, dx, dx_stride, rows, k, n);
}
