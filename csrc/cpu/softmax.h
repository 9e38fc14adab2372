// From a row of scores in steps to codes, and to what the codes stand for; reference/quant_attention.py has the formulas.
//
// A row is padded to 64 keys. Its padding and the keys that are not seen have the score kUnseen. The code of a key is
// c = L - k: 0 is the exact zero, L the largest value.
constexpr float kUnseen = -1e30f, kLimit = 16320.f, kFar = -30000.f;  // kFar: further below than there are codes
constexpr float kLog2E = 1.44269504f;
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef typename std::conditional<kVnni, Dot8, Dot16>::type CodeDot;  // multiplies int8 operands,
typedef typename std::conditional<kVnni, uint8_t, int16_t>::type Byte;  // of which the first is held as these

INLINE float row_maximum(const float* x, int64_t padded) {
  vf peak = load<vf>(x);
  for (int64_t j = 16; j < padded; j += 16) peak = vmax(load<vf>(x + j), peak);
  return hmax(peak);
}

// Codes 0 .. 255 of 16 lanes; anything outside 0 .. most is clipped.
INLINE void store_codes(uint8_t* codes, vi c, int32_t most) {
  EACH {
    c.v[i] = c.v[i] & (c.v[i] > 0);
    c.v[i] = c.v[i] + ((most - c.v[i]) & (c.v[i] > most));
  }
  const vb bytes = to_bytes(c - 128);  // signed ones: some instruction sets saturate
  u8x16 out;
  __builtin_memcpy(&out, bytes.v, 16);
  out ^= 128;
  __builtin_memcpy(codes, &out, 16);
}

#if defined(USE_AVX512_VNNI)
INLINE __m512i codes_of_64(const float* x, __m512 top, __m512i count) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto scores = [x, top](int i) { return _mm512_cvtps_epi32(_mm512_sub_ps(_mm512_loadu_ps(x + 16 * i), top)); };
  const __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(scores(0), scores(1)), count);
  const __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(scores(2), scores(3)), count);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b));
}
#endif
// anchor "max": c = L + rint(x - top).
INLINE void codes_below_maximum(const float* x, uint8_t* codes, int64_t padded, float top, int32_t count) {
#if defined(USE_AVX512_VNNI)
  const __m512i counts = _mm512_set1_epi16((int16_t)count);
  for (int64_t j = 0; j < padded; j += 64) _mm512_storeu_si512(codes + j, codes_of_64(x + j, _mm512_set1_ps(top), counts));
#else
  for (int64_t j = 0; j < padded; j += 16) store_codes(codes + j, to_int(vmax(load<vf>(x + j) - top, kFar)) + count, count);
#endif
}

// anchor "lse": c = L - rint(lse - x + shift).
INLINE void codes_below_sum(const float* x, uint8_t* codes, int64_t padded, float lse, float shift, int32_t count) {
  for (int64_t j = 0; j < padded; j += 16) {
    const vf d = lse - load<vf>(x + j) + shift;
    store_codes(codes + j, count - to_int(vmin(vmax(d, kFar), -kFar)), count);
  }
}

// c = L less the thresholds that lie above x - anchor.
INLINE void codes_by_thresholds(const float* x, uint8_t* codes, int64_t padded, float anchor, const float* thresholds, int32_t count) {
  for (int64_t j = 0; j < padded; j += 16) {
    const vf score = load<vf>(x + j), d = score - anchor;
    vi c = splat(count);
    for (int32_t n = 0; n < count; ++n) EACH c.v[i] += d.v[i] < thresholds[n];
    EACH c.v[i] &= score.v[i] > kUnseen;
    store_codes(codes + j, c, count);
  }
}

