// Shared by the ops that end in a matmul: filling in the epilogue and dividing the work over threads.
#pragma once
#include <ATen/Parallel.h>

#include <optional>
#include <string_view>

#include "../checks.h"
#include "kernels.h"

namespace pyvit_accel {

inline Activation parse_activation(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "quick_gelu") return Activation::quick_gelu;
  TORCH_CHECK_VALUE(false, "activation must be none, gelu, gelu_tanh or quick_gelu, got ", name);
}

// The number of bits of the N x K codes in w_packed, which its shape tells.
inline int64_t packed_bits(const at::Tensor& w_packed, int64_t N, int64_t K) {
  check_dtype(w_packed, at::kByte, "w_packed");
  for (const int64_t bits : {8, 4, 2, 3, 5, 6})
    if (w_packed.dim() == 2 && w_packed.size(0) == num_tiles(N) && w_packed.size(1) == tile_bytes(K, bits)) return bits;
  TORCH_CHECK_VALUE(false, "w_packed has shape ", w_packed.sizes(), ", which holds no ", N, " x ", K, " codes");
}

// How many threads a parallel_for here would get.
inline int64_t free_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

inline const float* data_or_null(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// What follows an M x N product: its tensors checked, contiguous and held; the output made, or `sum` (any, N), which the
// product is added to.
struct Finish {
  at::Tensor x_scale, w_scale, out;
  std::optional<at::Tensor> bias, layer_scale, residual, out_scale;

  Finish(int64_t M, const at::Tensor& x_scale_in, const at::Tensor& w_scale_in, const std::optional<at::Tensor>& bias_in,
         const std::optional<at::Tensor>& layer_scale_in, const std::optional<at::Tensor>& residual_in,
         const std::optional<at::Tensor>& out_scale_in, int64_t out_bits, const std::optional<at::Tensor>& sum = std::nullopt) {
    const int64_t N = w_scale_in.numel();
    check_bits(out_bits);
    x_scale = float_vector(x_scale_in, M, "x_scale"), w_scale = *float_features(w_scale_in, N, "w_scale");
    bias = float_features(bias_in, N, "bias"), layer_scale = float_features(layer_scale_in, N, "layer_scale");
    if (residual_in) {
      check_dtype(*residual_in, at::kFloat, "residual"), check_shape(*residual_in, {M, N}, "residual");
      residual = contiguous_rows(*residual_in);
    }
    if (out_scale_in) out_scale = float_vector(*out_scale_in, N, "out_scale");
    if (sum) {
      check_dtype(*sum, at::kFloat, "out");
      TORCH_CHECK_VALUE(sum->dim() == 2 && sum->size(1) == N, "out must be (R, ", N, "), got ", sum->sizes());
      residual = out = contiguous_rows(*sum);
      return;
    }
    out = at::empty({M, N}, x_scale.options().dtype(out_scale ? at::kChar : at::kFloat));
  }
  Epilogue epilogue(std::string_view activation, int64_t out_zero_point, int64_t out_bits) {
    return {x_scale.const_data_ptr<float>(), x_scale.numel() > 1, w_scale.const_data_ptr<float>(), data_or_null(bias), 1, 0,
            parse_activation(activation), data_or_null(layer_scale), data_or_null(residual),
            residual ? residual->stride(0) : 0, data_or_null(out_scale), out_scale ? out_scale->numel() > 1 : 0,
            out_zero_point, out_bits, out.data_ptr(), out.stride(0)};
  }
};

// The M x N output is cut into row parts x tile parts, one part a thread. Every thread rewrites its rows and reads its
// weights, so of the cuts with the least work in the largest part, the one that touches the fewest bytes is taken.
template <class F>  // fn(g, row_begin, row_end, tile_begin, tile_end)
inline void parallel_gemm(const Gemm& g, F&& fn) {
  constexpr int64_t kRowStep = 12, kTileStep = 2, kMinWork = 1 << 20;  // MACs worth a thread: about 5 us of one core
  const int64_t tiles = num_tiles(g.N), work = g.M * g.N * g.K / kMinWork + 1;
  if (g.M == 0 || tiles == 0) return;
  const auto part = [](int64_t n, int64_t parts, int64_t step) { return round_up((n + parts - 1) / parts, step); };
  const int64_t threads = std::min(free_threads(), work);
  int64_t rows = g.M, cols = tiles, best_area = INT64_MAX, best_bytes = INT64_MAX;
  for (int64_t row_parts = 1; row_parts <= threads; ++row_parts) {
    if (threads % row_parts) continue;
    const int64_t r = std::min(g.M, part(g.M, row_parts, kRowStep)), c = std::min(tiles, part(tiles, threads / row_parts, kTileStep));
    const int64_t area = round_up(r, kRowStep) * round_up(c, kTileStep), bytes = r + c * kTile;
    if (area < best_area || (area == best_area && bytes < best_bytes)) best_area = area, best_bytes = bytes, rows = r, cols = c;
  }
  const int64_t row_parts = (g.M + rows - 1) / rows, col_parts = (tiles + cols - 1) / cols;
  at::parallel_for(0, row_parts * col_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / col_parts * rows, t = i % col_parts * cols;
      fn(g, m, std::min(m + rows, g.M), t, std::min(t + cols, tiles));
    }
  });
}

}  // namespace pyvit_accel
