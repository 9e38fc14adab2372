// y = epilogue(x w^T), w 2:4 sparse, for sm_80 and newer: mma.sp::ordered_metadata, m16n8k64 of int8, m16n8k32 of 16 bits.
//
//     x             (M, x_stride)  int8 | float16 | bfloat16, K-major; K rounded up to 16 bytes may be read
//     values, meta  P24 v1, formats/sparse24.py
//     y             (M, N)  int8: float32 or int8 codes; 16 bits: their type; epilogue.cuh
//
// A block of four warps computes FEATURES x TOKENS. Copies of the next inputs (cp.async, STAGES deep, 128 bytes each) run
// under the products of these:
//
//     global                       shared                                   registers
//     x rows of 128 bytes          [TOKENS][128], 128-byte swizzle          ldmatrix.x4     an 8-token tile of B, a k-step
//     values of 2 k-steps          [FEATURES / 16][2][32 lanes][16]         ld.shared.v4    a 16-feature tile of A, a k-step
//     metadata of 2 k-steps        [its tiles][32 lanes][8]                 ld.shared.v2    of two k-steps
//
// The loop has no tail: tokens beyond M are the last one once more, whose sums go nowhere, x beyond K is copied as zeros,
// and a packed weight has features up to a multiple of 128 and k-steps up to one of 4, of zeros with legal metadata.
//
// Floors of 128 x 128 and a k-step, in clocks of an SM of sm_80, which makes 4096 products of 8 bits a clock, pruned ones
// counted, 2048 of 16: products 256. Shared memory: A 2 KiB and B 4 KiB of each warp, 24 KiB, and what is copied, 128 x 64
// bytes of x and 128 x 36 (40 at 8 bits) of weights, 12.5 KiB: 37 KiB at 128 bytes a clock, 292. So it is shared memory that
// limits, to 88 %. L2: 50 bytes a clock. Registers: 128 sums, 16 of A, 4 of B, metadata 4 or 8: two blocks an SM. None of it
// is measured.
#include <cuda_runtime.h>

#include "ampere_linear.cuh"
#include "epilogue.cuh"
#include "sparse24.cuh"

namespace pyvit_accel {
namespace {

template <int ELEMENTS, int FEATURES, int TOKENS>
struct StageLayout {
  static constexpr int META_ROWS = FEATURES / PAIR * WORDS_OF_PAIR<ELEMENTS>;  // tiles, or pairs of them
  static constexpr int META_ROW = 32 * 4 * STEPS;                              // bytes of one in a stage
  static constexpr int X_BYTES = TOKENS * STAGE_INPUT_BYTES;
  static constexpr int W_BYTES = FEATURES / TILE * STEPS * TILE_BYTES;
  static constexpr int META_BYTES = (META_ROWS * META_ROW + 1023) / 1024 * 1024;
  static constexpr int BYTES = X_BYTES + W_BYTES + META_BYTES;
  static_assert(X_BYTES % (UNIT * THREADS) == 0 && W_BYTES % (UNIT * THREADS) == 0, "every thread copies as many units");
};

// What a thread copies of every stage: units of rows of x and of tiles of values, and half units of metadata.
template <int ELEMENTS, int FEATURES, int TOKENS>
struct Copier {
  using Stage = StageLayout<ELEMENTS, FEATURES, TOKENS>;
  static constexpr int X_ROW = STAGE_INPUT_BYTES / UNIT, X_ROWS = THREADS / X_ROW, X_TURNS = TOKENS / X_ROWS;
  static constexpr int W_ROW = STEPS * TILE_BYTES / UNIT, W_ROWS = THREADS / W_ROW, W_TURNS = FEATURES / TILE / W_ROWS;
  static constexpr int META_TURNS = (Stage::META_ROWS + THREADS / 32 - 1) / (THREADS / 32);

  const uint8_t *x, *w, *meta;  // of this thread's first unit in stage 0
  int64_t x_stride;
  int last_row;               // of x, counted from the thread's first
  int w_stride, meta_stride;  // bytes of a tile's values, and of its metadata
  int x_left;                 // bytes from this thread's unit to the end of a row

