// lowbit_linear and weight_only_linear over a range of rows and of weight tiles.
//
// A block of rows is first rewritten as the dot product wants it (unsigned bytes with VNNI, else int16), then each
// panel of one or two weight tiles stays in L1 while all rows of the block pass it.
constexpr int64_t kBlockBytes = 640 * 1024;  // of rewritten rows: half to two thirds of a 1 to 1.25 MB L2

// The epilogue's constants for the features of a panel; zeros for those that do not exist.
struct Columns {
  alignas(64) float w_scale[kTiles * kTile], bias[kTiles * kTile], layer_scale[kTiles * kTile], out_inv_scale[kTiles * kTile];
};

INLINE void read_columns(float* dst, const float* src, int64_t stride, int64_t n, int64_t count) {
  if (src == nullptr) return;
  for (int64_t i = 0; i < kTiles * kTile; i += kTile)
    store(dst + i, stride == 0 ? splat(*src) : i < count ? load_16<vf>(src + n + i, count - i) : vf{});
}
INLINE void invert(float* columns) {
  for (int i = 0; i < kTiles * kTile; i += kTile) store(columns + i, 1.f / load<vf>(columns + i));
}
INLINE void read_columns(Columns& c, const Epilogue& e, int64_t n, int64_t count) {
  read_columns(c.w_scale, e.w_scale, 1, n, count);
  if (e.bias_rows <= 1) read_columns(c.bias, e.bias, 1, n, count);
  read_columns(c.layer_scale, e.layer_scale, 1, n, count);
  read_columns(c.out_inv_scale, e.out_scale, e.out_scale_stride, n, count);
  if (e.out_scale) invert(c.out_inv_scale);
}

// What a tile cannot do in registers: an activation, fewer features than it has columns, rows that lie anywhere.
// y (rows, kTiles * 16) holds everything up to the bias.
template <Activation A>
void finish(const Epilogue& epilogue, const Columns& c, const float* y, int64_t m, int rows, int64_t n, int64_t count) {
  const Epilogue e = epilogue;  // a copy: the codes written are bytes, which may alias the original
  const Codes codes = codes_of(e.out_scale ? e.out_bits : 8, e.out_zero_point);
  int64_t row[kRows];
  for (int r = 0; r < rows; ++r) row[r] = e.rows ? e.rows[m + r] : m + r;
  for (int64_t i = 0; i < count; i += kTile)
    for (int r = 0; r < rows; ++r) {
      vf x = activate<A>(load<vf>(y + r * kTiles * kTile + i));
      if (e.layer_scale) x = x * load<vf>(c.layer_scale + i);
      if (e.residual) x = x + load_16<vf>(e.residual + row[r] * e.residual_stride + n + i, count - i);
      const int64_t at = row[r] * e.out_stride + n + i;
      if (e.out_scale) store_16((int8_t*)e.out + at, to_code(x * load<vf>(c.out_inv_scale + i), codes), count - i);
      else store_16((float*)e.out + at, x, count - i);
    }
}

using FinishFn = void (*)(const Epilogue&, const Columns&, const float*, int64_t, int, int64_t, int64_t);
inline FinishFn pick_finish(Activation a) {
  switch (a) {
    case Activation::gelu: return finish<Activation::gelu>;
    case Activation::gelu_tanh: return finish<Activation::gelu_tanh>;
    case Activation::quick_gelu: return finish<Activation::quick_gelu>;
    default: return finish<Activation::none>;
  }
}

