// The kernels, compiled for avx512_vnni.
#include "kernels.h"

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
// GCC 12 takes the undefined operands inside its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define USE_AVX512_VNNI  // our own name: GCC 12 does not define __AVX512VNNI__ for the pragma in C++

namespace pyvit_accel {
namespace avx512_ {
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
}  // namespace avx512_
const Kernels kAvx512 = {"avx512_vnni", avx512_::lowbit_linear, avx512_::weight_only_linear, avx512_::quantize, avx512_::norm_quant,
                        avx512_::activate_quantize, avx512_::quant_attention, avx512_::dot_loop, avx512_::read_loop,
                        avx512_::match_tokens, avx512_::mean_heads,
                        avx512_::mix_tokens, avx512_::propagate, avx512_::assign_tokens, avx512_::move_centres,
                        avx512_::class_row, avx512_::class_mean};
}  // namespace pyvit_accel
#endif
