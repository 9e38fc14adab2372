// The frame of Hopper's linear kernels: tiles of y that blocks take in turn, stages that one thread copies into ahead of those
// that multiply, and the way of the sums to the epilogue. A kernel brings what it copies and how it multiplies.
//
// The grid is persistent: a block takes tiles blockIdx.x, + gridDim.x .. of FEATURES x TOKENS, a cluster as many at once as it has
// blocks. One thread of a block, the producer, copies as far ahead as there are stages, across tiles too; 128 threads, a consumer,
// multiply each 128 features. The stages lie in shared memory, a ring, each with two barriers:
//
//     producer    wait empty[i]   announce the bytes of stage i, copy to it; i goes round the stages
//     consumer    wait full[i]    multiply; when nothing reads stage i any more, arrive at empty[i], of all blocks of the cluster
//
// Blocks of a cluster copy a share each of what they have in common, to all of them; so a stage is free when the consumers of all
// of them gave it back. What lies outside a tensor arrives as zeros, and counts as bytes.
//
// Registers. An SM has 512 a lane in each of its four quarters, and warp w is in quarter w % 4. A fifth warp of a block, for
// the copies, would take a quarter from 2 to 3 warps (two blocks an SM) and leave 168 to each of them: too few for 128 sums,
// two steps of A and their addresses, and the assembler then waits after every wgmma. So the producer is a warpgroup too, of
// which one thread works, and setmaxnreg moves what it does not need to the consumers: 2 x 2 x 128 = 2 (232 + 24), and
// 3 x 168 = 2 x 240 + 24.
#pragma once
#include <cstdint>
#include <type_traits>

#include "fragments.cuh"
#include "hopper.cuh"
#include "linear_plan.h"

namespace pyvit_accel {

// What a Tile, the sizes of a kernel, is made from; it adds
//
//     GROUP_M          token tiles that in turn share a column of weights in L2
//     X_BYTES, STAGE_BYTES, STAGES, SHARED_BYTES
//     AT_ONCE, TURNS   tiles of 8 tokens that the epilogue takes in a turn, as many as registers allow, for their loads are under
//                      way together, and turns
//     SHIFT            bits that sums are shifted to the right
//
// CONSUMERS: warpgroups that multiply. A cluster has so many blocks of other features, and of other tokens.
template <int CONSUMERS_, int TOKENS_, int CLUSTER_FEATURES_, int CLUSTER_TOKENS_>
struct HopperBlock {
  static constexpr int CONSUMERS = CONSUMERS_, TOKENS = TOKENS_, FEATURES = 128 * CONSUMERS;
  static constexpr int CLUSTER_FEATURES = CLUSTER_FEATURES_, CLUSTER_TOKENS = CLUSTER_TOKENS_;
  static constexpr int CLUSTER = CLUSTER_FEATURES * CLUSTER_TOKENS;
  static constexpr uint16_t ALL_BLOCKS = (1 << CLUSTER) - 1;
  static constexpr int BLOCKS_PER_SM = CONSUMERS == 1 ? 2 : 1;
  static constexpr int SHARED_LIMIT = (BLOCKS_PER_SM == 2 ? 113 : 227) * 1024;
  static constexpr int THREADS = 128 * (CONSUMERS + 1);  // the last 128 are the producer's
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 1 ? 232 : 240, PRODUCER_REGISTERS = 24;
};

namespace {

// Of this block in its cluster.
template <class Tile>
__device__ __forceinline__ uint32_t rank() {
  return blockIdx.x % Tile::CLUSTER;
}

struct Corner {
  int m, n;  // token, feature
};

// The tiles of y that a cluster takes, each as many of its blocks' as it has blocks.
template <class Tile>
struct Tiles {
  static constexpr int TOKENS = Tile::TOKENS * Tile::CLUSTER_TOKENS, FEATURES = Tile::FEATURES * Tile::CLUSTER_FEATURES;
  uint32_t m, n;

