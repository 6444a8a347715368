// Chooses a token from each row, without a sort: thresholds are found by the bits of weights, in sums of integers.

constexpr int LISTED = 4096;  // Candidates that fit a block's memory. Where there are more, the row is read again and again.

struct Choice {
  uint64_t list[LISTED];  // A candidate's weight above its token.
  uint64_t bins[1024];
  uint64_t red[32];
  uint64_t totals[2 * CUTS];  // Of all splits: the masses above each cut, then how many tokens these are.
  int live[1024], n_live, n_listed;  // Splits with candidates.
  int bin;
  uint64_t before, amount;  // What find has found.
};

// The sum up to this thread's v, it included.
__device__ __forceinline__ uint64_t block_scan(uint64_t v, uint64_t* red) {
#pragma unroll
  for (int m = 1; m < WARP; m <<= 1) {
    uint64_t other = shfl_u64(v, (lane_() - m) & (WARP - 1));
    v += lane_() >= m ? other : 0;
  }
  block_sync();
  if (lane_() == WARP - 1) red[TX / WARP] = v;
  block_sync();
  for (int w = 0; w < TX / WARP; ++w) v += red[w];
  return v;
}

// Where, in the threads' amounts one after the other, `target` falls: whose they are and what is before. For all threads.
__device__ __forceinline__ void find(Choice& c, uint64_t amount, uint64_t target) {
  uint64_t upto = block_scan(amount, c.red);
  if (upto > target && upto - amount <= target) c.bin = TX, c.before = upto - amount, c.amount = amount;
  block_sync();
}

struct Found {
  uint32_t key;
  uint64_t before, amount;  // Of the keys above it; of itself.
};

// Where `target` falls in the amounts of keys (of 10 bits a level), the highest first.
// each(f) calls f(key, amount) for what the thread holds.
template <class Each> __device__ __forceinline__ Found select(Choice& c, int levels, uint64_t target, Each each) {
  Found found = {0, 0, 0};
  for (int shift = 10 * (levels - 1); shift >= 0; shift -= 10) {
    c.bins[TX] = 0;
    block_sync();
    each([&](uint32_t key, uint64_t amount) {
      if (key >> shift >> 10 == found.key) shared_add(&c.bins[1023 - (key >> shift & 1023)], amount);
    });
    block_sync();
    find(c, c.bins[TX], target - found.before);
    found.key = found.key << 10 | (1023 - c.bin);
    found.before += c.before;
    found.amount = c.amount;
    block_sync();
  }
  return found;
}

// `fraction` in units of 2^-64.
__device__ __forceinline__ uint64_t part(const uint32_t* fraction, uint64_t of) { return mul_high((uint64_t)fraction[1] << 32 | fraction[0], of); }

// What is asked of a row, and the row.
struct Drawn {
  Ask ask;
  const float* row;
  const uint64_t* masses;
  float maximum;
  int vocab, splits;
  __device__ __forceinline__ float weight(float logit) const { return weight_of(logit, maximum, ask); }
};

// From all tokens with weight: first the split, then the token.
__device__ __forceinline__ int draw_from_all(Choice& c, const Drawn& d) {
  uint64_t target = part(d.ask.draw, c.totals[CUTS - 1]);
  find(c, TX < d.splits ? d.masses[TX * MASSES + CUTS] : 0, target);
  target -= c.before;
  int at = c.bin * SPLIT + TX * 4;
  f32x4 v = four(d.row, at, d.vocab);
  uint64_t each[4], sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += each[i] = mass_of(d.weight(v.v[i]));
  block_sync();
  find(c, sum, target);
  target -= c.before;
  int i = 0;
#pragma unroll
  for (; i < 3 && target >= each[i]; ++i) target -= each[i];
  if (c.bin == TX) c.n_listed = at + i;
  block_sync();
  return c.n_listed;
}

// The candidates above a cut, in any order.
__device__ __forceinline__ void list(Choice& c, const Drawn& d, int cut) {
  constexpr int AT_ONCE = 8; // Splits whose loads are under way together.
  if (TX == 0) c.n_live = c.n_listed = 0;
  block_sync();
  if (TX < d.splits && (d.masses[TX * MASSES + 1 + CUTS] >> 13 * cut & 8191)) c.live[shared_add(&c.n_live, 1)] = TX;
  block_sync();
  float above = cut_of(cut);
  for (int first = 0; first < c.n_live; first += AT_ONCE) {
    f32x4 v[AT_ONCE];
    int at[AT_ONCE];
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s) {
      at[s] = first + s < c.n_live ? c.live[first + s] * SPLIT + TX * 4 : d.vocab;
      v[s] = four(d.row, at[s], d.vocab);
    }
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        F weight;
        weight.f = d.weight(v[s].v[i]);
        if (weight.f >= above) c.list[shared_add(&c.n_listed, 1)] = (uint64_t)weight.i << 32 | (uint32_t)(at[s] + i);
      }
  }
  block_sync();
}

