// Segments of keys, their softmax and the merging of them: what all attention kernels share.
constexpr int KV_SEGMENT = 256;
constexpr float UNSEEN = -1e30f, LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

__device__ __forceinline__ int min_i(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int max_i(int a, int b) { return a > b ? a : b; }

// Scores in powers of two: score * factor, or capped: cap * tanh(score / cap).
struct Scale {
  float factor, cap;
};
__device__ __forceinline__ Scale scale_of(float scale, float cap) {
  return cap > 0 ? Scale{scale / cap * (2 * LOG2_E), cap * LOG2_E} : Scale{scale * LOG2_E, 0};
}
__device__ __forceinline__ float scaled(float score, const Scale& scale) {
  float x = score * scale.factor;
  return scale.cap > 0 ? scale.cap - 2 * scale.cap * rcp_(exp2_(x) + 1) : x;
}

// The softmax so far, or of a segment: the largest score and the sum of powers below it.
struct Softmax {
  float top, sum;
};

// Adds a segment to what came before: what to multiply either's values with.
struct Factors {
  float before, segment;
};
__device__ __forceinline__ float merged(float before, float segment, const Factors& f) {
  return fma_(before, f.before, segment * f.segment);
}
__device__ __forceinline__ Factors merge_tops(Softmax& all, float segment_top) { // The sum is then to be merged.
  float top = max_(all.top, segment_top);
  Factors f = {exp2_(all.top - top), exp2_(segment_top - top)};
  all.top = top;
  return f;
}
__device__ __forceinline__ Factors merge(Softmax& all, const Softmax& segment) {
  Factors f = merge_tops(all, segment.top);
  all.sum = merged(all.sum, segment.sum, f);
  return f;
}

// What the merged values are multiplied with in the end. A sink is a score without a value.
__device__ __forceinline__ float inverse(const Softmax& all, const float* sinks, int head) {
  if (!sinks) return rcp_(all.sum);
  Softmax with = all;
  Factors f = merge(with, {sinks[head] * LOG2_E, 1.f});
  return f.before * rcp_(with.sum);
}

// The natural logarithm of the softmax's denominator, a sink in it.
__device__ __forceinline__ float log_sum(const Softmax& all, const float* sinks, int head) {
  Softmax with = all;
  if (sinks) merge(with, {sinks[head] * LOG2_E, 1.f});
  return (with.top + log2_(with.sum)) * LN_2;
}

// The tile of a block of threads: its rows and which segments of which keys.
struct Tile {
  int rows;            // of them filled
  int position;        // of the sequence's first row
  int last;            // position of the tile's last row
  int first_key;       // that any row sees
  int begin, end;      // segments
  int segments;        // of the sequence, as records have them
  int64_t record;      // the first of the sequence's, or -1: the result goes to out
  unsigned span;       // how many keys a row sees
  const int* blocks;   // of the sequence, by their numbers in it
};

// items [.., 5], sequences [.., 5]: see attention_16x128. False: nothing to do.
__device__ __forceinline__ bool tile_of(Tile& t, const int* tables, const int* sequences, const int* items, int rows, int group,
                                        int window, int* limits, int* tokens, int* heads) {
  const int* item = items + 5 * BX;
  if (item[0] < 0) return false;
  const int* sequence = sequences + 5 * item[0];
  int first_row = sequence[0], n_rows = sequence[1], kv_len = sequence[2], folded = item[1];
  t.position = kv_len - n_rows;
  t.rows = min_i(rows, n_rows * group - folded);
  int first = t.position + folded / group;
  t.last = t.position + (folded + t.rows - 1) / group;
  t.first_key = window > 0 ? max_i(first + 1 - window, 0) : 0;
  t.begin = max_i(item[2], t.first_key / KV_SEGMENT);
  t.end = min_i(item[3], t.last / KV_SEGMENT + 1);
  t.segments = (kv_len + KV_SEGMENT - 1) / KV_SEGMENT;
  t.record = item[4];
  t.span = window > 0 ? window : 1 << 30;
  t.blocks = tables + sequence[4] - sequence[3];
  if (t.begin >= t.end) return false;
  if (TX < rows) {
    int token = (folded + TX) / group;
    bool filled = TX < t.rows;
    limits[TX] = filled ? t.position + token : -1;
    tokens[TX] = filled ? first_row + token : first_row;
    heads[TX] = BY * group + (folded + TX) % group;
  }
  block_sync();
  return true;
}

// Whether a row that may see up to `limit` sees a key.
__device__ __forceinline__ bool sees(const Tile& t, int limit, int key) { return (unsigned)(limit - key) < t.span; }

// Where a split row's results of a segment lie: [records, heads] of dim + 4 floats: values, largest score, sum, nothing.
__device__ __forceinline__ float* record_of(float* part, const Tile& t, int limit, int segment, int head, int heads,
                                            int dim) {
  int64_t record = t.record + (int64_t)(limit - t.position) * t.segments + segment;
  return part + (record * heads + head) * (dim + 4);
}

// out [.., heads, dim] of split rows: their segments in order. merges [n, 4]: row of out, its position, its first record, -; a
// row of -1 is padding. window, sinks, lse: as in attention_16x128. Bound by the bytes of the records.
// launch: grid (n, heads), 64 threads.
KERNEL LAUNCH(64, 8) attention_merge(const float* part, const int* merges, const float* sinks, float* out, float* lse, int heads,
                                     int dim, int window) {
  const int* item = merges + 4 * BX;
  int row = item[0], limit = item[1], head = BY, d = TX * 4;
  if (row < 0 || d >= dim) return;
  int first = window > 0 ? max_i(limit + 1 - window, 0) / KV_SEGMENT : 0;
  Softmax all = {UNSEEN, 0};
  f32x4 values = {};
#pragma unroll 4
  for (int segment = first; segment <= limit / KV_SEGMENT; ++segment) {
    const float* record = part + ((int64_t)(item[2] + segment) * heads + head) * (dim + 4);
    f32x4 more = *(const f32x4*)(record + d), softmax = *(const f32x4*)(record + dim);
    Factors f = merge(all, {softmax.v[0], softmax.v[1]});
#pragma unroll
    for (int i = 0; i < 4; ++i) values.v[i] = merged(values.v[i], more.v[i], f);
  }
  if (lse && TX == 0) lse[(int64_t)row * heads + head] = log_sum(all, sinks, head);
  float by = inverse(all, sinks, head);
#pragma unroll
  for (int i = 0; i < 4; ++i) values.v[i] *= by;
  *(f32x4*)(out + ((int64_t)row * heads + head) * dim + d) = values;
}
