// The gradient of attention over packed sequences (FlashAttention-2's, Dao 2023): probabilities are computed again from the
// forward's lse, 32 queries by 32 keys at a time, and never exist whole.
//
// # Pages
// Queries and their gradients lie in pages of their own as keys and values do (pages.cu), each pair in both orders, so that
// products over dimensions and products over rows both find tiles: `first` = kv_write(k, v) or kv_write(q, dout), `second` =
// kv_write(v, k) or kv_write(dout, q). Sequences begin with a page; rows of a page behind a sequence's end are zero.
//
// # Who does what
// A block of threads owns 32 rows of one side (queries, or keys) and goes over the other side's blocks in order, so each sum
// has one owner and one order: no atomics, and a sequence's bits depend on nothing beside it. Each of four warps computes a
// quarter of the 32 x 32 probabilities, then has a quarter of the dimensions. Bound by the loads of tiles out of the caches.

// The probability of a pair and the gradient of its score, up to the scale.
struct Pair {
  float power, gradient;
};
__device__ __forceinline__ Pair pair_of(float score, float d_power, float lse, float delta, const Scale& to_powers) {
  float x = scaled(score, to_powers), power = exp2_(x - lse * LOG2_E), gradient = power * (d_power - delta);
  if (to_powers.cap > 0) {
    float t = x * rcp_(to_powers.cap);
    gradient *= 1 - t * t;
  }
  return {power, gradient};
}

// Which blocks of the other side a block sees: [begin, end).
struct Seen {
  int begin, end;
};
template <bool KEYS> __device__ __forceinline__ Seen seen_of(int own, int rows, int window) {
  int last = (rows - 1) / BLOCK;
  if (KEYS) return {own, (window > 0 ? min_i(last, (own * BLOCK + BLOCK - 1 + window - 1) / BLOCK) : last) + 1};
  return {window > 0 ? max_i(own * BLOCK + 1 - window, 0) / BLOCK : 0, own + 1};
}

template <int D, bool KEYS>
__device__ __forceinline__ void attention_back(const uint16_t* own_first, const uint16_t* own_second,
                                               const uint16_t* other_first, const uint16_t* other_second, const int* items,
                                               const float* lse, const float* delta, float* d_first, float* d_second,
                                               int heads, int kv_heads, int window, float scale, float cap) {
  constexpr int TILES = D / 16, MINE = (TILES + 3) / 4, STRIDE = BLOCK + 8;
  __shared__ __attribute__((aligned(16))) uint16_t powers[2][KEYS ? BLOCK * STRIDE : 8], gradients[2][BLOCK * STRIDE];
  const int* item = items + 4 * BX;
  const int first_row = item[0], rows = item[1], own = item[2], first_page = item[3];
  if (first_row < 0) return;
  const int warp = TX / WARP, l = lane_(), m = warp >> 1, n = warp & 1;
  const int group = heads / kv_heads, own_heads = KEYS ? kv_heads : heads, other_heads = KEYS ? heads : kv_heads;
  const unsigned span = window > 0 ? window : 1 << 30;
  const Scale to_powers = scale_of(scale, cap);
  const Seen seen = seen_of<KEYS>(own, rows, window);
  auto page = [&](int block, int head, int n_heads) { return ((int64_t)(first_page + block) * n_heads + head) * (2 * BLOCK * D); };
  const int64_t own_page = page(own, BY, own_heads) + m * (D / 8) * 128;

  Sum first[2][MINE] = {}, second[2][MINE] = {};
  int turn = 0;
  for (int g = 0; g < (KEYS ? group : 1); ++g) {
    const int other_head = KEYS ? BY * group + g : BY / group, query_head = KEYS ? other_head : BY;
    for (int block = seen.begin; block < seen.end; ++block, turn ^= 1) {
      const int64_t other_page = page(block, other_head, other_heads);
      Sum score = {}, d_power = {};
      auto over_dimensions = [&](Sum& sum, const uint16_t* left, const uint16_t* right) {
#pragma unroll 1
        for (int d = 0; d < D / 32; ++d) {
          Deep x = deep_of_left(left + d * 512), y = deep_of_tile(right + d * 512);
          mma(sum, x.step[0], y.step[0]);
          mma(sum, x.step[1], y.step[1]);
        }
        if constexpr (D % 32 != 0) mma(sum, step_of_left(left + (D / 32) * 512), step_of_tile(right + (D / 32) * 512));
      };
      const int64_t right = other_page + n * (D / 8) * 128;
      over_dimensions(score, own_first + own_page, other_first + right);
      over_dimensions(d_power, own_second + own_page, other_second + right);
#pragma unroll
      for (int j = 0; j < CN; ++j) {
        const int r = m * 16 + c_row(l, j), c = n * 16 + c_col(l, j);
        const int of_own = own * BLOCK + r, of_other = block * BLOCK + c;
        const int query = KEYS ? of_other : of_own, key = KEYS ? of_own : of_other;
        Pair pair = {0, 0};
        if (query < rows && (unsigned)(query - key) < span) {
          const int64_t at = (int64_t)(first_row + query) * heads + query_head;
          pair = pair_of(score.v[j], d_power.v[j], lse[at], delta[at], to_powers);
        }
        gradients[turn][r * STRIDE + c] = to_bf(pair.gradient);
        if constexpr (KEYS) powers[turn][r * STRIDE + c] = to_bf(pair.power);
      }
      block_sync(); // The next turn writes elsewhere, and waits here before the one behind it writes where this one reads.
      auto over_rows = [&](Sum (&sums)[2][MINE], const uint16_t* left, const uint16_t* values) {
        Deep x[2] = {deep_of_rows(left, STRIDE), deep_of_rows(left + 16 * STRIDE, STRIDE)};
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
          const int tile = warp + 4 * i;
          if (TILES % 4 != 0 && tile >= TILES) continue;
          Deep y = deep_of_tile(values + tile * 512);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma(sums[h][i], x[h].step[0], y.step[0]);
            mma(sums[h][i], x[h].step[1], y.step[1]);
          }
          in_order();
        }
      };
      over_rows(second, gradients[turn], other_second + other_page + BLOCK * D);
      if constexpr (KEYS) over_rows(first, powers[turn], other_first + other_page + BLOCK * D);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < CN; ++j) {
      const int row = own * BLOCK + h * 16 + c_row(l, j);
      if (row >= rows) continue;
      const int64_t at = ((int64_t)(first_row + row) * own_heads + BY) * D + c_col(l, j);
#pragma unroll
      for (int i = 0; i < MINE; ++i) {
        if (TILES % 4 != 0 && warp + 4 * i >= TILES) continue;
        d_second[at + (warp + 4 * i) * 16] = second[h][i].v[j] * scale;
        if constexpr (KEYS) d_first[at + (warp + 4 * i) * 16] = first[h][i].v[j];
      }
    }
}

