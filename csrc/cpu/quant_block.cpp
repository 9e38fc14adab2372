// quant_block: a pre-norm transformer block on (B, N, C) floats in one call; what each step computes is the other ops'.
//
//   rows    norm1 -> codes -> qkv matmul -> codes of q, k, v
//   heads   attention
//   rows    codes -> projection + residual -> norm2 -> codes -> fc1 -> activation -> codes -> fc2 + residual
//
// Rows depend on each other in the attention alone. So a thread takes a panel of rows through all steps between two
// attentions: what it writes it reads again from its own cache, and nobody waits. With fewer rows than fill the threads'
// tiles, every matmul is divided over the threads instead.
#include "attention_op.h"
#include "block.h"

namespace pyvit_accel {
namespace {

constexpr int64_t kRowsPerThread = 96;

struct Block {
  Norm norm1;
  Linear qkv;
  Projection projection;
  FeedForward mlp;
  std::optional<at::Tensor> head_scale, qkv_scale;
  int64_t head_bits;
  int64_t N, C, H, D, tokens;  // of one image; tokens: how many are wanted
  float softmax_scale;
  Softmax softmax;

  int64_t inner() const { return H * D; }

  // What the threads share for some images: q, k, v codes, their scales when found at run time, the attention's output.
  struct Shared {
    int8_t* codes;
    float *scales, *attended;
    Shared(const Block& b, int64_t images) {
      const int64_t M = images * b.N, code_bytes = round_up(M * 3 * b.inner(), 64), scale_bytes = round_up(12 * M * b.H, 64);
      uint8_t* p = (uint8_t*)scratch(code_bytes + scale_bytes + images * b.tokens * b.inner() * 4, 3);
      codes = (int8_t*)p, scales = (float*)(p + code_bytes), attended = (float*)(p + code_bytes + scale_bytes);
    }
  };

  void run(const float* x, float* out, int64_t images) const {
    const Shared shared(*this, images);
    to_qkv(x, shared, images * N);
    attend(shared, images);
    from_attention(x, shared, out, images * tokens);
  }

  void to_qkv(const float* x, const Shared& shared, int64_t M) const {
    const Kernels& k = kernels();
    const int64_t wide_bytes = head_scale ? 0 : 12 * inner();
    const Panels panels(M, 5 * C + 3 * inner() + wide_bytes);
    panels.each(M, [&](int64_t m, int64_t rows) {
      uint8_t* const own = (uint8_t*)scratch(round_up(panels.rows * C, 64) + round_up(4 * panels.rows, 64) + panels.rows * wide_bytes, 2);
      float* const row_scale = (float*)(own + round_up(panels.rows * C, 64));
      float* const wide = (float*)((uint8_t*)row_scale + round_up(4 * panels.rows, 64));
      int8_t* const codes = shared.codes + m * 3 * inner();
      norm1.run(qkv, x + m * C, rows, own, row_scale);
      Gemm g = qkv.gemm();
      g.x = own, g.M = rows, g.then = g.w_packed;
      norm1.read(g, row_scale);
      g.epilogue.out = wide;
      if (head_scale) g.epilogue.out = codes, g.epilogue.out_scale = data_or_null(qkv_scale), g.epilogue.out_scale_stride = 1, g.epilogue.out_bits = head_bits;
      timed(Phase::qkv, [&] { k.lowbit_linear(g, 0, rows, 0, num_tiles(g.N)); });
      if (head_scale) return;
      Rows heads = {};
      heads.x = wide, heads.x_stride = heads.K = D, heads.out = codes, heads.out_scale = shared.scales + m * 3 * H, heads.bits = head_bits;
      timed(Phase::quantize, [&] { k.quantize(heads, 0, rows * 3 * H); });
    });
  }

  void attend(const Shared& shared, int64_t images) const {
    Attention a = {};
    const auto part = [&](int i, const int8_t*& codes, int64_t* stride, const float*& scale, int64_t* scale_stride) {
      codes = shared.codes + i * inner();
      stride[0] = N * 3 * inner(), stride[1] = D, stride[2] = 3 * inner();
      scale = head_scale ? head_scale->const_data_ptr<float>() + i * H : shared.scales + i * H;
      scale_stride[0] = head_scale ? 0 : N * 3 * H, scale_stride[1] = 1, scale_stride[2] = head_scale ? 0 : 3 * H;
    };
    part(0, a.q, a.q_stride, a.q_scale, a.q_scale_stride);
    part(1, a.k, a.k_stride, a.k_scale, a.k_scale_stride);
    part(2, a.v, a.v_stride, a.v_scale, a.v_scale_stride);
    a.softmax_scale = softmax_scale, a.softmax = softmax;
    a.H = H, a.Nq = tokens, a.Nk = N, a.D = D, a.out = shared.attended;
    parallel_attention(a, images, query_blocks(a, images));
  }

