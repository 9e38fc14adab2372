// lowbit_linear: int8 codes (M, K) x packed weights (N, K), then the epilogue; float32 or int8 codes out.
#include "gemm_op.h"

namespace pyvit_accel {
namespace {

at::Tensor lowbit_linear(const at::Tensor& x_in, const at::Tensor& x_scale_in, const at::Tensor& w_packed,
                         const at::Tensor& w_scale, const std::optional<at::Tensor>& bias, int64_t x_zero_point,
                         std::string_view activation, const std::optional<at::Tensor>& layer_scale,
                         const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& out_scale_in,
                         int64_t out_zero_point, int64_t out_bits) {
  check_dtype(x_in, at::kChar, "x");
  TORCH_CHECK_VALUE(x_in.dim() == 2, "x must be (M, K), got ", x_in.sizes());
  const at::Tensor x = contiguous_rows(x_in);
  const int64_t M = x.size(0), K = x.size(1), N = w_scale.numel();
  check_bits(out_bits);
  const at::Tensor x_scale = float_vector(x_scale_in, M, "x_scale"), packed = w_packed.contiguous();
  const auto scale = float_features(w_scale, N, "w_scale"), b = float_features(bias, N, "bias");
  const auto ls = float_features(layer_scale, N, "layer_scale");
  std::optional<at::Tensor> r, out_scale;
  if (residual) {
    check_dtype(*residual, at::kFloat, "residual"), check_shape(*residual, {M, N}, "residual");
    r = contiguous_rows(*residual);
  }
  if (out_scale_in) out_scale = float_vector(*out_scale_in, N, "out_scale");
  const at::Tensor out = at::empty({M, N}, x.options().dtype(out_scale ? at::kChar : at::kFloat));

  Gemm g = {};
  g.x = x.const_data_ptr<int8_t>(), g.x_stride = x.stride(0), g.x_zero_point = x_zero_point;
  g.w_packed = packed.const_data_ptr<uint8_t>(), g.w_bits = packed_bits(packed, N, K);
  g.M = M, g.N = N, g.K = K;
  g.epilogue = {x_scale.const_data_ptr<float>(), x_scale.numel() > 1, scale->const_data_ptr<float>(), data_or_null(b), 1, 0,
                parse_activation(activation), data_or_null(ls), data_or_null(r), r ? r->stride(0) : 0,
                data_or_null(out_scale), out_scale ? out_scale->numel() > 1 : 0, out_zero_point, out_bits,
                out.data_ptr(), N};
  parallel_gemm(g, kernels().lowbit_linear);
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("lowbit_linear", &lowbit_linear); }

}  // namespace
}  // namespace pyvit_accel
