// quant_attention: O = P V / sum(P) of int8 Q, K and V, P as codes of a format (softmax.h) or as diffused bytes.
//
// One work item is a run of queries of one head. K and V are repacked for it once; then kRows queries at a time have
// their whole row of scores, codes and outputs in cache. No N x N tensor is ever in memory.

// One head of one image or sequence: first elements, strides between rows.
struct Head {
  const int8_t *q, *k, *v;
  const float* v_float;
  int64_t q_stride, k_stride, v_stride;
  const float *q_scale, *k_scale, *v_scale;
  int64_t q_scale_stride, k_scale_stride, v_scale_stride;
  const int32_t* q_index;
  const float *bias, *grid_h, *grid_w, *key_bias;
  int64_t Nq, Nk, D;
  int64_t out;  // of the first output
  const float* out_scale;
  float *cls, *lse, *columns;
  INLINE bool biased() const { return bias || grid_h || key_bias; }
  INLINE bool only_keys_biased() const { return key_bias && !bias && !grid_h; }  // the same bias for every query
};

INLINE Head head_of(const Attention& a, int64_t b, int64_t h) {
  const int64_t image = a.q_ends ? 0 : b, i = a.q_ends ? a.q_ends[b] : 0, j = a.q_ends ? a.k_ends[b] : 0;
  const auto at = [&](auto* p, const int64_t* stride, int64_t n) { return p ? p + image * stride[0] + h * stride[1] + n * stride[2] : nullptr; };
  Head x = {};
  x.q = at(a.q, a.q_stride, i), x.k = at(a.k, a.k_stride, j), x.v = at(a.v, a.v_stride, j), x.v_float = at(a.v_float, a.v_stride, j);
  x.q_index = a.q_index ? a.q_index + image * a.Nq : nullptr;
  x.q_stride = a.q_stride[2], x.k_stride = a.k_stride[2], x.v_stride = a.v_stride[2];
  x.q_scale = at(a.q_scale, a.q_scale_stride, i), x.q_scale_stride = a.q_scale_stride[2];
  x.k_scale = at(a.k_scale, a.k_scale_stride, j), x.k_scale_stride = a.k_scale_stride[2];
  x.v_scale = at(a.v_scale, a.v_scale_stride, j), x.v_scale_stride = a.v_scale_stride[2];
  x.bias = at(a.bias, a.bias_stride, 0), x.grid_h = at(a.grid_h, a.grid_h_stride, 0), x.grid_w = at(a.grid_w, a.grid_w_stride, 0);
  x.key_bias = a.key_bias ? a.key_bias + image * a.key_bias_stride[0] + j * a.key_bias_stride[1] : nullptr;
  x.Nq = a.q_ends ? a.q_ends[b + 1] - i : a.Nq, x.Nk = a.q_ends ? a.k_ends[b + 1] - j : a.Nk, x.D = a.D;
  x.out = ((image * a.Nq + i) * a.H + h) * a.D;
  x.out_scale = a.out_scale ? a.out_scale + h * a.D * a.out_scale_stride : nullptr;
  x.cls = a.cls ? a.cls + (image * a.H + h) * a.Nk + j : nullptr;
  x.lse = a.lse ? a.lse + (image * a.H + h) * a.Nq + i : nullptr;
  return x;
}

struct Work {
  int64_t key_tiles, padded_keys, padded_d, d_tiles, key_groups, q_groups, q_stride, k_tile, v_tile, p_stride;  // strides in bytes
  bool floats;  // P and V are floats
  bool v_scale_in_v, weighted;  // a scale per key: contained in the floats, or in the bytes of P relative to the largest
  float v_scale;
  // Rewritten queries; K as weight tiles of 16 keys; V as tiles of 16 channels, 4 keys a group (int16: 2, float: 1); P,
  // and its second byte; codes.
  uint8_t *q, *k, *v, *p, *p_high, *codes;
  int32_t* k_offset;
  float *k_scale, *v_ratio, *ones, *scores, *row, *low;  // row: of biases or weights; low: what the lower bytes of P give
  float* key_bias;  // as it is added to the scores of all queries
};