  void from_attention(const float* x, const Shared& shared, float* out, int64_t M) const {
    const int64_t hidden = mlp.hidden(), widest = std::max({inner(), C, hidden});
    in_panels(
        M, widest + 4 * hidden + 4 * inner(),
        [&](int64_t rows) { return round_up(rows * widest, 64) + round_up(4 * rows, 64) + 4 * rows * hidden; },
        [&](int64_t m, int64_t rows, uint8_t* own, auto&& matmul) {
          float* const row_scale = (float*)(own + round_up(rows * widest, 64));
          float* const wide = (float*)((uint8_t*)row_scale + round_up(4 * rows, 64));
          float* const y = out + m * C;
          const float* residual = x + m * C;
          if (tokens < N) {  // row m is token m % tokens of image m / tokens: its residual lies among N tokens of x
            for (int64_t r = m; r < m + rows; ++r)
              std::memcpy(out + r * C, x + (r / tokens * N + r % tokens) * C, C * sizeof(float));
            residual = y;
          }
          projection.rows(shared.attended + m * inner(), residual, y, rows, own, row_scale, mlp.fc1.weights(), matmul);
          mlp.rows(y, y, rows, own, row_scale, wide, projection.proj.weights(), matmul);
        });
  }
};

at::Tensor quant_block(
    const at::Tensor& x_in, const at::Tensor& norm1_weight, const at::Tensor& norm1_bias, double norm1_eps,
    const std::optional<at::Tensor>& qkv_x_scale, int64_t qkv_x_bits, double qkv_x_clip, const at::Tensor& qkv_w,
    const at::Tensor& qkv_w_scale, const std::optional<at::Tensor>& qkv_bias, int64_t num_heads, double softmax_scale,
    const std::optional<at::Tensor>& head_scale, int64_t head_bits,
    const std::optional<at::Tensor>& p_values, double p_steps, std::string_view, int64_t proj_x_bits, double proj_x_clip,
    const at::Tensor& proj_w, const at::Tensor& proj_w_scale, const std::optional<at::Tensor>& proj_bias,
    const std::optional<at::Tensor>& layer_scale1, const at::Tensor& norm2_weight, const at::Tensor& norm2_bias,
    double norm2_eps, const std::optional<at::Tensor>& fc1_x_scale, int64_t fc1_x_bits, double fc1_x_clip,
    const at::Tensor& fc1_w, const at::Tensor& fc1_w_scale, const std::optional<at::Tensor>& fc1_bias,
    std::string_view activation, const std::optional<at::Tensor>& fc2_x_scale, int64_t fc2_x_bits, double fc2_x_clip,
    int64_t fc2_x_zero_point, std::optional<double> fc2_x_minimum, const std::optional<at::Tensor>& fc2_x_table,
    const at::Tensor& fc2_w, const at::Tensor& fc2_w_scale, const std::optional<at::Tensor>& fc2_bias,
    const std::optional<at::Tensor>& layer_scale2, int64_t tokens) {
  check_dtype(x_in, at::kFloat, "x");
  TORCH_CHECK_VALUE(x_in.dim() == 3, "x must be (B, N, C), got ", x_in.sizes());
  const at::Tensor x = x_in.contiguous();
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2), H = num_heads, inner = qkv_w_scale.numel() / 3;
  TORCH_CHECK_VALUE(H > 0 && inner > 0 && inner % H == 0 && qkv_w_scale.numel() == 3 * inner, "qkv has ", qkv_w_scale.numel(),
                    " features, which are not q, k and v of ", H, " heads");
  TORCH_CHECK_VALUE(0 <= tokens && tokens <= N, "tokens must be 0 to ", N, ", got ", tokens);
  TORCH_CHECK_VALUE(N <= kMaxKeys, "at most ", kMaxKeys, " tokens, got ", N);
  check_shape(proj_w_scale, {C}, "proj w_scale");
  const int64_t D = inner / H;
  std::optional<at::Tensor> qkv_scale;
  if (head_scale) {
    check_dtype(*head_scale, at::kFloat, "head_scale"), check_shape(*head_scale, {3, H, 1}, "head_scale");
    qkv_scale = head_scale->expand({3, H, D}).reshape({3 * inner});
  }
  check_bits(head_bits);
  SoftmaxTables tables;
  tables.read(p_values, std::nullopt, p_steps, 0, 1, 0, "max", true, softmax_scale);
  const Block block = {
      norm_of(norm1_weight, norm1_bias, qkv_x_scale, norm1_eps, C),
      Linear(qkv_w, qkv_w_scale, qkv_bias, C, qkv_x_bits, qkv_x_clip, "qkv"),
      {Linear(proj_w, proj_w_scale, proj_bias, inner, proj_x_bits, proj_x_clip, "proj"), float_features(layer_scale1, C, "layer_scale1")},
      feed_forward(C, norm2_weight, norm2_bias, norm2_eps, fc1_x_scale, fc1_x_bits, fc1_x_clip, fc1_w, fc1_w_scale, fc1_bias, activation,
                   fc2_x_scale, fc2_x_bits, fc2_x_clip, fc2_x_zero_point, fc2_x_minimum, fc2_x_table, fc2_w, fc2_w_scale, fc2_bias,
                   layer_scale2),
      head_scale ? std::optional<at::Tensor>(head_scale->contiguous()) : std::nullopt, qkv_scale, head_bits, N, C, H, D, tokens,
      (float)softmax_scale, tables.softmax};
  const at::Tensor out = at::empty({B, tokens, C}, x.options());
  if (out.numel() == 0) return out;
  // A few images at a time, enough rows for all threads: what the threads share then stays in cache.
  const int64_t images = std::clamp<int64_t>((kRowsPerThread * at::get_num_threads() + N - 1) / N, 1, B);
  for (int64_t b = 0; b < B; b += images)
    block.run(x.const_data_ptr<float>() + b * N * C, out.data_ptr<float>() + b * tokens * C, std::min(images, B - b));
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("quant_block", &quant_block); }

}  // namespace
}  // namespace pyvit_accel
