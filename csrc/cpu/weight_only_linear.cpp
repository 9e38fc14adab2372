// weight_only_linear: float32 x (M, K) x packed weights (N, K) + bias, accumulated in float32.
#include "gemm_op.h"

namespace pyvit_accel {
namespace {

at::Tensor weight_only_linear(const at::Tensor& x_in, const at::Tensor& w_packed, const at::Tensor& w_scale_in,
                              const std::optional<at::Tensor>& w_zero_point_in, const std::optional<at::Tensor>& bias_in) {
  check_dtype(x_in, at::kFloat, "x"), check_dtype(w_scale_in, at::kFloat, "w_scale");
  TORCH_CHECK_VALUE(x_in.dim() == 2, "x must be (M, K), got ", x_in.sizes());
  TORCH_CHECK_VALUE(w_scale_in.dim() == 1 || w_scale_in.dim() == 2, "w_scale must be (N,) or (N, G), got ", w_scale_in.sizes());
  const at::Tensor x = contiguous_rows(x_in), w_scale = w_scale_in.contiguous(), packed = w_packed.contiguous();
  const int64_t M = x.size(0), K = x.size(1), N = w_scale.size(0);
  const bool grouped = w_scale.dim() == 2;
  const auto bias = float_features(bias_in, N, "bias");
  const at::Tensor out = at::empty({M, N}, x.options()), ones = at::ones({grouped ? N : 0}, x.options());
  std::optional<at::Tensor> zero_point;
  if (w_zero_point_in) {
    check_dtype(*w_zero_point_in, at::kFloat, "w_zero_point"), check_shape(*w_zero_point_in, w_scale.sizes(), "w_zero_point");
    TORCH_CHECK_VALUE(grouped, "w_zero_point needs a w_scale (N, G)");
    zero_point = w_zero_point_in->contiguous();
  }

  Gemm g = {};
  g.x = x.const_data_ptr<float>(), g.x_stride = x.stride(0);
  g.w_packed = packed.const_data_ptr<uint8_t>(), g.w_bits = packed_bits(packed, N, K);
  g.M = M, g.N = N, g.K = K;
  if (grouped) {
    g.w_groups = w_scale.size(1);
    TORCH_CHECK_VALUE(g.w_groups > 0 && K % g.w_groups == 0, "w_scale has ", g.w_groups, " groups, which do not divide K=", K);
    g.group_scale = w_scale.const_data_ptr<float>(), g.group_zero_point = data_or_null(zero_point);
  }
  g.epilogue = {nullptr, 0, (grouped ? ones : w_scale).const_data_ptr<float>(), data_or_null(bias), 1, 0, Activation::none, nullptr,
                nullptr, 0, nullptr, 0, 0, 8, out.data_ptr(), N};
  parallel_gemm(g, kernels().weight_only_linear);
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("weight_only_linear", &weight_only_linear); }

}  // namespace
}  // namespace pyvit_accel
