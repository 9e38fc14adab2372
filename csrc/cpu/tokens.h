// match_tokens and mean_heads. The tokens of a are packed in panels of 16, component after component, so that a lane is a
// token and every score is one sum in the order of the components, on every instruction set. Those of b stay where they are.
constexpr int kMatchRows = 8 / kParts;  // of b at a time: what the registers hold

#if defined(USE_AVX512_VNNI)
INLINE uint32_t lanes_above(vf x, float y) { return _mm512_cmp_ps_mask((__m512)x.v[0], _mm512_set1_ps(y), _CMP_GT_OQ); }
#else
INLINE uint32_t lanes_above(vf x, float y) {
  float lanes[16];
  store(lanes, x);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (uint32_t)(lanes[i] > y) << i;
  return mask;
}
#endif

INLINE float inverse_norm(const float* x, int64_t D) {
  vf squares[4] = {};
  int64_t d = 0;
  for (; d + 64 <= D; d += 64)
    for (int i = 0; i < 4; ++i) {
      const vf v = load<vf>(x + d + 16 * i);
      squares[i] = squares[i] + v * v;
    }
  for (int i = 0; d < D; ++i, d += 16) {
    const vf v = load_16<vf>(x + d, D - d);
    squares[i] = squares[i] + v * v;
  }
  float lanes[16];
  store(lanes, (squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  const float norm = __builtin_sqrtf(lanes[0]);
  return 1.f / (norm < 1e-12f ? 1e-12f : norm);
}

typedef float f4 __attribute__((vector_size(16)));
INLINE void transpose(const f4* x, f4* y) {  // 4 x 4
  const f4 a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5), b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const f4 c = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7), d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  y[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5), y[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  y[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5), y[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}
// Sixteen rows of D floats, times a scale each, to D vectors of sixteen.
INLINE void pack_panel(const float* const* rows, const float* scale, int64_t D, float* out) {
  const int64_t whole = D / 4 * 4;
  for (int t = 0; t < 16; t += 4) {
    for (int64_t d = 0; d < whole; d += 4) {
      f4 x[4], y[4];
      for (int i = 0; i < 4; ++i) {
        __builtin_memcpy(&x[i], rows[t + i] + d, 16);
        x[i] = x[i] * scale[t + i];
      }
      transpose(x, y);
      for (int i = 0; i < 4; ++i) __builtin_memcpy(out + (d + i) * 16 + t, &y[i], 16);
    }
    for (int64_t d = whole; d < D; ++d)
      for (int i = 0; i < 4; ++i) out[d * 16 + t + i] = rows[t + i][d] * scale[t + i];
  }
}
// n vectors of sixteen, n a multiple of 4, to sixteen rows of n.
INLINE void unpack_panel(const float* x, int64_t n, float* rows) {
  for (int t = 0; t < 16; t += 4)
    for (int64_t j = 0; j < n; j += 4) {
      f4 in[4], out[4];
      for (int i = 0; i < 4; ++i) __builtin_memcpy(&in[i], x + (j + i) * 16 + t, 16);
      transpose(in, out);
      for (int i = 0; i < 4; ++i) __builtin_memcpy(rows + (t + i) * n + j, &out[i], 16);
    }
}

// Of a panel with kMatchRows rows of b, times a scale each: the larger the nearer, NaN as -inf.
template <bool kL2> INLINE void score_block(const float* a, const float* const* b, const float* scale, int64_t D, float* out) {
  vf sum[kMatchRows] = {};
  for (int64_t d = 0; d < D; ++d) {
    const vf x = load<vf>(a + d * 16);
    for (int r = 0; r < kMatchRows; ++r) {
      if constexpr (kL2) {
        const vf distance = x - b[r][d];
        sum[r] = sum[r] - distance * distance;
      } else {
        sum[r] = sum[r] + x * b[r][d];
      }
    }
  }
  for (int r = 0; r < kMatchRows; ++r) store(out + r * 16, vmax(sum[r] * scale[r], -__builtin_inff()));
}

// Sixteen tokens with n scores each: the best that is not the token's `exclude`, and its place; -inf and 0 where all are -inf.
INLINE void pick_one(const float* score, int64_t n, const int32_t* exclude, float* value, int32_t* place) {
  vf best = splat(-__builtin_inff());
  vi at = {};
  const vi other = load<vi>(exclude);
  for (int64_t j = 0; j < n; ++j) {
    const vf s = load<vf>(score + j * 16);
    EACH {
      const ri better = (s.v[i] > best.v[i]) & (other.v[i] != (int32_t)j);
      best.v[i] = better ? s.v[i] : best.v[i];
      at.v[i] = better ? (int32_t)j - ri{} : at.v[i];
    }
  }
  store(value, best), store(place, at);
}
// One token with n scores, and -inf up to a multiple of 16: the best topk in order; -1 where there are fewer.
INLINE void pick(const float* score, int64_t n, int64_t exclude, int64_t topk, float* value, int32_t* place) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += 16) {
    uint32_t left = count < topk ? 0xffff : lanes_above(load<vf>(score + j), value[topk - 1]);
    for (; left; left &= left - 1) {
      const int64_t at = j + __builtin_ctz(left);
      const float s = score[at];
      if (at >= n || at == exclude || (count == topk && !(s > value[topk - 1]))) continue;
      int64_t t = count < topk ? count++ : topk - 1;
      for (; t > 0 && value[t - 1] < s; --t) value[t] = value[t - 1], place[t] = place[t - 1];
      value[t] = s, place[t] = (int32_t)at;
    }
  }
  for (; count < topk; ++count) value[count] = -__builtin_inff(), place[count] = -1;
}

