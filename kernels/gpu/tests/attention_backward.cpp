// The gradient of attention over packed sequences against double: pages are zero behind a sequence's end, everything else that
// may not be read is NaN, and a sequence alone has the bits it has beside others.
#include "test.h"

struct Case {
  int heads, kv_heads, dim;
  std::vector<int> lengths;
  int window;
  float cap;
  bool f32;
};

using Numbers = std::vector<float>;
struct Gradients {
  Numbers dq, dk, dv;
};

struct Trial {
  Case c;
  int rows = 0;
  Numbers q, k, v, dout, out, lse;
  std::vector<double> dq, dk, dv; // By the formulas, in double.

  double in(float x) const { return c.f32 ? x : bf(to_bf(x)); }

  explicit Trial(const Case& c) : c(c) {
    for (int n : c.lengths) rows += n;
    q = normal((size_t)rows * c.heads * c.dim, 1.5f), dout = normal(q.size());
    k = normal((size_t)rows * c.kv_heads * c.dim, 1.5f), v = normal(k.size());
    out.resize(q.size()), lse.resize((size_t)rows * c.heads);
    dq.resize(q.size()), dk.resize(k.size()), dv.resize(k.size());
    const int D = c.dim;
    const double scale = 1 / sqrt(D);
    int base = 0;
    for (int n : c.lengths) {
      for (int h = 0; h < c.heads; ++h)
        for (int i = 0; i < n; ++i) {
          size_t at = ((size_t)(base + i) * c.heads + h) * D;
          int first = c.window > 0 ? std::max(i + 1 - c.window, 0) : 0;
          auto key = [&](int j) { return ((size_t)(base + j) * c.kv_heads + h / (c.heads / c.kv_heads)) * D; };
          std::vector<double> s, slope, y(D);
          double sum = 0, delta = 0;
          for (int j = first; j <= i; ++j) {
            double x = 0;
            for (int d = 0; d < D; ++d) x += in(q[at + d]) * in(k[key(j) + d]);
            x *= scale;
            double t = c.cap > 0 ? tanh(x / c.cap) : 0;
            s.push_back(c.cap > 0 ? c.cap * t : x), slope.push_back(1 - t * t);
            sum += exp(s.back());
          }
          for (int j = first; j <= i; ++j)
            for (int d = 0; d < D; ++d) y[d] += exp(s[j - first]) / sum * in(v[key(j) + d]);
          for (int d = 0; d < D; ++d) out[at + d] = y[d], delta += y[d] * dout[at + d];
          lse[(size_t)(base + i) * c.heads + h] = log(sum);
          for (int j = first; j <= i; ++j) {
            double p = exp(s[j - first]) / sum, dp = 0;
            for (int d = 0; d < D; ++d) dp += (double)dout[at + d] * in(v[key(j) + d]);
            double ds = p * (dp - delta) * slope[j - first] * scale;
            for (int d = 0; d < D; ++d) {
              dq[at + d] += ds * in(k[key(j) + d]);
              dk[key(j) + d] += ds * in(q[at + d]);
              dv[key(j) + d] += p * dout[at + d];
            }
          }
        }
      base += n;
    }
  }

