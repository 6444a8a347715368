// Writing of keys and values, paged attention and the merging of splits against double. Pages hold NaN wherever nothing was
// written, and tables name blocks that do not exist wherever nothing may be read.
// attention FOLDER: also writes case files (../cases/README.md); attention FILE: that of attention_16x128.
#include "test.h"

enum Pages { BF16, INT8, F32 };
static const char* names[] = {"bf16", "int8", "float32"};

struct Sequence {
  int kv_len, rows;
};

struct Case {
  int heads, kv_heads, dim;
  std::vector<Sequence> sequences;
  int window;
  float cap;
  bool sinks;
  Pages pages;
};

// How a step is cut: rows of a tile, segments of an item (0: all of them, no records).
struct Cut {
  int tile, segments;
};

struct Step {
  std::vector<int> sequences, items, merges, tables;
  int records = 0;
};

static int up(int a, int b) { return (a + b - 1) / b; }

struct Trial {
  Case c;
  int tokens = 0, blocks = 0, stride;
  std::vector<std::vector<int>> block_of; // [sequence][block]
  std::vector<float> q, k, v, sinks;
  std::vector<char> pages;

  explicit Trial(const Case& c) : c(c) {
    for (auto& s : c.sequences) {
      block_of.emplace_back();
      for (int b = 0; b < up(s.kv_len, BLOCK); ++b) block_of.back().push_back(0);
      blocks += up(s.kv_len, BLOCK);
      tokens += s.kv_len;
    }
    int next = 0;
    blocks += 3;
    if (blocks % 7 == 0) ++blocks; // So that 7 goes through all of them.
    for (auto& table : block_of)
      for (int& b : table) b = (next++ * 7 + 2) % blocks;

    stride = c.heads * c.dim + 4;
    q = normal((size_t)tokens * stride, 1.5f);
    k = normal((size_t)tokens * c.kv_heads * c.dim, 1.5f);
    v = normal((size_t)tokens * c.kv_heads * c.dim);
    if (c.sinks)
      for (float x : normal(c.heads, 3)) sinks.push_back(x + 1);
    write();
  }

  // All keys, by the kernel, with rows of slot -1 between them.
  void write() {
    int64_t size = c.pages == BF16 ? page_bytes<uint16_t>(c.dim) : c.pages == INT8 ? page_bytes<int8>(c.dim) : page_bytes<float>(c.dim);
    pages.assign(blocks * c.kv_heads * size, (char)0xff); // NaN in every type; the code -1 with a scale of NaN.
    std::vector<float> keys, values;
    std::vector<int> slots;
    int width = c.kv_heads * c.dim, token = 0;
    auto row = [&](int from, int slot) {
      keys.insert(keys.end(), k.begin() + (size_t)from * width, k.begin() + (size_t)(from + 1) * width);
      values.insert(values.end(), v.begin() + (size_t)from * width, v.begin() + (size_t)(from + 1) * width);
      values.resize(values.size() + 4, NAN); // Values have another stride than keys.
      slots.push_back(slot);
    };
    for (size_t s = 0; s < c.sequences.size(); ++s)
      for (int p = 0; p < c.sequences[s].kv_len; ++p, ++token) {
        row(token, block_of[s][p / BLOCK] * BLOCK + p % BLOCK);
        if (p % 50 == 0) row((token + 1) % tokens, -1);
      }
    const char* kernel = c.pages == BF16 ? "kv_write_bf16" : c.pages == INT8 ? "kv_write_int8" : "kv_write_f32";
    launch_as(kv_write_bf16, kernel, (int)slots.size(), up(c.kv_heads, 4), 1, 4 * WARP, keys.data(), values.data(), slots.data(), pages.data(), width, width + 4,
              c.kv_heads, c.dim);
  }

  // Rows `from` to `to` of each sequence's rows (its last positions), as a step.
  Step step(const Cut& cut, int from, int to) {
    Step step;
    int group = c.heads / c.kv_heads, row = 0;
    for (size_t s = 0; s < c.sequences.size(); ++s) {
      int n = std::min(c.sequences[s].rows, to) - std::min(c.sequences[s].rows, from);
      int end = c.sequences[s].kv_len - c.sequences[s].rows + std::min(c.sequences[s].rows, to), segments = up(end, KV_SEGMENT);
      bool split = cut.segments > 0 && segments > 1;
      int first_block = c.window > 0 ? std::max(end - n + 1 - c.window, 0) / BLOCK : 0, record = split ? step.records : -1;
      step.sequences.insert(step.sequences.end(), {row, n, end, first_block, (int)step.tables.size()});
      for (int b = first_block; b < up(end, BLOCK); ++b) step.tables.push_back(block_of[s][b]);
      step.tables.push_back(1 << 30);
      for (int first = 0; first < n * group; first += cut.tile)
        for (int segment = 0; segment < (split ? segments : 1); segment += split ? cut.segments : 1)
          step.items.insert(step.items.end(), {(int)s, first, segment, split ? segment + cut.segments : 1 << 20, record});
      step.items.insert(step.items.end(), {-1, 0, 0, 1, -1}); // Padding.
      if (split)
        for (int i = 0; i < n; ++i, step.records += segments)
          step.merges.insert(step.merges.end(), {row + i, end - n + i, step.records, 0});
      step.merges.insert(step.merges.end(), {-1, 0, 0, 0});
      row += n;
    }
    return step;
  }

