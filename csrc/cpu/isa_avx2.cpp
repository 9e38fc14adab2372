// The kernels, compiled for avx2.
#include "kernels.h"

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma")
#define USE_AVX2

namespace pyvit_accel {
namespace avx2_ {
#include "simd.h"
#include "tile.h"
#include "gemm.h"
#include "rows.h"
#include "softmax.h"
#include "attention.h"
#include "tokens.h"
#include "floats.h"
#include "mix_tokens.h"
#include "propagate.h"
#include "local_assign.h"
#include "class_row.h"
}  // namespace avx2_
const Kernels kAvx2 = {"avx2", avx2_::lowbit_linear, avx2_::weight_only_linear, avx2_::quantize, avx2_::norm_quant,
                        avx2_::activate_quantize, avx2_::quant_attention, avx2_::dot_loop, avx2_::read_loop,
                        avx2_::match_tokens, avx2_::mean_heads,
                        avx2_::mix_tokens, avx2_::propagate, avx2_::assign_tokens, avx2_::move_centres,
                        avx2_::class_row, avx2_::class_mean};
}  // namespace pyvit_accel
#endif