// From the heaviest, as top_k and top_p cut them: a draw from the kept in the order of their ids.
__device__ __forceinline__ int draw_from_heaviest(Choice& c, const Drawn& d) {
  const uint64_t* counts = c.totals + CUTS;
  const uint64_t top_k = d.ask.top_k;
  const bool has_top_p = d.ask.top_p[0] | d.ask.top_p[1];
  uint64_t wanted = part(d.ask.top_p, c.totals[CUTS - 1]);
  // The fewest candidates that suffice.
  int cut = 0;
  while (cut < CUTS - 1 && (top_k ? counts[cut] < top_k : c.totals[cut] < wanted)) ++cut;
  const int n = (int)counts[cut];
  const bool is_listed = n <= LISTED;
  if (is_listed) list(c, d, cut);
  // f(bits of a weight, token) of this thread's candidates.
  auto candidates = [&](auto f) {
    if (is_listed) {
      for (int i = TX; i < n; i += 1024) f((uint32_t)(c.list[i] >> 32), (int)(uint32_t)c.list[i]);
      return;
    }
    for (int i = TX; i < d.vocab; i += 1024) {
      F weight;
      weight.f = d.weight(d.row[i]);
      if (weight.f >= cut_of(cut)) f(weight.i, i);
    }
  };
  auto mass_of_bits = [](uint32_t bits) {
    F weight;
    weight.i = bits;
    return mass_of(weight.f);
  };
  // Tokens of the lowest kept weight, `least`, are kept up to `last`.
  uint32_t least = 0;
  int last = d.vocab;
  uint64_t kept = c.totals[CUTS - 1];
  const int levels = d.vocab <= 1 << 20 ? 2 : 3;
  const uint32_t top_id = (1u << 10 * levels) - 1;
  if (top_k && top_k < counts[cut]) {
    least = select(c, 3, top_k - 1, [&](auto f) { candidates([&](uint32_t bits, int) { f(bits, 1ull); }); }).key;
  }
  if (top_k) {
    uint64_t mine = 0;
    candidates([&](uint32_t bits, int) { mine += bits >= least ? mass_of_bits(bits) : 0; });
    mine = block_scan(mine, c.red);
    if (TX == 1023) c.amount = mine;
    block_sync();
    kept = c.amount;
    wanted = part(d.ask.top_p, kept);
    block_sync();
  }
  if (has_top_p) {
    wanted = wanted ? wanted : 1;
    Found found = select(c, 3, wanted - 1, [&](auto f) { candidates([&](uint32_t bits, int) { if (bits >= least) f(bits, mass_of_bits(bits)); }); });
    least = found.key;
    const uint64_t each = mass_of_bits(least), tied = (wanted - found.before + each - 1) / each;
    kept = found.before + tied * each;
    if (tied * each < found.amount)
      last = top_id - select(c, levels, tied - 1, [&](auto f) { candidates([&](uint32_t bits, int id) { if (bits == least) f(top_id - id, 1ull); }); }).key;
  }
  return top_id - select(c, levels, part(d.ask.draw, kept), [&](auto f) {
           candidates([&](uint32_t bits, int id) { if (bits > least || (bits == least && id <= last)) f(top_id - id, mass_of_bits(bits)); });
         }).key;
}

// tokens [rows]: the one given, the most likely, or drawn from weights; -1 where the logits are not finite.
// best and masses as logit_maxima and logit_masses have written them, logits with edits. At most 1024 splits.
// Bound by one read of the splits that have candidates, and by some ten passes over these within the block.
// launch: grid (rows), 1024 threads. loads: 16 bytes a lane.
KERNEL LAUNCH(1024, 1) sample(const float* logits, const Ask* asks, const uint64_t* best, const uint64_t* masses, int* tokens, int vocab, int splits) {
  __shared__ Choice c;
  const Ask ask = asks[BX];
  uint64_t before = row_best<1024>(best, BX, splits, 0, c.red);
  uint64_t most = row_best<1024>(best, BX, splits, 1, c.red);
  bool needs_before = ask.given >= 0 || ask.n_top >= 0;
  int token;
  if ((needs_before && !is_finite(before)) || (ask.given < 0 && !is_finite(most))) {
    token = -1;
  } else if (ask.given >= 0) {
    token = ask.given;
  } else if (!(ask.inverse > 0)) {
    token = token_of(most);
  } else {
    const Drawn drawn = {ask, logits + (int64_t)BX * vocab, masses + (int64_t)BX * splits * MASSES, value_of(most), vocab, splits};
    for (int column = TX / WARP; column < 2 * CUTS; column += 1024 / WARP) {
      uint64_t sum = 0;
      for (int s = lane_(); s < splits; s += WARP) {
        const uint64_t* of = drawn.masses + s * MASSES;
        sum += column < CUTS ? of[1 + column] : of[1 + CUTS] >> 13 * (column - CUTS) & 8191;
      }
      sum = warp_sum(sum);
      if (lane_() == 0) c.totals[column] = sum;
    }
    block_sync();
    bool cuts = ask.top_k || ask.top_p[0] | ask.top_p[1];
    token = cuts ? draw_from_heaviest(c, drawn) : draw_from_all(c, drawn);
  }
  if (TX == 0) tokens[BX] = token;
}
