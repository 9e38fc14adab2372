// lowbit_linear: int8 codes (M, K) x packed weights (N, K), then the epilogue; float32 or int8 codes out.
#include "gemm_op.h"

namespace pyvit_accel {
namespace {

at::Tensor lowbit_linear(const at::Tensor& x_in, const at::Tensor& x_scale, const at::Tensor& w_packed,
                         const at::Tensor& w_scale, const std::optional<at::Tensor>& bias, int64_t x_zero_point,
                         std::string_view activation, const std::optional<at::Tensor>& layer_scale,
                         const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& out_scale,
                         int64_t out_zero_point, int64_t out_bits) {
  check_dtype(x_in, at::kChar, "x");
  TORCH_CHECK_VALUE(x_in.dim() == 2, "x must be (M, K), got ", x_in.sizes());
  const at::Tensor x = contiguous_rows(x_in), packed = w_packed.contiguous();
  const int64_t M = x.size(0), K = x.size(1), N = w_scale.numel();
  Finish finish(M, x_scale, w_scale, bias, layer_scale, residual, out_scale, out_bits);

  Gemm g = {};
  g.x = x.const_data_ptr<int8_t>(), g.x_stride = x.stride(0), g.x_zero_point = x_zero_point;
  g.w_packed = packed.const_data_ptr<uint8_t>(), g.w_bits = packed_bits(packed, N, K);
  g.M = M, g.N = N, g.K = K, g.epilogue = finish.epilogue(activation, out_zero_point, out_bits);
  parallel_gemm(g, kernels().lowbit_linear);
  return finish.out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("lowbit_linear", &lowbit_linear); }

}  // namespace
}  // namespace pyvit_accel