INLINE Work work_of(const Attention& a, const Head& head) {
  const Softmax& f = a.softmax;
  Work s = {};
  s.v_scale_in_v = f.coded && head.v_scale_stride != 0;
  s.floats = f.coded && (!f.low || head.v_float || s.v_scale_in_v);
  s.weighted = !f.coded && head.v_scale_stride != 0;
  const int64_t bytes = kVnni ? 1 : 2, p_bytes = s.floats ? 4 : bytes;
  s.padded_keys = round_up(head.Nk, 64), s.key_tiles = round_up(head.Nk, kTile) / kTile;
  s.padded_d = round_up(a.D, 4), s.d_tiles = round_up(a.D, kTile) / kTile;
  s.key_groups = (head.Nk * p_bytes + 3) / 4, s.q_stride = round_up(s.padded_d * bytes, 64);
  s.q_groups = s.padded_d * bytes / 4;
  s.k_tile = s.padded_d * kTile * bytes, s.v_tile = s.key_groups * 64, s.p_stride = s.padded_keys * p_bytes;
  const int64_t sizes[] = {kRows * s.q_stride, s.key_tiles * s.k_tile, s.d_tiles * s.v_tile, kRows * s.p_stride,
                           f.high ? kRows * s.p_stride : 0, s.padded_keys, 4 * s.padded_keys, 4 * s.padded_keys,
                           4 * s.padded_keys, 4 * kTiles * kTile, 4 * kRows * s.padded_keys, 4 * s.padded_keys,
                           4 * kRows * kTiles * kTile, head.only_keys_biased() ? 4 * s.padded_keys : 0};
  int64_t total = 0;
  for (int64_t size : sizes) total += round_up(size, 64);
  uint8_t* next = (uint8_t*)scratch(total, 0);
  int i = 0;
  const auto take = [&] { uint8_t* p = next; next += round_up(sizes[i++], 64); return p; };
  s.q = take(), s.k = take(), s.v = take(), s.p = take(), s.p_high = take(), s.codes = take();
  s.k_offset = (int32_t*)take(), s.k_scale = (float*)take(), s.v_ratio = (float*)take();
  s.ones = (float*)take(), s.scores = (float*)take(), s.row = (float*)take(), s.low = (float*)take();
  s.key_bias = (float*)take();
  return s;
}

#include "attention_pack.h"

// Biases to what is added to scores in steps; kUnseen, and anything added to it, is no score.
INLINE float bias_in_steps(float bias, float steps) {
  const float b = bias * steps, up = b < -kLimit ? -kLimit : b;
  return up > kLimit ? kLimit : up;
}

INLINE void pack_head(const Attention& a, const Head& head, Work& s) {
  pack_keys(head, s);
  for (int64_t n = 0; head.only_keys_biased() && n < s.padded_keys; ++n) {
    const float b = n < head.Nk ? head.key_bias[n * a.key_bias_stride[1]] : 0.f;
    s.key_bias[n] = !a.softmax.coded ? b : b == -__builtin_inff() ? 2 * kUnseen : bias_in_steps(b, a.softmax.bias_scale);
  }
  s.floats ? pack_float_values(head, s) : pack_values(head, s);
  s.v_scale = s.v_scale_in_v ? 1.f : head.v_scale[0];
  for (int64_t n = 1; s.weighted && n < head.Nk; ++n) {
    const float scale = head.v_scale[n * head.v_scale_stride];
    s.v_scale = scale > s.v_scale ? scale : s.v_scale;
  }
  for (int n = 0; n < kTiles * kTile; ++n) s.ones[n] = 1;
  for (int64_t n = 0; n < s.padded_keys; ++n) {
    s.k_scale[n] = n < head.Nk ? head.k_scale[n * head.k_scale_stride] : 0.f;
    s.v_ratio[n] = s.weighted && n < head.Nk ? head.v_scale[n * head.v_scale_stride] / (s.v_scale > 1e-30f ? s.v_scale : 1e-30f) : 1.f;
  }
}

// What biases add to the scores of query i, in the order of the reference; out may be the scores themselves.
INLINE void add_biases(const Attention& a, const Head& head, int64_t i, float* out, bool first) {
  const auto add = [&](auto&& value) {
    for (int64_t j = 0; j < head.Nk; ++j) out[j] = first ? value(j) : out[j] + value(j);
    first = false;
  };
  if (head.bias) {
    const float* p = head.bias + i * a.bias_stride[2];
    const int64_t stride = a.bias_stride[3];
    stride == 1 ? add([=](int64_t j) { return p[j]; }) : add([=](int64_t j) { return p[j * stride]; });
  }
  if (head.grid_h) {
    const float *y = head.grid_h + i * a.grid_h_stride[2], *x = head.grid_w + i * a.grid_w_stride[2];
    const int64_t y_stride = a.grid_h_stride[3], x_stride = a.grid_w_stride[3], columns = a.grid_columns;
    add([=](int64_t j) { return y[j / columns * y_stride] + x[j % columns * x_stride]; });
  }
  if (head.key_bias) add([p = head.key_bias, stride = a.key_bias_stride[1]](int64_t j) { return p[j * stride]; });
}

