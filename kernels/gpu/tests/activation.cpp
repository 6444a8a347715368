// Activations against double: all functions on both sides of zero and of the clamp, dense and apart, wide and odd rows.
#include "test.h"

struct Exact { double y, slope; };

static Exact sigmoid_act(double x, double alpha) {
  double s = 1 / (1 + exp(-alpha * x));
  return {x * s, s + alpha * x * s * (1 - s)};
}

static Exact exact(int kind, double x, double alpha) {
  switch (kind) {
    case 0: return sigmoid_act(x, 1);
    case 1: {
      double c = sqrt(2 / M_PI), t = tanh(c * (x + 0.044715 * x * x * x));
      return {0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)};
    }
    case 2: {
      double cdf = 0.5 * (1 + erf(x / sqrt(2)));
      return {x * cdf, cdf + x * exp(-0.5 * x * x) / sqrt(2 * M_PI)};
    }
    case 3: return sigmoid_act(x, 1.702);
    case 4: return {x > 0 ? x : 0, x > 0 ? 1. : 0.};
    case 5: return {x > 0 ? x * x : 0, x > 0 ? 2 * x : 0};
    case 6: {
      double s = 1 / (1 + exp(-x));
      return {s, s * (1 - s)};
    }
    default: return sigmoid_act(x, alpha);
  }
}

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  const float alpha = 1.3f, limit = 3, cap = 30;
  struct Shape { int rows, width, gap, shift; };
  for (Shape s : {Shape{1, 1, 0, 0}, {3, 100, 4, 4}, {2, 2051, 0, 1}, {2, 4096, 8, 0}, {2, 64, 3, 0}}) {
    int stride = 2 * s.width + s.gap, columns = (s.width + 2047) / 2048;
    size_t n = (size_t)s.rows * s.width;
    auto x = normal(s.shift + s.rows * stride, 4), dy = normal(s.shift + s.rows * stride);
    auto at = [&](int r, int i) { return s.shift + r * stride + i; };
    std::string shape = ", " + std::to_string(s.rows) + " x " + std::to_string(s.width);
    for (int kind = 0; kind < 8; ++kind) {
      std::string name = "kind " + std::to_string(kind) + shape;
      std::vector<double> y(n), dg(2 * n), plain(n), slope(n);
      for (int r = 0; r < s.rows; ++r)
        for (int i = 0; i < s.width; ++i) {
          double g = x[at(r, i)], u = x[at(r, s.width + i)], d = dy[at(r, i)];
          bool clamp = kind == 7;
          Exact e = exact(kind, clamp && g > limit ? limit : g, alpha);
          double value = clamp ? (u > limit ? limit : u < -limit ? -limit : u) + 1 : u;
          size_t to = (size_t)r * s.width + i, to2 = (size_t)r * 2 * s.width + i;
          y[to] = e.y * value;
          dg[to2] = clamp && g > limit ? 0 : d * value * e.slope;
          dg[to2 + s.width] = clamp && fabs(u) > limit ? 0 : d * e.y;
          plain[to] = e.y, slope[to] = d * e.slope;
        }
      std::vector<float> out(n, NAN), dx(2 * n, NAN);
      std::vector<uint16_t> rounded(n, 0x7fc0);
      if (kind != 6) {
        launch_kernel(gated, s.rows, columns, 1, 256, x.data() + s.shift, stride, out.data(), nullptr, s.width, kind, alpha, limit);
        launch_kernel(gated, s.rows, columns, 1, 256, x.data() + s.shift, stride, nullptr, rounded.data(), s.width, kind, alpha, limit);
        launch_kernel(gated_backward, s.rows, columns, 1, 256, x.data() + s.shift, stride, dy.data() + s.shift, stride, dx.data(), s.width, kind, alpha, limit);
        judge("gated, " + name, distance(out, y), 1e-6);
        judge("gated in bf16, " + name, rounded == ::rounded(out) ? 0 : 1, 0);
        judge("gated backward, " + name, distance(dx, dg), 1e-6);
      }
      if (kind == 7) continue;
      std::fill(out.begin(), out.end(), NAN);
      std::vector<float> back(n, NAN);
      launch_kernel(activate, s.rows, columns, 1, 256, x.data() + s.shift, stride, out.data(), nullptr, s.width, kind);
      launch_kernel(activate, s.rows, columns, 1, 256, x.data() + s.shift, stride, nullptr, rounded.data(), s.width, kind);
      launch_kernel(activate_backward, s.rows, columns, 1, 256, x.data() + s.shift, stride, dy.data() + s.shift, stride, back.data(), s.width, kind);
      judge("plain, " + name, distance(out, plain), 1e-6);
      judge("plain in bf16, " + name, rounded == ::rounded(out) ? 0 : 1, 0);
      judge("plain backward, " + name, distance(back, slope), 1e-6);
    }
    auto capped = x;
    for (float& v : capped) v *= 10;
    auto before = capped;
    launch_kernel(soft_cap, s.rows, columns, 1, 256, capped.data() + s.shift, stride, s.width, cap);
    std::vector<double> want(before.begin(), before.end()), dwant(n);
    for (int r = 0; r < s.rows; ++r)
      for (int i = 0; i < s.width; ++i) {
        want[at(r, i)] = cap * tanh(before[at(r, i)] / cap);
        double t = capped[at(r, i)] / cap;
        dwant[(size_t)r * s.width + i] = (1 - t * t) * dy[at(r, i)];
      }
    judge("soft cap, what stands between rows kept" + shape, distance(capped, want), 1e-6);
    std::vector<float> dx(n, NAN);
    launch_kernel(soft_cap_backward, s.rows, columns, 1, 256, capped.data() + s.shift, stride, dy.data() + s.shift, stride, dx.data(), s.width, cap);
    judge("soft cap backward" + shape, distance(dx, dwant), 1e-6);
  }
  return verdict();
}
