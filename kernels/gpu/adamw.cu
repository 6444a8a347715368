// Optimizers over flat float32 buffers [n], and what a trainer does to gradients before a step. Every operation is rounded as
// in kernels/src/{adamw,sgd,lion}.rs, so a step has the CPU's bits. Bound by memory: each buffer is read and written once.

// This thread's four neighbours: `wide(i)` where all the buffers begin at 16 bytes and all four are there, else `narrow(i)`.
template <class Wide, class Narrow> __device__ __forceinline__ void four(int64_t n, bool all_aligned, Wide wide, Narrow narrow) {
  int64_t i = ((int64_t)BX * 256 + TX) * 4;
  if (all_aligned && i + 4 <= n) wide(i);
  else if (i < n) narrow(i);
}

// What a step of AdamW is made of.
struct AdamW { float decay, one_minus_beta1, beta2, one_minus_beta2, sqrt_bias_correction2, epsilon, step_size; };
template <bool WIDE>
__device__ __forceinline__ void adamw_four(float* params, const float* grads, float* m, float* v, uint16_t* bank, int64_t i, int64_t n, const AdamW& by) {
  f32x4 p = load4<WIDE>(params, i, n), g = load4<WIDE>(grads, i, n), first = load4<WIDE>(m, i, n), second = load4<WIDE>(v, i, n);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    first.v[j] = fma_(g.v[j] - first.v[j], by.one_minus_beta1, first.v[j]);
    second.v[j] = fma_(g.v[j] * g.v[j], by.one_minus_beta2, second.v[j] * by.beta2);
    float denominator = sqrt_(second.v[j]) / by.sqrt_bias_correction2 + by.epsilon;
    p.v[j] = fma_(first.v[j] / denominator, -by.step_size, p.v[j] * by.decay);
  }
  store4<WIDE>(params, i, n, p);
  store4<WIDE>(m, i, n, first);
  store4<WIDE>(v, i, n, second);
  if (!bank) return;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (i + j < n) bank[i + j] = to_bf(p.v[j]);
}

// One step of AdamW; the coefficients are those of the step. With a bank the new parameters are written there too, as the
// bfloat16 that serving reads.
// launch: grid (ceil(n / 1024)), 256 threads.
KERNEL LAUNCH(256, 4) adamw(float* params, const float* grads, float* m, float* v, uint16_t* bank, int64_t n, float decay, float one_minus_beta1, float beta2,
                            float one_minus_beta2, float sqrt_bias_correction2, float epsilon, float step_size) {
  AdamW by = {decay, one_minus_beta1, beta2, one_minus_beta2, sqrt_bias_correction2, epsilon, step_size};
  four(
      n, aligned(params) && aligned(grads) && aligned(m) && aligned(v), [&](int64_t i) { adamw_four<true>(params, grads, m, v, bank, i, n, by); },
      [&](int64_t i) { adamw_four<false>(params, grads, m, v, bank, i, n, by); });
}

template <bool WIDE>
__device__ __forceinline__ void sgd_four(float* params, const float* grads, float* velocity, int64_t i, int64_t n, float lr, float decay, float kept, float ahead) {
  f32x4 p = load4<WIDE>(params, i, n), g = load4<WIDE>(grads, i, n);
#pragma unroll
  for (int j = 0; j < 4; ++j) g.v[j] = fma_(p.v[j], decay, g.v[j]);
  if (velocity) {
    f32x4 moving = load4<WIDE>(velocity, i, n);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      moving.v[j] = fma_(moving.v[j], kept, g.v[j]);
      g.v[j] = ahead != 0.f ? fma_(moving.v[j], ahead, g.v[j]) : moving.v[j];
    }
    store4<WIDE>(velocity, i, n, moving);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) p.v[j] = fma_(g.v[j], -lr, p.v[j]);
  store4<WIDE>(params, i, n, p);
}

