#include "test.h"

// One shape: x [rows, k] inside of wider rows, all forms against double; few and many rows have the same bits, and a row
// alone those it has among others.
void judge_shape(int rows, int n, int k) {
  const int stride = k + 8, warps = std::min(8, (k + SEGMENT - 1) / SEGMENT);
  auto x = normal((size_t)rows * stride), w32 = normal((size_t)n * k), bias = normal(n), residual = normal((size_t)rows * n);
  auto w = rounded(w32);
  std::vector<double> want((size_t)rows * n), want32(want.size());
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < n; ++c) {
      double sum = 0, sum32 = 0;
      for (int i = 0; i < k; ++i) {
        sum += (double)bf(to_bf(x[r * stride + i])) * bf(w[c * k + i]);
        sum32 += (double)x[r * stride + i] * w32[c * k + i];
      }
      want[r * n + c] = sum + bias[c] + residual[r * n + c];
      want32[r * n + c] = sum32 + bias[c] + residual[r * n + c];
    }
  std::string shape = std::to_string(rows) + " x " + std::to_string(n) + " x " + std::to_string(k);
  std::vector<float> few(want.size(), NAN), many(few), alone(few), plain(few);
  launch_kernel(gemm_few, (n + 15) / 16, (rows + 15) / 16, 1, warps * WARP, x.data(), stride, w.data(), bias.data(), residual.data(), few.data(), n, rows, n, k, warps);
  launch_kernel(gemm_many, (n + 63) / 64, (rows + 63) / 64, 1, 4 * WARP, x.data(), stride, w.data(), bias.data(), residual.data(), many.data(), n, rows, n, k);
  launch_kernel(gemm_f32, (n + 15) / 16, (rows + 15) / 16, 1, 256, x.data(), stride, w32.data(), bias.data(), residual.data(), plain.data(), n, rows, n, k);
  judge("gemm_few " + shape, distance(few, want), 1e-6);
  judge("gemm_many " + shape, distance(many, want), 1e-6);
  judge("gemm_f32 " + shape, distance(plain, want32), 2e-6);  // One chain.
  judge("bits of few and many " + shape, memcmp(few.data(), many.data(), 4 * few.size()) != 0, 0);
  for (int r = 0; r < rows; ++r)
    launch_kernel(gemm_few, (n + 15) / 16, 1, 1, 2 * WARP, x.data() + r * stride, stride, w.data(), bias.data(), residual.data() + r * n, alone.data() + r * n, n, 1, n, k, 2);
  judge("bits of rows alone " + shape, memcmp(few.data(), alone.data(), 4 * few.size()) != 0, 0);

  auto dy = normal((size_t)rows * n), around = normal((size_t)rows * k);
  std::vector<double> wanted((size_t)rows * k), wanted32(wanted.size());
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < k; ++i) {
      double sum = 0, sum32 = 0;
      for (int c = 0; c < n; ++c) {
        sum += (double)bf(to_bf(dy[r * n + c])) * bf(w[c * k + i]);
        sum32 += (double)dy[r * n + c] * w32[c * k + i];
      }
      wanted[r * k + i] = sum + around[r * k + i];
      wanted32[r * k + i] = sum32 + around[r * k + i];
    }
  std::vector<float> dx(wanted.size(), NAN), dx32(dx);
  launch_kernel(gemm_back, (k + 63) / 64, (rows + 63) / 64, 1, 4 * WARP, dy.data(), n, w.data(), around.data(), dx.data(), k, rows, n, k);
  launch_kernel(gemm_back_f32, (k + 15) / 16, (rows + 15) / 16, 1, 256, dy.data(), n, w32.data(), around.data(), dx32.data(), k, rows, n, k);
  judge("gemm_back " + shape, distance(dx, wanted), 1e-6);
  judge("gemm_back_f32 " + shape, distance(dx32, wanted32), 1e-6);
}

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  judge_shape(1, 48, 64);
  judge_shape(3, 33, 1100);  // More than two segments, the last in part; odd columns.
  judge_shape(70, 72, 96);   // More than a tile of rows and columns.
  judge_shape(2, 16, 4700);  // More than eight segments.
  judge_shape(5, 7, 13);     // Nothing fits.
  return verdict();
}