// log2 of a positive, normal x: the polynomial of reference/scalar.py, in its order.
inline float log2_small(float x) {
  int32_t b;
  __builtin_memcpy(&b, &x, 4);
  const int32_t n = (b - 0x3f3504f3) >> 23;
  b -= (int32_t)((uint32_t)n << 23);
  float y;
  __builtin_memcpy(&y, &b, 4);
  y = y - 1.f;
  float p = y * -0.14620353f + 0.23420985f;
  p = p * y + -0.24882181f;
  p = p * y + 0.2870756f;
  p = p * y + -0.36024198f;
  p = p * y + 0.48092404f;
  p = p * y + -0.72135276f;
  p = p * y + 1.4426949f;
  return (float)n + y * p;
}

// 2^((x - top) / octave) of 16 keys.
INLINE vf relative(const float* x, float top, float inverse) { return exp2_small(vmax((load<vf>(x) - top) * inverse, -100.f)); }

// top + log2 of the sum of the relative probabilities, as integers of 65280, in steps.
INLINE float log_sum(const float* x, int64_t padded, float top, const Softmax& f) {
  vi sum = {};
  for (int64_t j = 0; j < padded; j += 16) sum = sum + to_int(relative(x + j, top, f.inverse) * 65280.f);
  return top + log2_small((float)hsum(sum) * (float)(1.0 / 65280)) * f.octave;
}

// What the codes stand for, one of the bytes of it, as operands of the product with v; returns their sum.
#if defined(USE_AVX512_VNNI)
// Of rows anchored at their maxima, from the scores and without a detour through memory, where there are up to 127 codes:
// 28 instructions for 64 keys.
__attribute__((target("avx512vbmi"))) void look_up_rows_vbmi(const float* x, int rows, int64_t padded, const float* top, const Softmax& f,
                                                              uint8_t* low, uint8_t* high, float* totals) {
  const auto load_half = [](const uint8_t* p, int i) { return p ? _mm512_loadu_si512(p + 64 * i) : _mm512_setzero_si512(); };
  const __m512i low0 = load_half(f.low, 0), low1 = load_half(f.low, 1), high0 = load_half(f.high, 0), high1 = load_half(f.high, 1);
  const __m512i zero = _mm512_setzero_si512();
  for (int r = 0; r < rows; ++r, x += padded, low += padded, high += padded) {
    const __m512i count = _mm512_set1_epi16((int16_t)f.count);
    const __m512 anchor = _mm512_set1_ps(top[r] <= kUnseen ? 0.f : top[r]);  // nothing seen: all far below
    __m512i sum = zero, sum_high = zero;
    for (int64_t j = 0; j < padded; j += 64) {
      const __m512i c = codes_of_64(x + j, anchor, count), y = _mm512_permutex2var_epi8(low0, c, low1);
      _mm512_storeu_si512(low + j, y);
      sum = _mm512_add_epi64(sum, _mm512_sad_epu8(y, zero));
      if (!f.high) continue;
      const __m512i y_high = _mm512_permutex2var_epi8(high0, c, high1);
      _mm512_storeu_si512(high + j, y_high);
      sum_high = _mm512_add_epi64(sum_high, _mm512_sad_epu8(y_high, zero));
    }
    totals[r] = (float)_mm512_reduce_add_epi64(_mm512_add_epi64(sum, _mm512_slli_epi64(sum_high, 8)));
  }
}
#endif
template <class Operand> INLINE int64_t look_up(const uint8_t* codes, const uint8_t* table, Operand* out, int64_t padded) {
  int64_t sum = 0;
  for (int64_t j = 0; j < padded; ++j) out[j] = table[codes[j]], sum += table[codes[j]];
  return sum;
}
INLINE float look_up(const uint8_t* codes, const float* table, float* out, int64_t padded) {
  vf sum = {};
  for (int64_t j = 0; j < padded; j += 16) {
    for (int i = 0; i < 16; ++i) out[j + i] = table[codes[j + i]];
    sum = sum + load<vf>(out + j);
  }
  float total = 0;
  EACH for (unsigned l = 0; l < sizeof(rf) / 4; ++l) total += sum.v[i][l];
  return total;
}
