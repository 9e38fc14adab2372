// quantize: float32 rows (M, K) to int8 codes, static scale or one per row.
#include "rows_op.h"

namespace pyvit_accel {
namespace {

at::Tensor quantize(const at::Tensor& x, const at::Tensor& scale, int64_t zero_point, int64_t bits,
                    const std::optional<at::Tensor>& index) {
  Rows p = {};
  p.bits = bits;
  return std::get<0>(rows_op(x, scale, zero_point, index, p, kernels().quantize));
}
std::tuple<at::Tensor, at::Tensor> quantize_dynamic(const at::Tensor& x, std::optional<double> minimum, int64_t bits, double clip,
                                                    const std::optional<at::Tensor>& table_in,
                                                    const std::optional<at::Tensor>& index) {
  Rows p = {};
  p.bits = bits, p.clip = (float)clip;
  const auto table = code_table(table_in, bits);
  p.table = table ? table->const_data_ptr<int8_t>() : nullptr;
  p.has_minimum = minimum.has_value(), p.minimum = (float)minimum.value_or(0);
  return rows_op(x, std::nullopt, 0, index, p, kernels().quantize);
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) {
  m.impl("quantize", &quantize);
  m.impl("quantize_dynamic", &quantize_dynamic);
}

}  // namespace
}  // namespace pyvit_accel
