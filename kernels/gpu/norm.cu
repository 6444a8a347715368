// RMS and layer normalisation, forward and backward. Bound by memory: a run is read once and kept in registers.
//
// A run is `width` columns that are normalised together; a row of x has `groups` of them side by side, and rows lie
// `stride` apart. Results are dense. A run takes a block of 256 threads or, in kernels named _short, 32 lanes, eight runs a
// block: heads, of at most 256 columns. Any width is right in both; what is not kept of it is read again.

namespace norms {

// Vectors of W floats that a thread keeps of a run: all of 8192 (256) columns, fewer of rows that are read by single floats.
template <int T, int W> constexpr int KEPT = W == 4 && T == 32 ? 2 : 8;

// The first column of vector j of W floats of this thread.
template <int T, int W> __device__ __forceinline__ int column(int j) { return (j * T + TX % T) * W; }

// Loads what is kept. Nothing waits in between, so that all loads are under way at once.
template <int T, int W, int N>
__device__ __forceinline__ void fill(Floats<W> (&kept)[N], const float* from, int width) {
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (column<T, W>(j) < width) kept[j] = load<W>(from + column<T, W>(j));
}

// f(j, column) for each of this thread's vectors that is kept; rest(column) for those beyond.
template <int T, int W, int N, class F, class R>
__device__ __forceinline__ void each(int width, F f, R rest) {
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (column<T, W>(j) < width) f(j, column<T, W>(j));
  for (int i = column<T, W>(N); i < width; i += T * W) rest(i);
}

// Where this thread's run begins, and its width: 0 beyond the last run.
template <int T> __device__ __forceinline__ int run_of() { return T == 32 ? BX * 8 + TX / 32 : BX; }
__device__ __forceinline__ int64_t place(int run, int groups, int stride, int width) {
  return (int64_t)(run / groups) * stride + run % groups * width;
}

template <bool LAYER, int T, int W>
__device__ __forceinline__ void forward(float* x, const float* add, const float* weight, const float* bias, float* out,
                                        uint16_t* rounded, int width, int n, float eps) {
  constexpr int N = KEPT<T, W>;
  Floats<W> xs[N], ws[N];
  fill<T, W>(xs, x, width);
  if (add) {
    fill<T, W>(ws, add, width);
    auto plus = [&](Floats<W>& v, const Floats<W>& more, int i) {
#pragma unroll
      for (int k = 0; k < W; ++k) v.v[k] += more.v[k];
      store<W>(x + i, v);
    };
    each<T, W, N>(
        width, [&](int j, int i) { plus(xs[j], ws[j], i); },
        [&](int i) {
          Floats<W> v = load<W>(x + i);
          plus(v, load<W>(add + i), i);
        });
  }
  fill<T, W>(ws, weight, width); // While the sums are made.
  float sum = 0, mean = 0;
  auto over_x = [&](auto term) {
    auto all = [&](const Floats<W>& v) {
#pragma unroll
      for (int k = 0; k < W; ++k) sum += term(v.v[k]);
    };
    each<T, W, N>(width, [&](int j, int) { all(xs[j]); }, [&](int i) { all(load<W>(x + i)); });
  };
  if constexpr (LAYER) {
    over_x([](float x) { return x; });
    mean = run_sum<T>(sum) / n;
    sum = 0;
  }
  over_x([mean](float x) { return (x - mean) * (x - mean); });
  float inverse = rsqrt_(run_sum<T>(sum) / n + eps);
  auto finish = [&](const Floats<W>& v, const Floats<W>& w, int i) {
    Floats<W> y;
#pragma unroll
    for (int k = 0; k < W; ++k) y.v[k] = (v.v[k] - mean) * inverse * w.v[k];
    if (LAYER && bias) {
      Floats<W> b = load<W>(bias + i);
#pragma unroll
      for (int k = 0; k < W; ++k) y.v[k] += b.v[k];
    }
    if (out) store<W>(out + i, y);
    if (rounded) store<W>(rounded + i, y);
  };
  each<T, W, N>(
      width, [&](int j, int i) { finish(xs[j], ws[j], i); },
      [&](int i) { finish(load<W>(x + i), load<W>(weight + i), i); });
}

template <bool LAYER, int T>
__device__ __forceinline__ void forward_run(float* x, int stride, const float* add, const float* weight, const float* bias,
                                            float* out, uint16_t* rounded, int runs, int groups, int width, float eps) {
  int run = run_of<T>();
  bool live = run < runs;
  run = live ? run : 0;
  int64_t dense = (int64_t)run * width;
  bool by_four = ((width | stride) & 3) == 0 && wide(x) && wide(add) && wide(weight) && wide(bias) && wide(out) && wide(rounded);
  x += place(run, groups, stride, width);
  add = add ? add + dense : nullptr;
  out = out ? out + dense : nullptr;
  rounded = rounded ? rounded + dense : nullptr;
  if (by_four) forward<LAYER, T, 4>(x, add, weight, bias, out, rounded, live ? width : 0, width, eps);
  else forward<LAYER, T, 1>(x, add, weight, bias, out, rounded, live ? width : 0, width, eps);
}

// dx of one run; `onto`: added to what stands in dx.
template <bool LAYER, int T, int W>
__device__ __forceinline__ void backward(const float* x, const float* dy, const float* weight, float* dx, bool onto, int width,
                                         int n, float eps) {
  constexpr int N = KEPT<T, W>;
  Floats<W> xs[N], ds[N], ws[N];
  fill<T, W>(xs, x, width);
  fill<T, W>(ds, dy, width);
  fill<T, W>(ws, weight, width);
  auto weigh = [](Floats<W> d, const Floats<W>& w) {
#pragma unroll
    for (int k = 0; k < W; ++k) d.v[k] *= w.v[k];
    return d;
  };
  auto again = [&](int i) { return weigh(load<W>(dy + i), load<W>(weight + i)); };
  each<T, W, N>(width, [&](int j, int) { ds[j] = weigh(ds[j], ws[j]); }, [](int) {});
  if (onto) fill<T, W>(ws, dx, width); // While the sums are made.
  float a = 0, b = 0, mean = 0, d_mean = 0;
  auto over_both = [&](auto of_x, auto of_both) {
    auto all = [&](const Floats<W>& x, const Floats<W>& d) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        a += of_x(x.v[k]);
        b += of_both(x.v[k], d.v[k]);
      }
    };
    each<T, W, N>(width, [&](int j, int) { all(xs[j], ds[j]); }, [&](int i) { all(load<W>(x + i), again(i)); });
    a = run_sum<T>(a) / n;
    b = run_sum<T>(b) / n;
  };
  if constexpr (LAYER) {
    over_both([](float x) { return x; }, [](float, float d) { return d; });
    mean = a, d_mean = b;
    a = b = 0;
  }
  over_both([mean](float x) { return (x - mean) * (x - mean); }, [mean](float x, float d) { return d * (x - mean); });
  float inverse = rsqrt_(a + eps), slope = b * inverse * inverse;
  auto finish = [&](const Floats<W>& x, const Floats<W>& d, const Floats<W>& around, int i) {
    Floats<W> to;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      to.v[k] = (d.v[k] - d_mean - (x.v[k] - mean) * slope) * inverse;
      if (onto) to.v[k] += around.v[k];
    }
    store<W>(dx + i, to);
  };
  each<T, W, N>(
      width, [&](int j, int i) { finish(xs[j], ds[j], ws[j], i); },
      [&](int i) { finish(load<W>(x + i), again(i), load<W>(dx + i), i); });
}

