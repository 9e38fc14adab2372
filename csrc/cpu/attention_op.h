// Shared by quant_attention and quant_block: the tables of a format, and dividing heads over threads.
#pragma once
#include <ATen/Parallel.h>

#include <string_view>

#include "../checks.h"
#include "kernels.h"
#include "phases.h"

namespace pyvit_accel {

constexpr int64_t kMaxKeys = 65536;  // 255 * 128 of each, the largest sum of products, is still an int32

// The format of the probabilities and what it reads, in one place.
struct SoftmaxTables {
  Softmax softmax = {};
  uint8_t low[256] = {}, high[256] = {};
  float values[256] = {};
  at::Tensor thresholds;

  SoftmaxTables() = default;
  SoftmaxTables(const SoftmaxTables&) = delete;  // softmax points into it
  void read(const std::optional<at::Tensor>& p_values, const std::optional<at::Tensor>& p_thresholds, double steps, double shift,
            double unit, double offset, std::string_view anchor, bool normalize, double softmax_scale) {
    if (!p_values) return;
    const int64_t count = p_values->numel();
    const bool integers = p_values->scalar_type() == at::kInt;
    TORCH_CHECK_VALUE(p_values->dim() == 1 && 1 <= count && count <= 255, "p_values must be (1 .. 255,), got ", p_values->sizes());
    TORCH_CHECK_VALUE(p_thresholds || steps > 0, "p_steps must be positive, got ", steps);
    TORCH_CHECK_VALUE(anchor == "max" || anchor == "lse", "p_anchor must be max or lse, got ", anchor);
    if (!integers) check_dtype(*p_values, at::kFloat, "p_values");
    const at::Tensor table = p_values->contiguous();
    bool wide = false;
    for (int64_t c = 1; c <= count; ++c) {  // code c stands for value L - c
      const int32_t value = integers ? table.const_data_ptr<int32_t>()[count - c] : 0;
      TORCH_CHECK_VALUE(0 <= value && value <= 65535, "p_values must be at most 65535, got ", value);
      values[c] = integers ? (float)value + (float)offset : table.const_data_ptr<float>()[count - c] + (float)offset;
      low[c] = value & 255, high[c] = value >> 8, wide = wide || high[c];
    }
    const double octave = p_thresholds ? 1.0 : steps, log2_e = 1.44269504;
    Softmax& f = softmax;
    f.coded = true, f.count = count, f.octave = (float)octave, f.inverse = (float)(1 / octave);
    f.score_scale = (float)(softmax_scale * log2_e * octave), f.bias_scale = (float)(log2_e * octave);
    f.shift = (float)shift, f.unit = (float)unit, f.lse = anchor == "lse", f.normalize = normalize;
    f.values = values;
    if (integers && offset == 0) f.low = low, f.high = wide ? high : nullptr;
    if (p_thresholds) {
      thresholds = float_features(p_thresholds, count, "p_thresholds").value();
      f.thresholds = thresholds.const_data_ptr<float>();
    }
  }
};

// Heads are divided first; where they do not fill the threads evenly, each head's queries are divided too.
inline int64_t query_blocks(const Attention& a, int64_t B) {
  const int64_t threads = at::get_num_threads(), heads = B * a.H;
  int64_t q_blocks = 1;
  while (heads * q_blocks % threads && heads * q_blocks < 4 * threads && q_blocks * 24 < a.Nq) ++q_blocks;
  return q_blocks;
}
inline void parallel_attention(const Attention& a, int64_t B, int64_t q_blocks) {
  at::parallel_for(0, B * a.H * q_blocks, 1, [&](int64_t begin, int64_t end) {
    timed(Phase::attention, [&] { kernels().quant_attention(a, q_blocks, begin, end); });
  });
}

}  // namespace pyvit_accel