  __device__ __forceinline__ Copier(const Sparse24Linear& p, int first_m, int first_n) {
    const int thread = threadIdx.x, groups = groups_of(p.K, ELEMENTS);
    const int x_row = first_m + thread / X_ROW;
    x_stride = p.x_stride, w_stride = groups * STEPS_PER_GROUP * TILE_BYTES, meta_stride = groups * GROUP_BYTES;
    x_left = p.K * element_bytes(ELEMENTS) - thread % X_ROW * UNIT;
    x = static_cast<const uint8_t*>(p.x) + x_row * x_stride + thread % X_ROW * UNIT;
    last_row = p.epilogue.M - 1 - x_row;
    const int64_t tile = first_n / TILE + thread / W_ROW;
    w = static_cast<const uint8_t*>(p.values) + tile * w_stride + thread % W_ROW * UNIT;
    const int64_t meta_row = first_n / PAIR * WORDS_OF_PAIR<ELEMENTS> + thread / 32;
    meta = reinterpret_cast<const uint8_t*>(p.meta) + meta_row * meta_stride + thread % 32 * 16;
  }

  __device__ __forceinline__ void copy(int stage, uint32_t to) const {
    const int thread = threadIdx.x, x_at = stage * STAGE_INPUT_BYTES;
    const int64_t w_at = static_cast<int64_t>(stage) * STEPS * TILE_BYTES;
#pragma unroll
    for (int i = 0; i < X_TURNS; ++i)
      copy_unit(to + swizzle128(thread * UNIT) + i * X_ROWS * STAGE_INPUT_BYTES,
                x + min(i * X_ROWS, last_row) * x_stride + x_at, x_at < x_left);
    to += Stage::X_BYTES;
#pragma unroll
    for (int i = 0; i < W_TURNS; ++i)
      copy_unit(to + (i * THREADS + thread) * UNIT, w + i * W_ROWS * static_cast<int64_t>(w_stride) + w_at, true);
    to += Stage::W_BYTES;
#pragma unroll
    for (int i = 0; i < META_TURNS; ++i)
      if (Stage::META_ROWS % (THREADS / 32) == 0 || i * (THREADS / 32) + thread / 32 < Stage::META_ROWS)
        copy_half_unit(to + (i * THREADS + thread) * 8,
                       meta + static_cast<int64_t>(i * (THREADS / 32)) * meta_stride + stage / 2 * GROUP_BYTES + stage % 2 * 8);
  }
};

template <int ELEMENTS, int SELECTOR>
__device__ __forceinline__ void multiply(Sum<ELEMENTS> (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {
  if constexpr (ELEMENTS == INT8) multiply_sparse<0>(sums, a, b, e);
  if constexpr (ELEMENTS == FLOAT16) multiply_sparse_f16<SELECTOR>(sums, a, b, e);
  if constexpr (ELEMENTS == BFLOAT16) multiply_sparse_bf16<SELECTOR>(sums, a, b, e);
}

template <int ELEMENTS, int FEATURES, int TOKENS, int STAGES>
__device__ __forceinline__ void sparse24_linear(const Sparse24Linear& p) {
  using Stage = StageLayout<ELEMENTS, FEATURES, TOKENS>;
  constexpr int PAIRS = FEATURES / 2 / PAIR;  // of a warp, which has half the features and half the tokens
  constexpr int BLOCKS = TOKENS / 2 / 8;      // 8-token tiles of a warp
  constexpr int WORDS = WORDS_OF_PAIR<ELEMENTS>;
  static_assert(PAIRS >= 1 && BLOCKS >= 1 && 128 % FEATURES == 0, "packed weights have features up to a multiple of 128");

  extern __shared__ __align__(1024) uint8_t shared[];
  const int lane = threadIdx.x % 32;
  const Place<FEATURES, TOKENS> at(p.epilogue);
  const Copier<ELEMENTS, FEATURES, TOKENS> copier(p, at.first_m, at.first_n);
  // Of this lane, in a stage.
  const uint32_t x_at = at.warp_m * STAGE_INPUT_BYTES + swizzle128(lane % 8 * STAGE_INPUT_BYTES + lane / 8 * UNIT);
  const uint32_t w_at = Stage::X_BYTES + at.warp_n / TILE * STEPS * TILE_BYTES + lane * UNIT;
  const uint32_t meta_at = Stage::X_BYTES + Stage::W_BYTES + at.warp_n / PAIR * WORDS * Stage::META_ROW + lane * 8;

  Sum<ELEMENTS> sums[PAIRS * BLOCKS][2][4] = {};  // of a pair of tiles x 8 tokens

  pipeline<STAGES, Stage::BYTES>(shared_address(shared), stages_of(p.K, ELEMENTS), copier, [&](uint32_t from) {
    uint32_t e[PAIRS * WORDS][STEPS];
#pragma unroll
    for (int i = 0; i < PAIRS * WORDS; ++i) load_words(from + meta_at + i * Stage::META_ROW, e[i]);
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      uint32_t a[PAIRS][2][4];
#pragma unroll
      for (int i = 0; i < 2 * PAIRS; ++i) load_words(from + w_at + (i * STEPS + k) * TILE_BYTES, a[i / 2][i % 2]);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t b[4];
        load_matrices(from + (x_at ^ k * STEP_BYTES) + block * 8 * STAGE_INPUT_BYTES, b);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
          Sum<ELEMENTS>(&of)[2][4] = sums[pair * BLOCKS + block];
          multiply<ELEMENTS, 0>(of[0], a[pair][0], b, e[pair * WORDS][k]);
          multiply<ELEMENTS, 1>(of[1], a[pair][1], b, e[pair * WORDS + WORDS - 1][k]);
        }
      }
    }
  });

