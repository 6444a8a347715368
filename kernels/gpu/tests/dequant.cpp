#include "test.h"

struct Format {
  const char* name;
  int bits;
  std::vector<float> levels;
};

static std::vector<Format> formats() {
  std::vector<float> int4, int8, fp8;
  for (int c = 0; c < 16; ++c) int4.push_back(c - 8);
  for (int c = 0; c < 256; ++c) int8.push_back((int8_t)c);
  for (int c = 0; c < 256; ++c) {
    int exponent = c >> 3 & 15, fraction = c & 7;
    float v = exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
    fp8.push_back(c & 128 ? -v : v);
  }
  std::vector<float> nf4 = {-1.0,         -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0,
                            0.0795803f, 0.1609302f,  0.2461123f,   0.33791524f, 0.44070983f,  0.562617f,    0.72295684f,   1.0};
  return {{"int4", 4, int4}, {"nf4", 4, nf4}, {"int8", 8, int8}, {"fp8", 8, fp8}};
}

// Codes a byte each as a device holds them: pieces of 64 bytes, unit q of each the quads q of its tiles.
static std::vector<uint8_t> held(const std::vector<uint8_t>& codes, int n, int k, int bits, int row_bytes) {
  std::vector<uint8_t> to((size_t)n * row_bytes, 0);
  int span = 64 * 8 / bits;
  for (int r = 0; r < n; ++r)
    for (int i = 0; i < k; ++i) {
      int tile = i % span / 16, q = i % 16 / 4, e = i % 4, bit = (tile * 4 + e) * bits;
      to[(size_t)r * row_bytes + i / span * 64 + 16 * q + bit / 8] |= codes[(size_t)r * k + i] << bit % 8;
    }
  return to;
}

// Memory that begins at 16 bytes.
template <class T>
struct Placed {
  std::vector<T> memory;
  T* at;
  Placed(const std::vector<T>& from) : memory(from.size() + 16) {
    at = (T*)(((uintptr_t)memory.data() + 15) & ~(uintptr_t)15);
    std::copy(from.begin(), from.end(), at);
  }
};

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  for (auto [rows, n, k] : {std::tuple{1, 17, 64}, {5, 33, 200}, {16, 16, 1104}, {21, 40, 2600}}) {
    std::string shape = " of " + std::to_string(rows) + " rows, [" + std::to_string(n) + ", " + std::to_string(k) + "]";
    const int x_stride = k + 4, y_stride = n + 3;
    auto dense = normal(rows * x_stride);
    Placed<float> x(dense);
    auto bias = normal(n);
    std::vector<double> rounded_x(rows * k);
    for (int i = 0; i < rows * k; ++i) rounded_x[i] = bf(to_bf(dense[i / k * x_stride + i % k]));

    for (const Format& format : formats())
      for (int group : {16, 32, 48, 64, 128, 256, k, 4})
        for (bool with_offsets : {false, true}) {
          if (rows > 1 && with_offsets != (group % 64 == 0)) continue;
          int groups = (k + group - 1) / group, span = 64 * 8 / format.bits, row_bytes = (k + span - 1) / span * 64;
          std::vector<uint8_t> codes(n * k);
          for (uint8_t& code : codes) {
            code = generator() & ((1 << format.bits) - 1);
            if (format.bits == 8 && (code & 127) == 127) code = 0;
          }
          Placed<uint8_t> laid(held(codes, n, k, format.bits, row_bytes));
          auto scales = normal(n * groups), offsets = normal(n * groups, format.levels.back());
          const float* given = with_offsets ? offsets.data() : nullptr;
          std::string what = std::string(format.name) + " in groups of " + std::to_string(group) + (with_offsets ? " with offsets" : "") + shape;
          auto level = [&](int c, int i) { return format.levels[codes[c * k + i]]; };

          std::vector<uint16_t> to(n * k, 0x7fc0);
          launch_as(dequantise_4, format.bits == 4 ? "dequantise_4" : "dequantise_8", n, (k + 2047) / 2048, 1, 256, laid.at, format.levels.data(), scales.data(),
                    given, to.data(), k, row_bytes, group, groups);
          int wrong = 0;
          for (int c = 0; c < n; ++c)
            for (int i = 0; i < k; ++i) {
              volatile float scaled = level(c, i) * scales[c * groups + i / group];
              wrong += to[c * k + i] != to_bf(with_offsets ? scaled + offsets[c * groups + i / group] : scaled);
            }
          judge("dequantised " + what + ", numbers that differ", wrong, 0);

          if (group == 4) continue;
          bool added = group % 32 == 0;  // A bias, and y itself.
          auto before = normal(rows * y_stride);
          auto y = before;
          launch_as(few_rows_4, format.bits == 4 ? "few_rows_4" : "few_rows_8", (n + 15) / 16, (rows + 15) / 16, 1, 256, x.at, x_stride, laid.at,
                    format.levels.data(), scales.data(), given, added ? bias.data() : nullptr, added ? y.data() : nullptr, y.data(), y_stride, rows, n, k, row_bytes,
                    group, groups);
          std::vector<double> want(before.begin(), before.end());
          for (int r = 0; r < rows; ++r)
            for (int c = 0; c < n; ++c) {
              double& to = want[r * y_stride + c];
              to = added ? to + bias[c] : 0;
              for (int i = 0; i < k; ++i) {
                double v = (double)bf(to_bf(level(c, i))) * scales[c * groups + i / group] + (with_offsets ? offsets[c * groups + i / group] : 0.f);
                to += rounded_x[r * k + i] * v;
              }
            }
          judge("few rows, " + what, distance(y, want), 1e-6);
        }
  }
  return verdict();
}
