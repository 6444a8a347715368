// Activations of an MLP, gated and plain, the sigmoid and the soft cap, forward and backward. Bound by memory: every number
// is read and written once, 16 bytes at a time where rows allow; the grid is rows by columns.

namespace activation {

enum Kind { SILU, GELU_TANH, GELU, QUICK_GELU, RELU, SQUARED_RELU, SIGMOID, CLAMPED };

struct Value { float y, slope; };

__device__ __forceinline__ float exp_(float x) { return exp2_(1.44269504f * x); }
// Not max_ and min_, which give the other number for a NaN.
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float at_least(float x, float limit) { return x < limit ? limit : x; }

// x sigmoid(alpha x)
__device__ __forceinline__ Value sigmoid_act(float x, float alpha) {
  float s = rcp_(1.f + exp_(-alpha * x)), y = x * s;
  return {y, s + alpha * y * (1.f - s)};
}

// The polynomials of kernels/src/activation.rs.
__device__ __forceinline__ float erf_(float x) {
  float t = x < 0 ? -x : x, s = x * x;
  t = t > 4.f ? 4.f : t;
  float r = -1.7285347e-5f * t + 3.831972e-4f, u = -3.8839644e-3f * t + 2.4254622e-2f;
  r = r * (t * t) + u;
  r = r * t - 1.0677788e-1f;
  r = r * t - 6.348467e-1f;
  r = r * t - 1.287175e-1f;
  float far = 1.f - exp_(r * t - t);
  far = x < 0 ? -far : far;
  r = -5.967617e-4f * s + 4.991194e-3f;
  r = r * s - 2.6768135e-2f;
  r = r * s + 1.1281993e-1f;
  r = r * s - 3.7612534e-1f;
  r = r * s + 1.2837917e-1f;
  return t > 475.f / 512.f ? far : r * x + x;
}

// What does not use the slope does not compute it.
template <int K> __device__ __forceinline__ Value act(float x, float alpha) {
  if constexpr (K == SILU) return sigmoid_act(x, 1.f);
  if constexpr (K == QUICK_GELU) return sigmoid_act(x, 1.702f);
  if constexpr (K == CLAMPED) return sigmoid_act(x, alpha);
  if constexpr (K == RELU) return {at_least(x, 0.f), x > 0 ? 1.f : 0.f};
  if constexpr (K == SQUARED_RELU) {
    float y = at_least(x, 0.f);
    return {y * y, 2.f * y};
  }
  if constexpr (K == SIGMOID) {
    float s = rcp_(1.f + exp_(-x));
    return {s, s * (1.f - s)};
  }
  if constexpr (K == GELU_TANH) { // 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
    const float twice = 1.5957691216f, cubic = 0.0713548162726f;
    float square = x * x, s = rcp_(1.f + exp_(-x * (cubic * square + twice))), y = x * s;
    return {y, s + y * (1.f - s) * (3.f * cubic * square + twice)};
  }
  if constexpr (K == GELU) {
    float cdf = 0.5f * erf_(x * 0.70710678f) + 0.5f;
    return {x * cdf, cdf + x * 0.39894228f * exp_(-0.5f * x * x)};
  }
}

// body(integral constant of the kind): one straight loop for each.
template <int K> struct Of { static constexpr int kind = K; };
template <class F> __device__ __forceinline__ void of_kind(int kind, F body) {
  switch (kind) {
    case SILU: return body(Of<SILU>());
    case GELU_TANH: return body(Of<GELU_TANH>());
    case GELU: return body(Of<GELU>());
    case QUICK_GELU: return body(Of<QUICK_GELU>());
    case RELU: return body(Of<RELU>());
    case SQUARED_RELU: return body(Of<SQUARED_RELU>());
    case SIGMOID: return body(Of<SIGMOID>());
    default: return body(Of<CLAMPED>());
  }
}

// This thread's columns: two vectors of four, or eight numbers, of the 2048 of its block.
template <int W> __device__ __forceinline__ int column(int j) { return BY * 2048 + (j * 256 + TX) * W; }

template <int W, int N> __device__ __forceinline__ void fill(Floats<W> (&v)[N], const float* from, int width) {
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (column<W>(j) < width) v[j] = load<W>(from + column<W>(j));
}

template <int K> __device__ __forceinline__ float gate(float g, float u, float alpha, float limit) {
  if constexpr (K == CLAMPED) return act<K>(at_most(g, limit), alpha).y * (at_least(at_most(u, limit), -limit) + 1.f);
  return act<K>(g, alpha).y * u;
}

template <int W>
__device__ __forceinline__ void gate_row(const float* x, float* out, uint16_t* rounded, int64_t row, int inner, int kind, float alpha, float limit) {
  constexpr int N = 8 / W;
  Floats<W> g[N], u[N];
  fill<W>(g, x, inner);
  fill<W>(u, x + inner, inner);
  of_kind(kind, [&](auto of) {
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int k = 0; k < W; ++k) g[j].v[k] = gate<decltype(of)::kind>(g[j].v[k], u[j].v[k], alpha, limit);
  });
#pragma unroll
  for (int j = 0; j < N; ++j) {
    int i = column<W>(j);
    if (i >= inner) continue;
    if (out) store<W>(out + row + i, g[j]);
    if (rounded) store<W>(rounded + row + i, g[j]);
  }
}

