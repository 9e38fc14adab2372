// y = epilogue(x w^T) on int8 codes, for sm_80 and newer: mma.sync.m16n8k32.
//
//     x         (M, x_stride)  int8, K-major; K rounded up to 16 may be read
//     w_packed  (ceil(N / 16), w_stride)  4 or 8 bits, formats/packed.py
//     y         (M, N)  float32 or int8 codes, epilogue.cuh
//
// A block of four warps computes FEATURES x TOKENS. Copies of the next inputs (cp.async, STAGES deep, 64 inputs each) run
// under the products of these:
//
//     global                 shared, 128-byte swizzle                   registers
//     x rows of 64 bytes     [TOKENS][64]                ldmatrix.x4    two 8-token tiles of B, 32 inputs
//     w pieces of 2 chunks   [FEATURES / 16][2][chunk]   ld.shared.v4   two 16-feature tiles of A (4 bits: after unpacking)
//
// The loop has no tail: what lies beyond K is copied as zeros, and beyond M and N the last rows once more, whose sums go
// nowhere. 4-bit weights arrive times 16, and so do their sums, which are exact up to K = 131071.
//
// 128 x 128 tiles: three stages of 8-bit weights are 48 KiB, so that two blocks fit the 100 KiB of an sm_89; the 128 sums of
// a thread leave room for the rest in the 255 registers that two blocks allow.
#include <cuda_runtime.h>

#include "ampere_linear.cuh"
#include "epilogue.cuh"
#include "lowbit_linear.h"

namespace pyvit_accel {
namespace {

constexpr int INPUTS = 64;  // of a stage

template <int W_BITS, int FEATURES, int TOKENS>
struct StageLayout {
  static constexpr int TILE_BYTES = INPUTS / CHUNK * chunk_bytes(W_BITS);  // of a packed tile
  static constexpr int X_BYTES = TOKENS * INPUTS;
  static constexpr int W_BYTES = FEATURES / TILE * TILE_BYTES;
  static constexpr int BYTES = X_BYTES + W_BYTES;
  static_assert(X_BYTES % (UNIT * THREADS) == 0 && W_BYTES % (UNIT * THREADS) == 0, "every thread copies as many units");
  static_assert(X_BYTES % 1024 == 0 && W_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");
};

// What a thread copies of every stage: units of rows of x and of packed tiles, in as many turns as they need.
template <class Stage>
struct Copier {
  static constexpr int X_ROW = INPUTS / UNIT, W_ROW = Stage::TILE_BYTES / UNIT;  // units of a row in a stage
  static constexpr int X_TURNS = Stage::X_BYTES / UNIT / THREADS, W_TURNS = Stage::W_BYTES / UNIT / THREADS;
  static_assert(THREADS % X_ROW == 0 && THREADS % W_ROW == 0, "a thread's units are at one place of their rows");

  const int8_t* x[X_TURNS];
  const uint8_t* w[W_TURNS];
  int x_at, x_end, w_at, w_end;  // in a row: of this thread in a stage, and of the row

  __device__ __forceinline__ Copier(const LowbitLinear& p, int first_m, int first_tile) {
    x_at = threadIdx.x % X_ROW * UNIT, x_end = p.K;
    w_at = threadIdx.x % W_ROW * UNIT, w_end = (p.K + CHUNK - 1) / CHUNK * (Stage::TILE_BYTES * CHUNK / INPUTS);
#pragma unroll
    for (int i = 0; i < X_TURNS; ++i) {
      const int row = first_m + (i * THREADS + threadIdx.x) / X_ROW;
      x[i] = p.x + min(row, p.epilogue.M - 1) * p.x_stride + x_at;
    }
#pragma unroll
    for (int i = 0; i < W_TURNS; ++i) {
      const int tile = first_tile + (i * THREADS + threadIdx.x) / W_ROW;
      w[i] = p.epilogue.w_packed + min(tile, (p.epilogue.N - 1) / TILE) * p.epilogue.w_stride + HEADER + w_at;
    }
  }

