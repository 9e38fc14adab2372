// What the probes share: names, launches timed by events, and one JSON line for each result.
//
//   probes            lists the names
//   probes a b c      runs these, in this order; the process ends at the first CUDA error, after saying which
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace probes {

struct Device {
  int sms, major, minor;
  size_t l2;
};

struct Probe {
  std::string name;
  int least;  // compute capability, 10 major + minor; 90 also means exactly sm_90, for what only Hopper has
  std::function<void(const Device&)> run;
};

inline std::vector<Probe>& all() {
  static std::vector<Probe> probes;
  return probes;
}

struct Register {
  Register(std::string name, int least, std::function<void(const Device&)> run) {
    all().push_back({std::move(name), least, std::move(run)});
  }
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("{\"failed\": \"%s: %s\"}\n", what, cudaGetErrorString(error));
  std::fflush(stdout);
  std::_Exit(3);
}
#define CHECK(call) ::probes::check((call), #call)

// A device allocation that lives as long as its scope.
template <class T>
struct Buffer {
  T* data = nullptr;
  explicit Buffer(size_t n) { CHECK(cudaMalloc(&data, n * sizeof(T))); }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
};

// Milliseconds of one call, the least of several: what else runs on the card only adds.
template <class F>
float milliseconds(F&& launch, int rounds = 6) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int i = 0; i < rounds; ++i) {
    CHECK(cudaEventRecord(start));
    launch();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, end));
    if (i > 0 && ms < best) best = ms;
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(end));
  return best;
}

inline long long largest(const long long* device, int n) {
  std::vector<long long> host(n);
  CHECK(cudaMemcpy(host.data(), device, n * sizeof(long long), cudaMemcpyDeviceToHost));
  long long most = 0;
  for (long long value : host) most = value > most ? value : most;
  return most;
}

// value in unit; more is the rest of a JSON object, of further numbers.
inline void report(double value, const char* unit, const std::string& more = "") {
  std::printf("{\"value\": %.6g, \"unit\": \"%s\"%s}\n", value, unit, more.c_str());
  std::fflush(stdout);
}

inline std::string number(const char* name, double value) {
  char text[96];
  std::snprintf(text, sizeof text, ", \"%s\": %.6g", name, value);
  return text;
}

__device__ inline uint32_t hashed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace probes
