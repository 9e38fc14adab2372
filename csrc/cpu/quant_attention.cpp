// quant_attention: int8 q, k, v (B, H, N, D), any strides over contiguous D, to (B, Nq, H * D) float32 or int8 codes.
#include <ATen/ops/zeros.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "attention_op.h"

namespace pyvit_accel {
namespace {

using Maybe = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The public function has broadcast scales and biases to full shape; only their strides differ.
const float* strided(const at::Tensor& t, at::IntArrayRef shape, const char* what, int64_t* stride) {
  check_dtype(t, at::kFloat, what), check_shape(t, shape, what);
  for (int64_t i = 0; i < t.dim(); ++i) stride[i] = t.stride(i);
  return t.const_data_ptr<float>();
}

// Offsets of packed sequences, which bound every access: checked here as well. They may end before the tokens do.
const int32_t* packed_ends(const at::Tensor& t, int64_t tokens, const char* what) {
  check_dtype(t, at::kInt, what);
  TORCH_CHECK_VALUE(t.dim() == 1 && t.is_contiguous() && t.numel() > 1, what, " must be (S + 1,), got ", t.sizes());
  const int32_t* ends = t.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(ends[0] == 0 && ends[t.numel() - 1] <= tokens, what, " must reach from 0 to at most ", tokens);
  for (int64_t i = 1; i < t.numel(); ++i) TORCH_CHECK_VALUE(ends[i - 1] <= ends[i], what, " must ascend");
  return ends;
}

Results quant_attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, const at::Tensor& q_scale,
                        const at::Tensor& k_scale, const at::Tensor& v_scale, double softmax_scale, const Maybe& bias,
                        const Maybe& key_bias, const Maybe& grid_bias_h, const Maybe& grid_bias_w, const Maybe& out_scale_in,
                        const Maybe& p_values, const Maybe& p_thresholds, double p_steps, double p_shift, double p_unit,
                        double p_offset, std::string_view, std::string_view p_anchor, bool p_normalize, int64_t,
                        const Maybe& cu_seqlens_q, const Maybe& cu_seqlens_k, int64_t, bool emit_cls, bool emit_lse,
                        bool emit_columns, const Maybe& q_index_in) {
  const bool float_v = p_values && v_in.scalar_type() != at::kChar;
  for (const at::Tensor* t : {&q_in, &k_in, &v_in}) {
    if (t != &v_in || !float_v) check_dtype(*t, at::kChar, "q, k and v");
    TORCH_CHECK_VALUE(t->dim() == 4, "q, k and v must be (B, H, N, D), got ", t->sizes());
  }
  const at::Tensor q = contiguous_rows(q_in), k = contiguous_rows(k_in);
  const at::Tensor v = contiguous_rows(float_v ? v_in.to(at::kFloat) : v_in);
  const int64_t B = q.size(0), H = q.size(1), rows = q.size(2), Nk = k.size(2), D = q.size(3);
  const int64_t Nq = q_index_in ? q_index_in->size(-1) : rows;
  check_shape(k, {B, H, Nk, D}, "k"), check_shape(v, {B, H, Nk, D}, "v");
  TORCH_CHECK_VALUE(Nk <= kMaxKeys, "at most ", kMaxKeys, " keys, got ", Nk);
  SoftmaxTables tables;
  tables.read(p_values, p_thresholds, p_steps, p_shift, p_unit, p_offset, p_anchor, p_normalize, softmax_scale);
  Attention a = {};
  a.softmax = tables.softmax;
  a.q_scale = strided(q_scale, {B, H, rows}, "q_scale", a.q_scale_stride);
  a.k_scale = strided(k_scale, {B, H, Nk}, "k_scale", a.k_scale_stride);
  const bool per_head = p_values && v_scale.size(-1) == 1;
  a.v_scale = strided(v_scale, {B, H, per_head ? 1 : Nk}, "v_scale", a.v_scale_stride);
  if (per_head) a.v_scale_stride[2] = 0;
  if (bias) a.bias = strided(*bias, {B, H, Nq, Nk}, "bias", a.bias_stride);
  if (key_bias) a.key_bias = strided(*key_bias, {B, Nk}, "key_bias", a.key_bias_stride);
  if (grid_bias_h && grid_bias_w) {
    const int64_t rows = grid_bias_h->size(-1), columns = grid_bias_w->size(-1);
    TORCH_CHECK_VALUE(rows * columns == Nk, "grid_bias is of ", rows, " x ", columns, " keys, k has ", Nk);
    a.grid_h = strided(*grid_bias_h, {B, H, Nq, rows}, "grid_bias", a.grid_h_stride);
    a.grid_w = strided(*grid_bias_w, {B, H, Nq, columns}, "grid_bias", a.grid_w_stride);
    a.grid_columns = columns;
  }
  at::Tensor q_index;
  if (q_index_in) {
    q_index = q_index_in->contiguous();
    check_dtype(q_index, at::kInt, "q_index"), check_shape(q_index, {B, Nq}, "q_index");
    TORCH_CHECK_VALUE(!cu_seqlens_q, "packed sequences take no q_index");
    a.q_index = q_index.const_data_ptr<int32_t>();
    check_range(q_index, 0, rows, "q_index");
  }
  Maybe out_scale;
  if (out_scale_in) out_scale = float_vector(*out_scale_in, H * D, "out_scale");
  int64_t sequences = B;
  if (cu_seqlens_q && cu_seqlens_k) {
    TORCH_CHECK_VALUE(B == 1 && !bias && !a.grid_h, "packed sequences need B=1 and no bias");
    TORCH_CHECK_VALUE(cu_seqlens_q->sizes() == cu_seqlens_k->sizes(), "cu_seqlens must have equal shapes");
    a.q_ends = packed_ends(*cu_seqlens_q, Nq, "cu_seqlens"), a.k_ends = packed_ends(*cu_seqlens_k, Nk, "cu_seqlens_k");
    sequences = cu_seqlens_q->numel() - 1;
  }

  a.q = q.const_data_ptr<int8_t>(), a.k = k.const_data_ptr<int8_t>();
  (float_v ? (void)(a.v_float = v.const_data_ptr<float>()) : (void)(a.v = v.const_data_ptr<int8_t>()));
  for (int i = 0; i < 3; ++i) a.q_stride[i] = q.stride(i), a.k_stride[i] = k.stride(i), a.v_stride[i] = v.stride(i);
  a.softmax_scale = (float)softmax_scale;
  a.H = H, a.Nq = Nq, a.Nk = Nk, a.D = D;
  a.out_scale = out_scale ? out_scale->const_data_ptr<float>() : nullptr;
  a.out_scale_stride = out_scale ? out_scale->numel() > 1 : 0;
  const int64_t q_blocks = query_blocks(a, sequences);
  const auto floats = [&](bool wanted, at::IntArrayRef shape) {
    return at::zeros(wanted ? shape : at::IntArrayRef{0}, q.options().dtype(at::kFloat));
  };
  const at::Tensor out = at::empty({B, Nq, H * D}, q.options().dtype(out_scale ? at::kChar : at::kFloat));
  const at::Tensor cls = floats(emit_cls, {B, H, Nk}), lse = floats(emit_lse, {B, H, Nq});
  const at::Tensor columns = floats(emit_columns, {B, H, q_blocks, Nk});
  a.out = out.data_ptr();
  if (emit_cls) a.cls = cls.data_ptr<float>();
  if (emit_lse) a.lse = lse.data_ptr<float>();
  if (emit_columns) a.columns = columns.data_ptr<float>();
  if (a.q_ends) {  // what lies beyond the last sequence sees no key
    const int64_t end = a.q_ends[sequences];
    out.narrow(1, end, Nq - end).zero_();
    if (emit_lse) lse.narrow(2, end, Nq - end).fill_(-INFINITY);
  }
  if (q.numel()) parallel_attention(a, sequences, q_blocks);
  return {out, emit_cls ? cls.mean(1) : cls, lse, emit_columns ? columns.sum(2) : columns};
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("quant_attention", &quant_attention); }

}  // namespace
}  // namespace pyvit_accel
