// codebook_linear: codes (M, K) of levels x packed codes (N, K) of levels, then the epilogue; float32 or int8 codes out.
//
// Levels that are int8 times a power of two, as powers of two and uniform codes are, multiply as int8: exact sums, at the
// speed of lowbit_linear. All others, fp8 among them, for which these processors have no unit, multiply as float32.
// Weights stay packed; a panel of them is decoded for all rows that pass it.
#include <ATen/ops/mul.h>

#include <cmath>

#include "gemm_op.h"

namespace pyvit_accel {
namespace {

// Levels as int8 * 2^exponent, those of codes that do not occur (NaN) as zero; or nothing.
struct Integers {
  std::vector<int8_t> levels;
  int exponent;
};
std::optional<Integers> integers(const at::Tensor& lut) {
  const float* level = lut.const_data_ptr<float>();
  float lowest = 0, highest = 0;
  for (int64_t i = 0; i < lut.numel(); ++i) lowest = std::fmin(lowest, level[i]), highest = std::fmax(highest, level[i]);
  if (!std::isfinite(lowest) || !std::isfinite(highest)) return std::nullopt;
  Integers found = {std::vector<int8_t>(lut.numel()), 0};
  if (lowest == 0 && highest == 0) return found;
  // The smallest power of two that brings all of them into -128 .. 127: a smaller one is out of range, a larger one loses bits.
  int e = std::max(lowest < 0 ? std::ilogb(-lowest) : -200, highest > 0 ? std::ilogb(highest) : -200) - 7;
  while (std::ldexp(lowest, -e) < -128 || std::ldexp(highest, -e) > 127) ++e;
  for (int64_t i = 0; i < lut.numel(); ++i) {
    const float v = std::isnan(level[i]) ? 0.f : std::ldexp(level[i], -e);
    if (v != std::rint(v)) return std::nullopt;
    found.levels[i] = (int8_t)v;
  }
  found.exponent = e;
  return found;
}

template <class T>
at::Tensor decode(const at::Tensor& x, const T* table, int64_t count) {
  const int64_t M = x.size(0), K = x.size(1);
  const at::Tensor out = at::empty({M, K}, x.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* const data = out.data_ptr<T>();
  bool uniform = count == 256;  // levels -128 .. 127: a subtraction, which the compiler does many at a time
  for (int64_t i = 0; i < 256 && uniform; ++i) uniform = table[i] == (T)(i - 128);
  at::parallel_for(0, M, std::max<int64_t>(1, 32768 / K), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const uint8_t* const code = x.const_data_ptr<uint8_t>() + m * x.stride(0);
      T* const to = data + m * K;
      uint8_t last = 0;
      for (int64_t k = 0; k < K; ++k) last = std::max(last, code[k]);
      TORCH_CHECK_VALUE(last < count, "x holds code ", (int)last, ", but x_lut has ", count, " levels");
      if (uniform)
        for (int64_t k = 0; k < K; ++k) to[k] = (T)((int)code[k] - 128);
      else
        for (int64_t k = 0; k < K; ++k) to[k] = table[code[k]];
    }
  });
  return out;
}

at::Tensor codebook_linear(const at::Tensor& x_in, const at::Tensor& x_scale, const at::Tensor& x_lut_in,
                           const at::Tensor& w_packed, const at::Tensor& w_scale, const at::Tensor& w_lut_in,
                           const std::optional<at::Tensor>& bias, std::string_view operand, std::string_view activation,
                           const std::optional<at::Tensor>& layer_scale, const std::optional<at::Tensor>& residual,
                           const std::optional<at::Tensor>& out_scale, int64_t out_zero_point, int64_t out_bits) {
  check_dtype(x_in, at::kByte, "x");
  TORCH_CHECK_VALUE(x_in.dim() == 2, "x must be (M, K), got ", x_in.sizes());
  const at::Tensor x = contiguous_rows(x_in), packed = w_packed.contiguous();
  const int64_t M = x.size(0), K = x.size(1), N = w_scale.numel(), bits = packed_bits(packed, N, K);
  TORCH_CHECK_VALUE(x_lut_in.dim() == 1, "x_lut must be (L,), got ", x_lut_in.sizes());
  const at::Tensor x_lut = *float_features(x_lut_in, x_lut_in.numel(), "x_lut");
  const at::Tensor w_lut = *float_features(w_lut_in, (int64_t)1 << bits, "w_lut");
  const auto x_int = integers(x_lut), w_int = integers(w_lut);
  const bool exact = x_int && w_int;
  at::Tensor scale = w_scale;
  if (exact && x_int->exponent + w_int->exponent) scale = at::mul(w_scale, std::ldexp(1., x_int->exponent + w_int->exponent));
  Finish finish(M, x_scale, scale, bias, layer_scale, residual, out_scale, out_bits);

  Gemm g = {};
  g.w_packed = packed.const_data_ptr<uint8_t>(), g.w_bits = bits;
  g.M = M, g.N = N, g.K = K, g.x_stride = K, g.epilogue = finish.epilogue(activation, out_zero_point, out_bits);
  at::Tensor values;
  if (exact) {
    int8_t levels[256] = {};  // of the codes -128 .. 127, of which the weights have the middle ones
    std::copy(w_int->levels.begin(), w_int->levels.end(), levels + 128 - (1 << (bits - 1)));
    values = decode(x, x_int->levels.data(), x_lut.numel());
    g.x = values.const_data_ptr(), g.w_levels = levels;
    parallel_gemm(g, kernels().lowbit_linear);
  } else {
    values = decode(x, x_lut.const_data_ptr<float>(), x_lut.numel());
    g.x = values.const_data_ptr(), g.w_lut = w_lut.const_data_ptr<float>();
    parallel_gemm(g, kernels().weight_only_linear);
  }
  return finish.out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("codebook_linear", &codebook_linear); }

}  // namespace
}  // namespace pyvit_accel
