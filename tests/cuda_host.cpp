// What the CUDA kernels share with the host, for tests/test_cuda_host.py to call: csrc/cuda compiled by the C++ compiler.
#include <cstddef>
#include <string>

#include "../csrc/cuda/fragments.cuh"
#include "../csrc/cuda/lowbit_linear.h"
#include "../csrc/cuda/scalar.cuh"
#include "../csrc/cuda/sparse24_linear.h"

namespace pyvit_accel {

// As wrong as the instruction may be: off by so many ulp, but where the mantissa is all ones. That it is the nearest there is
// known from div.rn.f32, which begins with it too and is right.
static int32_t reciprocal_error = 0;
float reciprocal(float b) { return float_of(bits_of(1.0f / b) + (~bits_of(b) & 0x7FFFFF ? reciprocal_error : 0)); }

}  // namespace pyvit_accel

using namespace pyvit_accel;

extern "C" {

// "struct size, field offset size, ..." of every structure.
const char* layouts() {
  static std::string text;
  text.clear();
#define STRUCT(S) text += "\n" #S " " + std::to_string(sizeof(S));
#define FIELD(S, F) text += "," #F " " + std::to_string(offsetof(S, F)) + " " + std::to_string(sizeof(S::F));
  STRUCT(TensorMap)
  FIELD(TensorMap, base) FIELD(TensorMap, dims) FIELD(TensorMap, strides) FIELD(TensorMap, box) FIELD(TensorMap, rank)
  FIELD(TensorMap, swizzle) FIELD(TensorMap, element_bytes) FIELD(TensorMap, offset)
  STRUCT(Launch)
  FIELD(Launch, kernel) FIELD(Launch, function) FIELD(Launch, grid) FIELD(Launch, block) FIELD(Launch, cluster)
  FIELD(Launch, shared_bytes) FIELD(Launch, param_bytes) FIELD(Launch, num_maps) FIELD(Launch, dependent)
  FIELD(Launch, maps) FIELD(Launch, params)
  STRUCT(Epilogue)
  FIELD(Epilogue, x_scale) FIELD(Epilogue, w_scale) FIELD(Epilogue, bias) FIELD(Epilogue, layer_scale)
  FIELD(Epilogue, residual) FIELD(Epilogue, out_scale) FIELD(Epilogue, y) FIELD(Epilogue, w_packed)
  FIELD(Epilogue, w_stride) FIELD(Epilogue, residual_stride) FIELD(Epilogue, M) FIELD(Epilogue, N)
  FIELD(Epilogue, x_zero_point) FIELD(Epilogue, out_zero_point) FIELD(Epilogue, out_bits) FIELD(Epilogue, activation)
  FIELD(Epilogue, x_scale_per_row) FIELD(Epilogue, out_scale_per_column) FIELD(Epilogue, vectors)
  STRUCT(LowbitLinear)
  FIELD(LowbitLinear, x) FIELD(LowbitLinear, x_stride) FIELD(LowbitLinear, K) FIELD(LowbitLinear, w_bits)
  FIELD(LowbitLinear, epilogue)
  STRUCT(Sparse24Linear)
  FIELD(Sparse24Linear, x) FIELD(Sparse24Linear, x_stride) FIELD(Sparse24Linear, values) FIELD(Sparse24Linear, meta)
  FIELD(Sparse24Linear, rows) FIELD(Sparse24Linear, K) FIELD(Sparse24Linear, elements) FIELD(Sparse24Linear, epilogue)
  return text.c_str();
}

void set_reciprocal_error(int ulp) { reciprocal_error = ulp; }

// How many of a / b differ from the nearest float, b through all mantissas from `first`, a power of two.
int64_t wrong_divisions(float a, float first) {
  int64_t wrong = 0;
  for (int32_t i = 0; i < 1 << 23; ++i) {
    const float b = float_of(bits_of(first) + i);
    wrong += divide(a, b, reciprocal(b)) != a / b;
  }
  return wrong;
}
int64_t wrong_quotients(const float* a, const float* b, int64_t n) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) wrong += divide(a[i], b[i], reciprocal(b[i])) != a[i] / b[i];
  return wrong;
}

void apply(const char* function, const float* x, float* y, int64_t n) {
  const std::string name = function;
  for (int64_t i = 0; i < n; ++i) {
    if (name == "exp2") y[i] = pyvit_accel::exp2(x[i]);
    if (name == "gelu") y[i] = gelu(x[i]);
    if (name == "gelu_tanh") y[i] = gelu_tanh(x[i]);
    if (name == "quick_gelu") y[i] = quick_gelu(x[i]);
  }
}

void to_codes(const float* y, float inv_scale, int zero_point, int bits, int8_t* q, int64_t n) {
  const float lowest = lowest_code(bits, zero_point), highest = highest_code(bits, zero_point);
  for (int64_t i = 0; i < n; ++i) q[i] = static_cast<int8_t>(to_code(y[i], inv_scale, zero_point, lowest, highest));
}

uint32_t swizzle(uint32_t at) { return swizzle128(at); }
uint32_t ahead(uint32_t from, uint32_t step) { return swizzled_ahead(from, step); }
int feature_of(int lane) { return lane_feature(lane); }
int token_of(int lane) { return lane_token(lane); }
uint32_t weight_at(int lane, uint32_t tile_bytes) { return weight_offset(lane, tile_bytes); }
void tile_at(uint32_t block, uint32_t group, uint32_t tiles_m, uint32_t tiles_n, uint32_t* at) {
  const TileIndex tile = tile_index(block, group, tiles_m, tiles_n);
  at[0] = tile.m, at[1] = tile.n;
}

// The registers a[tile of A][r] of a lane, from a pair of packed tiles that lie tile_bytes apart.
void registers_of(int w_bits, const uint32_t* words, uint32_t tile_bytes, int lane, uint32_t (*to)[4]) {
  uint32_t low[4], high[4], a[2][4];
  const uint32_t* at = words + weight_offset(lane, tile_bytes) / 4;
  for (int i = 0; i < 4; ++i) low[i] = at[i], high[i] = w_bits == 8 ? at[64 + i] : 0;
  w_bits == 8 ? unpack8(low, high, a) : unpack4(low, a);
  for (int tile = 0; tile < 2; ++tile)
    for (int r = 0; r < 4; ++r) to[tile][r] = a[tile][r];
}

}  // extern "C"
