// quant_attention: O = P V / sum(P), P = 2^((S - max S) log2 e) as 15-bit integer codes, S = scaled Q K^T + bias.
//
// One work item is a run of queries of one head. K and V are repacked for it once; then kRows queries at a time have
// their whole row of scores, codes and outputs in L1. No N x N tensor is ever in memory.
//
// P is 15 bits because int16 pairs (dot16) take V's int8 exactly: 2^-16 of the row's largest probability is near lossless,
// and the sum over up to 512 keys cannot overflow int32; beyond that p_max shrinks (quant_attention.cpp).
struct Buffers {
  uint8_t *q, *k, *v;  // rewritten queries; K as weight tiles of 16 keys; V as int16 pairs of keys, tiles of 16 channels
  int32_t *k_offset, *scores, *out;
  int16_t* p;
  float *k_scale, *v_ratio;
};

// K: 16 keys x groups of 4 channels, each key's dword beside its neighbours'. Without VNNI each dword is two int16 groups.
INLINE void pack_keys(const Attention& a, const int8_t* k, const Buffers& s, int64_t key_tiles, int64_t padded_d) {
  const int64_t bytes = kVnni ? 1 : 2, tile_size = padded_d * kTile * bytes;
  for (int64_t t = 0; t < key_tiles; ++t) {
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t n = t * kTile + i;
      int32_t sum = 0;
      if constexpr (kVnni) {
        uint8_t* dst = s.k + t * tile_size + 4 * i;
        const int8_t* src = k + n * a.k_stride[2];
        for (int64_t d = 0; d < padded_d; d += 4, dst += 64) {
          int8_t four[4] = {};
          if (n < a.Nk && d + 4 <= a.D) __builtin_memcpy(four, src + d, 4);
          else if (n < a.Nk) __builtin_memcpy(four, src + d, a.D - d);
          __builtin_memcpy(dst, four, 4);
          sum += four[0] + four[1] + four[2] + four[3];
        }
      } else {
        int16_t* dst = (int16_t*)(s.k + t * tile_size) + 2 * i;
        for (int64_t d = 0; d < padded_d; d += 2, dst += 32) {
          dst[0] = n < a.Nk && d < a.D ? k[n * a.k_stride[2] + d] : 0;
          dst[1] = n < a.Nk && d + 1 < a.D ? k[n * a.k_stride[2] + d + 1] : 0;
        }
      }
      s.k_offset[n] = kVnni ? -128 * sum : 0;
    }
  }
}

INLINE void pack_values(const Attention& a, const int8_t* v, const Buffers& s, int64_t pairs, int64_t d_tiles) {
  for (int64_t t = 0; t < d_tiles; ++t) {
    const int64_t d = t * kTile, n_d = a.D - d < kTile ? a.D - d : kTile;
    for (int64_t j = 0; j < pairs; ++j) {
      const int64_t n = 2 * j;
      const vb lo = n < a.Nk ? load_16<vb>(v + n * a.v_stride[2] + d, n_d) : vb{};
      const vb hi = n + 1 < a.Nk ? load_16<vb>(v + (n + 1) * a.v_stride[2] + d, n_d) : vb{};
      store(s.v + (t * pairs + j) * 64, (to_int(lo) & 0xffff) | (to_int(hi) << 16));
    }
  }
}

