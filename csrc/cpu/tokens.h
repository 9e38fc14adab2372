// match_tokens and mean_heads. The tokens of b are packed in panels of 16, component after component, so that a lane is a
// token and every score is one sum in the order of the components, on every instruction set.
constexpr int kMatchRows = kParts == 4 ? 2 : 4, kMatchPanels = kParts == 1 ? 2 : 1;  // what the registers hold

#if defined(USE_AVX512_VNNI)
INLINE uint32_t lanes_above(vf x, float y) { return _mm512_cmp_ps_mask((__m512)x.v[0], _mm512_set1_ps(y), _CMP_GT_OQ); }
INLINE uint32_t lanes_equal(vf x, float y) { return _mm512_cmp_ps_mask((__m512)x.v[0], _mm512_set1_ps(y), _CMP_EQ_OQ); }
#else
template <class Holds> INLINE uint32_t lanes_where(vf x, Holds holds) {
  float lanes[16];
  store(lanes, x);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (uint32_t)holds(lanes[i]) << i;
  return mask;
}
INLINE uint32_t lanes_above(vf x, float y) { return lanes_where(x, [y](float lane) { return lane > y; }); }
INLINE uint32_t lanes_equal(vf x, float y) { return lanes_where(x, [y](float lane) { return lane == y; }); }
#endif

