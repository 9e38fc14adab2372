// What every instruction set implements. One table of functions per instruction set; kernels() is the one in use.
//
// The same sources (tile.h, gemm.h, rows.h, attention.h, tokens.h) are compiled three times, by isa_avx512.cpp,
// isa_avx2.cpp and isa_portable.cpp. All three give the same bits: integer sums are exact, and float code is compiled
// without contraction, so that every operation rounds as IEEE says, in the order written.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pyvit_accel {

// Packed weights of 2, 3, 4, 5, 6 or 8 bits (formats/packed.py): tiles of 16 output features. A tile is 16 int32 sums over k
// of the codes, then chunks of 32 inputs, 64 bytes a bit. A chunk is 8 groups; a group is 64 codes, 16 features x 4 inputs,
// and unpacked one byte each: byte 4 n + i of group g is the code of feature n, input 4 g + i.
constexpr int64_t kTile = 16, kChunk = 32;
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t num_tiles(int64_t N) { return round_up(N, kTile) / kTile; }
inline int64_t chunks_of(int64_t K) { return round_up(K, kChunk) / kChunk; }
inline int64_t tile_bytes(int64_t K, int64_t bits) { return 64 + chunks_of(K) * 64 * bits; }

enum class Activation : int64_t { none, gelu, gelu_tanh, quick_gelu };

// y = acc * (x_scale * w_scale), + bias, activation, * layer_scale, + residual, then float32 out or
// code = clip(rint(y * (1 / out_scale)) + out_zero_point) to -2^(out_bits-1) .. 2^(out_bits-1)-1. Null pointers are steps left out.
struct Epilogue {
  const float* x_scale;  // null: 1
  int64_t x_scale_stride;  // 0: one for all rows, 1: one per row
  const float* w_scale;
  const float* bias;
  int64_t bias_rows;  // row m reads bias row m % bias_rows
  int64_t bias_stride;
  Activation activation;
  const float* layer_scale;
  const float* residual;
  int64_t residual_stride;
  const float* out_scale;  // null: float32 out
  int64_t out_scale_stride;  // 0: one for all features, 1: one per feature
  int64_t out_zero_point;
  int64_t out_bits;
  void* out;
  int64_t out_stride;
  const int32_t* rows = nullptr;  // where row m of residual and out lies; null: at m
};

struct Gemm {
  const void* x;  // int8 codes, or float for weight-only
  int64_t x_stride;  // elements between rows
  int64_t x_zero_point;
  const uint8_t* w_packed;
  int64_t w_bits;
  // Weight-only: w = (q - zero point) * scale for every group of K / w_groups inputs, (N, w_groups); no zero points: null;
  // no groups: the epilogue has the scale.
  const float *group_scale, *group_zero_point;
  int64_t w_groups;
  // What takes the place of the weights' codes, or null: of -128 .. 127 for int8 x, of the lowest code on for float x.
  const int8_t* w_levels;
  const float* w_lut;
  int64_t M, N, K;
  const uint8_t* then;  // what is read after this product, to be fetched at its end; may be null
  Epilogue epilogue;
  const int32_t* from = nullptr;  // the row of x that row m is computed from; null: m
};

struct Rows {
  const void* x;
  int64_t x_stride;
  int64_t K;
  const float* weight;  // LayerNorm's; null when only quantising
  const float* bias;
  double eps;
  const float* scale;  // static; null: per row
  int64_t scale_stride;  // 0: one, 1: one per column
  int64_t zero_point;
  int64_t bits = 8;
  float clip = 1;  // dynamic only: the part of a row's range that the codes span
  bool has_minimum;  // dynamic only: the codes span minimum..max x instead of -max |x|..max |x|
  float minimum;
  const int8_t* table;  // dynamic only: what takes the place of the codes -128 .. 127; may be null
  int8_t* out;  // (M, K)
  float* out_scale;  // (M,), dynamic only
  const int32_t *from = nullptr, *to = nullptr;  // the rows of x and of the results that row m is; null: m
};

// The probabilities (formats/softmax.py). A code c = L - k, 0 for an exact zero, stands for table[c].
struct Softmax {
  bool coded;  // false: diffused bytes, and nothing below is read
  int64_t count;  // L
  float octave, inverse;  // steps of an octave, 1 with thresholds; 1 / octave
  float score_scale, bias_scale;  // softmax_scale log2(e) steps, log2(e) steps
  float shift, unit;
  bool lse, normalize;
  const float* thresholds;  // L of them, or null
  // What a code stands for: low + 256 high, high null where it is zero throughout; or, low null, a float.
  const uint8_t *low, *high;
  const float* values;
};

struct Attention {
  const int8_t *q, *k, *v;  // element (b, h, n, d) at b * stride[0] + h * stride[1] + n * stride[2] + d
  int64_t q_stride[3], k_stride[3], v_stride[3];
  const float *q_scale, *k_scale, *v_scale;
  int64_t q_scale_stride[3], k_scale_stride[3], v_scale_stride[3];
  const float* v_float;  // in place of v, or null
  const float* bias;  // additive (B, H, Nq, Nk) through strides, or null
  int64_t bias_stride[4];
  const float *grid_h, *grid_w;  // (B, H, Nq, Kh) and (B, H, Nq, Kw): key j gets h[j / Kw] + w[j % Kw]; or null
  int64_t grid_h_stride[4], grid_w_stride[4], grid_columns;
  const float* key_bias;  // (B, Nk), or null
  int64_t key_bias_stride[2];
  float softmax_scale;
  int64_t H, Nq, Nk, D;
  const float* out_scale;  // null: float32 out
  int64_t out_scale_stride;
  void* out;  // (B, Nq, H * D)
  Softmax softmax;
  // Wanted besides, or null: the first query's probabilities (B, H, Nk); log-sum-exp (B, H, Nq); what each key got, a sum
  // for each block of queries (B, H, q_blocks, Nk), zero before.
  float *cls, *lse, *columns;
  // Packed: B is the number of sequences, sequence b has the tokens ends[b] .. ends[b + 1] of all; or null.
  const int32_t *q_ends, *k_ends;  // Nq and Nk are then those of all sequences
  const int32_t* q_index;  // (B, Nq): the rows of q and q_scale that attend; null: all in order
};

