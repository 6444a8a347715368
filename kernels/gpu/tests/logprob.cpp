#include "logits.h"

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  double off = 0;
  long differ = 0;
  for (int vocab : {100, 5000, 32001, 151936}) {
    std::vector<Row> rows;
    for (int n_top : {-1, 0, 1, 5, 20})
      for (int kind = 0; kind < 8; ++kind) {
        Row row;
        row.logits = normal(vocab, kind % 2 ? 20 : 3);
        if (kind == 2) for (float& x : row.logits) x = roundf(x);
        row.n_top = n_top;
        row.draw = bits();
        if (kind == 3) row.given = generator() % vocab;
        if (kind == 4) row.mask = {6u, 0u, 5u << 7};
        if (kind >= 5) { // Log-probabilities are of what stood there before.
          for (int i = 0; i < vocab; ++i) row.edits.push_back({i, 3, 1.5, 1});
          row.temperature = kind == 6 ? 0 : 1;
          row.given = kind == 7 ? 5 : -1;
        }
        rows.push_back(row);
      }
    rows.push_back(rows.back());
    rows.back().logits[1] = NAN;
    auto results = run(rows);
    differ += results.back().token != -1;
    rows.pop_back();
    for (size_t r = 0; r < rows.size(); ++r) {
      const Row& row = rows[r];
      const Result& result = results[r];
      if (row.n_top < 0) continue;
      auto logits = masked(row);
      std::vector<int> order;
      double sum = 0, maximum = *std::max_element(logits.begin(), logits.end());
      for (int i = 0; i < vocab; ++i) {
        sum += exp(logits[i] - maximum);
        if (logits[i] > -INFINITY) order.push_back(i);
      }
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
      order.resize(std::min<size_t>(order.size(), row.n_top));
      differ += result.maximum != (float)maximum || result.logit != logits[result.token] || result.top.size() != order.size();
      for (size_t i = 0; i < std::min(order.size(), result.top.size()); ++i)
        differ += result.top[i].first != order[i] || result.top[i].second != logits[order[i]];
      off = std::max(off, fabs(log(ldexp((double)result.mass, -44)) - log(sum)));
    }
  }
  judge("logits and alternatives that differ", differ, 0);
  judge("logarithm of the mass", off, 3e-7);
  return verdict();
}
