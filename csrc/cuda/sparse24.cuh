// Where 2:4 sparse weights lie: P24 v1 (pyvit_accel/formats/sparse24.py), and the fragments of the sparse tensor core.
//
// Weights are operand A (rows are features), which alone may be sparse, tokens operand B, so y is computed transposed. A
// k-step is 64 bytes of a token, 32 inputs of 16 bits or 64 of 8, and half as many kept weights. A tile, 16 features x a
// k-step, is 512 bytes: lane l has its A registers at 16 l, for mma.sp.m16n8 and for each warp of wgmma.mma_async.sp.m64,
// which so take any tile for any of their 16 rows. We take pairs of them, 32 consecutive features, one after the other:
//
//     metadata of a k-step   8 bits: a word of each tile; 16 bits: one word for both, of which the selector names the half
//     sums, i of tile j      feature 16 j + g + 8 (i >> 1), token 2t + (i & 1), with lane l = 4 g + t, as of dense ones
//
// The lanes 4 apart exchange these four sums of a token, exchange(), which gives a lane four consecutive features.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "fragments.cuh"
#include "scalar.cuh"
#include "sparse24_linear.h"

namespace pyvit_accel {

constexpr int STEP_BYTES = 64;         // of a token in a k-step
constexpr int TILE_BYTES = 512;        // of kept weights: 16 features x a k-step
constexpr int STEPS_PER_GROUP = 4;     // k-steps whose metadata is 16 bytes of a lane
constexpr int GROUP_BYTES = 32 * 16;   // of metadata: a group of k-steps of a tile, or of two
constexpr int STEPS = 2;               // k-steps of a stage: a line of 128 bytes of every token
constexpr int STAGE_INPUT_BYTES = STEPS * STEP_BYTES;

constexpr HOST_DEVICE int element_bytes(int elements) { return elements == INT8 ? 1 : 2; }
constexpr HOST_DEVICE int inputs_of_stage(int elements) { return STAGE_INPUT_BYTES / element_bytes(elements); }
// Of k-steps of a packed weight: the format rounds them up to groups, and features to 128.
constexpr HOST_DEVICE int groups_of(int K, int elements) {
  const int inputs = STEPS_PER_GROUP * STEP_BYTES / element_bytes(elements);
  return (K + inputs - 1) / inputs;
}
constexpr HOST_DEVICE int packed_features(int N) { return (N + 127) / 128 * 128; }
constexpr HOST_DEVICE int stages_of(int K, int elements) {
  return (K + inputs_of_stage(elements) - 1) / inputs_of_stage(elements);
}

template <int ELEMENTS>
using Sum = std::conditional_t<ELEMENTS == INT8, int32_t, float>;
template <int ELEMENTS>  // what y is of, where it is not codes
using Output = std::conditional_t<ELEMENTS == INT8, float, std::conditional_t<ELEMENTS == FLOAT16, __half, __nv_bfloat16>>;

template <int ELEMENTS>
constexpr int WORDS_OF_PAIR = ELEMENTS == INT8 ? 2 : 1;  // of metadata, of a lane in a k-step

// The first of the four consecutive features that a lane has after exchange(), among the 32 of a pair of tiles.
constexpr HOST_DEVICE int exchanged_feature(int lane) { return 8 * (lane >> 2 & 3) + 4 * (lane >> 4); }

#ifdef __CUDACC__
// Of four lanes 4 apart, q = 0 .. 3: lane q gets element q of each, in their order.
template <class T>
DEVICE void exchange(T (&v)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = threadIdx.x & 4 * distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const T mine = upper ? v[i + distance] : v[i], theirs = upper ? v[i] : v[i + distance];
      const T got = __shfl_xor_sync(0xFFFFFFFF, theirs, 4 * distance);
      v[i] = upper ? got : mine;
      v[i + distance] = upper ? mine : got;
    }
  }
}
#endif

}  // namespace pyvit_accel
