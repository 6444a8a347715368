#include "test.h"

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  for (int n : {2, 333, 4096, 32003}) {
    const int rows = 4;
    auto logits = normal(rows * n, 4);
    std::vector<int> labels(rows);
    std::vector<float> weights(rows), results(2 * rows, NAN), alone(2 * rows, NAN);
    for (int r = 0; r < rows; ++r) {
      labels[r] = r * 7919 % n;
      weights[r] = r * 0.5f;
    }
    labels[1] = n - 1;
    logits[n + n - 1] = 30;                                        // a label that is the largest,
    for (int i = 0; i < n; ++i) logits[2 * n + i] += 1000;         // logits that overflow by themselves,
    if (n > 2) logits[3 * n + (labels[3] + 1) % n] = -INFINITY;    // a token that cannot be.
    auto before = logits;
    launch_kernel(cross_entropy, rows, 1, 1, 1024, logits.data(), labels.data(), nullptr, alone.data(), n);
    judge("cross_entropy of " + std::to_string(n) + " leaves logits alone", logits != before, 0);
    launch_kernel(cross_entropy, rows, 1, 1, 1024, logits.data(), labels.data(), weights.data(), results.data(), n);
    judge("cross_entropy of " + std::to_string(n) + " without a gradient", alone != results, 0);
    std::vector<double> gradient(rows * n), log_probs(rows);
    std::vector<float> got;
    int wrong = 0;
    for (int r = 0; r < rows; ++r) {
      const float* row = &before[r * n];
      double top = *std::max_element(row, row + n), sum = 0;
      for (int i = 0; i < n; ++i) sum += exp(row[i] - top);
      log_probs[r] = row[labels[r]] - top - log(sum);
      got.push_back(results[2 * r]);
      wrong += results[2 * r + 1] != (row[labels[r]] >= top);
      for (int i = 0; i < n; ++i) gradient[r * n + i] = weights[r] * (exp(row[i] - top) / sum - (i == labels[r]));
    }
    judge("cross_entropy of " + std::to_string(n) + ", gradient", distance(logits, gradient), 1e-6);
    judge("cross_entropy of " + std::to_string(n) + ", log-probabilities", distance(got, log_probs), 1e-6);
    judge("cross_entropy of " + std::to_string(n) + ", rows wrongly right", wrong, 0);
  }
  return verdict();
}
