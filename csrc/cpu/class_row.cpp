// class_row: what the class token attends to, divided over threads by images, or by heads where images are fewer.
#include <ATen/Parallel.h>

#include <algorithm>

#include "../checks.h"
#include "kernels.h"

namespace pyvit_accel {
namespace {

constexpr int64_t kLeast = 1 << 20;  // work for a thread: 25 us

at::Tensor class_row(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& q_scale, const at::Tensor& k_scale,
                     double softmax_scale, const std::optional<at::Tensor>& key_bias) {
  for (const at::Tensor* t : {&q_in, &k_in}) {
    check_dtype(*t, at::kChar, "q and k");
    TORCH_CHECK_VALUE(t->dim() == 4, "q and k must be (B, H, N, D), got ", t->sizes());
  }
  const at::Tensor q = contiguous_rows(q_in), k = contiguous_rows(k_in);
  const int64_t B = q.size(0), H = q.size(1), Nq = q.size(2), D = q.size(3), N = k.size(2);
  check_shape(k, {B, H, N, D}, "k");
  TORCH_CHECK_VALUE(H > 0 && Nq > 0, "q needs a head and a first query, got ", q.sizes());
  check_dtype(q_scale, at::kFloat, "q_scale"), check_shape(q_scale, {B, H, Nq}, "q_scale");
  check_dtype(k_scale, at::kFloat, "k_scale"), check_shape(k_scale, {B, H, N}, "k_scale");
  const at::Tensor out = at::empty({B, N}, q.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  ClassRow p = {};
  if (key_bias) {
    check_dtype(*key_bias, at::kFloat, "key_bias"), check_shape(*key_bias, {B, N}, "key_bias");
    p.key_bias = key_bias->const_data_ptr<float>();
    for (int i = 0; i < 2; ++i) p.key_bias_stride[i] = key_bias->stride(i);
  }
  p.q = q.const_data_ptr<int8_t>(), p.k = k.const_data_ptr<int8_t>();
  p.q_scale = q_scale.const_data_ptr<float>(), p.k_scale = k_scale.const_data_ptr<float>();
  for (int i = 0; i < 3; ++i) p.k_stride[i] = k.stride(i), p.k_scale_stride[i] = k_scale.stride(i);
  for (int i = 0; i < 2; ++i) p.q_stride[i] = q.stride(i), p.q_scale_stride[i] = q_scale.stride(i);
  p.softmax_scale = (float)softmax_scale, p.H = H, p.N = N, p.D = D;
  float* const result = out.data_ptr<float>();
  const Kernels& kernel = kernels();
  const int64_t padded = round_up(N, 16), work = N * (D + 64);  // of a head; an exponential is as 64 products
  if (B >= at::get_num_threads()) {
    at::parallel_for(0, B, kLeast / (H * work) + 1, [&](int64_t begin, int64_t end) {
      float* const rows = (float*)scratch(H * (padded + 1) * sizeof(float), 2), *const factor = rows + H * padded;
      for (int64_t b = begin; b < end; ++b) {
        kernel.class_row(p, b, 0, H, rows, factor);
        kernel.class_mean(p, rows, factor, result + b * N);
      }
    });
    return out;
  }
  float* const rows = (float*)scratch(B * H * (padded + 1) * sizeof(float), 2), *const factor = rows + B * H * padded;
  at::parallel_for(0, B * H, kLeast / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin / H; b * H < end; ++b) {
      const int64_t first = std::max(begin, b * H), last = std::min(end, (b + 1) * H);
      kernel.class_row(p, b, first - b * H, last - b * H, rows + first * padded, factor + first);
    }
  });
  for (int64_t b = 0; b < B; ++b) kernel.class_mean(p, rows + b * H * padded, factor + b * H, result + b * N);
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("class_row", &class_row); }

}  // namespace
}  // namespace pyvit_accel
