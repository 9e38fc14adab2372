// Where things lie: packed weights and tokens in shared memory, and in the fragments of the 8-bit tensor core.
//
// Weights are operand A (rows are features), tokens operand B, so y is computed transposed. Lane l of a warp is
// (g, t) = (l >> 2, l & 3). Of a 16 x 32 tile of A it holds four registers, r = row g + 8 (r & 1), inputs 4t + 16 (r >> 1)
// .. + 3; of a 32 x 8 tile of B two, token g, inputs 4t + 16 r .. + 3; of the 16 x 8 sums four, row g + 8 (i >> 1), token
// 2t + (i & 1). Both mma.sync.m16n8k32 and each warp of wgmma.m64nNk32.
//
// A chunk of packed weights (pyvit_accel/formats/packed.py: 16 features x 32 inputs) is an array of words, each four
// inputs of one feature: word[group of inputs 0..7][feature 0..15] at 8 bits, word[j 0..3][feature] at 4 bits, whose low
// nibbles are group j and high ones group 4 + j. Register r of a lane is of group t + 4 (r >> 1), so a 16-byte unit of a
// chunk, four consecutive features of one group, serves four rows. Which features are which rows is free. We take two
// packed tiles (32 features) for two tiles of A, and give lane g the quad of features lane_feature(l) .. + 3: of the first
// tile of A rows g and g + 8 are the first two, of the second the others. So one 16-byte load of a lane (two at 8 bits)
// is both tiles' registers, and its sums are four consecutive features of two tokens, which it stores as they lie.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace pyvit_accel {

constexpr int TILE = 16;    // features of a packed tile
constexpr int CHUNK = 32;   // inputs of a chunk
constexpr int PAIR = 32;    // features of two packed tiles
constexpr int UNIT = 16;    // bytes
constexpr int HEADER = 64;  // bytes of a packed row before its chunks: the sums of its features' codes

constexpr HOST_DEVICE int chunk_bytes(int w_bits) { return 64 * w_bits; }

// Where byte `at` of a block of shared memory lies, in the 128-byte swizzle of TMA: 16-byte unit u of 128-byte line i is
// at u ^ (i % 8). Blocks begin at multiples of 1024 bytes. Then neither ldmatrix (eight rows of 64 or 128 bytes, the same
// unit of each) nor the loads of weight_offset (8 lanes in turn) meet in a bank.
constexpr HOST_DEVICE uint32_t swizzle128(uint32_t at) { return at ^ (at >> 3 & 0x70); }

// Where byte at + step lies, from where byte `at` does, which is among the first 256 of 1024; step: a multiple of 256, as
// between chunks. Then the sum has no carry, and its swizzle is that of both.
constexpr HOST_DEVICE uint32_t swizzled_ahead(uint32_t from, uint32_t step) { return (from ^ (step >> 3 & 0x70)) + step; }

// The first of the four consecutive features of a lane, among the 32 of a pair of packed tiles.
constexpr HOST_DEVICE int lane_feature(int lane) {
  const int g = lane >> 2;
  return 16 * (g >> 2) + 4 * ((g & 1) << 1 | (g >> 1 & 1));
}

// The first of the two consecutive tokens of a lane, among the 8 of a tile of B.
constexpr HOST_DEVICE int lane_token(int lane) { return 2 * (lane & 3); }

// The unit of a lane in a pair of packed tiles, tile_bytes apart, before the swizzle: its group t of chunk 0. Group 4 + t
// (at 8 bits) is 256 bytes on, the next chunk chunk_bytes(w_bits).
constexpr HOST_DEVICE uint32_t weight_offset(int lane, uint32_t tile_bytes) {
  const int feature = lane_feature(lane);
  return (feature / TILE) * tile_bytes + (lane & 3) * 64 + feature % TILE * 4;
}

// (v & 0xF0F0F0F0) ^ 0x80808080, bytes of codes + 8 in high nibbles to codes times 16. The compiler, which knows both
// constants, would make two instructions of it, for an instruction holds but one.
HOST_DEVICE uint32_t high_nibbles(uint32_t v) {
#ifdef __CUDA_ARCH__
  uint32_t a;
  asm("lop3.b32 %0, %1, 0xF0F0F0F0, 0x80808080, 0x6A;" : "=r"(a) : "r"(v));
  return a;
#else
  return (v & 0xF0F0F0F0u) ^ 0x80808080u;
#endif
}

// Four words of four-bit codes + 8 as the registers of two tiles of A, codes times 16: 12 instructions for 32 weights.
HOST_DEVICE void unpack4(const uint32_t (&words)[4], uint32_t (&a)[2][4]) {
  for (int i = 0; i < 4; ++i) {
    a[i >> 1][i & 1] = high_nibbles(words[i] << 4);
    a[i >> 1][2 + (i & 1)] = high_nibbles(words[i]);
  }
}

// Two units of 8-bit codes, groups t and 4 + t, as the registers of two tiles of A: no instruction.
HOST_DEVICE void unpack8(const uint32_t (&low)[4], const uint32_t (&high)[4], uint32_t (&a)[2][4]) {
  for (int i = 0; i < 4; ++i) {
    a[i >> 1][i & 1] = low[i];
    a[i >> 1][2 + (i & 1)] = high[i];
  }
}

// Which tile of y a block computes: `group` rows of tiles (of tokens) in turn share a column of them (of weights) in L2.
struct TileIndex {
  uint32_t m, n;
};
constexpr HOST_DEVICE TileIndex tile_index(uint32_t block, uint32_t group, uint32_t tiles_m, uint32_t tiles_n) {
  const uint32_t first_m = block / (group * tiles_n) * group, within = block % (group * tiles_n);
  const uint32_t rows = tiles_m - first_m < group ? tiles_m - first_m : group;
  return {first_m + within % rows, within / rows};
}

}  // namespace pyvit_accel
