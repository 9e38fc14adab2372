// lowbit_linear: the problem, and the plan that chooses a kernel for it. Plain C structures, which pyvit_accel/cuda
// mirrors with ctypes.
#pragma once
#include <span>

#include "linear.h"

extern "C" {

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
struct LowbitLinearConfig : Kernel {
  int32_t w_bits;
  int32_t macs_per_clock;  // of an SM, int8 products that its instruction makes
  // Fills grid, parameters and tensor maps; the rest of launch is. The problem is valid.
  void (*prepare)(const LowbitLinear& problem, const LowbitLinearConfig& config, int sm_count, Launch& launch);
};

std::span<const LowbitLinearConfig> lowbit_linear_sm80();  // lowbit_linear_sm80.cu
std::span<const LowbitLinearConfig> lowbit_linear_sm90();  // lowbit_linear_sm90.cu

}  // namespace pyvit_accel
