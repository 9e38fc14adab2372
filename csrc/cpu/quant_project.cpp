// quant_project: residual + layer_scale proj(x), x (B, Nx, K) floats that become codes with a scale per row; on the way
// rows of the residual are gathered, or rows of both become weighted means.
#include "block.h"

namespace pyvit_accel {
namespace {

void check_index(const at::Tensor& t, int64_t images, int64_t lowest, int64_t below, const char* what) {
  check_dtype(t, at::kInt, what);
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == images, what, " must be (B, ...), got ", t.sizes());
  check_range(t, lowest, below, what);
}

at::Tensor quant_project(const at::Tensor& x_in, const at::Tensor& residual_in, const std::optional<at::Tensor>& col_in,
                         const std::optional<at::Tensor>& ptr_in, const std::optional<at::Tensor>& weight_in, int64_t x_bits,
                         double x_clip, const at::Tensor& w, const at::Tensor& w_scale, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& layer_scale) {
  check_dtype(x_in, at::kFloat, "x"), check_dtype(residual_in, at::kFloat, "residual");
  TORCH_CHECK_VALUE(x_in.dim() == 3 && residual_in.dim() == 3 && x_in.size(0) == residual_in.size(0), "x and residual must be (B, N, C)");
  const at::Tensor x = x_in.contiguous(), residual = residual_in.contiguous();
  const int64_t B = x.size(0), Nx = x.size(1), K = x.size(2), N = residual.size(1), C = residual.size(2);
  check_shape(w_scale, {C}, "w_scale");
  const Projection projection = {Linear(w, w_scale, bias, K, x_bits, x_clip, "proj"), float_features(layer_scale, C, "layer_scale")};
  at::Tensor col, ptr, weight;
  if (col_in) check_index(col = col_in->contiguous(), B, ptr_in ? -1 : 0, N, "col");
  int64_t M = col_in ? col.size(1) : N;
  Mix mix = {};  // of lists of x and of residual; of residual alone, a gather
  mix.reduce = ptr_in ? Reduce::mean : Reduce::sum, mix.width = 1;
  if (ptr_in) {
    TORCH_CHECK_VALUE(col_in && weight_in && Nx == N, "lists need col and weight, and x like residual");
    check_index(ptr = ptr_in->contiguous(), B, 0, col.size(1) + 1, "ptr");
    weight = weight_in->contiguous();
    check_dtype(weight, at::kFloat, "weight"), check_shape(weight, col.sizes(), "weight");
    M = ptr.size(1) - 1;
    mix.ptr = ptr.const_data_ptr<int32_t>(), mix.weight = weight.const_data_ptr<float>();
  } else {
    TORCH_CHECK_VALUE(Nx == M, "x has ", Nx, " rows, expected ", M);
  }
  if (col_in) mix.col = col.const_data_ptr<int32_t>(), mix.L = col.size(1), mix.M = M;
  const at::Tensor out = at::empty({B, M, C}, x.options());
  if (out.numel() == 0) return out;
  const float *attended = x.const_data_ptr<float>(), *before = residual.const_data_ptr<float>();
  const int64_t mixed = mix.ptr ? 4 * K : 0;  // bytes of a row that is a mean
  const auto mix_rows = [&](const float* of, int64_t width, int64_t m, int64_t rows, float* y) {  // rows m .. m + rows
    Mix p = mix;
    p.x = of, p.x_stride[0] = N * width, p.x_stride[1] = p.C = width, p.y = y - m * width;
    kernels().mix_tokens(p, m, m + rows);
  };
  in_panels(
      B * M, 5 * K + mixed + 8 * C, [&](int64_t rows) { return round_up(rows * K, 64) + round_up(4 * rows, 64) + rows * mixed; },
      [&](int64_t m, int64_t rows, uint8_t* own, auto&& matmul) {
        float* const row_scale = (float*)(own + round_up(rows * K, 64));
        float* const means = (float*)((uint8_t*)row_scale + round_up(4 * rows, 64));
        float* const y = out.data_ptr<float>() + m * C;
        if (mix.ptr) mix_rows(attended, K, m, rows, means);
        if (mix.col) mix_rows(before, C, m, rows, y);
        projection.rows(mix.ptr ? means : attended + m * K, mix.col ? y : before + m * C, y, rows, own, row_scale,
                        projection.proj.weights(), matmul);
      });
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("quant_project", &quant_project); }

}  // namespace
}  // namespace pyvit_accel