// The topk tokens of b nearest to each of a: the largest products, of rows of length one for cosine, or the least distances.
enum class Metric : int64_t { cosine, dot, l2 };
struct Match {
  const float *a, *b;  // token n of image i at i * stride[0] + n * stride[1], D floats
  int64_t a_stride[2], b_stride[2];
  int64_t Na, Nb, D;
  Metric metric;
  int64_t topk, first;  // only tokens first .. Nb of b
  const int32_t* exclude;  // (B, Na): and not this one; or null
  float* value;  // (B, Na, topk)
  int32_t* index;
};

struct MeanHeads {
  const void* x;  // element (b, h, n, d) at b * stride[0] + h * stride[1] + n * stride[2] + d
  bool codes;  // int8, else float
  const float* scale;  // (B, H, N) through strides
  int64_t x_stride[3], scale_stride[3];
  int64_t H, N, D;
  float* out;  // (B, N, D)
};

// Of the rows that come in and go out; sums are float32.
enum class Float : int64_t { float32, float16, bfloat16 };

// Row m of image b, item b M + m, from the entries ptr[m] .. ptr[m + 1] of col and weight.
enum class Reduce : int64_t { sum, mean, mlerp };
struct Mix {
  Float dtype;
  Reduce reduce;
  const void *x, *base;  // base: null without
  int64_t x_stride[2], base_stride[2];  // images, rows
  const int32_t *col, *ptr;  // (B, L), (B, M + 1); no ptr: lists of width
  const float* weight;  // (B, L); null: ones
  int64_t C, L, M, width;
  void* y;  // (B, M, C)
};

struct Propagate {
  const float *q, *k;
  int64_t q_stride[3], k_stride[3];  // images, heads, tokens
  const float *start, *key_bias;  // (B, H, N), (B, N) or null
  float scale;
  int64_t H, N, D, iterations;
  int64_t kept;  // up to how many probabilities a head keeps from one iteration to the next
  float* out;  // (B, H, N)
};

struct LocalAssign {
  const float* x;  // (B, h, w, C)
  float* centres;  // (B, gh, gw, C)
  int64_t h, w, gh, gw, C, window;
  bool squares, mask;  // metric "l2", border "mask"
  float tau;
  float* weight;  // (B, h w, window^2)
  int32_t* index;
};

struct ClassRow {
  const int8_t *q, *k;  // q: of the first query, element (b, h, d); k: (b, h, n, d); strides as in Attention
  int64_t q_stride[2], k_stride[3];
  const float *q_scale, *k_scale;
  int64_t q_scale_stride[2], k_scale_stride[3];
  const float* key_bias;  // (B, N), or null
  int64_t key_bias_stride[2];
  float softmax_scale;
  int64_t H, N, D;
};

struct Kernels {
  const char* name;
  void (*lowbit_linear)(const Gemm&, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end);
  void (*weight_only_linear)(const Gemm&, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end);
  void (*quantize)(const Rows&, int64_t row_begin, int64_t row_end);
  void (*norm_quant)(const Rows&, int64_t row_begin, int64_t row_end);
  void (*activate_quantize)(const Rows&, Activation, int64_t row_begin, int64_t row_end);  // dynamic only
  // Items are (b * H + h) * q_blocks + block; a block is a run of queries.
  void (*quant_attention)(const Attention&, int64_t q_blocks, int64_t item_begin, int64_t item_end);
  int64_t (*dot_loop)(int64_t iterations);
  void (*read_loop)(const void* p, int64_t bytes);
  void (*match_tokens)(const Match&, int64_t image, int64_t row_begin, int64_t row_end);
  void (*mean_heads)(const MeanHeads&, int64_t row_begin, int64_t row_end);  // of B * N
  void (*mix_tokens)(const Mix&, int64_t item_begin, int64_t item_end);
  void (*propagate)(const Propagate&, int64_t head_begin, int64_t head_end);
  void (*assign_tokens)(const LocalAssign&, int64_t token_begin, int64_t token_end);  // weight and index, from centres
  void (*move_centres)(const LocalAssign&, int64_t centre_begin, int64_t centre_end);  // centres, from weight
  // Exponentials, (heads, N padded to sixteens), and a factor a head; then their mean.
  void (*class_row)(const ClassRow&, int64_t image, int64_t head_begin, int64_t head_end, float* rows, float* factor);
  void (*class_mean)(const ClassRow&, const float* rows, const float* factor, float* out);
};

extern const Kernels kAvx512, kAvx2, kPortable;
const Kernels& kernels();
const char* select_isa(const char* name);  // "best", "avx512_vnni", "avx2", "portable"; null when this CPU lacks it
bool has_vbmi();
// This thread's buffer, 64-byte aligned, kept between calls. Slots 0 and 1 are the kernels', 2 and 3 their callers'.
void* scratch(size_t bytes, int slot);

}  // namespace pyvit_accel
