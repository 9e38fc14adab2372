// Hopper's own instructions, one function each: mbarrier, bulk tensor copy (TMA), wgmma, setmaxnreg. PTX ISA 8.0, sm_90a.
//
// Two proxies. Ordinary loads and stores use the generic proxy, TMA and wgmma the asynchronous one, and the hardware orders
// them only where it is told to. In these kernels shared memory is written by TMA alone, and what TMA wrote is seen by
// whoever saw the phase of its mbarrier complete; so the only fence needed is the one after the barriers are initialised.
//
// wgmma runs beside the instructions that follow it. From its issue to the wait that covers it, its sums belong to the tensor
// core and its A registers must not change. The C++ compiler knows none of this: pin() ties registers to a place in the
// program, so that no use of them moves across a fence or a wait. The assembler does know, and where it cannot prove that
// nobody touches them it waits after every wgmma, and says so (C7510 .. C7514). What it needs: no branch between the first
// wgmma and the last wait of a loop but the loop's own and those that wait for a barrier, hence mbarrier_arrive_if().
#pragma once
#include <cstdint>
#include <type_traits>

#include "shared_memory.cuh"
#include "sparse24_linear.h"

namespace pyvit_accel::hopper {

// From global memory, at multiples of their size; `once`: of what nobody on this SM reads again. Not by ld.nc: the launch before
// may still write it when this one begins.
__device__ __forceinline__ void load_global_once(const void* from, uint32_t (&to)[4]) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void load_global(const void* from, uint32_t (&to)[2]) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(__cvta_generic_to_global(from)) : "memory");
}

// ---- mbarrier: a phase completes when `arrivals` threads arrived and all bytes announced for it have landed ----

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to TMA, and to who meets at a barrier of the block or the cluster after it.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives without a branch.
__device__ __forceinline__ void mbarrier_arrive_if(uint64_t* barrier, bool condition) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(shared_address(barrier)),
      "r"(static_cast<uint32_t>(condition))
      : "memory");
}
// As that, at the same barrier of a block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_if(uint64_t* barrier, uint32_t rank, bool condition) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 there;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "@p mapa.shared::cluster.u32 there, %0, %1;\n"
      "@p mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank), "r"(static_cast<uint32_t>(condition))
      : "memory");
}
// Arrives, and announces bytes that TMA will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Returns when the phase of this parity is complete. A new barrier is in phase 0; the one before, of parity 1, counts as done.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- TMA: one thread copies a box; coordinates are of dimensions 0, 1 ..; what lies outside the tensor arrives as zeros ----

__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const void* map, uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const void* map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t to, const void* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// To the same place of every block of the cluster that has a bit in `blocks`, and to the same barrier of each.
__device__ __forceinline__ void tma_load_to(uint16_t blocks, uint32_t to, const void* map, uint64_t* barrier, int c0, int c1,
                                            int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void tma_load_to(uint16_t blocks, uint32_t to, const void* map, uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}

// ---- prefetch: to L2; orders nothing, and nobody waits for it ----

// The line of 128 bytes that has this one.
__device__ __forceinline__ void prefetch(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(line)));
}
// By the copy engine; a multiple of 16, at one of 16.
__device__ __forceinline__ void prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes));
}

// ---- clusters: blocks on neighbouring SMs, which reach each other's shared memory and barriers ----

// All threads of the cluster are here, and see what any of them wrote.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// ---- programmatic dependent launch: a launch may begin while the one before it ends ----

// The launches before have ended, and what they wrote is seen.
__device__ __forceinline__ void await_launches_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next launch may begin where there is room; it awaits the end of this one by itself.
__device__ __forceinline__ void allow_launch_after() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- setmaxnreg: a warpgroup gives registers back, another takes them ----

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- wgmma: sums (64 x TOKENS) += A (64 x 32, registers) x B (32 x TOKENS, shared memory), int8 to int32 ----
//
// Fragments, lane 4 g + t of warp w:
//   A, register r:     row 16 w + g + 8 (r & 1), columns 4 t + 16 (r >> 1) .. + 3
//   sums, register i:  row 16 w + g + 8 ((i >> 1) & 1), token 8 (i >> 2) + 2 t + (i & 1)

