// The inner product of MR rows with NV tiles of 16 columns, and the linear part of what follows it, without leaving the
// registers. A group is one dword of a row: 4 int8, 2 int16 or 1 float; the row's dword is broadcast against 16 columns'
// dwords, 64 bytes that lie together.
//   dot8   unsigned x signed bytes (AVX512-VNNI only: vpdpbusd)
//   dot16  signed 16-bit pairs (vpdpwssd, vpmaddwd + vpaddd, pmaddwd + paddd, or plain C)
//   dotf   float
// Sums have the vector type that the epilogue computes with, not __m512i: GCC would keep a copy of each in both.
INLINE ri broadcast(const void* p) { int32_t v; __builtin_memcpy(&v, p, 4); return v - ri{}; }
#if defined(USE_AVX512_VNNI)
constexpr bool kVnni = true;
constexpr int kRows = 12, kTiles = 2;  // 24 accumulators of 32 registers
INLINE ri dot8(ri acc, ri a, ri b) { return (ri)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
INLINE ri dot16(ri acc, ri a, ri b) { return (ri)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
INLINE rf dotf(rf acc, rf a, rf b) { return (rf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc); }
#elif defined(USE_AVX2)
constexpr bool kVnni = false;
constexpr int kRows = 6, kTiles = 1;  // a tile is two registers: 12 accumulators of 16
INLINE ri dot16(ri acc, ri a, ri b) { return acc + (ri)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
INLINE rf dotf(rf acc, rf a, rf b) { return (rf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc); }
#elif defined(__SSE2__)
constexpr bool kVnni = false;
constexpr int kRows = 2, kTiles = 1;
INLINE ri dot16(ri acc, ri a, ri b) { return acc + (ri)_mm_madd_epi16((__m128i)a, (__m128i)b); }
INLINE rf dotf(rf acc, rf a, rf b) { return acc + a * b; }
#else
constexpr bool kVnni = false;
constexpr int kRows = 2, kTiles = 1;
INLINE ri dot16(ri acc, ri a, ri b) { return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16); }
INLINE rf dotf(rf acc, rf a, rf b) { return acc + a * b; }
#endif

struct Dot8 {
  typedef ri r;
  typedef int32_t acc;
  static INLINE r bcast(const void* p) { return broadcast(p); }
#if defined(USE_AVX512_VNNI)
  static INLINE r dot(r c, r a, r b) { return dot8(c, a, b); }
#else
  static INLINE r dot(r c, r, r) { return c; }  // never called: without VNNI int8 operands are widened to int16
#endif
};
struct Dot16 {
  typedef ri r;
  typedef int32_t acc;
  static INLINE r bcast(const void* p) { return broadcast(p); }
  static INLINE r dot(r c, r a, r b) { return dot16(c, a, b); }
};
struct DotF {
  typedef rf r;
  typedef float acc;
  static INLINE r bcast(const void* p) { return *(const float*)p - rf{}; }
  static INLINE r dot(r c, r a, r b) { return dotf(c, a, b); }
};

// y = acc * (x_scale * w_scale), + bias, * layer_scale, + residual, then floats or codes of y * out_inv_scale.
// Row pointers advance by their stride; column pointers hold NV * 16 values. Null: the step is left out.
struct Tile {
  const uint8_t* a;
  int64_t a_stride;  // bytes between rows
  const uint8_t* b;
  int64_t b_stride;  // bytes between tiles
  int64_t groups;
  const void* init;  // where the sums start, NV * 16 values
  const uint8_t* next;  // memory that will be read soon, to fetch meanwhile, next_step bytes a group
  int64_t next_step;
  const float* x_scale;
  int64_t x_scale_stride;
  const float* w_scale;
  const float* bias;
  int64_t bias_stride;  // elements between rows, 0 for one bias
  const float* layer_scale;
  const float* residual;
  int64_t residual_stride;
  const float* out_inv_scale;
  Codes out_codes;
  void* out;
  int64_t out_stride;
};

INLINE rf number(ri sum) { return __builtin_convertvector(sum, rf); }
INLINE rf number(rf sum) { return sum; }

template <class Dot, int MR, int NV, bool kCodes>
__attribute__((noinline)) void tile(const Tile& args) {
  const Tile t = args;  // a copy: the codes written are bytes, which may alias anything
  typedef typename Dot::r R;
  constexpr int W = 64 / sizeof(R), L = NV * W;  // registers per tile, per row
  R acc[MR][L];
#pragma GCC unroll 8
  for (int l = 0; l < L; ++l) {
    R start = {};
    if (t.init) __builtin_memcpy(&start, (const char*)t.init + l * sizeof(R), sizeof(R));
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][l] = start;
  }
  if (t.residual) {  // the epilogue would wait for all of it at once
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) __builtin_prefetch(t.residual + r * t.residual_stride + 16 * v);
  }
  // Rows are reached as base + {0, 1, 2} strides: four pointers serve twelve rows.
  const uint8_t *base[(MR + 2) / 3], *b = t.b, *next = t.next;
#pragma GCC unroll 8
  for (int i = 0; i < (MR + 2) / 3; ++i) base[i] = t.a + 3 * i * t.a_stride;
  for (int64_t g = 0; g < t.groups; ++g) {
    R w[L];
#pragma GCC unroll 8
    for (int l = 0; l < L; ++l) __builtin_memcpy(&w[l], b + (l / W) * t.b_stride + (l % W) * sizeof(R), sizeof(R));
    __builtin_prefetch(next);
    b += 64, next += t.next_step;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const R x = Dot::bcast(base[r / 3] + (r % 3) * t.a_stride);
#pragma GCC unroll 8
      for (int l = 0; l < L; ++l) acc[r][l] = Dot::dot(acc[r][l], x, w[l]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < (MR + 2) / 3; ++i) base[i] += 4;
  }
  vf y[MR][NV];
#define EVERY _Pragma("GCC unroll 16") for (int r = 0; r < MR; ++r) _Pragma("GCC unroll 2") for (int v = 0; v < NV; ++v)
  EVERY {
    EACH y[r][v].v[i] = number(acc[r][v * W + i]);
    y[r][v] = y[r][v] * (t.x_scale[r * t.x_scale_stride] * load<vf>(t.w_scale + 16 * v));
  }
  if (t.bias) EVERY y[r][v] = y[r][v] + load<vf>(t.bias + r * t.bias_stride + 16 * v);
  if (t.layer_scale) EVERY y[r][v] = y[r][v] * load<vf>(t.layer_scale + 16 * v);
  if (t.residual) EVERY y[r][v] = y[r][v] + load<vf>(t.residual + r * t.residual_stride + 16 * v);
  if constexpr (kCodes) {
    EVERY store((int8_t*)t.out + r * t.out_stride + 16 * v,
                to_code(y[r][v] * load<vf>(t.out_inv_scale + 16 * v), t.out_codes));
  } else {
    EVERY store((float*)t.out + r * t.out_stride + 16 * v, y[r][v]);
  }
#undef EVERY
}

