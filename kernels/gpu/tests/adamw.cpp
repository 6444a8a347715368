#include "test.h"

// Counts elements whose bits are not those of the CPU's formula, written out below.
static int unlike(const std::vector<float>& got, const std::vector<float>& want) {
  int n = 0;
  for (size_t i = 0; i < want.size(); ++i) n += memcmp(&got[i], &want[i], 4) != 0;
  return n;
}

// The same numbers, where 16 bytes at a time cannot be read.
struct Shifted {
  std::vector<float> memory;
  bool on;
  Shifted(const std::vector<float>& from, bool on) : memory(from), on(on) {
    if (on) memory.insert(memory.begin(), -7.f);
  }
  float* data() { return memory.data() + on; }
  std::vector<float> now() const { return {memory.begin() + on, memory.end()}; }
};

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  for (int n : {1, 1027, 70001})
    for (bool odd : {false, true}) {
      std::string what = " of " + std::to_string(n) + (odd ? " unaligned" : "") + ", elements that differ";
      int blocks = (n + 1023) / 1024;
      const float lr = 1e-2f, decay = 0.999f, b1 = 0.1f, b2 = 0.95f, c2 = 0.05f, root = 0.7f, epsilon = 1e-6f;
      auto params = normal(n), grads = normal(n), m = normal(n), v = normal(n);
      for (float& x : v) x = fabsf(x);
      for (int i = 0; i < n; i += 3) grads[i] = 0;  // A mean of nothing has no sign.
      for (int i = 0; i < n; i += 6) m[i] = 0;

      {
        Shifted p(params, odd), g(grads, odd), first(m, odd), second(v, odd);
        std::vector<uint16_t> bank(n), cast(n);
        launch_kernel(adamw, blocks, 1, 1, 256, p.data(), g.data(), first.data(), second.data(), bank.data(), n, decay, b1, b2, c2, root, epsilon, lr);
        auto p1 = params, m1 = m, v1 = v;
        for (int i = 0; i < n; ++i) {
          m1[i] = fmaf(grads[i] - m1[i], b1, m1[i]);
          v1[i] = fmaf(grads[i] * grads[i], c2, v1[i] * b2);
          p1[i] = fmaf(m1[i] / (sqrtf(v1[i]) / root + epsilon), -lr, p1[i] * decay);
          cast[i] = to_bf(p1[i]);
        }
        judge("adamw" + what, unlike(p.now(), p1) + unlike(first.now(), m1) + unlike(second.now(), v1) + (bank != cast), 0);
        Shifted again(params, odd), m2(m, odd), v2(v, odd);
        launch_kernel(adamw, blocks, 1, 1, 256, again.data(), g.data(), m2.data(), v2.data(), nullptr, n, decay, b1, b2, c2, root, epsilon, lr);
        judge("adamw without a bank" + what, unlike(again.now(), p1), 0);
      }

      for (float ahead : {0.f, 0.8f})
        for (bool momentum : {false, true}) {
          Shifted p(params, odd), g(grads, odd), velocity(m, odd);
          launch_kernel(sgd, blocks, 1, 1, 256, p.data(), g.data(), momentum ? velocity.data() : nullptr, n, lr, 0.1f, 0.9f, ahead);
          auto p1 = params, m1 = m;
          for (int i = 0; i < n; ++i) {
            float update = fmaf(p1[i], 0.1f, grads[i]);
            if (momentum) {
              m1[i] = fmaf(m1[i], 0.9f, update);
              update = ahead != 0 ? fmaf(m1[i], ahead, update) : m1[i];
            }
            p1[i] = fmaf(update, -lr, p1[i]);
          }
          judge("sgd" + what, unlike(p.now(), p1) + unlike(velocity.now(), m1), 0);
        }

      {
        Shifted p(params, odd), g(grads, odd), mean(m, odd);
        launch_kernel(lion, blocks, 1, 1, 256, p.data(), g.data(), mean.data(), n, decay, b1, 1 - b1, b2, 1 - b2, lr);
        auto p1 = params, m1 = m;
        for (int i = 0; i < n; ++i) {
          float way = m1[i] * b1 + grads[i] * (1 - b1);
          p1[i] = p1[i] * decay - lr * ((way > 0) - (way < 0));
          m1[i] = m1[i] * b2 + grads[i] * (1 - b2);
        }
        judge("lion" + what, unlike(p.now(), p1) + unlike(mean.now(), m1), 0);
      }

      Shifted g(grads, odd);
      std::vector<double> sums((n + 32767) / 32768, NAN);
      launch_kernel(square_sums, sums.size(), 1, 1, 256, g.data(), sums.data(), n);
      double off = 0;
      for (size_t piece = 0; piece < sums.size(); ++piece) {
        double want = 0;
        for (int i = piece * 32768; i < n && i < (int)(piece + 1) * 32768; ++i) want += (double)grads[i] * grads[i];
        off = std::max(off, fabs(sums[piece] - want) / std::max(want, 1e-30));
      }
      judge("square_sums of " + std::to_string(n), off, 1e-13);
      launch_kernel(scale, blocks, 1, 1, 256, g.data(), n, 0.3f);
      for (float& x : grads) x *= 0.3f;
      judge("scale" + what, unlike(g.now(), grads), 0);
    }
  return verdict();
}
