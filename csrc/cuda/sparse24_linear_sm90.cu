// y = epilogue(x w^T), w 2:4 sparse, for Hopper: wgmma.sp, weights from registers or from shared memory.
//
//     x             (M, x_stride)  int8 | float16 | bfloat16, K-major
//     values, meta  P24 v1, formats/sparse24.py; FROM_ROWS: rows (features, steps, 32 bytes) instead of values
//     y             (M, N)  int8: float32 or int8 codes; 16 bits: their type or int8 codes; epilogue.cuh
//
// The frame is hopper_linear.cuh: persistent blocks, a thread that copies x ahead, consumers of 128 features each. A stage is 128
// bytes of every token. Blocks of 128 tokens come in clusters of two, of the same tokens: each copies half of x, to both:
//
//     global                        shared                               registers
//     x rows of 128 bytes           [TOKENS][128], 128-byte swizzle      never: operand B is read from shared memory
//     values, 2 tiles x 2 k-steps   never                                ld.global.v4: A of four m64 wgmmas, a stage ahead
//     FROM_ROWS: rows of 64 bytes   [2][FEATURES / 2][64], 64-byte       never: operand A is read from shared memory
//     metadata of 2 k-steps         never                                ld.global.v2, a stage ahead
//     FROM_ROWS: of 4               [FEATURES / 32 or / 16][32][16]      ld.shared.v2
//     values, metadata              never: to L2, when x is copied, by the first of the blocks that will load them
//
// A consumer loads A of the next stage, or of the next tile (FROM_ROWS there is no need), waits for the copies of this one, and
// issues four wgmmas; when they are done it gives the stage back.
//
// A warp's rows of the first m64 are a tile of 16 features, those of the second the next one, so that one word is the
// metadata of both (sparse24.cuh). FROM_ROWS the copies put even tiles first and odd ones behind them, to the same end.
//
// m64nTk takes T / 2 clocks and reads 64 T bytes of x from shared memory: all of the 128 a clock there are. What is copied
// comes on top. In clocks of an SM per k-step of a tile, and bytes of L2 (24 to 46 a clock, by others' measurements):
//
//     features x tokens   cluster   products   shared memory          from rows   L2, 16 bits
//     256 x 128           2         256        256 + 64               + 80 + 72   52
//     128 x 128           2         128        128 + 64               + 40 + 36   68, two blocks an SM
//     128 x 64            1         64         64 + 32                            136, two blocks an SM
//
// So 256 x 128 reaches 80 % of its products' rate where L2 keeps up, and 54 % from rows, which are written and read. Fragment
// order is what makes registers cheap: 20 bytes of a lane for a k-step of 16 features, as they lie. After K = 768 of 16 bits,
// 6144 clocks of products, the epilogue has 21 instructions an output (53 with an activation) for 128 lanes a clock, 5400 to
// 13600 clocks: two blocks of 128 x 128 on an SM hide their products under each other's. None of this is measured; the plan
// (sparse24_linear.cu) chooses by it: FROM_ROWS where one block is alone on an SM, for it gets its weights earlier.
//
// A consumer waits for its four wgmmas before the next four, so that their registers are free: the other consumer, or the
// other block, has four of its own under way meanwhile, 256 clocks. A of the next stage arrives in that time too. What lies
// beyond M and K arrives as zeros from TMA; packed weights have whole groups of k-steps, and of features beyond the last
// packed ones the last are taken.
#include <cuda_runtime.h>

#include <cstddef>

#include "epilogue.cuh"
#include "hopper_linear.cuh"
#include "sparse24.cuh"

namespace pyvit_accel {
namespace {

// With 128 tokens, clusters are of two blocks of the same ones. FROM_ROWS: weights come from shared memory, not from registers.
template <int ELEMENTS_, int CONSUMERS, int TOKENS, bool FROM_ROWS_>
struct SparseTile : HopperBlock<CONSUMERS, TOKENS, TOKENS < 128 ? 1 : 2, 1> {
  using Block = HopperBlock<CONSUMERS, TOKENS, TOKENS < 128 ? 1 : 2, 1>;
  static constexpr int ELEMENTS = ELEMENTS_, SHIFT = 0;
  static constexpr bool FROM_ROWS = FROM_ROWS_;

