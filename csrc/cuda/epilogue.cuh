// What follows the sums of a linear layer, as pyvit_accel/reference/lowbit_linear.py, bit for bit:
//
//     y = (sum - x_zero_point w_sum) * (x_scale * w_scale) + bias, activation, * layer_scale, + residual
//     q = clip(rint(y * (1 / out_scale)) + out_zero_point)
//
// Sums of products of 16-bit floats are float32 and have no scales of x and w: y = sum + bias and so on, rounded once.
//
// A lane holds four consecutive features of two consecutive tokens (fragments.cuh). What belongs to the features is loaded
// once, load_features(); finish() takes the sums of two tokens, or of two in each of a few tiles of 8, whose loads then are under
// way together. Branches depend on the launch alone, so a warp takes one side.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fragments.cuh"
#include "linear.h"
#include "scalar.cuh"

namespace pyvit_accel {

enum Activation { NONE, GELU, GELU_TANH, QUICK_GELU };

// What belongs to four features n .. n + 3.
struct Features {
  float scale[4];  // w_scale, times x_scale if there is but one
  float bias[4], layer_scale[4], inv_scale[4];
  int32_t zero[4];  // x_zero_point w_sum
};

// p[n .. n + 3], 0 beyond N. vectors: N, n and p allow 16 bytes at once. No __ldg: the launch before may still write p.
DEVICE void load4(const float* p, int n, int N, bool vectors, float (&to)[4]) {
  if (vectors) {
    const float4 v = *reinterpret_cast<const float4*>(p + n);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = n + i < N ? p[n + i] : 0.0f;
  }
}

// n: a multiple of 4. Beyond N nothing is read. SCALED: the sums are integers.
template <bool SCALED = true>
DEVICE Features load_features(const Epilogue& e, int n) {
  Features f = {};
  if (n >= e.N) return f;
  if constexpr (SCALED) {
    load4(e.w_scale, n, e.N, e.vectors, f.scale);
    if (!e.x_scale_per_row) {
      const float x_scale = *e.x_scale;
#pragma unroll
      for (int i = 0; i < 4; ++i) f.scale[i] = x_scale * f.scale[i];
    }
  }
  if (e.bias) load4(e.bias, n, e.N, e.vectors, f.bias);
  if (e.layer_scale) load4(e.layer_scale, n, e.N, e.vectors, f.layer_scale);
  if (SCALED && e.x_zero_point) {
    const uint8_t* header = e.w_packed + n / TILE * e.w_stride;
    const int4 sums = reinterpret_cast<const int4*>(header)[n % TILE / 4];
    f.zero[0] = e.x_zero_point * sums.x, f.zero[1] = e.x_zero_point * sums.y;
    f.zero[2] = e.x_zero_point * sums.z, f.zero[3] = e.x_zero_point * sums.w;
  }
  if (e.out_scale) {
    if (e.out_scale_per_column) {
      load4(e.out_scale, n, e.N, e.vectors, f.inv_scale);
#pragma unroll
      for (int i = 0; i < 4; ++i) f.inv_scale[i] = divide(1.0f, f.inv_scale[i]);
    } else {
      const float inv_scale = divide(1.0f, *e.out_scale);
#pragma unroll
      for (int i = 0; i < 4; ++i) f.inv_scale[i] = inv_scale;
    }
  }
  return f;
}

template <int TOKENS, class Function>
DEVICE void each(float (&y)[TOKENS][4], Function function) {
#pragma unroll
  for (int j = 0; j < TOKENS; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[j][i] = function(y[j][i]);
}

// p[n .. n + 3] = values, as load4. Codes are stored as bytes.
DEVICE void store4(float* p, int n, int N, bool vectors, const float (&values)[4]) {
  if (vectors) {
    *reinterpret_cast<float4*>(p + n) = make_float4(values[0], values[1], values[2], values[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < N) p[n + i] = values[i];
  }
}
template <class Half>  // __half | __nv_bfloat16
DEVICE void store4(Half* p, int n, int N, bool vectors, const float (&values)[4]) {
  Half rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded[i] = static_cast<Half>(values[i]);
  if (vectors) {
    const auto bits = [&](int i) { return static_cast<uint32_t>(__builtin_bit_cast(uint16_t, rounded[i])); };
    *reinterpret_cast<uint2*>(p + n) = make_uint2(bits(0) | bits(1) << 16, bits(2) | bits(3) << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < N) p[n + i] = rounded[i];
  }
}
DEVICE void store4(int8_t* p, int n, int N, bool vectors, const int32_t (&codes)[4]) {
  if (vectors) {
    const uint32_t low = __byte_perm(codes[0], codes[1], 0x0040), high = __byte_perm(codes[2], codes[3], 0x0040);
    *reinterpret_cast<uint32_t*>(p + n) = __byte_perm(low, high, 0x5410);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < N) p[n + i] = static_cast<int8_t>(codes[i]);
  }
}

// What follows the scales: y of features n .. n + 3 (f is theirs) of tokens m, m + 1, m + 8, m + 9, .. from y[token][feature],
// stored as Output or as codes; beyond M nothing is touched, but the last token's residual is read for those beyond M. n < N.
template <class Output, int TOKENS>
DEVICE void complete(const Epilogue& e, const Features& f, int m, int n, float (&y)[TOKENS][4]) {
  const auto token = [m](int j) { return m + j / 2 * 8 + j % 2; };
  const auto readable = [&](int j) { return min(token(j), e.M - 1); };
  if (e.bias) {
#pragma unroll
    for (int j = 0; j < TOKENS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] = y[j][i] + f.bias[i];
  }
  if (e.activation == GELU) each(y, [](float v) { return gelu(v); });
  if (e.activation == GELU_TANH) each(y, [](float v) { return gelu_tanh(v); });
  if (e.activation == QUICK_GELU) each(y, [](float v) { return quick_gelu(v); });
  if (e.layer_scale) {
#pragma unroll
    for (int j = 0; j < TOKENS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] = y[j][i] * f.layer_scale[i];
  }
  if (e.residual) {
    float residual[TOKENS][4];
#pragma unroll
    for (int j = 0; j < TOKENS; ++j)
      load4(e.residual + readable(j) * e.residual_stride, n, e.N, e.vectors, residual[j]);
#pragma unroll
    for (int j = 0; j < TOKENS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] = y[j][i] + residual[j][i];
  }
  if (e.out_scale == nullptr) {
    Output* to = static_cast<Output*>(e.y);
#pragma unroll
    for (int j = 0; j < TOKENS; ++j)
      if (token(j) < e.M) store4(to + static_cast<int64_t>(token(j)) * e.N, n, e.N, e.vectors, y[j]);
  } else {
    const float lowest = lowest_code(e.out_bits, e.out_zero_point), highest = highest_code(e.out_bits, e.out_zero_point);
    int8_t* to = static_cast<int8_t*>(e.y);
#pragma unroll
    for (int j = 0; j < TOKENS; ++j) {
      int32_t q[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = to_code(y[j][i], f.inv_scale[i], e.out_zero_point, lowest, highest);
      if (token(j) < e.M) store4(to + static_cast<int64_t>(token(j)) * e.N, n, e.N, e.vectors, q);
    }
  }
}

// y from sums[token][feature], integers with scales, of which the last token's is read for those beyond M. Beyond N nothing is
// touched.
template <int TOKENS>
DEVICE void finish(const Epilogue& e, const Features& f, int m, int n, const int32_t (&sums)[TOKENS][4]) {
  if (n >= e.N) return;
  float y[TOKENS][4];
#pragma unroll
  for (int j = 0; j < TOKENS; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[j][i] = static_cast<float>(sums[j][i] - f.zero[i]);
  if (e.x_scale_per_row) {
#pragma unroll
    for (int j = 0; j < TOKENS; ++j) {
      const float x_scale = *(e.x_scale + min(m + j / 2 * 8 + j % 2, e.M - 1));
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] = y[j][i] * (x_scale * f.scale[i]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < TOKENS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] = y[j][i] * f.scale[i];
  }
  complete<float>(e, f, m, n, y);
}

}  // namespace pyvit_accel
