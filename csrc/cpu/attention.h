// quant_attention: O = P V / sum(P), P = 2^((S - max S) log2 e) as bytes, S = scaled Q K^T + bias.
//
// One work item is a run of queries of one head. K and V are repacked for it once; then kRows queries at a time have
// their whole row of scores, codes and outputs in L1. No N x N tensor is ever in memory.
//
// P is computed as 16-bit codes, whose sum is the denominator, and multiplied as bytes: what a byte drops is added to the
// code of the key 16 further on, so that no part of a long tail is lost (reference/quant_attention.py).
struct Buffers {
  // Rewritten queries; K as weight tiles of 16 keys; V as tiles of 16 channels, 4 keys a group (int16: 2); codes of P.
  uint8_t *q, *k, *v, *p;
  int32_t* k_offset;
  float *k_scale, *v_ratio, *scores;
};

#if defined(USE_AVX512_VNNI)
// 16 rows of 16 dwords to 16 columns: dword i of row n becomes dword n of row i.
INLINE void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // r[4 i + c], 128-bit lane l: column 4 l + c of rows 4 i .. 4 i + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44), b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
    t[c] = _mm512_shuffle_i32x4(a, b, 0x88), t[4 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[8 + c] = _mm512_shuffle_i32x4(d, e, 0x88), t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// K: 16 keys x groups of 4 channels, each key's dword beside its neighbours'; 64 bytes a group.
INLINE void pack_keys(const Attention& a, const int8_t* k, const Buffers& s, int64_t key_tiles, int64_t padded_d) {
  for (int64_t t = 0; t < key_tiles; ++t) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < a.D; d += 64) {
      const int64_t left = a.D - d;
      const __mmask64 bytes = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i rows[16];
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t n = t * kTile + i;
        rows[i] = n < a.Nk ? _mm512_maskz_loadu_epi8(bytes, k + n * a.k_stride[2] + d) : _mm512_setzero_si512();
      }
      transpose(rows);
      uint8_t* dst = s.k + t * padded_d * kTile + d * kTile;
      for (int64_t g = 0; g < 16 && d + 4 * g < padded_d; ++g) {
        _mm512_storeu_si512(dst + 64 * g, rows[g]);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), rows[g]);
      }
    }
    _mm512_storeu_si512(s.k_offset + t * kTile, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7));  // -128 sum
  }
}

// V: 16 channels x groups of 4 keys, each channel's dword beside its neighbours'; 64 bytes a group.
INLINE void pack_values(const Attention& a, const int8_t* v, const Buffers& s, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t d = 0; d < a.D; d += 64) {
      const int64_t left = a.D - d;
      const __mmask64 bytes = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i r[4];
      for (int64_t i = 0; i < 4; ++i)
        r[i] = 4 * g + i < a.Nk ? _mm512_maskz_loadu_epi8(bytes, v + (4 * g + i) * a.v_stride[2] + d) : _mm512_setzero_si512();
      const __m512i lo01 = _mm512_unpacklo_epi8(r[0], r[1]), hi01 = _mm512_unpackhi_epi8(r[0], r[1]);
      const __m512i lo23 = _mm512_unpacklo_epi8(r[2], r[3]), hi23 = _mm512_unpackhi_epi8(r[2], r[3]);
      // u[i], 128-bit lane l: the four keys of channels 16 l + 4 i .. 16 l + 4 i + 3.
      const __m512i u[4] = {_mm512_unpacklo_epi16(lo01, lo23), _mm512_unpackhi_epi16(lo01, lo23),
                            _mm512_unpacklo_epi16(hi01, hi23), _mm512_unpackhi_epi16(hi01, hi23)};
      const __m512i even = _mm512_shuffle_i32x4(u[0], u[1], 0x44), odd = _mm512_shuffle_i32x4(u[2], u[3], 0x44);
      const __m512i even2 = _mm512_shuffle_i32x4(u[0], u[1], 0xee), odd2 = _mm512_shuffle_i32x4(u[2], u[3], 0xee);
      const __m512i tiles[4] = {_mm512_shuffle_i32x4(even, odd, 0x88), _mm512_shuffle_i32x4(even, odd, 0xdd),
                                _mm512_shuffle_i32x4(even2, odd2, 0x88), _mm512_shuffle_i32x4(even2, odd2, 0xdd)};
      for (int64_t i = 0; i < 4 && d + kTile * i < a.D; ++i)
        _mm512_storeu_si512(s.v + ((d / kTile + i) * groups + g) * 64, tiles[i]);
    }
}
#else
// K: 16 keys x pairs of channels as int16, each key's dword beside its neighbours'; 64 bytes a pair.
INLINE void pack_keys(const Attention& a, const int8_t* k, const Buffers& s, int64_t key_tiles, int64_t padded_d) {
  for (int64_t n = 0; n < key_tiles * kTile; ++n) {
    int16_t* dst = (int16_t*)s.k + n / kTile * padded_d * kTile + 2 * (n % kTile);
    for (int64_t d = 0; d < padded_d; d += 2, dst += 32) {
      dst[0] = n < a.Nk && d < a.D ? k[n * a.k_stride[2] + d] : 0;
      dst[1] = n < a.Nk && d + 1 < a.D ? k[n * a.k_stride[2] + d + 1] : 0;
    }
    s.k_offset[n] = 0;
  }
}