  static constexpr int GROUP_M = 16;
  // A stage: x; FROM_ROWS the kept weights of even tiles of 16 features, then of odd ones, and the metadata of their group of
  // k-steps, of which a stage takes half: TMA does not copy 8 of 16 bytes.
  static constexpr int X_BYTES = TOKENS * STAGE_INPUT_BYTES;
  static constexpr int W_BYTES = FROM_ROWS ? Block::FEATURES * STAGE_INPUT_BYTES / 2 : 0;
  static constexpr int META_ROWS = 128 / PAIR * WORDS_OF_PAIR<ELEMENTS>, META_BYTES = META_ROWS * GROUP_BYTES;  // of a consumer
  static constexpr int STAGE_BYTES = X_BYTES + W_BYTES + (FROM_ROWS ? CONSUMERS * META_BYTES : 0);
  static constexpr int X_PART_TOKENS = TOKENS / Block::CLUSTER, X_PART_BYTES = X_BYTES / Block::CLUSTER;  // that a block copies
  static_assert(X_PART_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");

  // What they leave of shared memory is L1's, through which weights come that go to registers.
  static constexpr int FIT = Block::SHARED_LIMIT / (STAGE_BYTES + 16), STAGES = FIT < 6 ? FIT : 6;
  static constexpr int SHARED_BYTES = STAGES * (STAGE_BYTES + 16);
  static_assert(STAGES >= 4, "one is multiplied, one is there, and two are on their way");

  static constexpr int AT_ONCE = TOKENS == 128 ? 2 : 4, TURNS = TOKENS / 8 / AT_ONCE;
  static_assert(TOKENS % (8 * AT_ONCE) == 0, "turns are alike");
};

// The parameters of every kernel.
struct SparseParams {
  alignas(64) uint8_t x_map[128];  // (K, M), box 128 bytes x X_PART_TOKENS, 128-byte swizzle
  alignas(64) uint8_t w_map[128];  // FROM_ROWS: (K / 2, 16, 2, pairs of tiles), box 64 bytes x 16 x 1 x FEATURES / 32, 64-byte
  alignas(64) uint8_t meta_map[128];  // FROM_ROWS: (words of a group: 128, groups, rows), box 128 x 1 x META_ROWS
  Epilogue epilogue;
  const uint8_t* values;
  const uint8_t* meta;
  int32_t stages;  // of an output tile
  int32_t groups;  // of k-steps, of a packed row
};

// Brings the weights of a stage of features n .. to L2. Consumers load them one stage ahead, which L2 is near enough for and
// device memory is not; this is STAGES ahead, but for a block's first tile.
template <class Tile>
__device__ __forceinline__ void prefetch_weights(const SparseParams& p, int n, int stage) {
  const int64_t tile_bytes = static_cast<int64_t>(p.groups) * (STEPS_PER_GROUP * TILE_BYTES), row_bytes = p.groups * GROUP_BYTES;
  const int tiles = min(Tile::FEATURES, packed_features(p.epilogue.N) - n) / TILE, rows = tiles * WORDS_OF_PAIR<Tile::ELEMENTS> / 2;
  const uint8_t* values = p.values + n / TILE * tile_bytes + stage * (STEPS * TILE_BYTES);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i, values += tile_bytes) hopper::prefetch(values, STEPS * TILE_BYTES);
  if (stage % 2) return;  // stages 2 i and 2 i + 1 are of one group
  const uint8_t* meta = p.meta + n / PAIR * WORDS_OF_PAIR<Tile::ELEMENTS> * row_bytes + stage / 2 * GROUP_BYTES;
#pragma unroll 1
  for (int i = 0; i < rows; ++i, meta += row_bytes) hopper::prefetch(meta, GROUP_BYTES);
}

// One thread.
template <class Tile>
__device__ __forceinline__ void produce(const SparseParams& p, Stages<Tile> stages) {
  hopper::prefetch_tensor_map(p.x_map);
  if constexpr (Tile::FROM_ROWS) hopper::prefetch_tensor_map(p.w_map), hopper::prefetch_tensor_map(p.meta_map);
  copy_ahead<Tile>(p.epilogue, p.stages, stages, [&](const Stages<Tile>& at, Corner corner, int stage) {
    uint64_t* const full = at.full + at.stage;
    const int input = stage * inputs_of_stage(Tile::ELEMENTS);
    if constexpr (Tile::CLUSTER == 1) {
      hopper::tma_load(at.x(), p.x_map, full, input, corner.m);
    } else {
      const uint32_t part = rank<Tile>();
      hopper::tma_load_to(Tile::ALL_BLOCKS, at.x() + part * Tile::X_PART_BYTES, p.x_map, full, input,
                          corner.m + part * Tile::X_PART_TOKENS);
    }
    if constexpr (Tile::FROM_ROWS) {
      for (int i = 0; i < 2; ++i)
        hopper::tma_load(at.w() + i * Tile::W_BYTES / 2, p.w_map, full, input / 2, 0, i, corner.n / PAIR);
      for (int i = 0; i < Tile::CONSUMERS; ++i) {  // zeros would be no metadata
        const int n = min(corner.n + 128 * i, packed_features(p.epilogue.N) - 128);
        hopper::tma_load(at.w() + Tile::W_BYTES + i * Tile::META_BYTES, p.meta_map, full, 0, stage / 2,
                         n / 128 * Tile::META_ROWS);
      }
    } else if (corner.m == 0) {  // the first of the tiles that take these weights; the others find them in L2
      prefetch_weights<Tile>(p, corner.n, stage);
    }
  });
}

// A stage of this warp's weights, a pair of tiles, in registers; FROM_ROWS metadata alone.
template <class Tile>
struct Weights {
  static constexpr int WORDS = WORDS_OF_PAIR<Tile::ELEMENTS>;
  uint32_t a[STEPS][2][4];
  uint32_t e[WORDS][STEPS];

