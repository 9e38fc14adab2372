// What layouts rest on: one wgmma of 64 x 64, int8, A from registers, dense and 2:4, against the CPU; and whether two
// blocks on a multiprocessor hide each other's epilogues.
#include "wgmma.cuh"

namespace probes {
namespace {

constexpr int M = 64, N = 64, THREADS = 128;

#define OUT_8(b)                                                                                                    \
  "+r"(d[b]), "+r"(d[b + 1]), "+r"(d[b + 2]), "+r"(d[b + 3]), "+r"(d[b + 4]), "+r"(d[b + 5]), "+r"(d[b + 6]),       \
      "+r"(d[b + 7])
#define REGISTERS_32                                                                                                \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}"

// One instruction: dense K = 32, sparse K = 64, of which A (64, 32) holds two of every four. B (64, 64) is K-major.
// a: four words a lane, meta: one; both lie as lanes want them, see the host's side. d (64, 64).
template <bool SPARSE>
__global__ void __launch_bounds__(THREADS) one_tile(const uint4* a, const uint32_t* meta, const uint8_t* b,
                                                    int32_t* y) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ __align__(1024) uint8_t tile[N * 128];
  for (int i = threadIdx.x; i < N * 64; i += THREADS) {
    const int n = i / 64, k = i % 64;
    tile[n * 128 + (((k / 16) ^ (n & 7)) * 16) + k % 16] = b[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const uint64_t from = descriptor(static_cast<uint32_t>(__cvta_generic_to_shared(tile)));
  const uint4 w = a[threadIdx.x];
  int32_t d[32] = {};
  // The fence is part of the statement, so that every register it reads is written before.
  if constexpr (SPARSE) {
    asm volatile("wgmma.fence.sync.aligned;\nwgmma.mma_async.sp.sync.aligned.m64n64k64.s32.s8.s8 " REGISTERS_32
                 ", {%32, %33, %34, %35}, %36, %37, 0, 1;\n"
                 : OUT_8(0), OUT_8(8), OUT_8(16), OUT_8(24)
                 : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(from), "r"(meta[threadIdx.x]));
  } else {
    asm volatile("wgmma.fence.sync.aligned;\nwgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " REGISTERS_32
                 ", {%32, %33, %34, %35}, %36, 1;\n"
                 : OUT_8(0), OUT_8(8), OUT_8(16), OUT_8(24)
                 : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(from));
  }
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  const int lane = threadIdx.x % 32, row = 16 * (threadIdx.x / 32) + lane / 4, column = 2 * (lane % 4);
  for (int i = 0; i < 32; ++i) y[(row + 8 * (i / 2 % 2)) * N + column + 8 * (i / 4) + i % 2] = d[i];
#endif
}

uint32_t random_state = 1;
uint32_t next_random() {
  random_state = random_state * 1664525u + 1013904223u;
  return random_state >> 8;
}

constexpr uint8_t NIBBLES[] = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE};  // two of four, ascending

template <bool SPARSE>
void check_tile(const Device&) {
  constexpr int K = SPARSE ? 64 : 32;
  std::vector<int8_t> full(M * K, 0), kept(M * 32), b(N * 64);
  std::vector<uint8_t> nibbles(M * 16, 0);
  for (auto& v : b) v = int8_t(next_random());
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < 32; ++k) kept[m * 32 + k] = int8_t(next_random());
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < (SPARSE ? 16 : 8); ++c) {
      const uint8_t nibble = NIBBLES[next_random() % 6];
      nibbles[m * 16 + c] = nibble;
      for (int j = 0; j < (SPARSE ? 2 : 4); ++j)
        full[m * K + 4 * c + (SPARSE ? (nibble >> (2 * j)) & 3 : j)] = kept[m * 32 + (SPARSE ? 2 : 4) * c + j];
    }
  std::vector<uint4> a(THREADS);
  std::vector<uint32_t> meta(THREADS, 0);
  for (int thread = 0; thread < THREADS; ++thread) {
    const int lane = thread % 32, g = lane / 4, t = lane % 4, row = 16 * (thread / 32) + g;
    uint32_t words[4];
    for (int r = 0; r < 4; ++r) {
      words[r] = 0;
      for (int byte = 0; byte < 4; ++byte) {
        const int8_t code = kept[(row + 8 * (r & 1)) * 32 + 4 * t + 16 * (r >> 1) + byte];
        words[r] |= uint32_t(uint8_t(code)) << (8 * byte);
      }
    }
    a[thread] = {words[0], words[1], words[2], words[3]};
    for (int c = 0; c < 8; ++c)
      meta[thread] |= uint32_t(nibbles[(row + 8 * (t & 1)) * 16 + 8 * (t >> 1) + c]) << (4 * c);
  }
  Buffer<uint4> device_a(THREADS);
  Buffer<uint32_t> device_meta(THREADS);
  Buffer<uint8_t> device_b(N * 64);
  Buffer<int32_t> device_y(M * N);
  CHECK(cudaMemcpy(device_a.data, a.data(), THREADS * sizeof(uint4), cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(device_meta.data, meta.data(), THREADS * sizeof(uint32_t), cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(device_b.data, b.data(), b.size(), cudaMemcpyHostToDevice));
  CHECK(cudaMemset(device_y.data, 0x7F, M * N * sizeof(int32_t)));
  one_tile<SPARSE><<<1, THREADS>>>(device_a.data, device_meta.data, device_b.data, device_y.data);
  CHECK(cudaGetLastError());
  std::vector<int32_t> y(M * N);
  CHECK(cudaMemcpy(y.data(), device_y.data, M * N * sizeof(int32_t), cudaMemcpyDeviceToHost));
  int wrong = 0;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < K; ++k) sum += int32_t(full[m * K + k]) * b[n * 64 + k];
      wrong += sum != y[m * N + n];
    }
  report(wrong, "wrong sums of 4096");
}