  // Rows `from` to `to` of each sequence: [rows, heads * dim], with a row of NaN behind them that nothing may write.
  std::vector<float> attend(const Cut& cut, int from, int to, std::vector<float>* lse = nullptr) {
    Step s = step(cut, from, to);
    std::vector<float> mine, part((size_t)s.records * c.heads * (c.dim + 4), NAN);
    for (size_t i = 0, base = 0; i < c.sequences.size(); base += c.sequences[i++].kv_len) {
      const int* is = &s.sequences[5 * i];
      for (int r = 0; r < is[1]; ++r) {
        size_t at = (base + is[2] - is[1] + r) * stride;
        mine.insert(mine.end(), q.begin() + at, q.begin() + at + stride);
      }
    }
    int rows = (int)mine.size() / stride, width = c.heads * c.dim;
    std::vector<float> out((size_t)(rows + 1) * width, NAN);
    const float* sink = sinks.empty() ? nullptr : sinks.data();
    float scale = 1 / sqrtf(c.dim);
    int n = (int)s.items.size() / 5;
    if (lse) lse->assign((size_t)rows * c.heads, NAN);
    float* lse_to = lse ? lse->data() : nullptr;
    auto shared = [&](auto run, auto... dim) {
      run(n, c.kv_heads, 1, c.pages == F32 ? 256 : 4 * WARP, mine.data(), pages.data(), s.tables.data(), s.sequences.data(), s.items.data(), sink, out.data(),
          part.data(), lse_to, stride, c.heads, c.kv_heads, c.window, scale, c.cap, dim...);
    };
    std::string kernel = "attention_" + std::to_string(cut.tile) + "x" + std::to_string(c.dim) + (c.pages == INT8 ? "_int8" : "");
    if (c.pages == F32) shared([](auto... args) { launch_kernel(attention_f32, args...); }, c.dim);
    else shared([&](auto... args) { launch_as(attention_16x128, kernel, args...); });
    launch_kernel(attention_merge, (int)s.merges.size() / 4, c.heads, 1, 64, part.data(), s.merges.data(), sink, out.data(), lse_to,
                  c.heads, c.dim, c.window);
    for (int i = 0; i < width; ++i)
      if (out[(size_t)rows * width + i] == out[(size_t)rows * width + i]) judge("a row of nobody was written", 1, 0);
    out.resize((size_t)rows * width);
    return out;
  }

  // What the pages stand for.
  std::vector<double> stored(const std::vector<float>& x) {
    std::vector<double> to(x.begin(), x.end());
    if (c.pages == BF16)
      for (size_t i = 0; i < x.size(); ++i) to[i] = bf(to_bf(x[i]));
    if (c.pages == INT8)
      for (size_t i = 0; i < x.size(); i += c.dim) {
        float largest = 0;
        for (int d = 0; d < c.dim; ++d) largest = std::max(largest, fabsf(x[i + d]));
        float scale = largest / 127.f;
        for (int d = 0; d < c.dim; ++d) to[i + d] = (double)scale * rintf(x[i + d] / scale);
      }
    return to;
  }

  // Of the rows of all sequences, and the logarithms of their denominators.
  std::vector<double> want(std::vector<double>& lse) {
    auto keys = stored(k), values = stored(v);
    int group = c.heads / c.kv_heads, base = 0;
    std::vector<double> out;
    for (auto& s : c.sequences) {
      for (int p = s.kv_len - s.rows; p < s.kv_len; ++p)
        for (int h = 0; h < c.heads; ++h) {
          int first = c.window > 0 ? std::max(p + 1 - c.window, 0) : 0;
          auto at = [&](int key) { return ((size_t)(base + key) * c.kv_heads + h / group) * c.dim; };
          std::vector<double> scores;
          for (int key = first; key <= p; ++key) {
            double score = 0;
            for (int d = 0; d < c.dim; ++d) {
              float x = q[(size_t)(base + p) * stride + h * c.dim + d];
              score += (c.pages == F32 ? x : bf(to_bf(x))) * keys[at(key) + d];
            }
            score /= sqrt(c.dim);
            scores.push_back(c.cap > 0 ? c.cap * tanh(score / c.cap) : score);
          }
          double sum = c.sinks ? exp(sinks[h]) : 0;
          for (double& x : scores) sum += x = exp(x);
          lse.push_back(log(sum));
          for (int d = 0; d < c.dim; ++d) {
            double y = 0;
            for (int key = first; key <= p; ++key) y += scores[key - first] * values[at(key) + d];
            out.push_back(y / sum);
          }
        }
      base += s.kv_len;
    }
    return out;
  }

