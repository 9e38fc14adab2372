// local_assign: tokens of a grid and the centres near them, divided over threads by tokens, then by centres, of all images.
#include <ATen/Parallel.h>

#include <string>
#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace pyvit_accel {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> local_assign(const at::Tensor& x_in, const at::Tensor& centres_in, int64_t window,
                                                            const std::string& metric, double tau, int64_t iterations,
                                                            const std::string& border) {
  TORCH_CHECK_VALUE(x_in.dim() == 4 && centres_in.dim() == 4 && x_in.size(0) == centres_in.size(0) && x_in.size(3) == centres_in.size(3),
                    "x must be (B, h, w, C) and centres (B, gh, gw, C), got ", x_in.sizes(), " and ", centres_in.sizes());
  const at::Tensor x = x_in.to(at::kFloat).contiguous();
  const int64_t B = x.size(0), C = x.size(3), tokens = x.size(1) * x.size(2), centres_count = centres_in.size(1) * centres_in.size(2);
  TORCH_CHECK_VALUE(window > 0 && window % 2 == 1, "window must be odd, got ", window);
  TORCH_CHECK_VALUE(centres_count > 0 || tokens == 0, "tokens need centres, got ", centres_in.sizes());
  const at::Tensor centres = at::empty(centres_in.sizes(), x.options());
  centres.copy_(centres_in);
  const at::Tensor weight = at::empty({B, tokens, window * window}, x.options());
  const at::Tensor index = at::empty(weight.sizes(), x.options().dtype(at::kInt));
  LocalAssign p = {};
  p.x = x.const_data_ptr<float>(), p.centres = centres.data_ptr<float>();
  p.h = x.size(1), p.w = x.size(2), p.gh = centres.size(1), p.gw = centres.size(2), p.C = C, p.window = window;
  p.squares = metric == "l2", p.mask = border == "mask", p.tau = (float)tau;
  p.weight = weight.data_ptr<float>(), p.index = index.data_ptr<int32_t>();
  const int64_t grain = 32768 / (C * window * window + 1) + 1;  // tokens: about 5 us of work
  for (int64_t i = 0; i < iterations && tokens; ++i) {
    at::parallel_for(0, B * tokens, grain, [&](int64_t begin, int64_t end) { kernels().assign_tokens(p, begin, end); });
    at::parallel_for(0, B * centres_count, 1, [&](int64_t begin, int64_t end) { kernels().move_centres(p, begin, end); });
  }
  return {weight, index, centres};
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("local_assign", &local_assign); }

}  // namespace
}  // namespace pyvit_accel
