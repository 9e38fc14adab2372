// y = epilogue(x w^T), w 2:4 sparse, for Hopper: wgmma.sp with the weights from registers, x brought by TMA.
//
//     x             (M, x_stride)  int8 | float16 | bfloat16, K-major
//     values, meta  P24 v1, formats/sparse24.py
//     y             (M, N)  int8: float32 or int8 codes; 16 bits: their type or int8 codes; epilogue.cuh
//
// The grid is persistent: a block takes tiles blockIdx.x, + gridDim.x .. of FEATURES x TOKENS. One thread copies x ahead, 128
// bytes of every token a stage, as far as there are stages, across tiles too; 128 threads (a consumer) multiply each 128
// features. Blocks of 128 tokens come in clusters of two, of the same tokens: each copies half of x, to both:
//
//     global                        shared, 128-byte swizzle     registers
//     x rows of 128 bytes           [TOKENS][128]                never: operand B of wgmma is read from shared memory
//     values, 2 tiles x 2 k-steps                                ld.global.v4: A of four m64 wgmmas; a stage ahead
//     metadata of them                                           ld.global.v2, likewise
//
//     producer    wait empty[i]   announce, copy x (to all blocks of the cluster); i goes round the stages
//     consumer    wait full[i]    four wgmmas; load A of the next stage, of the next tile too; wait; arrive at empty[i] (of all)
//
// Packed weights lie in the order of registers, so they need no shared memory, whose bandwidth is what limits a sparse wgmma:
// m64nTk takes T / 2 clocks and reads 64 T bytes of x, all of the 128 a clock there are. What is copied comes on top. In
// clocks of an SM per k-step of a tile, and bytes of L2 (24 to 46 a clock, by others' measurements):
//
//     features x tokens   cluster   products   shared memory   L2 bytes a clock
//     128 x 128           2         128        128 + 64        68, two blocks an SM
//     256 x 128           2         256        256 + 64        52
//     128 x 64            1         64         64 + 32         136, two blocks an SM
//
// so 256 x 128 reaches 80 % of its products' rate where L2 keeps up, and values in shared memory, written and read there,
// would take 64 clocks more. After K = 768 of 16 bits, 6144 clocks of products, the epilogue has 28 instructions an output (60
// with GELU) for 128 lanes a clock, 7000 to 15000 clocks: two blocks of 128 x 128 on an SM hide their products under each
// other's. None of it is measured; the plan (sparse24_linear.cu) chooses by these numbers.
//
// A consumer waits for its four wgmmas before the next four, so that their registers are free: the other consumer, or the
// other block, has four of its own under way meanwhile, 256 clocks. A of the next stage arrives in that time too. What lies
// beyond M and K arrives as zeros from TMA; packed weights have whole groups of k-steps, and of features beyond the last
// packed ones the last are taken.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>

#include "epilogue.cuh"
#include "hopper_stages.cuh"
#include "sparse24.cuh"

namespace pyvit_accel {
namespace {

// CONSUMERS: warpgroups that multiply, of 128 features each.
template <int ELEMENTS_, int CONSUMERS_, int TOKENS_>
struct SparseTile {
  static constexpr int ELEMENTS = ELEMENTS_, CONSUMERS = CONSUMERS_, TOKENS = TOKENS_;
  static constexpr int FEATURES = 128 * CONSUMERS;
  static constexpr int BLOCKS_PER_SM = CONSUMERS == 1 ? 2 : 1;
  static constexpr int CLUSTER = TOKENS < 128 ? 1 : 2;   // blocks of the same tokens, each of which copies its share to all
  static constexpr int THREADS = 128 * (CONSUMERS + 1);  // the last 128 are the producer's
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 1 ? 232 : 240, PRODUCER_REGISTERS = 24;

  static constexpr int GROUP_M = 16;  // token tiles that in turn share a column of weights in L2
  static constexpr int X_BYTES = TOKENS * STAGE_INPUT_BYTES, STAGE_BYTES = X_BYTES;
  static constexpr int X_PART_TOKENS = TOKENS / CLUSTER, X_PART_BYTES = X_BYTES / CLUSTER;  // that a block copies
  static_assert(X_PART_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");

  // Of 227 KiB, or 113 when two blocks share it; the rest is L1's, through which the weights come.
  static constexpr int STAGES = 6;
  static constexpr int SHARED_BYTES = STAGES * (STAGE_BYTES + 16);
  static_assert(SHARED_BYTES <= (BLOCKS_PER_SM == 2 ? 113 : 227) * 1024);

  // The epilogue takes as many tiles of 8 tokens in a turn as registers allow: their loads are under way together.
  static constexpr int AT_ONCE = TOKENS == 128 ? 2 : 4, TURNS = TOKENS / 8 / AT_ONCE;
  static_assert(TOKENS % (8 * AT_ONCE) == 0, "turns are alike");
};

// The parameters of every kernel.
struct SparseParams {
  alignas(64) uint8_t x_map[128];  // (K, M), box 128 bytes x X_PART_TOKENS, 128-byte swizzle
  Epilogue epilogue;
  const uint8_t* values;
  const uint8_t* meta;
  int32_t stages;  // of an output tile
  int32_t groups;  // of k-steps, of a packed row
};

struct Corner {
  int m, n;  // token, feature
};

// The tiles of y that a cluster takes: as many tiles of features as it has blocks, of the same tokens.
template <class Tile>
struct Tiles {
  static constexpr int FEATURES = Tile::FEATURES * Tile::CLUSTER;
  uint32_t m, n;