// Codes of fewer than 8 bits, cut into planes of kHigh and kLow bits, to bytes: chunks of kHigh + kLow registers become 8 groups.
template <int kHigh, int kLow>
INLINE void unpack(const uint8_t* src, uint8_t* dst, int64_t chunks) {
  constexpr int kHalf = 1 << (kHigh + kLow - 1);
  const auto field = [](const uint8_t* plane, int g, int width) {  // group g of a plane: field g / width of register g % width
    return (load<vi>(plane + 64 * (g % width)) >> (g / width * width)) & (((1 << width) - 1) * 0x01010101);
  };
  for (int64_t c = 0; c < chunks; ++c, src += 64 * (kHigh + kLow), dst += 512) {
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      vi u = field(src, g, kHigh);
      if constexpr (kLow > 0) u = (u << kLow) | field(src + 64 * kHigh, g, kLow);
      EACH u.v[i] = (ri)((rb)u.v[i] - (int8_t)kHalf);
      store(dst + 64 * g, u);
    }
  }
}
INLINE void unpack(int64_t bits, const uint8_t* src, uint8_t* dst, int64_t chunks) {
  switch (bits) {
    case 2: return unpack<2, 0>(src, dst, chunks);
    case 3: return unpack<2, 1>(src, dst, chunks);
    case 4: return unpack<4, 0>(src, dst, chunks);
    case 5: return unpack<4, 1>(src, dst, chunks);
    case 6: return unpack<4, 2>(src, dst, chunks);
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
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(dst + 64 * i, to_float((v << (24 - 8 * i)) >> 24));
  }
}
// The same for inputs in groups with a scale and a zero point of their own, for the features n .. n + count of a tile.
INLINE void widen_grouped(const Gemm& g, int64_t n, int64_t count, const uint8_t* src, uint8_t* dst) {
  const int64_t size = g.K / g.w_groups;
  for (int64_t k = 0; k < g.K; k += size) {
    alignas(64) float scale[kTile] = {}, zero_point[kTile] = {};
    for (int64_t i = 0; i < count; ++i) {
      scale[i] = g.group_scale[(n + i) * g.w_groups + k / size];
      if (g.group_zero_point) zero_point[i] = g.group_zero_point[(n + i) * g.w_groups + k / size];
    }
    const vf s = load<vf>(scale), z = load<vf>(zero_point);
    for (int64_t j = k; j < k + size; ++j) {
      const vi v = load<vi>(src + j / 4 * 64);
      store(dst + 64 * j, (to_float((v << (int)(24 - 8 * (j % 4))) >> 24) - z) * s);
    }
  }
  for (int64_t j = g.K; j < round_up(g.K, 4); ++j) store(dst + 64 * j, vf{});
}