template <int W>
__device__ __forceinline__ void gate_back(const float* x, const float* dy, float* dx, int inner, int kind, float alpha, float limit) {
  constexpr int N = 8 / W;
  Floats<W> g[N], u[N], d[N];
  fill<W>(g, x, inner);
  fill<W>(u, x + inner, inner);
  fill<W>(d, dy, inner);
  of_kind(kind, [&](auto of) {
    constexpr int K = decltype(of)::kind;
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int k = 0; k < W; ++k) {
        float a = g[j].v[k], b = u[j].v[k], dy = d[j].v[k];
        if constexpr (K == CLAMPED) {
          Value v = act<K>(at_most(a, limit), alpha);
          g[j].v[k] = a <= limit ? dy * (at_least(at_most(b, limit), -limit) + 1.f) * v.slope : 0.f;
          u[j].v[k] = b <= limit && b >= -limit ? dy * v.y : 0.f;
        } else {
          Value v = act<K>(a, alpha);
          g[j].v[k] = dy * b * v.slope;
          u[j].v[k] = dy * v.y;
        }
      }
  });
#pragma unroll
  for (int j = 0; j < N; ++j) {
    int i = column<W>(j);
    if (i >= inner) continue;
    store<W>(dx + i, g[j]);
    store<W>(dx + inner + i, u[j]);
  }
}

template <int W>
__device__ __forceinline__ void plain_row(const float* x, const float* dy, float* out, uint16_t* rounded, int64_t row, int width, int kind) {
  constexpr int N = 8 / W;
  Floats<W> v[N], d[N];
  fill<W>(v, x, width);
  if (dy) fill<W>(d, dy, width);
  of_kind(kind, [&](auto of) {
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int k = 0; k < W; ++k) {
        Value y = act<decltype(of)::kind>(v[j].v[k], 1.f);
        v[j].v[k] = dy ? d[j].v[k] * y.slope : y.y;
      }
  });
#pragma unroll
  for (int j = 0; j < N; ++j) {
    int i = column<W>(j);
    if (i >= width) continue;
    if (out) store<W>(out + row + i, v[j]);
    if (rounded) store<W>(rounded + row + i, v[j]);
  }
}

template <int W> __device__ __forceinline__ void cap_row(float* x, int width, float cap) {
  constexpr int N = 8 / W;
  Floats<W> v[N];
  fill<W>(v, x, width);
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int k = 0; k < W; ++k) v[j].v[k] = cap - 2.f * cap * rcp_(1.f + exp_(v[j].v[k] * (2.f / cap))); // tanh y = 1 - 2 / (1 + e^2y)
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (column<W>(j) < width) store<W>(x + column<W>(j), v[j]);
}

template <int W> __device__ __forceinline__ void cap_back(const float* y, const float* dy, float* dx, int width, float cap) {
  constexpr int N = 8 / W;
  Floats<W> v[N], d[N];
  fill<W>(v, y, width);
  fill<W>(d, dy, width);
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      float t = v[j].v[k] / cap;
      v[j].v[k] = (1.f - t * t) * d[j].v[k];
    }
    if (column<W>(j) < width) store<W>(dx + column<W>(j), v[j]);
  }
}

} // namespace activation