  void judge_all() {
    std::string what = std::string(names[c.pages]) + " D " + std::to_string(c.dim) + ", " + std::to_string(c.heads) + "/" +
                       std::to_string(c.kv_heads) + (c.window ? " window " + std::to_string(c.window) : "") +
                       (c.cap > 0 ? " cap" : "") + (c.sinks ? " sinks" : "");
    int rows = 0;
    for (auto& s : c.sequences) rows = std::max(rows, s.rows);
    std::vector<float> lse, lse_of_splits;
    std::vector<double> want_lse, want_out = want(want_lse);
    std::vector<float> whole = attend({16, 0}, 0, rows, &lse);
    judge(what, distance(whole, want_out), c.pages == F32 ? 2e-6 : 3e-3);
    judge(what + ": lse", distance(lse, want_lse), 2e-6);
    auto same = [&](const char* how, const std::vector<float>& other) {
      if (whole.size() != other.size() || memcmp(whole.data(), other.data(), 4 * whole.size())) judge(what + how, 1, 0);
    };
    same(": splits of one segment give other bits", attend({16, 1}, 0, rows, &lse_of_splits));
    if (memcmp(lse.data(), lse_of_splits.data(), 4 * lse.size())) judge(what + ": splits give another lse", 1, 0);
    if (c.pages != F32 && c.dim >= 64) {
      same(": tiles of 32 give other bits", attend({32, 0}, 0, rows));
      same(": splits of two segments give other bits", attend({32, 2}, 0, rows));
    }
    // Chunks of three rows.
    std::vector<std::vector<float>> parts(c.sequences.size());
    int width = c.heads * c.dim;
    for (int from = 0; from < rows; from += 3) {
      auto chunk = attend({16, 0}, from, from + 3);
      size_t at = 0;
      for (size_t s = 0; s < parts.size(); ++s) {
        size_t n = (std::min(c.sequences[s].rows, from + 3) - std::min(c.sequences[s].rows, from)) * (size_t)width;
        parts[s].insert(parts[s].end(), chunk.begin() + at, chunk.begin() + at + n);
        at += n;
      }
    }
    std::vector<float> chunks;
    for (auto& part : parts) chunks.insert(chunks.end(), part.begin(), part.end());
    same(": chunks of three rows give other bits", chunks);
  }
};

int main(int argc, char** argv) {
  take_arguments(argc, argv, "attention_16x128");
  const std::vector<Sequence> mixed = {{67, 1}, {1, 1}, {300, 5}, {40, 9}};
  std::vector<Case> cases = {
      {4, 1, 16, {{900, 3}, {33, 33}}, 0, 0, false, BF16},
      {2, 2, 16, {{900, 2}, {290, 2}}, 257, 0, true, BF16},
      {6, 2, 32, {{600, 4}}, 256, 20, false, BF16},
      {8, 2, 64, mixed, 0, 0, false, BF16},
      {9, 3, 64, mixed, 45, 0, true, BF16},
      {20, 1, 80, {{70, 4}, {31, 2}}, 0, 3, true, BF16}, // A group larger than a tile.
      {3, 1, 96, {{97, 4}}, 1, 0, false, BF16},
      {8, 2, 128, mixed, 0, 0, true, BF16},
      {4, 2, 256, {{290, 4}}, 100, 20, true, BF16},
      {8, 2, 64, mixed, 45, 0, true, INT8},
      {4, 1, 80, {{300, 4}}, 0, 5, false, INT8},
      {6, 3, 128, {{290, 4}}, 0, 0, true, INT8},
      {4, 1, 16, {{90, 3}}, 0, 0, true, INT8},
      {2, 2, 32, {{290, 2}}, 40, 0, false, INT8},
      {3, 1, 96, {{97, 4}}, 0, 0, true, INT8},
      {2, 1, 256, {{290, 4}}, 0, 20, true, INT8},
      {4, 2, 12, {{300, 4}, {40, 20}}, 45, 0, false, F32},
      {8, 2, 64, mixed, 0, 3, true, F32},
      {20, 1, 80, {{70, 4}}, 0, 0, false, F32},
      {2, 1, 256, {{290, 4}}, 100, 0, true, F32},
  };
  for (auto& c : cases) Trial(c).judge_all();
  return verdict();
}
