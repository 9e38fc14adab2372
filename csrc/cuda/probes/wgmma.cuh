// Text of wgmma instructions for kernels whose accumulators live in one block of PTX, so that none is moved or spilled.
#pragma once

#include "probe.h"

// Eight registers of a name; lists of the accumulators of a lane for N = 64, 128 and 256 columns, half as many.
#define EIGHT(p) p "0, " p "1, " p "2, " p "3, " p "4, " p "5, " p "6, " p "7"
#define LIST_64 EIGHT("a0") ", " EIGHT("a1") ", " EIGHT("a2") ", " EIGHT("a3")
#define LIST_128 LIST_64 ", " EIGHT("a4") ", " EIGHT("a5") ", " EIGHT("a6") ", " EIGHT("a7")
#define LIST_256                                                                                      \
  LIST_128 ", " EIGHT("b0") ", " EIGHT("b1") ", " EIGHT("b2") ", " EIGHT("b3") ", " EIGHT("b4") ", "  \
      EIGHT("b5") ", " EIGHT("b6") ", " EIGHT("b7")

// The same operation on eight registers, on all.
#define ZERO(p) "mov.b32 " p ", 0;\n"
#define FOLD(p) "xor.b32 %0, %0, " p ";\n"
#define ON_EIGHT(DO, p) DO(p "0") DO(p "1") DO(p "2") DO(p "3") DO(p "4") DO(p "5") DO(p "6") DO(p "7")
#define ON_64(DO) ON_EIGHT(DO, "a0") ON_EIGHT(DO, "a1") ON_EIGHT(DO, "a2") ON_EIGHT(DO, "a3")
#define ON_128(DO) ON_64(DO) ON_EIGHT(DO, "a4") ON_EIGHT(DO, "a5") ON_EIGHT(DO, "a6") ON_EIGHT(DO, "a7")
#define ON_256(DO)                                                                                            \
  ON_128(DO) ON_EIGHT(DO, "b0") ON_EIGHT(DO, "b1") ON_EIGHT(DO, "b2") ON_EIGHT(DO, "b3") ON_EIGHT(DO, "b4")   \
      ON_EIGHT(DO, "b5") ON_EIGHT(DO, "b6") ON_EIGHT(DO, "b7")

// Operand A of step k: a descriptor, or the same four registers. %2..%5 and %6..%9 are operands of the asm statement.
#define SS_0 "%2"
#define SS_1 "%3"
#define SS_2 "%4"
#define SS_3 "%5"
#define RS_0 "{%2, %3, %4, %5}"
#define RS_1 RS_0
#define RS_2 RS_0
#define RS_3 RS_0

namespace probes {

constexpr int STEPS = 8;  // wgmma in a loop

// 128-byte rows, swizzled, eight of them a kilobyte.
__device__ inline uint64_t descriptor(uint32_t shared_address) {
  return uint64_t((shared_address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}

enum Kind { INT8, E4M3, BF16 };

// Random codes; floats of magnitude 1 to 2, of both signs.
__device__ inline uint32_t random_word(uint32_t seed, Kind kind) {
  const uint32_t bits = hashed(seed);
  if (kind == INT8) return bits;
  if (kind == E4M3) return (bits & 0x87878787u) | 0x38383838u;
  return (bits & 0x807F807Fu) | 0x3F803F80u;
}

}  // namespace probes
