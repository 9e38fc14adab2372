// Sixteen lanes of float or int32 as one to four registers of the instruction set, so that the compiler keeps them there.
// (GCC splits wider-than-native vectors too, but turns their comparisons into scalar code.)
// Included inside a namespace of the including file.
#define INLINE inline __attribute__((always_inline))
#if defined(USE_AVX512_VNNI)
#define REGISTER_BYTES 64
#elif defined(USE_AVX2)
#define REGISTER_BYTES 32
#else
#define REGISTER_BYTES 16
#endif
constexpr int kParts = 64 / REGISTER_BYTES;
typedef float rf __attribute__((vector_size(REGISTER_BYTES)));
typedef int32_t ri __attribute__((vector_size(REGISTER_BYTES)));
typedef int8_t rb __attribute__((vector_size(REGISTER_BYTES)));
typedef double rd __attribute__((vector_size(REGISTER_BYTES)));
#define EACH _Pragma("GCC unroll 8") for (int i = 0; i < kParts; ++i)

// Plain aggregates: a constructor that the compiler writes would not be compiled for this file's instruction set.
struct vf { rf v[kParts]; };
struct vi { ri v[kParts]; };
struct vb { int8_t v[16]; };   // codes, in memory order
struct vs { int16_t v[16]; };

INLINE vf splat(float x) { vf y; EACH y.v[i] = x - rf{}; return y; }
INLINE vi splat(int32_t x) { vi y; EACH y.v[i] = x - ri{}; return y; }
#define OPERATOR(V, S, op) \
  INLINE V operator op(V a, V b) { EACH a.v[i] = a.v[i] op b.v[i]; return a; } \
  INLINE V operator op(V a, S b) { return a op splat(b); } \
  INLINE V operator op(S a, V b) { return splat(a) op b; }
