// Repacks K and V of a head for the tiles of tile.h, whose weights they are.
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
INLINE void pack_keys(const Head& a, const Work& s) {
  for (int64_t t = 0; t < s.key_tiles; ++t) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < a.D; d += 64) {
      const int64_t left = a.D - d;
      const __mmask64 bytes = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i rows[16];
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t n = t * kTile + i;
        rows[i] = n < a.Nk ? _mm512_maskz_loadu_epi8(bytes, a.k + n * a.k_stride + d) : _mm512_setzero_si512();
      }
      transpose(rows);
      uint8_t* dst = s.k + t * s.padded_d * kTile + d * kTile;
      for (int64_t g = 0; g < 16 && d + 4 * g < s.padded_d; ++g) {
        _mm512_storeu_si512(dst + 64 * g, rows[g]);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), rows[g]);
      }
    }
    _mm512_storeu_si512(s.k_offset + t * kTile, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7));  // -128 sum
  }
}

// V: 16 channels x groups of 4 keys, each channel's dword beside its neighbours'; 64 bytes a group.
INLINE void pack_values(const Head& a, const Work& s) {
  for (int64_t g = 0; g < s.key_groups; ++g)
    for (int64_t d = 0; d < a.D; d += 64) {
      const int64_t left = a.D - d;
      const __mmask64 bytes = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i r[4];
      for (int64_t i = 0; i < 4; ++i)
        r[i] = 4 * g + i < a.Nk ? _mm512_maskz_loadu_epi8(bytes, a.v + (4 * g + i) * a.v_stride + d) : _mm512_setzero_si512();
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
        _mm512_storeu_si512(s.v + ((d / kTile + i) * s.key_groups + g) * 64, tiles[i]);
    }
}
#else
// K: 16 keys x pairs of channels as int16, each key's dword beside its neighbours'; 64 bytes a pair.
INLINE void pack_keys(const Head& a, const Work& s) {
  for (int64_t n = 0; n < s.key_tiles * kTile; ++n) {
    int16_t* dst = (int16_t*)s.k + n / kTile * s.padded_d * kTile + 2 * (n % kTile);
    for (int64_t d = 0; d < s.padded_d; d += 2, dst += 32) {
      dst[0] = n < a.Nk && d < a.D ? a.k[n * a.k_stride + d] : 0;
      dst[1] = n < a.Nk && d + 1 < a.D ? a.k[n * a.k_stride + d + 1] : 0;
    }
    s.k_offset[n] = 0;
  }
}

// V: 16 channels x pairs of keys as int16.
INLINE void pack_values(const Head& a, const Work& s) {
  for (int64_t d = 0; d < a.D; d += kTile) {
    const int64_t count = a.D - d < kTile ? a.D - d : kTile;
    for (int64_t g = 0; g < s.key_groups; ++g) {
      const int64_t n = 2 * g;
      const vb lo = n < a.Nk ? load_16<vb>(a.v + n * a.v_stride + d, count) : vb{};
      const vb hi = n + 1 < a.Nk ? load_16<vb>(a.v + (n + 1) * a.v_stride + d, count) : vb{};
      store(s.v + (d / kTile * s.key_groups + g) * 64, (to_int(lo) & 0xffff) | (to_int(hi) << 16));
    }
  }
}
#endif

// V as floats: 16 channels x 1 key, times the key's scale where keys have their own.
INLINE void pack_float_values(const Head& a, const Work& s) {
  for (int64_t d = 0; d < a.D; d += kTile) {
    const int64_t count = a.D - d < kTile ? a.D - d : kTile;
    for (int64_t n = 0; n < a.Nk; ++n) {
      const int64_t at = n * a.v_stride + d;
      const vf v = a.v_float ? load_16<vf>(a.v_float + at, count) : to_float(to_int(load_16<vb>(a.v + at, count)));
      store((float*)s.v + (d / kTile * a.Nk + n) * kTile, s.v_scale_in_v ? v * a.v_scale[n * a.v_scale_stride] : v);
    }
  }
}
