// What the tests of all kernels share: numbers, the distance from a result in double, the report.
#pragma once
#define GPU_EMU
#include "../kernels.cu"

#include <algorithm>
#include <random>
#include <string>

inline std::mt19937 generator(1);

inline std::vector<float> normal(size_t n, float scale = 1) {
  std::normal_distribution<float> d(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = d(generator);
  return v;
}

inline std::vector<uint16_t> rounded(const std::vector<float>& v) {
  std::vector<uint16_t> to(v.size());
  for (size_t i = 0; i < v.size(); ++i) to[i] = to_bf(v[i]);
  return to;
}

inline std::vector<float> widened(const std::vector<uint16_t>& v) {
  std::vector<float> to(v.size());
  for (size_t i = 0; i < v.size(); ++i) to[i] = bf(v[i]);
  return to;
}

// |got - want| / |want|, as vectors.
template <class G>
double distance(const G& got, const std::vector<double>& want) {
  double off = 0, all = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    double d = got[i] - want[i];
    off += d * d;
    all += want[i] * want[i];
  }
  return sqrt(off / all);
}

#include "launch.h"

// Of what has no case: several kernels at once, or an argument on the stack.
template <class F>
void launch(F kernel, int gx, int gy, int gz, int threads) {
  emu::launch(kernel, gx, gy, gz, threads);
}

inline int failures = 0;

// Says how far off something is, and counts it when that is more than `bar` (or not a number).
inline void judge(const std::string& what, double off, double bar) {
  bool held = off <= bar;
  printf("%-60s tile %d  %.2e%s\n", what.c_str(), GPU_TILE, off, held ? "" : "  <-- above its bar");
  failures += !held;
}

inline int verdict() {
  if (failures) printf("%d failed\n", failures);
  return failures != 0;
}
