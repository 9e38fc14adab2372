// What the plans of ops that end in epilogue.cuh have in common.
#pragma once
#include "lowbit_linear.h"

namespace pyvit_accel {

inline bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Four features at a time: 16 bytes of every vector, of the residual, and four elements of y, whose codes are bytes.
inline bool vectors(const Epilogue& e, int output_bytes = 4) {
  return e.N % 4 == 0 && e.residual_stride % 4 == 0 && aligned(e.w_scale, 16) && aligned(e.bias, 16) &&
         aligned(e.layer_scale, 16) && aligned(e.residual, 16) &&
         aligned(e.y, e.out_scale ? 4 : 4 * output_bytes) && (!e.out_scale_per_column || aligned(e.out_scale, 16));
}

inline int check_outputs(const char* op, const Epilogue& e) {
  if (e.out_scale && (e.out_bits < 2 || e.out_bits > 8))
    return fail(ERROR_ARGUMENT, "%s: out_bits=%d; codes have 2 to 8 bits", op, e.out_bits);
  if (e.activation < 0 || e.activation > 3)
    return fail(ERROR_ARGUMENT, "%s: activation=%d; it is 0 none, 1 gelu, 2 gelu_tanh or 3 quick_gelu", op, e.activation);
  return OK;
}

}  // namespace pyvit_accel
