// lowbit_linear and weight_only_linear over a range of rows and of weight tiles.
//
// A block of rows is first rewritten as the dot product wants it (unsigned bytes with VNNI, else int16), then each
// panel of one or two weight tiles stays in L1 while all rows of the block pass it.
constexpr int64_t kBlockBytes = 640 * 1024;  // of rewritten rows: half to two thirds of a 1 to 1.25 MB L2

struct Columns {  // the epilogue's constants for 16 features, `count` of which exist
  vf w_scale, bias, layer_scale, out_inv_scale;
  int64_t count;
};

INLINE Columns columns(const Epilogue& e, int64_t n, int64_t N) {
  Columns c = {};
  c.count = N - n < kTile ? N - n : kTile;
  c.w_scale = load_16<vf>(e.w_scale + n, c.count);
  if (e.bias && e.bias_rows <= 1) c.bias = load_16<vf>(e.bias + n, c.count);
  if (e.layer_scale) c.layer_scale = load_16<vf>(e.layer_scale + n, c.count);
  if (e.out_scale) c.out_inv_scale = 1.f / (e.out_scale_stride ? load_16<vf>(e.out_scale + n, c.count) : splat(*e.out_scale));
  return c;
}

// One row of one tile. kFull: all 16 features exist.
template <class Acc, Activation A, bool kCodes, bool kFull>
INLINE void epilogue_row(const Epilogue& e, const Columns& c, const Acc* acc, int64_t m, int64_t n) {
  const int64_t count = kFull ? kTile : c.count;
  vf y;
  if constexpr (std::is_same<Acc, int32_t>::value) y = to_float(load<vi>(acc));
  else y = load<vf>(acc);
  y = y * ((e.x_scale ? e.x_scale[m * e.x_scale_stride] : 1.f) * c.w_scale);
  if (e.bias_rows > 1) {
    y = y + load_16<vf>(e.bias + (m % e.bias_rows) * e.bias_stride + n, count);
  } else if (e.bias) {
    y = y + c.bias;
  }
  if constexpr (A == Activation::gelu) y = gelu(y);
  if constexpr (A == Activation::gelu_tanh) y = gelu_tanh(y);
  if constexpr (A == Activation::quick_gelu) y = quick_gelu(y);
  if (e.layer_scale) y = y * c.layer_scale;
  if (e.residual) y = y + load_16<vf>(e.residual + m * e.residual_stride + n, count);
  if constexpr (kCodes) store_16((int8_t*)e.out + m * e.out_stride + n, to_code(y * c.out_inv_scale, (float)e.out_zero_point), count);
  else store_16((float*)e.out + m * e.out_stride + n, y, count);
}

template <class Acc, Activation A, bool kCodes>
void epilogue_rows(const Epilogue& epilogue, const Columns& columns, const Acc* acc, int64_t acc_stride, int64_t m, int rows, int64_t n) {
  const Epilogue e = epilogue;  // a copy: the codes written are bytes, which may alias the original
  const Columns c = columns;
  if (c.count == kTile)
    for (int r = 0; r < rows; ++r) epilogue_row<Acc, A, kCodes, true>(e, c, acc + r * acc_stride, m + r, n);
  else
    for (int r = 0; r < rows; ++r) epilogue_row<Acc, A, kCodes, false>(e, c, acc + r * acc_stride, m + r, n);
}

template <class Acc> using EpilogueFn = void (*)(const Epilogue&, const Columns&, const Acc*, int64_t, int64_t, int, int64_t);
template <class Acc, bool kCodes> EpilogueFn<Acc> pick_epilogue(Activation a) {
  switch (a) {
    case Activation::gelu: return epilogue_rows<Acc, Activation::gelu, kCodes>;
    case Activation::gelu_tanh: return epilogue_rows<Acc, Activation::gelu_tanh, kCodes>;
    case Activation::quick_gelu: return epilogue_rows<Acc, Activation::quick_gelu, kCodes>;
    default: return epilogue_rows<Acc, Activation::none, kCodes>;
  }
}

// 64-byte groups of four int8 inputs become two groups of int16 pairs, or four of one float.
INLINE void widen16(const uint8_t* src, uint8_t* dst, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g, src += 64, dst += 128) {
    const vi v = load<vi>(src);
    const vi b0 = (v << 24) >> 24, b1 = (v << 16) >> 24, b2 = (v << 8) >> 24, b3 = v >> 24;
    store(dst, (b0 & 0xffff) | (b1 << 16));
    store(dst + 64, (b2 & 0xffff) | (b3 << 16));
  }
}
INLINE void widen_float(const uint8_t* src, uint8_t* dst, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g, src += 64, dst += 256) {
    const vi v = load<vi>(src);
    store(dst, to_float((v << 24) >> 24));
    store(dst + 64, to_float((v << 16) >> 24));
    store(dst + 128, to_float((v << 8) >> 24));
    store(dst + 192, to_float(v >> 24));
  }
}