  __device__ __forceinline__ explicit Tiles(const Epilogue& e)
      : m((e.M + TOKENS - 1) / TOKENS), n((e.N + FEATURES - 1) / FEATURES) {}
  __device__ __forceinline__ uint32_t first() const { return blockIdx.x / Tile::CLUSTER; }
  __device__ __forceinline__ uint32_t step() const { return gridDim.x / Tile::CLUSTER; }
  __device__ __forceinline__ uint32_t end() const { return m * n; }
  __device__ __forceinline__ Corner corner(uint32_t tile) const {  // of this block's
    const TileIndex index = tile_index(tile, Tile::GROUP_M, m, n);
    const uint32_t m_of_cluster = rank<Tile>() % Tile::CLUSTER_TOKENS, n_of_cluster = rank<Tile>() / Tile::CLUSTER_TOKENS;
    return {static_cast<int>(index.m * TOKENS + m_of_cluster * Tile::TOKENS),
            static_cast<int>(index.n * FEATURES + n_of_cluster * Tile::FEATURES)};
  }
};

// The stages in shared memory, x first, and where one is in their round: `parity` is that of its barriers' phase.
template <class Tile>
struct Stages {
  uint32_t base;    // shared-memory address
  uint64_t* full;   // 1 arrival, the producer's, and the bytes of a stage
  uint64_t* empty;  // an arrival of each consumer warp of the cluster
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit Stages(uint8_t* shared)
      : base(shared_address(shared)),
        full(reinterpret_cast<uint64_t*>(shared + Tile::STAGES * Tile::STAGE_BYTES)),
        empty(full + Tile::STAGES) {}
  __device__ __forceinline__ uint32_t x() const { return base + stage * Tile::STAGE_BYTES; }
  __device__ __forceinline__ uint32_t w() const { return x() + Tile::X_BYTES; }
  __device__ __forceinline__ void next() {
    if (++stage == Tile::STAGES) stage = 0, parity ^= 1;
  }
};

// A warp of a consumer has read its stage; `any`: if there is one.
template <class Tile>
__device__ __forceinline__ void give_back(uint64_t* empty, bool any = true) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if constexpr (Tile::CLUSTER == 1)
    hopper::mbarrier_arrive_if(empty, any && lane == 0);
  else
    hopper::mbarrier_arrive_if(empty, lane, any && lane < Tile::CLUSTER);  // lane i at block i
}

// The producer. copy(at, corner, stage) issues the copies of a stage of the tile at this corner, to where `at` is.
template <class Tile, class Copy>
__device__ __forceinline__ void copy_ahead(const Epilogue& e, int stages, Stages<Tile> at, Copy copy) {
  const Tiles<Tile> tiles(e);
  for (uint32_t tile = tiles.first(); tile < tiles.end(); tile += tiles.step()) {
    const Corner corner = tiles.corner(tile);
    for (int stage = 0; stage < stages; ++stage, at.next()) {
      hopper::mbarrier_wait(at.empty + at.stage, at.parity ^ 1);
      // All of it, though some may lie outside the tensors.
      hopper::mbarrier_arrive_expect(at.full + at.stage, Tile::STAGE_BYTES);
      copy(at, corner, stage);
    }
  }
  // The other blocks still arrive here, which they could not if this one were gone.
  if constexpr (Tile::CLUSTER > 1)
    for (int i = 0; i < Tile::STAGES; ++i, at.next()) hopper::mbarrier_wait(at.empty + at.stage, at.parity ^ 1);
}

// The sums of AT_ONCE tiles of 8 tokens as the epilogue takes them, those of turn `turn`, which is one of FIRST .. + COUNT - 1.
// Registers have no index: every turn has its own moves, found by halving. They are volatile lest the compiler make them
// all, and selections.
template <class Tile, int FIRST = 0, int COUNT = Tile::TURNS, class T>
__device__ __forceinline__ void take(const T (&sums)[2][Tile::TOKENS / 2], int turn, T (&to)[2 * Tile::AT_ONCE][4]) {
  if constexpr (COUNT > 1) {
    if (turn < FIRST + COUNT / 2)
      take<Tile, FIRST, COUNT / 2>(sums, turn, to);
    else
      take<Tile, FIRST + COUNT / 2, COUNT - COUNT / 2>(sums, turn, to);
  } else {
#pragma unroll
    for (int j = 0; j < 2 * Tile::AT_ONCE; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T& sum = sums[i / 2][4 * (FIRST * Tile::AT_ONCE + j / 2) + 2 * (i % 2) + j % 2];
        if constexpr (Tile::SHIFT > 0)
          asm volatile("shr.s32 %0, %1, %2;" : "=r"(to[j][i]) : "r"(sum), "n"(Tile::SHIFT));
        else if constexpr (std::is_same_v<T, float>)
          asm volatile("mov.b32 %0, %1;" : "=f"(to[j][i]) : "f"(sum));
        else
          asm volatile("mov.b32 %0, %1;" : "=r"(to[j][i]) : "r"(sum));
      }
  }
}

// A block: produce(stages) by one thread, consume(stages) by each consumer's.
template <class Tile, class Produce, class Consume>
__device__ __forceinline__ void run_block(Produce produce, Consume consume) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the other architectures hold the name alone, which none of their plans has
  extern __shared__ __align__(1024) uint8_t shared[];
  const Stages<Tile> stages(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::STAGES; ++i) {
      hopper::mbarrier_init(stages.full + i, 1);
      hopper::mbarrier_init(stages.empty + i, 4 * Tile::CONSUMERS * Tile::CLUSTER);
    }
    hopper::fence_mbarrier_init();
  }
  if constexpr (Tile::CLUSTER == 1)
    __syncthreads();
  else
    hopper::cluster_sync();
  hopper::allow_launch_after();
  hopper::await_launches_before();  // nothing above reads or writes global memory
  if (threadIdx.x < 128 * Tile::CONSUMERS) {
    hopper::take_registers<Tile::CONSUMER_REGISTERS>();
    consume(stages);  // of every copy, so none is under way when the block ends
  } else {
    hopper::give_registers<Tile::PRODUCER_REGISTERS>();
    if (threadIdx.x == 128 * Tile::CONSUMERS) produce(stages);
  }
#endif
}

// ---- on the host

template <class Tile>
Kernel describe(const char* name, const void* function) {
  return {name, function, 90, Tile::FEATURES, Tile::TOKENS, Tile::THREADS, Tile::SHARED_BYTES, Tile::BLOCKS_PER_SM,
          Tile::CLUSTER_FEATURES, Tile::CLUSTER_TOKENS};
}

// Of x (M, K), by boxes of 128 bytes of so many tokens, in the 128-byte swizzle. offset: of the map in the parameters.
inline TensorMap map_of_x(const void* x, int64_t x_stride, int M, int K, int element_bytes, int box_tokens, size_t offset) {
  TensorMap map = {};
  map.base = reinterpret_cast<uint64_t>(x);
  map.rank = 2, map.element_bytes = element_bytes, map.swizzle = 1, map.offset = static_cast<uint32_t>(offset);
  map.dims[0] = K, map.dims[1] = M;
  const int64_t row_bytes = 16 * ceil_div(static_cast<int64_t>(K) * element_bytes, 16);
  map.strides[0] = M > 1 ? x_stride : row_bytes;  // a single row's means nothing
  map.box[0] = 128 / element_bytes, map.box[1] = box_tokens;
  return map;
}

}  // namespace
}  // namespace pyvit_accel
