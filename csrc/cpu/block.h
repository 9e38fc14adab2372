// Shared by quant_block, quant_project and quant_mlp: the parts of a block, on a panel of rows.
#pragma once
#include <algorithm>
#include <cstring>

#include "gemm_op.h"
#include "phases.h"

namespace pyvit_accel {

struct Linear {
  at::Tensor w_packed, w_scale;
  std::optional<at::Tensor> bias;
  int64_t N, K, w_bits, x_bits;
  float x_clip;

  Linear(const at::Tensor& w, const at::Tensor& scale, const std::optional<at::Tensor>& b, int64_t k, int64_t bits,
         double clip, const char* what)
      : w_packed(w.contiguous()), w_scale(scale.contiguous()), bias(float_features(b, scale.numel(), what)),
        N(scale.numel()), K(k), w_bits(packed_bits(w_packed, N, K)), x_bits(bits), x_clip((float)clip) {
    check_dtype(scale, at::kFloat, what), check_bits(x_bits);
  }
  const uint8_t* weights() const { return w_packed.const_data_ptr<uint8_t>(); }
  Gemm gemm() const {
    Gemm g = {};
    g.x_stride = K, g.w_packed = weights(), g.w_bits = w_bits, g.N = N, g.K = K;
    Epilogue& e = g.epilogue;
    e.w_scale = w_scale.const_data_ptr<float>(), e.bias = data_or_null(bias), e.bias_rows = 1, e.out_stride = N;
    return g;
  }
  // The codes it reads, of rows of floats.
  void set_codes(Rows& p) const { p.bits = x_bits, p.clip = x_clip; }
};

inline std::optional<at::Tensor> one_or_all(const std::optional<at::Tensor>& t, int64_t n, const char* what) {
  return t ? std::optional<at::Tensor>(float_vector(*t, n, what)) : std::nullopt;
}
inline void read_rows(Gemm& g, const float* row_scale) { g.epilogue.x_scale = row_scale, g.epilogue.x_scale_stride = 1; }
inline void read_static(Gemm& g, const at::Tensor& scale) {  // one per channel is contained in the weights
  if (scale.numel() == 1) g.epilogue.x_scale = scale.const_data_ptr<float>();
}
inline void add_to(Gemm& g, const float* residual, const std::optional<at::Tensor>& layer_scale, float* y) {
  g.epilogue.layer_scale = data_or_null(layer_scale);
  g.epilogue.residual = residual, g.epilogue.residual_stride = g.N, g.epilogue.out = y;
}

struct Norm {
  at::Tensor weight, bias;
  std::optional<at::Tensor> scale;
  double eps;
  Rows rows() const {
    Rows p = {};
    p.K = weight.numel(), p.x_stride = p.K;
    p.weight = weight.const_data_ptr<float>(), p.bias = bias.const_data_ptr<float>(), p.eps = eps;
    p.scale = data_or_null(scale), p.scale_stride = scale ? scale->numel() > 1 : 0;
    return p;
  }
  void run(const Linear& reader, const float* x, int64_t rows, uint8_t* codes, float* row_scale) const {
    Rows p = this->rows();
    p.x = x, p.out = (int8_t*)codes, p.out_scale = row_scale;
    reader.set_codes(p);
    timed(Phase::norm, [&] { kernels().norm_quant(p, 0, rows); });
  }
  void read(Gemm& g, const float* row_scale) const { scale ? read_static(g, *scale) : read_rows(g, row_scale); }
};
inline Norm norm_of(const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& scale, double eps, int64_t C) {
  return {*float_features(weight, C, "norm weight"), *float_features(bias, C, "norm bias"), one_or_all(scale, C, "x_scale"), eps};
}

// Panels of rows: each fits a share of L2 with what is computed from it, and every thread gets equally many.
constexpr int64_t kPanelBytes = 1 << 20, kFewRows = 12;
struct Panels {
  int64_t count, rows;  // rows: of the largest panel
  Panels(int64_t M, int64_t row_bytes) {
    const int64_t threads = free_threads();
    const int64_t most = std::max<int64_t>(kPanelBytes / row_bytes, 4 * kFewRows);
    count = std::min(round_up((M + most - 1) / most, threads), M);
    rows = (M + count - 1) / count;
  }
  template <class F>
  void each(int64_t M, F&& f) const {  // f(first row, number of rows), on the threads
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(M * i / count, M * (i + 1) / count - M * i / count);
    });
  }
};

// f(first row, number of rows, own memory, how to multiply) for all M rows: panels, or, with fewer rows than fill the
// threads' tiles, all at once with every matmul divided over the threads. own_bytes(rows) is what a panel needs.
template <class Bytes, class F>
void in_panels(int64_t M, int64_t row_bytes, Bytes&& own_bytes, F&& f) {
  if (free_threads() > 1 && M < kFewRows * free_threads()) {
    f(0, M, (uint8_t*)scratch(own_bytes(M), 2), [](Phase phase, const Gemm& g) {
      parallel_gemm(g, [phase](const Gemm& g, int64_t m0, int64_t m1, int64_t t0, int64_t t1) {
        timed(phase, [&] { kernels().lowbit_linear(g, m0, m1, t0, t1); });
      });
    });
    return;
  }
  const Panels panels(M, row_bytes);
  panels.each(M, [&](int64_t m, int64_t rows) {
    f(m, rows, (uint8_t*)scratch(own_bytes(panels.rows), 2), [](Phase phase, const Gemm& g) {
      timed(phase, [&] { kernels().lowbit_linear(g, 0, g.M, 0, num_tiles(g.N)); });
    });
  });
}

