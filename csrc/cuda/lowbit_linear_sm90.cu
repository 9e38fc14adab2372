// y = epilogue(x w^T) on int8 codes, for Hopper: wgmma with the weights from registers, operands brought by TMA.
//
//     x         (M, x_stride)  int8, K-major
//     w_packed  (ceil(N / 16), w_stride)  4 or 8 bits, formats/packed.py
//     y         (M, N)  float32 or int8 codes, epilogue.cuh
//
// The frame is hopper_linear.cuh: persistent blocks, a thread that copies ahead, consumers of 128 features each. A stage is 128
// inputs. Where 128 tokens or more share weights, so do clusters of two blocks: each copies half of them, to both:
//
//     global                   shared, 128-byte swizzle           registers
//     x rows of 128 bytes      [TOKENS][128]                      never: operand B of wgmma is read from shared memory
//     packed, 4 chunks         [FEATURES / 16][4][chunk]          ld.shared.v4: A of two m64 wgmmas (4 bits: after unpacking)
//
// A consumer takes 4 steps of 32 inputs a stage: load A, two wgmmas, wait for those of the step before. After the first of them
// all of the stage before is read, and given back.
//
// So the loads and the unpacking of a step run under the products of the step before, whose A is in other registers. What
// lies beyond M, N and K arrives as zeros from TMA; chunks beyond the last, which unpack to -8 at 4 bits, are not
// multiplied. 4-bit weights arrive times 16, and so do their sums, exact up to K = 131071. Sizes: lowbit_linear_sm90.h.
#include <cuda_runtime.h>

#include <cstddef>

#include "epilogue.cuh"
#include "hopper_linear.cuh"
#include "lowbit_linear_sm90.h"

namespace pyvit_accel {
namespace {

// One thread.
template <class Tile>
__device__ __forceinline__ void produce(const HopperParams& p, Stages<Tile> stages) {
  hopper::prefetch_tensor_map(p.x_map);
  hopper::prefetch_tensor_map(p.w_map);
  const int count = (p.chunks + Tile::CHUNKS - 1) / Tile::CHUNKS;
  copy_ahead<Tile>(p.epilogue, count, stages, [&](const Stages<Tile>& at, Corner corner, int stage) {
    uint64_t* const full = at.full + at.stage;
    hopper::tma_load(at.x(), p.x_map, full, stage * (Tile::CHUNKS * CHUNK), corner.m);
    const int line = stage * Tile::PACKED_LINES, first = corner.n / TILE;
    if constexpr (Tile::CLUSTER == 1) {
      hopper::tma_load(at.w(), p.w_map, full, 0, line, first);
    } else {
      const uint32_t part = rank<Tile>();
      hopper::tma_load_to(Tile::ALL_BLOCKS, at.w() + part * Tile::W_PART_BYTES, p.w_map, full, 0, line,
                          first + part * Tile::W_PART_TILES);
    }
  });
}

// Products of 32 inputs: sums[i] of the i-th m64 of this consumer. w: the address of this lane's weights, chunk 0; x: the
// descriptor of the stage. Returns while they run.
template <class Tile>
__device__ __forceinline__ void multiply(int32_t (&sums)[2][Tile::TOKENS / 2], uint32_t w, uint64_t x, int chunk,
                                         bool accumulate) {
  const uint32_t step = chunk * chunk_bytes(Tile::W_BITS);
  uint32_t low[4], a[2][4];
  load_words(swizzled_ahead(w, step), low);
  if constexpr (Tile::W_BITS == 4) {
    unpack4(low, a);
  } else {
    uint32_t high[4];
    load_words(swizzled_ahead(w, step + 256), high);
    unpack8(low, high, a);
  }
  hopper::pin(a[0]);
  hopper::pin(a[1]);
  hopper::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 2; ++i) hopper::wgmma<Tile::TOKENS>(sums[i], a[i], x + 2 * chunk, accumulate);
  hopper::wgmma_commit();
}

// The products of a tile. Returns when they are done and their stages are given back.
template <class Tile>
__device__ __forceinline__ void multiply_tile(int32_t (&sums)[2][Tile::TOKENS / 2], int chunks, Stages<Tile>& at) {
  const int lane = threadIdx.x % 32;
  const uint32_t w = threadIdx.x / 32 * 2 * Tile::PACKED_BYTES + swizzle128(weight_offset(lane, Tile::PACKED_BYTES));
  uint64_t* read = at.empty;  // of the stage before

  const int whole = chunks / Tile::CHUNKS * Tile::CHUNKS;
  for (int chunk = 0; chunk < whole; chunk += Tile::CHUNKS, at.next()) {
    hopper::mbarrier_wait(at.full + at.stage, at.parity);
    const uint64_t x = hopper::swizzled_operand(at.x());
#pragma unroll
    for (int i = 0; i < Tile::CHUNKS; ++i) {
      multiply<Tile>(sums, at.w() + w, x, i, chunk + i > 0);
      hopper::wgmma_wait<1>();
      if (i == 0) give_back<Tile>(read, chunk > 0);
    }
    read = at.empty + at.stage;
  }
  hopper::wgmma_wait<0>();
  give_back<Tile>(read, whole > 0);
  if (whole < chunks) {  // the last stage is not full; seldom, so it waits for every step
    hopper::mbarrier_wait(at.full + at.stage, at.parity);
    const uint64_t x = hopper::swizzled_operand(at.x());
#pragma unroll 1
    for (int i = 0; i < chunks - whole; ++i) {
      multiply<Tile>(sums, at.w() + w, x, i, whole + i > 0);
      hopper::wgmma_wait<0>();
    }
    give_back<Tile>(at.empty + at.stage);
    at.next();
  }
  hopper::pin(sums[0]);
  hopper::pin(sums[1]);
}

// Brings what this warp will add of the residual to L2, a line of 32 features from each token, under the products of the tile.
template <class Tile>
__device__ __forceinline__ void prefetch_residual(const Epilogue& e, int m, int n) {
  if (n >= e.N) return;
#pragma unroll
  for (int i = 0; i < Tile::TOKENS; i += 32) {
    const int64_t token = min(m + i + static_cast<int>(threadIdx.x % 32), e.M - 1);
    hopper::prefetch(e.residual + token * e.residual_stride + n);
  }
}

template <class Tile>
__device__ __forceinline__ void consume(const HopperParams& p, Stages<Tile> at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Tiles<Tile> tiles(p.epilogue);
  for (uint32_t tile = tiles.first(); tile < tiles.end(); tile += tiles.step()) {
    const Corner corner = tiles.corner(tile);
    if (p.epilogue.residual) prefetch_residual<Tile>(p.epilogue, corner.m, corner.n + warp * PAIR);
    int32_t sums[2][Tile::TOKENS / 2];
    multiply_tile<Tile>(sums, p.chunks, at);
    const int m = corner.m + lane_token(lane), n = corner.n + warp * PAIR + lane_feature(lane);
    const Features features = load_features(p.epilogue, n);
#pragma unroll 1
    for (int turn = 0; turn < Tile::TURNS; ++turn) {
      int32_t of[2 * Tile::AT_ONCE][4];
      take<Tile>(sums, turn, of);
      finish(p.epilogue, features, m + turn * Tile::AT_ONCE * 8, n, of);
    }
    __syncwarp();  // lanes beyond M or N were elsewhere; wgmma takes whole warps
  }
}

template <class Tile>
__device__ __forceinline__ void lowbit_linear(const HopperParams& p) {
  run_block<Tile>([&](const Stages<Tile>& stages) { produce<Tile>(p, stages); },
                  [&](const Stages<Tile>& stages) { consume<Tile>(p, stages); });
}

template <class Tile>
void prepare(const LowbitLinear& problem, const LowbitLinearConfig& config, int sm_count, Launch& launch) {
  const Epilogue& e = problem.epilogue;
  const uint64_t chunks = ceil_div(problem.K, CHUNK);
  HopperParams params = {};
  params.epilogue = e;
  params.chunks = static_cast<int32_t>(chunks);
  set_params(params, launch);
  launch.dependent = 1;
  launch.grid = persistent_grid(config, e, sm_count);

  launch.num_maps = 2;
  launch.maps[0] = map_of_x(problem.x, problem.x_stride, e.M, problem.K, 1, Tile::TOKENS, offsetof(HopperParams, x_map));
  TensorMap& w = launch.maps[1];
  w.base = reinterpret_cast<uint64_t>(e.w_packed) + HEADER;
  w.rank = 3, w.element_bytes = 1, w.swizzle = 1, w.offset = offsetof(HopperParams, w_map);
  w.dims[0] = 128, w.dims[1] = chunks * chunk_bytes(Tile::W_BITS) / 128, w.dims[2] = ceil_div(e.N, TILE);
  w.strides[0] = 128, w.strides[1] = e.w_stride;
  w.box[0] = 128, w.box[1] = Tile::PACKED_LINES, w.box[2] = Tile::W_PART_TILES;
}

}  // namespace
}  // namespace pyvit_accel

