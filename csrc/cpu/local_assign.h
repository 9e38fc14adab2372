// local_assign: a token's weights over the centres near it; then centres as means of the tokens that have them as candidates.
// Every centre adds up its own tokens, in order: no two write to one place.

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// out[i] = |x - centres[i]|^2 or x centres[i].
template <bool kSquares, int kRows> INLINE void compare(const float* x, const float* const* centres, int64_t C, float* out) {
  vf sums[kRows] = {};
  for (int64_t c = 0; c < C; c += 16) {
    const vf v = load_floats(x + c, C - c);
    for (int i = 0; i < kRows; ++i) {
      const vf centre = load_floats(centres[i] + c, C - c), d = v - centre;
      sums[i] = sums[i] + (kSquares ? d * d : v * centre);
    }
  }
  for (int i = 0; i < kRows; ++i) out[i] = lane_sum(sums[i]);
}
template <bool kSquares> INLINE void compare(const float* x, const float* const* centres, int64_t n, int64_t C, float* out) {
  for (; n >= 4; n -= 4, centres += 4, out += 4) compare<kSquares, 4>(x, centres, C, out);
  if (n == 3) compare<kSquares, 3>(x, centres, C, out);
  if (n == 2) compare<kSquares, 2>(x, centres, C, out);
  if (n == 1) compare<kSquares, 1>(x, centres, C, out);
}

void assign_tokens(const LocalAssign& p, int64_t token_begin, int64_t token_end) {
  const int64_t window = p.window, reach = window / 2, W = window * window, C = p.C, padded = round_up(W, 16);
  float* const logits = (float*)scratch((2 * padded + C) * sizeof(float), 0);
  float *const found = logits + padded, *const zeros = found + padded;
  const float** const near = (const float**)scratch(W * (sizeof(float*) + sizeof(int64_t)), 1);
  int64_t* const slots = (int64_t*)(near + W);
  for (int64_t c = 0; c < C; ++c) zeros[c] = 0;
  for (int64_t item = token_begin; item < token_end; ++item) {
    const int64_t b = item / (p.h * p.w), i = item % (p.h * p.w);
    const int64_t top = i / p.w * p.gh / p.h - reach, left = i % p.w * p.gw / p.w - reach;
    const float* centres = p.centres + b * p.gh * p.gw * C;
    int32_t* const index = p.index + item * W;
    int64_t n = 0;
    for (int64_t slot = 0; slot < padded; ++slot) logits[slot] = -__builtin_inff();
    for (int64_t slot = 0; slot < W; ++slot) {
      const int64_t y = top + slot / window, x = left + slot % window;
      const bool inside = 0 <= y && y < p.gh && 0 <= x && x < p.gw;
      index[slot] = inside ? (int32_t)(y * p.gw + x) : -1;
      if (inside || !p.mask) near[n] = inside ? centres + index[slot] * C : zeros, slots[n++] = slot;
    }
    p.squares ? compare<true>(p.x + item * C, near, n, C, found) : compare<false>(p.x + item * C, near, n, C, found);
    for (int64_t t = 0; t < n; ++t) logits[slots[t]] = (p.squares ? -p.tau : p.tau) * found[t];
    const float sum = exponentials(logits, padded);
    for (int64_t slot = 0; slot < W; ++slot) p.weight[item * W + slot] = logits[slot] / sum;
  }
}

void move_centres(const LocalAssign& p, int64_t centre_begin, int64_t centre_end) {
  constexpr int kWide = 4;
  const int64_t window = p.window, reach = window / 2, W = window * window, C = p.C;
  const float** const rows = (const float**)scratch(p.h * p.w * (sizeof(float*) + sizeof(float)), 0);
  float* const share = (float*)(rows + p.h * p.w);
  for (int64_t item = centre_begin; item < centre_end; ++item) {
    const int64_t b = item / (p.gh * p.gw), y = item / p.gw % p.gh, x = item % p.gw;
    // Homes ascend with tokens, so those in reach are a rectangle of tokens.
    const auto first = [](int64_t home, int64_t tokens, int64_t homes) { return home < 0 ? 0 : home > homes ? tokens : ceil_div(home * tokens, homes); };
    const int64_t top = first(y - reach, p.h, p.gh), bottom = first(y + reach + 1, p.h, p.gh);
    const int64_t left = first(x - reach, p.w, p.gw), right = first(x + reach + 1, p.w, p.gw);
    int64_t n = 0;
    float mass = 0;
    for (int64_t i = top; i < bottom; ++i)
      for (int64_t j = left; j < right; ++j) {
        const int64_t token = (b * p.h + i) * p.w + j, slot = (y - i * p.gh / p.h + reach) * window + x - j * p.gw / p.w + reach;
        share[n] = p.weight[token * W + slot];
        mass += share[n];
        rows[n++] = p.x + token * C;
      }
    mass = mass < 1e-12f ? 1e-12f : mass;  // reference/local_assign.py: FLOOR
    float* const centre = p.centres + item * C;
    int64_t c = 0;
    for (; c + 16 * kWide <= C; c += 16 * kWide) {
      vf sums[kWide] = {};
      for (int64_t t = 0; t < n; ++t)
        for (int i = 0; i < kWide; ++i) sums[i] = sums[i] + share[t] * load<vf>(rows[t] + c + 16 * i);
      for (int i = 0; i < kWide; ++i) store(centre + c + 16 * i, sums[i] / mass);
    }
    for (; c < C; c += 16) {
      vf sum = {};
      for (int64_t t = 0; t < n; ++t) sum = sum + share[t] * load_floats(rows[t] + c, C - c);
      store_floats(centre + c, sum / mass, C - c);
    }
  }
}
