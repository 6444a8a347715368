// Experts: which of them a token goes to, its rows laid out by expert and back, and the gradients. Routing is bound by
// latency, the rest by memory. A token's choices are summed in the order in which it made them.

namespace experts {

// Order of floats as integers: -0 below 0, and NaNs at the ends by their sign.
__device__ __forceinline__ int order(float x) {
  F v;
  v.f = x;
  return v.s ^ (v.s >> 31 & 0x7fffffff);
}

__device__ __forceinline__ float exp_(float x) { return exp2_(1.44269504f * x); }

// The eight numbers of this thread's columns of the 2048 of its block.
template <int W> __device__ __forceinline__ int column(int j) { return BY * 2048 + (j * 256 + TX) * W; }

template <int W> __device__ __forceinline__ void copy(const float* from, float* to, int width) {
  Floats<W> v[8 / W];
#pragma unroll
  for (int j = 0; j < 8 / W; ++j)
    if (column<W>(j) < width) v[j] = load<W>(from + column<W>(j));
#pragma unroll
  for (int j = 0; j < 8 / W; ++j)
    if (column<W>(j) < width) store<W>(to + column<W>(j), v[j]);
}

template <int W>
__device__ __forceinline__ void combine(const float* x, const int* row_of, const float* weights, float* to, int top_k, int width) {
  Floats<W> sum[8 / W], v[8 / W];
  for (int c = 0; c < top_k; ++c) {
    const float* from = x + (int64_t)row_of[c] * width;
    float weight = weights ? weights[c] : 1.f;
#pragma unroll
    for (int j = 0; j < 8 / W; ++j)
      if (column<W>(j) < width) v[j] = load<W>(from + column<W>(j));
#pragma unroll
    for (int j = 0; j < 8 / W; ++j)
#pragma unroll
      for (int k = 0; k < W; ++k) sum[j].v[k] = c ? sum[j].v[k] + weight * v[j].v[k] : weight * v[j].v[k];
  }
#pragma unroll
  for (int j = 0; j < 8 / W; ++j)
    if (column<W>(j) < width) store<W>(to + column<W>(j), sum[j]);
}

template <int W>
__device__ __forceinline__ float weigh(const float* output, const float* dy, float weight, float* doutput, int width) {
  float dot = 0;
#pragma unroll 4
  for (int i = TX * W; i < width; i += 256 * W) {
    Floats<W> x = load<W>(output + i), d = load<W>(dy + i);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      dot += x.v[k] * d.v[k];
      d.v[k] *= weight;
    }
    store<W>(doutput + i, d);
  }
  return dot;
}

} // namespace experts

// chosen [tokens, top_k] = the largest of each row of logits [tokens, experts], the largest first and of equal ones the first;
// weights [tokens, top_k] = their shares of the softmax over all experts (of_all) or over the chosen ones. 32 lanes a token.
// launch: grid (tokens / 8, rounded up), 256 threads.
KERNEL LAUNCH(256, 4) route(const float* logits, int* chosen, float* weights, int tokens, int experts, int top_k, int of_all) {
  int token = BX * 8 + TX / 32, lane = TX % 32;
  bool live = token < tokens;
  const float* row = logits + (int64_t)(live ? token : 0) * experts;
  int64_t own = (int64_t)token * top_k;
  int last = 0x7fffffff, last_at = -1;
  float top = 0, sum = 0;
  for (int c = 0; c < top_k; ++c) {
    int best = (int)0x80000000, at = 0x7fffffff;
    for (int i = lane; i < experts; i += 32) {
      int it = experts::order(row[i]);
      bool left = it < last || (it == last && i > last_at);
      if (left && (it > best || (it == best && i < at))) best = it, at = i;
    }
#pragma unroll
    for (int m = 16; m; m >>= 1) {
      int other = shfl_i(best, lane_() ^ m), other_at = shfl_i(at, lane_() ^ m);
      if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    float logit = row[at];
    top = c ? top : logit;
    sum += experts::exp_(logit - top);
    last = best, last_at = at;
    if (live && lane == c % 32) chosen[own + c] = at;
  }
  if (of_all) {
    sum = 0;
    for (int i = lane; i < experts; i += 32) sum += experts::exp_(row[i] - top);
    sum = run_sum<32>(sum);
  }
  if (live)
    for (int c = lane; c < top_k; c += 32) weights[own + c] = experts::exp_(row[chosen[own + c]] - top) / sum; // Its own writing.
}

// The layout by expert of n choices (below 2^24): starts [experts + 1], the row of each choice and the choice of each row; within an
// expert in the order of the choices.
// launch: grid (experts), 256 threads.
KERNEL LAUNCH(256, 4) group_by_expert(const int* chosen, int* row_of, int* choice_of, int* starts, int n, int experts) {
  __shared__ int counts[256];
  __shared__ float sums[256 / WARP];
  int each = (n + 255) / 256, from = TX * each, end = from + each < n ? from + each : n, below = 0, own = 0;
  for (int i = from; i < end; ++i) {
    below += chosen[i] < BX;
    own += chosen[i] == BX;
  }
  int start = (int)block_reduce<256>((float)below, false, sums);
  counts[TX] = own;
  for (int step = 1; step < 256; step <<= 1) { // What the threads up to this one have.
    block_sync();
    int before = TX >= step ? counts[TX - step] : 0;
    block_sync();
    counts[TX] += before;
  }
  int row = start + counts[TX] - own;
  for (int i = from; i < end; ++i)
    if (chosen[i] == BX) {
      row_of[i] = row;
      choice_of[row++] = i;
    }
  if (TX == 0) {
    starts[BX] = start;
    if (BX == experts - 1) starts[experts] = n;
  }
}

// out [rows, width]: row r is that of x [tokens, width], rows `stride` apart, whose choice it is.
// launch: grid (rows, width / 2048, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) expert_gather(const float* x, int stride, const int* choice_of, float* out, int top_k, int width) {
  const float* from = x + (int64_t)(choice_of[BX] / top_k) * stride;
  float* to = out + (int64_t)BX * width;
  if (((width | stride) & 3) == 0 && wide(x) && wide(out)) experts::copy<4>(from, to, width);
  else experts::copy<1>(from, to, width);
}