// Rows of int8 codes as the dot product's left operand, zero padded to whole groups of four.
INLINE void rewrite_row(const int8_t* src, uint8_t* dst, int64_t K, int64_t padded) {
  if constexpr (kVnni) {  // + 128 as unsigned; the padding meets zero weights
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) store(dst + k, load<vi>(src + k) ^ (int32_t)0x80808080);
    for (; k < K; ++k) dst[k] = (uint8_t)src[k] ^ 0x80;
    for (; k < padded; ++k) dst[k] = 0;
  } else {
    int16_t* d = (int16_t*)dst;
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) store(d + k, to_words(load<vb>(src + k)));
    for (; k < K; ++k) d[k] = src[k];
    for (; k < padded; ++k) d[k] = 0;
  }
}

enum class Operand { bytes, words, floats };

template <Operand kOperand>
INLINE void gemm(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) {
  typedef typename std::conditional<kOperand == Operand::floats, DotF,
                                    typename std::conditional<kOperand == Operand::bytes, Dot8, Dot16>::type>::type Dot;
  typedef typename Dot::acc Acc;
  constexpr int64_t kSize = kOperand == Operand::bytes ? 1 : kOperand == Operand::words ? 2 : 4;  // bytes per element
  const int64_t padded = round_up(g.K, 4), groups = padded * kSize / 4, w_tile = tile_bytes(g.K);
  const int64_t x_stride = round_up(padded * kSize, 64) + 64;  // the extra line keeps rows off one cache set
  int64_t block = kBlockBytes / x_stride / kRows * kRows;
  if (block < kRows) block = kRows;
  if (block > row_end - row_begin) block = row_end - row_begin;
  uint8_t* const rows = (uint8_t*)scratch(block * x_stride + 64, 0);
  const int64_t panel_stride = padded * kSize * kTile;
  uint8_t* const panel = kSize > 1 ? (uint8_t*)scratch(kTiles * panel_stride + 64, 1) : nullptr;
  const EpilogueFn<Acc> epilogue = g.epilogue.out_scale ? pick_epilogue<Acc, true>(g.epilogue.activation)
                                                        : pick_epilogue<Acc, false>(g.epilogue.activation);
  alignas(64) Acc acc[kRows * kTiles * kTile], init[kTiles * kTile];

  for (int64_t m0 = row_begin; m0 < row_end; m0 += block) {
    const int64_t m1 = m0 + block < row_end ? m0 + block : row_end;
    for (int64_t m = m0; m < m1; ++m) {
      uint8_t* dst = rows + (m - m0) * x_stride;
      if constexpr (kOperand == Operand::floats) {
        __builtin_memcpy(dst, (const float*)g.x + m * g.x_stride, g.K * sizeof(float));
        __builtin_memset(dst + g.K * sizeof(float), 0, (padded - g.K) * sizeof(float));
      } else {
        rewrite_row((const int8_t*)g.x + m * g.x_stride, dst, g.K, padded);
      }
    }
    for (int64_t t = tile_begin; t < tile_end; t += kTiles) {
      const int tiles = tile_end - t < kTiles ? 1 : kTiles;
      const uint8_t* w = g.w_packed + t * w_tile;
      Columns cols[kTiles];
      for (int i = 0; i < tiles; ++i) {
        cols[i] = columns(g.epilogue, (t + i) * kTile, g.N);
        const uint8_t* tile_start = w + i * w_tile;
        if constexpr (kOperand == Operand::floats) {
          store(init + i * kTile, vf{});
          widen_float(tile_start + 64, panel + i * panel_stride, padded / 4);
        } else {
          const int32_t offset = (int32_t)g.x_zero_point + (kOperand == Operand::bytes ? 128 : 0);
          store(init + i * kTile, -offset * load<vi>(tile_start));
          if constexpr (kOperand == Operand::words) widen16(tile_start + 64, panel + i * panel_stride, padded / 4);
        }
      }
      const uint8_t* b = kSize > 1 ? panel : w + 64;
      const int64_t b_stride = kSize > 1 ? panel_stride : w_tile;
      for (int64_t m = m0; m < m1; m += kRows) {
        const int n_rows = m1 - m < kRows ? (int)(m1 - m) : kRows;
        const auto fn = tiles == kTiles ? pick<Dot, kTiles>(n_rows) : pick<Dot, 1>(n_rows);
        fn(rows + (m - m0) * x_stride, x_stride, b, b_stride, groups, init, acc, tiles * kTile);
        for (int i = 0; i < tiles; ++i)
          epilogue(g.epilogue, cols[i], acc + i * kTile, tiles * kTile, m, n_rows, (t + i) * kTile);
      }
    }
  }
}

void lowbit_linear(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) {
  gemm<kVnni ? Operand::bytes : Operand::words>(g, row_begin, row_end, tile_begin, tile_end);
}
void weight_only_linear(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) {
  gemm<Operand::floats>(g, row_begin, row_end, tile_begin, tile_end);
}
