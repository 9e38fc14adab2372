// quant_project: residual + layer_scale proj(x), x (B, Nx, K) floats that become codes with a scale per row; on the way
// rows of the residual are gathered, or rows of both become weighted means.
#include "block.h"

namespace pyvit_accel {
namespace {

// Lists of rows, one for each of M rows of an image's output.
struct Lists {
  const int32_t *ptr, *col;
  const float* weight;
  int64_t M, L;

  // y = sum of weight x[col] / sum of weight, as mix_tokens' mean: a list of one row is that row.
  void mean(int64_t b, int64_t m, const float* x, int64_t width, float* y) const {
    const int32_t *ends = ptr + b * (M + 1) + m, *rows = col + b * L;
    const float* w = weight + b * L;
    int32_t count = 0, only = 0;
    for (int32_t t = ends[0]; t < ends[1]; ++t)
      if (rows[t] >= 0) only = rows[t], ++count;
    if (count == 1) {
      std::memcpy(y, x + only * width, width * sizeof(float));
      return;
    }
    std::memset(y, 0, width * sizeof(float));
    float total = 0;
    for (int32_t t = ends[0]; t < ends[1]; ++t) {
      if (rows[t] < 0) continue;
      const float *row = x + rows[t] * width, scale = w[t];
      for (int64_t c = 0; c < width; ++c) y[c] += scale * row[c];
      total += scale;
    }
    for (int64_t c = 0; total != 0 && c < width; ++c) y[c] /= total;
    if (total == 0) std::memset(y, 0, width * sizeof(float));
  }
};

void check_index(const at::Tensor& t, int64_t rows, int64_t lowest, int64_t below, const char* what) {
  check_dtype(t, at::kInt, what);
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows, what, " must be (B, ...), got ", t.sizes());
  const int32_t* p = t.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < t.numel(); ++i)
    TORCH_CHECK_VALUE(lowest <= p[i] && p[i] < below, what, " has ", p[i], ", outside ", lowest, "..", below - 1);
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
  Lists lists = {};
  if (ptr_in) {
    TORCH_CHECK_VALUE(col_in && weight_in && Nx == N, "lists need col and weight, and x like residual");
    check_index(ptr = ptr_in->contiguous(), B, 0, col.size(1) + 1, "ptr");
    weight = weight_in->contiguous();
    check_dtype(weight, at::kFloat, "weight"), check_shape(weight, col.sizes(), "weight");
    M = ptr.size(1) - 1;
    lists = {ptr.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>(), weight.const_data_ptr<float>(), M, col.size(1)};
  } else {
    TORCH_CHECK_VALUE(Nx == M, "x has ", Nx, " rows, expected ", M);
  }
  const at::Tensor out = at::empty({B, M, C}, x.options());
  if (out.numel() == 0) return out;
  const float *attended = x.const_data_ptr<float>(), *before = residual.const_data_ptr<float>();
  const int64_t mixed = lists.ptr ? 4 * K : 0;  // bytes of a row that is a mean
  in_panels(
      B * M, 5 * K + mixed + 8 * C, [&](int64_t rows) { return round_up(rows * K, 64) + round_up(4 * rows, 64) + rows * mixed; },
      [&](int64_t m, int64_t rows, uint8_t* own, auto&& matmul) {
        float* const row_scale = (float*)(own + round_up(rows * K, 64));
        float* const means = (float*)((uint8_t*)row_scale + round_up(4 * rows, 64));
        float* const y = out.data_ptr<float>() + m * C;
        for (int64_t r = 0; (lists.ptr || col_in) && r < rows; ++r) {
          const int64_t b = (m + r) / M, i = (m + r) % M;
          if (lists.ptr) {
            lists.mean(b, i, attended + b * N * K, K, means + r * K);
            lists.mean(b, i, before + b * N * C, C, y + r * C);
          } else {
            std::memcpy(y + r * C, before + (b * N + col.const_data_ptr<int32_t>()[b * M + i]) * C, C * sizeof(float));
          }
        }
        projection.rows(lists.ptr ? means : attended + m * K, lists.ptr || col_in ? y : before + m * C, y, rows, own, row_scale,
                        projection.proj.weights(), matmul);
      });
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("quant_project", &quant_project); }

}  // namespace
}  // namespace pyvit_accel
