// What the linear layers have in common: what follows their sums, and what their plans know of a kernel. Plain C structures,
// of which pyvit_accel/cuda mirrors the first with ctypes.
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

}  // extern "C"

namespace pyvit_accel {

struct Kernel {
  const char* name;          // in the fat binary
  const void* function;      // on the host
  int32_t capability;        // 80: this or newer; 90: this alone
  int32_t features, tokens;  // of a block's tile
  int32_t threads, shared_bytes, blocks_per_sm;
  // Of a cluster, neighbouring blocks: those of other tokens get their weights in one copy from L2, of other features x.
  int32_t cluster_features = 1, cluster_tokens = 1;
};

}  // namespace pyvit_accel