// The kernel for 1..kRows rows and 1 or kTiles tiles.
using TileFn = void (*)(const Tile&);
template <class Dot, int NV, bool kCodes, int MR = kRows>
INLINE TileFn tile_of(int rows) {
  if constexpr (MR > 1)
    if (rows < MR) return tile_of<Dot, NV, kCodes, MR - 1>(rows);
  return tile<Dot, MR, NV, kCodes>;
}

template <class Dot>
INLINE TileFn pick(int tiles, int rows, bool codes) {
  if constexpr (!std::is_same<Dot, DotF>::value)
    if (codes) return tiles == kTiles ? tile_of<Dot, kTiles, true>(rows) : tile_of<Dot, 1, true>(rows);
  return tiles == kTiles ? tile_of<Dot, kTiles, false>(rows) : tile_of<Dot, 1, false>(rows);
}

// Dot products on registers alone: what this core can do at most. Returns multiply-adds.
int64_t dot_loop(int64_t iterations) {
  typedef typename std::conditional<kVnni, Dot8, Dot16>::type Dot;
  constexpr int kChains = 12;  // enough independent sums to hide the latency
  Dot::r acc[kChains] = {}, a = Dot::bcast(&iterations), b = a;
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
#if defined(__x86_64__)
      __asm__ volatile("" : "+x"(a));  // another a, as far as the compiler knows
#endif
      acc[c] = Dot::dot(acc[c], a, b);
    }
  }
  volatile int32_t sink = 0;
  for (int c = 0; c < kChains; ++c) sink = sink + acc[c][0];
  return iterations * kChains * (int64_t)sizeof(Dot::r) / (kVnni ? 1 : 2);
}
// Reads `bytes` from p, 64 at a time.
void read_loop(const void* p, int64_t bytes) {
  vi sum = {};
  for (int64_t i = 0; i + 64 <= bytes; i += 64) sum = sum | load<vi>((const char*)p + i);
  volatile int32_t sink = sum.v[0][0];
  (void)sink;
}