  __device__ __forceinline__ explicit Tiles(const Epilogue& e)
      : m((e.M + Tile::TOKENS - 1) / Tile::TOKENS), n((e.N + FEATURES - 1) / FEATURES) {}
  __device__ __forceinline__ uint32_t first() const { return blockIdx.x / Tile::CLUSTER; }
  __device__ __forceinline__ uint32_t step() const { return gridDim.x / Tile::CLUSTER; }
  __device__ __forceinline__ uint32_t end() const { return m * n; }
  __device__ __forceinline__ Corner corner(uint32_t tile) const {  // of this block's
    const TileIndex index = tile_index(tile, Tile::GROUP_M, m, n);
    return {static_cast<int>(index.m * Tile::TOKENS), static_cast<int>(index.n * FEATURES + rank<Tile>() * Tile::FEATURES)};
  }
};

// One thread.
template <class Tile>
__device__ __forceinline__ void produce(const SparseParams& p, Stages<Tile> at) {
  hopper::prefetch_tensor_map(p.x_map);
  const Tiles<Tile> tiles(p.epilogue);
  for (uint32_t tile = tiles.first(); tile < tiles.end(); tile += tiles.step()) {
    const Corner corner = tiles.corner(tile);
    for (int stage = 0; stage < p.stages; ++stage, at.next()) {
      hopper::mbarrier_wait(at.empty + at.stage, at.parity ^ 1);
      uint64_t* const full = at.full + at.stage;
      hopper::mbarrier_arrive_expect(full, Tile::STAGE_BYTES);  // all of it, though some may lie outside x
      const int input = stage * inputs_of_stage(Tile::ELEMENTS);
      if constexpr (Tile::CLUSTER == 1) {
        hopper::tma_load(at.x(), p.x_map, full, input, corner.m);
      } else {
        constexpr uint16_t ALL = (1 << Tile::CLUSTER) - 1;
        const uint32_t part = rank<Tile>();
        hopper::tma_load_to(ALL, at.x() + part * Tile::X_PART_BYTES, p.x_map, full, input, corner.m + part * Tile::X_PART_TOKENS);
      }
    }
  }
  // The other blocks still arrive here, which they could not if this one were gone.
  if constexpr (Tile::CLUSTER > 1)
    for (int i = 0; i < Tile::STAGES; ++i, at.next()) hopper::mbarrier_wait(at.empty + at.stage, at.parity ^ 1);
}

// A stage of this warp's weights, a pair of tiles, in registers.
template <class Tile>
struct Weights {
  static constexpr int WORDS = WORDS_OF_PAIR<Tile::ELEMENTS>;
  uint32_t a[STEPS][2][4];
  uint32_t e[WORDS][STEPS];

  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) hopper::pin(a[k][0]), hopper::pin(a[k][1]);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) hopper::pin(e[i]);
  }
};

// Where a lane's weights lie: of the pair of tiles from feature n on.
template <class Tile>
struct WeightPointers {
  static constexpr int WORDS = WORDS_OF_PAIR<Tile::ELEMENTS>;
  const uint8_t *values, *meta;

  __device__ __forceinline__ WeightPointers(const SparseParams& p, int n) {
    const int pairs = (p.epilogue.N + 127) / 128 * (128 / PAIR);
    const int64_t pair = min(n / PAIR, pairs - 1), lane = threadIdx.x % 32;
    values = p.values + pair * 2 * p.groups * STEPS_PER_GROUP * TILE_BYTES + lane * UNIT;
    meta = p.meta + pair * WORDS * p.groups * GROUP_BYTES + lane * 16;
  }
  __device__ __forceinline__ void load(Weights<Tile>& to, int stage, int groups) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint8_t* const tile = values + (static_cast<int64_t>(i) * groups * STEPS_PER_GROUP + stage * STEPS) * TILE_BYTES;
#pragma unroll
      for (int k = 0; k < STEPS; ++k) hopper::load_words_once(tile + k * TILE_BYTES, to.a[k][i]);
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      hopper::load_words(meta + (static_cast<int64_t>(i) * groups + stage / 2) * GROUP_BYTES + stage % 2 * 8, to.e[i]);
  }
};