  __device__ __forceinline__ void copy(int step, uint32_t to) const {
    const int64_t x_step = static_cast<int64_t>(step) * INPUTS, w_step = static_cast<int64_t>(step) * Stage::TILE_BYTES;
    const bool in_x = x_at + x_step < x_end, in_w = w_at + w_step < w_end;
#pragma unroll
    for (int i = 0; i < X_TURNS; ++i)
      copy_unit(to + swizzle128((i * THREADS + threadIdx.x) * UNIT), x[i] + x_step, in_x);
#pragma unroll
    for (int i = 0; i < W_TURNS; ++i)
      copy_unit(to + Stage::X_BYTES + swizzle128((i * THREADS + threadIdx.x) * UNIT), w[i] + w_step, in_w);
  }
};

template <int W_BITS, int FEATURES, int TOKENS, int STAGES>
__device__ __forceinline__ void lowbit_linear(const LowbitLinear& p) {
  using Stage = StageLayout<W_BITS, FEATURES, TOKENS>;
  constexpr int PAIRS = FEATURES / 2 / PAIR;  // of a warp, which has half the features and half the tokens
  constexpr int BLOCKS = TOKENS / 2 / 8;      // 8-token tiles of a warp
  static_assert(PAIRS >= 1 && BLOCKS % 2 == 0, "a warp takes 32 features and 16 tokens at a time");

  extern __shared__ __align__(1024) uint8_t shared[];
  const int lane = threadIdx.x % 32;
  const Place<FEATURES, TOKENS> at(p.epilogue);
  const Copier<Stage> copier(p, at.first_m, at.first_n / TILE);

  int32_t sums[PAIRS * BLOCKS][2][4] = {};  // of a pair of packed tiles x 8 tokens: those of two tiles of A

  pipeline<STAGES, Stage::BYTES>(shared_address(shared), (p.K + INPUTS - 1) / INPUTS, copier, [&](uint32_t x) {
    const uint32_t w = x + Stage::X_BYTES;
#pragma unroll
    for (int chunk = 0; chunk < INPUTS / CHUNK; ++chunk) {
      uint32_t a[PAIRS][2][4];
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) {
        const uint32_t unit = (at.warp_n / TILE + 2 * pair) * Stage::TILE_BYTES + chunk * chunk_bytes(W_BITS) +
                              weight_offset(lane, Stage::TILE_BYTES);
        uint32_t low[4];
        load_words(w + swizzle128(unit), low);
        if constexpr (W_BITS == 4) {
          unpack4(low, a[pair]);
        } else {
          uint32_t high[4];
          load_words(w + swizzle128(unit + 256), high);
          unpack8(low, high, a[pair]);
        }
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; block += 2) {
        const int token = at.warp_m + 8 * block + lane / 16 * 8 + lane % 8;
        uint32_t b[4];  // inputs 0..15 and 16..31 of 8 tokens, then of 8 more
        load_matrices(x + swizzle128(token * INPUTS + chunk * CHUNK + lane / 8 % 2 * UNIT), b);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply(sums[pair * BLOCKS + block][i], a[pair][i], b[0], b[1]);
            multiply(sums[pair * BLOCKS + block + 1][i], a[pair][i], b[2], b[3]);
          }
      }
    }
  });

  in_turns<PAIRS, BLOCKS>(sums, [&](int n, int m, auto& of) {
    n += at.first_n + at.warp_n + lane_feature(lane), m += at.first_m + at.warp_m + lane_token(lane);
    const Features features = load_features(p.epilogue, n);
#pragma unroll
    for (auto& token : of)
#pragma unroll
      for (int i = 0; i < 4; ++i) token[i] >>= 8 - W_BITS;
    finish(p.epilogue, features, m, n, of);
  });
}

}  // namespace
}  // namespace pyvit_accel

// The kernels: name, bits, features, tokens, stages, blocks of an SM.
#define KERNELS(KERNEL)                                    \
  KERNEL(lowbit_linear_sm80_w8_128x128, 8, 128, 128, 3, 2) \
  KERNEL(lowbit_linear_sm80_w4_128x128, 4, 128, 128, 3, 2) \
  KERNEL(lowbit_linear_sm80_w8_64x64, 8, 64, 64, 4, 3)     \
  KERNEL(lowbit_linear_sm80_w4_64x64, 4, 64, 64, 4, 3)     \
  KERNEL(lowbit_linear_sm80_w8_64x32, 8, 64, 32, 5, 3)     \
  KERNEL(lowbit_linear_sm80_w4_64x32, 4, 64, 32, 5, 3)

#define DEFINE(NAME, W_BITS, FEATURES, TOKENS, STAGES, BLOCKS_PER_SM)                                           \
  extern "C" __global__ void __launch_bounds__(pyvit_accel::THREADS, BLOCKS_PER_SM)                             \
      NAME(const __grid_constant__ LowbitLinear p) {                                                            \
    pyvit_accel::lowbit_linear<W_BITS, FEATURES, TOKENS, STAGES>(p);                                            \
  }
KERNELS(DEFINE)
#undef DEFINE

namespace pyvit_accel {

std::span<const LowbitLinearConfig> lowbit_linear_sm80() {
#define DESCRIBE(NAME, W_BITS, FEATURES, TOKENS, STAGES, BLOCKS_PER_SM)                                    \
  {{#NAME, reinterpret_cast<const void*>(&NAME), 80, FEATURES, TOKENS, THREADS,                            \
    STAGES * StageLayout<W_BITS, FEATURES, TOKENS>::BYTES, BLOCKS_PER_SM},                                 \
   W_BITS, 2048, prepare},
  static const LowbitLinearConfig configs[] = {KERNELS(DESCRIBE)};
#undef DESCRIBE
  return configs;
}

}  // namespace pyvit_accel
