// Paged attention of decode and prefill alike, on matrix units. Pages as in pages.cu.
//
// # One arithmetic
// Keys are cut into segments of 256 at fixed positions. A row takes the softmax of a segment in one piece: its largest score,
// exponentials rounded to bf16, their sum, the product with the values, all in one fixed order. Segments are then merged in
// order, in registers or by `attention_merge`, by the same operations. So which rows share a tile, how a prompt was cut into
// chunks, and over how many blocks of threads a context is split changes no bit of a row.
//
// # Who does what
// The query heads of a KV head are folded into rows (token * group + head of the group); a block of threads has a tile of
// 16 or 32 of them and a range of segments. Four warps share a segment: each has the scores of 64 keys, then a quarter of
// the columns of the values. So a key or value is read by one warp of a tile, once, straight into the registers of its
// product; only queries and probabilities pass through shared memory.
// Decode is bound by the bytes of the pages, prefill by the matrix units.

template <int D, int M, class E>
__device__ __forceinline__ void attend(const float* q, const void* pages, const int* tables, const int* sequences,
                                       const int* items, const float* sinks, float* out, float* part, float* lse, int64_t q_stride,
                                       int heads, int kv_heads, int window, float scale, float cap) {
  constexpr int ROWS = 16 * M, TILES = D / 16, MINE = (TILES + 3) / 4;
  constexpr int Q_STRIDE = D + 8, P_STRIDE = KV_SEGMENT + 8; // Rows begin in other banks, and on 16 bytes.
  constexpr bool CODES = sizeof(E) == 1;
  // Loads that are on their way at once, as many as there are registers for. RDNA's fragments take twice as many.
  constexpr bool FEW = LANE_ROWS == 8;
  [[maybe_unused]] constexpr int AHEAD = FEW ? 1 : 4, BLOCKS_AHEAD = FEW ? 1 : 4, COLUMNS = FEW && MINE > 2 ? 1 : MINE;
  __shared__ __attribute__((aligned(16))) uint16_t queries[ROWS * Q_STRIDE], powers[ROWS * P_STRIDE];
  __shared__ float tops[4][ROWS], sums[4][ROWS];
  __shared__ Factors factors[ROWS];
  __shared__ int limits[ROWS], row_tokens[ROWS], row_heads[ROWS];
  const int warp = TX / WARP, l = lane_();
  Tile t;
  if (!tile_of(t, tables, sequences, items, ROWS, heads / kv_heads, window, limits, row_tokens, row_heads)) return;
  for (int i = TX; i < ROWS * D / 8; i += 4 * WARP) {
    int r = i / (D / 8), d = i % (D / 8) * 8;
    const float* from = q + row_tokens[r] * q_stride + row_heads[r] * D + d;
    f32x4 low = *(const f32x4*)from, high = *(const f32x4*)(from + 4);
    u16x8 rounded;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      rounded.v[j] = r < t.rows ? to_bf(low.v[j]) : 0;
      rounded.v[4 + j] = r < t.rows ? to_bf(high.v[j]) : 0;
    }
    *(u16x8*)(queries + r * Q_STRIDE + d) = rounded;
  }
  block_sync();

  const int first_block = t.first_key / BLOCK, last_block = t.last / BLOCK;
  const int64_t page_size = page_bytes<E>(D);
  auto page = [&](int block) { return (const E*)((const char*)pages + ((int64_t)t.blocks[block] * kv_heads + BY) * page_size); };
  const Scale to_powers = scale_of(scale, cap);

  Sum values[M][MINE];
  Softmax softmax = {UNSEEN, 0}; // Of row TX.
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < MINE; ++i) values[m][i] = {};
  for (int segment = t.begin; segment < t.end; ++segment) {
    const int block0 = segment * (KV_SEGMENT / BLOCK);
    // Scores of this warp's 64 keys.
    Sum scores[M][4] = {};
    float value_scales[4][CN]; // Of codes.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int block = block0 + 2 * warp + i;
      if (block < first_block || block > last_block) continue;
      const E* keys = page(block);
#pragma unroll AHEAD
      for (int d = 0; d < D / 32; ++d) {
        Deep rows[M];
#pragma unroll
        for (int m = 0; m < M; ++m) rows[m] = deep_of_rows(queries + m * 16 * Q_STRIDE + d * 32, Q_STRIDE);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          Deep tile = deep_of_tile(keys + (n * (D / 8) + d * 4) * 128);
#pragma unroll
          for (int m = 0; m < M; ++m) {
            mma(scores[m][2 * i + n], rows[m].step[0], tile.step[0]);
            mma(scores[m][2 * i + n], rows[m].step[1], tile.step[1]);
          }
          if constexpr (FEW) in_order();
        }
      }
      if constexpr (D % 32 != 0)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            mma(scores[m][2 * i + n], step_of_rows(queries + m * 16 * Q_STRIDE + D - 16, Q_STRIDE),
                step_of_tile(keys + (n * (D / 8) + D / 8 - 2) * 128));
      if constexpr (CODES) {
        const float* scales = (const float*)(keys + 2 * BLOCK * D);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int j = 0; j < CN; ++j) {
            const int key = n * 16 + c_col(l, j);
            value_scales[2 * i + n][j] = scales[BLOCK + key];
#pragma unroll
            for (int m = 0; m < M; ++m) scores[m][2 * i + n].v[j] *= scales[key];
          }
      }
    }
    // The largest of each row.
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float top[LANE_ROWS];
#pragma unroll
      for (int i = 0; i < LANE_ROWS; ++i) top[i] = UNSEEN;
