// sample FOLDER: also writes case files (../cases/README.md), of which every bit is the same everywhere; sample FILE: that of sample.
#include "logits.h"

// The same choice with sorts, in plain integers.
int choice(const Row& row) {
  auto logits = masked(row);
  for (auto& e : row.edits) {
    float& x = logits[e.token];
    x += e.bias;
    x = x > 0 ? x / e.repetition : x * e.repetition;
    x -= e.penalty;
  }
  int best = 0, n = logits.size();
  for (int i = 0; i < n; ++i) {
    if (std::isnan(logits[i])) return -1;
    if (logits[i] > logits[best]) best = i;
  }
  if (!std::isfinite(logits[best])) return -1;
  if (row.given >= 0) return row.given;
  if (row.temperature == 0) return best;
  std::vector<float> weights(n);
  std::vector<uint64_t> masses(n);
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) {
    float x = (logits[i] - logits[best]) * (float)(1 / (double)row.temperature);
    weights[i] = exp_exact(x);
    if (fabs(weights[i] - exp((double)x)) > 3e-7 * exp((double)x) + 1e-37) ++failures;
    if (weights[i] < std::max(row.min_p, 0x1p-44f)) weights[i] = 0;
    masses[i] = llrint(ldexp(weights[i], 44));
    order[i] = i;
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) { return weights[a] > weights[b] || (weights[a] == weights[b] && a < b); });
  size_t kept = n;
  if (row.top_k && row.top_k < n)
    for (kept = row.top_k; kept < (size_t)n && weights[order[kept]] == weights[order[row.top_k - 1]];) ++kept;
  unsigned __int128 total = 0;
  for (size_t i = 0; i < kept; ++i) total += masses[order[i]];
  if (row.top_p < 1) {
    uint64_t wanted = total * fraction(row.top_p) >> 64, before = 0;
    size_t i = 0;
    for (; i < kept && (i == 0 || before < wanted); ++i) before += masses[order[i]];
    kept = i, total = before;
  }
  order.resize(kept);
  std::sort(order.begin(), order.end());
  uint64_t target = total * row.draw >> 64;
  for (int token : order) {
    if (target < masses[token]) return token;
    target -= masses[token];
  }
  return -2;
}

int main(int arguments, char** argument) {
  take_arguments(arguments, argument, "sample");
  long draws = 0, differ = 0;
  for (int vocab : {100, 5000, 32001, 151936}) {
    std::vector<Row> rows;
    // Options by options; each with steep and flat rows, rounded ones (ties), and rows of one value.
    for (int option = 0; option < 14 * 4; ++option) {
      if (vocab > 100000 && option % 4 != option / 4 % 4) continue;
      for (int seed = 0; seed < (vocab == 100 ? 20 : vocab == 5000 ? 4 : 1); ++seed) {
        Row row;
        row.logits = normal(vocab, option % 4 == 1 ? 0.3 : 3);
        if (option % 4 == 2) for (float& x : row.logits) x = roundf(x);
        if (option % 4 == 3) for (float& x : row.logits) x = 1;
        row.draw = seed == 0 ? 0 : seed == 1 ? ~0ull : bits();
        switch (option / 4) {
          case 0: break;
          case 1: row.temperature = 0; break;
          case 2: row.temperature = 0.2; break;
          case 3: row.temperature = 2, row.top_p = 0.999; break;
          case 4: row.top_k = 1 + seed; break;
          case 5: row.top_k = vocab / 2; break;
          case 6: row.top_k = 2 * vocab; row.top_p = 0.5; break;
          case 7: row.top_p = 0.9; break;
          case 8: row.top_p = 1e-9; break;
          case 9: row.min_p = 0.05; row.temperature = 1.5; break;
          case 10: row.top_k = 50, row.top_p = 0.8, row.min_p = 0.01; break;
          case 11: row.given = 7; break;
          case 12: // Of every 32nd word nothing, of one in three tokens.
            for (int i = 0; i < vocab / 40; ++i) row.mask.push_back(i % 32 ? generator() : i % 3 ? 0 : ~0u);
            row.mask[0] |= 1;
            row.top_p = seed % 2 ? 1 : 0.7;
            break;
          case 13:
            for (int i = 0; i < vocab; i += 1 + generator() % 9) row.edits.push_back({i, i % 2 ? 1.5f : 0, i % 3 ? 1.2f : 1, i % 5 ? 0.7f : 0});
            row.edits[0].bias = -INFINITY;
            row.temperature = seed % 3 ? 1 : 0;
            row.top_k = seed % 2 * 30;
            break;
        }
        rows.push_back(row);
      }
    }
    // Broken rows fail, beside the others.
    for (float broken : {NAN, INFINITY}) {
      rows.push_back(rows[0]);
      rows.back().logits[vocab - 3] = broken;
    }
    rows.push_back(rows[0]);
    for (float& x : rows.back().logits) x = -INFINITY;
    auto results = run(rows);
    for (size_t r = 0; r < rows.size(); ++r) {
      ++draws;
      int want = choice(rows[r]);
      if (results[r].token != want && differ++ < 10) printf("row %zu of %d: %d, not %d\n", r, vocab, results[r].token, want);
    }
  }
  // Many draws from few rows.
  for (int i = 0; i < 40; ++i) {
    Row row;
    row.logits = normal(500, 2);
    row.top_k = i % 2 * 40, row.top_p = i % 4 < 2 ? 0.9 : 1, row.temperature = 0.7;
    std::vector<Row> rows(50, row);
    for (auto& row : rows) row.draw = bits();
    auto results = run(rows);
    for (size_t r = 0; r < rows.size(); ++r) ++draws, differ += results[r].token != choice(rows[r]);
  }
  judge("tokens that differ, of " + std::to_string(draws), differ, 0);
  return verdict();
}
