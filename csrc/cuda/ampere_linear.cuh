// The frame of the linear kernels of sm_80 and newer. A block of four warps computes FEATURES x TOKENS of y, each warp half of the
// features and half of the tokens. Copies of the next stages (cp.async, STAGES deep) run under the products of this one. A kernel
// brings what a thread copies and how a warp multiplies.
#pragma once
#include "ampere.cuh"
#include "fragments.cuh"
#include "linear_plan.h"

namespace pyvit_accel {
namespace {

constexpr int THREADS = 128;
constexpr int GROUP_M = 8;  // token tiles that in turn share a column of weight tiles in L2
constexpr int AT_ONCE = 4;  // 8-token tiles of an epilogue: its code for all 16 would not fit the caches

// The first token and feature of this block, and those of this warp from there.
template <int FEATURES, int TOKENS>
struct Place {
  int first_m, first_n, warp_m, warp_n;

  __device__ __forceinline__ explicit Place(const Epilogue& e) {
    const int warp = threadIdx.x / 32;
    const TileIndex tile = tile_index(blockIdx.x, GROUP_M, (e.M + TOKENS - 1) / TOKENS, (e.N + FEATURES - 1) / FEATURES);
    first_m = tile.m * TOKENS, first_n = tile.n * FEATURES;
    warp_m = warp % 2 * (TOKENS / 2), warp_n = warp / 2 * (FEATURES / 2);
  }
};

// copier.copy(step, to) copies what multiply(from) multiplies STAGES - 1 steps later. shared: the address of STAGES stages.
template <int STAGES, int STAGE_BYTES, class Copier, class Multiply>
__device__ __forceinline__ void pipeline(uint32_t shared, int steps, const Copier& copier, Multiply multiply) {
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) copier.copy(step, shared + step * STAGE_BYTES);
    commit_copies();
  }
  int stage = 0, next_stage = STAGES - 1;
  for (int step = 0; step < steps; ++step) {
    await_copies<STAGES - 2>();
    __syncthreads();  // this stage is here, and nobody reads the one that is copied to now
    const int next = step + STAGES - 1;
    if (next < steps) copier.copy(next, shared + next_stage * STAGE_BYTES);
    commit_copies();  // empty ones too: groups are counted
    multiply(shared + stage * STAGE_BYTES);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
  }
}

// The epilogue of a warp's sums, which are of PAIRS of 16-feature tiles x BLOCKS of 8 tokens, in turns of AT_ONCE blocks:
// finish(n, m, of) takes of[token][feature], a lane's four features of tokens m, m + 1, m + 8 .. from the lane's first ones.
template <int PAIRS, int BLOCKS, class Sum, class Finish>
__device__ __forceinline__ void in_turns(Sum (&sums)[PAIRS * BLOCKS][2][4], Finish finish) {
  constexpr int COUNT = BLOCKS < AT_ONCE ? BLOCKS : AT_ONCE;
#pragma unroll 1
  for (int done = 0; done < PAIRS * BLOCKS; done += COUNT) {
    Sum of[2 * COUNT][4];
#pragma unroll
    for (int j = 0; j < 2 * COUNT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) of[j][i] = sums[j / 2][i / 2][2 * (i % 2) + j % 2];
    finish(done / BLOCKS * PAIR, done % BLOCKS * 8, of);
#pragma unroll
    for (int block = 0; block + COUNT < PAIRS * BLOCKS; ++block)  // registers have no index: the next ones move here
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[block][i][j] = sums[block + COUNT][i][j];
  }
}

// A block a tile; the parameters are the problem.
template <class Problem, class Config>
void prepare(const Problem& problem, const Config& config, int, Launch& launch) {
  launch.grid = static_cast<uint32_t>(tiles(config, problem.epilogue));
  set_params(problem, launch);
}

}  // namespace
}  // namespace pyvit_accel
