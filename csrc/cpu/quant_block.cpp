// quant_block: a pre-norm transformer block on (B, N, C) floats in one call; what each step computes is the other ops'.
//
//   rows    norm1 -> codes -> qkv matmul -> codes of q, k, v
//   heads   attention
//   rows    codes -> projection + residual -> norm2 -> codes -> fc1 -> activation -> codes -> fc2 + residual
//
// Rows depend on each other in the attention alone. So a thread takes a panel of rows through all steps between two
// attentions: what it writes it reads again from its own cache, and nobody waits. With fewer rows than fill the threads'
// tiles, every matmul is divided over the threads instead.
#include <cstring>

#include "attention_op.h"
#include "gemm_op.h"

namespace pyvit_accel {
namespace {

struct Linear {
  at::Tensor w_packed, w_scale;
  std::optional<at::Tensor> bias;
  int64_t N, K;

  Linear(const at::Tensor& w, const at::Tensor& scale, const std::optional<at::Tensor>& b, int64_t k, const char* what)
      : w_packed(w.contiguous()), w_scale(scale.contiguous()), N(scale.numel()), K(k) {
    check_dtype(scale, at::kFloat, what), check_packed(w_packed, N, K);
    if (b) check_dtype(*b, at::kFloat, what), check_shape(*b, {N}, what), bias = b->contiguous();
  }
  Gemm gemm() const {
    Gemm g = {};
    g.x_stride = K, g.w_packed = w_packed.const_data_ptr<uint8_t>(), g.N = N, g.K = K;
    Epilogue& e = g.epilogue;
    e.w_scale = w_scale.const_data_ptr<float>(), e.bias = data_or_null(bias), e.bias_rows = 1, e.out_stride = N;
    return g;
  }
};

std::optional<at::Tensor> features(const std::optional<at::Tensor>& t, int64_t n, const char* what) {
  if (t) check_dtype(*t, at::kFloat, what), check_shape(*t, {n}, what);
  return t ? std::optional<at::Tensor>(t->contiguous()) : std::nullopt;
}
std::optional<at::Tensor> one_or_all(const std::optional<at::Tensor>& t, int64_t n, const char* what) {
  return t ? std::optional<at::Tensor>(float_vector(*t, n, what)) : std::nullopt;
}

struct Norm {
  at::Tensor weight, bias;
  std::optional<at::Tensor> scale;
  Rows rows(double eps) const {
    Rows p = {};
    p.K = weight.numel(), p.x_stride = p.K;
    p.weight = weight.const_data_ptr<float>(), p.bias = bias.const_data_ptr<float>(), p.eps = eps;
    p.scale = data_or_null(scale), p.scale_stride = scale ? scale->numel() > 1 : 0;
    return p;
  }
};
Norm norm_of(const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& scale, int64_t C) {
  return {*features(weight, C, "norm weight"), *features(bias, C, "norm bias"), one_or_all(scale, C, "x_scale")};
}

// Panels of rows: each fits a share of L2 with what is computed from it, and every thread gets equally many.
constexpr int64_t kPanelBytes = 1 << 20, kFewRows = 12, kRowsPerThread = 96;
struct Panels {
  int64_t count, rows;
  Panels(int64_t M, int64_t row_bytes) {
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t most = std::max<int64_t>(kPanelBytes / row_bytes, 4 * kFewRows);
    count = round_up((M + most - 1) / most, threads);
    rows = (M + count - 1) / count;
    count = (M + rows - 1) / rows;
  }
};

at::Tensor quant_block(
    const at::Tensor& x_in, const at::Tensor& norm1_weight, const at::Tensor& norm1_bias, double norm1_eps,
    const std::optional<at::Tensor>& qkv_x_scale, const at::Tensor& qkv_w, const at::Tensor& qkv_w_scale,
    const std::optional<at::Tensor>& qkv_bias, int64_t num_heads, double softmax_scale,
    const std::optional<at::Tensor>& head_scale_in, const at::Tensor& proj_w, const at::Tensor& proj_w_scale,
    const std::optional<at::Tensor>& proj_bias, const std::optional<at::Tensor>& layer_scale1_in, const at::Tensor& norm2_weight,
    const at::Tensor& norm2_bias, double norm2_eps, const std::optional<at::Tensor>& fc1_x_scale, const at::Tensor& fc1_w,
    const at::Tensor& fc1_w_scale, const std::optional<at::Tensor>& fc1_bias, std::string_view activation_name,
    const std::optional<at::Tensor>& fc2_x_scale, int64_t fc2_x_zero_point, std::optional<double> fc2_x_minimum,
    const at::Tensor& fc2_w, const at::Tensor& fc2_w_scale, const std::optional<at::Tensor>& fc2_bias,
    const std::optional<at::Tensor>& layer_scale2_in, int64_t tokens) {
  check_dtype(x_in, at::kFloat, "x");
  TORCH_CHECK_VALUE(x_in.dim() == 3, "x must be (B, N, C), got ", x_in.sizes());
  const at::Tensor x = x_in.contiguous();
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2), H = num_heads, inner = proj_w_scale.numel() ? qkv_w_scale.numel() / 3 : 0;
  TORCH_CHECK_VALUE(H > 0 && inner % H == 0 && qkv_w_scale.numel() == 3 * inner, "qkv has ", qkv_w_scale.numel(),
                    " features, which are not q, k and v of ", H, " heads");
  TORCH_CHECK_VALUE(0 <= tokens && tokens <= N, "tokens must be 0 to ", N, ", got ", tokens);
  TORCH_CHECK_VALUE(N <= kMaxKeys, "at most ", kMaxKeys, " tokens, got ", N);
  const int64_t D = inner / H, hidden = fc1_w_scale.numel();
  const Linear qkv(qkv_w, qkv_w_scale, qkv_bias, C, "qkv"), proj(proj_w, proj_w_scale, proj_bias, inner, "proj");
  const Linear fc1(fc1_w, fc1_w_scale, fc1_bias, C, "fc1"), fc2(fc2_w, fc2_w_scale, fc2_bias, hidden, "fc2");
  check_shape(proj_w_scale, {C}, "proj w_scale"), check_shape(fc2_w_scale, {C}, "fc2 w_scale");
  const Norm norm1 = norm_of(norm1_weight, norm1_bias, qkv_x_scale, C), norm2 = norm_of(norm2_weight, norm2_bias, fc1_x_scale, C);
  const auto layer_scale1 = features(layer_scale1_in, C, "layer_scale1"), layer_scale2 = features(layer_scale2_in, C, "layer_scale2");
  const auto fc2_scale = one_or_all(fc2_x_scale, hidden, "fc2_x_scale");
  at::Tensor head_scale, qkv_scale;
  if (head_scale_in) {
    check_dtype(*head_scale_in, at::kFloat, "head_scale"), check_shape(*head_scale_in, {3, H, 1}, "head_scale");
    head_scale = head_scale_in->contiguous();
    qkv_scale = head_scale.expand({3, H, D}).reshape({3 * inner});
  }
  const Activation activation = parse_activation(activation_name);
  const at::Tensor out = at::empty({B, tokens, C}, x.options());
  if (out.numel() == 0) return out;