template <bool LAYER, int T>
__device__ __forceinline__ void backward_run(const float* x, int stride, const float* dy, int dy_stride, const float* weight,
                                             float* dx, int onto, int runs, int groups, int width, float eps) {
  int run = run_of<T>();
  bool live = run < runs;
  run = live ? run : 0;
  bool by_four = ((width | stride | dy_stride) & 3) == 0 && wide(x) && wide(dy) && wide(weight) && wide(dx);
  x += place(run, groups, stride, width);
  dy += place(run, groups, dy_stride, width);
  dx += (int64_t)run * width;
  if (by_four) backward<LAYER, T, 4>(x, dy, weight, dx, onto, live ? width : 0, width, eps);
  else backward<LAYER, T, 1>(x, dy, weight, dx, onto, live ? width : 0, width, eps);
}

// The share of each_piece runs from `first` on in the gradients of weight and bias: to [width] and, of a layer norm, [2, width].
template <bool LAYER, int T, int W>
__device__ __forceinline__ void params(const float* x, int stride, const float* dy, int dy_stride, float* to, int first,
                                       int each_piece, int runs, int groups, int width, float eps) {
  constexpr int N = W == 4 ? (T == 32 ? 2 : 4) : 8; // Half, for sums are kept beside.
  Floats<W> xs[N], ds[N], weights[N], biases[LAYER ? N : 1];
  auto clear = [](Floats<W>& v) {
#pragma unroll
    for (int k = 0; k < W; ++k) v.v[k] = 0;
  };
#pragma unroll
  for (int j = 0; j < N; ++j) {
    clear(weights[j]);
    if constexpr (LAYER) clear(biases[j]);
  }
  // Sums beyond what is kept stand where they go.
  each<T, W, 0>(width, [](int, int) {}, [&](int i) {
    Floats<W> zero;
    clear(zero);
    store<W>(to + i, zero);
    if constexpr (LAYER) store<W>(to + width + i, zero);
  });
  for (int r = first; r < first + each_piece; ++r) {
    bool live = r < runs;
    const float* from = x + place(live ? r : 0, groups, stride, width);
    const float* d_from = dy + place(live ? r : 0, groups, dy_stride, width);
    int n = live ? width : 0;
    fill<T, W>(xs, from, n);
    fill<T, W>(ds, d_from, n);
    float sum = 0, mean = 0;
    auto over_x = [&](auto term) {
      auto all = [&](const Floats<W>& v) {
#pragma unroll
        for (int k = 0; k < W; ++k) sum += term(v.v[k]);
      };
      each<T, W, N>(n, [&](int j, int) { all(xs[j]); }, [&](int i) { all(load<W>(from + i)); });
    };
    if constexpr (LAYER) {
      over_x([](float x) { return x; });
      mean = run_sum<T>(sum) / width;
      sum = 0;
    }
    over_x([mean](float x) { return (x - mean) * (x - mean); });
    float inverse = rsqrt_(run_sum<T>(sum) / width + eps);
    auto gather = [&](const Floats<W>& x, const Floats<W>& d, Floats<W>& w, Floats<W>& b) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        w.v[k] += (x.v[k] - mean) * inverse * d.v[k];
        if constexpr (LAYER) b.v[k] += d.v[k];
      }
    };
    each<T, W, N>(
        n, [&](int j, int) { gather(xs[j], ds[j], weights[j], biases[LAYER ? j : 0]); },
        [&](int i) {
          Floats<W> w = load<W>(to + i), b;
          if constexpr (LAYER) b = load<W>(to + width + i);
          gather(load<W>(from + i), load<W>(d_from + i), w, b);
          store<W>(to + i, w);
          if constexpr (LAYER) store<W>(to + width + i, b);
        });
  }
  each<T, W, N>(
      width,
      [&](int j, int i) {
        store<W>(to + i, weights[j]);
        if constexpr (LAYER) store<W>(to + width + i, biases[j]);
      },
      [](int) {});
}

