// Rates of wgmma: clocks of an instruction and operations of the whole card, for every kind, source of A and width.
//
// Two warpgroups a multiprocessor issue groups of eight into the same accumulators, one group always in flight.
#include "wgmma.cuh"

namespace probes {
namespace {

constexpr int THREADS = 256, GROUPS = 512, SHARED = 64 * 1024;

using Rate = void (*)(int groups, uint32_t* out, long long* clocks);

// B steps by 32 bytes of a row, by 64 where A is sparse: K is twice as long then.
#define RATE(NAME, KIND, N, HEAD, SOURCE, CONSTRAINT, A0, A1, A2, A3, B_STEP, TAIL)                                   \
  __global__ void __launch_bounds__(THREADS, 1) NAME(int groups, uint32_t* out, long long* clocks) {                  \
    RATE_BODY(KIND, N, HEAD, SOURCE, CONSTRAINT, A0, A1, A2, A3, B_STEP, TAIL)                                        \
  }

#define ONE(N, HEAD, SOURCE, TAIL, k, b) HEAD " {" LIST_##N "}, " SOURCE##_##k ", %" b TAIL ";\n"
#define FOUR(N, HEAD, SOURCE, TAIL) \
  ONE(N, HEAD, SOURCE, TAIL, 0, "6") ONE(N, HEAD, SOURCE, TAIL, 1, "7") ONE(N, HEAD, SOURCE, TAIL, 2, "8") \
  ONE(N, HEAD, SOURCE, TAIL, 3, "9")

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RATE_BODY(KIND, N, HEAD, SOURCE, CONSTRAINT, A0, A1, A2, A3, B_STEP, TAIL)                                    \
  extern __shared__ __align__(1024) uint32_t shared[];                                                                \
  for (int i = threadIdx.x; i < SHARED / 4; i += THREADS) shared[i] = random_word(i + blockIdx.x * 65536, KIND);      \
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                                        \
  __syncthreads();                                                                                                    \
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));                                      \
  const uint64_t a = descriptor(base + 8192 * (threadIdx.x / 128)), b = descriptor(base + 16384);                     \
  const uint32_t r = random_word(threadIdx.x + 7, KIND), meta = 0xEEEEEEEEu;                                          \
  (void)a, (void)r;                                                                                                   \
  uint32_t folded = 0;                                                                                                \
  const long long start = clock64();                                                                                  \
  asm volatile(                                                                                                       \
      "{\n.reg .pred p, more;\n.reg .b32 left;\n.reg .b32 " LIST_##N ";\n" ON_##N(ZERO)                               \
      "setp.eq.u32 p, %1, %1;\nmov.u32 left, %1;\nAGAIN:\nwgmma.fence.sync.aligned;\n"                                \
      FOUR(N, HEAD, SOURCE, TAIL) FOUR(N, HEAD, SOURCE, TAIL)                                                         \
      "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;\n"                                          \
      "sub.u32 left, left, 1;\nsetp.ne.u32 more, left, 0;\n@more bra AGAIN;\n"                                        \
      "wgmma.wait_group.sync.aligned 0;\nmov.b32 %0, 0;\n" ON_##N(FOLD) "}\n"                                         \
      : "=&r"(folded)                                                                                                 \
      : "r"(groups), CONSTRAINT(A0), CONSTRAINT(A1), CONSTRAINT(A2), CONSTRAINT(A3), "l"(b), "l"(b + B_STEP),         \
        "l"(b + (B_STEP == 2 ? 4 : 0)), "l"(b + (B_STEP == 2 ? 6 : 4)), "r"(meta)                                     \
      : "memory");                                                                                                    \
  const long long took = clock64() - start;                                                                           \
  if (threadIdx.x == 0) clocks[blockIdx.x] = took;                                                                    \
  if (folded == 0x9E3779B9u) out[threadIdx.x] = folded;
#else
#define RATE_BODY(...)
#endif

