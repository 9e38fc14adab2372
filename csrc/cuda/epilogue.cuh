// What follows the integer sums of a linear layer, as pyvit_accel/reference/lowbit_linear.py, bit for bit:
//
//     y = (sum - x_zero_point w_sum) * (x_scale * w_scale) + bias, activation, * layer_scale, + residual
//     q = clip(rint(y * (1 / out_scale)) + out_zero_point)
//
// A lane holds four consecutive features of two consecutive tokens (fragments.cuh). What belongs to the features is loaded
// once, features(); finish() takes the sums of two tokens. Branches depend on the launch alone, so a warp takes one side.
#pragma once
#include "fragments.cuh"
#include "lowbit_linear.h"
#include "scalar.cuh"

namespace pyvit_accel {

enum Activation { NONE, GELU, GELU_TANH, QUICK_GELU };

// What belongs to four features n .. n + 3.
struct Features {
  float w_scale[4], bias[4], layer_scale[4], inv_scale[4];
  int32_t zero[4];  // x_zero_point w_sum
};

// p[n .. n + 3], 0 beyond N. vectors: N, n and p allow 16 bytes at once.
DEVICE void load4(const float* p, int n, int N, bool vectors, float (&to)[4]) {
  if (vectors) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(p + n));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = n + i < N ? __ldg(p + n + i) : 0.0f;
  }
}

// n: a multiple of 4. Beyond N nothing is read.
DEVICE Features load_features(const Epilogue& e, int n) {
  Features f = {};
  if (n >= e.N) return f;
  load4(e.w_scale, n, e.N, e.vectors, f.w_scale);
  if (e.bias) load4(e.bias, n, e.N, e.vectors, f.bias);
  if (e.layer_scale) load4(e.layer_scale, n, e.N, e.vectors, f.layer_scale);
  if (e.x_zero_point) {
    const uint8_t* header = e.w_packed + n / TILE * e.w_stride;
    const int4 sums = __ldg(reinterpret_cast<const int4*>(header) + n % TILE / 4);
    f.zero[0] = e.x_zero_point * sums.x, f.zero[1] = e.x_zero_point * sums.y;
    f.zero[2] = e.x_zero_point * sums.z, f.zero[3] = e.x_zero_point * sums.w;
  }
  if (e.out_scale) {
    if (e.out_scale_per_column) {
      load4(e.out_scale, n, e.N, e.vectors, f.inv_scale);
#pragma unroll
      for (int i = 0; i < 4; ++i) f.inv_scale[i] = divide(1.0f, f.inv_scale[i]);
    } else {
      const float inv_scale = divide(1.0f, __ldg(e.out_scale));
#pragma unroll
      for (int i = 0; i < 4; ++i) f.inv_scale[i] = inv_scale;
    }
  }
  return f;
}

template <class Function>
DEVICE void each(float (&y)[2][4], Function function) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[j][i] = function(y[j][i]);
}

// y of features n .. n + 3 (f is theirs) of tokens m, m + 1 from sums[token][feature]; beyond M and N nothing is touched.
DEVICE void finish(const Epilogue& e, const Features& f, int m, int n, const int32_t (&sums)[2][4]) {
  float y[2][4];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float x_scale = __ldg(e.x_scale);
    if (e.x_scale_per_row) x_scale = m + j < e.M ? __ldg(e.x_scale + m + j) : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) y[j][i] = static_cast<float>(sums[j][i] - f.zero[i]) * (x_scale * f.w_scale[i]);
  }
  if (e.bias) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] = y[j][i] + f.bias[i];
  }
  if (e.activation == GELU) each(y, [](float v) { return gelu(v); });
  if (e.activation == GELU_TANH) each(y, [](float v) { return gelu_tanh(v); });
  if (e.activation == QUICK_GELU) each(y, [](float v) { return quick_gelu(v); });
  if (e.layer_scale) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] = y[j][i] * f.layer_scale[i];
  }
  if (n >= e.N) return;
  if (e.residual) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (m + j >= e.M) continue;
      float residual[4];
      load4(e.residual + (m + j) * e.residual_stride, n, e.N, e.vectors, residual);
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] = y[j][i] + residual[i];
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (m + j >= e.M) continue;
    const int64_t at = static_cast<int64_t>(m + j) * e.N + n;
    if (e.out_scale == nullptr) {
      float* to = static_cast<float*>(e.y) + at;
      if (e.vectors) {
        *reinterpret_cast<float4*>(to) = make_float4(y[j][0], y[j][1], y[j][2], y[j][3]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n + i < e.N) to[i] = y[j][i];
      }
    } else {
      const float lowest = lowest_code(e.out_bits, e.out_zero_point), highest = highest_code(e.out_bits, e.out_zero_point);
      int32_t q[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = to_code(y[j][i], f.inv_scale[i], e.out_zero_point, lowest, highest);
      int8_t* to = static_cast<int8_t*>(e.y) + at;
      if (e.vectors) {
        *reinterpret_cast<uint32_t*>(to) = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n + i < e.N) to[i] = static_cast<int8_t>(q[i]);
      }
    }
  }
}

}  // namespace pyvit_accel
