#include "test.h"

// The mask of kernels/src/dropout.rs in plain C: which elements of a row are kept.
static bool keeps(uint64_t seed, uint64_t step, uint64_t stream, uint64_t row, uint32_t column, uint32_t threshold) {
  uint64_t state = 0;
  for (uint64_t word : {seed, step, stream, row}) {
    state = (state ^ word) + 0x9e3779b97f4a7c15ull;
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ull;
    state = (state ^ (state >> 27)) * 0x94d049bb133111ebull;
    state ^= state >> 31;
  }
  uint32_t low = (uint32_t)state, high = (uint32_t)(state >> 32);
  uint32_t x = column * 0x9e3779b9u ^ low;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + high) * 0x846ca68bu;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  return (x ^ (x >> 15)) >= threshold;
}

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  for (double p : {0.0, 0.05, 0.6})
    for (int width : {1, 37, 64, 1500}) {
      const int rows = 5;
      // Beyond 32 bits and, as signed numbers, below zero.
      const uint64_t seed = 0xfedcba9876543210ull, step = 1ull << 33, stream = 5, row0 = (1ull << 40) + 3;
      const uint32_t column0 = 0xfffffff0u, threshold = (uint32_t)(p * 4294967296.0);
      const float scale = (float)(1 / (1 - p));
      auto x = normal(rows * width);
      std::vector<float> y(rows * width, NAN);
      launch_kernel(dropout, rows, 1, 1, 256, x.data(), y.data(), width, seed, step, stream, row0, column0, threshold, scale);
      int wrong = 0;
      for (int i = 0; i < rows * width; ++i) {
        float want = keeps(seed, step, stream, row0 + i / width, column0 + i % width, threshold) ? x[i] * scale : 0.f;
        wrong += !(y[i] == want);
      }
      judge("dropout " + std::to_string(p) + " of " + std::to_string(width) + ", elements that differ", wrong, 0);
    }
  return verdict();
}