template <bool LAYER, int T>
__device__ __forceinline__ void params_piece(const float* x, int stride, const float* dy, int dy_stride, float* partial,
                                             int each_piece, int runs, int groups, int width, float eps) {
  int piece = run_of<T>();
  float* to = partial + (int64_t)piece * (LAYER ? 2 : 1) * width;
  if (((width | stride | dy_stride) & 3) == 0 && wide(x) && wide(dy) && wide(partial))
    params<LAYER, T, 4>(x, stride, dy, dy_stride, to, piece * each_piece, each_piece, runs, groups, width, eps);
  else params<LAYER, T, 1>(x, stride, dy, dy_stride, to, piece * each_piece, each_piece, runs, groups, width, eps);
}

} // namespace norms

// y = x / sqrt(mean(x^2) + eps) * weight of each run: float32 into out [runs, width] and bf16 into rounded [runs, width], each
// where it is not null. add [runs, width], where not null, is added to x first, and x keeps the sum.
// launch: grid (runs), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) rms_norm(float* x, int stride, const float* add, const float* weight, float* out, uint16_t* rounded,
                               int runs, int groups, int width, float eps) {
  norms::forward_run<false, 256>(x, stride, add, weight, nullptr, out, rounded, runs, groups, width, eps);
}

// launch: grid (runs / 8, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) rms_norm_short(float* x, int stride, const float* add, const float* weight, float* out, uint16_t* rounded,
                                     int runs, int groups, int width, float eps) {
  norms::forward_run<false, 32>(x, stride, add, weight, nullptr, out, rounded, runs, groups, width, eps);
}

