// propagate: weighted page rank of the tokens, divided over threads by heads. In memory is no more than the A of one head a
// thread, and that only where it is small.
#include <ATen/Parallel.h>

#include "../checks.h"
#include "kernels.h"

namespace pyvit_accel {
namespace {

constexpr int64_t kKept = 4 << 20;  // probabilities of a head that stay between iterations: 16 MiB, read ten times faster than made anew

at::Tensor propagate(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& start_in, double softmax_scale, int64_t iterations,
                     const std::optional<at::Tensor>& key_bias_in) {
  TORCH_CHECK_VALUE(q_in.dim() == 4, "q must be (B, H, N, D), got ", q_in.sizes());
  const at::Tensor q = contiguous_rows(q_in.to(at::kFloat)), k = contiguous_rows(k_in.to(at::kFloat)), start = start_in.contiguous();
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), D = q.size(3);
  check_shape(k, q.sizes(), "k"), check_dtype(start, at::kFloat, "start"), check_shape(start, {B, H, N}, "start");
  Propagate p = {};
  at::Tensor key_bias;
  if (key_bias_in) {
    key_bias = key_bias_in->contiguous(), check_dtype(key_bias, at::kFloat, "key_bias"), check_shape(key_bias, {B, N}, "key_bias");
    p.key_bias = key_bias.const_data_ptr<float>();
  }
  const at::Tensor out = at::empty({B, H, N}, start.options());
  if (out.numel() == 0) return out;
  p.q = q.const_data_ptr<float>(), p.k = k.const_data_ptr<float>(), p.start = start.const_data_ptr<float>();
  for (int i = 0; i < 3; ++i) p.q_stride[i] = q.stride(i), p.k_stride[i] = k.stride(i);
  p.H = H, p.N = N, p.D = D, p.scale = (float)softmax_scale, p.iterations = iterations, p.kept = kKept, p.out = out.data_ptr<float>();
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) { kernels().propagate(p, begin, end); });
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("propagate", &propagate); }

}  // namespace
}  // namespace pyvit_accel
