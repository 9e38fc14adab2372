// norm_quant: LayerNorm of float32 rows (M, C), then int8 codes, static scale or one per row.
#include "rows_op.h"

namespace pyvit_accel {
namespace {

std::tuple<at::Tensor, at::Tensor> norm_rows(const at::Tensor& x, const at::Tensor& weight_in, const at::Tensor& bias_in,
                                             const std::optional<at::Tensor>& scale, double eps, int64_t bits, double clip,
                                             const std::optional<at::Tensor>& index) {
  const at::Tensor weight = *float_features(weight_in, x.size(-1), "weight"), bias = *float_features(bias_in, x.size(-1), "bias");
  Rows p = {};
  p.weight = weight.const_data_ptr<float>(), p.bias = bias.const_data_ptr<float>(), p.eps = eps, p.bits = bits, p.clip = (float)clip;
  return rows_op(x, scale, 0, index, p, kernels().norm_quant);
}
at::Tensor norm_quant(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& scale, double eps,
                      int64_t bits, const std::optional<at::Tensor>& index) {
  return std::get<0>(norm_rows(x, weight, bias, scale, eps, bits, 1, index));
}
std::tuple<at::Tensor, at::Tensor> norm_quant_dynamic(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                                      double eps, int64_t bits, double clip,
                                                      const std::optional<at::Tensor>& index) {
  return norm_rows(x, weight, bias, std::nullopt, eps, bits, clip, index);
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) {
  m.impl("norm_quant", &norm_quant);
  m.impl("norm_quant_dynamic", &norm_quant_dynamic);
}

}  // namespace
}  // namespace pyvit_accel
