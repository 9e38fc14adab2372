// quant_attention: int8 q, k, v (B, H, N, D), any strides over contiguous D, to (B, Nq, H * D) float32 or int8 codes.
#include <optional>

#include "../checks.h"
#include "attention_op.h"

namespace pyvit_accel {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Results quant_attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, const at::Tensor& q_scale,
                           const at::Tensor& k_scale, const at::Tensor& v_scale, double softmax_scale,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& key_bias,
                           const std::optional<at::Tensor>& grid_bias_h, const std::optional<at::Tensor>& grid_bias_w,
                           const std::optional<at::Tensor>& out_scale_in, const std::optional<at::Tensor>& p_values,
                           const std::optional<at::Tensor>& p_thresholds, double p_steps, double p_shift, double p_unit,
                           double p_offset, std::string_view p_operand, std::string_view p_anchor, bool p_normalize,
                           int64_t v_bits, const std::optional<at::Tensor>& cu_seqlens_q,
                           const std::optional<at::Tensor>& cu_seqlens_k, int64_t max_seqlen, bool emit_cls, bool emit_lse,
                           bool emit_columns) {
  const at::Tensor none = at::empty({0}, q_in.options().dtype(at::kFloat));
  TORCH_CHECK(!p_values && !grid_bias_h && !grid_bias_w && !cu_seqlens_q && !emit_cls && !emit_lse && !emit_columns, "not yet");
  for (const at::Tensor* t : {&q_in, &k_in, &v_in}) {
    check_dtype(*t, at::kChar, "q, k and v");
    TORCH_CHECK_VALUE(t->dim() == 4, "q, k and v must be (B, H, N, D), got ", t->sizes());
  }
  const at::Tensor q = contiguous_rows(q_in), k = contiguous_rows(k_in), v = contiguous_rows(v_in);
  const int64_t B = q.size(0), H = q.size(1), Nq = q.size(2), Nk = k.size(2), D = q.size(3);
  check_shape(k, {B, H, Nk, D}, "k"), check_shape(v, {B, H, Nk, D}, "v");
  TORCH_CHECK_VALUE(Nk <= kMaxKeys, "at most ", kMaxKeys, " keys, got ", Nk);
  Attention a = {};
  // The public function has broadcast scales and biases to full shape; only their strides differ.
  const auto read = [](const at::Tensor& t, at::IntArrayRef shape, const char* what, int64_t* stride) {
    check_dtype(t, at::kFloat, what), check_shape(t, shape, what);
    for (int64_t i = 0; i < t.dim(); ++i) stride[i] = t.stride(i);
    return t.const_data_ptr<float>();
  };
  a.q_scale = read(q_scale, {B, H, Nq}, "q_scale", a.q_scale_stride);
  a.k_scale = read(k_scale, {B, H, Nk}, "k_scale", a.k_scale_stride);
  a.v_scale = read(v_scale, {B, H, Nk}, "v_scale", a.v_scale_stride);
  if (bias) a.bias = read(*bias, {B, H, Nq, Nk}, "bias", a.bias_stride);
  if (key_bias) a.key_bias = read(*key_bias, {B, Nk}, "key_bias", a.key_bias_stride);
  std::optional<at::Tensor> out_scale;
  if (out_scale_in) out_scale = float_vector(*out_scale_in, H * D, "out_scale");
  const at::Tensor out = at::empty({B, Nq, H * D}, q.options().dtype(out_scale ? at::kChar : at::kFloat));

  a.q = q.const_data_ptr<int8_t>(), a.k = k.const_data_ptr<int8_t>(), a.v = v.const_data_ptr<int8_t>();
  for (int i = 0; i < 3; ++i) a.q_stride[i] = q.stride(i), a.k_stride[i] = k.stride(i), a.v_stride[i] = v.stride(i);
  a.softmax_scale = (float)softmax_scale;
  a.H = H, a.Nq = Nq, a.Nk = Nk, a.D = D;
  a.out_scale = out_scale ? out_scale->const_data_ptr<float>() : nullptr;
  a.out_scale_stride = out_scale ? out_scale->numel() > 1 : 0;
  a.out = out.data_ptr();
  if (out.numel() == 0) return {out, none, none, none};
  if (Nk == 0) return {out.zero_(), none, none, none};
  parallel_attention(a, B);
  return {out, none, none, none};
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("quant_attention", &quant_attention); }

}  // namespace
}  // namespace pyvit_accel