  __device__ __forceinline__ void pin() {
    if constexpr (!Tile::FROM_ROWS) {
#pragma unroll
      for (int k = 0; k < STEPS; ++k) hopper::pin(a[k][0]), hopper::pin(a[k][1]);
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) hopper::pin(e[i]);
  }
};

// Where a lane's weights lie: of the pair of tiles from feature n on, in stage 0; advance() goes to the next one.
template <class Tile>
struct WeightPointers {
  static constexpr int WORDS = WORDS_OF_PAIR<Tile::ELEMENTS>;
  const uint8_t *values, *meta;

  __device__ __forceinline__ WeightPointers(const SparseParams& p, int n) {
    const int64_t pair = min(n / PAIR, packed_features(p.epilogue.N) / PAIR - 1), lane = threadIdx.x % 32;
    values = p.values + pair * 2 * p.groups * STEPS_PER_GROUP * TILE_BYTES + lane * UNIT;
    meta = p.meta + pair * WORDS * p.groups * GROUP_BYTES + lane * 16;
  }
  __device__ __forceinline__ void load(Weights<Tile>& to, int groups) const {
    const int64_t tile = static_cast<int64_t>(groups) * STEPS_PER_GROUP * TILE_BYTES;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < STEPS; ++k) hopper::load_global_once(values + i * tile + k * TILE_BYTES, to.a[k][i]);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) hopper::load_global(meta + i * (static_cast<int64_t>(groups) * GROUP_BYTES), to.e[i]);
  }
  __device__ __forceinline__ void advance(int from) {  // stages 2 i and 2 i + 1 are of one group
    values += STEPS * TILE_BYTES;
    meta += from % 2 ? GROUP_BYTES - 8 : 8;
  }
};

