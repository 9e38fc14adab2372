// Sixteen lanes of float or int32, whatever the instruction set: the compiler splits them into its own registers.
// Included inside a namespace of the including file.
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef int8_t vb __attribute__((vector_size(16)));
typedef int16_t vs __attribute__((vector_size(32)));
typedef float vf8 __attribute__((vector_size(32)));
typedef double vd8 __attribute__((vector_size(64)));

#define INLINE inline __attribute__((always_inline))

template <class V, class T> INLINE V load(const T* p) { V v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <class V, class T> INLINE void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
template <class V, class T> INLINE V load_n(const T* p, int64_t n) {  // the first n lanes, the others zero
  V v = {};
  __builtin_memcpy(&v, p, n * sizeof *p);
  return v;
}
template <class V, class T> INLINE void store_n(T* p, V v, int64_t n) { __builtin_memcpy(p, &v, n * sizeof *p); }
// Sixteen lanes, or the n < 16 that a tail has: a memcpy of run-time length is a call, which full vectors do not pay for.
template <class V, class T> INLINE V load_16(const T* p, int64_t n) { return n >= 16 ? load<V>(p) : load_n<V>(p, n); }
template <class V, class T> INLINE void store_16(T* p, V v, int64_t n) { n >= 16 ? store(p, v) : store_n(p, v, n); }

INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat_i(int32_t x) { return x - vi{}; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }
INLINE vi bits(vf x) { return (vi)x; }
INLINE vf from_bits(vi x) { return (vf)x; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vabs(vf x) { return from_bits(bits(x) & 0x7fffffff); }

// Half to even for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. (The sum is not folded away: no -ffast-math.)
INLINE vf rint_small(vf x) { const vf magic = splat(12582912.f); return (x + magic) - magic; }

INLINE float hmax(vf x) {
  float m = x[0];
  for (int i = 1; i < 16; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
INLINE double hsum(vd8 x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

// 2^t for |t| <= 100, 2e-7 relative: the polynomial of reference/scalar.py, in its order.
INLINE vf exp2_small(vf t) {
  const vf n = rint_small(t), f = t - n;
  vf p = f * 0.00132647261f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  return from_bits(bits(p) + (to_int(n) << 23));
}
INLINE vf sigmoid2(vf t) {  // 1 / (1 + 2^-t)
  return 1.0f / (1.0f + exp2_small(vmin(vmax(-t, splat(-100.f)), splat(100.f))));
}
INLINE vf gelu(vf x) {  // x Phi(x), Phi as a rational function, 2.5e-7 max(1, |x|) from the true value
  const vf t = vmin(vmax(x, splat(-5.5f)), splat(5.5f)), z = t * t;
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

INLINE vb to_code(vf y, float zero_point) {  // clip before rounding: the same integer, and rint_small stays in range
  y = vmin(vmax(y, splat(-128.f - zero_point)), splat(127.f - zero_point));
  return __builtin_convertvector(to_int(rint_small(y) + zero_point), vb);
}