#pragma unroll
      for (int j = 0; j < CN; ++j) {
        const int limit = limits[m * 16 + c_row(l, j)];
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const int key = segment * KV_SEGMENT + warp * 64 + h * 16 + c_col(l, j);
          float& score = scores[m][h].v[j];
          score = sees(t, limit, key) ? scaled(score, to_powers) : UNSEEN;
          top[lane_row(j)] = max_(top[lane_row(j)], score);
        }
      }
#pragma unroll
      for (int i = 0; i < LANE_ROWS; ++i) {
        top[i] = row_max(top[i]);
        if (c_col(l, number_of_row(i)) == 0) tops[warp][m * 16 + c_row(l, number_of_row(i))] = top[i];
      }
    }
    block_sync();
    auto top_of = [&](int r) { return max_(max_(tops[0][r], tops[1][r]), max_(tops[2][r], tops[3][r])); };
    float own_top = UNSEEN;
    if (TX < ROWS) factors[TX] = merge_tops(softmax, own_top = top_of(TX));
    // Powers, rounded, and their sums.
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float top[LANE_ROWS], sum[LANE_ROWS];
#pragma unroll
      for (int i = 0; i < LANE_ROWS; ++i) {
        top[i] = top_of(m * 16 + c_row(l, number_of_row(i)));
        sum[i] = 0;
      }
#pragma unroll
      for (int j = 0; j < CN; ++j)
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const float score = scores[m][h].v[j];
          float power = score == UNSEEN ? 0.f : exp2_(score - top[lane_row(j)]);
          sum[lane_row(j)] += power;
          if constexpr (CODES) power = power == 0.f ? 0.f : power * value_scales[h][j];
          powers[(m * 16 + c_row(l, j)) * P_STRIDE + warp * 64 + h * 16 + c_col(l, j)] = to_bf(power);
        }
#pragma unroll
      for (int i = 0; i < LANE_ROWS; ++i) {
        sum[i] = row_sum(sum[i]);
        if (c_col(l, number_of_row(i)) == 0) sums[warp][m * 16 + c_row(l, number_of_row(i))] = sum[i];
      }
    }
    block_sync();
    float own_sum = 0;
    if (TX < ROWS) {
      own_sum = ((sums[0][TX] + sums[1][TX]) + sums[2][TX]) + sums[3][TX];
      softmax.sum = merged(softmax.sum, own_sum, factors[TX]);
    }
    auto record = [&](int r) { return record_of(part, t, limits[r], segment, row_heads[r], heads, D); };
    if (t.record >= 0 && TX < t.rows) {
      record(TX)[D] = own_top;
      record(TX)[D + 1] = own_sum;
    }
    // This warp's columns of the values, tiles warp, warp + 4 and so on.
