// Norms against double: rows that stand apart and begin anywhere, several runs a row, every way out, and the gradients.
//
// norm FOLDER: also writes case files (../cases/README.md); norm FILE: that of rms_norm.
#include "test.h"

struct Shape {
  int rows, groups, width, gap, shift; // Columns between rows, and before the first.
};

static void all(Shape s, bool layer) {
  const float eps = 1e-3f;
  int runs = s.rows * s.groups, stride = s.groups * s.width + s.gap;
  size_t n = (size_t)runs * s.width;
  bool is_short = s.width <= 256;
  int grid = is_short ? (runs + 7) / 8 : runs;
  auto x = normal(s.shift + s.rows * stride, 2), add = normal(n), weight = normal(s.width), bias = normal(s.width), dy = normal(s.shift + s.rows * stride);
  for (float& v : x) v += 1;
  std::string kind = layer ? "layer_norm" : "rms_norm", end = is_short ? "_short" : "", kernel = kind + end, back = kind + "_";
  std::string name = std::string(layer ? "layer" : "rms") + " norm, " + std::to_string(s.rows) + " x " + std::to_string(s.groups) + " x " + std::to_string(s.width);
  auto place = [&](int run) { return s.shift + run / s.groups * stride + run % s.groups * s.width; };

  for (int options = 0; options < 8; ++options) { // Of add, bias, which results.
    bool with_add = options & 1, with_bias = layer && options & 2, with_float = !(options & 4), with_bf = options & 4 || options == 3;
    if (!layer && options & 2 && options != 3) continue;
    auto from = x;
    std::vector<float> out(n, NAN);
    std::vector<uint16_t> rounded(n, 0x7fc0);
    std::vector<double> want(n), sums(n);
    for (int r = 0; r < runs; ++r) {
      double mean = 0, square = 0;
      double* v = &sums[(size_t)r * s.width];
      for (int i = 0; i < s.width; ++i) mean += v[i] = (double)x[place(r) + i] + (with_add ? add[(size_t)r * s.width + i] : 0);
      mean = layer ? mean / s.width : 0;
      for (int i = 0; i < s.width; ++i) square += (v[i] - mean) * (v[i] - mean);
      for (int i = 0; i < s.width; ++i)
        want[(size_t)r * s.width + i] = (v[i] - mean) / sqrt(square / s.width + eps) * weight[i] + (with_bias ? bias[i] : 0);
    }
    const float *a = with_add ? add.data() : nullptr, *b = with_bias ? bias.data() : nullptr;
    float* to = with_float ? out.data() : nullptr;
    uint16_t* to_bf16 = with_bf ? rounded.data() : nullptr;
    const float* x = from.data() + s.shift;
    if (layer) launch_as(layer_norm, kernel, grid, 1, 1, 256, x, stride, a, weight.data(), b, to, to_bf16, runs, s.groups, s.width, eps);
    else launch_as(rms_norm, kernel, grid, 1, 1, 256, x, stride, a, weight.data(), to, to_bf16, runs, s.groups, s.width, eps);
    auto what = name + (with_add ? " + add" : "") + (with_bias ? " + bias" : "");
    if (with_float) judge(what, distance(out, want), layer ? 1e-6 : 5e-7);
    if (with_bf) judge(what + " in bf16", distance(widened(rounded), want), 3e-3);
    if (with_float && with_bf) judge(what + ", bf16 of the same", rounded == ::rounded(out) ? 0 : 1, 0);
    std::vector<float> left(n);
    for (int r = 0; r < runs; ++r)
      for (int i = 0; i < s.width; ++i) left[(size_t)r * s.width + i] = from[place(r) + i];
    judge(what + ", x afterwards", distance(left, sums), 1e-7);
  }

  std::vector<double> want(n), dweight(s.width), dbias(s.width);
  for (int r = 0; r < runs; ++r) {
    const float *v = &x[place(r)], *d = &dy[place(r)];
    double mean = 0, square = 0, d_mean = 0, dot = 0;
    for (int i = 0; i < s.width; ++i) mean += v[i];
    mean = layer ? mean / s.width : 0;
    for (int i = 0; i < s.width; ++i) square += (v[i] - mean) * (v[i] - mean);
    double inverse = 1 / sqrt(square / s.width + eps);
    for (int i = 0; i < s.width; ++i) {
      d_mean += layer ? (double)d[i] * weight[i] / s.width : 0;
      dot += (double)d[i] * weight[i] * (v[i] - mean) * inverse / s.width;
      dweight[i] += d[i] * (v[i] - mean) * inverse;
      dbias[i] += d[i];
    }
    for (int i = 0; i < s.width; ++i)
      want[(size_t)r * s.width + i] = ((double)d[i] * weight[i] - d_mean - (v[i] - mean) * inverse * dot) * inverse;
  }
  for (int onto : {0, 1}) {
    auto around = normal(n);
    auto dx = onto ? around : std::vector<float>(n, NAN);
    launch_as(rms_norm_backward, back + "backward" + end, grid, 1, 1, 256, x.data() + s.shift, stride, dy.data() + s.shift, stride, weight.data(), dx.data(), onto,
              runs, s.groups, s.width, eps);
    auto sum = want;
    for (size_t i = 0; onto && i < n; ++i) sum[i] += around[i];
    judge(name + (onto ? ", dx onto a gradient" : ", dx"), distance(dx, sum), 2e-6);
  }
  int each = 3, pieces = (runs + each - 1) / each, blocks = is_short ? (pieces + 7) / 8 : pieces, columns = (layer ? 2 : 1) * s.width;
  pieces = is_short ? blocks * 8 : pieces;
  std::vector<float> partial((size_t)pieces * columns, NAN), sums(columns, NAN);
  launch_as(rms_norm_params, back + "params" + end, blocks, 1, 1, 256, x.data() + s.shift, stride, dy.data() + s.shift, stride, partial.data(), each, runs,
            s.groups, s.width, eps);
  launch_kernel(column_sums, (columns + 31) / 32, 1, 1, 256, partial.data(), sums.data(), pieces, columns);
  judge(name + ", dweight", distance(std::vector<float>(sums.begin(), sums.begin() + s.width), dweight), 2e-6);
  if (layer) judge(name + ", dbias", distance(std::vector<float>(sums.begin() + s.width, sums.end()), dbias), 2e-6);
}

int main(int arguments, char** argument) {
  take_arguments(arguments, argument, "rms_norm");
  for (bool layer : {false, true})
    for (Shape s : {Shape{1, 1, 5, 0, 0}, {7, 3, 64, 8, 4}, {2, 5, 80, 3, 1}, {33, 1, 256, 0, 0}, {3, 1, 577, 0, 0}, {5, 2, 2048, 4, 0}, {2, 1, 8960, 0, 0}, {2, 1, 2500, 4, 1}})
      all(s, layer);
  return verdict();
}
