// Where the time of a block goes: thread time per phase, summed over threads, while someone asks for it.
#pragma once
#include <atomic>
#include <chrono>

namespace pyvit_accel {

enum class Phase { patch_embed, norm, qkv, attention, quantize, proj, fc1, activation, fc2, count };
constexpr const char* kPhaseNames[] = {"patch_embed", "norm", "qkv", "attention", "quantize", "proj", "fc1", "activation", "fc2"};

inline std::atomic<bool> profiling{false};
inline std::atomic<int64_t> phase_ns[(int)Phase::count];

template <class F>
inline void timed(Phase phase, F&& f) {
  if (!profiling.load(std::memory_order_relaxed)) return f();
  const auto start = std::chrono::steady_clock::now();
  f();
  phase_ns[(int)phase] += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace pyvit_accel
