// Experts against double and exact integers: ties, several tokens a block, every weighting, wide and odd rows, gradients.
#include "test.h"

static void all(int tokens, int experts, int top_k, int width, int gap, bool of_all) {
  std::string name = std::to_string(top_k) + " of " + std::to_string(experts) + " for " + std::to_string(tokens) + " tokens of " + std::to_string(width) + (of_all ? ", of all" : "");
  int n = tokens * top_k, stride = width + gap;
  auto logits = normal((size_t)tokens * experts, 2);
  for (size_t i = 0; i < logits.size(); i += 2) logits[i] = roundf(logits[i]); // Ties.
  std::vector<int> chosen(n, -1), want_chosen(n);
  std::vector<float> weights(n, NAN);
  std::vector<double> want_weights(n), shares(logits.size());
  for (int t = 0; t < tokens; ++t) {
    const float* row = &logits[(size_t)t * experts];
    std::vector<int> by_logit(experts);
    for (int e = 0; e < experts; ++e) by_logit[e] = e;
    std::stable_sort(by_logit.begin(), by_logit.end(), [&](int a, int b) { return row[a] > row[b]; });
    double all = 0, among = 0;
    for (int e = 0; e < experts; ++e) all += exp((double)row[e]);
    for (int c = 0; c < top_k; ++c) among += exp((double)row[want_chosen[t * top_k + c] = by_logit[c]]);
    for (int c = 0; c < top_k; ++c) want_weights[t * top_k + c] = exp((double)row[by_logit[c]]) / (of_all ? all : among);
    for (int e = 0; e < experts; ++e) shares[(size_t)t * experts + e] = exp((double)row[e]) / all;
  }
  launch_kernel(route, (tokens + 7) / 8, 1, 1, 256, logits.data(), chosen.data(), weights.data(), tokens, experts, top_k, of_all);
  judge("chosen, " + name, chosen == want_chosen ? 0 : 1, 0);
  judge("weights, " + name, distance(weights, want_weights), 1e-6);

  std::vector<int> row_of(n, -1), choice_of(n, -1), starts(experts + 1, -1), want_row(n), want_choice, want_starts;
  launch_kernel(group_by_expert, experts, 1, 1, 256, chosen.data(), row_of.data(), choice_of.data(), starts.data(), n, experts);
  for (int e = 0; e < experts; ++e) {
    want_starts.push_back(want_choice.size());
    for (int c = 0; c < n; ++c)
      if (chosen[c] == e) {
        want_row[c] = want_choice.size();
        want_choice.push_back(c);
      }
  }
  want_starts.push_back(n);
  judge("the layout by expert, " + name, row_of == want_row && choice_of == want_choice && starts == want_starts ? 0 : 1, 0);

  int columns = (width + 2047) / 2048;
  auto x = normal((size_t)tokens * stride), outputs = normal((size_t)n * width), dweights = normal(n);
  std::vector<float> gathered((size_t)n * width, NAN), y((size_t)tokens * width, NAN), plain = y, doutputs = gathered, dw(n, NAN), dlogits(logits.size(), NAN);
  launch_kernel(expert_gather, n, columns, 1, 256, x.data(), stride, choice_of.data(), gathered.data(), top_k, width);
  launch_kernel(expert_combine, tokens, columns, 1, 256, outputs.data(), row_of.data(), weights.data(), y.data(), top_k, width);
  launch_kernel(expert_combine, tokens, columns, 1, 256, outputs.data(), row_of.data(), nullptr, plain.data(), top_k, width);
  launch_kernel(expert_combine_backward, n, 1, 1, 256, outputs.data(), x.data(), stride, row_of.data(), weights.data(), doutputs.data(), dw.data(), top_k, width);
  launch_kernel(route_backward, (tokens + 7) / 8, 1, 1, 256, logits.data(), chosen.data(), weights.data(), dweights.data(), dlogits.data(), tokens, experts, top_k, of_all);
  std::vector<double> want_gathered(gathered.size()), want_y(y.size()), want_plain(y.size()), want_doutputs(gathered.size()), want_dw(n), want_dlogits(logits.size());
  for (int c = 0; c < n; ++c) {
    int t = c / top_k;
    double mean = 0;
    for (int i = t * top_k; i < (t + 1) * top_k; ++i) mean += (double)weights[i] * dweights[i];
    for (int e = 0; of_all && e < experts && c % top_k == 0; ++e) want_dlogits[(size_t)t * experts + e] = -mean * shares[(size_t)t * experts + e];
    for (int i = 0; i < width; ++i) {
      size_t row = (size_t)row_of[c] * width + i, token = (size_t)t * width + i;
      double d = x[(size_t)t * stride + i];
      want_gathered[row] = d;
      want_y[token] += (double)weights[c] * outputs[row];
      want_plain[token] += outputs[row];
      want_doutputs[row] = d * weights[c];
      want_dw[c] += d * outputs[row];
    }
    want_dlogits[(size_t)t * experts + chosen[c]] = weights[c] * (dweights[c] - mean);
  }
  judge("gather, " + name, distance(gathered, want_gathered), 0);
  judge("combine, " + name, distance(y, want_y), 1e-6);
  judge("combine without weights, " + name, distance(plain, want_plain), 1e-6);
  judge("gradient of outputs, " + name, distance(doutputs, want_doutputs), 1e-6);
  judge("gradient of weights, " + name, distance(dw, want_dw), 1e-6);
  judge("gradient of logits, " + name, distance(dlogits, want_dlogits), 2e-6);
}

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  for (bool of_all : {false, true}) {
    all(1, 4, 2, 8, 0, of_all);
    all(19, 60, 4, 33, 0, of_all);
    all(70, 8, 2, 2052, 4, of_all);
    all(3, 100, 40, 64, 1, of_all);
  }
  return verdict();
}