  const Kernels& k = kernels();
  const float one = 1;
  // A few images at a time, enough rows for all threads: what the threads share then stays in cache.
  const int64_t images = std::clamp<int64_t>((kRowsPerThread * at::get_num_threads() + N - 1) / N, 1, B);
  for (int64_t first = 0; first < B; first += images) {
  const int64_t b = std::min(images, B - first), M = b * N, Mq = b * tokens;
  const float* const xs = x.const_data_ptr<float>() + first * N * C;
  float* const ys = out.data_ptr<float>() + first * tokens * C;
  // Shared: q, k, v codes, their scales when found at run time, and the attention's output.
  uint8_t* shared = (uint8_t*)scratch(round_up(M * 3 * inner, 64) + 12 * M * H + 64 + Mq * inner * 4, 3);
  int8_t* const codes = (int8_t*)shared;
  float* const scales = (float*)(shared + round_up(M * 3 * inner, 64));
  float* const attended = (float*)((uint8_t*)scales + round_up(12 * M * H, 64));

  const auto at_scale = [&](Gemm& g, const Norm& norm, const float* row_scale) {  // how the codes of a norm are scaled
    const bool fixed = norm.scale.has_value();
    // A scale per channel is contained in the weights.
    g.epilogue.x_scale = !fixed ? row_scale : norm.scale->numel() == 1 ? norm.scale->const_data_ptr<float>() : &one;
    g.epilogue.x_scale_stride = !fixed;
  };

  {  // rows: norm1 and qkv
    const Panels panels(M, C * 5 + inner * 3 * (head_scale_in ? 1 : 5));
    at::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
      const int64_t P = panels.rows;
      uint8_t* own = (uint8_t*)scratch(round_up(P * C, 64) + 4 * P + 64 + (head_scale_in ? 0 : 4 * P * 3 * inner), 2);
      float* const row_scale = (float*)(own + round_up(P * C, 64));
      float* const wide = (float*)((uint8_t*)row_scale + round_up(4 * P, 64));
      for (int64_t m = begin * P; m < std::min(end * P, M); m += P) {
        const int64_t rows = std::min(P, M - m);
        Rows norm = norm1.rows(norm1_eps);
        norm.x = xs + m * C, norm.out = (int8_t*)own, norm.out_scale = row_scale;
        timed(Phase::norm, [&] { k.norm_quant(norm, 0, rows); });
        Gemm g = qkv.gemm();
        g.x = own, g.M = rows, g.then = g.w_packed;
        at_scale(g, norm1, row_scale);
        g.epilogue.out = wide;
        if (head_scale_in) {
          g.epilogue.out = codes + m * 3 * inner;
          g.epilogue.out_scale = qkv_scale.const_data_ptr<float>(), g.epilogue.out_scale_stride = 1;
        }
        timed(Phase::qkv, [&] { k.lowbit_linear(g, 0, rows, 0, round_up(g.N, kTile) / kTile); });
        if (head_scale_in) continue;
        Rows heads = {};
        heads.x = wide, heads.x_stride = heads.K = D, heads.out = codes + m * 3 * inner, heads.out_scale = scales + m * 3 * H;
        timed(Phase::quantize, [&] { k.quantize(heads, 0, rows * 3 * H); });
      }
    });
  }
  {  // heads: attention
    Attention a = {};
    const int8_t** part[] = {&a.q, &a.k, &a.v};
    int64_t* strides[] = {a.q_stride, a.k_stride, a.v_stride};
    const float** scale[] = {&a.q_scale, &a.k_scale, &a.v_scale};
    int64_t* scale_strides[] = {a.q_scale_stride, a.k_scale_stride, a.v_scale_stride};
    for (int i = 0; i < 3; ++i) {
      *part[i] = codes + i * inner;
      strides[i][0] = N * 3 * inner, strides[i][1] = D, strides[i][2] = 3 * inner;
      *scale[i] = head_scale_in ? head_scale.const_data_ptr<float>() + i * H : scales + i * H;
      scale_strides[i][0] = head_scale_in ? 0 : N * 3 * H, scale_strides[i][1] = 1, scale_strides[i][2] = head_scale_in ? 0 : 3 * H;
    }
    a.softmax_scale = (float)softmax_scale;
    a.H = H, a.Nq = tokens, a.Nk = N, a.D = D, a.out = attended;
    parallel_attention(a, b);
  }
  // rows: projection and MLP
  const auto fill = [&](int64_t m, int64_t rows, uint8_t* own, auto&& matmul) {
    // own: codes of the widest layer, a scale per row, and the hidden layer as floats
    int8_t* const own_codes = (int8_t*)own;
    float* const row_scale = (float*)(own + round_up(rows * std::max({inner, C, hidden}), 64));
    float* const wide = (float*)((uint8_t*)row_scale + round_up(4 * rows, 64));
    // Row r of the panel is token (m + r) % tokens of image (m + r) / tokens: its residual lies among N tokens of x.
    const float* residual = xs + m * C;
    if (tokens < N) {
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(ys + (m + r) * C, xs + ((m + r) / tokens * N + (m + r) % tokens) * C, C * sizeof(float));
      residual = ys + m * C;
    }
    Rows q = {};
    q.x = attended + m * inner, q.x_stride = q.K = inner, q.out = own_codes, q.out_scale = row_scale;
    timed(Phase::quantize, [&] { k.quantize(q, 0, rows); });
    Gemm g = proj.gemm();
    g.x = own_codes, g.M = rows, g.then = fc1.w_packed.const_data_ptr<uint8_t>();
    g.epilogue.x_scale = row_scale, g.epilogue.x_scale_stride = 1;
    g.epilogue.layer_scale = data_or_null(layer_scale1);
    g.epilogue.residual = residual, g.epilogue.residual_stride = C, g.epilogue.out = ys + m * C;
    timed(Phase::proj, [&] { matmul(g); });

    Rows norm = norm2.rows(norm2_eps);
    norm.x = ys + m * C, norm.out = own_codes, norm.out_scale = row_scale;
    timed(Phase::norm, [&] { k.norm_quant(norm, 0, rows); });
    g = fc1.gemm();
    g.x = own_codes, g.M = rows, g.then = fc2.w_packed.const_data_ptr<uint8_t>();
    at_scale(g, norm2, row_scale);
    g.epilogue.out = wide;
    const bool fixed = fc2_scale.has_value();
    if (fixed) {
      g.epilogue.activation = activation;
      g.epilogue.out_scale = fc2_scale->const_data_ptr<float>(), g.epilogue.out_scale_stride = fc2_scale->numel() > 1;
      g.epilogue.out_zero_point = fc2_x_zero_point;
    }
    timed(Phase::fc1, [&] { matmul(g); });
    if (!fixed) {
      Rows act = {};
      act.x = wide, act.x_stride = act.K = hidden, act.out = own_codes, act.out_scale = row_scale;
      act.has_minimum = fc2_x_minimum.has_value(), act.minimum = (float)fc2_x_minimum.value_or(0);
      timed(Phase::activation, [&] { k.activate_quantize(act, activation, 0, rows); });
    }
    g = fc2.gemm();
    g.x = fixed ? (void*)wide : own_codes, g.M = rows, g.x_zero_point = fc2_x_zero_point, g.then = proj.w_packed.const_data_ptr<uint8_t>();
    g.epilogue.x_scale = !fixed ? row_scale : fc2_scale->numel() == 1 ? fc2_scale->const_data_ptr<float>() : &one;
    g.epilogue.x_scale_stride = !fixed;
    g.epilogue.layer_scale = data_or_null(layer_scale2);
    g.epilogue.residual = ys + m * C, g.epilogue.residual_stride = C, g.epilogue.out = ys + m * C;
    timed(Phase::fc2, [&] { matmul(g); });
  };
  const int64_t widest = std::max({inner, C, hidden}), row_bytes = widest + 4 * hidden + 4 * inner;
  const auto own_bytes = [&](int64_t rows) { return round_up(rows * widest, 64) + round_up(4 * rows, 64) + 4 * rows * hidden; };
  if (Mq < kFewRows * at::get_num_threads() && !at::in_parallel_region()) {
    fill(0, Mq, (uint8_t*)scratch(own_bytes(Mq), 2), [&](const Gemm& g) { parallel_gemm(g, k.lowbit_linear); });
  } else {
    const Panels panels(Mq, row_bytes);
    at::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
      uint8_t* own = (uint8_t*)scratch(own_bytes(panels.rows), 2);
      for (int64_t m = begin * panels.rows; m < std::min(end * panels.rows, Mq); m += panels.rows)
        fill(m, std::min(panels.rows, Mq - m), own,
             [&](const Gemm& g) { k.lowbit_linear(g, 0, g.M, 0, round_up(g.N, kTile) / kTile); });
    });
  }
  }
  return out;
}

TORCH_LIBRARY_IMPL(pyvit_accel, CPU, m) { m.impl("quant_block", &quant_block); }

}  // namespace
}  // namespace pyvit_accel