// One step of SGD. Without a velocity there is no momentum; `kept` is the momentum, 0 at the first step; `ahead` is the
// momentum of Nesterov's way, else 0.
// launch: grid (ceil(n / 1024)), 256 threads.
KERNEL LAUNCH(256, 4) sgd(float* params, const float* grads, float* velocity, int64_t n, float lr, float decay, float kept, float ahead) {
  four(
      n, aligned(params) && aligned(grads) && aligned(velocity), [&](int64_t i) { sgd_four<true>(params, grads, velocity, i, n, lr, decay, kept, ahead); },
      [&](int64_t i) { sgd_four<false>(params, grads, velocity, i, n, lr, decay, kept, ahead); });
}

struct Lion { float decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr; };
template <bool WIDE> __device__ __forceinline__ void lion_four(float* params, const float* grads, float* m, int64_t i, int64_t n, const Lion& by) {
  f32x4 p = load4<WIDE>(params, i, n), g = load4<WIDE>(grads, i, n), mean = load4<WIDE>(m, i, n);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    // Not fused: a sum that is zero has no sign.
    float way = mul_(mean.v[j], by.beta1) + mul_(g.v[j], by.one_minus_beta1);
    float sign = (float)(way > 0.f) - (float)(way < 0.f);
    p.v[j] = mul_(p.v[j], by.decay) - mul_(by.lr, sign);
    mean.v[j] = mul_(mean.v[j], by.beta2) + mul_(g.v[j], by.one_minus_beta2);
  }
  store4<WIDE>(params, i, n, p);
  store4<WIDE>(m, i, n, mean);
}

// One step of Lion.
// launch: grid (ceil(n / 1024)), 256 threads.
KERNEL LAUNCH(256, 4) lion(float* params, const float* grads, float* m, int64_t n, float decay, float beta1, float one_minus_beta1, float beta2,
                           float one_minus_beta2, float lr) {
  Lion by = {decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr};
  four(
      n, aligned(params) && aligned(grads) && aligned(m), [&](int64_t i) { lion_four<true>(params, grads, m, i, n, by); },
      [&](int64_t i) { lion_four<false>(params, grads, m, i, n, by); });
}

template <bool WIDE> __device__ __forceinline__ void scale_four(float* x, int64_t i, int64_t n, float factor) {
  f32x4 v = load4<WIDE>(x, i, n);
#pragma unroll
  for (int j = 0; j < 4; ++j) v.v[j] *= factor;
  store4<WIDE>(x, i, n, v);
}

// x *= factor.
// launch: grid (ceil(n / 1024)), 256 threads.
KERNEL LAUNCH(256, 4) scale(float* x, int64_t n, float factor) {
  four(
      n, aligned(x), [&](int64_t i) { scale_four<true>(x, i, n, factor); }, [&](int64_t i) { scale_four<false>(x, i, n, factor); });
}

template <bool WIDE> __device__ __forceinline__ double squares(const float* x, int n) {
  double sum = 0;
  for (int i = TX * 4; i < n; i += 1024) {
    f32x4 v = load4<WIDE>(x, i, n);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += (double)v.v[j] * (double)v.v[j];
  }
  return sum;
}

// sums [ceil(n / 32768)] float64: of the squares of each piece of x, in a fixed order. The norm is the root of their sum.
// launch: grid (ceil(n / 32768)), 256 threads.
KERNEL LAUNCH(256, 4) square_sums(const float* x, double* sums, int64_t n) {
  __shared__ double tree[256];
  int64_t left = n - (int64_t)BX * 32768;
  int here = left < 32768 ? (int)left : 32768;
  x += (int64_t)BX * 32768;
  tree[TX] = aligned(x) && here % 4 == 0 ? squares<true>(x, here) : squares<false>(x, here);
  for (int half = 128; half; half >>= 1) {
    block_sync();
    if (TX < half) tree[TX] += tree[TX + half];
  }
  if (TX == 0) sums[BX] = tree[0];
}