// V: 16 channels x pairs of keys as int16.
INLINE void pack_values(const Attention& a, const int8_t* v, const Buffers& s, int64_t groups) {
  for (int64_t d = 0; d < a.D; d += kTile) {
    const int64_t count = a.D - d < kTile ? a.D - d : kTile;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t n = 2 * g;
      const vb lo = n < a.Nk ? load_16<vb>(v + n * a.v_stride[2] + d, count) : vb{};
      const vb hi = n + 1 < a.Nk ? load_16<vb>(v + (n + 1) * a.v_stride[2] + d, count) : vb{};
      store(s.v + (d / kTile * groups + g) * 64, (to_int(lo) & 0xffff) | (to_int(hi) << 16));
    }
  }
}
#endif

// bias and key_bias added to one query's scores x, in place.
void add_biases(const Attention& a, float* x, int64_t b, int64_t h, int64_t i) {
  const float* bias = a.bias ? a.bias + b * a.bias_stride[0] + h * a.bias_stride[1] + i * a.bias_stride[2] : nullptr;
  const float* key_bias = a.key_bias ? a.key_bias + b * a.key_bias_stride[0] : nullptr;
  for (int64_t j = 0; bias && j < a.Nk; ++j) x[j] += bias[j * a.bias_stride[3]];
  for (int64_t j = 0; key_bias && j < a.Nk; ++j) x[j] += key_bias[j * a.key_bias_stride[1]];
}

// The scores of `rows` queries to codes, and the sums of the 16-bit ones. The keys beyond the last become -inf: not seen.
// The maxima of all rows come first: a row would wait for its own.
INLINE void softmax_codes(const Attention& a, const Buffers& s, int rows, int64_t padded_keys, bool weighted, int64_t* totals) {
  float top[kRows];
  for (int r = 0; r < rows; ++r) {
    float* x = s.scores + r * padded_keys;
    for (int64_t j = a.Nk; j < padded_keys; ++j) x[j] = -__builtin_inff();
    vf peak = splat(-__builtin_inff());
    for (int64_t j = 0; j < padded_keys; j += 16) peak = vmax(load<vf>(x + j), peak);
    top[r] = hmax(peak);
  }
  vi sum[kRows];
  for (int r = 0; r < rows; ++r) {
    const float* x = s.scores + r * padded_keys;
    uint8_t* p = s.p + r * padded_keys * (kVnni ? 1 : 2);
    sum[r] = {};
    if (top[r] == -__builtin_inff()) {  // every key masked: zeros
      __builtin_memset(p, 0, padded_keys * (kVnni ? 1 : 2));
      continue;
    }
    vi total = {}, carry = splat((int32_t)128);
    for (int64_t j = 0; j < padded_keys; j += 16) {
      const vf t = (load<vf>(x + j) - top[r]) * 1.44269504f;
      const vf prob = exp2_small(vmax(t, -100.f));
      const vi wide = to_int(prob * 65280.f);  // 255 * 256
      total = total + wide;
      const vi due = (weighted ? to_int(prob * load<vf>(s.v_ratio + j) * 65280.f) : wide) + carry;
      carry = due & 255;
      if constexpr (kVnni) store(p + j, to_bytes(due >> 8));
      else store((int16_t*)p + j, to_words(due >> 8));
    }
    sum[r] = total;
  }
  for (int r = 0; r < rows; ++r) totals[r] = hsum(sum[r]);
}