  in_turns<PAIRS, BLOCKS>(sums, [&](int n, int m, auto& of) {
    n += at.first_n + at.warp_n + exchanged_feature(lane), m += at.first_m + at.warp_m + lane_token(lane);
    const Features features = load_features<ELEMENTS == INT8>(p.epilogue, n);
#pragma unroll
    for (auto& token : of) exchange(token);
    if constexpr (ELEMENTS == INT8)
      finish(p.epilogue, features, m, n, of);
    else if (n < p.epilogue.N)
      complete<Output<ELEMENTS>>(p.epilogue, features, m, n, of);
    __syncwarp();  // lanes beyond N were elsewhere
  });
}

}  // namespace
}  // namespace pyvit_accel

// The kernels: name, elements, features, tokens, stages, blocks of an SM.
#define OF_ELEMENTS(KERNEL, NAME, ELEMENTS)        \
  KERNEL(NAME##_128x128, ELEMENTS, 128, 128, 3, 2) \
  KERNEL(NAME##_64x64, ELEMENTS, 64, 64, 4, 3)     \
  KERNEL(NAME##_64x32, ELEMENTS, 64, 32, 4, 4)
#define KERNELS(KERNEL)                                               \
  OF_ELEMENTS(KERNEL, sparse24_linear_sm80_s8, pyvit_accel::INT8)     \
  OF_ELEMENTS(KERNEL, sparse24_linear_sm80_f16, pyvit_accel::FLOAT16) \
  OF_ELEMENTS(KERNEL, sparse24_linear_sm80_bf16, pyvit_accel::BFLOAT16)

#define DEFINE(NAME, ELEMENTS, FEATURES, TOKENS, STAGES, BLOCKS_PER_SM)                                         \
  extern "C" __global__ void __launch_bounds__(pyvit_accel::THREADS, BLOCKS_PER_SM)                             \
      NAME(const __grid_constant__ Sparse24Linear p) {                                                          \
    pyvit_accel::sparse24_linear<ELEMENTS, FEATURES, TOKENS, STAGES>(p);                                        \
  }
KERNELS(DEFINE)
#undef DEFINE

namespace pyvit_accel {

std::span<const Sparse24LinearConfig> sparse24_linear_sm80() {
#define DESCRIBE(NAME, ELEMENTS, FEATURES, TOKENS, STAGES, BLOCKS_PER_SM)                                  \
  {{#NAME, reinterpret_cast<const void*>(&NAME), 80, FEATURES, TOKENS, THREADS,                            \
    STAGES * StageLayout<ELEMENTS, FEATURES, TOKENS>::BYTES, BLOCKS_PER_SM},                               \
   ELEMENTS, 4096, false, STAGES - 1, prepare},
  static const Sparse24LinearConfig configs[] = {KERNELS(DESCRIBE)};
#undef DESCRIBE
  return configs;
}

}  // namespace pyvit_accel
