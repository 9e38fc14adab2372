// The tiles of lowbit_linear on Hopper, and the reasons for their sizes.
//
// A block computes FEATURES x TOKENS, 128 inputs a stage. Floors of a tile, in clocks of an SM per 32 inputs of all of it
// (wgmma: 4096 products a clock; shared memory: 128 bytes a clock; L2: between 24 and 46, by others' measurements):
//
//     products        FEATURES TOKENS / 128, the T/2 clocks of each m64nTk32, FEATURES / 64 of them
//     shared memory   read:    32 TOKENS by every m64 (x is operand B), and the packed weights once, to registers
//                     written: what TMA brings, 32 TOKENS + (32 | 16) FEATURES at (8 | 4) bits
//     L2              what TMA brings, the weights once for the CLUSTER blocks that share them
//
// in bytes per clock of the products, that is 64 + 8192 / TOKENS + 4096 / FEATURES of shared memory and 4096 / TOKENS /
// CLUSTER + 4096 / FEATURES of L2 at 8 bits (weights and x), 64 + 4096 / TOKENS + 4096 / FEATURES and 2048 / TOKENS /
// CLUSTER + 4096 / FEATURES at 4:
//
//     features x tokens   cluster   shared memory (128)   L2 (24 to 46)   registers of a lane: sums + two steps of A
//                                   8 bits    4 bits      8 bits  4 bits
//     128 x 128           2         160       128         48      40      128 + 16, two blocks an SM
//     256 x 128           2         144       112         32      24      128 + 16
//     256 x 176           2         127       103         28      22      176 + 16 (with 192 + 16 the epilogue spills)
//
// So 256 x 176 is the one that keeps the tensor cores busy at 8 bits; 128 x 128 takes 1.25 times the time of its products.
// But the epilogue has 16 instructions an output (codes, a bias), 48 with GELU, for 128 lanes a clock: at K = 768, 5600 to
// 17000 clocks after the 8400 of the products of 256 x 176, in which the tensor cores rest. Two blocks of 128 x 128 on an SM
// fill each other's. And small M or N leave SMs without a tile of the large ones. Hence all of them; the plan
// (lowbit_linear.cu) chooses. With 64 tokens or fewer, memory is the floor: the weights come once, whatever the tile.
#pragma once
#include <cstdint>

#include "hopper_linear.cuh"
#include "lowbit_linear.h"

namespace pyvit_accel {

// With 128 tokens or more, clusters are of two blocks of the same features.
template <int W_BITS_, int CONSUMERS, int TOKENS>
struct HopperTile : HopperBlock<CONSUMERS, TOKENS, 1, TOKENS < 128 ? 1 : 2> {
  using Block = HopperBlock<CONSUMERS, TOKENS, 1, TOKENS < 128 ? 1 : 2>;
  static constexpr int W_BITS = W_BITS_, SHIFT = 8 - W_BITS;
  static constexpr int GROUP_M = 16 / Block::CLUSTER;  // 264 blocks: 16 x 16.5

  // A stage: x as TOKENS lines of 128 inputs, then the packed tiles, each as lines of 128 bytes of its four chunks.
  static constexpr int CHUNKS = 4;
  static constexpr int PACKED_BYTES = CHUNKS * chunk_bytes(W_BITS), PACKED_LINES = PACKED_BYTES / 128;
  static constexpr int X_BYTES = TOKENS * CHUNKS * CHUNK, W_BYTES = Block::FEATURES / TILE * PACKED_BYTES;
  static constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
  static constexpr int W_PART_BYTES = W_BYTES / Block::CLUSTER;  // that a block copies
  static constexpr int W_PART_TILES = Block::FEATURES / TILE / Block::CLUSTER;
  static_assert(X_BYTES % 1024 == 0 && W_PART_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");

  // As many stages as shared memory holds, each with two barriers of 8 bytes.
  static constexpr int FIT = Block::SHARED_LIMIT / (STAGE_BYTES + 16), STAGES = FIT < 8 ? FIT : 8;
  static constexpr int SHARED_BYTES = STAGES * (STAGE_BYTES + 16);
  static_assert(STAGES >= 3, "one is multiplied, one is there, one is on its way");

  static constexpr int AT_ONCE = TOKENS == 176 ? 1 : TOKENS == 16 || TOKENS == 128 ? 2 : 4, TURNS = TOKENS / 8 / AT_ONCE;
  static_assert(TOKENS % (8 * AT_ONCE) == 0, "turns are alike");
};

// The parameters of every kernel.
struct HopperParams {
  alignas(64) uint8_t x_map[128];  // (K, M), box 128 x TOKENS, 128-byte swizzle
  alignas(64) uint8_t w_map[128];  // (128, lines of a packed row, tiles), box 128 x PACKED_LINES x W_PART_TILES, likewise
  Epilogue epilogue;
  int32_t chunks;  // of 32 inputs
};

}  // namespace pyvit_accel