INLINE float inverse_norm(const float* x, int64_t D) {
  vf squares[4] = {};
  for (int64_t d = 0; d < D; d += 64)
    for (int i = 0; i < 4; ++i) {
      const int64_t n = D - d - 16 * i;
      if (n <= 0) break;
      const vf v = load_16<vf>(x + d + 16 * i, n);
      squares[i] = squares[i] + v * v;
    }
  float lanes[16];
  store(lanes, (squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  const float norm = __builtin_sqrtf(lanes[0]);
  return 1.f / (norm < 1e-12f ? 1e-12f : norm);
}

// Sixteen rows of D floats, times a scale each, to D vectors of sixteen.
INLINE void pack_panel(const float* const* rows, const float* scale, int64_t D, float* out) {
  typedef float f4 __attribute__((vector_size(16)));
  const int64_t whole = D / 4 * 4;
  for (int t = 0; t < 16; t += 4) {
    for (int64_t d = 0; d < whole; d += 4) {
      f4 x[4];
      for (int i = 0; i < 4; ++i) {
        __builtin_memcpy(&x[i], rows[t + i] + d, 16);
        x[i] = x[i] * scale[t + i];
      }
      const f4 a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5), b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
      const f4 c = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7), e = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
      const f4 y[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                       __builtin_shufflevector(c, e, 0, 1, 4, 5), __builtin_shufflevector(c, e, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) __builtin_memcpy(out + (d + i) * 16 + t, &y[i], 16);
    }
    for (int64_t d = whole; d < D; ++d)
      for (int i = 0; i < 4; ++i) out[d * 16 + t + i] = rows[t + i][d] * scale[t + i];
  }
}

// Of kMatchRows rows of a with `panels` panels of b: the larger the nearer, NaN as -inf.
template <bool kL2, int panels>
INLINE void score_block(const float* a, const float* b, int64_t D, float* out, int64_t out_stride) {
  vf sum[kMatchRows][panels] = {};
  for (int64_t d = 0; d < D; ++d) {
    vf y[panels];
    for (int p = 0; p < panels; ++p) y[p] = load<vf>(b + (p * D + d) * 16);
    for (int r = 0; r < kMatchRows; ++r)
      for (int p = 0; p < panels; ++p) {
        const float x = a[r * D + d];
        if constexpr (kL2) {
          const vf distance = x - y[p];
          sum[r][p] = sum[r][p] - distance * distance;
        } else {
          sum[r][p] = sum[r][p] + x * y[p];
        }
      }
  }
  for (int r = 0; r < kMatchRows; ++r)
    for (int p = 0; p < panels; ++p) store(out + r * out_stride + p * 16, vmax(sum[r][p], -__builtin_inff()));
}

// The best of score[first .. Nb), not `exclude`; what else score holds, up to a multiple of 16, is -inf.
INLINE void pick_one(const float* score, int64_t first, int64_t Nb, int64_t exclude, float* value, int32_t* index) {
  vf top = splat(-__builtin_inff());
  for (int64_t j = 0; j < Nb; j += 16) top = vmax(load<vf>(score + j), top);
  *value = hmax(top);
  if (*value > -__builtin_inff()) {
    int64_t j = first / 16 * 16;
    uint32_t found;
    while (!(found = lanes_equal(load<vf>(score + j), *value))) j += 16;
    *index = (int32_t)(j + __builtin_ctz(found));
  } else {
    const int64_t j = first == exclude ? first + 1 : first;
    *index = j < Nb ? (int32_t)j : -1;
  }
}
INLINE void pick(const float* score, int64_t first, int64_t Nb, int64_t exclude, int64_t topk, float* value, int32_t* index) {
  int64_t count = 0;
  for (int64_t j = first / 16 * 16; j < Nb; j += 16) {
    uint32_t left = count < topk ? 0xffff : lanes_above(load<vf>(score + j), value[topk - 1]);
    for (; left; left &= left - 1) {
      const int64_t at = j + __builtin_ctz(left);
      const float s = score[at];
      if (count < topk ? at < first || at >= Nb || at == exclude : !(s > value[topk - 1])) continue;
      int64_t place = count < topk ? count++ : topk - 1;
      for (; place > 0 && value[place - 1] < s; --place) value[place] = value[place - 1], index[place] = index[place - 1];
      value[place] = s, index[place] = (int32_t)at;
    }
  }
  for (; count < topk; ++count) value[count] = -__builtin_inff(), index[count] = -1;
}

template <bool kL2>
INLINE void match_rows(const Match& p, int64_t image, int64_t begin, int64_t end) {
  const int64_t D = p.D, Nb = p.Nb, padded = round_up(Nb, 16), topk = p.topk;
  float* const packed = (float*)scratch((padded + kMatchRows) * D * sizeof(float), 0);
  float *const a = packed + padded * D, *const score = (float*)scratch(kMatchRows * padded * sizeof(float), 1);
  const auto scale = [&](const float* row) { return p.metric == Metric::cosine ? inverse_norm(row, D) : 1.f; };
  for (int64_t j = 0; j < padded; j += 16) {
    const float* rows[16];
    float scales[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t token = j + i < Nb ? j + i : Nb - 1;  // what stands beyond Nb is not picked
      rows[i] = p.b + image * p.b_stride[0] + token * p.b_stride[1];
      scales[i] = scale(rows[i]);
    }
    pack_panel(rows, scales, D, packed + j * D);
  }
  for (int64_t m = begin; m < end; m += kMatchRows) {
    const int64_t count = end - m < kMatchRows ? end - m : kMatchRows;
    for (int64_t r = 0; r < kMatchRows; ++r) {
      const float* row = p.a + image * p.a_stride[0] + (m + (r < count ? r : 0)) * p.a_stride[1];
      const float factor = scale(row);
      for (int64_t d = 0; d < D; ++d) a[r * D + d] = row[d] * factor;
    }
    int64_t j = 0;
    for (; j + 16 * kMatchPanels <= padded; j += 16 * kMatchPanels)
      score_block<kL2, kMatchPanels>(a, packed + j * D, D, score + j, padded);
    if (j < padded) score_block<kL2, 1>(a, packed + j * D, D, score + j, padded);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = image * p.Na + m + r, exclude = p.exclude ? p.exclude[row] : -1;
      float *const s = score + r * padded, *const value = p.value + row * topk;
      for (int64_t i = 0; i < p.first; ++i) s[i] = -__builtin_inff();
      for (int64_t i = Nb; i < padded; ++i) s[i] = -__builtin_inff();
      if (0 <= exclude && exclude < Nb) s[exclude] = -__builtin_inff();
      if (topk == 1)
        pick_one(s, p.first, Nb, exclude, value, p.index + row);
      else
        pick(s, p.first, Nb, exclude, topk, value, p.index + row * topk);
      for (int64_t t = 0; kL2 && t < topk; ++t) value[t] = -value[t];
    }
  }
}
void match_tokens(const Match& p, int64_t image, int64_t begin, int64_t end) {
  p.metric == Metric::l2 ? match_rows<true>(p, image, begin, end) : match_rows<false>(p, image, begin, end);
}

INLINE vf widen(const float* x, int64_t n) { return load_16<vf>(x, n); }
INLINE vf widen(const int8_t* x, int64_t n) { return to_float(to_int(load_16<vb>(x, n))); }
template <class T> INLINE void mean_of_rows(const MeanHeads& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t b = m / p.N, n = m % p.N;
    const T* const x = (const T*)p.x + b * p.x_stride[0] + n * p.x_stride[2];
    const float* const scale = p.scale + b * p.scale_stride[0] + n * p.scale_stride[2];
    for (int64_t d = 0; d < p.D; d += 16) {
      vf total = {};
      for (int64_t h = 0; h < p.H; ++h)
        total = total + widen(x + h * p.x_stride[1] + d, p.D - d) * scale[h * p.scale_stride[1]];
      store_16(p.out + m * p.D + d, total / (float)p.H, p.D - d);
    }
  }
}
void mean_heads(const MeanHeads& p, int64_t begin, int64_t end) {
  p.codes ? mean_of_rows<int8_t>(p, begin, end) : mean_of_rows<float>(p, begin, end);
}
