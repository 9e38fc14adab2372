// Rows of a result that are computed from, or added to, rows that an index names: the live ones one after the other, so
// that a packed list with -1 at its end costs what its live rows cost.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "../checks.h"

namespace pyvit_accel {

class RowMap {
 public:
  int64_t size;  // rows of the result
  int64_t live;
  const int32_t *from = nullptr, *to = nullptr;  // (live,): the row of x and of the result of each; null: row i

  // index (size,): row m is computed from row index[m] of `rows`, none below 0. Nothing: from row m.
  // out_index (size,): and goes to row out_index[m] of `out_rows`, none below 0. Nothing: to row m.
  RowMap(int64_t rows, const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& out_index = std::nullopt,
         int64_t out_rows = 0)
      : size(index ? index->numel() : rows), live(size), mapped_(index || out_index) {
    if (!mapped_) return;
    const at::Tensor sources = checked(index, rows, "index"), targets = checked(out_index, out_rows, "out_index");
    const int32_t *source = sources.defined() ? sources.const_data_ptr<int32_t>() : nullptr;
    const int32_t *target = targets.defined() ? targets.const_data_ptr<int32_t>() : nullptr;
    if (out_index) check_shape(targets, {size}, "out_index");
    from_.reserve(size), to_.reserve(size);
    bool same_from = true, same_to = true;
    for (int64_t m = 0; m < size; ++m) {
      const int32_t f = source ? source[m] : (int32_t)m, t = target ? target[m] : (int32_t)m;
      if (f < 0 || t < 0) {
        none_.push_back((int32_t)m);
        continue;
      }
      const int32_t i = (int32_t)from_.size();
      same_from &= f == i, same_to &= t == i;
      from_.push_back(f), to_.push_back(t);
    }
    live = (int64_t)from_.size();
    if (!same_from) from = from_.data();
    if (!same_to) to = to_.data();
  }

  // Zeros, in rows of so many bytes, where nothing is computed.
  void clear(void* out, int64_t bytes) const {
    at::parallel_for(0, (int64_t)none_.size(), 262144 / std::max<int64_t>(bytes, 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::memset((char*)out + none_[i] * bytes, 0, bytes);
    });
  }
  // And the scale 1.
  void clear_scale(float* scale) const {
    for (const int32_t m : none_) scale[m] = 1;
  }

  // The scales of the live rows, first: one for all as it is, or those of their rows of x (rows,).
  at::Tensor scales(const at::Tensor& x_scale, int64_t rows) const {
    const at::Tensor all = float_vector(x_scale, rows, "x_scale");
    if (!mapped_ || all.numel() == 1) return all;
    const at::Tensor own = at::empty({size}, all.options());
    const float* src = all.const_data_ptr<float>();
    float* dst = own.data_ptr<float>();
    for (int64_t i = 0; i < live; ++i) dst[i] = src[from_[i]];
    return own;
  }

 private:
  bool mapped_;
  std::vector<int32_t> from_, to_, none_;

  static at::Tensor checked(const std::optional<at::Tensor>& t, int64_t rows, const char* what) {
    if (!t) return {};
    check_dtype(*t, at::kInt, what);
    TORCH_CHECK_VALUE(t->dim() == 1, what, " must be (M,), got ", t->sizes());
    const at::Tensor index = t->contiguous();
    for (int64_t m = 0; m < index.numel(); ++m) {
      const int32_t row = index.const_data_ptr<int32_t>()[m];
      TORCH_CHECK_VALUE(row < rows, what, " names row ", row, ", but there are ", rows, "; use -1 for none");
    }
    return index;
  }
};

}  // namespace pyvit_accel
