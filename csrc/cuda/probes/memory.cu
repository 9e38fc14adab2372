// Bytes a clock: shared memory, L2 to a multiprocessor by loads and by bulk copies, alone and to pairs, and HBM.
#include "probe.h"

namespace probes {
namespace {

constexpr int THREADS = 1024, SHARED = 64 * 1024;

__global__ void __launch_bounds__(THREADS, 1) shared_reads(int loops, uint32_t* out, long long* clocks) {
  extern __shared__ uint4 words[];
  for (int i = threadIdx.x; i < SHARED / 16; i += THREADS) words[i] = {hashed(i), hashed(i + 1), 3u, 4u};
  __syncthreads();
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(words)) + 16 * threadIdx.x;
  uint32_t folded = 0;
  const long long start = clock64();
  for (int loop = 0; loop < loops; ++loop) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 v;
      asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(base + i * 16 * THREADS));
      folded ^= v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  if (folded == 0x9E3779B9u) out[threadIdx.x] = folded;
}

void shared_rate(const Device& device) {
  constexpr int LOOPS = 2048;
  Buffer<uint32_t> out(THREADS);
  Buffer<long long> clocks(device.sms);
  CHECK(cudaFuncSetAttribute(shared_reads, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
  for (int i = 0; i < 3; ++i) shared_reads<<<device.sms, THREADS, SHARED>>>(LOOPS, out.data, clocks.data);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  report(double(LOOPS) * 4 * 16 * THREADS / double(largest(clocks.data, device.sms)), "B/clk/SM");
}

// Every block reads all of a region that fits in L2, from a place of its own on, past L1.
__global__ void __launch_bounds__(THREADS, 1) l2_reads(const uint4* region, uint32_t words, uint32_t* out,
                                                       long long* clocks) {
  uint32_t folded = 0, at = (blockIdx.x * (words / gridDim.x) + threadIdx.x) % words;
  const long long start = clock64();
  for (uint32_t i = 0; i < words; i += 8 * THREADS) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w)
                   : "l"(region + at));
      at += THREADS;
      if (at >= words) at -= words;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) folded ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  if (folded == 0x9E3779B9u) out[threadIdx.x] = folded;
}

constexpr size_t REGION = size_t(12) << 20;

__global__ void fill(uint4* words, size_t n) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    const uint32_t x = hashed(uint32_t(i));
    words[i] = {x, x * 3, x * 5, x * 7};
  }
}

void l2_rate(const Device& device) {
  const uint32_t words = uint32_t(REGION / 16);
  Buffer<uint4> region(words);
  Buffer<uint32_t> out(THREADS);
  Buffer<long long> clocks(device.sms);
  fill<<<device.sms * 4, 256>>>(region.data, words);
  const float ms = milliseconds([&] { l2_reads<<<device.sms, THREADS>>>(region.data, words, out.data, clocks.data); });
  report(double(REGION) / double(largest(clocks.data, device.sms)), "B/clk/SM",
         number("gb_s", double(REGION) * device.sms / ms / 1e6));
}

// Bulk copies of L2 into a ring of stages; with PAIRS each block of a cluster of two fetches half of a stage for both.
constexpr uint32_t STAGE = 32 * 1024;
constexpr int STAGES = 4, COPIES = 1024;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
#endif

template <bool PAIRS>
__global__ void bulk_copies(const uint8_t* region, uint32_t size, long long* clocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t stages[];
  __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
  uint32_t rank = 0;
  if (PAIRS) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const auto shared = [](const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); };
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(full + s)));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(empty + s)), "r"(PAIRS ? 2 : 1));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (PAIRS) cluster_barrier();
  if (threadIdx.x == 0) {
    const uint32_t part = PAIRS ? STAGE / 2 : STAGE, group = PAIRS ? blockIdx.x / 2 : blockIdx.x;
    const uint32_t chunks = size / STAGE;
    const long long start = clock64();
    for (int i = 0; i < COPIES + STAGES - 1; ++i) {
      if (i < COPIES) {
        const int s = i % STAGES;
        if (i >= STAGES) wait(shared(empty + s), (i / STAGES - 1) & 1);
        const uint8_t* from = region + size_t((group * 37 + i) % chunks) * STAGE + rank * part;
        const uint32_t to = shared(stages) + s * STAGE + rank * part, barrier = shared(full + s);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE) : "memory");
        if (PAIRS)
          asm volatile(
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
              "[%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(part), "r"(barrier), "h"(uint16_t(3)) : "memory");
        else
          asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                       ::"r"(to), "l"(from), "r"(part), "r"(barrier) : "memory");
      }
      if (i >= STAGES - 1) {
        const int j = i - (STAGES - 1), s = j % STAGES;
        wait(shared(full + s), (j / STAGES) & 1);
        for (uint32_t other = 0; other < (PAIRS ? 2u : 1u); ++other) {  // both may overwrite it once both have seen it
          asm volatile(
              "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
              "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n"
              ::"r"(shared(empty + s)), "r"(other) : "memory");
        }
      }
    }
    clocks[blockIdx.x] = clock64() - start;
  }
  __syncthreads();
  if (PAIRS) cluster_barrier();  // a block that is gone cannot be arrived at
#endif
}

template <bool PAIRS>
void bulk_rate(const Device& device) {
  Buffer<uint4> region(REGION / 16);
  const int blocks = device.sms / 2 * 2;
  Buffer<long long> clocks(blocks);
  fill<<<device.sms * 4, 256>>>(region.data, REGION / 16);
  CHECK(cudaFuncSetAttribute(bulk_copies<PAIRS>, cudaFuncAttributeMaxDynamicSharedMemorySize, STAGE * STAGES));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = {unsigned(blocks), 1, 1};
  config.blockDim = {32, 1, 1};
  config.dynamicSmemBytes = STAGE * STAGES;
  config.attrs = &cluster;
  config.numAttrs = PAIRS ? 1 : 0;
  const float ms = milliseconds([&] {
    CHECK(cudaLaunchKernelEx(&config, bulk_copies<PAIRS>, (const uint8_t*)region.data, uint32_t(REGION), clocks.data));
  });
  const double bytes = double(COPIES) * STAGE;  // that arrive in one multiprocessor
  report(bytes / double(largest(clocks.data, blocks)), "B/clk/SM", number("gb_s", bytes * blocks / ms / 1e6));
}

__global__ void copy(const uint4* from, uint4* to, size_t n) {
  const size_t at = blockIdx.x * size_t(blockDim.x) * 4 + threadIdx.x;
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (at + i * blockDim.x < n) v[i] = __ldcs(from + at + i * blockDim.x);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (at + i * blockDim.x < n) __stcs(to + at + i * blockDim.x, v[i]);
}

void hbm_rate(const Device&) {
  const size_t words = size_t(1) << 26;  // 1 GiB
  Buffer<uint4> from(words), to(words);
  fill<<<4096, 256>>>(from.data, words);
  const float ms = milliseconds([&] { copy<<<unsigned(words / 1024), 256>>>(from.data, to.data, words); });
  report(2.0 * double(words) * 16 / ms / 1e6, "GB/s");
}

const Register memories[] = {
    {"shared memory reads", 80, shared_rate},
    {"l2 loads", 80, l2_rate},
    {"l2 bulk copies", 90, bulk_rate<false>},
    {"l2 bulk copies, pairs", 90, bulk_rate<true>},
    {"hbm copy", 80, hbm_rate},
};

}  // namespace
}  // namespace probes