// Biases in steps, added to the scores of rows; keys that are not seen.
INLINE void add_biases_in_steps(const Attention& a, const Head& head, const Work& s, int64_t i, int rows) {
  const float steps = a.softmax.bias_scale;
  for (int r = 0; r < rows; ++r) {
    float* x = s.scores + r * s.padded_keys;
    add_biases(a, head, i + r, s.row, true);
    for (int64_t j = 0; j < head.Nk; ++j) {
      const float y = x[j] + bias_in_steps(s.row[j], steps);
      x[j] = s.row[j] == -__builtin_inff() ? kUnseen : y;
    }
  }
}

// The scores of `rows` queries, in steps of the format, or scaled as they are for bytes.
INLINE void score_rows(const Attention& a, const Head& head, const Work& s, int64_t i, int rows) {
  const Softmax& f = a.softmax;
  float row_scale[kRows];
  for (int r = 0; r < rows; ++r) {
    const int64_t row = head.q_index ? head.q_index[i + r] : i + r;
    rewrite_row(head.q + row * head.q_stride, s.q + r * s.q_stride, head.D, s.padded_d);
    row_scale[r] = head.q_scale[row * head.q_scale_stride] * (f.coded ? f.score_scale : a.softmax_scale);
  }
  Tile t = {};
  t.a = s.q, t.a_stride = s.q_stride, t.b_stride = s.k_tile, t.groups = s.q_groups, t.next = s.v;
  t.x_scale = row_scale, t.x_scale_stride = 1, t.out_stride = s.padded_keys;
  for (int64_t n = 0; n < s.key_tiles; n += kTiles) {
    t.b = s.k + n * s.k_tile, t.init = s.k_offset + n * kTile, t.w_scale = s.k_scale + n * kTile;
    t.out = s.scores + n * kTile, t.bias = head.only_keys_biased() ? s.key_bias + n * kTile : nullptr;
    pick<CodeDot>(s.key_tiles - n < kTiles ? 1 : kTiles, rows, false)(t);
  }
  const bool biased = head.biased() && !head.only_keys_biased();
  if (f.coded && biased) {
    add_biases_in_steps(a, head, s, i, rows);
  } else {
    for (int r = 0; biased && r < rows; ++r) add_biases(a, head, i + r, s.scores + r * s.padded_keys, false);
  }
  const float unseen = f.coded ? kUnseen : -__builtin_inff();
  for (int r = 0; r < rows; ++r)
    for (int64_t j = head.Nk; j < s.padded_keys; ++j) s.scores[r * s.padded_keys + j] = unseen;
}

// Of the first query, whose scores are x: its probabilities.
INLINE void emit_cls(const Head& head, const Work& s, const float* x, float top, float inverse, bool none) {
  double total = 0;
  for (int64_t j = 0; j < s.padded_keys; j += 16) store(s.row + j, relative(x + j, top, inverse));
  for (int64_t j = 0; j < head.Nk; ++j) total += s.row[j] = none || x[j] <= kUnseen ? 0 : s.row[j];
  for (int64_t j = 0; j < head.Nk; ++j) head.cls[j] = none ? 0 : (float)(s.row[j] / total);
}

// The operands of the product with v for row r, from its scores x by way of codes; returns their sum.
INLINE float code_row(const Softmax& f, const Work& s, int r, const float* x, float top, float anchor) {
  const int32_t count = (int32_t)f.count;
  if (top <= kUnseen) {
    __builtin_memset(s.codes, 0, s.padded_keys);
  } else if (f.thresholds) {
    codes_by_thresholds(x, s.codes, s.padded_keys, anchor, f.thresholds, count);
  } else if (f.lse) {
    codes_below_sum(x, s.codes, s.padded_keys, anchor, f.shift, count);
  } else {
    codes_below_maximum(x, s.codes, s.padded_keys, top, count);
  }
  const int64_t at = r * s.p_stride;
  if (s.floats) return look_up(s.codes, f.values, (float*)(s.p + at), s.padded_keys);
  const int64_t low = look_up(s.codes, f.low, (Byte*)(s.p + at), s.padded_keys);
  return (float)(low + (f.high ? 256 * look_up(s.codes, f.high, (Byte*)(s.p_high + at), s.padded_keys) : 0));
}

