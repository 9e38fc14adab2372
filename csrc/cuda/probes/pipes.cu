// Instructions a multiprocessor starts in a clock, of kinds the epilogues and attention are made of.
//
// 1024 threads, eight independent chains each; every instruction reads its chain and a neighbour, so that none folds
// into another.
#include "probe.h"

namespace probes {
namespace {

constexpr int THREADS = 1024, LOOPS = 256, CHAINS = 8, UNROLL = 16;

#define INSTRUCTIONS(NAME, N, TEXT)                                                                             \
  struct NAME {                                                                                                 \
    static constexpr int COUNT = N;                                                                             \
    static __device__ void run(uint32_t& x, uint32_t y, uint32_t z) {                                           \
      asm volatile("{\n.reg .f32 f, g;\n.reg .b16 s, t;\n" TEXT "}\n" : "+r"(x) : "r"(y), "r"(z));             \
    }                                                                                                           \
  };
#define INSTRUCTION(NAME, TEXT) INSTRUCTIONS(NAME, 1, TEXT)
#define FLOATS "mov.b32 f, %0;\nmov.b32 g, %1;\n"
INSTRUCTION(Exp, FLOATS "ex2.approx.ftz.f32 f, f;\nmov.b32 %0, f;\n")
INSTRUCTION(InverseRoot, FLOATS "rsqrt.approx.ftz.f32 f, f;\nmov.b32 %0, f;\n")
INSTRUCTION(ToInt, FLOATS "cvt.rni.s32.f32 %0, f;\n")
INSTRUCTION(ToFloat, "cvt.rn.f32.s32 f, %0;\nmov.b32 %0, f;\n")
INSTRUCTION(Fma, FLOATS "fma.rn.f32 f, f, 0f3F7FFF00, g;\nmov.b32 %0, f;\n")
INSTRUCTION(Add, FLOATS "add.rn.f32 f, f, g;\nmov.b32 %0, f;\n")
INSTRUCTION(Mul, FLOATS "mul.rn.f32 f, f, g;\nmov.b32 %0, f;\n")
INSTRUCTION(Mad, "mad.lo.s32 %0, %0, %1, %2;\n")
INSTRUCTION(Lop, "lop3.b32 %0, %0, %1, %2, 0x96;\n")
INSTRUCTION(Permute, "prmt.b32 %0, %0, %1, 0x2736;\n")
INSTRUCTION(IntAdd, "add.s32 %0, %0, %1;\n")
INSTRUCTION(Shift, "shf.l.wrap.b32 %0, %0, %1, 7;\n")
INSTRUCTION(Maximum, "max.s32 %0, %0, %1;\n")
INSTRUCTION(FloatMaximum, FLOATS "max.f32 f, f, g;\nmov.b32 %0, f;\n")
INSTRUCTION(HalfFma, "fma.rn.f16x2 %0, %0, %1, %2;\n")
INSTRUCTION(Dot, "dp4a.s32.s32 %0, %0, %1, %2;\n")
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
INSTRUCTIONS(ToE4M3, 2, FLOATS "cvt.rn.satfinite.e4m3x2.f32 s, f, g;\ncvt.rn.satfinite.e4m3x2.f32 t, g, f;\n"
                               "mov.b32 %0, {s, t};\n")
INSTRUCTION(PackedMaximum, "max.s16x2 %0, %0, %1;\n")
#else  // these are of Hopper, and not run elsewhere
INSTRUCTION(ToE4M3, "")
INSTRUCTION(PackedMaximum, "")
#endif

template <class Instruction>
__global__ void __launch_bounds__(THREADS, 1) pipe(int loops, uint32_t* out, long long* clocks) {
  uint32_t x[CHAINS];
  for (int i = 0; i < CHAINS; ++i) x[i] = hashed(threadIdx.x * CHAINS + i);
  __syncthreads();
  const long long start = clock64();
  for (int loop = 0; loop < loops; ++loop) {
#pragma unroll
    for (int i = 0; i < UNROLL * CHAINS; ++i)
      Instruction::run(x[i % CHAINS], x[(i + 3) % CHAINS], x[(i + 5) % CHAINS]);
  }
  __syncthreads();
  const long long took = clock64() - start;
  uint32_t folded = 0;
  for (int i = 0; i < CHAINS; ++i) folded ^= x[i];
  if (folded == 0x9E3779B9u) out[threadIdx.x] = folded;
  if (threadIdx.x == 0) clocks[blockIdx.x] = took;
}

template <class Instruction>
void measure(const Device& device) {
  Buffer<uint32_t> out(THREADS);
  Buffer<long long> clocks(device.sms);
  for (int i = 0; i < 3; ++i) pipe<Instruction><<<device.sms, THREADS>>>(LOOPS, out.data, clocks.data);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  const double lanes = double(LOOPS) * UNROLL * CHAINS * Instruction::COUNT * THREADS;
  report(lanes / double(largest(clocks.data, device.sms)), "lanes/clk/SM");
}

const Register pipes[] = {
    {"pipe ex2", 80, measure<Exp>},
    {"pipe rsqrt", 80, measure<InverseRoot>},
    {"pipe cvt.rni.s32.f32", 80, measure<ToInt>},
    {"pipe cvt.rn.f32.s32", 80, measure<ToFloat>},
    {"pipe cvt.e4m3x2", 90, measure<ToE4M3>},
    {"pipe ffma", 80, measure<Fma>},
    {"pipe fadd", 80, measure<Add>},
    {"pipe fmul", 80, measure<Mul>},
    {"pipe imad", 80, measure<Mad>},
    {"pipe lop3", 80, measure<Lop>},
    {"pipe prmt", 80, measure<Permute>},
    {"pipe iadd", 80, measure<IntAdd>},
    {"pipe shf", 80, measure<Shift>},
    {"pipe max.s32", 80, measure<Maximum>},
    {"pipe max.f32", 80, measure<FloatMaximum>},
    {"pipe max.s16x2", 90, measure<PackedMaximum>},
    {"pipe hfma2", 80, measure<HalfFma>},
    {"pipe dp4a", 80, measure<Dot>},
};

}  // namespace
}  // namespace probes
