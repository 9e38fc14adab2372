// Shared by quant_attention and quant_block: dividing heads over threads.
#pragma once
#include <ATen/Parallel.h>

#include "kernels.h"
#include "phases.h"

namespace pyvit_accel {

// The code of a row's largest probability: the sum of Nk products with int8 values stays in int32.
inline int64_t largest_code(int64_t Nk) { return Nk ? std::min<int64_t>(32767, 2147483647 / (128 * Nk)) : 0; }

// Heads are divided first; where they do not fill the threads evenly, each head's queries are divided too.
inline void parallel_attention(const Attention& a, int64_t B) {
  const int64_t threads = at::get_num_threads(), heads = B * a.H;
  int64_t q_blocks = 1;
  while (heads * q_blocks % threads && heads * q_blocks < 4 * threads && q_blocks * 24 < a.Nq) ++q_blocks;
  at::parallel_for(0, heads * q_blocks, 1, [&](int64_t begin, int64_t end) {
    timed(Phase::attention, [&] { kernels().quant_attention(a, q_blocks, begin, end); });
  });
}

}  // namespace pyvit_accel
