// What a log-probability is made of: the token's logit, the maximum and the mass of its row, the best alternatives.
// The logarithm is the reader's, in double.

// records [rows, 4 + 2 n_top] of tokens [rows] (below 0: nothing is written): the logit of the token and the maximum, before edits, as
// float32; the mass in units of 2^-44, the lower half first (0: the logits are not finite); n_top times a token (-1: there are no more) and its logit.
// Rows that ask for no log-probability are left as they are.
// launch: grid (rows), 256 threads.
KERNEL LAUNCH(256, 2) logprobs(const float* logits, const Ask* asks, const Edit* edits, const int* edit_starts, const float* unedited, const uint64_t* best,
                               const uint64_t* masses, const uint64_t* top, const int* tokens, int* records, int vocab, int splits, int n_top) {
  __shared__ uint64_t red[32];
  __shared__ float logit;
  const Ask ask = asks[BX];
  const int token = tokens[BX];
  if (ask.n_top < 0 || token < 0) return;
  int* record = records + (int64_t)BX * (4 + 2 * n_top);
  uint64_t most = row_best<256>(best, BX, splits, 0, red);
  if (TX == 0) logit = logits[(int64_t)BX * vocab + token];
  block_sync();
  if (ask.given < 0 && ask.inverse > 0) {
    const int* from = edit_starts + BX * (splits + 1) + token / SPLIT;
    for (int e = from[0] + TX; e < from[1]; e += 256)
      if (edits[e].token == token) logit = unedited[e];
  }
  uint64_t mass = 0;
  for (int s = TX; s < splits; s += 256) mass += masses[((int64_t)BX * splits + s) * MASSES];
  mass = warp_sum(mass);
  block_sync();
  if (lane_() == 0) red[TX / WARP] = mass;
  block_sync();
  if (TX == 0) {
    for (int w = 1; w < 256 / WARP; ++w) mass += red[w];
    if (!is_finite(most)) mass = 0;
    F own, maximum;
    own.f = logit, maximum.f = value_of(most);
    record[0] = own.s, record[1] = maximum.s, record[2] = (int)mass, record[3] = (int)(mass >> 32);
  }
  // An alternative's place is how many are better.
  const uint64_t* keys = top + (int64_t)BX * splits * n_top;
  for (int n = TX; n < ask.n_top; n += 256) record[4 + 2 * n] = -1;
  block_sync();
  for (int i = TX; i < splits * n_top; i += 256) {
    if (i % n_top >= ask.n_top || !keys[i]) continue;
    int place = 0;
    for (int j = 0; j < splits * n_top && place < ask.n_top; ++j) place += j % n_top < ask.n_top && keys[j] > keys[i];
    if (place < ask.n_top) {
      F value;
      value.f = value_of(keys[i]);
      record[4 + 2 * place] = token_of(keys[i]), record[5 + 2 * place] = value.s;
    }
  }
}
