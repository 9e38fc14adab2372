// The kernels, compiled for portable.
#include "kernels.h"

#include <type_traits>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pyvit_accel {
namespace portable_ {
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
}  // namespace portable_
const Kernels kPortable = {"portable", portable_::lowbit_linear, portable_::weight_only_linear, portable_::quantize, portable_::norm_quant,
                        portable_::activate_quantize, portable_::quant_attention, portable_::dot_loop, portable_::read_loop,
                        portable_::match_tokens, portable_::mean_heads,
                        portable_::mix_tokens, portable_::propagate, portable_::assign_tokens, portable_::move_centres,
                        portable_::class_row, portable_::class_mean};
}  // namespace pyvit_accel
