// select_tokens, split_tokens, group_tokens: small integer plans, an image at a time.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "../checks.h"
#include "kernels.h"
#include "rank.h"

namespace pyvit_accel {
namespace {

constexpr int64_t kTokens = 4096;  // at least so many for a thread of their own: some 10 us
int64_t images_for(int64_t tokens) { return kTokens / std::max<int64_t>(tokens, 1) + 1; }

at::Tensor ints(const at::Tensor& like, at::IntArrayRef shape) { return at::empty(shape, like.options().dtype(at::kInt)); }

std::tuple<at::Tensor, at::Tensor, at::Tensor> select_tokens(const at::Tensor& scores_in, int64_t keep, int64_t prefix,
                                                             c10::string_view order) {
  const bool half = scores_in.scalar_type() == at::kHalf || scores_in.scalar_type() == at::kBFloat16;
  const at::Tensor scores = (half ? scores_in.to(at::kFloat) : scores_in).contiguous();
  check_dtype(scores, at::kFloat, "scores");
  TORCH_CHECK_VALUE(scores.dim() == 2, "scores must be (B, N), got ", scores.sizes());
  const int64_t B = scores.size(0), N = scores.size(1), n = N - prefix;
  TORCH_CHECK_VALUE(0 <= prefix && 0 <= keep && keep <= n, "keep=", keep, " and a prefix of ", prefix, " do not fit ", N,
                    " tokens");
  const at::Tensor index = ints(scores, {B, prefix + keep}), dropped = ints(scores, {B, n - keep}), inverse = ints(scores, {B, N});
  const float* x = scores.const_data_ptr<float>();
  int32_t *const index_out = index.data_ptr<int32_t>(), *const dropped_out = dropped.data_ptr<int32_t>(),
                 *const inverse_out = inverse.data_ptr<int32_t>();
  const bool by_index = order == "index";
  at::parallel_for(0, B, images_for(N), [&](int64_t begin, int64_t end) {
    uint64_t* const keys = (uint64_t*)scratch(n * sizeof(uint64_t), 2);
    for (int64_t b = begin; b < end; ++b) {
      int32_t *const place = inverse_out + b * N, *const kept = index_out + b * (prefix + keep);
      for (int64_t i = 0; i < n; ++i) keys[i] = rank_key(x[b * N + prefix + i], (uint32_t)(prefix + i));
      rank(keys, n, keep, by_index ? Sorted::none : Sorted::kept);
      for (int64_t i = 0; i < N; ++i) place[i] = i < prefix ? (int32_t)i : -1;
      for (int64_t r = 0; r < keep; ++r) place[token_of(keys[r])] = (int32_t)(prefix + r);
      int32_t next = 0, *drop = dropped_out + b * (n - keep);
      for (int64_t i = 0; i < N; ++i) {
        if (place[i] < 0) {
          *drop++ = (int32_t)i;
        } else {
          if (by_index) place[i] = next++;
          kept[place[i]] = (int32_t)i;
        }
      }
    }
  });
  return {index, dropped, inverse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> split_tokens(const at::Tensor& mask_in, int64_t prefix) {
  check_dtype(mask_in, at::kBool, "mask");
  TORCH_CHECK_VALUE(mask_in.dim() == 2, "mask must be (B, N), got ", mask_in.sizes());
  const at::Tensor mask = mask_in.contiguous();
  const int64_t B = mask.size(0), N = mask.size(1);
  const at::Tensor index = ints(mask, {B, N}), count = ints(mask, {B});
  const at::Tensor cu_seqlens = ints(mask, {B + 1}), rows = ints(mask, {B * N});
  const bool* stays = mask.const_data_ptr<bool>();
  int32_t *const index_out = index.data_ptr<int32_t>(), *const counts = count.data_ptr<int32_t>(),
                 *const ends = cu_seqlens.data_ptr<int32_t>(), *const rows_out = rows.data_ptr<int32_t>();
  at::parallel_for(0, B, images_for(N), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto stay = [&](int64_t i) { return i < prefix || stays[b * N + i]; };
      int64_t kept = 0, others = 0;
      for (int64_t i = 0; i < N; ++i) others += stay(i);
      counts[b] = (int32_t)others;
      for (int64_t i = 0; i < N; ++i) index_out[b * N + (stay(i) ? kept++ : others++)] = (int32_t)i;
    }
  });
  ends[0] = 0;
  for (int64_t b = 0; b < B; ++b) ends[b + 1] = ends[b] + counts[b];
  at::parallel_for(0, B, images_for(N), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t t = 0; t < counts[b]; ++t) rows_out[ends[b] + t] = (int32_t)(b * N + index_out[b * N + t]);
      const int64_t beyond = ends[B] + b * N - ends[b];  // as many -1 as this image has tokens that do not stay
      std::fill(rows_out + beyond, rows_out + beyond + N - counts[b], -1);
    }
  });
  return {index, count, cu_seqlens, rows};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_tokens(const at::Tensor& assign_in, int64_t groups,
                                                                        const std::optional<at::Tensor>& weight_in) {
  check_dtype(assign_in, at::kInt, "assign");
  TORCH_CHECK_VALUE(assign_in.dim() == 2 && groups >= 0, "assign must be (B, N) of 0 or more groups, got ", assign_in.sizes());
  const at::Tensor assign = assign_in.contiguous();
  const int64_t B = assign.size(0), N = assign.size(1);
  at::Tensor weight_of;
  if (weight_in) {
    check_dtype(*weight_in, at::kFloat, "weight"), check_shape(*weight_in, assign.sizes(), "weight");
    weight_of = weight_in->contiguous();
  }
  const at::Tensor ptr = ints(assign, {B, groups + 1}), col = ints(assign, {B, N});
  const at::Tensor weight = at::empty({B, N}, assign.options().dtype(at::kFloat)), total = at::zeros({B, groups}, weight.options());
  const int32_t* const group = assign.const_data_ptr<int32_t>();
  const float* const w = weight_in ? weight_of.const_data_ptr<float>() : nullptr;
  int32_t *const ptr_out = ptr.data_ptr<int32_t>(), *const col_out = col.data_ptr<int32_t>();
  float *const weight_out = weight.data_ptr<float>(), *const total_out = total.data_ptr<float>();
  at::parallel_for(0, B, images_for(N + groups), [&](int64_t begin, int64_t end) {
    int32_t* const next = (int32_t*)scratch((groups + 1) * sizeof(int32_t), 2);
    for (int64_t b = begin; b < end; ++b) {
      int32_t* const first = ptr_out + b * (groups + 1);
      std::fill(first, first + groups + 1, 0);
      for (int64_t i = 0; i < N; ++i) {
        const int32_t g = group[b * N + i];
        TORCH_CHECK_VALUE(-1 <= g && g < groups, "group_tokens: assign[", b, ", ", i, "] is ", g, "; use -1..", groups - 1);
        if (g >= 0) ++first[g + 1];
      }
      for (int64_t g = 0; g < groups; ++g) first[g + 1] += first[g];
      std::copy(first, first + groups, next);
      for (int64_t i = 0; i < N; ++i) {
        const int32_t g = group[b * N + i];
        if (g < 0) continue;
        const float value = w ? w[b * N + i] : 1.f;
        const int64_t at = b * N + next[g]++;
        col_out[at] = (int32_t)i, weight_out[at] = value, total_out[b * groups + g] += value;
      }
      std::fill(col_out + b * N + first[groups], col_out + (b + 1) * N, -1);
      std::fill(weight_out + b * N + first[groups], weight_out + (b + 1) * N, 0.f);
    }
  });
  return {ptr, col, weight, total};
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) {
  m.impl("select_tokens", &select_tokens);
  m.impl("split_tokens", &split_tokens);
  m.impl("group_tokens", &group_tokens);
}

}  // namespace
}  // namespace pyvit_accel
