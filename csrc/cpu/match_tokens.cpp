// match_tokens, merge_pairs, mean_heads: who is like whom, and who goes where.
#include <ATen/Parallel.h>

#include <tuple>

#include "../checks.h"
#include "kernels.h"
#include "rank.h"

namespace pyvit_accel {
namespace {

at::Tensor float_rows(const at::Tensor& x) {
  const bool half = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  return contiguous_rows(half ? x.to(at::kFloat) : x);
}

std::tuple<at::Tensor, at::Tensor> match_tokens(const at::Tensor& a_in, const at::Tensor& b_in, c10::string_view metric,
                                                int64_t topk, int64_t first, const std::optional<at::Tensor>& exclude_in) {
  const at::Tensor a = float_rows(a_in), b = float_rows(b_in);
  check_dtype(a, at::kFloat, "a"), check_dtype(b, at::kFloat, "b");
  TORCH_CHECK_VALUE(a.dim() == 3 && b.dim() == 3, "a and b must be (B, N, D), got ", a.sizes(), " and ", b.sizes());
  const int64_t B = a.size(0), Na = a.size(1), Nb = b.size(1), D = a.size(2);
  check_shape(b, {B, Nb, D}, "b");
  TORCH_CHECK_VALUE(topk >= 1 && 0 <= first && first <= Nb, "topk=", topk, " from token ", first, " of ", Nb);
  at::Tensor exclude;
  if (exclude_in) {
    check_dtype(*exclude_in, at::kInt, "exclude"), check_shape(*exclude_in, {B, Na}, "exclude");
    exclude = exclude_in->contiguous();
  }
  const at::Tensor value = at::empty({B, Na, topk}, a.options()), index = at::empty({B, Na, topk}, a.options().dtype(at::kInt));
  Match p = {};
  p.a = a.const_data_ptr<float>(), p.b = b.const_data_ptr<float>();
  for (int i = 0; i < 2; ++i) p.a_stride[i] = a.stride(i), p.b_stride[i] = b.stride(i);
  p.Na = Na, p.Nb = Nb, p.D = D, p.topk = topk, p.first = first;
  p.metric = metric == "l2" ? Metric::l2 : metric == "dot" ? Metric::dot : Metric::cosine;
  p.exclude = exclude_in ? exclude.const_data_ptr<int32_t>() : nullptr;
  p.value = value.data_ptr<float>(), p.index = index.data_ptr<int32_t>();
  // Images, or where there are fewer of them than threads, runs of their rows; each packs b anew.
  const int64_t parts = std::max<int64_t>(1, std::min(at::get_num_threads() / std::max<int64_t>(B, 1), Na / 16));
  const int64_t rows = (Na + parts - 1) / parts, work = rows * Nb * D;
  at::parallel_for(0, B * parts, 131072 / std::max<int64_t>(work, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().match_tokens(p, i / parts, i % parts * rows, std::min(Na, (i % parts + 1) * rows));
  });
  return {value, index};
}

at::Tensor merge_pairs(const at::Tensor& value_in, const at::Tensor& index_in, int64_t N, int64_t merges, int64_t prefix) {
  check_dtype(value_in, at::kFloat, "value"), check_dtype(index_in, at::kInt, "index");
  TORCH_CHECK_VALUE(value_in.dim() == 2 && value_in.size(1) == (N + 1) / 2, "value must be (B, ", (N + 1) / 2, "), got ",
                    value_in.sizes());
  check_shape(index_in, value_in.sizes(), "index");
  const at::Tensor value = value_in.contiguous(), index = index_in.contiguous();
  const int64_t B = value.size(0), Na = value.size(1), even = (prefix + 1) / 2, odd = prefix / 2, n = Na - even;
  TORCH_CHECK_VALUE(0 <= prefix && prefix <= N && 0 <= merges && merges <= n, merges, " merges of ", N,
                    " tokens, a prefix of ", prefix);
  const at::Tensor rows = at::empty({B, N}, index.options());
  const float* const values = value.const_data_ptr<float>();
  const int32_t* const partner = index.const_data_ptr<int32_t>();
  int32_t* const out = rows.data_ptr<int32_t>();
  const int64_t to_odd = N - merges - N / 2;
  const auto odd_row = [&](int64_t j) { return (int32_t)(j < odd ? 2 * j + 1 : to_odd + j); };
  at::parallel_for(0, B, 4096 / std::max<int64_t>(N, 1) + 1, [&](int64_t begin, int64_t end) {
    uint64_t* const keys = (uint64_t*)scratch(n * sizeof(uint64_t), 2);
    for (int64_t b = begin; b < end; ++b) {
      int32_t* const row = out + b * N;
      for (int64_t i = 0; i < n; ++i) keys[i] = rank_key(values[b * Na + even + i], (uint32_t)(even + i));
      rank(keys, n, merges, prefix == 0 ? Sorted::all : Sorted::none);
      for (int64_t i = 0; i < even; ++i) row[2 * i] = (int32_t)(2 * i);
      for (int64_t i = even; i < Na; ++i) row[2 * i] = -1;
      for (int64_t r = 0; r < merges; ++r) {
        const int64_t i = token_of(keys[r]), j = partner[b * Na + i];
        TORCH_CHECK_VALUE(0 <= j && j < N / 2, "merge_pairs: index[", b, ", ", i, "] is ", j, "; use 0..", N / 2 - 1);
        row[2 * i] = odd_row(j);
      }
      int32_t next = (int32_t)prefix;
      if (prefix == 0)
        for (int64_t r = merges; r < n; ++r) row[2 * token_of(keys[r])] = next++;
      else
        for (int64_t i = even; i < Na; ++i)
          if (row[2 * i] < 0) row[2 * i] = next++;
      for (int64_t j = 0; j < N / 2; ++j) row[2 * j + 1] = odd_row(j);
    }
  });
  return rows;
}

at::Tensor mean_heads(const at::Tensor& x_in, const at::Tensor& scale_in) {
  const bool codes = x_in.scalar_type() == at::kChar;
  const at::Tensor x = codes ? contiguous_rows(x_in) : float_rows(x_in);
  if (!codes) check_dtype(x, at::kFloat, "x");
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (B, H, N, D), got ", x.sizes());
  check_dtype(scale_in, at::kFloat, "scale");
  const at::Tensor scale = scale_in.expand(x.sizes().slice(0, 3));
  const int64_t B = x.size(0), H = x.size(1), N = x.size(2), D = x.size(3);
  const at::Tensor out = at::empty({B, N, D}, x.options().dtype(at::kFloat));
  MeanHeads p = {};
  p.x = x.const_data_ptr(), p.codes = codes, p.scale = scale.const_data_ptr<float>();
  for (int i = 0; i < 3; ++i) p.x_stride[i] = x.stride(i), p.scale_stride[i] = scale.stride(i);
  p.H = H, p.N = N, p.D = D, p.out = out.data_ptr<float>();
  at::parallel_for(0, B * N, 131072 / std::max<int64_t>(H * D, 1) + 1,
                   [&](int64_t begin, int64_t end) { kernels().mean_heads(p, begin, end); });
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) {
  m.impl("match_tokens", &match_tokens);
  m.impl("merge_pairs", &merge_pairs);
  m.impl("mean_heads", &mean_heads);
}

}  // namespace
}  // namespace pyvit_accel
