// lowbit_linear: int8 codes (M, K) x packed weights (N, K), then the epilogue; float32 or int8 codes out, or a sum.
#include "gemm_op.h"
#include "row_map.h"

namespace pyvit_accel {
namespace {

using Maybe = std::optional<at::Tensor>;

void multiply(const at::Tensor& x_in, const RowMap& map, int64_t x_zero_point, const at::Tensor& w_packed, const Epilogue& epilogue,
              int64_t N) {
  const at::Tensor x = contiguous_rows(x_in), packed = w_packed.contiguous();
  Gemm g = {};
  g.x = x.const_data_ptr<int8_t>(), g.x_stride = x.stride(0), g.x_zero_point = x_zero_point, g.from = map.from;
  g.w_packed = packed.const_data_ptr<uint8_t>(), g.w_bits = packed_bits(packed, N, x.size(1));
  g.M = map.live, g.N = N, g.K = x.size(1), g.epilogue = epilogue, g.epilogue.rows = map.to;
  parallel_gemm(g, kernels().lowbit_linear);
}
void check_codes(const at::Tensor& x) {
  check_dtype(x, at::kChar, "x");
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be (M, K), got ", x.sizes());
}

at::Tensor lowbit_linear(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& w_packed, const at::Tensor& w_scale,
                         const Maybe& bias, int64_t x_zero_point, std::string_view activation, const Maybe& layer_scale,
                         const Maybe& residual, const Maybe& out_scale, int64_t out_zero_point, int64_t out_bits, const Maybe& index) {
  check_codes(x);
  const RowMap map(x.size(0), index);
  Finish finish(map.size, map.scales(x_scale, x.size(0)), w_scale, bias, layer_scale, residual, out_scale, out_bits);
  map.clear(finish.out.data_ptr(), finish.out.stride(0) * finish.out.element_size());
  multiply(x, map, x_zero_point, w_packed, finish.epilogue(activation, out_zero_point, out_bits), w_scale.numel());
  return finish.out;
}

void lowbit_linear_scatter(const at::Tensor& out, const at::Tensor& out_index, const at::Tensor& x, const at::Tensor& x_scale,
                           const at::Tensor& w_packed, const at::Tensor& w_scale, const Maybe& bias, int64_t x_zero_point,
                           std::string_view activation, const Maybe& layer_scale, const Maybe& index) {
  check_codes(x);
  const RowMap map(x.size(0), index, out_index, out.size(0));
  Finish finish(map.size, map.scales(x_scale, x.size(0)), w_scale, bias, layer_scale, std::nullopt, std::nullopt, 8, out);
  multiply(x, map, x_zero_point, w_packed, finish.epilogue(activation, 0, 8), w_scale.numel());
  if (!finish.out.is_same(out)) out.copy_(finish.out);
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) {
  m.impl("lowbit_linear", &lowbit_linear);
  m.impl("lowbit_linear_scatter", &lowbit_linear_scatter);
}

}  // namespace
}  // namespace pyvit_accel