// delta [rows, heads] = out . dout of each head, both [rows, heads * dim] float32: what the softmax takes from a gradient.
// Bound by memory. launch: grid (rows, heads / 4 rounded up), 4 warps.
KERNEL LAUNCH(4 * WARP, 4) attention_delta(const float* out, const float* dout, float* delta, int heads, int dim) {
  int head = BY * 4 + TX / WARP;
  if (head >= heads) return;
  int64_t at = ((int64_t)BX * heads + head) * dim;
  float sum = 0;
  for (int d = lane_(); d < dim; d += WARP) sum = fma_(out[at + d], dout[at + d], sum);
  sum = warp_sum(sum);
  if (lane_() == 0) delta[(int64_t)BX * heads + head] = sum;
}

// attention_back_queries_D: dq [rows, heads * D] float32; attention_back_keys_D: dk and dv [rows, kv_heads * D] float32.
// q_pages and dout_pages: kv_write_bf16(q, dout) and (dout, q); k_pages and v_pages: of (k, v) and (v, k), see above.
// items [n, 4]: the first row of a sequence (-1: padding), its rows, which of its blocks, its first page. lse (attention_16xD's),
// delta (attention_delta's) [rows, heads]. window, cap: as in attention_16xD.
// launch: grid (n, heads) for queries, (n, kv_heads) for keys, 4 warps.
#define ATTENTION_BACK(D)                                                                                                    \
  KERNEL LAUNCH(4 * WARP, 1)                                                                                                 \
  attention_back_queries_##D(const uint16_t* q_pages, const uint16_t* dout_pages, const uint16_t* k_pages,                  \
                             const uint16_t* v_pages, const int* items, const float* lse, const float* delta, float* dq,    \
                             int heads, int kv_heads, int window, float scale, float cap) {                                 \
    attention_back<D, false>(q_pages, dout_pages, k_pages, v_pages, items, lse, delta, nullptr, dq, heads, kv_heads, window, \
                             scale, cap);                                                                                    \
  }                                                                                                                          \
  KERNEL LAUNCH(4 * WARP, 1)                                                                                                 \
  attention_back_keys_##D(const uint16_t* q_pages, const uint16_t* dout_pages, const uint16_t* k_pages,                     \
                          const uint16_t* v_pages, const int* items, const float* lse, const float* delta, float* dk,       \
                          float* dv, int heads, int kv_heads, int window, float scale, float cap) {                         \
    attention_back<D, true>(k_pages, v_pages, q_pages, dout_pages, items, lse, delta, dv, dk, heads, kv_heads, window,      \
                            scale, cap);                                                                                     \
  }
ATTENTION_BACK(16)
ATTENTION_BACK(32)
ATTENTION_BACK(64)
ATTENTION_BACK(80)
ATTENTION_BACK(96)
ATTENTION_BACK(128)
ATTENTION_BACK(256)
#undef ATTENTION_BACK