// One query's scores to codes; returns the sum of the codes.
INLINE int32_t softmax_codes(const Attention& a, const Buffers& s, int64_t b, int64_t h, int64_t i, const int32_t* acc,
                             int16_t* p, int64_t padded_keys, bool weighted) {
  const float q_scale = a.q_scale[b * a.q_scale_stride[0] + h * a.q_scale_stride[1] + i * a.q_scale_stride[2]] * a.softmax_scale;
  const float* bias = a.bias ? a.bias + b * a.bias_stride[0] + h * a.bias_stride[1] + i * a.bias_stride[2] : nullptr;
  const float* key_bias = a.key_bias ? a.key_bias + b * a.key_bias_stride[0] : nullptr;
  float* x = (float*)acc;
  vf peak = splat(-__builtin_inff());
  for (int64_t j = 0; j < padded_keys; j += 16) {
    const int64_t n = a.Nk - j < 16 ? a.Nk - j : 16;
    vf y = to_float(load<vi>(acc + j)) * (q_scale * load<vf>(s.k_scale + j));
    if (bias) {
      if (a.bias_stride[3] == 1) {
        y = y + load_16<vf>(bias + j, n);
      } else {
        float strided[16] = {};
        for (int64_t l = 0; l < n; ++l) strided[l] = bias[(j + l) * a.bias_stride[3]];
        y = y + load<vf>(strided);
      }
    }
    if (key_bias) {
      float strided[16] = {};
      for (int64_t l = 0; l < n; ++l) strided[l] = key_bias[(j + l) * a.key_bias_stride[1]];
      y = y + load<vf>(strided);
    }
    store(x + j, y);
    if (n < 16) {  // the keys beyond the last are not seen
      for (int64_t l = n; l < 16; ++l) x[j + l] = -__builtin_inff();
      y = load<vf>(x + j);
    }
    peak = vmax(y, peak);
  }
  const float top = hmax(peak);
  if (top == -__builtin_inff()) {  // every key masked: zeros
    __builtin_memset(p, 0, padded_keys * sizeof(int16_t));
    return 0;
  }
  const float p_max = (float)a.p_max;
  vi sum = {};
  for (int64_t j = 0; j < padded_keys; j += 16) {
    const vf t = (load<vf>(x + j) - top) * 1.44269504f;
    const vf prob = exp2_small(vmax(t, -100.f));
    const vi code = to_int(rint_small(prob * p_max));
    sum = sum + code;
    const vi w = weighted ? to_int(rint_small(prob * load<vf>(s.v_ratio + j) * p_max)) : code;
    store(p + j, to_words(w));
  }
  return hsum(sum);
}