// out [tokens, width] = the sum over a token's choices of weights [tokens, top_k] (1 where null) times the choice's row of x.
// launch: grid (tokens, width / 2048, rounded up), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) expert_combine(const float* x, const int* row_of, const float* weights, float* out, int top_k, int width) {
  row_of += (int64_t)BX * top_k;
  weights = weights ? weights + (int64_t)BX * top_k : nullptr;
  float* to = out + (int64_t)BX * width;
  if (width % 4 == 0 && wide(x) && wide(out)) experts::combine<4>(x, row_of, weights, to, top_k, width);
  else experts::combine<1>(x, row_of, weights, to, top_k, width);
}

// The gradients of expert_combine from dy [tokens, width], rows dy_stride apart: doutputs [rows, width] and, by choice, dweights.
// launch: grid (choices), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 4) expert_combine_backward(const float* outputs, const float* dy, int dy_stride, const int* row_of, const float* weights,
                                              float* doutputs, float* dweights, int top_k, int width) {
  const float *x = outputs + (int64_t)row_of[BX] * width, *d = dy + (int64_t)(BX / top_k) * dy_stride;
  float* to = doutputs + (int64_t)row_of[BX] * width;
  bool by_four = ((width | dy_stride) & 3) == 0 && wide(outputs) && wide(dy) && wide(doutputs);
  float dot = by_four ? experts::weigh<4>(x, d, weights[BX], to, width) : experts::weigh<1>(x, d, weights[BX], to, width);
  dot = run_sum<256>(dot);
  if (TX == 0) dweights[BX] = dot;
}

// The gradient of logits [tokens, experts] from that of the weights, both by choice [tokens, top_k]; 32 lanes a token.
// launch: grid (tokens / 8, rounded up), 256 threads.
KERNEL LAUNCH(256, 4) route_backward(const float* logits, const int* chosen, const float* weights, const float* dweights, float* dlogits,
                                     int tokens, int experts, int top_k, int of_all) {
  int token = BX * 8 + TX / 32, lane = TX % 32;
  bool live = token < tokens;
  int64_t own = (int64_t)(live ? token : 0) * top_k;
  const float* row = logits + (int64_t)(live ? token : 0) * experts;
  float mean = 0, top = row[chosen[own]], sum = 0;
  for (int c = 0; c < top_k; ++c) mean += weights[own + c] * dweights[own + c];
  for (int i = lane; i < experts; i += 32) sum += experts::exp_(row[i] - top);
  sum = run_sum<32>(sum);
  for (int i = lane; live && i < experts; i += 32) {
    // Of all: those not chosen lower the share of those that are.
    float d = of_all ? -mean * experts::exp_(row[i] - top) / sum : 0.f;
    for (int c = 0; c < top_k; ++c)
      if (chosen[own + c] == i) d = weights[own + c] * (dweights[own + c] - mean);
    dlogits[(int64_t)token * experts + i] = d;
  }
}