// The products of a tile, whose first weights are in `next`; leaves there those of the tile after, which `weights` then points
// to (FROM_ROWS these are nothing). Returns when they are done and their stages are given back.
template <class Tile>
__device__ __forceinline__ void multiply_tile(Sum<Tile::ELEMENTS> (&sums)[2][Tile::TOKENS / 2], const SparseParams& p,
                                              WeightPointers<Tile>& weights, const WeightPointers<Tile>& after,
                                              Weights<Tile>& next, Stages<Tile>& at) {
  constexpr int WORDS = Weights<Tile>::WORDS, SECOND = WORDS == 1 ? 1 : 0;  // selector: the other half of the same words
#pragma unroll 1
  for (int stage = 0; stage < p.stages; ++stage, at.next()) {
    Weights<Tile> now;
    if constexpr (!Tile::FROM_ROWS) {
      now = next;
      now.pin();
      weights.advance(stage);
      if (stage + 1 == p.stages) weights = after;
      weights.load(next, p.groups);  // before the products: the assembler waits after each when it finds such loads among them
    }
    hopper::mbarrier_wait(at.full + at.stage, at.parity);
    if constexpr (Tile::FROM_ROWS) {
      const uint32_t meta = at.w() + Tile::W_BYTES + threadIdx.x / 32 * (WORDS * GROUP_BYTES) + threadIdx.x % 32 * 16 +
                            stage % 2 * 8;
#pragma unroll
      for (int i = 0; i < WORDS; ++i) load_words(meta + i * GROUP_BYTES, now.e[i]);
    }
    const uint64_t x = hopper::swizzled_operand(at.x());
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const uint32_t e0 = now.e[0][k], e1 = now.e[WORDS - 1][k];
      if constexpr (Tile::FROM_ROWS) {
        const uint64_t a0 = hopper::kept_operand(at.w() + threadIdx.x / 128 * (64 * STAGE_INPUT_BYTES / 2)) + 2 * k;
        const uint64_t a1 = a0 + Tile::W_BYTES / 2 / 16;
        hopper::wgmma_sparse<Tile::ELEMENTS, 0, Tile::TOKENS>(sums[0], a0, e0, x + 4 * k, stage + k > 0);
        hopper::wgmma_sparse<Tile::ELEMENTS, SECOND, Tile::TOKENS>(sums[1], a1, e1, x + 4 * k, stage + k > 0);
      } else {
        hopper::wgmma_sparse<Tile::ELEMENTS, 0, Tile::TOKENS>(sums[0], now.a[k][0], e0, x + 4 * k, stage + k > 0);
        hopper::wgmma_sparse<Tile::ELEMENTS, SECOND, Tile::TOKENS>(sums[1], now.a[k][1], e1, x + 4 * k, stage + k > 0);
      }
    }
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
    now.pin();
    give_back<Tile>(at.empty + at.stage);
  }
  hopper::pin(sums[0]);
  hopper::pin(sums[1]);
}

template <class Tile>
__device__ __forceinline__ void consume(const SparseParams& p, Stages<Tile> at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Tiles<Tile> tiles(p.epilogue);
  Corner corner = tiles.corner(tiles.first());
  WeightPointers<Tile> weights(p, corner.n + warp * PAIR);
  Weights<Tile> next;
  if constexpr (!Tile::FROM_ROWS) weights.load(next, p.groups);
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
    corner = next_corner;
  }
}

template <class Tile>
__device__ __forceinline__ void sparse24_linear(const SparseParams& p) {
  run_block<Tile>([&](const Stages<Tile>& stages) { produce<Tile>(p, stages); },
                  [&](const Stages<Tile>& stages) { consume<Tile>(p, stages); });
}