template <bool kL2> INLINE void match_rows(const Match& p, int64_t image, int64_t begin, int64_t end) {
  const int64_t D = p.D, topk = p.topk, n = p.Nb - p.first, padded = round_up(n, 16);
  float* const panel = (float*)scratch((16 * D + padded) * sizeof(float), 0), *const b_scale = panel + 16 * D;
  float *const score = (float*)scratch(2 * 16 * padded * sizeof(float), 1), *const rows = score + 16 * padded;
  const float* const b = p.b + image * p.b_stride[0] + p.first * p.b_stride[1];
  const auto scale = [&](const float* row) { return p.metric == Metric::cosine ? inverse_norm(row, D) : 1.f; };
  for (int64_t j = 0; j < n; ++j) b_scale[j] = scale(b + j * p.b_stride[1]);
  for (int64_t m = begin; m < end; m += 16) {
    const int64_t count = end - m < 16 ? end - m : 16;
    const float* tokens[16];
    float scales[16];
    int32_t exclude[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t token = m + (i < count ? i : 0);
      tokens[i] = p.a + image * p.a_stride[0] + token * p.a_stride[1], scales[i] = scale(tokens[i]);
      exclude[i] = p.exclude ? p.exclude[image * p.Na + token] - (int32_t)p.first : -1;
    }
    pack_panel(tokens, scales, D, panel);
    for (int64_t j = 0; j < n; j += kMatchRows) {
      const float* rows_of_b[kMatchRows];
      for (int r = 0; r < kMatchRows; ++r) rows_of_b[r] = b + (j + r < n ? j + r : j) * p.b_stride[1];
      score_block<kL2>(panel, rows_of_b, b_scale + j, D, score + j * 16);
    }
    float* const value = p.value + (image * p.Na + m) * topk;
    int32_t* const index = p.index + (image * p.Na + m) * topk;
    if (topk == 1) {
      float best[16];
      int32_t at[16];
      pick_one(score, n, exclude, best, at);
      for (int64_t i = 0; i < count; ++i) {
        if (!(best[i] > -__builtin_inff())) at[i] = exclude[i] == 0;
        value[i] = best[i], index[i] = at[i] < n ? at[i] : -1;
      }
    } else {
      for (int64_t i = n * 16; i < padded * 16; ++i) score[i] = -__builtin_inff();
      unpack_panel(score, padded, rows);
      for (int64_t i = 0; i < count; ++i) pick(rows + i * padded, n, exclude[i], topk, value + i * topk, index + i * topk);
    }
    for (int64_t t = 0; t < count * topk; ++t) {
      if (index[t] >= 0) index[t] += (int32_t)p.first;
      if (kL2) value[t] = -value[t];
    }
  }
}
void match_tokens(const Match& p, int64_t image, int64_t begin, int64_t end) {
  p.metric == Metric::l2 ? match_rows<true>(p, image, begin, end) : match_rows<false>(p, image, begin, end);
}

INLINE vf widen(const float* x, int64_t n) { return load_16<vf>(x, n); }
INLINE vf widen(const int8_t* x, int64_t n) { return to_float(to_int(load_16<vb>(x, n))); }
// `width` vectors of one token: the heads in order.
template <int width, class T> INLINE void mean_of(const MeanHeads& p, const T* x, const float* scale, int64_t n, float* out) {
  vf total[width] = {};
  for (int64_t h = 0; h < p.H; ++h) {
    const vf s = splat(scale[h * p.scale_stride[1]]);
    for (int i = 0; i < width; ++i) total[i] = total[i] + widen(x + h * p.x_stride[1] + 16 * i, n - 16 * i) * s;
  }
  for (int i = 0; i < width; ++i) store_16(out + 16 * i, total[i] / (float)p.H, n - 16 * i);
}
template <class T> INLINE void mean_of_rows(const MeanHeads& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t b = m / p.N, n = m % p.N;
    const T* const x = (const T*)p.x + b * p.x_stride[0] + n * p.x_stride[2];
    const float* const scale = p.scale + b * p.scale_stride[0] + n * p.scale_stride[2];
    float* const out = p.out + m * p.D;
    int64_t d = 0;
    for (; d + 64 <= p.D; d += 64) mean_of<4>(p, x + d, scale, 64, out + d);
    for (; d < p.D; d += 16) mean_of<1>(p, x + d, scale, p.D - d, out + d);
  }
}
void mean_heads(const MeanHeads& p, int64_t begin, int64_t end) {
  p.codes ? mean_of_rows<int8_t>(p, begin, end) : mean_of_rows<float>(p, begin, end);
}
