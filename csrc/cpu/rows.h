// quantize and norm_quant: a few rows at a time, in L1 between their passes. A row ends in a chain of dependent operations
// (sums across lanes, square root, division); those of several rows overlap.
constexpr int kBatch = 4;

INLINE double total(const rd* parts) {
  rd sum = parts[0];
  for (int i = 1; i < 2 * kParts; ++i) sum += parts[i];
  double s = 0;
  for (unsigned l = 0; l < sizeof(rd) / 8; ++l) s += sum[l];
  return s;
}

// Mean and variance from one pass over x in double, whose rounding does not show in the float results: the sums are of
// x - shift, shift being near the mean, so that nothing cancels.
INLINE void moments(const float* x, int64_t K, double* mean, double* variance) {
  const int64_t whole = K / 16 * 16;
  float first = 0;
  for (int64_t k = 0; k < 16 && k < K; ++k) first += x[k];
  const double shift = first / (K < 16 ? K : 16);
  rd sums[2 * kParts] = {}, squares[2 * kParts] = {};
  for (int64_t k = 0; k < whole; k += 16) {
    const vf v = load<vf>(x + k);
    EACH {
      const rd low = low_double(v.v[i]) - shift, high = high_double(v.v[i]) - shift;
      sums[2 * i] += low, sums[2 * i + 1] += high;
      squares[2 * i] += low * low, squares[2 * i + 1] += high * high;
    }
  }
  double sum = total(sums), square = total(squares);
  for (int64_t k = whole; k < K; ++k) sum += x[k] - shift, square += (x[k] - shift) * (x[k] - shift);
  *mean = shift + sum / K;
  const double v = (square - sum * (sum / K)) / K;
  *variance = v > 0 ? v : 0;
}

// Of a row found at run time; formats/affine.py: scale_of.
INLINE float scale_of(const Rows& p, float peak) {
  const float scale = peak * p.clip / (float)((1 << (p.has_minimum ? p.bits : p.bits - 1)) - 1);
  return scale > 1e-30f ? scale : 1e-30f;
}
INLINE Codes codes_of(const Rows& p) {
  return codes_of(p.bits, p.scale ? p.zero_point : p.has_minimum ? -((int64_t)1 << (p.bits - 1)) : 0);
}

template <bool kNorm>
INLINE void quantize_rows(const Rows& p, int64_t row_begin, int64_t row_end) {
  // The codes are bytes, which may alias anything: what the loops need is copied out of p first.
  const int64_t K = p.K, x_stride = p.x_stride, padded = round_up(K, 16);
  const int32_t *from = p.from, *to = p.to;
  const float *weight = p.weight, *bias = p.bias, *scale_k = p.scale_stride ? p.scale : nullptr, minimum = p.minimum;
  const bool fixed = p.scale != nullptr, has_minimum = p.has_minimum;
  const vf inv = fixed ? 1.f / splat(*p.scale) : vf{};
  const Codes codes = codes_of(p);
  const Steps steps(p.table);
  float* const y = fixed ? nullptr : (float*)scratch(kBatch * padded * sizeof(float), 0);
  for (int64_t m = row_begin; m < row_end; m += kBatch) {
    const int rows = row_end - m < kBatch ? (int)(row_end - m) : kBatch;
    const float* x[kBatch];
    int64_t at[kBatch];
    for (int r = 0; r < rows; ++r) {
      x[r] = (const float*)p.x + (from ? from[m + r] : m + r) * x_stride;
      at[r] = to ? to[m + r] : m + r;
    }
    double mu[kBatch], variance[kBatch];
    float mean[kBatch], rstd[kBatch], peak[kBatch];
    if constexpr (kNorm) {
      for (int r = 0; r < kBatch; ++r) mu[r] = 0, variance[r] = 1;
      for (int r = 0; r < rows; ++r) moments(x[r], K, mu + r, variance + r);
      for (int r = 0; r < kBatch; ++r) mean[r] = (float)mu[r], rstd[r] = (float)(1.0 / __builtin_sqrt(variance[r] + p.eps));
    }
    for (int r = 0; r < rows; ++r) {
      const float *row = x[r], center = kNorm ? mean[r] : 0, slope = kNorm ? rstd[r] : 0;
      int8_t* const out = p.out + at[r] * K;
      vf most = {};
      for (int64_t k = 0; k < K; k += 16) {
        const int64_t n = K - k < 16 ? K - k : 16;
        vf v = load_16<vf>(row + k, n);
        if constexpr (kNorm) {
          v = (v - center) * slope;
          v = v * load_16<vf>(weight + k, n) + load_16<vf>(bias + k, n);
        }
        if (fixed) {
          const vb q = to_code(v * (scale_k ? 1.f / load_16<vf>(scale_k + k, n) : inv), codes);
          store_16(out + k, q, n);
        } else {
          if (has_minimum) v = v - minimum;
          store(y + r * padded + k, v);
          if (n < 16) v = load_n<vf>(y + r * padded + k, n);  // the lanes beyond K are not values of x
          most = vmax(most, has_minimum ? v : vabs(v));
        }
      }
      peak[r] = hmax(most);
    }
    if (fixed) continue;
    float inverse[kBatch];
    for (int r = 0; r < rows; ++r) {
      const float scale = scale_of(p, peak[r]);
      p.out_scale[at[r]] = scale;
      inverse[r] = 1.f / scale;
    }
    for (int r = 0; r < rows; ++r) {
      int8_t* const out = p.out + at[r] * K;
      for (int64_t k = 0; k < K; k += 16)
        store_16(out + k, to_code(load<vf>(y + r * padded + k) * inverse[r], codes), K - k);
      steps.apply(out, K);
    }
  }
}

