// What a launch costs: one after the other, as nodes of a graph, and started before the one before has ended.
#include "probe.h"

namespace probes {
namespace {

constexpr int LAUNCHES = 500;

// A few clocks of work, so that what a kernel does is not all there is; with DEPENDENT the next one may start at once.
template <bool DEPENDENT>
__global__ void brief(float* out, int loops) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (DEPENDENT) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
#endif
  float x = threadIdx.x;
  for (int i = 0; i < loops; ++i) x = fmaf(x, 0.999f, 1.0f);
  if (x == -1.0f) out[threadIdx.x] = x;
}

template <bool DEPENDENT>
void launch_all(cudaStream_t stream, int blocks, float* out, int loops) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = {unsigned(blocks), 1, 1};
  config.blockDim = {128, 1, 1};
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = DEPENDENT ? 1 : 0;
  for (int i = 0; i < LAUNCHES; ++i) CHECK(cudaLaunchKernelEx(&config, brief<DEPENDENT>, out, loops));
}

template <bool DEPENDENT, bool GRAPH>
void measure(const Device& device) {
  Buffer<float> out(128);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaGraphExec_t instance = nullptr;
  if (GRAPH) {
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    launch_all<DEPENDENT>(stream, device.sms, out.data, 16);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&instance, graph, 0));
    CHECK(cudaGraphDestroy(graph));
  }
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int round = 0; round < 8; ++round) {
    CHECK(cudaEventRecord(start, stream));
    if (GRAPH)
      CHECK(cudaGraphLaunch(instance, stream));
    else
      launch_all<DEPENDENT>(stream, device.sms, out.data, 16);
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, end));
    if (round > 1 && ms < best) best = ms;
  }
  report(1e3 * best / LAUNCHES, "us");
}

const Register launches[] = {
    {"launch, stream", 80, measure<false, false>},
    {"launch, graph", 80, measure<false, true>},
    {"launch, stream, dependent", 90, measure<true, false>},
    {"launch, graph, dependent", 90, measure<true, true>},
};

}  // namespace
}  // namespace probes
