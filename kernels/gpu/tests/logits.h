// Rows of logits and what is asked of them, run through the kernels of logits.cu, sample.cu and logprob.cu.
#pragma once
#include "test.h"

namespace { // As what is in kernels.cu.

struct Row {
  std::vector<float> logits;
  int given = -1, n_top = -1, top_k = 0;
  float temperature = 1, min_p = 0;
  double top_p = 1;
  uint64_t draw = 0;
  std::vector<Edit> edits; // By token.
  std::vector<uint32_t> mask;
};

struct Result {
  int token;
  float logit, maximum;
  uint64_t mass;
  std::vector<std::pair<int, float>> top;
};

uint64_t fraction(double p) { return p < 1 ? (uint64_t)ldexp(p, 64) : 0; }

std::vector<Result> run(const std::vector<Row>& rows) {
  int n = rows.size(), vocab = rows[0].logits.size(), splits = (vocab + SPLIT - 1) / SPLIT, words = 0, n_top = 0, n_masks = 0;
  for (auto& row : rows) words = std::max<int>(words, row.mask.size()), n_top = std::max(n_top, row.n_top);
  std::vector<float> logits;
  std::vector<Ask> asks;
  std::vector<Edit> edits;
  std::vector<int> starts;
  std::vector<uint32_t> masks;
  for (auto& row : rows) {
    logits.insert(logits.end(), row.logits.begin(), row.logits.end());
    uint64_t p = fraction(row.top_p);
    float inverse = row.temperature > 0 ? (float)(1 / (double)row.temperature) : 0;
    asks.push_back({row.given, row.n_top, {(uint32_t)row.draw, (uint32_t)(row.draw >> 32)}, inverse, std::max(row.min_p, 0x1p-44f), row.top_k,
                    row.mask.empty() ? -1 : n_masks++, {(uint32_t)p, (uint32_t)(p >> 32)}, {0, 0}});
    size_t e = 0;
    for (int s = 0; s <= splits; ++s) {
      while (e < row.edits.size() && row.edits[e].token < s * SPLIT) ++e;
      starts.push_back(edits.size() + e);
    }
    edits.insert(edits.end(), row.edits.begin(), row.edits.end());
    masks.insert(masks.end(), row.mask.begin(), row.mask.end());
    if (!row.mask.empty()) masks.resize(n_masks * words);
  }
  std::vector<uint64_t> best(n * splits * 2), top(n * splits * n_top), masses(n * splits * MASSES);
  std::vector<float> unedited(edits.size());
  std::vector<int> tokens(n, -2), records(n * (4 + 2 * n_top));
  launch_kernel(logit_maxima, splits, n, 1, 256, logits.data(), asks.data(), edits.data(), starts.data(), masks.data(), best.data(), top.data(), vocab, splits, words, n_top);
  launch_kernel(logit_masses, splits, n, 1, 256, logits.data(), asks.data(), edits.data(), starts.data(), best.data(), unedited.data(), masses.data(), vocab, splits);
  launch_kernel(sample, n, 1, 1, 1024, logits.data(), asks.data(), best.data(), masses.data(), tokens.data(), vocab, splits);
  launch_kernel(logprobs, n, 1, 1, 256, logits.data(), asks.data(), edits.data(), starts.data(), unedited.data(), best.data(), masses.data(), top.data(), tokens.data(), records.data(), vocab, splits, n_top);
  std::vector<Result> results;
  for (int r = 0; r < n; ++r) {
    const int* record = &records[r * (4 + 2 * n_top)];
    F logit, maximum, value;
    logit.s = record[0], maximum.s = record[1];
    Result result = {tokens[r], logit.f, maximum.f, (uint64_t)(uint32_t)record[3] << 32 | (uint32_t)record[2], {}};
    for (int i = 0; i < rows[r].n_top && record[4 + 2 * i] >= 0; ++i) value.s = record[5 + 2 * i], result.top.push_back({record[4 + 2 * i], value.f});
    results.push_back(result);
  }
  return results;
}

std::vector<float> masked(const Row& row) {
  std::vector<float> logits = row.logits;
  for (size_t i = 0; i < logits.size() && !row.mask.empty(); ++i)
    if (i / 32 >= row.mask.size() || !(row.mask[i / 32] >> (i % 32) & 1)) logits[i] = -INFINITY;
  return logits;
}

uint64_t bits() { return (uint64_t)generator() << 32 | generator(); }

}  // namespace