OPERATOR(vf, float, +) OPERATOR(vf, float, -) OPERATOR(vf, float, *) OPERATOR(vf, float, /)
OPERATOR(vi, int32_t, +) OPERATOR(vi, int32_t, -) OPERATOR(vi, int32_t, *)
OPERATOR(vi, int32_t, &) OPERATOR(vi, int32_t, |) OPERATOR(vi, int32_t, ^)
#undef OPERATOR
INLINE vf operator-(vf a) { EACH a.v[i] = -a.v[i]; return a; }
INLINE vi operator<<(vi a, int n) { EACH a.v[i] = a.v[i] << n; return a; }
INLINE vi operator>>(vi a, int n) { EACH a.v[i] = a.v[i] >> n; return a; }
// min(a, b) is a < b ? a : b, max(a, b) is a > b ? a : b: the second operand where one is NaN, on every instruction set.
#if defined(USE_AVX512_VNNI)
INLINE rf rmin(rf a, rf b) { return (rf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE rf rmax(rf a, rf b) { return (rf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE ri rround(rf x) { return (ri)_mm512_cvtps_epi32((__m512)x); }
#elif defined(USE_AVX2)
INLINE rf rmin(rf a, rf b) { return (rf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE rf rmax(rf a, rf b) { return (rf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE ri rround(rf x) { return (ri)_mm256_cvtps_epi32((__m256)x); }
#elif defined(__SSE2__)
INLINE rf rmin(rf a, rf b) { return (rf)_mm_min_ps((__m128)a, (__m128)b); }
INLINE rf rmax(rf a, rf b) { return (rf)_mm_max_ps((__m128)a, (__m128)b); }
INLINE ri rround(rf x) { return (ri)_mm_cvtps_epi32((__m128)x); }
#else
INLINE rf rmin(rf a, rf b) { return a < b ? a : b; }
INLINE rf rmax(rf a, rf b) { return a > b ? a : b; }
INLINE ri rround(rf x) {
  const rf magic = 12582912.f - rf{};  // 1.5 * 2^23: the sum has no fraction bits (and is not folded away: no -ffast-math)
  return __builtin_convertvector((x + magic) - magic, ri);
}
#endif
INLINE vf vmin(vf a, vf b) { EACH a.v[i] = rmin(a.v[i], b.v[i]); return a; }
INLINE vf vmin(vf a, float b) { return vmin(a, splat(b)); }
INLINE vf vmax(vf a, vf b) { EACH a.v[i] = rmax(a.v[i], b.v[i]); return a; }
INLINE vf vmax(vf a, float b) { return vmax(a, splat(b)); }
INLINE vi bits(vf x) { vi y; EACH y.v[i] = (ri)x.v[i]; return y; }
INLINE vf from_bits(vi x) { vf y; EACH y.v[i] = (rf)x.v[i]; return y; }
INLINE vf vabs(vf x) { return from_bits(bits(x) & 0x7fffffff); }
INLINE vf to_float(vi x) { vf y; EACH y.v[i] = __builtin_convertvector(x.v[i], rf); return y; }
INLINE vi to_int(vf x) { vi y; EACH y.v[i] = rround(x.v[i]); return y; }  // half to even, |x| < 2^22

// Register by register: a memcpy of 64 bytes may be made of smaller moves, which a register then waits for.
template <class V, class T> INLINE V load(const T* p) {
  V x;
  if constexpr (sizeof x.v == 64) {
    EACH __builtin_memcpy(&x.v[i], (const char*)p + i * REGISTER_BYTES, REGISTER_BYTES);
  } else {
    __builtin_memcpy(x.v, p, sizeof x.v);
  }
  return x;
}
template <class V, class T> INLINE void store(T* p, V x) {
  if constexpr (sizeof x.v == 64) {
    EACH __builtin_memcpy((char*)p + i * REGISTER_BYTES, &x.v[i], REGISTER_BYTES);
  } else {
    __builtin_memcpy(p, x.v, sizeof x.v);
  }
}
template <class V, class T> INLINE V load_n(const T* p, int64_t n) {  // the first n lanes, the others zero
  V x = {};
  __builtin_memcpy(x.v, p, n * sizeof *p);
  return x;
}
template <class V, class T> INLINE void store_n(T* p, V x, int64_t n) { __builtin_memcpy(p, x.v, n * sizeof *p); }
// Sixteen lanes, or the n < 16 that a tail has: a memcpy of run-time length is a call, which full vectors do not pay for.
template <class V, class T> INLINE V load_16(const T* p, int64_t n) { return n >= 16 ? load<V>(p) : load_n<V>(p, n); }
INLINE vf load_16_or(const float* p, int64_t n, float other) {  // the lanes beyond n hold `other`
  if (n >= 16) return load<vf>(p);
  vf x = splat(other);
  __builtin_memcpy(x.v, p, n * sizeof *p);
  return x;
}
template <class V, class T> INLINE void store_16(T* p, V x, int64_t n) { n >= 16 ? store(p, x) : store_n(p, x, n); }

// Between int32 lanes that hold small values and bytes or words, and from float to double.
#if defined(USE_AVX512_VNNI)
INLINE vb to_bytes(vi x) { vb y; _mm_storeu_si128((__m128i*)y.v, _mm512_cvtepi32_epi8((__m512i)x.v[0])); return y; }
INLINE vs to_words(vi x) { vs y; _mm256_storeu_si256((__m256i*)y.v, _mm512_cvtepi32_epi16((__m512i)x.v[0])); return y; }
INLINE vs to_words(vb x) {
  vs y;
  _mm256_storeu_si256((__m256i*)y.v, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)x.v)));
  return y;
}
INLINE vi to_int(vb x) { vi y; y.v[0] = (ri)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x.v)); return y; }
INLINE rd low_double(rf x) { return (rd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)); }
INLINE rd high_double(rf x) { return (rd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)); }
#elif defined(USE_AVX2)
INLINE __m256i pack_words(vi x) {  // packs works within 128-bit halves: put the quarters back in order
  return _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x.v[0], (__m256i)x.v[1]), 0xd8);
}
INLINE vs to_words(vi x) { vs y; _mm256_storeu_si256((__m256i*)y.v, pack_words(x)); return y; }
INLINE vb to_bytes(vi x) {
  const __m256i w = pack_words(x);
  vb y;
  _mm_storeu_si128((__m128i*)y.v, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
  return y;
}
INLINE vs to_words(vb x) {
  vs y;
  _mm256_storeu_si256((__m256i*)y.v, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)x.v)));
  return y;
}
INLINE vi to_int(vb x) {
  const __m128i b = _mm_loadu_si128((const __m128i*)x.v);
  vi y;
  y.v[0] = (ri)_mm256_cvtepi8_epi32(b), y.v[1] = (ri)_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8));
  return y;
}
INLINE rd low_double(rf x) { return (rd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)); }
INLINE rd high_double(rf x) { return (rd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)); }
#else
template <class To, class From> INLINE To convert(const From& x) {
  To y;
  for (int i = 0; i < 16; ++i) y.v[i] = x.v[i];
  return y;
}
INLINE vb to_bytes(vi x) { struct { int32_t v[16]; } lanes; store(lanes.v, x); return convert<vb>(lanes); }
INLINE vs to_words(vi x) { struct { int32_t v[16]; } lanes; store(lanes.v, x); return convert<vs>(lanes); }
INLINE vs to_words(vb x) { return convert<vs>(x); }
INLINE vi to_int(vb x) {
  int32_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = x.v[i];
  return load<vi>(lanes);
}
INLINE rd low_double(rf x) { return rd{x[0], x[1]}; }
INLINE rd high_double(rf x) { return rd{x[2], x[3]}; }
#endif

