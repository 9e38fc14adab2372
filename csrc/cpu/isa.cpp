// Which kernels run: the best this CPU has, unless a test asks for another.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace pyvit_accel {
namespace {

bool has(const Kernels& k) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&k == &kAvx2) return avx2;
  if (&k == &kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
  return &k == &kPortable;
}

#if defined(__x86_64__)
const Kernels* const kAll[] = {&kAvx512, &kAvx2, &kPortable};
#else
const Kernels* const kAll[] = {&kPortable};
#endif

const Kernels* best() {
  for (const Kernels* k : kAll)
    if (has(*k)) return k;
  return &kPortable;
}

std::atomic<const Kernels*> active{nullptr};

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = active.load(std::memory_order_relaxed);
  if (k == nullptr) active.store(k = best(), std::memory_order_relaxed);
  return *k;
}

const char* select_isa(const char* name) {
  for (const Kernels* k : kAll)
    if (has(*k) && (std::strcmp(name, "best") == 0 || std::strcmp(name, k->name) == 0)) {
      active.store(k, std::memory_order_relaxed);
      return k->name;
    }
  return nullptr;
}

bool has_vbmi() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512vbmi");
  return has;
#else
  return false;
#endif
}

void* scratch(size_t bytes, int slot) {
  static thread_local Buffer buffers[4];
  Buffer& b = buffers[slot];
  if (b.bytes < bytes) {
    std::free(b.data);
    b.bytes = (bytes + 4095) / 4096 * 4096;
    b.data = std::aligned_alloc(64, b.bytes);
    if (b.data == nullptr) std::abort();
  }
  return b.data;
}

}  // namespace pyvit_accel
