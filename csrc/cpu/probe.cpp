#include "probe.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <chrono>
#include <cstring>

#include "kernels.h"

namespace pyvit_accel {
namespace {

constexpr double kSeconds = 0.03;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The best of five runs of `work` on every thread at once; work() returns how much it did in about kSeconds.
template <class F>
double rate(F&& work) {
  const int64_t threads = at::get_num_threads();
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    std::atomic<int64_t> done{0};
    const double start = now();
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) done += work();
    });
    best = std::max(best, (double)done / (now() - start));
  }
  return best;
}

}  // namespace

double dot_peak() {
  return rate([] {
    const double start = now();
    int64_t done = 0;
    while (now() - start < kSeconds) done += kernels().dot_loop(20000);
    return done;
  });
}

double read_rate(int64_t bytes) {
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { std::memset(scratch(bytes, 2), 0, bytes); });
  return rate([bytes] {
    void* const p = scratch(bytes, 2);
    const double start = now();
    int64_t done = 0;
    while (now() - start < kSeconds)
      for (int64_t chunk = 0; chunk < 1 << 20; chunk += bytes) kernels().read_loop(p, bytes), done += bytes;
    return done;
  });
}

}  // namespace pyvit_accel
