// lowbit_linear: the problem, and the plan that chooses a kernel for it. Plain C structures, which pyvit_accel/cuda
// mirrors with ctypes.
#pragma once
#include <stdint.h>

#include "launch.h"

extern "C" {

// What follows the sums, and where y goes. Pointers to device memory; null where there is none.
struct Epilogue {
  const float* x_scale;      // (1,) | (M,)
  const float* w_scale;      // (N,)
  const float* bias;         // (N,)
  const float* layer_scale;  // (N,)
  const float* residual;     // (M, N)
  const float* out_scale;    // (1,) | (N,); null: y is float32, else codes
  void* y;                   // (M, N), contiguous
  const uint8_t* w_packed;   // (ceil(N / 16), w_stride); its headers are the sums of the codes
  int64_t w_stride;          // bytes
  int64_t residual_stride;   // elements
  int32_t M, N;              // tokens, features
  int32_t x_zero_point, out_zero_point;
  int32_t out_bits;
  int32_t activation;  // index into none, gelu, gelu_tanh, quick_gelu
  bool x_scale_per_row, out_scale_per_column;
  bool vectors;  // four features at a time may be loaded and stored; the plan decides it
};

// y = epilogue(x w^T). x (M, x_stride) int8, of K columns; address, x_stride and K rounded up are multiples of 16, and
// what lies between K and that is zero.
struct LowbitLinear {
  const int8_t* x;
  int64_t x_stride;  // bytes
  int32_t K;
  int32_t w_bits;  // 4 | 8
  Epilogue epilogue;
};

// The name of kernel `config` of lowbit_linear, or null beyond the last.
EXPORT const char* pyvit_accel_lowbit_linear_config(int config);
// capability: 10 * major + minor. config: -1 chooses.
EXPORT int pyvit_accel_lowbit_linear_plan(const LowbitLinear* problem, int capability, int sm_count, int config, Launch* launch);
EXPORT int pyvit_accel_lowbit_linear(const LowbitLinear* problem, int capability, int sm_count, int config, void* stream);

}  // extern "C"

namespace pyvit_accel {

// A kernel of lowbit_linear, and what the plan weighs.
struct LowbitLinearConfig {
  const char* kernel;    // its name in the fat binary
  const void* function;  // of the kernel, on the host
  int32_t capability;    // 80: this or newer; 90: this alone
  int32_t features, tokens, w_bits;  // of a block's tile
  int32_t threads, shared_bytes, blocks_per_sm;
  int32_t macs_per_clock;  // of an SM, int8 products that its instruction makes
  // Fills grid, parameters, tensor maps, and cluster where it is not 1; the rest of launch is. The problem is valid.
  void (*prepare)(const LowbitLinear& problem, const LowbitLinearConfig& config, int sm_count, Launch& launch);
  int32_t cluster = 1;  // blocks, of neighbouring tokens, that get their weights in one copy from L2
};

struct LowbitLinearConfigs {
  const LowbitLinearConfig* of;
  int count;
};

LowbitLinearConfigs lowbit_linear_sm80();  // lowbit_linear_sm80.cu
LowbitLinearConfigs lowbit_linear_sm90();  // lowbit_linear_sm90.cu

}  // namespace pyvit_accel
