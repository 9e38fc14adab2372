// Tokens by descending score, equal ones by index: as keys, one integer each, no two equal.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace pyvit_accel {

// Larger for the token that ranks first: the score's bits in the order of floats, above the complement of the index.
// -0.0 counts as 0.0 and NaN as -inf.
inline uint64_t rank_key(float score, uint32_t index) {
  score = score != score ? -std::numeric_limits<float>::infinity() : score == 0 ? 0.f : score;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (uint32_t)~index;
}
inline int64_t token_of(uint64_t key) { return (uint32_t)~key; }

// The `keep` largest keys come first; they, or all, in descending order when asked for.
enum class Sorted { none, kept, all };
inline void rank(uint64_t* keys, int64_t n, int64_t keep, Sorted sorted) {
  const auto descending = [](uint64_t a, uint64_t b) { return a > b; };
  if (sorted == Sorted::all) return std::sort(keys, keys + n, descending);
  if (keep < n) std::nth_element(keys, keys + keep, keys + n, descending);
  if (sorted == Sorted::kept) std::sort(keys, keys + keep, descending);
}

}  // namespace pyvit_accel
