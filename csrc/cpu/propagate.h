// propagate: one head at a time. Rows of A, as exp(score - maximum) and a factor each, are made a few at a time and added
// up at once; where they fit in the cache they are kept for the next iteration, else made again, to the same bits.
constexpr int kHeadRows = kParts == 1 ? 8 : 4;  // accumulators: all registers but those of the operands

// out[r][j] = q[r] k[j] scale + bias[j]: sums over d, in order. k is transposed, (D, padded).
INLINE void score_rows(const float* const* q, const float* k, int64_t D, int64_t padded, float scale, const float* bias, float* const* out) {
  constexpr int kWide = kParts == 4 ? 1 : 2;
  for (int64_t j = 0; j < padded; j += 16 * kWide) {
    vf acc[kHeadRows][kWide] = {};
    for (int64_t d = 0; d < D; ++d) {
      vf key[kWide];
      for (int w = 0; w < kWide; ++w) key[w] = load<vf>(k + d * padded + j + 16 * w);
      _Pragma("GCC unroll 8") for (int r = 0; r < kHeadRows; ++r) {
        const vf query = splat(q[r][d]);
        for (int w = 0; w < kWide; ++w) acc[r][w] = acc[r][w] + query * key[w];
      }
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < kHeadRows; ++r)
      for (int w = 0; w < kWide; ++w) store(out[r] + j + 16 * w, acc[r][w] * scale + load<vf>(bias + j + 16 * w));
  }
}

void propagate(const Propagate& p, int64_t head_begin, int64_t head_end) {
  const int64_t N = p.N, D = p.D, padded = round_up(N, 32);
  const bool keeps = p.iterations > 1 && N * padded <= p.kept;
  float* const k = (float*)scratch((D * padded + 3 * padded + N) * sizeof(float), 0);
  float *const bias = k + D * padded, *next = bias + padded, *s = next + padded, *const factor = s + padded;
  float* const rows = (float*)scratch((keeps ? N + kHeadRows : kHeadRows) * padded * sizeof(float), 1);
  for (int64_t head = head_begin; head < head_end; ++head) {
    const int64_t b = head / p.H, h = head % p.H;
    const float *q = p.q + b * p.q_stride[0] + h * p.q_stride[1], *keys = p.k + b * p.k_stride[0] + h * p.k_stride[1];
    for (int64_t j = 0; j < padded; ++j) {
      for (int64_t d = 0; d < D; ++d) k[d * padded + j] = j < N ? keys[j * p.k_stride[2] + d] : 0.f;
      bias[j] = j >= N ? -__builtin_inff() : p.key_bias ? p.key_bias[b * N + j] : 0.f;
      s[j] = j < N ? p.start[head * N + j] : 0.f;
    }
    for (int64_t iteration = 0; iteration < p.iterations; ++iteration) {
      for (int64_t j = 0; j < padded; ++j) next[j] = 0;
      for (int64_t i = 0; i < N; i += kHeadRows) {
        const int count = N - i < kHeadRows ? (int)(N - i) : kHeadRows;
        float* const block = rows + (keeps ? i * padded : 0);
        float share[kHeadRows];
        if (!keeps || iteration == 0) {
          const float* queries[kHeadRows];
          float* out[kHeadRows];
          for (int r = 0; r < kHeadRows; ++r) queries[r] = q + (i + (r < count ? r : 0)) * p.q_stride[2], out[r] = block + r * padded;
          score_rows(queries, k, D, padded, p.scale, bias, out);
          for (int r = 0; r < count; ++r) factor[i + r] = 1.f / exponentials(out[r], padded);
        }
        for (int r = 0; r < count; ++r) share[r] = s[i + r] * factor[i + r];
        for (int64_t j = 0; j < padded; j += 16) {
          vf y = load<vf>(next + j);
          if (count == kHeadRows) {
            _Pragma("GCC unroll 8") for (int r = 0; r < kHeadRows; ++r) y = y + share[r] * load<vf>(block + r * padded + j);
          } else {
            for (int r = 0; r < count; ++r) y = y + share[r] * load<vf>(block + r * padded + j);
          }
          store(next + j, y);
        }
      }
      float* const before = s;
      s = next, next = before;
    }
    __builtin_memcpy(p.out + head * N, s, N * sizeof(float));
  }
}