// B in shared memory: a token is a line of 128 bytes, of which an instruction takes 32, lines in TMA's 128-byte swizzle;
// groups of 8 tokens are 1024 bytes apart. The next 32 inputs are 32 bytes further: descriptor + 2.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t lines) {
  constexpr uint64_t SWIZZLE_128B = uint64_t{1} << 62, GROUP_STRIDE = uint64_t{1024 >> 4} << 32;
  return SWIZZLE_128B | GROUP_STRIDE | (lines & 0x3FFFF) >> 4;
}

// The kept half of sparse A: a row has 64 bytes, two k-steps, in TMA's 64-byte swizzle; groups of 8 rows are 512 bytes apart.
__device__ __forceinline__ uint64_t kept_operand(uint32_t rows) {
  constexpr uint64_t SWIZZLE_64B = uint64_t{2} << 62, GROUP_STRIDE = uint64_t{512 >> 4} << 32;
  return SWIZZLE_64B | GROUP_STRIDE | (rows & 0x3FFFF) >> 4;
}

template <class Register, int COUNT>
__device__ __forceinline__ void pin(Register (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if constexpr (std::is_same_v<Register, float>)
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
  }
}

// Orders what was written to registers before the wgmma that reads them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Returns when at most PENDING of the committed groups still run.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Starts at 0 instead of sums when `accumulate` is 0.
template <int TOKENS>
__device__ void wgmma(int32_t (&sums)[TOKENS / 2], const uint32_t (&a)[4], uint64_t b, int accumulate);

#define D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define D16 D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D32 D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D64 D32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51" \
  ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D88 D64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83" \
  ", %84, %85, %86, %87"
#define TYPED8(t, i) \
  t(sums[i]), t(sums[i + 1]), t(sums[i + 2]), t(sums[i + 3]), t(sums[i + 4]), t(sums[i + 5]), t(sums[i + 6]), t(sums[i + 7])
