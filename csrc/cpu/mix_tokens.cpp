// mix_tokens: rows that are weighted sums of rows, divided over threads by rows of all images.
#include <ATen/Parallel.h>

#include <algorithm>
#include <string>

#include "../checks.h"
#include "kernels.h"

namespace pyvit_accel {
namespace {

Float float_of(const at::Tensor& t) {
  if (t.scalar_type() == at::kHalf) return Float::float16;
  if (t.scalar_type() == at::kBFloat16) return Float::bfloat16;
  check_dtype(t, at::kFloat, "x");
  return Float::float32;
}
Reduce reduce_of(const std::string& reduce) {
  TORCH_CHECK_VALUE(reduce == "sum" || reduce == "mean" || reduce == "mlerp", "reduce must be sum, mean or mlerp, got ", reduce);
  return reduce == "sum" ? Reduce::sum : reduce == "mean" ? Reduce::mean : Reduce::mlerp;
}

void check_rows(const at::Tensor& col, int64_t N) {
  const int32_t* p = col.const_data_ptr<int32_t>();
  bool outside = false;
  for (int64_t i = 0; i < col.numel(); ++i) outside |= p[i] < -1 || p[i] >= N;
  if (!outside) return;
  const int32_t* bad = std::find_if(p, p + col.numel(), [=](int32_t c) { return c < -1 || c >= N; });
  TORCH_CHECK_VALUE(false, "mix_tokens: col of image ", (bad - p) / col.size(1), " has ", *bad, ", but x has the rows 0..", N - 1,
                    "; -1 adds nothing");
}
void check_lists(const at::Tensor& ptr, int64_t L) {
  const int64_t lists = ptr.size(1);
  for (int64_t b = 0; b < ptr.size(0); ++b) {
    const int32_t* p = ptr.const_data_ptr<int32_t>() + b * lists;
    bool ascends = 0 <= p[0] && p[lists - 1] <= L;
    for (int64_t m = 1; m < lists; ++m) ascends &= p[m - 1] <= p[m];
    TORCH_CHECK_VALUE(ascends, "mix_tokens: ptr of image ", b, " does not ascend within 0..", L, ", the entries of col");
  }
}

at::Tensor mix_tokens(const at::Tensor& x_in, const at::Tensor& col_in, const std::optional<at::Tensor>& ptr_in,
                      const std::optional<at::Tensor>& weight_in, const std::optional<at::Tensor>& base_in, int64_t width,
                      const std::string& reduce) {
  TORCH_CHECK_VALUE(x_in.dim() == 3 && col_in.dim() == 2, "x must be (B, N, C) and col (B, L), got ", x_in.sizes(), " and ", col_in.sizes());
  const at::Tensor x = contiguous_rows(x_in), col = col_in.contiguous();
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2), L = col.size(1);
  check_dtype(col, at::kInt, "col"), check_shape(col, {B, L}, "col"), check_rows(col, N);
  Mix p = {};
  p.dtype = float_of(x), p.reduce = reduce_of(reduce);
  at::Tensor ptr, weight, base;
  if (ptr_in) {
    ptr = ptr_in->contiguous(), check_dtype(ptr, at::kInt, "ptr");
    TORCH_CHECK_VALUE(ptr.dim() == 2 && ptr.size(0) == B && ptr.size(1) >= 1, "ptr must be (B, M + 1), got ", ptr.sizes());
    check_lists(ptr, L), p.ptr = ptr.const_data_ptr<int32_t>();
  } else {
    TORCH_CHECK_VALUE(width >= 1 && L % width == 0, "col has ", L, " entries, not lists of ", width);
  }
  if (weight_in) {
    weight = weight_in->contiguous(), check_dtype(weight, at::kFloat, "weight"), check_shape(weight, {B, L}, "weight");
    p.weight = weight.const_data_ptr<float>();
  }
  p.M = ptr_in ? ptr.size(1) - 1 : L / width;
  if (base_in) {
    base = contiguous_rows(*base_in), check_dtype(base, x.scalar_type(), "base"), check_shape(base, {B, p.M, C}, "base");
    TORCH_CHECK_VALUE(p.reduce == Reduce::sum, "base needs reduce sum, got ", reduce);
    p.base = base.const_data_ptr(), p.base_stride[0] = base.stride(0), p.base_stride[1] = base.stride(1);
  }
  const at::Tensor y = at::empty({B, p.M, C}, x.options());
  if (y.numel() == 0) return y;
  p.x = x.const_data_ptr(), p.x_stride[0] = x.stride(0), p.x_stride[1] = x.stride(1);
  p.col = col.const_data_ptr<int32_t>(), p.y = y.data_ptr(), p.C = C, p.L = L, p.width = width;
  const int64_t grain = 32768 / (C * (L / p.M + 1)) + 1;  // lists: about 5 us of work
  at::parallel_for(0, B * p.M, grain, [&](int64_t begin, int64_t end) { kernels().mix_tokens(p, begin, end); });
  return y;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("mix_tokens", &mix_tokens); }

}  // namespace
}  // namespace pyvit_accel