// The products of a tile, whose first weights are in `next`; leaves there the first ones from `after`. Returns when they are
// done and their stages are given back.
template <class Tile>
__device__ __forceinline__ void multiply_tile(Sum<Tile::ELEMENTS> (&sums)[2][Tile::TOKENS / 2], const SparseParams& p,
                                              const WeightPointers<Tile>& weights, const WeightPointers<Tile>& after,
                                              Weights<Tile>& next, Stages<Tile>& at) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int stage = 0; stage < p.stages; ++stage, at.next()) {
    Weights<Tile> now = next;
    now.pin();
    const bool last = stage + 1 == p.stages;
    WeightPointers<Tile> from = weights;
    from.values = last ? after.values : weights.values, from.meta = last ? after.meta : weights.meta;
    from.load(next, last ? 0 : stage + 1, p.groups);
    hopper::mbarrier_wait(at.full + at.stage, at.parity);
    const uint64_t x = hopper::swizzled_operand(at.x());
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      constexpr int SECOND = Tile::ELEMENTS == INT8 ? 0 : 1;  // selector: the other half of the same words
      hopper::wgmma_sparse<Tile::ELEMENTS, 0, Tile::TOKENS>(sums[0], now.a[k][0], now.e[0][k], x + 4 * k, stage + k > 0);
      hopper::wgmma_sparse<Tile::ELEMENTS, SECOND, Tile::TOKENS>(sums[1], now.a[k][1], now.e[Weights<Tile>::WORDS - 1][k], x + 4 * k,
                                                                 stage + k > 0);
    }
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    now.pin();
    __syncwarp();
    if constexpr (Tile::CLUSTER == 1)
      hopper::mbarrier_arrive_if(at.empty + at.stage, lane == 0);
    else
      hopper::mbarrier_arrive_if(at.empty + at.stage, lane, lane < Tile::CLUSTER);  // lane i at block i
  }
  hopper::pin(sums[0]);
  hopper::pin(sums[1]);
}

// The sums of AT_ONCE tiles of 8 tokens as the epilogue takes them, those of turn `turn`, which is one of FIRST .. + COUNT - 1.
// Registers have no index: every turn has its own moves, found by halving. They are volatile lest the compiler make them
// all, and selections.
template <class Tile, int FIRST = 0, int COUNT = Tile::TURNS>
__device__ __forceinline__ void take(const Sum<Tile::ELEMENTS> (&sums)[2][Tile::TOKENS / 2], int turn,
                                     Sum<Tile::ELEMENTS> (&to)[2 * Tile::AT_ONCE][4]) {
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
        const int at = 4 * (FIRST * Tile::AT_ONCE + j / 2) + 2 * (i % 2) + j % 2;
        if constexpr (Tile::ELEMENTS == INT8)
          asm volatile("mov.b32 %0, %1;" : "=r"(to[j][i]) : "r"(sums[i / 2][at]));
        else
          asm volatile("mov.b32 %0, %1;" : "=f"(to[j][i]) : "f"(sums[i / 2][at]));
      }
  }
}

template <class Tile>
__device__ __forceinline__ void consume(const SparseParams& p, Stages<Tile> at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Tiles<Tile> tiles(p.epilogue);
  Corner corner = tiles.corner(tiles.first());
  WeightPointers<Tile> weights(p, corner.n + warp * PAIR);
  Weights<Tile> next;
  weights.load(next, 0, p.groups);
  for (uint32_t tile = tiles.first(); tile < tiles.end(); tile += tiles.step()) {
    const Corner next_corner = tiles.corner(min(tile + tiles.step(), tiles.end() - 1));
    const WeightPointers<Tile> after(p, next_corner.n + warp * PAIR);
    Sum<Tile::ELEMENTS> sums[2][Tile::TOKENS / 2];
    multiply_tile<Tile>(sums, p, weights, after, next, at);
    const int m = corner.m + lane_token(lane), n = corner.n + warp * PAIR + exchanged_feature(lane);
    const Features features = load_features<Tile::ELEMENTS == INT8>(p.epilogue, n);
#pragma unroll 1
    for (int turn = 0; turn < Tile::TURNS; ++turn) {
      Sum<Tile::ELEMENTS> of[2 * Tile::AT_ONCE][4];
      take<Tile>(sums, turn, of);
#pragma unroll
      for (int j = 0; j < 2 * Tile::AT_ONCE; ++j) exchange(of[j]);
      if constexpr (Tile::ELEMENTS == INT8)
        finish(p.epilogue, features, m + turn * Tile::AT_ONCE * 8, n, of);
      else if (n < p.epilogue.N)
        complete<Output<Tile::ELEMENTS>>(p.epilogue, features, m + turn * Tile::AT_ONCE * 8, n, of);
      __syncwarp();  // lanes beyond M or N were elsewhere; exchange() and wgmma take whole warps
    }
    corner = next_corner, weights = after;
  }
}

