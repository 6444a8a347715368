// The lookup, bit by bit: both precisions, wide and odd rows, a table that is a part, ids of other parts.
#include "test.h"

int main(int arguments, char** argument) {
  take_arguments(arguments, argument);
  const int rows = 50, first = 100;
  const float scale = 1.75f;
  for (int width : {64, 2056, 33}) {
    auto exact = normal(rows * width);
    auto table = rounded(exact);
    auto near = widened(table);
    std::vector<int> ids = {100, 149, 120, 99, 150, 120, 0};
    size_t n = ids.size() * width;
    std::vector<float> from_bf16(n, NAN), from_float(n, NAN), want_bf16(n), want_float(n);
    for (size_t t = 0; t < ids.size(); ++t)
      for (int i = 0; i < width && ids[t] >= first && ids[t] < first + rows; ++i) {
        want_bf16[t * width + i] = near[(ids[t] - first) * width + i] * scale;
        want_float[t * width + i] = exact[(ids[t] - first) * width + i] * scale;
      }
    int columns = (width + 2047) / 2048;
    launch_kernel(embed, ids.size(), columns, 1, 256, table.data(), ids.data(), from_bf16.data(), first, rows, width, scale);
    launch_kernel(embed_f32, ids.size(), columns, 1, 256, exact.data(), ids.data(), from_float.data(), first, rows, width, scale);
    judge("bf16 rows of " + std::to_string(width), from_bf16 == want_bf16 ? 0 : 1, 0);
    judge("float32 rows of " + std::to_string(width), from_float == want_float ? 0 : 1, 0);
  }
  return verdict();
}
