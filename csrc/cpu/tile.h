// The inner product of MR rows with NV tiles of 16 columns. A group is one dword of a row: 4 int8, 2 int16 or 1 float;
// the row's dword is broadcast against 16 columns' dwords, 64 bytes that lie together.
//   dot8   unsigned x signed bytes (AVX512-VNNI only: vpdpbusd)
//   dot16  signed 16-bit pairs (vpdpwssd, vpmaddwd + vpaddd, pmaddwd + paddd, or plain C)
//   dotf   float
#if defined(USE_AVX512_VNNI)
constexpr bool kVnni = true;
constexpr int kRows = 12, kTiles = 2;  // 24 accumulators of 32 registers
typedef __m512i reg;
typedef __m512 regf;
INLINE reg broadcast(const void* p) { int32_t v; __builtin_memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
INLINE regf broadcastf(const float* p) { return _mm512_set1_ps(*p); }
INLINE reg dot8(reg acc, reg a, reg b) { return _mm512_dpbusd_epi32(acc, a, b); }
INLINE reg dot16(reg acc, reg a, reg b) { return _mm512_dpwssd_epi32(acc, a, b); }
INLINE regf dotf(regf acc, regf a, regf b) { return _mm512_fmadd_ps(a, b, acc); }
#elif defined(USE_AVX2)
constexpr bool kVnni = false;
constexpr int kRows = 6, kTiles = 1;  // a tile is two registers: 12 accumulators of 16
typedef __m256i reg;
typedef __m256 regf;
INLINE reg broadcast(const void* p) { int32_t v; __builtin_memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
INLINE regf broadcastf(const float* p) { return _mm256_broadcast_ss(p); }
INLINE reg dot16(reg acc, reg a, reg b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
INLINE regf dotf(regf acc, regf a, regf b) { return _mm256_fmadd_ps(a, b, acc); }
#elif defined(__SSE2__)
constexpr bool kVnni = false;
constexpr int kRows = 2, kTiles = 1;
typedef __m128i reg;
typedef __m128 regf;
INLINE reg broadcast(const void* p) { int32_t v; __builtin_memcpy(&v, p, 4); return _mm_set1_epi32(v); }
INLINE regf broadcastf(const float* p) { return _mm_set1_ps(*p); }
INLINE reg dot16(reg acc, reg a, reg b) { return _mm_add_epi32(acc, _mm_madd_epi16(a, b)); }
INLINE regf dotf(regf acc, regf a, regf b) { return _mm_add_ps(acc, _mm_mul_ps(a, b)); }
#else
constexpr bool kVnni = false;
constexpr int kRows = 2, kTiles = 1;
typedef ri reg;
typedef rf regf;
INLINE reg broadcast(const void* p) { int32_t v; __builtin_memcpy(&v, p, 4); return v - ri{}; }
INLINE regf broadcastf(const float* p) { return *p - rf{}; }
INLINE reg dot16(reg acc, reg a, reg b) { return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16); }
INLINE regf dotf(regf acc, regf a, regf b) { return acc + a * b; }
#endif

struct Dot8 {
  typedef reg r;
  typedef int32_t acc;
  static INLINE r bcast(const void* p) { return broadcast(p); }
#if defined(USE_AVX512_VNNI)
  static INLINE r dot(r c, r a, r b) { return dot8(c, a, b); }
#else
  static INLINE r dot(r c, r, r) { return c; }  // never called: without VNNI int8 operands are widened to int16
#endif
};
struct Dot16 {
  typedef reg r;
  typedef int32_t acc;
  static INLINE r bcast(const void* p) { return broadcast(p); }
  static INLINE r dot(r c, r a, r b) { return dot16(c, a, b); }
};
struct DotF {
  typedef regf r;
  typedef float acc;
  static INLINE r bcast(const void* p) { return broadcastf((const float*)p); }
  static INLINE r dot(r c, r a, r b) { return dotf(c, a, b); }
};

// a: MR rows of `groups` dwords, a_stride bytes apart. b: NV tiles, b_stride bytes apart, 64 bytes a group.
// init: NV x 16 starting values, or null for zero. c: MR rows of NV * 16, c_stride elements apart.
template <class Dot, int MR, int NV>
INLINE void tile(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride, int64_t groups,
                 const typename Dot::acc* init, typename Dot::acc* c, int64_t c_stride) {
  typedef typename Dot::r R;
  constexpr int W = 64 / sizeof(R), L = NV * W;  // registers per tile, per row
  R acc[MR][L];
#pragma GCC unroll 8
  for (int l = 0; l < L; ++l) {
    R start = {};
    if (init) __builtin_memcpy(&start, (const char*)init + l * sizeof(R), sizeof(R));
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][l] = start;
  }
  // Rows are reached as base + {0, 1, 2} strides: four pointers serve twelve rows.
  const uint8_t* base[(MR + 2) / 3];
#pragma GCC unroll 8
  for (int i = 0; i < (MR + 2) / 3; ++i) base[i] = a + 3 * i * a_stride;
  for (int64_t g = 0; g < groups; ++g) {
    R w[L];
#pragma GCC unroll 8
    for (int l = 0; l < L; ++l) __builtin_memcpy(&w[l], b + (l / W) * b_stride + (l % W) * sizeof(R), sizeof(R));
    b += 64;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const R x = Dot::bcast(base[r / 3] + (r % 3) * a_stride);
#pragma GCC unroll 8
      for (int l = 0; l < L; ++l) acc[r][l] = Dot::dot(acc[r][l], x, w[l]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < (MR + 2) / 3; ++i) base[i] += 4;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int l = 0; l < L; ++l) __builtin_memcpy((char*)(c + r * c_stride) + l * sizeof(R), &acc[r][l], sizeof(R));
}

template <class Dot, int NV>
using TileFn = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, const typename Dot::acc*,
                        typename Dot::acc*, int64_t);
template <class Dot, int MR, int NV>
__attribute__((noinline)) void tile_fn(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                                       int64_t groups, const typename Dot::acc* init, typename Dot::acc* c,
                                       int64_t c_stride) {
  tile<Dot, MR, NV>(a, a_stride, b, b_stride, groups, init, c, c_stride);
}
// The kernel for `rows` rows, 1..kRows.
template <class Dot, int NV, int MR = kRows>
INLINE TileFn<Dot, NV> pick(int rows) {
  if constexpr (MR > 1)
    if (rows < MR) return pick<Dot, NV, MR - 1>(rows);
  return tile_fn<Dot, MR, NV>;
}