template <class Tile>
__device__ __forceinline__ void sparse24_linear(const SparseParams& p) {
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
    consume<Tile>(p, stages);  // of every copy, so none is under way when the block ends
  } else {
    hopper::give_registers<Tile::PRODUCER_REGISTERS>();
    if (threadIdx.x == 128 * Tile::CONSUMERS) produce<Tile>(p, stages);
  }
#endif
}

template <class Tile>
void prepare(const Sparse24Linear& problem, const Sparse24LinearConfig&, int sm_count, Launch& launch) {
  const Epilogue& e = problem.epilogue;
  const int bytes = element_bytes(Tile::ELEMENTS);
  SparseParams params = {};
  params.epilogue = e;
  params.values = static_cast<const uint8_t*>(problem.values);
  params.meta = reinterpret_cast<const uint8_t*>(problem.meta);
  params.stages = stages_of(problem.K, Tile::ELEMENTS);
  params.groups = groups_of(problem.K, Tile::ELEMENTS);
  launch.param_bytes = sizeof(params);
  *reinterpret_cast<SparseParams*>(launch.params) = params;
  launch.cluster = Tile::CLUSTER;
  launch.dependent = 1;
  const int64_t tiles = ceil_div(e.M, Tile::TOKENS) * ceil_div(e.N, Tile::FEATURES * Tile::CLUSTER);
  const int64_t clusters = std::max(1, sm_count * Tile::BLOCKS_PER_SM / Tile::CLUSTER);
  launch.grid = static_cast<uint32_t>(std::min(tiles, clusters) * Tile::CLUSTER);

  launch.num_maps = 1;
  TensorMap& x = launch.maps[0];
  x.base = reinterpret_cast<uint64_t>(problem.x);
  x.rank = 2, x.element_bytes = bytes, x.swizzle = 1, x.offset = offsetof(SparseParams, x_map);
  x.dims[0] = problem.K, x.dims[1] = e.M;
  x.strides[0] = e.M > 1 ? problem.x_stride : 16 * ceil_div(static_cast<int64_t>(problem.K) * bytes, 16);  // a single row's means nothing
  x.box[0] = inputs_of_stage(Tile::ELEMENTS), x.box[1] = Tile::X_PART_TOKENS;
}

}  // namespace
}  // namespace pyvit_accel

// The kernels: name, elements, consumers, tokens.
#define OF_ELEMENTS(KERNEL, NAME, ELEMENTS) \
  KERNEL(NAME##_256x128, ELEMENTS, 2, 128)  \
  KERNEL(NAME##_128x128, ELEMENTS, 1, 128)  \
  KERNEL(NAME##_128x64, ELEMENTS, 1, 64)    \
  KERNEL(NAME##_128x32, ELEMENTS, 1, 32)
#define KERNELS(KERNEL)                                               \
  OF_ELEMENTS(KERNEL, sparse24_linear_sm90_s8, pyvit_accel::INT8)     \
  OF_ELEMENTS(KERNEL, sparse24_linear_sm90_f16, pyvit_accel::FLOAT16) \
  OF_ELEMENTS(KERNEL, sparse24_linear_sm90_bf16, pyvit_accel::BFLOAT16)

#define DEFINE(NAME, ELEMENTS, CONSUMERS, TOKENS)                                                         \
  using NAME##_tile = pyvit_accel::SparseTile<ELEMENTS, CONSUMERS, TOKENS>;                               \
  extern "C" __global__ void __launch_bounds__(NAME##_tile::THREADS, NAME##_tile::BLOCKS_PER_SM)          \
      NAME(const __grid_constant__ pyvit_accel::SparseParams p) {                                         \
    pyvit_accel::sparse24_linear<NAME##_tile>(p);                                                         \
  }
KERNELS(DEFINE)
#undef DEFINE

namespace pyvit_accel {
namespace {

template <class Tile>
Sparse24LinearConfig describe(const char* name, const void* function) {
  return {name, function, 90, Tile::ELEMENTS, Tile::FEATURES, Tile::TOKENS, Tile::THREADS, Tile::SHARED_BYTES,
          Tile::BLOCKS_PER_SM, 8192, prepare<Tile>, Tile::CLUSTER};
}

}  // namespace

Sparse24LinearConfigs sparse24_linear_sm90() {
#define DESCRIBE(NAME, ELEMENTS, CONSUMERS, TOKENS) describe<NAME##_tile>(#NAME, reinterpret_cast<const void*>(&NAME)),
  static const Sparse24LinearConfig configs[] = {KERNELS(DESCRIBE)};
#undef DESCRIBE
  return {configs, sizeof(configs) / sizeof(configs[0])};
}

}  // namespace pyvit_accel
