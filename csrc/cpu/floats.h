// Rows of float32, float16 or bfloat16, read and written as float32, sixteen at a time, rounding half to even; their sums,
// and their exponentials.
struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };
typedef uint16_t rw __attribute__((vector_size(REGISTER_BYTES / 2)));

INLINE vi above(vi a, int32_t b) { EACH a.v[i] = a.v[i] > b; return a; }
INLINE vi select(vi mask, vi a, vi b) { return b ^ ((a ^ b) & mask); }
INLINE vf select(vi mask, vf a, vf b) { return from_bits(select(mask, bits(a), bits(b))); }

INLINE vi load_words(const void* p) {
  vi x;
  EACH {
    rw words;
    __builtin_memcpy(&words, (const char*)p + i * sizeof words, sizeof words);
    x.v[i] = __builtin_convertvector(words, ri);
  }
  return x;
}
INLINE void store_words(void* p, vi x) {
  EACH {
    const rw words = __builtin_convertvector(x.v[i], rw);
    __builtin_memcpy((char*)p + i * sizeof words, &words, sizeof words);
  }
}

INLINE vf load_floats(const float* p) { return load<vf>(p); }
INLINE void store_floats(float* p, vf x) { store(p, x); }

INLINE vf load_floats(const BFloat* p) { return from_bits(load_words(p) << 16); }
INLINE void store_floats(BFloat* p, vf x) {
  const vi b = bits(x);
  store_words(p, select(above(b & 0x7fffffff, 0x7f800000), splat(0x7fc0), (b + 0x7fff + ((b >> 16) & 1)) >> 16));
}

#if defined(USE_AVX512_VNNI)
INLINE vf load_floats(const Half* p) { vf y; y.v[0] = (rf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); return y; }
INLINE void store_floats(Half* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
INLINE vf load_floats(const Half* p) {
  const vi w = load_words(p), magnitude = (w & 0x7fff) << 13;
  const vi finite = bits(from_bits(magnitude) * 0x1p112f);  // exact, subnormal or not
  return from_bits((finite | (above(magnitude, 0x0f7fffff) & 0x7f800000)) | ((w & 0x8000) << 16));
}
INLINE void store_floats(Half* p, vf x) {
  const vi b = bits(x), a = b & 0x7fffffff;
  const vi normal = (a + (((15 - 127) << 23) + 0xfff) + ((a >> 13) & 1)) >> 13;
  const vi small = bits(from_bits(a) + 0.5f) - 0x3f000000;  // below 2^-14: 0.5 has the unit of float16's subnormals
  const vi special = select(above(a, 0x7f800000), splat(0x7e00), splat(0x7c00));
  const vi y = select(above(a, 0x477fffff), special, select(above(a, 0x387fffff), normal, small));
  store_words(p, y | ((b >> 16) & 0x8000));
}
#endif

// The n < 16 that a tail has; lanes beyond are zero.
template <class T> INLINE vf load_floats(const T* p, int64_t n) {
  if (n >= 16) return load_floats(p);
  T tail[16] = {};
  __builtin_memcpy(tail, p, n * sizeof *p);
  return load_floats(tail);
}
template <class T> INLINE void store_floats(T* p, vf x, int64_t n) {
  if (n >= 16) return store_floats(p, x);
  T tail[16];
  store_floats(tail, x);
  __builtin_memcpy(p, tail, n * sizeof *p);
}

INLINE float lane_sum(vf x) {  // the same tree on every instruction set
  float lanes[16];
  store(lanes, x);
  for (int n = 8; n > 0; n /= 2)
    for (int l = 0; l < n; ++l) lanes[l] += lanes[l + n];
  return lanes[0];
}

// 2^((x - max x) log2(e)) in place over 16 n values; returns their sum. 0 where 2^-100 is not reached; NaN where x is NaN,
// or nothing is finite.
INLINE float exponentials(float* x, int64_t padded) {
  vf peak = splat(-__builtin_inff()), sum = {};
  for (int64_t j = 0; j < padded; j += 16) peak = vmax(load<vf>(x + j), peak);
  const float top = hmax(peak);
  for (int64_t j = 0; j < padded; j += 16) {
    const vf t = (load<vf>(x + j) - top) * 1.44269504f;
    vf e = exp2_small(vmax(t, -100.f));
    EACH {
      const ri reached = t.v[i] >= -100.f, nan = t.v[i] != t.v[i];
      e.v[i] = (rf)(((ri)e.v[i] & reached) | ((ri)t.v[i] & nan));
    }
    store(x + j, e);
    sum = sum + e;
  }
  return lane_sum(sum);
}
