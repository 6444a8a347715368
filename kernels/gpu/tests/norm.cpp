#include "test.h"

int main() {
  for (int width : {64, 100, 576, 4096}) {
    const int rows = 3;
    auto x = normal(rows * width), weight = normal(width);
    std::vector<float> out(rows * width, NAN);
    launch([&] { rms_norm(x.data(), weight.data(), out.data(), width, 1e-5f); }, rows, 1, 1, 256);
    std::vector<double> want(rows * width);
    for (int r = 0; r < rows; ++r) {
      double sum = 0;
      for (int i = 0; i < width; ++i) sum += (double)x[r * width + i] * x[r * width + i];
      for (int i = 0; i < width; ++i) want[r * width + i] = x[r * width + i] / sqrt(sum / width + 1e-5) * weight[i];
    }
    judge("rms_norm of " + std::to_string(width), distance(out, want), 1e-6);
  }
  return verdict();
}