void quantize(const Rows& p, int64_t row_begin, int64_t row_end) { quantize_rows<false>(p, row_begin, row_end); }
void norm_quant(const Rows& p, int64_t row_begin, int64_t row_end) { quantize_rows<true>(p, row_begin, row_end); }

// Codes of activation(x), one scale per row: a GELU's largest output comes from its largest input, so the scale is known
// before the outputs are. Rounding may make another output larger by an ulp, and negative rows have no such order: then
// the row is written again with the scale it should have had.
template <Activation A>
INLINE void activate_quantize_row(const Rows& p, const Steps& steps, int64_t m) {
  const float* x = (const float*)p.x + m * p.x_stride;
  const int64_t K = p.K;
  const float minimum = p.has_minimum ? p.minimum : 0.f;
  const auto value = [&](vf v) {
    v = activate<A>(v);
    return p.has_minimum ? v - minimum : v;
  };
  const auto size = [&](vf v) { return p.has_minimum ? v : vabs(v); };
  vf top = splat(x[0]);
  for (int64_t k = 0; k < K; k += 16) top = vmax(top, load_16_or(x + k, K - k, x[0]));
  const Codes codes = codes_of(p);
  float peak = hmax(size(value(splat(hmax(top)))));
  for (int pass = 0; pass < 2; ++pass) {
    const float scale = scale_of(p, peak);
    p.out_scale[m] = scale;
    const float inv = 1.f / scale;
    int8_t* out = p.out + m * K;
    vf seen = {};
    for (int64_t k = 0; k < K; k += 16) {
      const vf v = value(load_16_or(x + k, K - k, x[0]));
      seen = vmax(seen, size(v));
      store_16(out + k, to_code(v * inv, codes), K - k);
    }
    const float found = hmax(seen);
    if (found == peak) break;
    peak = found;
  }
  steps.apply(p.out + m * K, K);
}
void activate_quantize(const Rows& p, Activation activation, int64_t row_begin, int64_t row_end) {
  const Steps steps(p.table);
  for (int64_t m = row_begin; m < row_end; ++m) switch (activation) {
    case Activation::none: activate_quantize_row<Activation::none>(p, steps, m); break;
    case Activation::gelu: activate_quantize_row<Activation::gelu>(p, steps, m); break;
    case Activation::gelu_tanh: activate_quantize_row<Activation::gelu_tanh>(p, steps, m); break;
    case Activation::quick_gelu: activate_quantize_row<Activation::quick_gelu>(p, steps, m); break;
  }
}