void quant_attention(const Attention& a, int64_t q_blocks, int64_t item_begin, int64_t item_end) {
  const int64_t key_tiles = round_up(a.Nk, kTile) / kTile, padded_keys = key_tiles * kTile, pairs = padded_keys / 2;
  const int64_t d_tiles = round_up(a.D, kTile) / kTile, padded_d = round_up(a.D, 4), bytes = kVnni ? 1 : 2;
  const int64_t q_stride = round_up(padded_d * bytes, 64), k_tile = padded_d * kTile * bytes, v_tile = pairs * 64;
  const int64_t out_width = d_tiles * kTile;
  Buffers s;
  uint8_t* next = (uint8_t*)scratch(
      64 * 10 + kRows * q_stride + key_tiles * k_tile + d_tiles * v_tile +
          padded_keys * (4 * (kRows + 3) + 2 * kRows) + 4 * kRows * out_width, 0);
  const auto take = [&next](int64_t size) { uint8_t* p = next; next += round_up(size, 64); return p; };
  s.q = take(kRows * q_stride);
  s.k = take(key_tiles * k_tile);
  s.v = take(d_tiles * v_tile);
  s.k_offset = (int32_t*)take(4 * padded_keys);
  s.k_scale = (float*)take(4 * padded_keys);
  s.v_ratio = (float*)take(4 * padded_keys);
  s.scores = (int32_t*)take(4 * kRows * padded_keys);
  s.p = (int16_t*)take(2 * kRows * padded_keys);
  s.out = (int32_t*)take(4 * kRows * out_width);

  const int64_t per_block = round_up((a.Nq + q_blocks - 1) / q_blocks, kRows);
  int64_t packed = -1;
  float v_scale = 1;
  bool weighted = false;
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t head = item / q_blocks, b = head / a.H, h = head % a.H;
    const int64_t i0 = item % q_blocks * per_block, i1 = i0 + per_block < a.Nq ? i0 + per_block : a.Nq;
    if (i0 >= i1) continue;
    if (head != packed) {
      packed = head;
      pack_keys(a, a.k + b * a.k_stride[0] + h * a.k_stride[1], s, key_tiles, padded_d);
      pack_values(a, a.v + b * a.v_stride[0] + h * a.v_stride[1], s, pairs, d_tiles);
      const float* ks = a.k_scale + b * a.k_scale_stride[0] + h * a.k_scale_stride[1];
      const float* vs_ = a.v_scale + b * a.v_scale_stride[0] + h * a.v_scale_stride[1];
      weighted = a.v_scale_stride[2] != 0;  // a scale per key goes into P, relative to the largest
      v_scale = vs_[0];
      for (int64_t n = 1; weighted && n < a.Nk; ++n) v_scale = vs_[n * a.v_scale_stride[2]] > v_scale ? vs_[n * a.v_scale_stride[2]] : v_scale;
      for (int64_t n = 0; n < padded_keys; ++n) {
        s.k_scale[n] = n < a.Nk ? ks[n * a.k_scale_stride[2]] : 0.f;
        s.v_ratio[n] = weighted && n < a.Nk ? vs_[n * a.v_scale_stride[2]] / (v_scale > 1e-30f ? v_scale : 1e-30f) : 1.f;
      }
    }
    const int8_t* q = a.q + b * a.q_stride[0] + h * a.q_stride[1];
    for (int64_t i = i0; i < i1; i += kRows) {
      const int rows = i1 - i < kRows ? (int)(i1 - i) : kRows;
      for (int r = 0; r < rows; ++r) rewrite_row(q + (i + r) * a.q_stride[2], s.q + r * q_stride, a.D, padded_d);
      typedef typename std::conditional<kVnni, Dot8, Dot16>::type DotQK;
      const auto qk = pick<DotQK, kTiles>(rows);
      const auto qk_last = pick<DotQK, 1>(rows);
      for (int64_t t = 0; t < key_tiles; t += kTiles)
        (key_tiles - t >= kTiles ? qk : qk_last)(s.q, q_stride, s.k + t * k_tile, k_tile, padded_d * bytes / 4,
                                                 s.k_offset + t * kTile, s.scores + t * kTile, padded_keys);
      int32_t total[kRows];
      for (int r = 0; r < rows; ++r)
        total[r] = softmax_codes(a, s, b, h, i + r, s.scores + r * padded_keys, s.p + r * padded_keys, padded_keys, weighted);
      const auto pv = pick<Dot16, kTiles>(rows);
      const auto pv_last = pick<Dot16, 1>(rows);
      for (int64_t t = 0; t < d_tiles; t += kTiles)
        (d_tiles - t >= kTiles ? pv : pv_last)((const uint8_t*)s.p, 2 * padded_keys, s.v + t * v_tile, v_tile, pairs, nullptr,
                                               s.out + t * kTile, out_width);
      for (int r = 0; r < rows; ++r) {
        const float scale = total[r] ? v_scale / (float)total[r] : 0.f;
        const int64_t at = (b * a.Nq + i + r) * a.H * a.D + h * a.D;
        for (int64_t d = 0; d < a.D; d += 16) {
          const int64_t n = a.D - d < 16 ? a.D - d : 16;
          const vf y = to_float(load<vi>(s.out + r * out_width + d)) * scale;
          if (a.out_scale) {
            const float* os = a.out_scale + (h * a.D + d) * a.out_scale_stride;
            const vb code = to_code(y * (1.f / (a.out_scale_stride ? load_16<vf>(os, n) : splat(*os))), 0.f);
            store_16((int8_t*)a.out + at + d, code, n);
          } else {
            store_16((float*)a.out + at + d, y, n);
          }
        }
      }
    }
  }
}
