// The plain C structures of the library, which pyvit_accel/cuda mirrors with ctypes, and the plan of lowbit_linear.
//
// A plan needs no GPU: it says which kernel is launched and with what. What is launched is a Launch, by library.cu.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define PYVIT_ACCEL_ABI 1  // raised when a structure or a function here changes

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

// A tensor map that the launch encodes; dimension 0 is contiguous.
struct TensorMap {
  uint64_t base;
  uint64_t dims[5];     // elements
  uint64_t strides[4];  // bytes, of dimensions 1 ..
  uint32_t box[5];
  uint32_t rank;
  uint32_t swizzle;  // 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes
  uint32_t element_bytes;
  uint32_t offset;  // of its 128 bytes in the parameters; a multiple of 64
};

// All that a launch needs: what a GPU will see, and what tests hand to the emulator.
struct Launch {
  char kernel[64];
  const void* function;  // of the kernel, on the host
  uint32_t grid, block, cluster, shared_bytes, param_bytes, num_maps;
  uint32_t dependent;  // 1: programmatic dependent launch
  TensorMap maps[4];
  alignas(64) uint8_t params[1024];
};

// Every function that can fail returns 0 or a code, negative when the driver or the runtime refused.
enum Error {
  OK = 0,
  ERROR_SHAPE,
  ERROR_W_BITS,
  ERROR_X_ALIGNMENT,
  ERROR_W_STRIDE,
  ERROR_OUT_BITS,
  ERROR_ACTIVATION,
  ERROR_NULL,
  ERROR_CAPABILITY,
  ERROR_SM_COUNT,
  ERROR_CONFIG,
  ERROR_TOO_LARGE,
  ERROR_TENSOR_MAP,
  ERROR_NO_ENCODER,
  NUM_ERRORS,
};

int pyvit_accel_abi_version(void);
const char* pyvit_accel_error(int code);
const char* pyvit_accel_device_error(void);  // why no kernel can be launched here, or null
int pyvit_accel_launch(const Launch* launch, void* stream);

// The name of kernel `config` of lowbit_linear, or null beyond the last.
const char* pyvit_accel_lowbit_linear_config(int config);
// capability: 10 * major + minor. config: -1 chooses.
int pyvit_accel_lowbit_linear_plan(const LowbitLinear* problem, int capability, int sm_count, int config, Launch* launch);
int pyvit_accel_lowbit_linear(const LowbitLinear* problem, int capability, int sm_count, int config, void* stream);

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
  // Fills cluster, grid, parameters and tensor maps; the rest of launch is filled. The problem is valid.
  void (*prepare)(const LowbitLinear& problem, const LowbitLinearConfig& config, int sm_count, Launch& launch);
};

struct LowbitLinearConfigs {
  const LowbitLinearConfig* of;
  int count;
};

LowbitLinearConfigs lowbit_linear_sm80();  // lowbit_linear_sm80.cu
LowbitLinearConfigs lowbit_linear_sm90();  // lowbit_linear_sm90.cu

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace pyvit_accel
