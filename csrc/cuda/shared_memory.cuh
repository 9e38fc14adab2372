// Addresses of shared memory, as instructions take them, and loads from there.
#pragma once
#include <cstdint>

namespace pyvit_accel {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// At multiples of their size.
__device__ __forceinline__ void load_words(uint32_t from, uint32_t (&to)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void load_words(uint32_t from, uint32_t (&to)[2]) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
}

}  // namespace pyvit_accel