// The same on ordinary arithmetic over pages of kv_write_f32. A thread has four pairs of 32 x 32, then a dimension.
template <bool KEYS>
__device__ __forceinline__ void attention_back_f32(const float* own_first, const float* own_second, const float* other_first,
                                                   const float* other_second, const int* items, const float* lse,
                                                   const float* delta, float* d_first, float* d_second, int heads,
                                                   int kv_heads, int window, float scale, float cap, int dim) {
  constexpr int STRIDE = BLOCK + 4;
  __shared__ float powers[KEYS ? BLOCK * STRIDE : 1], gradients[BLOCK * STRIDE]; // [other][own]
  const int* item = items + 4 * BX;
  const int first_row = item[0], rows = item[1], own = item[2], first_page = item[3];
  if (first_row < 0) return;
  const int group = heads / kv_heads, own_heads = KEYS ? kv_heads : heads, other_heads = KEYS ? heads : kv_heads;
  const unsigned span = window > 0 ? window : 1 << 30;
  const Scale to_powers = scale_of(scale, cap);
  const Seen seen = seen_of<KEYS>(own, rows, window);
  auto page = [&](int block, int head, int n_heads) { return ((int64_t)(first_page + block) * n_heads + head) * (2 * BLOCK * dim); };
  const int64_t own_page = page(own, BY, own_heads);
  const int r = TX / 8, of_own = own * BLOCK + r;
  float first[KEYS ? BLOCK : 1] = {}, second[BLOCK] = {};
  for (int g = 0; g < (KEYS ? group : 1); ++g) {
    const int other_head = KEYS ? BY * group + g : BY / group, query_head = KEYS ? other_head : BY;
    for (int block = seen.begin; block < seen.end; ++block) {
      const int64_t other_page = page(block, other_head, other_heads);
      float score[4] = {}, d_power[4] = {};
      for (int d = 0; d < dim; d += 4) {
        const f32x4 x = *(const f32x4*)(own_first + own_page + d * BLOCK + r * 4);
        const f32x4 y = *(const f32x4*)(own_second + own_page + d * BLOCK + r * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t at = other_page + d * BLOCK + (TX % 8 + 8 * i) * 4;
          const f32x4 z = *(const f32x4*)(other_first + at), w = *(const f32x4*)(other_second + at);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            score[i] = fma_(x.v[j], z.v[j], score[i]);
            d_power[i] = fma_(y.v[j], w.v[j], d_power[i]);
          }
        }
      }
      block_sync();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = TX % 8 + 8 * i, of_other = block * BLOCK + c;
        const int query = KEYS ? of_other : of_own, key = KEYS ? of_own : of_other;
        Pair pair = {0, 0};
        if (query < rows && (unsigned)(query - key) < span) {
          const int64_t at = (int64_t)(first_row + query) * heads + query_head;
          pair = pair_of(score[i], d_power[i], lse[at], delta[at], to_powers);
        }
        gradients[c * STRIDE + r] = pair.gradient;
        if constexpr (KEYS) powers[c * STRIDE + r] = pair.power;
      }
      block_sync();
      if (TX >= dim) continue;
      for (int c = 0; c < BLOCK; ++c) {
        const int64_t at = other_page + BLOCK * dim + c * dim + TX;
        const float x = other_second[at];
#pragma unroll
        for (int i = 0; i < BLOCK; ++i) second[i] = fma_(gradients[c * STRIDE + i], x, second[i]);
        if constexpr (KEYS) {
          const float y = other_first[at];
#pragma unroll
          for (int i = 0; i < BLOCK; ++i) first[i] = fma_(powers[c * STRIDE + i], y, first[i]);
        }
      }
    }
  }
  if (TX >= dim) return;
#pragma unroll
  for (int i = 0; i < BLOCK; ++i) {
    const int row = own * BLOCK + i;
    if (row >= rows) continue;
    const int64_t at = ((int64_t)(first_row + row) * own_heads + BY) * dim + TX;
    d_second[at] = second[i] * scale;
    if constexpr (KEYS) d_first[at] = first[i];
  }
}

// As attention_back_queries_D, in float32; dim a multiple of 4, at most 256. launch: grid (n, heads), 256 threads.
KERNEL LAUNCH(256, 1) attention_back_queries_f32(const float* q_pages, const float* dout_pages, const float* k_pages,
                                                 const float* v_pages, const int* items, const float* lse, const float* delta,
                                                 float* dq, int heads, int kv_heads, int window, float scale, float cap, int dim) {
  attention_back_f32<false>(q_pages, dout_pages, k_pages, v_pages, items, lse, delta, nullptr, dq, heads, kv_heads, window,
                            scale, cap, dim);
}

// As attention_back_keys_D, the same way. launch: grid (n, kv_heads), 256 threads.
KERNEL LAUNCH(256, 1) attention_back_keys_f32(const float* q_pages, const float* dout_pages, const float* k_pages,
                                              const float* v_pages, const int* items, const float* lse, const float* delta,
                                              float* dk, float* dv, int heads, int kv_heads, int window, float scale, float cap, int dim) {
  attention_back_f32<true>(k_pages, v_pages, q_pages, dout_pages, items, lse, delta, dv, dk, heads, kv_heads, window, scale,
                           cap, dim);
}