// Scores to the operands of the product with v, and to the scale of that product. The maxima of all rows come first: a row
// would wait for its own.
INLINE void coded_rows(const Attention& a, const Head& head, const Work& s, int64_t i, int rows, float* out_scale) {
  const Softmax& f = a.softmax;
  float top[kRows], total[kRows];
  for (int r = 0; r < rows; ++r) top[r] = row_maximum(s.scores + r * s.padded_keys, s.padded_keys);
  bool found = false;
#if defined(USE_AVX512_VNNI)
  found = !f.lse && !f.thresholds && !s.floats && f.count < 128 && !head.columns && has_vbmi();
  if (found) look_up_rows_vbmi(s.scores, rows, s.padded_keys, top, f, s.p, s.p_high, total);
#endif
  for (int r = 0; r < rows; ++r) {
    const float* x = s.scores + r * s.padded_keys;
    const bool none = top[r] <= kUnseen;
    const float anchor = f.lse && !none ? log_sum(x, s.padded_keys, top[r], f) : top[r];
    if (!found) total[r] = code_row(f, s, r, x, top[r], anchor);
    out_scale[r] = f.normalize ? (total[r] > 0 ? s.v_scale / total[r] : 0.f) : s.v_scale * f.unit;
    if (head.cls && i + r == 0) emit_cls(head, s, x, top[r], f.inverse, none);
    if (head.columns && !none) {
      const float share = f.normalize ? 1 / total[r] : f.unit;
      for (int64_t j = 0; j < head.Nk; ++j) head.columns[j] += f.values[s.codes[j]] * share;
    }
    if (head.lse) {
      const double octaves = anchor / f.octave + (f.lse ? 0 : __builtin_log2((double)total[r] * f.unit));
      head.lse[i + r] = none ? -__builtin_inff() : (float)(octaves * 0.693147180559945);
    }
  }
}

// The same with bytes of an exponential. P is computed as 16-bit codes, whose sum is the denominator, and multiplied as
// bytes: what a byte drops is added to the code of the key 16 further on, so that no part of a long tail is lost.
INLINE void byte_rows(const Head& head, const Work& s, int64_t i, int rows, float* out_scale) {
  float top[kRows];
  for (int r = 0; r < rows; ++r) top[r] = row_maximum(s.scores + r * s.padded_keys, s.padded_keys);
  vi sum[kRows];
  for (int r = 0; r < rows; ++r) {
    const float* x = s.scores + r * s.padded_keys;
    Byte* p = (Byte*)(s.p + r * s.p_stride);
    sum[r] = {};
    if (top[r] == -__builtin_inff()) {  // every key masked: zeros
      __builtin_memset(p, 0, s.p_stride);
      continue;
    }
    vi total = {}, carry = splat((int32_t)128);
    for (int64_t j = 0; j < s.padded_keys; j += 16) {
      const vf prob = relative(x + j, top[r], kLog2E);
      const vi wide = to_int(prob * 65280.f);  // 255 * 256
      total = total + wide;
      const vi due = (s.weighted ? to_int(prob * load<vf>(s.v_ratio + j) * 65280.f) : wide) + carry;
      carry = due & 255;
      if constexpr (kVnni) store(p + j, to_bytes(due >> 8));
      else store(p + j, to_words(due >> 8));
    }
    sum[r] = total;
  }
  for (int r = 0; r < rows; ++r) {
    const float total = (float)hsum(sum[r]), *x = s.scores + r * s.padded_keys;
    const bool none = top[r] == -__builtin_inff();
    out_scale[r] = total != 0 ? s.v_scale / (total * 0.00390625f) : 0.f;
    if (head.cls && i + r == 0) emit_cls(head, s, x, top[r], kLog2E, none);
    for (int64_t j = 0; head.columns && !none && j < s.padded_keys; j += 16)
      store(s.row + j, to_float(to_int(relative(x + j, top[r], kLog2E) * 65280.f)) / total);
    for (int64_t j = 0; head.columns && !none && j < head.Nk; ++j) head.columns[j] += s.row[j];
    if (head.lse) head.lse[i + r] = none ? -__builtin_inff() : (float)(top[r] + __builtin_log(total / 65280.0));
  }
}

