// Paged attention over float32 pages, for float32 models: the same segments and the same merging, on ordinary arithmetic.

// As attention_16x128, with queries as they are and pages of kv_write_f32; dim a multiple of 4, at most 256.
// A thread has a key of the segment, then a column of the values. Bound by its own multiplications.
// launch: grid (n, kv_heads), 256 threads.
KERNEL LAUNCH(256, 1) attention_f32(const float* q, const void* pages, const int* tables, const int* sequences, const int* items,
                                    const float* sinks, float* out, float* part, float* lse, int64_t q_stride, int heads, int kv_heads, int window, float scale, float cap, int dim) {
  constexpr int ROWS = 16, P_STRIDE = ROWS + 4;
  __shared__ __attribute__((aligned(16))) float queries[ROWS * 256], powers[KV_SEGMENT * P_STRIDE]; // [row][dim], [key][row]
  __shared__ Softmax softmax[ROWS];
  __shared__ Factors factors[ROWS];
  __shared__ int limits[ROWS], row_tokens[ROWS], row_heads[ROWS];
  Tile t;
  if (!tile_of(t, tables, sequences, items, ROWS, heads / kv_heads, window, limits, row_tokens, row_heads)) return;
  for (int r = 0; r < ROWS; ++r)
    if (TX < dim) queries[r * dim + TX] = r < t.rows ? q[row_tokens[r] * q_stride + row_heads[r] * dim + TX] : 0;
  if (TX < ROWS) softmax[TX] = {UNSEEN, 0};
  const Scale to_powers = scale_of(scale, cap);
  auto page = [&](int block) { return (const float*)pages + ((int64_t)t.blocks[block] * kv_heads + BY) * 2 * BLOCK * dim; };
  float values[ROWS] = {};
  for (int segment = t.begin; segment < t.end; ++segment) {
    block_sync();
    const int key = segment * KV_SEGMENT + TX;
    float scores[ROWS] = {};
    if (key >= t.first_key && key <= t.last) {
      const float* keys = page(key / BLOCK) + key % BLOCK * 4;
      for (int d = 0; d < dim; d += 4) {
        const f32x4 k = *(const f32x4*)(keys + d * BLOCK);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const f32x4 x = *(const f32x4*)(queries + r * dim + d);
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[r] = fma_(x.v[i], k.v[i], scores[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      powers[TX * P_STRIDE + r] = sees(t, limits[r], key) ? scaled(scores[r], to_powers) : UNSEEN;
    }
    block_sync();
    // A warp has every so manieth row.
    for (int r = TX / WARP; r < ROWS; r += 256 / WARP) {
      float top = UNSEEN, sum = 0;
      for (int i = lane_(); i < KV_SEGMENT; i += WARP) top = max_(top, powers[i * P_STRIDE + r]);
      top = warp_max(top);
      for (int i = lane_(); i < KV_SEGMENT; i += WARP) {
        float& score = powers[i * P_STRIDE + r];
        score = score == UNSEEN ? 0.f : exp2_(score - top);
        sum += score;
      }
      sum = warp_sum(sum);
      if (lane_() != 0) continue;
      factors[r] = merge(softmax[r], {top, sum});
      if (t.record < 0 || r >= t.rows) continue;
      float* record = record_of(part, t, limits[r], segment, row_heads[r], heads, dim);
      record[dim] = top;
      record[dim + 1] = sum;
    }
    block_sync();
    float added[ROWS] = {};
    if (TX < dim)
      for (int k = max_i(segment * KV_SEGMENT, t.first_key); k < min_i((segment + 1) * KV_SEGMENT, t.last + 1); ++k) {
        const float v = page(k / BLOCK)[BLOCK * dim + k % BLOCK * dim + TX];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) added[r] = fma_(powers[k % KV_SEGMENT * P_STRIDE + r], v, added[r]);
      }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (t.record < 0)
        values[r] = merged(values[r], added[r], factors[r]);
      else if (r < t.rows && TX < dim)
        record_of(part, t, limits[r], segment, row_heads[r], heads, dim)[TX] = added[r];
  }
  if (t.record >= 0) return;
  if (lse && TX < t.rows) lse[(int64_t)row_tokens[TX] * heads + row_heads[TX]] = log_sum(softmax[TX], sinks, row_heads[TX]);
  if (TX >= dim) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    if (r < t.rows)
      out[((int64_t)row_tokens[r] * heads + row_heads[r]) * dim + TX] = values[r] * inverse(softmax[r], sinks, row_heads[r]);
}
