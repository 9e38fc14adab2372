// class_row: the scores of one query a head are dot products with the codes of k where they lie, sixteen keys at a time.
#if defined(USE_AVX512_VNNI)
constexpr int64_t kClassStep = 64;  // components at a time
typedef int8_t ClassCode;
#else
constexpr int64_t kClassStep = 16;
typedef int16_t ClassCode;
#endif

// Of q, zero beyond D, with sixteen keys. Sums are exact up to D = 2^17.
#if defined(USE_AVX512_VNNI)
INLINE vi class_dots(const ClassCode* q, const int8_t* const* keys, int64_t D) {
  const __m512i flip = _mm512_set1_epi8(-128);  // keys as 0 .. 255
  __m512i sum[16], above = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_si512();
  for (int64_t d = 0; d < D; d += 64) {
    const __mmask64 mask = D - d >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (D - d)) - 1;
    const __m512i x = _mm512_loadu_si512(q + d);
    above = _mm512_dpbusd_epi32(above, flip, x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, keys[i] + d), flip), x);
  }
  // Halves of the keys to one register each, four times; lane i is then key i.
  const auto by_1 = [](__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
  const auto by_2 = [](__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); };
  const auto by_4 = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sum[i] = by_2(by_1(sum[4 * i], sum[4 * i + 1]), by_1(sum[4 * i + 2], sum[4 * i + 3]));
  vi y;
  y.v[0] = (ri)by_4(by_4(sum[0], sum[1]), by_4(sum[2], sum[3]));
  return y - (int32_t)_mm512_reduce_add_epi32(above);
}
#elif defined(USE_AVX2)
INLINE vi class_dots(const ClassCode* q, const int8_t* const* keys, int64_t D) {
  vi y;
  for (int half = 0; half < 2; ++half) {
    __m256i sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_si256();
    for (int64_t d = 0; d < D; d += 16) {
      const __m256i x = _mm256_loadu_si256((const __m256i*)(q + d));
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const vs k = to_words(load_16<vb>(keys[8 * half + i] + d, D - d));
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(x, _mm256_loadu_si256((const __m256i*)k.v)));
      }
    }
    const auto four = [&](int i) {
      return _mm256_hadd_epi32(_mm256_hadd_epi32(sum[i], sum[i + 1]), _mm256_hadd_epi32(sum[i + 2], sum[i + 3]));
    };
    const __m256i a = four(0), b = four(4);
    y.v[half] = (ri)_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
  }
  return y;
}
#else
INLINE vi class_dots(const ClassCode* q, const int8_t* const* keys, int64_t D) {
  int32_t lanes[16];
  for (int i = 0; i < 16; ++i) {
    const int8_t* const k = keys[i];
    int32_t sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += q[d] * k[d];
    lanes[i] = sum;
  }
  return load<vi>(lanes);
}
#endif

// The first n of sixteen floats that lie `stride` apart.
INLINE vf class_floats(const float* x, int64_t stride, int64_t n) {
  if (stride == 0) return splat(*x);
  if (stride == 1) return load_16<vf>(x, n);
  float lanes[16] = {};
  for (int64_t i = 0; i < (n < 16 ? n : 16); ++i) lanes[i] = x[i * stride];
  return load<vf>(lanes);
}

// Exponentials of the heads begin .. end of an image, each padded to sixteens, and what makes probabilities of them. Keys
// are taken in the outer loop: the heads of one lie side by side in memory.
void class_row(const ClassRow& p, int64_t image, int64_t begin, int64_t end, float* rows, float* factor) {
  const int64_t padded = round_up(p.N, 16), width = round_up(p.D, kClassStep);
  ClassCode* const query = (ClassCode*)scratch((end - begin) * (width * sizeof(ClassCode) + sizeof(float)), 0);
  float* const scale = (float*)(query + (end - begin) * width);
  for (int64_t h = begin; h < end; ++h) {
    const int8_t* const q = p.q + image * p.q_stride[0] + h * p.q_stride[1];
    ClassCode* const to = query + (h - begin) * width;
    for (int64_t d = 0; d < p.D; ++d) to[d] = q[d];
    for (int64_t d = p.D; d < width; ++d) to[d] = 0;
    scale[h - begin] = p.q_scale[image * p.q_scale_stride[0] + h * p.q_scale_stride[1]] * p.softmax_scale;
  }
  const int8_t* const k = p.k + image * p.k_stride[0];
  const float* const k_scale = p.k_scale + image * p.k_scale_stride[0];
  for (int64_t j = 0; j < p.N; j += 16) {
    const int64_t n = p.N - j < 16 ? p.N - j : 16;
    vf bias = {};
    if (p.key_bias) bias = class_floats(p.key_bias + image * p.key_bias_stride[0] + j * p.key_bias_stride[1], p.key_bias_stride[1], n);
    for (int64_t h = begin; h < end; ++h) {
      const int8_t* keys[16];
      for (int64_t i = 0; i < 16; ++i) keys[i] = k + h * p.k_stride[1] + (j + (i < n ? i : 0)) * p.k_stride[2];
      const vf s = class_floats(k_scale + h * p.k_scale_stride[1] + j * p.k_scale_stride[2], p.k_scale_stride[2], n);
      vf x = to_float(class_dots(query + (h - begin) * width, keys, p.D)) * (scale[h - begin] * s);
      if (p.key_bias) x = x + bias;
      float* const to = rows + (h - begin) * padded + j;
      store(to, x);
      for (int64_t i = n; i < 16; ++i) to[i] = -__builtin_inff();
    }
  }
  for (int64_t h = 0; h < end - begin; ++h) {
    float* const x = rows + h * padded;
    const bool none = !(row_maximum(x, padded) > -__builtin_inff());
    if (none) __builtin_memset(x, 0, padded * sizeof *x);
    factor[h] = none ? 0.f : 1.f / exponentials(x, padded);
  }
}

// The mean over the heads, taken in order.
void class_mean(const ClassRow& p, const float* rows, const float* factor, float* out) {
  const int64_t padded = round_up(p.N, 16);
  for (int64_t j = 0; j < p.N; j += 16) {
    vf total = {};
    for (int64_t h = 0; h < p.H; ++h) total = total + load<vf>(rows + h * padded + j) * factor[h];
    store_16(out + j, total / (float)p.H, p.N - j);
  }
}