// The kernels: name, bits, consumers, tokens.
#define KERNELS(KERNEL)                            \
  KERNEL(lowbit_linear_sm90_w8_256x176, 8, 2, 176) \
  KERNEL(lowbit_linear_sm90_w4_256x176, 4, 2, 176) \
  KERNEL(lowbit_linear_sm90_w8_256x128, 8, 2, 128) \
  KERNEL(lowbit_linear_sm90_w4_256x128, 4, 2, 128) \
  KERNEL(lowbit_linear_sm90_w8_128x128, 8, 1, 128) \
  KERNEL(lowbit_linear_sm90_w4_128x128, 4, 1, 128) \
  KERNEL(lowbit_linear_sm90_w8_128x64, 8, 1, 64)   \
  KERNEL(lowbit_linear_sm90_w4_128x64, 4, 1, 64)   \
  KERNEL(lowbit_linear_sm90_w8_128x32, 8, 1, 32)   \
  KERNEL(lowbit_linear_sm90_w4_128x32, 4, 1, 32)   \
  KERNEL(lowbit_linear_sm90_w8_128x16, 8, 1, 16)   \
  KERNEL(lowbit_linear_sm90_w4_128x16, 4, 1, 16)

#define DEFINE(NAME, W_BITS, CONSUMERS, TOKENS)                                                           \
  using NAME##_tile = pyvit_accel::HopperTile<W_BITS, CONSUMERS, TOKENS>;                                 \
  extern "C" __global__ void __launch_bounds__(NAME##_tile::THREADS, NAME##_tile::BLOCKS_PER_SM)          \
      NAME(const __grid_constant__ pyvit_accel::HopperParams p) {                                         \
    pyvit_accel::lowbit_linear<NAME##_tile>(p);                                                           \
  }
KERNELS(DEFINE)
#undef DEFINE

namespace pyvit_accel {

std::span<const LowbitLinearConfig> lowbit_linear_sm90() {
#define DESCRIBE(NAME, W_BITS, CONSUMERS, TOKENS) \
  {describe<NAME##_tile>(#NAME, reinterpret_cast<const void*>(&NAME)), W_BITS, 4096, prepare<NAME##_tile>},
  static const LowbitLinearConfig configs[] = {KERNELS(DESCRIBE)};
#undef DESCRIBE
  return configs;
}

}  // namespace pyvit_accel
