// quantize and norm_quant: one row at a time, the row in L1 between its passes.
INLINE double total(const rd* parts) {
  double s = 0;
  for (int i = 0; i < 2 * kParts; ++i)
    for (unsigned l = 0; l < sizeof(rd) / 8; ++l) s += parts[i][l];
  return s;
}

template <bool kNorm>
INLINE void quantize_row(const Rows& p, int64_t m, float* y) {
  const float* x = (const float*)p.x + m * p.x_stride;
  const int64_t K = p.K;
  float mean = 0, rstd = 0;
  if constexpr (kNorm) {  // sums in double: their order does not show in the float result
    rd sums[2 * kParts] = {}, squares[2 * kParts] = {};
    int64_t whole = K / 16 * 16;
    for (int64_t k = 0; k < whole; k += 16) {
      const vf v = load<vf>(x + k);
      EACH sums[2 * i] += low_double(v.v[i]), sums[2 * i + 1] += high_double(v.v[i]);
    }
    double sum = total(sums), square = 0;
    for (int64_t k = whole; k < K; ++k) sum += x[k];
    const double mu = sum / K;
    for (int64_t k = 0; k < whole; k += 16) {
      const vf v = load<vf>(x + k);
      EACH {
        const rd low = low_double(v.v[i]) - mu, high = high_double(v.v[i]) - mu;
        squares[2 * i] += low * low, squares[2 * i + 1] += high * high;
      }
    }
    square = total(squares);
    for (int64_t k = whole; k < K; ++k) square += (x[k] - mu) * (x[k] - mu);
    mean = (float)mu;
    rstd = (float)(1.0 / __builtin_sqrt(square / K + p.eps));
  }
  // The codes are bytes, which may alias anything: what the loop needs is copied out of p first.
  const float *weight = p.weight, *bias = p.bias, *scale_k = p.scale_stride ? p.scale : nullptr;
  const bool fixed = p.scale != nullptr;
  const vf inv = fixed ? 1.f / splat(*p.scale) : vf{};
  const float zero_point = (float)p.zero_point;
  int8_t* out = p.out + m * K;
  vf peak = {};
  for (int64_t k = 0; k < K; k += 16) {
    const int64_t n = K - k < 16 ? K - k : 16;
    vf v = load_16<vf>(x + k, n);
    if constexpr (kNorm) {
      v = (v - mean) * rstd;
      v = v * load_16<vf>(weight + k, n) + load_16<vf>(bias + k, n);
    }
    if (fixed) {
      const vb q = to_code(v * (scale_k ? 1.f / load_16<vf>(scale_k + k, n) : inv), zero_point);
      store_16(out + k, q, n);
    } else {
      if (p.has_minimum) v = v - p.minimum;
      store(y + k, v);
      if (n < 16) v = load_n<vf>(y + k, n);  // the lanes beyond K are not values of x
      peak = vmax(peak, p.has_minimum ? v : vabs(v));
    }
  }
  if (fixed) return;
  float scale = hmax(peak) / (p.has_minimum ? 255.f : 127.f);
  if (!(scale > 1e-30f)) scale = 1e-30f;
  p.out_scale[m] = scale;
  const float inv_row = 1.f / scale;
  for (int64_t k = 0; k < K; k += 16) {
    const vb q = to_code(load<vf>(y + k) * inv_row, p.has_minimum ? -128.f : 0.f);
    store_16(out + k, q, K - k);
  }
}

void quantize(const Rows& p, int64_t row_begin, int64_t row_end) {
  float* y = p.scale ? nullptr : (float*)scratch(round_up(p.K, 16) * sizeof(float), 0);
  for (int64_t m = row_begin; m < row_end; ++m) quantize_row<false>(p, m, y);
}
void norm_quant(const Rows& p, int64_t row_begin, int64_t row_end) {
  float* y = p.scale ? nullptr : (float*)scratch(round_up(p.K, 16) * sizeof(float), 0);
  for (int64_t m = row_begin; m < row_end; ++m) quantize_row<true>(p, m, y);
}

// Codes of activation(x), one scale per row: a GELU's largest output comes from its largest input, so the scale is known
// before the outputs are. Rounding may make another output larger by an ulp, and negative rows have no such order: then
// the row is written again with the scale it should have had.
template <Activation A>
INLINE void activate_quantize_row(const Rows& p, int64_t m) {
  const float* x = (const float*)p.x + m * p.x_stride;
  const int64_t K = p.K;
  const float minimum = p.has_minimum ? p.minimum : 0.f;
  const auto value = [&](vf v) {
    if constexpr (A == Activation::gelu) v = gelu(v);
    if constexpr (A == Activation::gelu_tanh) v = gelu_tanh(v);
    if constexpr (A == Activation::quick_gelu) v = quick_gelu(v);
    return p.has_minimum ? v - minimum : v;
  };
  const auto size = [&](vf v) { return p.has_minimum ? v : vabs(v); };
  vf top = splat(x[0]);
  for (int64_t k = 0; k < K; k += 16) top = vmax(top, load_16_or(x + k, K - k, x[0]));
  float peak = hmax(size(value(splat(hmax(top)))));
  for (int pass = 0; pass < 2; ++pass) {
    float scale = peak / (p.has_minimum ? 255.f : 127.f);
    if (!(scale > 1e-30f)) scale = 1e-30f;
    p.out_scale[m] = scale;
    const float inv = 1.f / scale, zero_point = p.has_minimum ? -128.f : 0.f;
    int8_t* out = p.out + m * K;
    vf seen = {};
    for (int64_t k = 0; k < K; k += 16) {
      const vf v = value(load_16_or(x + k, K - k, x[0]));
      seen = vmax(seen, size(v));
      store_16(out + k, to_code(v * inv, zero_point), K - k);
    }
    const float found = hmax(seen);
    if (found == peak) break;
    peak = found;
  }
}
void activate_quantize(const Rows& p, Activation activation, int64_t row_begin, int64_t row_end) {
  for (int64_t m = row_begin; m < row_end; ++m) switch (activation) {
    case Activation::none: activate_quantize_row<Activation::none>(p, m); break;
    case Activation::gelu: activate_quantize_row<Activation::gelu>(p, m); break;
    case Activation::gelu_tanh: activate_quantize_row<Activation::gelu_tanh>(p, m); break;
    case Activation::quick_gelu: activate_quantize_row<Activation::quick_gelu>(p, m); break;
  }
}
