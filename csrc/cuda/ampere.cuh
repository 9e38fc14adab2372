// The instructions of sm_80 that CUDA C++ has no words for.
#pragma once
#include <cstdint>

#include "shared_memory.cuh"

namespace pyvit_accel {
namespace {

// ---- cp.async: a thread's copies go on while it does; groups of them complete in order ----

// 16 bytes to shared memory, asynchronously; zeros when there are none to read.
__device__ __forceinline__ void copy_unit(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
// 8 bytes.
__device__ __forceinline__ void copy_half_unit(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
// The copies since the last one are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups but the last PENDING are complete, for this thread.
template <int PENDING>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- shared memory to registers ----

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8, and gets 4 bytes of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t from, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// ---- tensor core ----

// sums (16 features x 8 tokens) += a (16 x 32) b (32 x 8).
__device__ __forceinline__ void multiply(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2:4 sparse: sums (16 features x 8 tokens) += a (16 x a k-step, half of it kept) b (a k-step x 8); sparse24.cuh. e: metadata,
// ordered, as every architecture has it. SELECTOR: which half of the lanes of a quad has it; of 8 bits all have.
template <int SELECTOR>
__device__ __forceinline__ void multiply_sparse(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {
  static_assert(SELECTOR == 0);
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e));
}
#define MULTIPLY_SPARSE(NAME, TYPE)                                                                                            \
  template <int SELECTOR>                                                                                                      \
  __device__ __forceinline__ void NAME(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {         \
    static_assert(SELECTOR == 0 || SELECTOR == 1); /* ptxas takes 2 without a word */                                          \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 "                           \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"                         \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e),             \
                   "n"(SELECTOR));                                                                                             \
  }
MULTIPLY_SPARSE(multiply_sparse_f16, "f16")
MULTIPLY_SPARSE(multiply_sparse_bf16, "bf16")
#undef MULTIPLY_SPARSE

}  // namespace
}  // namespace pyvit_accel