// P V of `rows` queries, scaled, as floats or codes.
template <class Dot>
INLINE void multiply_rows(const Attention& a, const Head& head, const Work& s, int64_t i, int rows, const float* scale) {
  float high_scale[kRows];
  for (int r = 0; r < rows; ++r) high_scale[r] = scale[r] * 256;
  alignas(64) float out_inv_scale[kTiles * kTile], unfinished[kRows * kTiles * kTile];
  const int64_t width = a.H * head.D;
  Tile t = {};
  t.a = s.p, t.a_stride = s.p_stride, t.b_stride = s.v_tile, t.groups = s.key_groups, t.next = s.k;
  t.x_scale = scale, t.x_scale_stride = 1, t.w_scale = s.ones, t.out_stride = kTiles * kTile;
  t.out_inv_scale = out_inv_scale, t.out_codes = codes_of(8, 0);
  for (int64_t n = 0; n < s.d_tiles; n += kTiles) {
    const int tiles = s.d_tiles - n < kTiles ? 1 : kTiles;
    const int64_t d = n * kTile, count = head.D - d < tiles * kTile ? head.D - d : tiles * kTile, at = head.out + i * width + d;
    const bool codes = head.out_scale != nullptr, direct = count == tiles * kTile && !(codes && s.floats);
    read_columns(out_inv_scale, head.out_scale, a.out_scale_stride, d, count);
    if (codes) invert(out_inv_scale);
    t.b = s.v + n * s.v_tile;
    Tile last = t;
    if (a.softmax.coded && a.softmax.high && !s.floats) {
      t.out = s.low;
      pick<Dot>(tiles, rows, false)(t);
      last.a = s.p_high, last.x_scale = high_scale, last.residual = s.low, last.residual_stride = kTiles * kTile;
    }
    last.out = unfinished;
    if (direct) last.out = codes ? (void*)((int8_t*)a.out + at) : (float*)a.out + at, last.out_stride = width;
    pick<Dot>(tiles, rows, direct && codes)(last);
    if (direct) continue;
    for (int r = 0; r < rows; ++r)
      for (int64_t c = 0; c < count; c += kTile) {
        const vf y = load<vf>(unfinished + r * kTiles * kTile + c);
        const int64_t to = at + r * width + c;
        if (codes) {
          store_16((int8_t*)a.out + to, to_code(y * load<vf>(out_inv_scale + c), t.out_codes), count - c);
        } else {
          store_16((float*)a.out + to, y, count - c);
        }
      }
  }
}

// Queries of a sequence without keys.
INLINE void empty_rows(const Attention& a, const Head& head, int64_t i, int rows) {
  const int64_t bytes = head.out_scale ? 1 : 4;
  for (int r = 0; r < rows; ++r) {
    __builtin_memset((char*)a.out + (head.out + (i + r) * a.H * head.D) * bytes, 0, head.D * bytes);
    if (head.lse) head.lse[i + r] = -__builtin_inff();
  }
}

void quant_attention(const Attention& a, int64_t q_blocks, int64_t item_begin, int64_t item_end) {
  int64_t packed = -1;
  Head head = {};
  Work s = {};
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t block = item % q_blocks;
    if (item / q_blocks != packed) {
      packed = item / q_blocks;
      head = head_of(a, packed / a.H, packed % a.H);
      if (head.Nk) s = work_of(a, head), pack_head(a, head, s);
    }
    if (a.columns) {
      const int64_t of = a.q_ends ? packed % a.H : packed, from = a.q_ends ? a.k_ends[packed / a.H] : 0;
      head.columns = a.columns + (of * q_blocks + block) * a.Nk + from;
    }
    const int64_t per_block = round_up((head.Nq + q_blocks - 1) / q_blocks, kRows), i0 = block * per_block;
    const int64_t i1 = i0 + per_block < head.Nq ? i0 + per_block : head.Nq;
    for (int64_t i = i0; i < i1; i += kRows) {
      const int rows = i1 - i < kRows ? (int)(i1 - i) : kRows;
      if (head.Nk == 0) {
        empty_rows(a, head, i, rows);
        continue;
      }
      float scale[kRows];
      score_rows(a, head, s, i, rows);
      a.softmax.coded ? coded_rows(a, head, s, i, rows, scale) : byte_rows(head, s, i, rows, scale);
      if (s.floats) {
        multiply_rows<DotF>(a, head, s, i, rows, scale);
      } else {
        multiply_rows<CodeDot>(a, head, s, i, rows, scale);
      }
    }
  }
}
