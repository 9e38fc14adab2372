// sparse24_linear: the problem, and the plan that chooses a kernel for it. Plain C structures, which pyvit_accel/cuda
// mirrors with ctypes.
#pragma once
#include <span>

#include "linear.h"

extern "C" {

// y = epilogue(x w^T), w (N, K) 2:4 sparse, packed as P24 v1 (pyvit_accel/formats/sparse24.py). x (M, x_stride), K-major;
// address, x_stride and the bytes of K inputs rounded up are multiples of 16, and what lies between K and that is zero.
//
// Of the epilogue, w_packed holds the sums of the codes, int32 of 16 features to w_stride = 64 bytes; null: x_zero_point is 0.
// 16-bit floats have no scales of x and w, and y is of their type, or codes.
struct Sparse24Linear {
  const void* x;
  int64_t x_stride;      // bytes
  const void* values;    // (tiles of 16 features, steps, 32 lanes, 16 bytes)
  const uint32_t* meta;  // (tiles, or pairs of them, steps / 4, 32 lanes, 4)
  const void* rows;      // null, or the values row by row (features, steps, 32 bytes), for kernels that read them so
  int32_t K;
  int32_t elements;      // of x and values: index into int8, float16, bfloat16
  Epilogue epilogue;
};

// The name of kernel `config` of sparse24_linear, or null beyond the last.
EXPORT const char* pyvit_accel_sparse24_linear_config(int config);
// capability: 10 * major + minor. config: -1 chooses.
EXPORT int pyvit_accel_sparse24_linear_plan(const Sparse24Linear* problem, int capability, int sm_count, int config,
                                            Launch* launch);
EXPORT int pyvit_accel_sparse24_linear(const Sparse24Linear* problem, int capability, int sm_count, int config, void* stream);

}  // extern "C"

namespace pyvit_accel {

enum Elements { INT8, FLOAT16, BFLOAT16 };

// A kernel of sparse24_linear, and what the plan weighs.
struct Sparse24LinearConfig : Kernel {
  int32_t elements;
  int32_t bytes_per_clock;  // of an SM: bytes of a row of x times rows of w that its instruction multiplies
  bool from_rows;           // the weights are read from `rows`
  int32_t ahead;            // stages that weights are loaded before they are multiplied
  // Fills grid, parameters and tensor maps; the rest of launch is. The problem is valid.
  void (*prepare)(const Sparse24Linear& problem, const Sparse24LinearConfig& config, int sm_count, Launch& launch);
};

std::span<const Sparse24LinearConfig> sparse24_linear_sm80();  // sparse24_linear_sm80.cu
std::span<const Sparse24LinearConfig> sparse24_linear_sm90();  // sparse24_linear_sm90.cu

}  // namespace pyvit_accel
