// What sampling and log-probabilities ask of a row of logits, split over blocks: its maximum, its mass, its best tokens.
//
// A token's mass is an integer: exp((logit - maximum) / T) in units of 2^-44, from a float32 exp whose every operation is
// rounded alike on a CPU (backend/src/sample/mass.rs) and here. Sums of integers have no order, so both choose the same
// tokens, however a row is split and whatever stands beside it.

constexpr int SPLIT = 4096;  // Tokens of a block.
constexpr int EACH = SPLIT / 256;
constexpr int CUTS = 4;  // Candidates of a draw are the tokens above one of these weights.
constexpr int MASSES = CUTS + 2;
__device__ __forceinline__ float cut_of(int c) { return c == 0 ? 0x1p-4f : c == 1 ? 0x1p-8f : c == 2 ? 0x1p-13f : 0x1p-44f; }

// What is asked of a row (kernels/src/sample.rs writes it).
struct alignas(16) Ask {
  int given;            // This token is taken, whatever the logits say. -1: none.
  int n_top;            // Alternatives wanted with its log-probability. -1: no log-probability.
  uint32_t draw[2];     // 64 random bits, the lower half first.
  float inverse;        // Of the temperature. 0: the most likely token.
  float least;          // Weight below which a token is never drawn, of the heaviest's. At least 2^-44.
  int top_k;            // 0: all.
  int mask;             // Which of the masks. -1: none.
  uint32_t top_p[2];    // In units of 2^-64. 0: all.
  int none[2];
};

// To a logit: + bias, then divided (or multiplied, below 0) by repetition, then - penalty.
struct alignas(16) Edit {
  int token;
  float bias, repetition, penalty;
};

constexpr float MINUS_INFINITY = __builtin_bit_cast(float, 0xff800000u);

// The order of floats as the order of integers. -0 is 0. NaN is above all.
__device__ __forceinline__ uint32_t ordered(float f) {
  F x;
  x.f = f;
  if (f != f) return 0xffffffffu;
  if (f == 0) x.i = 0;
  return x.i >> 31 ? ~x.i : x.i | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint64_t key) {
  uint32_t o = (uint32_t)(key >> 32);
  F x;
  x.i = o >> 31 ? o & 0x7fffffffu : ~o;
  return x.f;
}
// A token by its logit; the lower id above its equals.
__device__ __forceinline__ uint64_t key_of(float logit, int token) { return (uint64_t)ordered(logit) << 32 | ~(uint32_t)token; }
__device__ __forceinline__ int token_of(uint64_t key) { return (int)~(uint32_t)key; }
__device__ __forceinline__ bool above_minus_infinity(uint64_t key) { return (uint32_t)(key >> 32) > 0x007fffffu; }
__device__ __forceinline__ bool is_finite(uint64_t key) { return above_minus_infinity(key) && (uint32_t)(key >> 32) < 0xff800000u; }

// exp for x <= 0, relative error below 3e-7; 0 below -87.
__device__ __forceinline__ float exp_exact(float x) {
  const float MAGIC = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  float low = x > -87.f ? x : -87.f;
  F rounded, power;
  rounded.f = mul_(low, 1.44269504f) + MAGIC;
  float n = rounded.f - MAGIC;
  float r = (low - mul_(n, 0.6933594f)) + mul_(n, 2.1219444e-4f);  // ln 2 in two parts
  float p = 1.9875692e-4f;
  p = mul_(p, r) + 1.3981999e-3f;
  p = mul_(p, r) + 8.333452e-3f;
  p = mul_(p, r) + 4.1665796e-2f;
  p = mul_(p, r) + 1.6666665e-1f;
  p = mul_(p, r) + 0.5f;
  p = (mul_(mul_(p, r), r) + r) + 1.f;
  power.i = (rounded.i + 127u) << 23;
  return x < -87.f ? 0.f : mul_(p, power.f);
}

// A token's weight beside the heaviest's, 1; 0 when it is never drawn.
__device__ __forceinline__ float weight_of(float logit, float maximum, const Ask& ask) {
  float weight = exp_exact(mul_(logit - maximum, ask.inverse));
  return weight < ask.least ? 0.f : weight;
}

