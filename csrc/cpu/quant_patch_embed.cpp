// quant_patch_embed: uint8 pixels (B, C, H, W), any strides, to (B, P, N): a patch is a row of K = C p p codes, pixel - 128.
#include <cstring>

#include "gemm_op.h"
#include "phases.h"

namespace pyvit_accel {
namespace {

at::Tensor quant_patch_embed(const at::Tensor& images, const at::Tensor& w_packed, const at::Tensor& w_scale_in,
                             const at::Tensor& bias_in, int64_t patch_size) {
  check_dtype(images, at::kByte, "images"), check_dtype(w_scale_in, at::kFloat, "w_scale"), check_dtype(bias_in, at::kFloat, "bias");
  TORCH_CHECK_VALUE(images.dim() == 4, "images must be (B, C, H, W), got ", images.sizes());
  const int64_t B = images.size(0), C = images.size(1), p = patch_size;
  TORCH_CHECK_VALUE(p > 0 && images.size(2) % p == 0 && images.size(3) % p == 0, "image sides must be multiples of ", p, ", got ",
                    images.sizes());
  const int64_t rows = images.size(2) / p, cols = images.size(3) / p, P = rows * cols, K = C * p * p, N = w_scale_in.numel();
  const at::Tensor packed = w_packed.contiguous(), w_scale = w_scale_in.contiguous(), bias = bias_in.contiguous();
  if (bias.dim() == 1) check_shape(bias, {N}, "bias"); else check_shape(bias, {P, N}, "bias");
  const at::Tensor codes = at::empty({B * P, K}, images.options().dtype(at::kChar));
  const at::Tensor out = at::empty({B, P, N}, images.options().dtype(at::kFloat));

  const uint8_t* const src = images.const_data_ptr<uint8_t>();
  int8_t* const dst = codes.data_ptr<int8_t>();
  const auto s = images.strides();
  const auto gather = [&](int64_t m) {  // row m: patch m % P of image m / P
    const uint8_t* patch = src + m / P * s[0] + m % P / cols * p * s[2] + m % cols * p * s[3];
    int8_t* row = dst + m * K;
    for (int64_t c = 0; c < C; ++c)
      for (int64_t y = 0; y < p; ++y, row += p) {
        const uint8_t* line = patch + c * s[1] + y * s[2];
        int64_t x = 0;
        for (; s[3] == 1 && x + 8 <= p; x += 8) {
          uint64_t eight;
          std::memcpy(&eight, line + x, 8);
          eight ^= 0x8080808080808080;
          std::memcpy(row + x, &eight, 8);
        }
        for (; x < p; ++x) row[x] = (int8_t)(line[x * s[3]] ^ 0x80);
      }
  };
  Gemm g = {};
  g.x = dst, g.x_stride = K, g.x_zero_point = -128;
  g.w_packed = packed.const_data_ptr<uint8_t>(), g.w_bits = packed_bits(packed, N, K);
  g.M = B * P, g.N = N, g.K = K;
  g.epilogue = {nullptr, 0, w_scale.const_data_ptr<float>(), bias.const_data_ptr<float>(), bias.dim() == 1 ? 1 : P, N,
                Activation::none, nullptr, nullptr, 0, nullptr, 0, 0, 8, out.data_ptr(), N};
  // A thread gathers the rows it multiplies, so nobody waits between the two.
  const int64_t panel = (g.M + free_threads() - 1) / free_threads();
  at::parallel_for(0, g.M, std::max<int64_t>(panel, 12), [&](int64_t begin, int64_t end) {
    timed(Phase::patch_embed, [&] {
      for (int64_t m = begin; m < end; ++m) gather(m);
      kernels().lowbit_linear(g, begin, end, 0, num_tiles(N));
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("quant_patch_embed", &quant_patch_embed); }

}  // namespace
}  // namespace pyvit_accel
