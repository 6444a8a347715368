// RMS normalisation, one pass over a row.

// out [rows, width] = x / sqrt(mean(x^2) + eps) * weight, of x [rows, width] float32 and weight [width].
// launch: grid (rows), 256 threads.
KERNEL LAUNCH(256, 2) rms_norm(const float* x, const float* weight, float* out, int width, float eps) {
  __shared__ float sums[32];
  const float* row = x + (int64_t)BX * width;
  float* to = out + (int64_t)BX * width;
  float sum = 0;
  for (int i = TX; i < width; i += 256) sum += row[i] * row[i];
  float inverse = rsqrt_(block_reduce<256>(sum, false, sums) / width + eps);
  for (int i = TX; i < width; i += 256) to[i] = row[i] * inverse * weight[i];
}