// Masses of weights from 0 to 1, in units of 2^-44, by two halves of 22 bits.
struct Mass {
  int high = 0, low = 0;
  __device__ __forceinline__ void add(float weight) {
    const float MAGIC = 12582912.f;
    F h, l;
    float scaled = mul_(weight, 4194304.f);
    h.f = scaled + MAGIC;
    l.f = mul_(scaled - (h.f - MAGIC), 4194304.f) + MAGIC;
    high += h.s - 0x4b400000;
    low += l.s - 0x4b400000;
  }
  __device__ __forceinline__ uint64_t sum() const { return (uint64_t)(((int64_t)high << 22) + low); }
};
__device__ __forceinline__ uint64_t mass_of(float weight) {
  Mass mass;
  mass.add(weight);
  return mass.sum();
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t v) {
#pragma unroll
  for (int m = WARP / 2; m; m >>= 1) v += shfl_u64(v, lane_() ^ m);
  return v;
}
// `red` of 32 is free again after the next block_sync.
template <int NT> __device__ __forceinline__ uint64_t block_max(uint64_t v, uint64_t* red) {
#pragma unroll
  for (int m = WARP / 2; m; m >>= 1) {
    uint64_t other = shfl_u64(v, lane_() ^ m);
    v = other > v ? other : v;
  }
  block_sync();
  if (lane_() == 0) red[TX / WARP] = v;
  block_sync();
  v = red[0];
#pragma unroll
  for (int w = 1; w < NT / WARP; ++w) v = red[w] > v ? red[w] : v;
  return v;
}

// The best key of a row, before (0) or after its edits (1).
template <int NT> __device__ __forceinline__ uint64_t row_best(const uint64_t* best, int row, int splits, int which, uint64_t* red) {
  uint64_t mine = 0;
  for (int s = TX; s < splits; s += NT) {
    uint64_t key = best[((int64_t)row * splits + s) * 2 + which];
    mine = key > mine ? key : mine;
  }
  return block_max<NT>(mine, red);
}

// Four logits from token `at` on, of a row at whose end there may be fewer.
__device__ __forceinline__ f32x4 four(const float* row, int at, int vocab) {
  if (vocab % 4 == 0 && at < vocab) return *(const f32x4*)(row + at);
  f32x4 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.v[i] = at + i < vocab ? row[at + i] : MINUS_INFINITY;
  return v;
}

// The thread's logits of its block's split, and which tokens they are of.
struct Split {
  float v[EACH];
  __device__ __forceinline__ static int place(int j) { return j / 4 * 1024 + TX * 4 + j % 4; }
  __device__ __forceinline__ static int token(int j) { return BX * SPLIT + place(j); }

  __device__ __forceinline__ void load(const float* row, int vocab) {
#pragma unroll
    for (int j = 0; j < EACH; j += 4) *(f32x4*)(v + j) = four(row, token(j), vocab);
  }
  // Minus infinity where a mask forbids, here and in memory.
  __device__ __forceinline__ void mask(float* row, int vocab, const uint32_t* allowed, int words) {
#pragma unroll
    for (int j = 0; j < EACH; j += 4) {
      int at = token(j);
      uint32_t bits = at / 32 < words ? allowed[at / 32] >> (at & 31) : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(bits >> i & 1) && at + i < vocab) row[at + i] = v[j + i] = MINUS_INFINITY;
    }
  }
  // With a row's edits from `from` to `to`; the logits before and after go to memory where that is given.
  __device__ __forceinline__ void edit(const Edit* edits, int from, int to, float* values, float* unedited, float* row) {
    block_sync();
#pragma unroll
    for (int j = 0; j < EACH; j += 4) *(f32x4*)(values + place(j)) = *(f32x4*)(v + j);
    block_sync();
    for (int e = from + TX; e < to; e += 256) {
      Edit edit = edits[e];
      float& at = values[edit.token - BX * SPLIT];
      float x = at;
      if (unedited) unedited[e] = x;
      x = edit.bias == MINUS_INFINITY ? MINUS_INFINITY : x + edit.bias;
      x = x > 0 ? x / edit.repetition : mul_(x, edit.repetition);
      at = x - edit.penalty;
      if (row) row[edit.token] = at;
    }
    block_sync();
#pragma unroll
    for (int j = 0; j < EACH; j += 4) *(f32x4*)(v + j) = *(f32x4*)(values + place(j));
    block_sync();
  }
  __device__ __forceinline__ uint64_t best() const {
    uint64_t most = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      uint64_t key = key_of(v[j], token(j));
      most = key > most ? key : most;
    }
    return most;
  }
};

