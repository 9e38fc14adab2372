// weight_only_linear: float32 x (M, K) x packed W8 weights (N, K) + bias, accumulated in float32.
#include "gemm_op.h"

namespace pyvit_accel {
namespace {

at::Tensor weight_only_linear(const at::Tensor& x_in, const at::Tensor& w_packed, const at::Tensor& w_scale_in,
                              const std::optional<at::Tensor>& bias_in) {
  check_dtype(x_in, at::kFloat, "x"), check_dtype(w_scale_in, at::kFloat, "w_scale");
  TORCH_CHECK_VALUE(x_in.dim() == 2, "x must be (M, K), got ", x_in.sizes());
  const at::Tensor x = contiguous_rows(x_in), w_scale = w_scale_in.contiguous(), packed = w_packed.contiguous();
  const int64_t M = x.size(0), K = x.size(1), N = w_scale.numel();
  check_packed(packed, N, K);
  std::optional<at::Tensor> bias;
  if (bias_in) {
    check_dtype(*bias_in, at::kFloat, "bias"), check_shape(*bias_in, {N}, "bias");
    bias = bias_in->contiguous();
  }
  const at::Tensor out = at::empty({M, N}, x.options());

  Gemm g = {};
  g.x = x.const_data_ptr<float>(), g.x_stride = x.stride(0);
  g.w_packed = packed.const_data_ptr<uint8_t>();
  g.M = M, g.N = N, g.K = K;
  g.epilogue = {nullptr, 0, w_scale.const_data_ptr<float>(), data_or_null(bias), 1, 0, Activation::none, nullptr, nullptr, 0,
                nullptr, 0, 0, out.data_ptr(), N};
  parallel_gemm(g, kernels().weight_only_linear);
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("weight_only_linear", &weight_only_linear); }

}  // namespace
}  // namespace pyvit_accel
