// What memory safety needs; arguments are checked for the user in pyvit_accel/ops.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <optional>

namespace pyvit_accel {

inline void check_dtype(const at::Tensor& t, at::ScalarType dtype, const char* what) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, what, " must be ", dtype, ", got ", t.scalar_type());
}
inline void check_shape(const at::Tensor& t, at::IntArrayRef shape, const char* what) {
  TORCH_CHECK_VALUE(t.sizes() == shape, what, " must have shape ", shape, ", got ", t.sizes());
}
// A float vector of n values, or of one that serves all; contiguous.
inline at::Tensor float_vector(const at::Tensor& t, int64_t n, const char* what) {
  check_dtype(t, at::kFloat, what);
  TORCH_CHECK_VALUE(t.dim() == 1 && (t.numel() == n || t.numel() == 1), what, " must have shape (", n, ",) or (1,), got ", t.sizes());
  return t.contiguous();
}
// One float for each of n features, or nothing; contiguous.
inline std::optional<at::Tensor> float_features(const std::optional<at::Tensor>& t, int64_t n, const char* what) {
  if (!t) return std::nullopt;
  check_dtype(*t, at::kFloat, what), check_shape(*t, {n}, what);
  return t->contiguous();
}
// int32 values that are indices: memory is reached through them.
inline void check_range(const at::Tensor& t, int64_t lowest, int64_t below, const char* what) {
  const int32_t* p = t.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < t.numel(); ++i)
    TORCH_CHECK_VALUE(lowest <= p[i] && p[i] < below, what, " has ", p[i], ", outside ", lowest, "..", below - 1);
}
inline void check_bits(int64_t bits) { TORCH_CHECK_VALUE(2 <= bits && bits <= 8, "codes have 2 to 8 bits, got ", bits); }
// What takes the place of 8-bit codes, or nothing; contiguous.
inline std::optional<at::Tensor> code_table(const std::optional<at::Tensor>& t, int64_t bits) {
  if (!t) return std::nullopt;
  check_dtype(*t, at::kChar, "table"), check_shape(*t, {256}, "table");
  TORCH_CHECK_VALUE(bits == 8, "a table replaces codes of 8 bits, got ", bits);
  return t->contiguous();
}
inline at::Tensor contiguous_rows(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

}  // namespace pyvit_accel
