// LoRA of many adapters against double: mixed adapters and ranks in a batch, parts of a fused linear, rows of none.
#include "test.h"

struct Part { int column, columns, rank, ranks; float scale; };
struct Adapter { int ranks; std::vector<Part> parts; };

static std::string name(const char* what, int k, int n, bool bf16) {
  return std::string(what) + " of " + std::to_string(k) + " to " + std::to_string(n) + (bf16 ? ", bf16" : ", float32");
}

static void all(int k, int n, int x_gap, bool bf16, const std::vector<Adapter>& adapters, const std::vector<std::vector<int>>& tiles, int k_each) {
  int rows = 0, width = 0, most = 0;
  for (auto& tile : tiles) rows = std::max(rows, tile[0] + tile[1]);
  for (auto& adapter : adapters) {
    width = std::max(width, adapter.ranks);
    most = std::max(most, (int)adapter.parts.size());
  }
  int splits = (k + k_each - 1) / k_each, x_stride = k + x_gap, y_stride = n + 4;
  auto x = normal(rows * x_stride), y = normal(rows * y_stride);
  struct Numbers { std::vector<float> exact; std::vector<uint16_t> rounded; };
  auto make = [&](size_t count, float spread) {
    Numbers v{normal(count, spread), {}};
    v.rounded = ::rounded(v.exact);
    if (bf16) v.exact = widened(v.rounded);
    return v;
  };
  auto in_precision = [&](double v) { return bf16 ? (double)bf(to_bf((float)v)) : v; };
  std::vector<Numbers> as;
  std::vector<std::vector<Numbers>> bs;
  std::vector<char> table(adapters.size() * (16 + 32 * most));
  for (size_t i = 0; i < adapters.size(); ++i) {
    as.push_back(make((size_t)adapters[i].ranks * k, 1 / sqrtf(k)));
    bs.emplace_back();
    for (auto& part : adapters[i].parts) bs[i].push_back(make((size_t)part.columns * part.ranks, 1));
  }
  for (size_t i = 0; i < adapters.size(); ++i) {
    char* record = &table[i * (16 + 32 * most)];
    auto pointer = [&](const Numbers& v) { return bf16 ? (uint64_t)v.rounded.data() : (uint64_t)v.exact.data(); };
    LoraModule module{adapters[i].ranks ? pointer(as[i]) : 0, adapters[i].ranks, (int)adapters[i].parts.size()};
    memcpy(record, &module, sizeof module);
    for (size_t p = 0; p < adapters[i].parts.size(); ++p) {
      auto& own = adapters[i].parts[p];
      LoraPart part{pointer(bs[i][p]), own.column, own.columns, own.rank, own.ranks, own.scale, 0};
      memcpy(record + 16 + 32 * p, &part, sizeof part);
    }
  }
  std::vector<int> flat;
  for (auto& tile : tiles) flat.insert(flat.end(), tile.begin(), tile.end());

  // What is rounded on the way is the kernel's own result: its shrunk rows are judged first, then used.
  std::vector<float> partial((size_t)splits * rows * width, NAN), shrunk((size_t)rows * width, -0.01f), got = y;
  auto run = [&](const std::vector<int>& tiles, std::vector<float>& y, float* keep) {
    int count = tiles.size() / 3;
    launch_as(lora_shrink, bf16 ? "lora_shrink" : "lora_shrink_f32", count, (width + 31) / 32, splits, 256, x.data(), x_stride, table.data(), most, tiles.data(),
              partial.data(), rows, width, k, k_each);
    launch_as(lora_expand, bf16 ? "lora_expand" : "lora_expand_f32", count, (n + 255) / 256, 1, 256, partial.data(), table.data(), most, tiles.data(), y.data(),
              y_stride, keep, rows, width, splits);
  };
  run(flat, got, shrunk.data());
  std::vector<double> want(y.begin(), y.end()), want_shrunk(shrunk.size(), -0.01f);
  for (auto& tile : tiles) {
    if (tile[2] < 0) continue;
    auto& adapter = adapters[tile[2]];
    for (int row = tile[0]; row < tile[0] + tile[1]; ++row) {
      for (size_t p = 0; p < adapter.parts.size(); ++p) {
        auto& part = adapter.parts[p];
        std::vector<double> scaled(part.ranks);
        for (int r = 0; r < part.ranks; ++r) {
          double sum = 0;
          for (int i = 0; i < k; ++i) sum += in_precision(x[(size_t)row * x_stride + i]) * as[tile[2]].exact[(size_t)(part.rank + r) * k + i];
          size_t at = (size_t)row * width + part.rank + r;
          want_shrunk[at] = sum;
          scaled[r] = in_precision(part.scale * shrunk[at]);
        }
        for (int c = 0; c < part.columns; ++c) {
          double sum = 0;
          for (int r = 0; r < part.ranks; ++r) sum += scaled[r] * bs[tile[2]][p].exact[(size_t)c * part.ranks + r];
          want[(size_t)row * y_stride + part.column + c] += sum;
        }
      }
    }
  }
  judge(name("shrunk rows", k, n, bf16), distance(shrunk, want_shrunk), 1e-6);
  judge(name("y", k, n, bf16), distance(got, want), 1e-6);

  // Each tile alone: the same bits.
  auto alone = y;
  for (auto& tile : tiles) run(tile, alone, nullptr);
  judge(name("a tile alone", k, n, bf16), alone == got ? 0 : 1, 0);
  // One row of the last tile alone.
  auto tile = tiles.back();
  tile[0] += tile[1] - 1, tile[1] = 1;
  auto row = y;
  run(tile, row, nullptr);
  judge(name("a row alone", k, n, bf16), std::equal(row.begin() + (size_t)tile[0] * y_stride, row.begin() + (size_t)tile[0] * y_stride + n, got.begin() + (size_t)tile[0] * y_stride) ? 0 : 1, 0);
}

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  // q, k, v of one linear; one part alone; a rank that is none; parts of ranks of their own; no module at all.
  for (bool bf16 : {true, false}) {
    std::vector<Adapter> fused = {
        {24, {{0, 256, 0, 8, 2}, {256, 64, 8, 8, 2}, {320, 64, 16, 8, 0.5f}}},
        {1, {{0, 256, 0, 1, 3}}},
        {34, {{0, 256, 0, 17, 1}, {320, 64, 17, 17, 0.25f}}},
        {0, {}},
        {128, {{0, 256, 0, 64, 1}, {256, 64, 64, 64, 1}}},
    };
    std::vector<std::vector<int>> mixed = {{0, 1, 1}, {1, 16, 0}, {17, 3, 0}, {20, 2, -1}, {22, 1, 2}, {23, 2, 3}, {25, 5, 4}, {30, 7, 2}};
    all(512, 384, 0, bf16, fused, mixed, 256);
    all(200, 384, 0, bf16, fused, mixed, 96);
    all(77, 384, 3, bf16, fused, mixed, 64);
    // Ranks beyond a chunk, and columns that fill no tile.
    all(64, 301, 0, bf16, {{300, {{0, 1, 0, 20, 1}, {1, 300, 20, 280, 0.1f}}}}, {{0, 3, 0}}, 64);
  }
  return verdict();
}
