// The softmax over the vocabulary and its cross-entropy, a row a block, in the logits' own memory.

namespace loss {

// What a thread has seen of a row: the largest logit, and the sum of exp(logit - largest).
struct Seen { float largest, sum; };
__device__ __forceinline__ float exp_(float x) { return exp2_(x * 1.44269504f); }

// Of a row, in every thread of the block.
template <bool WIDE> __device__ __forceinline__ Seen softmax_of(const float* row, int n, float* shared) {
  Seen seen = {-3e38f, 0.f};
  for (int i = TX * 4; i < n; i += 1024 * 4) {
    f32x4 v = load4<WIDE>(row, i, n);
    if (!WIDE)
#pragma unroll
      for (int j = 1; j < 4; ++j)
        if (i + j >= n) v.v[j] = -3e38f;
    float largest = max_(max_(v.v[0], v.v[1]), max_(v.v[2], v.v[3]));
    if (largest > seen.largest) {
      seen.sum *= exp_(seen.largest - largest);
      seen.largest = largest;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) seen.sum += exp_(v.v[j] - seen.largest);
  }
  float largest = block_reduce<1024>(seen.largest, true, shared);
  float sum = block_reduce<1024>(seen.sum * exp_(seen.largest - largest), false, shared);
  return {largest, sum};
}

template <bool WIDE>
__device__ __forceinline__ void cross_entropy_row(float* row, int label, const float* weight, float* result, int n, float* shared) {
  float of_label = row[label];
  Seen all = softmax_of<WIDE>(row, n, shared);
  if (TX == 0) {
    result[0] = of_label - all.largest - log2_(all.sum) * 0.693147181f;
    result[1] = of_label >= all.largest ? 1.f : 0.f;
  }
  if (!weight) return;
  float factor = *weight / all.sum;
  for (int i = TX * 4; i < n; i += 1024 * 4) {
    f32x4 v = load4<WIDE>(row, i, n);
#pragma unroll
    for (int j = 0; j < 4; ++j) v.v[j] = exp_(v.v[j] - all.largest) * factor - (i + j == label ? *weight : 0.f);
    store4<WIDE>(row, i, n, v);
  }
}

}  // namespace loss

// logits [rows, n] float32 become weight * (softmax - onehot(label)); results [rows, 2] are log p(label) and 1 where the label
// has the largest logit, else 0. Without weights the logits stay and only the results are made. Bound by memory: the row is
// read twice and written once.
// launch: grid (rows), 1024 threads.
KERNEL LAUNCH(1024, 1) cross_entropy(float* logits, const int* labels, const float* weights, float* results, int n) {
  __shared__ float shared[32];
  float* row = logits + (int64_t)BX * n;
  const float* weight = weights ? weights + BX : nullptr;
  if (n % 4 == 0 && aligned(row)) loss::cross_entropy_row<true>(row, labels[BX], weight, results + 2 * BX, n, shared);
  else loss::cross_entropy_row<false>(row, labels[BX], weight, results + 2 * BX, n, shared);
}