// As rms_norm, y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias; bias may be null.
// launch: grid (runs), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) layer_norm(float* x, int stride, const float* add, const float* weight, const float* bias, float* out,
                                 uint16_t* rounded, int runs, int groups, int width, float eps) {
  norms::forward_run<true, 256>(x, stride, add, weight, bias, out, rounded, runs, groups, width, eps);
}

// launch: grid (runs / 8, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) layer_norm_short(float* x, int stride, const float* add, const float* weight, const float* bias,
                                       float* out, uint16_t* rounded, int runs, int groups, int width, float eps) {
  norms::forward_run<true, 32>(x, stride, add, weight, bias, out, rounded, runs, groups, width, eps);
}

// dx [runs, width] of rms_norm from dy, whose rows lie dy_stride apart; with onto it is added to what stands there.
// launch: grid (runs), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 1) rms_norm_backward(const float* x, int stride, const float* dy, int dy_stride, const float* weight,
                                        float* dx, int onto, int runs, int groups, int width, float eps) {
  norms::backward_run<false, 256>(x, stride, dy, dy_stride, weight, dx, onto, runs, groups, width, eps);
}

// launch: grid (runs / 8, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) rms_norm_backward_short(const float* x, int stride, const float* dy, int dy_stride, const float* weight,
                                              float* dx, int onto, int runs, int groups, int width, float eps) {
  norms::backward_run<false, 32>(x, stride, dy, dy_stride, weight, dx, onto, runs, groups, width, eps);
}

// The same of layer_norm.
// launch: grid (runs), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 1) layer_norm_backward(const float* x, int stride, const float* dy, int dy_stride, const float* weight,
                                          float* dx, int onto, int runs, int groups, int width, float eps) {
  norms::backward_run<true, 256>(x, stride, dy, dy_stride, weight, dx, onto, runs, groups, width, eps);
}

// launch: grid (runs / 8, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) layer_norm_backward_short(const float* x, int stride, const float* dy, int dy_stride, const float* weight,
                                                float* dx, int onto, int runs, int groups, int width, float eps) {
  norms::backward_run<true, 32>(x, stride, dy, dy_stride, weight, dx, onto, runs, groups, width, eps);
}

// What each piece, each_piece runs, brings to the gradient of rms_norm's weight: partial [pieces, width], for column_sums.
// launch: grid (runs / each_piece, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) rms_norm_params(const float* x, int stride, const float* dy, int dy_stride, float* partial, int each_piece,
                                      int runs, int groups, int width, float eps) {
  norms::params_piece<false, 256>(x, stride, dy, dy_stride, partial, each_piece, runs, groups, width, eps);
}

// Eight pieces a block: partial has a row for each of 8 x grid pieces.
// launch: grid (runs / each_piece / 8, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) rms_norm_params_short(const float* x, int stride, const float* dy, int dy_stride, float* partial,
                                            int each_piece, int runs, int groups, int width, float eps) {
  norms::params_piece<false, 32>(x, stride, dy, dy_stride, partial, each_piece, runs, groups, width, eps);
}

// The same of layer_norm, the bias' gradient behind the weight's: partial [pieces, 2, width].
// launch: grid (runs / each_piece, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) layer_norm_params(const float* x, int stride, const float* dy, int dy_stride, float* partial,
                                        int each_piece, int runs, int groups, int width, float eps) {
  norms::params_piece<true, 256>(x, stride, dy, dy_stride, partial, each_piece, runs, groups, width, eps);
}

// launch: grid (runs / each_piece / 8, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) layer_norm_params_short(const float* x, int stride, const float* dy, int dy_stride, float* partial,
                                              int each_piece, int runs, int groups, int width, float eps) {
  norms::params_piece<true, 32>(x, stride, dy, dy_stride, partial, each_piece, runs, groups, width, eps);
}

// out [columns] = the sum over the rows of partial [rows, columns]: every eighth row, then the eight sums, in one order.
// launch: grid (columns / 32, rounded up), 256 threads.
KERNEL LAUNCH(256, 4) column_sums(const float* partial, float* out, int rows, int columns) {
  __shared__ float sums[8][32];
  int column = BX * 32 + TX % 32;
  float sum = 0;
  if (column < columns)
#pragma unroll 4
    for (int row = TX / 32; row < rows; row += 8) sum += partial[(int64_t)row * columns + column];
  sums[TX / 32][TX % 32] = sum;
  block_sync();
  if (TX < 32 && column < columns) {
    for (int i = 1; i < 8; ++i) sum += sums[i][TX];
    out[column] = sum;
  }
}