void quant_attention(const Attention& a, int64_t q_blocks, int64_t item_begin, int64_t item_end) {
  typedef typename std::conditional<kVnni, Dot8, Dot16>::type Dot;
  const int64_t key_tiles = round_up(a.Nk, kTile) / kTile, padded_keys = key_tiles * kTile;
  const int64_t d_tiles = round_up(a.D, kTile) / kTile, padded_d = round_up(a.D, 4), bytes = kVnni ? 1 : 2;
  const int64_t q_stride = round_up(padded_d * bytes, 64), k_tile = padded_d * kTile * bytes;
  const int64_t key_groups = (a.Nk * bytes + 3) / 4, v_tile = key_groups * 64, p_stride = padded_keys * bytes;
  Buffers s;
  uint8_t* next = (uint8_t*)scratch(
      64 * 10 + kRows * q_stride + key_tiles * k_tile + d_tiles * v_tile + padded_keys * 4 * (kRows + 3) + kRows * p_stride, 0);
  const auto take = [&next](int64_t size) { uint8_t* p = next; next += round_up(size, 64); return p; };
  s.q = take(kRows * q_stride);
  s.k = take(key_tiles * k_tile);
  s.v = take(d_tiles * v_tile);
  s.k_offset = (int32_t*)take(4 * padded_keys);
  s.k_scale = (float*)take(4 * padded_keys);
  s.v_ratio = (float*)take(4 * padded_keys);
  s.scores = (float*)take(4 * kRows * padded_keys);
  s.p = take(kRows * p_stride);
  alignas(64) float ones[kTiles * kTile], out_inv_scale[kTiles * kTile], unfinished[kRows * kTiles * kTile];
  for (float& x : ones) x = 1;

  const int64_t per_block = round_up((a.Nq + q_blocks - 1) / q_blocks, kRows);
  int64_t packed = -1;
  float v_scale = 1, row_scale[kRows];
  bool weighted = false;
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t head = item / q_blocks, b = head / a.H, h = head % a.H;
    const int64_t i0 = item % q_blocks * per_block, i1 = i0 + per_block < a.Nq ? i0 + per_block : a.Nq;
    if (i0 >= i1) continue;
    if (head != packed) {
      packed = head;
      pack_keys(a, a.k + b * a.k_stride[0] + h * a.k_stride[1], s, key_tiles, padded_d);
      pack_values(a, a.v + b * a.v_stride[0] + h * a.v_stride[1], s, key_groups);
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
    const float* q_scale = a.q_scale + b * a.q_scale_stride[0] + h * a.q_scale_stride[1];
    for (int64_t i = i0; i < i1; i += kRows) {
      const int rows = i1 - i < kRows ? (int)(i1 - i) : kRows;
      for (int r = 0; r < rows; ++r) {
        rewrite_row(q + (i + r) * a.q_stride[2], s.q + r * q_stride, a.D, padded_d);
        row_scale[r] = q_scale[(i + r) * a.q_scale_stride[2]] * a.softmax_scale;
      }
      Tile qk = {};
      qk.a = s.q, qk.a_stride = q_stride, qk.b_stride = k_tile, qk.groups = padded_d * bytes / 4, qk.next = s.v;
      qk.x_scale = row_scale, qk.x_scale_stride = 1, qk.out_stride = padded_keys;
      for (int64_t t = 0; t < key_tiles; t += kTiles) {
        qk.b = s.k + t * k_tile, qk.init = s.k_offset + t * kTile, qk.w_scale = s.k_scale + t * kTile;
        qk.out = s.scores + t * kTile;
        pick<Dot>(key_tiles - t < kTiles ? 1 : kTiles, rows, false)(qk);
      }
      for (int r = 0; (a.bias || a.key_bias) && r < rows; ++r) add_biases(a, s.scores + r * padded_keys, b, h, i + r);
      int64_t totals[kRows];
      softmax_codes(a, s, rows, padded_keys, weighted, totals);
      for (int r = 0; r < rows; ++r) row_scale[r] = totals[r] ? v_scale / ((float)totals[r] * 0.00390625f) : 0.f;
      Tile pv = {};
      pv.a = s.p, pv.a_stride = p_stride, pv.b_stride = v_tile, pv.groups = key_groups, pv.next = s.k;
      pv.x_scale = row_scale, pv.x_scale_stride = 1, pv.w_scale = ones;
      pv.out_inv_scale = out_inv_scale, pv.out_codes = codes_of(8, 0);
      for (int64_t t = 0; t < d_tiles; t += kTiles) {
        const int tiles = d_tiles - t < kTiles ? 1 : kTiles;
        const int64_t d = t * kTile, count = a.D - d < tiles * kTile ? a.D - d : tiles * kTile;
        const int64_t at = (b * a.Nq + i) * a.H * a.D + h * a.D + d;
        const bool direct = count == tiles * kTile;
        read_columns(out_inv_scale, a.out_scale, a.out_scale_stride, h * a.D + d, count);
        if (a.out_scale) invert(out_inv_scale);
        pv.b = s.v + t * v_tile;
        pv.out = unfinished, pv.out_stride = kTiles * kTile;
        if (direct) pv.out = a.out_scale ? (void*)((int8_t*)a.out + at) : (float*)a.out + at, pv.out_stride = a.H * a.D;
        pick<Dot>(tiles, rows, direct && a.out_scale)(pv);
        if (direct) continue;
        for (int r = 0; r < rows; ++r)
          for (int64_t n = 0; n < count; n += kTile) {
            const vf y = load<vf>(unfinished + r * kTiles * kTile + n);
            const int64_t to = at + r * a.H * a.D + n;
            if (a.out_scale) {
              const vb codes = to_code(y * load<vf>(out_inv_scale + n), pv.out_codes);
              store_16((int8_t*)a.out + to, codes, count - n);
            } else {
              store_16((float*)a.out + to, y, count - n);
            }
          }
      }
    }
  }
}
