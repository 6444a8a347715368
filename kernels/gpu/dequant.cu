// y = x Wt for few rows, W [N, K] in codes of 4 or 8 bits, and codes made bfloat16 for many. Bound by reading W: every lane reads
// 16 bytes of it at a time, one or two such reads are under way in each wave, and the waves of a block share K. The products are
// tiles of the matrix units, most of whose rows may be empty: they would be idle.
//
// As on the CPU x and the levels of codes are rounded to bfloat16, and scales are applied to float32 sums.
namespace few {

// A quad is four neighbours of k in a lane's part of a tile; its line is a row of x or a column of the result. A tile's 16
// values of k may stand in any order that is the same on both sides: they stand as four quads, q = 0..3.
constexpr int QUADS = AN / 4;
constexpr bool LINE_EACH = RUN != 2; // All quads of a lane are of one line; on NVIDIA each is of another.
__device__ __forceinline__ int line(int l, int i) { return LINE_EACH ? l & 15 : (l >> 2) + 8 * i; }
__device__ __forceinline__ int quad(int l, int i) { return LINE_EACH ? QUADS * (l >> 4) % 4 + i : l & 3; }
// Where two of its four, the first (p = 0) or the last, stand among the pairs of a left side; on a right side at 2 i + p.
__device__ __forceinline__ int left(int i, int p) { return LINE_EACH ? 2 * i + p : i + 2 * p; }

// A lane's part of a tile in pairs of bfloat16, the first in the low half.
struct Pairs { uint32_t v[AN / 2]; };
__device__ __forceinline__ uint32_t pair(float low, float high) { return (uint32_t)to_bf(low) | (uint32_t)to_bf(high) << 16; }
struct alignas(16) Unit { uint32_t v[4]; };

// Codes of a row lie in pieces of 64 bytes, each four units of 16: unit q holds quad q of all the tiles of the piece, in order.
template <int BITS> struct Piece {
  static constexpr int SPAN = 64 * 8 / BITS; // of K
  static constexpr int TILES = SPAN / 16;
};
constexpr int AHEAD = QUADS == 1 ? 2 : 1; // Pieces whose codes are under way.

// Levels by code, for one look-up a byte: of two codes of 4 bits, or of one of 8 bits twice. Every eighth lane has a copy of its own,
// so that lanes meet less in a bank.
constexpr int COPIES = 8;
template <int BITS> __device__ __forceinline__ void fill(uint32_t* table, const float* levels) {
  uint32_t entry = BITS == 4 ? pair(levels[TX & 15], levels[TX >> 4 & 15]) : pair(levels[TX], levels[TX]);
#pragma unroll
  for (int copy = 0; copy < COPIES; ++copy) table[TX * COPIES + copy] = entry;
}

// The quad of a tile.
template <int BITS> __device__ __forceinline__ void decode(const Unit& unit, int tile, const uint32_t* table, uint32_t& first, uint32_t& last) {
  if constexpr (BITS == 8) {
    uint32_t word = unit.v[tile];
    first = (table[(word & 255) * COPIES] & 0xffffu) | (table[(word >> 8 & 255) * COPIES] & 0xffff0000u);
    last = (table[(word >> 16 & 255) * COPIES] & 0xffffu) | (table[(word >> 24) * COPIES] & 0xffff0000u);
  } else {
    uint32_t word = unit.v[tile >> 1] >> 16 * (tile & 1);
    first = table[(word & 255) * COPIES];
    last = table[(word >> 8 & 255) * COPIES];
  }
}

struct Job {
  const float* x;
  const uint8_t* w;
  const float *levels, *scales, *offsets, *bias;
  const float* residual;
  float* y;
  int64_t x_stride, y_stride;
  int rows, n, k, row_bytes, group, groups;
};

// What the waves of a block share.
struct Room {
  uint32_t table[256 * COPIES];
  float shares[256 / WARP][256];
};

// A tile of the result. PER tiles of K are summed before they are scaled: they are of one group.
template <int BITS, int PER, bool OFFSETS> __device__ __forceinline__ void tile_of(const Job& job, Room& room) {
  using P = Piece<BITS>;
  constexpr int WAVES = 256 / WARP, HOLD = QUADS == 1 ? P::TILES : 2; // Tiles whose x and scales are read together.
  const int l = lane_(), wave = TX / WARP, row0 = BY * 16, column0 = BX * 16;
  const int rows = job.rows - row0, pieces = (job.k + P::SPAN - 1) / P::SPAN;
  const uint32_t* own = room.table + (l & (COPIES - 1));
  const float* x[QUADS];
  const uint8_t* w[QUADS];
  int scale_row[CN];
#pragma unroll
  for (int i = 0; i < QUADS; ++i) {
    x[i] = job.x + (row0 + (line(l, i) < rows ? line(l, i) : 0)) * job.x_stride;
    const int column = column0 + line(l, i) < job.n ? column0 + line(l, i) : job.n - 1;
    w[i] = job.w + (int64_t)column * job.row_bytes;
  }
#pragma unroll
  for (int j = 0; j < CN; ++j) scale_row[j] = (column0 + c_col(l, j) < job.n ? column0 + c_col(l, j) : job.n - 1) * job.groups;
  const bool folds_are_groups = job.group == 16 * PER;
  Sum all, some, of_x;
  Half ones;
#pragma unroll
  for (int j = 0; j < AN; ++j) ones.v[j] = 0x3f80;
#pragma unroll
  for (int j = 0; j < CN; ++j) all.v[j] = some.v[j] = of_x.v[j] = 0;

  for (int first = wave; first < pieces; first += WAVES * AHEAD) {
    Unit units[AHEAD][QUADS];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
#pragma unroll
      for (int i = 0; i < QUADS; ++i) {
        const int at = (first + a * WAVES) * 64 + 16 * quad(l, i);
        units[a][i] = *(const Unit*)(w[i] + (at < job.row_bytes ? at : 0)); // Beyond the end x is zero.
      }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int piece = first + a * WAVES, k0 = piece * P::SPAN;
      if (piece >= pieces) break;
      Pairs left_side[HOLD];
      float scales[HOLD][CN], offsets[HOLD][CN];
#pragma unroll
      for (int t = 0; t < P::TILES; ++t) {
        if (t % HOLD == 0) {
          Four raw[HOLD][QUADS];
#pragma unroll
          for (int h = 0; h < HOLD; ++h) {
#pragma unroll
            for (int i = 0; i < QUADS; ++i) {
              const int at = k0 + 16 * (t + h) + 4 * quad(l, i);
              raw[h][i] = *(const Four*)(x[i] + (at < job.k ? at : 0));
            }
            if ((t + h + 1) % PER) continue;
            const int fold = (t + h) / PER;
            int group = folds_are_groups ? piece * (P::TILES / PER) + fold : (k0 + 16 * PER * fold) / job.group;
            if (group >= job.groups) group = 0; // Likewise.
#pragma unroll
            for (int j = 0; j < CN; ++j) {
              scales[h][j] = job.scales[scale_row[j] + group];
              if (OFFSETS) offsets[h][j] = job.offsets[scale_row[j] + group];
            }
          }
#pragma unroll
          for (int h = 0; h < HOLD; ++h)
#pragma unroll
            for (int i = 0; i < QUADS; ++i) {
              const int at = k0 + 16 * (t + h) + 4 * quad(l, i);
              const f32x4 v = __builtin_bit_cast(f32x4, together(raw[h][i]));
              left_side[h].v[left(i, 0)] = at < job.k ? pair(v.v[0], v.v[1]) : 0;
              left_side[h].v[left(i, 1)] = at < job.k ? pair(v.v[2], v.v[3]) : 0;
            }
        }
        Pairs right_side;
#pragma unroll
        for (int i = 0; i < QUADS; ++i) decode<BITS>(units[a][i], t, own, right_side.v[2 * i], right_side.v[2 * i + 1]);
        const Half x_half = __builtin_bit_cast(Half, left_side[t % HOLD]), w_half = __builtin_bit_cast(Half, right_side);
        mma(some, x_half, w_half);
        if (OFFSETS) mma(of_x, x_half, ones);
        if ((t + 1) % PER == 0)
#pragma unroll
          for (int j = 0; j < CN; ++j) {
            all.v[j] += some.v[j] * scales[t % HOLD][j];
            if (OFFSETS) all.v[j] += of_x.v[j] * offsets[t % HOLD][j];
            some.v[j] = of_x.v[j] = 0;
          }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < CN; ++j) room.shares[wave][c_row(l, j) * 16 + c_col(l, j)] = all.v[j];
  block_sync();
  const int row = TX / 16, column = column0 + TX % 16;
  if (row >= rows || column >= job.n) return;
  float sum = room.shares[0][TX];
#pragma unroll
  for (int i = 1; i < WAVES; ++i) sum += room.shares[i][TX];
  if (job.bias) sum += job.bias[column];
  if (job.residual) sum += job.residual[(row0 + row) * job.y_stride + column];
  job.y[(row0 + row) * job.y_stride + column] = sum;
}

template <int BITS, int PER> __device__ __forceinline__ void scaled(const Job& job, Room& room) {
  if (job.offsets) tile_of<BITS, PER, true>(job, room);
  else tile_of<BITS, PER, false>(job, room);
}

template <int BITS> __device__ __forceinline__ void product(const Job& job) {
  __shared__ Room room;
  constexpr int ALL = Piece<BITS>::TILES;
  fill<BITS>(room.table, job.levels);
  block_sync();
  if (job.group % (16 * ALL) == 0 || job.group >= job.k) scaled<BITS, ALL>(job, room);
  else if (job.group == 64) scaled<BITS, 4>(job, room);
  else if (job.group == 32) scaled<BITS, 2>(job, room);
  else scaled<BITS, 1>(job, room);
}

// Eight neighbours of k of row BX as bfloat16, level * scale + offset, each rounded by itself.
template <int BITS>
__device__ __forceinline__ void dequantise(const uint8_t* codes, const float* levels, const float* scales, const float* offsets, uint16_t* to, int k, int row_bytes,
                                           int group, int groups) {
  __shared__ float table[1 << BITS];
  if (TX < 1 << BITS) table[TX] = levels[TX];
  block_sync();
  constexpr int SPAN = Piece<BITS>::SPAN;
  const int first = (BY * 256 + TX) * 8;
  if (first >= k) return;
  codes += (int64_t)BX * row_bytes + first / SPAN * 64;
  to += (int64_t)BX * k + first;
  u16x8 out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = first + 4 * half, tile = at % SPAN / 16, q = at % 16 / 4;
    const uint8_t* quad = codes + 16 * q + tile * BITS / 2;
    uint32_t word = BITS == 4 ? *(const uint16_t*)quad : *(const uint32_t*)quad;
    const int64_t place = (int64_t)BX * groups + (at < k ? at / group : 0);  // Groups are fours.
    const float scale = scales[place], offset = offsets ? offsets[place] : 0.f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float v = mul_(table[word >> BITS * e & ((1 << BITS) - 1)], scale);
      out.v[4 * half + e] = to_bf(offsets ? v + offset : v);
    }
  }
  if (first + 8 <= k && aligned(to)) *(u16x8*)to = out;
  else
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (first + j < k) to[j] = out.v[j];
}

}  // namespace few