  // Of the sequences from `from` to `to` alone.
  Gradients run(size_t from, size_t to) {
    std::vector<int> items, slots;
    int first = 0, n = 0, pages = 1; // A page of nobody's before them.
    for (size_t s = 0; s < from; ++s) first += c.lengths[s];
    for (size_t s = from; s < to; ++s) {
      for (int i = 0; i < c.lengths[s]; ++i) slots.push_back(pages * BLOCK + i);
      for (int b = 0; b * BLOCK < c.lengths[s]; ++b) items.insert(items.end(), {n, c.lengths[s], b, pages});
      pages += (c.lengths[s] + BLOCK - 1) / BLOCK, n += c.lengths[s];
    }
    items.insert(items.end(), {-1, 0, 0, 0}); // Padding.
    auto put = [&](const Numbers& x, const Numbers& y, int heads) {
      int width = heads * c.dim;
      std::vector<char> to((size_t)pages * heads * (c.f32 ? page_bytes<float>(c.dim) : page_bytes<uint16_t>(c.dim)));
      memset(to.data(), 0xff, to.size() / pages);
      launch_as(kv_write_bf16, c.f32 ? "kv_write_f32" : "kv_write_bf16", n, (heads + 3) / 4, 1, 4 * WARP,
                x.data() + (size_t)first * width, y.data() + (size_t)first * width, slots.data(), to.data(), width, width, heads,
                c.dim);
      return to;
    };
    auto q_pages = put(q, dout, c.heads), dout_pages = put(dout, q, c.heads);
    auto k_pages = put(k, v, c.kv_heads), v_pages = put(v, k, c.kv_heads);
    const float* lse_of = lse.data() + (size_t)first * c.heads;
    const size_t start = (size_t)first * c.heads * c.dim;
    Numbers delta((size_t)n * c.heads, NAN);
    launch_kernel(attention_delta, n, (c.heads + 3) / 4, 1, 4 * WARP, out.data() + start, dout.data() + start, delta.data(),
                  c.heads, c.dim);
    Gradients g = {Numbers((size_t)n * c.heads * c.dim, NAN), Numbers((size_t)n * c.kv_heads * c.dim, NAN),
                   Numbers((size_t)n * c.kv_heads * c.dim, NAN)};
    const float scale = 1 / sqrtf(c.dim);
    const int count = (int)items.size() / 4;
    auto queries = [&](auto run, int threads, auto... dim) {
      run(count, c.heads, 1, threads, q_pages.data(), dout_pages.data(), k_pages.data(), v_pages.data(), items.data(), lse_of,
          delta.data(), g.dq.data(), c.heads, c.kv_heads, c.window, scale, c.cap, dim...);
    };
    auto keys = [&](auto run, int threads, auto... dim) {
      run(count, c.kv_heads, 1, threads, q_pages.data(), dout_pages.data(), k_pages.data(), v_pages.data(), items.data(), lse_of,
          delta.data(), g.dk.data(), g.dv.data(), c.heads, c.kv_heads, c.window, scale, c.cap, dim...);
    };
    const std::string dim = std::to_string(c.dim);
    if (c.f32) {
      queries([](auto... args) { launch_kernel(attention_back_queries_f32, args...); }, 256, c.dim);
      keys([](auto... args) { launch_kernel(attention_back_keys_f32, args...); }, 256, c.dim);
    } else {
      queries([&](auto... args) { launch_as(attention_back_queries_16, "attention_back_queries_" + dim, args...); }, 4 * WARP);
      keys([&](auto... args) { launch_as(attention_back_keys_16, "attention_back_keys_" + dim, args...); }, 4 * WARP);
    }
    return g;
  }

  void judge_all() {
    std::string what = std::string(c.f32 ? "float32" : "bf16") + " D " + std::to_string(c.dim) + ", " +
                       std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) +
                       (c.window ? " window " + std::to_string(c.window) : "") + (c.cap > 0 ? " cap" : "");
    const double bar = c.f32 ? 5e-6 : 5e-3;
    Gradients all = run(0, c.lengths.size());
    judge(what + ": dq", distance(all.dq, dq), bar);
    judge(what + ": dk", distance(all.dk, dk), bar);
    judge(what + ": dv", distance(all.dv, dv), bar);
    Gradients last = run(c.lengths.size() - 1, c.lengths.size());
    auto same = [](const Numbers& a, const Numbers& b) { return !memcmp(a.data() + a.size() - b.size(), b.data(), 4 * b.size()); };
    if (!same(all.dq, last.dq) || !same(all.dk, last.dk) || !same(all.dv, last.dv)) judge(what + ": alone other bits", 1, 0);
  }
};

int main(int argc, char** argv) {
  take_arguments(argc, argv);
  const std::vector<Case> cases = {
      {2, 2, 16, {33, 1, 70}, 0, 0, false},   {6, 2, 32, {100}, 40, 20, false},      {4, 2, 64, {5, 65}, 0, 0, false},
      {3, 1, 80, {40, 50}, 0, 3, false},      {2, 1, 96, {64, 31}, 2, 0, false},     {4, 1, 128, {32, 33}, 33, 0, false},
      {2, 1, 256, {70}, 20, 20, false},       {4, 2, 12, {40, 70}, 45, 0, true},     {3, 1, 64, {33, 1, 64}, 0, 3, true},
      {2, 1, 256, {50}, 0, 0, true},
  };
  for (auto& c : cases) Trial(c).judge_all();
  return verdict();
}