const Register checks[] = {
    {"int8 rs is exact", 90, check_tile<false>},
    {"int8_sparse rs is exact", 90, check_tile<true>},
};

// A block's tile: 24 k-steps of two warpgroups' m64n128k32, a product of 768 inputs, then arithmetic on floats as an
// epilogue has it. One block a multiprocessor does both in turn; two may overlap.
constexpr int BLOCK = 256, TILES = 256;
[[maybe_unused]] constexpr int STEPS_A_TILE = 24, EPILOGUE = 24;

__global__ void __launch_bounds__(BLOCK, 2) tiles(int count, uint32_t* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint32_t shared[];
  for (int i = threadIdx.x; i < 48 * 256; i += BLOCK) shared[i] = random_word(i, INT8);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint64_t a = descriptor(base + 8192 * (threadIdx.x / 128)), b = descriptor(base + 16384);
  uint32_t folded = 0;
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = threadIdx.x * 1e-3f + i;
  for (int tile = 0; tile < count; ++tile) {
    asm volatile(
        "{\n.reg .pred p, more;\n.reg .b32 left;\n.reg .b32 " LIST_128 ";\n" ON_128(ZERO)
        "setp.eq.u32 p, %1, %1;\nmov.u32 left, %1;\nAGAIN:\nwgmma.fence.sync.aligned;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" LIST_128 "}, %2, %6, p;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" LIST_128 "}, %3, %7, p;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" LIST_128 "}, %4, %8, p;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" LIST_128 "}, %5, %9, p;\n"
        "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;\n"
        "sub.u32 left, left, 1;\nsetp.ne.u32 more, left, 0;\n@more bra AGAIN;\n"
        "wgmma.wait_group.sync.aligned 0;\nmov.b32 %0, 0;\n" ON_128(FOLD) "}\n"
        : "=&r"(folded)
        : "r"(STEPS_A_TILE / 4), "l"(a), "l"(a + 2), "l"(a + 4), "l"(a + 6), "l"(b), "l"(b + 2), "l"(b + 4), "l"(b + 6)
        : "memory");
    x[0] += __uint_as_float(folded & 0x3FFFFFFFu);
    for (int round = 0; round < EPILOGUE; ++round)
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = fmaf(x[i], 0.9999f, x[(i + 1) % 16]);
  }
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += x[i];
  if (sum == 12345.0f) out[threadIdx.x] = folded;
#endif
}

void overlap(const Device& device) {
  Buffer<uint32_t> out(BLOCK);
  CHECK(cudaFuncSetAttribute(tiles, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024));
  const auto time = [&](int blocks, int shared, int count) {
    return milliseconds([&] { tiles<<<device.sms * blocks, BLOCK, shared>>>(count, out.data); });
  };
  const float alone = time(1, 200 * 1024, TILES), together = time(2, 100 * 1024, TILES / 2);
  report(alone / together, "x", number("one_block_ms", alone) + number("two_blocks_ms", together));
}

const Register overlaps("two blocks overlap", 90, overlap);

}  // namespace
}  // namespace probes