// Levels in place of codes, as floats; none beyond the K inputs that exist, whose codes may stand for anything.
INLINE void widen_levels(const Gemm& g, const uint8_t* src, uint8_t* dst) {
  const int half = 1 << (g.w_bits - 1);
  for (int64_t k = 0; k < round_up(g.K, 4); ++k)
    for (int n = 0; n < kTile; ++n)
      ((float*)dst)[k * kTile + n] = k < g.K ? g.w_lut[(int8_t)src[k / 4 * 64 + 4 * n + k % 4] + half] : 0.f;
}
// The sums over k < K of a tile's levels: what it holds are those of its codes. For unsigned x, which has an offset.
INLINE vi sums_of(const uint8_t* levels, int64_t K) {
  vi sum = {};
  for (int64_t k = 0; k < K; k += 4, levels += 64) {
    const int32_t ones = K - k >= 4 ? 0x01010101 : 0x01010101 >> 8 * (4 - (K - k));
    const vi w = load<vi>(levels);
    EACH sum.v[i] = Dot8::dot(sum.v[i], broadcast(&ones), w.v[i]);
  }
  return sum;
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

// Everything but the rows of a panel of one or two weight tiles: filled in once, then each row tile changes its pointers.
struct Panel {
  Tile tile;
  Columns columns;
  int64_t n, count;  // its first feature, and how many exist
  int tiles;
  bool direct, codes;  // the tile kernel writes the output itself; as codes
};

template <class Dot>
void row_tile(const Gemm& g, Panel& p, FinishFn finish, int64_t m, int rows) {
  const Epilogue& e = g.epilogue;
  Tile& t = p.tile;
  alignas(64) float unfinished[kRows * kTiles * kTile], bias_rows[kRows * kTiles * kTile];
  const float one = 1;
  t.x_scale = e.x_scale ? e.x_scale + m * e.x_scale_stride : &one;
  t.bias = e.bias ? p.columns.bias : nullptr;
  if (e.bias_rows > 1) {  // a bias per row
    t.bias = e.bias + m % e.bias_rows * e.bias_stride + p.n, t.bias_stride = e.bias_stride;
    if (p.count < p.tiles * kTile) {
      for (int r = 0; r < rows; ++r) read_columns(bias_rows + r * kTiles * kTile, t.bias + r * e.bias_stride, 1, 0, p.count);
      t.bias = bias_rows, t.bias_stride = kTiles * kTile;
    }
  }
  const int64_t at = m * e.out_stride + p.n;
  t.residual = p.direct && e.residual ? e.residual + m * e.residual_stride + p.n : nullptr;
  t.out = !p.direct ? unfinished : p.codes ? (void*)((int8_t*)e.out + at) : (float*)e.out + at;
  pick<Dot>(p.tiles, rows, p.codes)(t);
  if (!p.direct) finish(e, p.columns, unfinished, m, rows, p.n, p.count);
}

template <Operand kOperand>
INLINE void gemm(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) {
  typedef typename std::conditional<kOperand == Operand::floats, DotF,
                                    typename std::conditional<kOperand == Operand::bytes, Dot8, Dot16>::type>::type Dot;
  constexpr int64_t kSize = kOperand == Operand::bytes ? 1 : kOperand == Operand::words ? 2 : 4;  // bytes per element
  const int64_t padded = round_up(g.K, 4), groups = padded * kSize / 4, w_tile = tile_bytes(g.K, g.w_bits);
  const int64_t x_stride = round_up(padded * kSize, 64) + 64;  // the extra line keeps rows off one cache set
  int64_t block = kBlockBytes / x_stride / kRows * kRows;
  if (block < kRows) block = kRows;
  if (block > row_end - row_begin) block = row_end - row_begin;
  uint8_t* const rows = (uint8_t*)scratch(block * x_stride + 64, 0);
  // Of a panel: its codes as bytes, when they are packed tighter, then as the operands of the dot product.
  const int64_t chunks = chunks_of(g.K), panel_stride = padded * kSize * kTile;
  const Steps levels(kOperand == Operand::floats ? nullptr : g.w_levels);
  const int64_t bytes = g.w_bits < 8 || levels.table ? kTiles * chunks * 512 : 0;
  uint8_t* const unpacked = (uint8_t*)scratch(bytes + (kSize > 1 ? kTiles * panel_stride : 0) + 64, 1);
  uint8_t* const widened = unpacked + bytes;
  const Epilogue& e = g.epilogue;
  const FinishFn finish = pick_finish(e.activation);
  alignas(64) typename Dot::acc init[kTiles * kTile];
  Panel p = {};
  Tile& t = p.tile;
  t.a_stride = x_stride, t.groups = groups, t.init = init;
  t.x_scale_stride = e.x_scale ? e.x_scale_stride : 0;
  t.w_scale = p.columns.w_scale, t.out_inv_scale = p.columns.out_inv_scale;
  t.residual_stride = e.residual_stride, t.out_codes = codes_of(e.out_scale ? e.out_bits : 8, e.out_zero_point);

  for (int64_t m0 = row_begin; m0 < row_end; m0 += block) {
    const int64_t m1 = m0 + block < row_end ? m0 + block : row_end;
    for (int64_t m = m0; m < m1; ++m) {
      uint8_t* dst = rows + (m - m0) * x_stride;
      const int64_t row = g.from ? g.from[m] : m;
      if constexpr (kOperand == Operand::floats) {
        __builtin_memcpy(dst, (const float*)g.x + row * g.x_stride, g.K * sizeof(float));
        __builtin_memset(dst + g.K * sizeof(float), 0, (padded - g.K) * sizeof(float));
      } else {
        rewrite_row((const int8_t*)g.x + row * g.x_stride, dst, g.K, padded);
      }
    }
    for (int64_t tile = tile_begin; tile < tile_end; tile += kTiles) {
      p.tiles = tile_end - tile < kTiles ? 1 : kTiles;
      p.n = tile * kTile, p.count = g.N - p.n < p.tiles * kTile ? g.N - p.n : p.tiles * kTile;
      p.direct = e.activation == Activation::none && p.count == p.tiles * kTile && e.rows == nullptr;
      if (kOperand == Operand::floats && e.out_scale) p.direct = false;  // the float tile kernel writes floats only
      p.codes = p.direct && e.out_scale;
      read_columns(p.columns, e, p.n, p.count);
      const uint8_t* const w = g.w_packed + tile * w_tile;
      for (int i = 0; i < p.tiles; ++i) {
        const uint8_t *tile_start = w + i * w_tile, *codes = tile_start + 64;
        if (bytes) {
          int8_t* const to = (int8_t*)unpacked + i * chunks * 512;
          if (g.w_bits < 8) unpack(g.w_bits, codes, (uint8_t*)to, chunks);
          else __builtin_memcpy(to, codes, chunks * 512);
          levels.apply(to, chunks * 512);
          codes = (uint8_t*)to;
        }
        if constexpr (kOperand == Operand::floats) {
          store(init + i * kTile, vf{});
          uint8_t* const to = widened + i * panel_stride;
          const int64_t left = p.count - i * kTile;
          if (g.group_scale) widen_grouped(g, p.n + i * kTile, left < kTile ? left : kTile, codes, to);
          else if (g.w_lut) widen_levels(g, codes, to);
          else widen_float(codes, to, padded / 4);
        } else {
          const int32_t offset = (int32_t)g.x_zero_point + (kOperand == Operand::bytes ? 128 : 0);
          const vi sums = levels.table ? sums_of(codes, g.K) : load<vi>(tile_start);
          store(init + i * kTile, -offset * sums);
          if constexpr (kOperand == Operand::words) widen16(codes, widened + i * panel_stride, padded / 4);
        }
      }
      t.b = kSize > 1 ? widened : bytes ? unpacked : w + 64;
      t.b_stride = kSize > 1 ? panel_stride : bytes ? chunks * 512 : w_tile;
      t.layer_scale = p.direct && e.layer_scale ? p.columns.layer_scale : nullptr;
      t.out_stride = p.direct ? e.out_stride : kTiles * kTile;
      // Row tiles, as even as they come: a low one starves for weights. Each fetches its share of the panel after this one,
      // which is in L3 or beyond: from 78 to 95 % of peak at 50 rows (Zen 4).
      const int64_t row_tiles = (m1 - m0 + kRows - 1) / kRows, slice = kTiles * w_tile / row_tiles;
      const uint8_t* next = g.then ? g.then : w;
      if (m1 < row_end) next = g.w_packed + tile_begin * w_tile;
      if (tile + kTiles < tile_end) next = w + kTiles * w_tile;
      t.next_step = slice / groups;
      int64_t left = row_tiles;
      for (int64_t m = m0, n_rows; m < m1; m += n_rows, left -= left > 1) {
        n_rows = (m1 - m + left - 1) / left;
        if (e.bias_rows > 1 && n_rows > e.bias_rows - m % e.bias_rows) n_rows = e.bias_rows - m % e.bias_rows;
        if (n_rows > kRows) n_rows = kRows;  // the rows a wrapping bias left over
        t.a = rows + (m - m0) * x_stride;
        t.next = next + (row_tiles - left) * slice;
        row_tile<Dot>(g, p, finish, m, (int)n_rows);
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