// The best tokens of each split, as keys. First logits [rows, vocab] become minus infinity where a mask forbids.
//   asks [rows]; edits, those of row r and split s from edit_starts[r, s] to [r, s + 1], of [rows, splits + 1];
//   masks [.., mask_words]: bits of allowed tokens; best [rows, splits, 2]: before and after the edits;
//   top [rows, splits, n_top]: best first, 0 when there are no more.
// Bound by one read of the logits.
// launch: grid (splits, rows), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) logit_maxima(float* logits, const Ask* asks, const Edit* edits, const int* edit_starts, const uint32_t* masks, uint64_t* best,
                                   uint64_t* top, int vocab, int splits, int mask_words, int n_top) {
  __shared__ uint64_t red[32];
  __shared__ float values[SPLIT];
  Ask ask = asks[BY];
  float* row = logits + (int64_t)BY * vocab;
  int64_t at = (int64_t)BY * splits + BX;
  Split split;
  split.load(row, vocab);
  if (ask.mask >= 0) split.mask(row, vocab, masks + (int64_t)ask.mask * mask_words, mask_words);
  uint64_t most = block_max<256>(split.best(), red);
  if (TX == 0) best[at * 2] = most;
  uint64_t last = ~0ull;
  for (int n = 0; n < ask.n_top; ++n) {
    uint64_t next = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      uint64_t key = key_of(split.v[j], Split::token(j));
      if (key < last && key > next && above_minus_infinity(key)) next = key;
    }
    last = block_max<256>(next, red);
    if (TX == 0) top[at * n_top + n] = last;
  }
  int from = edit_starts[BY * (splits + 1) + BX], to = edit_starts[BY * (splits + 1) + BX + 1];
  if (from < to && ask.given < 0) {
    split.edit(edits, from, to, values, nullptr, nullptr);
    most = block_max<256>(split.best(), red);
  }
  if (TX == 0) best[at * 2 + 1] = most;
}

// What each split weighs. The edits of rows that are drawn from are made, in logits; what stood there goes to unedited [edits].
//   masses [rows, splits, 6]: of exp(logit - maximum) before the edits, where a log-probability is wanted; of the weights
//   above each of four cuts, where a token is drawn; how many these are, 13 bits each.
// Bound by one read of the logits.
// launch: grid (splits, rows), 256 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(256, 2) logit_masses(float* logits, const Ask* asks, const Edit* edits, const int* edit_starts, const uint64_t* best, float* unedited,
                                   uint64_t* masses, int vocab, int splits) {
  __shared__ uint64_t red[32];
  __shared__ uint64_t parts[MASSES * 256 > SPLIT / 2 ? MASSES * 256 : SPLIT / 2];
  Ask ask = asks[BY];
  float* row = logits + (int64_t)BY * vocab;
  bool draws = ask.given < 0 && ask.inverse > 0, scores = ask.n_top >= 0;
  if (!draws && !scores) return;
  Split split;
  split.load(row, vocab);
  Mass all;
  if (scores) {
    float maximum = value_of(row_best<256>(best, BY, splits, 0, red));
#pragma unroll
    for (int j = 0; j < EACH; ++j) all.add(exp_exact(split.v[j] - maximum));
  }
  Mass above[CUTS];
  uint64_t counts = 0;
  if (draws) {
    int from = edit_starts[BY * (splits + 1) + BX], to = edit_starts[BY * (splits + 1) + BX + 1];
    if (from < to) split.edit(edits, from, to, (float*)parts, unedited, row);
    float maximum = value_of(row_best<256>(best, BY, splits, 1, red));
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      float weight = weight_of(split.v[j], maximum, ask);
#pragma unroll
      for (int c = 0; c < CUTS; ++c) {
        bool is_above = weight >= cut_of(c);
        above[c].add(is_above ? weight : 0.f);
        counts += is_above ? 1ull << 13 * c : 0;
      }
    }
  }
  block_sync();
  parts[TX] = all.sum();
#pragma unroll
  for (int c = 0; c < CUTS; ++c) parts[(1 + c) * 256 + TX] = above[c].sum();
  parts[(1 + CUTS) * 256 + TX] = counts;
  block_sync();
  for (int m = TX / WARP; m < MASSES; m += 256 / WARP) {
    uint64_t sum = 0;
    for (int i = lane_(); i < 256; i += WARP) sum += parts[m * 256 + i];
    sum = warp_sum(sum);
    if (lane_() == 0) masses[((int64_t)BY * splits + BX) * MASSES + m] = sum;
  }
}
