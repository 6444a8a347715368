// Rotation, alone and with the writing of keys and values, against double; pages against kv_write's.
#include "test.h"

struct Case {
  int heads, kv_heads, dim, half;
  bool interleaved;
  int gap; // Between rows.
};

static const int rows = 7, positions = 40;

static std::vector<double> turned(const std::vector<float>& x, const Case& c, int stride, int heads, const std::vector<float>& table,
                                  const std::vector<int>& at, double sign) {
  std::vector<double> y(x.begin(), x.end());
  for (int r = 0; r < rows; ++r)
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < c.half; ++i) {
        size_t base = (size_t)r * stride + h * c.dim, a = base + (c.interleaved ? 2 * i : i), b = base + (c.interleaved ? 2 * i + 1 : i + c.half);
        double cos = table[at[r] * 2 * c.half + i], sin = sign * table[at[r] * 2 * c.half + c.half + i];
        y[a] = x[a] * cos - x[b] * sin;
        y[b] = x[b] * cos + x[a] * sin;
      }
  return y;
}

template <class E>
static void fused(const std::string& name, const Case& c) {
  int width = (c.heads + 2 * c.kv_heads) * c.dim, stride = width + c.gap, kv = c.kv_heads * c.dim, blocks = 3;
  auto qkv = normal((size_t)rows * stride), table = normal((size_t)positions * 2 * c.half);
  std::vector<int> at, slots;
  for (int r = 0; r < rows; ++r) {
    at.push_back(r * 37 % positions);
    slots.push_back(r == 3 ? -1 : (r * 45 + 5) % (blocks * BLOCK));
  }
  // The parts one after the other: rotate, then write.
  auto apart = qkv, before = qkv;
  std::vector<char> want(blocks * c.kv_heads * page_bytes<E>(c.dim), (char)0xff), got = want;
  launch_kernel(rope, rows, ((c.heads + c.kv_heads) * ((c.half + 3) / 4) + 255) / 256, 1, 256, apart.data(), table.data(), at.data(), stride, c.heads + c.kv_heads, c.dim, c.half, c.interleaved, 1);
  const float* k = apart.data() + c.heads * c.dim;
  launch_as(kv_write_bf16, "kv_write_" + name, rows, (c.kv_heads + 3) / 4, 1, 4 * WARP, k, k + kv, slots.data(), want.data(), stride, stride, c.kv_heads, c.dim);
  launch_as(rope_kv_write_bf16, "rope_kv_write_" + name, rows, (c.heads + c.kv_heads + 3) / 4, 1, 4 * WARP, qkv.data(), table.data(), at.data(), slots.data(),
            got.data(), stride, c.heads, c.kv_heads, c.dim, c.half, c.interleaved);
  std::string what = "rope_kv_write_" + name + " of " + std::to_string(c.dim);
  judge(what + ": pages unlike kv_write's", memcmp(got.data(), want.data(), got.size()) != 0, 0);
  bool same = true;
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < stride; ++i) same &= qkv[r * stride + i] == (i < c.heads * c.dim ? apart : before)[r * stride + i];
  judge(what + ": rows", !same, 0);
}

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  for (const Case& c : std::vector<Case>{{2, 1, 64, 32, false, 4},
                                         {2, 1, 64, 32, true, 0},
                                         {3, 5, 80, 10, false, 0}, // Not four pairs at a time.
                                         {3, 2, 80, 10, true, 8},
                                         {4, 4, 256, 64, false, 0},
                                         {33, 3, 128, 64, false, 4}}) {
    std::string what = "rope of " + std::to_string(c.dim) + ", " + std::to_string(2 * c.half) + (c.interleaved ? " interleaved" : "");
    for (float sign : {1.f, -1.f})
      for (int odd : {0, 1}) { // Rows that begin anywhere.
        int stride = c.heads * c.dim + c.gap + odd;
        auto x = normal((size_t)rows * stride + odd), table = normal((size_t)positions * 2 * c.half);
        std::vector<int> at;
        for (int r = 0; r < rows; ++r) at.push_back(r * 37 % positions);
        std::vector<float> mine(x.begin() + odd, x.end()), to = x;
        launch_kernel(rope, rows, (c.heads * ((c.half + 3) / 4) + 255) / 256, 1, 256, to.data() + odd, table.data(), at.data(), stride, c.heads, c.dim, c.half, c.interleaved, sign);
        std::vector<float> got(to.begin() + odd, to.end());
        judge(what, distance(got, turned(mine, c, stride, c.heads, table, at, sign)), 1e-7);
      }
    fused<uint16_t>("bf16", c);
    fused<int8>("int8", c);
    fused<float>("f32", c);
  }
  return verdict();
}