#pragma unroll
    for (int first = 0; first < MINE; first += COLUMNS) {
      Sum added[M][COLUMNS] = {};
      auto add_block = [&](int block, bool whole) {
        const E* page_values = page(block) + BLOCK * D;
        const uint16_t* rows = powers + (block - block0) * BLOCK;
        Deep p[M];
#pragma unroll
        for (int m = 0; m < M; ++m) p[m] = deep_of_rows(rows + m * 16 * P_STRIDE, P_STRIDE);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          const int tile = warp + 4 * (first + i);
          if (TILES % 4 != 0 && tile >= TILES) continue;
          Deep v = deep_of_tile(page_values + tile * 512);
          if (!whole) // What no row of the tile sees may hold anything, so it becomes zero.
#pragma unroll
            for (int s = 0; s < 2; ++s)
#pragma unroll
              for (int j = 0; j < AN; ++j) {
                const int key = block * BLOCK + deep_k(l, s, j);
                if ((unsigned)(key - t.first_key) > (unsigned)(t.last - t.first_key)) v.step[s].v[j] = 0;
              }
#pragma unroll
          for (int m = 0; m < M; ++m) {
            mma(added[m][i], p[m].step[0], v.step[0]);
            mma(added[m][i], p[m].step[1], v.step[1]);
          }
        }
      };
      const int to = min_i(block0 + KV_SEGMENT / BLOCK, last_block + 1);
      const int whole_from = (t.first_key + BLOCK - 1) / BLOCK, whole_to = min_i(to, (t.last + 1) / BLOCK);
      for (int block = max_i(block0, first_block); block < to;) {
        if (block < whole_from || block + BLOCKS_AHEAD > whole_to) {
          add_block(block++, false);
          continue;
        }
#pragma unroll
        for (int i = 0; i < BLOCKS_AHEAD; ++i) add_block(block + i, true);
        block += BLOCKS_AHEAD;
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < CN; ++j) {
          const int r = m * 16 + c_row(l, j);
          if (t.record < 0) {
            const Factors f = factors[r];
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i)
              values[m][first + i].v[j] = merged(values[m][first + i].v[j], added[m][i].v[j], f);
          } else if (r < t.rows) {
            float* to = record(r) + c_col(l, j);
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i)
              if (TILES % 4 == 0 || warp + 4 * (first + i) < TILES) to[(warp + 4 * (first + i)) * 16] = added[m][i].v[j];
          }
        }
    }
  }
  if (t.record >= 0) return;
  if (TX < t.rows) {
    tops[0][TX] = inverse(softmax, sinks, row_heads[TX]);
    if (lse) lse[(int64_t)row_tokens[TX] * heads + row_heads[TX]] = log_sum(softmax, sinks, row_heads[TX]);
  }
  block_sync();
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < CN; ++j) {
      const int r = m * 16 + c_row(l, j);
      if (r >= t.rows) continue;
      float* to = out + ((int64_t)row_tokens[r] * heads + row_heads[r]) * D + c_col(l, j);
#pragma unroll
      for (int i = 0; i < MINE; ++i)
        if (TILES % 4 == 0 || warp + 4 * i < TILES) to[(warp + 4 * i) * 16] = values[m][i].v[j] * tops[0][r];
    }
}

// attention_16xD and attention_32xD: tiles of 16 or 32 folded rows, heads of D (32 only where D is at least 64).
// out [rows, heads * D] float32 of q [rows, heads * D] float32, `q_stride` apart (rows on 16 bytes), rounded to bf16; pages of
// one layer (kv_write_bf16, or _int8).
// sequences [.., 5]: the first row in q; how many rows, the last of its positions; positions in all; the block its table
// begins with; where that stands in `tables`.
// items [n, 5]: sequence (-1: padding), first folded row, first segment, the segment behind the last, record. With a record
// (not -1; the same for all items of a sequence), results of segments go to part [records, heads, D + 4], record + row of the
// sequence * its segments + segment, and attention_merge must follow; else an item has all segments (0 to any larger number).
// window: a row at p sees (p - window, p]; 0: all. cap: 0: none. sinks [heads] float32 or null. lse [rows, heads] float32 or null:
// the natural logarithm of each row's denominator, for who computes gradients.
// launch: grid (n, kv_heads), 4 warps.
#define ATTENTION(name, D, M, E)                                                                                         \
  KERNEL LAUNCH(4 * WARP, D * M > 256 ? 1 : 2)                                                                                             \
  name(const float* q, const void* pages, const int* tables, const int* sequences, const int* items, const float* sinks, \
       float* out, float* part, float* lse, int64_t q_stride, int heads, int kv_heads, int window, float scale, \
       float cap) {                                                                                                      \
    attend<D, M, E>(q, pages, tables, sequences, items, sinks, out, part, lse, q_stride, heads, kv_heads, window, scale, cap);                                                                                 \
  }
#define SMALL_TILES(D)                          \
  ATTENTION(attention_16x##D, D, 1, uint16_t)   \
  ATTENTION(attention_16x##D##_int8, D, 1, int8)
#define ALL_TILES(D)                            \
  SMALL_TILES(D)                                \
  ATTENTION(attention_32x##D, D, 2, uint16_t)   \
  ATTENTION(attention_32x##D##_int8, D, 2, int8)
SMALL_TILES(16)
SMALL_TILES(32)
ALL_TILES(64)
ALL_TILES(80)
ALL_TILES(96)
ALL_TILES(128)
ALL_TILES(256)
#undef ALL_TILES
#undef SMALL_TILES
#undef ATTENTION