#if defined(USE_AVX512_VNNI)
INLINE float hmax(vf x) { return _mm512_reduce_max_ps((__m512)x.v[0]); }
INLINE int64_t hsum(vi x) {
  const __m512i v = (__m512i)x.v[0];
  return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                                                  _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1))));
}
#else
INLINE float hmax(vf x) {
  for (int i = 1; i < kParts; ++i) x.v[0] = rmax(x.v[0], x.v[i]);
  float m = x.v[0][0];
  for (unsigned i = 1; i < sizeof(rf) / 4; ++i) m = x.v[0][i] > m ? x.v[0][i] : m;
  return m;
}
INLINE int64_t hsum(vi x) {
  int64_t s = 0;
  EACH for (unsigned l = 0; l < sizeof(ri) / 4; ++l) s += x.v[i][l];
  return s;
}
#endif

// 2^t for |t| <= 100, 2e-7 relative: the polynomial of reference/scalar.py, in its order.
INLINE vf exp2_small(vf t) {
  const vi n = to_int(t);
  const vf f = t - to_float(n);
  vf p = f * 0.00132647261f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  return from_bits(bits(p) + (n << 23));
}
INLINE vf sigmoid2(vf t) {  // 1 / (1 + 2^-t)
  return 1.0f / (1.0f + exp2_small(vmin(vmax(-t, -100.f), 100.f)));
}
INLINE vf gelu(vf x) {  // x Phi(x), Phi as a rational function, 2.5e-7 max(1, |x|) from the true value
  const vf t = vmin(vmax(x, -5.5f), 5.5f), z = t * t;
  vf p = z * 2.27495214e-08f + 6.35206834e-06f;
  p = p * z + 0.000168822022f;
  p = p * z + 0.00467723841f;
  p = p * z + 0.0338523164f;
  p = p * z + 0.398942232f;
  vf q = z * 1.19750473e-06f + 7.36461952e-05f;
  q = q * z + 0.00188442448f;
  q = q * z + 0.0286456775f;
  q = q * z + 0.251521081f;
  q = q * z + 1.0f;
  return x * (0.5f + t * (p / q));
}
INLINE vf gelu_tanh(vf x) {  // 2 log2(e) sqrt(2 / pi) = 2.30220819
  return x * sigmoid2((x + x * x * x * 0.044715f) * 2.30220819f);
}
INLINE vf quick_gelu(vf x) { return x * sigmoid2(x * 2.45546696f); }  // 1.702 log2(e)

template <Activation A> INLINE vf activate(vf x) {
  if constexpr (A == Activation::gelu) return gelu(x);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (A == Activation::quick_gelu) return quick_gelu(x);
  return x;
}

// The codes of some number of bits, seen from zero: what to clip to before rounding, which gives the same integer and keeps
// to_int in range.
struct Codes { float lo, hi; int32_t zero_point; };
INLINE Codes codes_of(int64_t bits, int64_t zero_point) {
  const int64_t half = (int64_t)1 << (bits - 1);
  return {(float)(-half - zero_point), (float)(half - 1 - zero_point), (int32_t)zero_point};
}
INLINE vb to_code(vf y, Codes c) { return to_bytes(to_int(vmin(vmax(y, c.lo), c.hi)) + c.zero_point); }

// What takes the place of the codes -128 .. 127: the value at -128, and what is gained at every code where it changes,
// modulo 256. A table of 16 levels is 15 comparisons of 64 codes at once, on any processor; one of many is looked up.
struct Steps {
  const int8_t* table;
  int count = 0;
  int8_t at[255];
  uint8_t gain[255];

  INLINE explicit Steps(const int8_t* t) : table(t) {
    for (int i = 1; table && i < 256; ++i)
      if (table[i] != table[i - 1]) at[count] = i - 128, gain[count++] = table[i] - table[i - 1];
  }
  INLINE void apply(int8_t* codes, int64_t n) const {
    constexpr int kFew = 40;
    if (!table) return;
    if (count > kFew) {
      for (int64_t k = 0; k < n; ++k) codes[k] = table[codes[k] + 128];
      return;
    }
    typedef int8_t s64 __attribute__((vector_size(64)));
    typedef uint8_t u64 __attribute__((vector_size(64)));
    for (int64_t k = 0; k < n; k += 64) {
      const size_t bytes = n - k < 64 ? n - k : 64;
      s64 code = {};
      __builtin_memcpy(&code, codes + k, bytes);
      u64 out = u64{} + (uint8_t)table[0];
      for (int i = 0; i < count; ++i) out += (u64)(code >= at[i]) & gain[i];
      __builtin_memcpy(codes + k, &out, bytes);
    }
  }
};
