// quant_mlp: x + layer_scale fc2(activation(fc1(norm(x)))) of rows (M, C), a panel of rows through all of it in cache.
#include "block.h"

namespace pyvit_accel {
namespace {

at::Tensor quant_mlp(
    const at::Tensor& x_in, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
    const std::optional<at::Tensor>& fc1_x_scale, int64_t fc1_x_bits, double fc1_x_clip, const at::Tensor& fc1_w,
    const at::Tensor& fc1_w_scale, const std::optional<at::Tensor>& fc1_bias, std::string_view activation,
    const std::optional<at::Tensor>& fc2_x_scale, int64_t fc2_x_bits, double fc2_x_clip, int64_t fc2_x_zero_point,
    std::optional<double> fc2_x_minimum, const std::optional<at::Tensor>& fc2_x_table, const at::Tensor& fc2_w,
    const at::Tensor& fc2_w_scale, const std::optional<at::Tensor>& fc2_bias, const std::optional<at::Tensor>& layer_scale) {
  check_dtype(x_in, at::kFloat, "x");
  TORCH_CHECK_VALUE(x_in.dim() == 2, "x must be (M, C), got ", x_in.sizes());
  const at::Tensor x = x_in.contiguous();
  const int64_t M = x.size(0), C = x.size(1);
  const FeedForward mlp = feed_forward(C, norm_weight, norm_bias, norm_eps, fc1_x_scale, fc1_x_bits, fc1_x_clip, fc1_w, fc1_w_scale,
                                       fc1_bias, activation, fc2_x_scale, fc2_x_bits, fc2_x_clip, fc2_x_zero_point, fc2_x_minimum,
                                       fc2_x_table, fc2_w, fc2_w_scale, fc2_bias, layer_scale);
  const at::Tensor out = at::empty({M, C}, x.options());
  const int64_t widest = std::max(C, mlp.hidden());
  if (M == 0) return out;
  in_panels(
      M, widest + 4 * mlp.hidden() + 8 * C,
      [&](int64_t rows) { return round_up(rows * widest, 64) + round_up(4 * rows, 64) + 4 * rows * mlp.hidden(); },
      [&](int64_t m, int64_t rows, uint8_t* own, auto&& matmul) {
        float* const row_scale = (float*)(own + round_up(rows * widest, 64));
        float* const wide = (float*)((uint8_t*)row_scale + round_up(4 * rows, 64));
        mlp.rows(x.const_data_ptr<float>() + m * C, out.data_ptr<float>() + m * C, rows, own, row_scale, wide, mlp.fc1.weights(), matmul);
      });
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("quant_mlp", &quant_mlp); }

}  // namespace
}  // namespace pyvit_accel