#define TYPED32(t, i) TYPED8(t, i), TYPED8(t, i + 8), TYPED8(t, i + 16), TYPED8(t, i + 24)
#define SUMS8(i) TYPED8("+r", i)
#define SUMS16(i) SUMS8(i), SUMS8(i + 8)
#define SUMS32(i) TYPED32("+r", i)
#define WGMMA(TOKENS, D, A, B, ACCUMULATE, ...) \
  template <> \
  __device__ __forceinline__ void wgmma<TOKENS>( \
      int32_t (&sums)[TOKENS / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k32.s32.s8.s8 {" D "}, {" A "}, " B ", p;\n}" \
        : __VA_ARGS__ \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)); \
  }
WGMMA(16, D8, "%8, %9, %10, %11", "%12", "%13", SUMS8(0))
WGMMA(32, D16, "%16, %17, %18, %19", "%20", "%21", SUMS16(0))
WGMMA(64, D32, "%32, %33, %34, %35", "%36", "%37", SUMS32(0))
WGMMA(128, D64, "%64, %65, %66, %67", "%68", "%69", SUMS32(0), SUMS32(32))
WGMMA(176, D88, "%88, %89, %90, %91", "%92", "%93", SUMS32(0), SUMS32(32), SUMS16(64), SUMS8(80))

// 2:4 sparse: sums (64 x TOKENS) += A (64 x a k-step of 64 bytes, its kept half in registers) x B, of which an instruction takes
// 64 bytes of a line: the next k-step is descriptor + 4. Each warp's A and metadata are those of an mma.sp of its 16 rows
// (sparse24.cuh). Types are of ELEMENTS; SELECTOR: which half of the lanes of a quad has the metadata, of 8 bits all have.
template <int ELEMENTS, int SELECTOR, int TOKENS, class Sum>
__device__ void wgmma_sparse(Sum (&sums)[TOKENS / 2], const uint32_t (&a)[4], uint32_t e, uint64_t b, int accumulate);
// The same with A in shared memory too, row by row, of which an instruction takes 32 bytes: the next k-step is a + 2.
template <int ELEMENTS, int SELECTOR, int TOKENS, class Sum>
__device__ void wgmma_sparse(Sum (&sums)[TOKENS / 2], uint64_t a, uint32_t e, uint64_t b, int accumulate);

#define WGMMA_SPARSE(ELEMENTS, SUM, TYPES, SELECTOR, SCALES, TOKENS, D, A, B, E, ACCUMULATE, ...) \
  template <> \
  __device__ __forceinline__ void wgmma_sparse<ELEMENTS, SELECTOR, TOKENS>( \
      SUM (&sums)[TOKENS / 2], const uint32_t (&a)[4], uint32_t e, uint64_t b, int accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n" \
        "wgmma.mma_async.sp.sync.aligned.m64n" #TOKENS TYPES " {" D "}, {" A "}, " B ", " E ", " #SELECTOR ", p" \
        SCALES ";\n}" \
        : __VA_ARGS__ \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(e), "r"(accumulate)); \
  }
#define WGMMA_SPARSE_SHARED(ELEMENTS, SUM, TYPES, SELECTOR, SCALES, T) \
  template <> \
  __device__ __forceinline__ void wgmma_sparse<ELEMENTS, SELECTOR, 128>( \
      SUM (&sums)[64], uint64_t a, uint32_t e, uint64_t b, int accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %67, 0;\n" \
        "wgmma.mma_async.sp.sync.aligned.m64n128" TYPES " {" D64 "}, %64, %65, %66, " #SELECTOR ", p" SCALES ";\n}" \
        : TYPED32(T, 0), TYPED32(T, 32) \
        : "l"(a), "l"(b), "r"(e), "r"(accumulate)); \
  }
#define WGMMA_SPARSE_TOKENS(ELEMENTS, SUM, TYPES, SELECTOR, SCALES, T) \
  WGMMA_SPARSE(ELEMENTS, SUM, TYPES, SELECTOR, SCALES, 32, D16, "%16, %17, %18, %19", "%20", "%21", "%22", TYPED8(T, 0), \
               TYPED8(T, 8)) \
  WGMMA_SPARSE(ELEMENTS, SUM, TYPES, SELECTOR, SCALES, 64, D32, "%32, %33, %34, %35", "%36", "%37", "%38", TYPED32(T, 0)) \
  WGMMA_SPARSE(ELEMENTS, SUM, TYPES, SELECTOR, SCALES, 128, D64, "%64, %65, %66, %67", "%68", "%69", "%70", TYPED32(T, 0), \
               TYPED32(T, 32))
WGMMA_SPARSE_TOKENS(INT8, int32_t, "k64.s32.s8.s8", 0, "", "+r")
WGMMA_SPARSE_TOKENS(FLOAT16, float, "k32.f32.f16.f16", 0, ", 1, 1, 0", "+f")
WGMMA_SPARSE_TOKENS(FLOAT16, float, "k32.f32.f16.f16", 1, ", 1, 1, 0", "+f")
WGMMA_SPARSE_TOKENS(BFLOAT16, float, "k32.f32.bf16.bf16", 0, ", 1, 1, 0", "+f")
WGMMA_SPARSE_TOKENS(BFLOAT16, float, "k32.f32.bf16.bf16", 1, ", 1, 1, 0", "+f")
WGMMA_SPARSE_SHARED(INT8, int32_t, "k64.s32.s8.s8", 0, "", "+r")
WGMMA_SPARSE_SHARED(FLOAT16, float, "k32.f32.f16.f16", 0, ", 1, 1, 0, 0", "+f")
WGMMA_SPARSE_SHARED(FLOAT16, float, "k32.f32.f16.f16", 1, ", 1, 1, 0, 0", "+f")
WGMMA_SPARSE_SHARED(BFLOAT16, float, "k32.f32.bf16.bf16", 0, ", 1, 1, 0, 0", "+f")
WGMMA_SPARSE_SHARED(BFLOAT16, float, "k32.f32.bf16.bf16", 1, ", 1, 1, 0, 0", "+f")
#undef WGMMA_SPARSE_SHARED
#undef WGMMA_SPARSE_TOKENS
#undef WGMMA_SPARSE
#undef TYPED8
#undef TYPED32
#undef D8
#undef D16
#undef D32
#undef D64
#undef D88
#undef SUMS8
#undef SUMS16
#undef SUMS32
#undef WGMMA

}  // namespace pyvit_accel::hopper