// act(gate) * up of gate_up [rows, 2 inner], rows `stride` apart, the gates in the first columns: float32 into out [rows,
// inner] and bf16 into rounded, each where it is not null. kind: 0 silu, 1 tanh's gelu, 2 gelu, 3 quick gelu, 4 relu, 5
// squared relu, 7 g' sigmoid(alpha g') (u' + 1), g' = min(g, limit), u' = u within +-limit.
// launch: grid (rows, inner / 2048, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) gated(const float* gate_up, int stride, float* out, uint16_t* rounded, int inner, int kind, float alpha, float limit) {
  const float* x = gate_up + (int64_t)BX * stride;
  int64_t row = (int64_t)BX * inner;
  if (((inner | stride) & 3) == 0 && wide(x) && wide(out) && wide(rounded)) activation::gate_row<4>(x, out, rounded, row, inner, kind, alpha, limit);
  else activation::gate_row<1>(x, out, rounded, row, inner, kind, alpha, limit);
}

// The gradient of gate_up, dense [rows, 2 inner], from dy, rows dy_stride apart.
// launch: grid (rows, inner / 2048, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) gated_backward(const float* gate_up, int stride, const float* dy, int dy_stride, float* dx, int inner, int kind,
                                     float alpha, float limit) {
  const float *x = gate_up + (int64_t)BX * stride, *d = dy + (int64_t)BX * dy_stride;
  float* to = dx + (int64_t)BX * 2 * inner;
  if (((inner | stride | dy_stride) & 3) == 0 && wide(x) && wide(d) && wide(to)) activation::gate_back<4>(x, d, to, inner, kind, alpha, limit);
  else activation::gate_back<1>(x, d, to, inner, kind, alpha, limit);
}

// act(x) of x [rows, width], rows `stride` apart, into dense rows: float32 and bf16 as gated; kind 6 is the sigmoid.
// launch: grid (rows, width / 2048, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) activate(const float* x, int stride, float* out, uint16_t* rounded, int width, int kind) {
  const float* from = x + (int64_t)BX * stride;
  int64_t row = (int64_t)BX * width;
  if (((width | stride) & 3) == 0 && wide(from) && wide(out) && wide(rounded)) activation::plain_row<4>(from, nullptr, out, rounded, row, width, kind);
  else activation::plain_row<1>(from, nullptr, out, rounded, row, width, kind);
}

// dy * act'(x), dense, from dy, rows dy_stride apart.
// launch: grid (rows, width / 2048, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) activate_backward(const float* x, int stride, const float* dy, int dy_stride, float* dx, int width, int kind) {
  const float *from = x + (int64_t)BX * stride, *d = dy + (int64_t)BX * dy_stride;
  int64_t row = (int64_t)BX * width;
  if (((width | stride | dy_stride) & 3) == 0 && wide(from) && wide(d) && wide(dx)) activation::plain_row<4>(from, d, dx, nullptr, row, width, kind);
  else activation::plain_row<1>(from, d, dx, nullptr, row, width, kind);
}

// x = cap tanh(x / cap) in place, x [rows, width], rows `stride` apart.
// launch: grid (rows, width / 2048, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) soft_cap(float* x, int stride, int width, float cap) {
  float* row = x + (int64_t)BX * stride;
  if (((width | stride) & 3) == 0 && wide(row)) activation::cap_row<4>(row, width, cap);
  else activation::cap_row<1>(row, width, cap);
}

// dx, dense, of what soft_cap made y, from dy; rows y_stride and dy_stride apart.
// launch: grid (rows, width / 2048, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) soft_cap_backward(const float* y, int y_stride, const float* dy, int dy_stride, float* dx, int width, float cap) {
  const float *from = y + (int64_t)BX * y_stride, *d = dy + (int64_t)BX * dy_stride;
  float* to = dx + (int64_t)BX * width;
  if (((width | y_stride | dy_stride) & 3) == 0 && wide(from) && wide(d) && wide(to)) activation::cap_back<4>(from, d, to, width, cap);
  else activation::cap_back<1>(from, d, to, width, cap);
}