// y = residual + layer_scale proj(codes of x), a scale per row.
struct Projection {
  Linear proj;
  std::optional<at::Tensor> layer_scale;

  // codes: memory of K bytes a row.
  template <class Matmul>
  void rows(const float* x, const float* residual, float* y, int64_t rows, uint8_t* codes, float* row_scale, const uint8_t* then,
            Matmul&& matmul) const {
    Rows q = {};
    q.x = x, q.x_stride = q.K = proj.K, q.out = (int8_t*)codes, q.out_scale = row_scale;
    proj.set_codes(q);
    timed(Phase::quantize, [&] { kernels().quantize(q, 0, rows); });
    Gemm g = proj.gemm();
    g.x = codes, g.M = rows, g.then = then;
    read_rows(g, row_scale);
    add_to(g, residual, layer_scale, y);
    matmul(Phase::proj, g);
  }
};

// out = y + layer_scale fc2(activation(fc1(norm(y)))).
struct FeedForward {
  Norm norm;
  Linear fc1, fc2;
  std::optional<at::Tensor> layer_scale, fc2_scale;
  Activation activation;
  int64_t fc2_zero_point;
  std::optional<double> fc2_minimum;
  std::optional<at::Tensor> fc2_table;

  int64_t hidden() const { return fc1.N; }

  // codes: memory of max(C, hidden) bytes a row; wide: hidden floats a row. out may be y.
  template <class Matmul>
  void rows(const float* y, float* out, int64_t rows, uint8_t* codes, float* row_scale, float* wide, const uint8_t* then,
            Matmul&& matmul) const {
    norm.run(fc1, y, rows, codes, row_scale);
    Gemm g = fc1.gemm();
    g.x = codes, g.M = rows, g.then = fc2.weights();
    norm.read(g, row_scale);
    g.epilogue.out = wide;
    if (fc2_scale) {
      g.epilogue.activation = activation;
      g.epilogue.out_scale = data_or_null(fc2_scale), g.epilogue.out_scale_stride = fc2_scale->numel() > 1;
      g.epilogue.out_zero_point = fc2_zero_point, g.epilogue.out_bits = fc2.x_bits;
    }
    matmul(Phase::fc1, g);

    g = fc2.gemm();
    g.x = wide, g.M = rows, g.x_zero_point = fc2_zero_point, g.then = then;
    if (fc2_scale) {
      read_static(g, *fc2_scale);
    } else {
      Rows act = {};
      act.x = wide, act.x_stride = act.K = hidden(), act.out = (int8_t*)codes, act.out_scale = row_scale;
      act.has_minimum = fc2_minimum.has_value(), act.minimum = (float)fc2_minimum.value_or(0);
      fc2.set_codes(act);
      act.table = fc2_table ? fc2_table->const_data_ptr<int8_t>() : nullptr;
      timed(Phase::activation, [&] { kernels().activate_quantize(act, activation, 0, rows); });
      g.x = codes;
      read_rows(g, row_scale);
    }
    add_to(g, y, layer_scale, out);
    matmul(Phase::fc2, g);
  }
};

// What the schemas of quant_block and quant_mlp have in common.
inline FeedForward feed_forward(
    int64_t C, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps, const std::optional<at::Tensor>& fc1_x_scale,
    int64_t fc1_x_bits, double fc1_x_clip, const at::Tensor& fc1_w, const at::Tensor& fc1_w_scale,
    const std::optional<at::Tensor>& fc1_bias, std::string_view activation, const std::optional<at::Tensor>& fc2_x_scale,
    int64_t fc2_x_bits, double fc2_x_clip, int64_t fc2_x_zero_point, std::optional<double> fc2_x_minimum,
    const std::optional<at::Tensor>& fc2_x_table, const at::Tensor& fc2_w, const at::Tensor& fc2_w_scale,
    const std::optional<at::Tensor>& fc2_bias, const std::optional<at::Tensor>& layer_scale) {
  const int64_t hidden = fc1_w_scale.numel();
  check_shape(fc2_w_scale, {C}, "fc2 w_scale");
  return {norm_of(norm_weight, norm_bias, fc1_x_scale, norm_eps, C),
          Linear(fc1_w, fc1_w_scale, fc1_bias, C, fc1_x_bits, fc1_x_clip, "fc1"),
          Linear(fc2_w, fc2_w_scale, fc2_bias, hidden, fc2_x_bits, fc2_x_clip, "fc2"),
          float_features(layer_scale, C, "layer_scale2"), one_or_all(fc2_x_scale, hidden, "fc2_x_scale"),
          parse_activation(activation), fc2_x_zero_point, fc2_x_minimum, code_table(fc2_x_table, fc2_x_bits)};
}

}  // namespace pyvit_accel