template <class Tile>
void prepare(const Sparse24Linear& problem, const Sparse24LinearConfig& config, int sm_count, Launch& launch) {
  const Epilogue& e = problem.epilogue;
  const int bytes = element_bytes(Tile::ELEMENTS);
  SparseParams params = {};
  params.epilogue = e;
  params.values = static_cast<const uint8_t*>(problem.values);
  params.meta = reinterpret_cast<const uint8_t*>(problem.meta);
  params.stages = stages_of(problem.K, Tile::ELEMENTS);
  params.groups = groups_of(problem.K, Tile::ELEMENTS);
  set_params(params, launch);
  launch.dependent = 1;
  launch.grid = persistent_grid(config, e, sm_count);

  launch.num_maps = Tile::FROM_ROWS ? 3 : 1;
  launch.maps[0] = map_of_x(problem.x, problem.x_stride, e.M, problem.K, bytes, Tile::X_PART_TOKENS,
                            offsetof(SparseParams, x_map));
  if constexpr (Tile::FROM_ROWS) {
    const uint64_t kept_bytes = params.groups * STEPS_PER_GROUP * STEP_BYTES / 2;  // of a row
    TensorMap& w = launch.maps[1];
    w.base = reinterpret_cast<uint64_t>(problem.rows);
    w.rank = 4, w.element_bytes = bytes, w.swizzle = 2, w.offset = offsetof(SparseParams, w_map);
    w.dims[0] = kept_bytes / bytes, w.dims[1] = TILE, w.dims[2] = 2, w.dims[3] = packed_features(e.N) / PAIR;
    w.strides[0] = kept_bytes, w.strides[1] = TILE * kept_bytes, w.strides[2] = PAIR * kept_bytes;
    w.box[0] = inputs_of_stage(Tile::ELEMENTS) / 2, w.box[1] = TILE, w.box[2] = 1, w.box[3] = Tile::FEATURES / PAIR;
    TensorMap& meta = launch.maps[2];
    meta.base = reinterpret_cast<uint64_t>(problem.meta);
    meta.rank = 3, meta.element_bytes = 4, meta.swizzle = 0, meta.offset = offsetof(SparseParams, meta_map);
    meta.dims[0] = GROUP_BYTES / 4, meta.dims[1] = params.groups, meta.dims[2] = packed_features(e.N) / 128 * Tile::META_ROWS;
    meta.strides[0] = GROUP_BYTES, meta.strides[1] = static_cast<uint64_t>(params.groups) * GROUP_BYTES;
    meta.box[0] = GROUP_BYTES / 4, meta.box[1] = 1, meta.box[2] = Tile::META_ROWS;
  }
}

}  // namespace
}  // namespace pyvit_accel

// The kernels: name, elements, consumers, tokens, whether weights come from shared memory.
#define OF_ELEMENTS(KERNEL, NAME, ELEMENTS)           \
  KERNEL(NAME##_256x128, ELEMENTS, 2, 128, false)     \
  KERNEL(NAME##_128x128, ELEMENTS, 1, 128, false)     \
  KERNEL(NAME##_128x64, ELEMENTS, 1, 64, false)       \
  KERNEL(NAME##_128x32, ELEMENTS, 1, 32, false)       \
  KERNEL(NAME##_rows_256x128, ELEMENTS, 2, 128, true) \
  KERNEL(NAME##_rows_128x128, ELEMENTS, 1, 128, true)
#define KERNELS(KERNEL)                                               \
  OF_ELEMENTS(KERNEL, sparse24_linear_sm90_s8, pyvit_accel::INT8)     \
  OF_ELEMENTS(KERNEL, sparse24_linear_sm90_f16, pyvit_accel::FLOAT16) \
  OF_ELEMENTS(KERNEL, sparse24_linear_sm90_bf16, pyvit_accel::BFLOAT16)

#define DEFINE(NAME, ELEMENTS, CONSUMERS, TOKENS, FROM_ROWS)                                              \
  using NAME##_tile = pyvit_accel::SparseTile<ELEMENTS, CONSUMERS, TOKENS, FROM_ROWS>;                    \
  extern "C" __global__ void __launch_bounds__(NAME##_tile::THREADS, NAME##_tile::BLOCKS_PER_SM)          \
      NAME(const __grid_constant__ pyvit_accel::SparseParams p) {                                         \
    pyvit_accel::sparse24_linear<NAME##_tile>(p);                                                         \
  }
KERNELS(DEFINE)
#undef DEFINE

namespace pyvit_accel {

std::span<const Sparse24LinearConfig> sparse24_linear_sm90() {
#define DESCRIBE(NAME, ELEMENTS, CONSUMERS, TOKENS, FROM_ROWS) \
  {describe<NAME##_tile>(#NAME, reinterpret_cast<const void*>(&NAME)), ELEMENTS, 8192, FROM_ROWS, \
   FROM_ROWS ? NAME##_tile::STAGES - 1 : 1, prepare<NAME##_tile>},
  static const Sparse24LinearConfig configs[] = {KERNELS(DESCRIBE)};
#undef DESCRIBE
  return configs;
}

}  // namespace pyvit_accel
