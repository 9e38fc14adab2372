// Shared by quant_attention and quant_block: dividing heads over threads.
#pragma once
#include <ATen/Parallel.h>

#include "kernels.h"
#include "phases.h"

namespace pyvit_accel {

constexpr int64_t kMaxKeys = 65536;  // 255 * 128 of each, the largest sum of products, is still an int32

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