#define DENSE_RS(NAME, KIND, N, HEAD, TAIL) RATE(NAME##_rs_##N, KIND, N, HEAD, RS, "r", r, r * 3, r * 5, r * 7, 2, TAIL)
#define DENSE_SS(NAME, KIND, N, HEAD, TAIL) RATE(NAME##_ss_##N, KIND, N, HEAD, SS, "l", a, a + 2, a + 4, a + 6, 2, TAIL)
#define SPARSE_RS(NAME, KIND, N, HEAD, TAIL) \
  RATE(NAME##_rs_##N, KIND, N, HEAD, RS, "r", r, r * 3, r * 5, r * 7, 4, TAIL)
#define SPARSE_SS(NAME, KIND, N, HEAD, TAIL) \
  RATE(NAME##_ss_##N, KIND, N, HEAD, SS, "l", a, a + 2, a + 4, a + 6, 4, TAIL)

#define WGMMA(N, SHAPE) "wgmma.mma_async.sync.aligned.m64n" #N SHAPE
#define WGMMA_SP(N, SHAPE) "wgmma.mma_async.sp.sync.aligned.m64n" #N SHAPE
#define WIDTH(N)                                                                            \
  DENSE_SS(int8, INT8, N, WGMMA(N, "k32.s32.s8.s8"), ", p")                                 \
  DENSE_RS(int8, INT8, N, WGMMA(N, "k32.s32.s8.s8"), ", p")                                 \
  DENSE_SS(fp8, E4M3, N, WGMMA(N, "k32.f32.e4m3.e4m3"), ", p, 1, 1")                        \
  DENSE_RS(fp8, E4M3, N, WGMMA(N, "k32.f32.e4m3.e4m3"), ", p, 1, 1")                        \
  DENSE_SS(bf16, BF16, N, WGMMA(N, "k16.f32.bf16.bf16"), ", p, 1, 1, 0, 0")                 \
  DENSE_RS(bf16, BF16, N, WGMMA(N, "k16.f32.bf16.bf16"), ", p, 1, 1, 0")                    \
  SPARSE_SS(int8_sparse, INT8, N, WGMMA_SP(N, "k64.s32.s8.s8"), ", %10, 0, p")              \
  SPARSE_RS(int8_sparse, INT8, N, WGMMA_SP(N, "k64.s32.s8.s8"), ", %10, 0, p")              \
  SPARSE_SS(bf16_sparse, BF16, N, WGMMA_SP(N, "k32.f32.bf16.bf16"), ", %10, 0, p, 1, 1, 0, 0") \
  SPARSE_RS(bf16_sparse, BF16, N, WGMMA_SP(N, "k32.f32.bf16.bf16"), ", %10, 0, p, 1, 1, 0")
WIDTH(64)
WIDTH(128)
WIDTH(256)

void measure(Rate kernel, int N, int K, const Device& device) {
  Buffer<uint32_t> out(THREADS);
  Buffer<long long> clocks(device.sms);
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
  const float ms = milliseconds([&] { kernel<<<device.sms, THREADS, SHARED>>>(GROUPS, out.data, clocks.data); });
  const double instructions = double(GROUPS) * STEPS * (THREADS / 128), macs = 64.0 * N * K;
  const double clk = double(largest(clocks.data, device.sms));
  report(instructions * macs / clk, "MAC/clk/SM",
         number("clk_per_instruction", clk / instructions) +
             number("tops", 2 * instructions * macs * device.sms / ms / 1e9));
}

#define AS_PROBES(NAME, K)                                                                                       \
  const Register NAME##_probes[] = {                                                                             \
      {#NAME " ss n256", 90, [](const Device& d) { measure(NAME##_ss_256, 256, K, d); }},                        \
      {#NAME " rs n256", 90, [](const Device& d) { measure(NAME##_rs_256, 256, K, d); }},                        \
      {#NAME " ss n128", 90, [](const Device& d) { measure(NAME##_ss_128, 128, K, d); }},                        \
      {#NAME " rs n128", 90, [](const Device& d) { measure(NAME##_rs_128, 128, K, d); }},                        \
      {#NAME " ss n64", 90, [](const Device& d) { measure(NAME##_ss_64, 64, K, d); }},                           \
      {#NAME " rs n64", 90, [](const Device& d) { measure(NAME##_rs_64, 64, K, d); }},                           \
  };
AS_PROBES(int8, 32)
AS_PROBES(fp8, 32)
AS_PROBES(bf16, 16)
AS_PROBES(int8_sparse, 64)
AS_PROBES(bf16_sparse, 32)

}  // namespace
}  // namespace probes
