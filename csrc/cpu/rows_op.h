// Shared by quantize and norm_quant: rows of floats in, rows of int8 codes out, divided over threads.
#pragma once
#include <ATen/Parallel.h>

#include <optional>
#include <tuple>

#include "../checks.h"
#include "kernels.h"
#include "row_map.h"

namespace pyvit_accel {

using RowsFn = void (*)(const Rows&, int64_t, int64_t);

// scale: static, (1,) or (K,); nullopt: one per row, returned beside the codes. index: row m is row index[m] of x.
inline std::tuple<at::Tensor, at::Tensor> rows_op(const at::Tensor& x_in, const std::optional<at::Tensor>& scale_in,
                                                  int64_t zero_point, const std::optional<at::Tensor>& index, Rows p,
                                                  RowsFn fn) {
  check_dtype(x_in, at::kFloat, "x"), check_bits(p.bits);
  TORCH_CHECK_VALUE(x_in.dim() == 2, "x must be (M, K), got ", x_in.sizes());
  const at::Tensor x = contiguous_rows(x_in);
  const int64_t K = x.size(1);
  const RowMap map(x.size(0), index);
  std::optional<at::Tensor> scale;
  if (scale_in) scale = float_vector(*scale_in, K, "scale");
  const at::Tensor codes = at::empty({map.size, K}, x.options().dtype(at::kChar));
  const at::Tensor row_scale = scale ? at::Tensor() : at::empty({map.size}, x.options());
  p.x = x.const_data_ptr<float>(), p.x_stride = x.stride(0), p.K = K;
  p.scale = scale ? scale->const_data_ptr<float>() : nullptr, p.scale_stride = scale ? scale->numel() > 1 : 0;
  p.zero_point = zero_point;
  p.out = codes.data_ptr<int8_t>(), p.out_scale = scale ? nullptr : row_scale.data_ptr<float>();
  p.from = map.from, p.to = map.to;
  map.clear(p.out, K);
  if (!scale) map.clear_scale(p.out_scale);
  const int64_t grain = 32768 / std::max<int64_t>(K, 1) + 1;  // rows: about 5 us of work
  at::parallel_for(0, map.live, grain, [&](int64_t begin, int64_t end) { fn(p, begin, end); });
  return {codes, row_scale};
}

}  // namespace pyvit_accel