// y [rows, n] = x Wt + bias + residual, x [rows, k] float32 with rows x_stride apart, all at 16 bytes; W [n, k] quantised, k a
// multiple of 4. codes [n, row_bytes] in pieces of 64 bytes (above); levels [16] float32 by code; scales and offsets (or null)
// [n, groups] of fewer than 2^31, of groups of `group` neighbours along k, which are a multiple of 16 or all of k. bias [n] and residual [rows, n]
// float32 or null, the rows of y and of residual (which may be y) y_stride apart.
// launch: grid (n / 16 up, rows / 16 up), 256 threads.
KERNEL LAUNCH(256, 2) few_rows_4(const float* x, int64_t x_stride, const uint8_t* codes, const float* levels, const float* scales, const float* offsets,
                                 const float* bias, const float* residual, float* y, int64_t y_stride, int rows, int n, int k, int row_bytes, int group,
                                 int groups) {
  few::product<4>({x, codes, levels, scales, offsets, bias, residual, y, x_stride, y_stride, rows, n, k, row_bytes, group, groups});
}

// As few_rows_4, levels [256].
KERNEL LAUNCH(256, 2) few_rows_8(const float* x, int64_t x_stride, const uint8_t* codes, const float* levels, const float* scales, const float* offsets,
                                 const float* bias, const float* residual, float* y, int64_t y_stride, int rows, int n, int k, int row_bytes, int group,
                                 int groups) {
  few::product<8>({x, codes, levels, scales, offsets, bias, residual, y, x_stride, y_stride, rows, n, k, row_bytes, group, groups});
}

// to [n, k] bfloat16 = level * scale + offset of codes as few_rows_4 reads them; groups are multiples of 4 or all of k. Bound by
// writing.
// launch: grid (n, ceil(k / 2048)), 256 threads.
KERNEL LAUNCH(256, 4) dequantise_4(const uint8_t* codes, const float* levels, const float* scales, const float* offsets, uint16_t* to, int k, int row_bytes,
                                   int group, int groups) {
  few::dequantise<4>(codes, levels, scales, offsets, to, k, row_bytes, group, groups);
}

// As dequantise_4, with levels [256].
KERNEL LAUNCH(256, 4) dequantise_8(const uint8_t* codes, const float* levels, const float* scales, const float* offsets, uint16_t* to, int k, int row_bytes,
                                   int group, int groups) {
  few::dequantise<8>(codes, levels, scales, offsets, to, k, row_bytes, group, groups);
}
