// What the plans of linear layers have in common, on the host: checks, the model of their time, the choice by it, and the
// beginning of a launch. Configurations of an op are Kernels and more.
#pragma once
#include <stddef.h>
#include <string.h>

#include <algorithm>
#include <initializer_list>
#include <span>

#include "linear.h"

namespace pyvit_accel {

inline bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Four features at a time: 16 bytes of every vector, of the residual, and four elements of y, whose codes are bytes.
inline bool vectors(const Epilogue& e, int output_bytes = 4) {
  return e.N % 4 == 0 && e.residual_stride % 4 == 0 && aligned(e.w_scale, 16) && aligned(e.bias, 16) &&
         aligned(e.layer_scale, 16) && aligned(e.residual, 16) &&
         aligned(e.y, e.out_scale ? 4 : 4 * output_bytes) && (!e.out_scale_per_column || aligned(e.out_scale, 16));
}

// ---- what is refused

inline int check_sizes(const char* op, const Epilogue& e, int K, int max_K) {
  if (e.M >= 1 && e.N >= 1 && K >= 1 && K <= max_K) return OK;
  return fail(ERROR_ARGUMENT, "%s: M=%d, N=%d, K=%d; use 1 or more, and K up to %d", op, e.M, e.N, K, max_K);
}

struct Given {
  const char* name;
  const void* p;
};

inline int check_given(const char* op, std::initializer_list<Given> needed) {
  for (const Given& each : needed)
    if (!each.p) return fail(ERROR_ARGUMENT, "%s: %s is null", op, each.name);
  return OK;
}

// Of x (M, stride bytes), K-major.
inline int check_rows(const char* op, const void* x, int64_t stride, int M, int64_t bytes_of_row) {
  const int64_t row = 16 * ceil_div(bytes_of_row, 16);
  if (aligned(x, 16) && stride % 16 == 0 && (M == 1 || stride >= row)) return OK;
  return fail(ERROR_ARGUMENT, "%s: x at %p with rows %lld bytes apart; use multiples of 16, at least %lld apart", op, x,
              static_cast<long long>(stride), static_cast<long long>(row));
}

inline int check_outputs(const char* op, const Epilogue& e) {
  if (e.out_scale && (e.out_bits < 2 || e.out_bits > 8))
    return fail(ERROR_ARGUMENT, "%s: out_bits=%d; codes have 2 to 8 bits", op, e.out_bits);
  if (e.activation < 0 || e.activation > 3)
    return fail(ERROR_ARGUMENT, "%s: activation=%d; it is 0 none, 1 gelu, 2 gelu_tanh or 3 quick_gelu", op, e.activation);
  return OK;
}

inline int check_device(const char* op, int capability, int sm_count) {
  if (capability >= 80 && sm_count >= 1) return OK;
  return fail(ERROR_CONFIG, "%s: a GPU of capability %d.%d with %d SMs; the kernels need 8.0 or newer, and an SM", op,
              capability / 10, capability % 10, sm_count);
}

inline bool runs_on(const Kernel& kernel, int capability) {
  return kernel.capability == 80 ? capability >= 80 : capability == kernel.capability;
}

// Of y, those that fill up clusters included.
inline int64_t tiles(const Kernel& kernel, const Epilogue& e) {
  const int cluster = kernel.cluster_features * kernel.cluster_tokens;
  return cluster * ceil_div(e.M, kernel.tokens * kernel.cluster_tokens) *
         ceil_div(e.N, kernel.features * kernel.cluster_features);
}

inline int check_grid(const char* op, const Kernel& kernel, const Epilogue& e) {
  constexpr int64_t MAX_GRID = 0x7FFFFFFF;
  const int64_t tokens = 2 * kernel.tokens * kernel.cluster_tokens;  // of the last tiles, which are counted in int32 too
  const int64_t features = 2 * kernel.features * kernel.cluster_features;
  if (tiles(kernel, e) <= MAX_GRID && e.M <= MAX_GRID - tokens && e.N <= MAX_GRID - features) return OK;
  return fail(ERROR_ARGUMENT, "%s: M=%d, N=%d are more tiles of %d x %d than a grid has blocks; split the larger", op, e.M,
              e.N, kernel.features, kernel.tokens);
}

// ---- what is chosen

// What a choice is made by; estimates, in clocks of an SM, until they are measured.
constexpr double L2_BYTES_PER_CLOCK = 32;   // an SM's share when all of them read; by others' measurements 24 to 46 on Hopper
constexpr double L2_LATENCY = 300;          // not measured on Hopper; an L40 has 222 to 339 (arXiv:2606.22588)
constexpr double ACTIVATION_CLOCKS = 0.25;  // of an output: 32 instructions
constexpr double BLOCK_CLOCKS = 1000;       // until the first product, and after the last

// Of a tile.
struct TileCost {
  double products;  // clocks
  double bytes;     // from L2
  double epilogue;  // clocks of an output, without an activation
  // What is loaded for a stage has as many stages to arrive as it is loaded ahead: a block waits for the latency, and its bytes.
  double stages = 0, bytes_ahead = 0;  // 0: ahead enough, whatever the latency
  int ahead = 1;
};

inline double area(const Kernel& kernel) { return static_cast<double>(kernel.features) * kernel.tokens; }

// Clocks until the busiest SM has done its tiles. Where it has two blocks, the epilogue of one runs under the products of
// the other.
inline double clocks(const Kernel& kernel, const Epilogue& e, int sm_count, const TileCost& tile) {
  const double epilogue = area(kernel) * (tile.epilogue + (e.activation ? ACTIVATION_CLOCKS : 0));
  const int64_t of_sm = ceil_div(tiles(kernel, e), sm_count);
  const int64_t blocks = std::min<int64_t>(of_sm, kernel.blocks_per_sm);  // that wait beside each other
  const double waits = (tile.stages * L2_LATENCY / blocks + tile.bytes_ahead / L2_BYTES_PER_CLOCK) / tile.ahead;
  const double loop = std::max({tile.products, tile.bytes / L2_BYTES_PER_CLOCK, waits});
  const double alone = of_sm * (loop + epilogue);
  const double together = of_sm * std::max(loop, epilogue) + std::min(loop, epilogue);
  return (kernel.blocks_per_sm > 1 ? together : alone) + ceil_div(of_sm, kernel.blocks_per_sm) * BLOCK_CLOCKS;
}

// The configuration of this number, counted through the families of an op; null beyond the last.
template <class Config>
const Config* numbered(int config, std::initializer_list<std::span<const Config>> families) {
  if (config < 0) return nullptr;
  for (const std::span<const Config>& family : families) {
    if (config < static_cast<int>(family.size())) return &family[config];
    config -= static_cast<int>(family.size());
  }
  return nullptr;
}

// The fastest, by cost(config), of those that fits(config), and of them of those made for this capability if there are any.
template <class Config, class Fits, class Cost>
const Config* fastest(const Config* (*config_at)(int), const Epilogue& e, int capability, int sm_count, Fits fits, Cost cost) {
  const auto time = [&](const Config* config) { return clocks(*config, e, sm_count, cost(*config)); };
  const Config* best = nullptr;
  for (int i = 0; const Config* config = config_at(i); ++i) {
    if (!runs_on(*config, capability) || !fits(*config)) continue;
    if (best && config->capability < best->capability) continue;
    if (!best || config->capability > best->capability || time(config) < time(best)) best = config;
  }
  return best;
}

// ---- what is launched

// Of blocks that take tiles in turn: as many clusters as fit the GPU, if there are so many.
inline uint32_t persistent_grid(const Kernel& kernel, const Epilogue& e, int sm_count) {
  const int cluster = kernel.cluster_features * kernel.cluster_tokens;
  const int64_t fit = std::max(1, sm_count * kernel.blocks_per_sm / cluster);
  return static_cast<uint32_t>(std::min(tiles(kernel, e), fit * cluster));
}

// All but grid, parameters and tensor maps.
inline void begin_launch(const Kernel& kernel, Launch& launch) {
  memset(&launch, 0, offsetof(Launch, params));
  strncpy(launch.kernel, kernel.name, sizeof(launch.kernel) - 1);
  launch.function = kernel.function;
  launch.block = kernel.threads;
  launch.shared_bytes = kernel.shared_bytes;
  launch.cluster = kernel.cluster_features * kernel.cluster_tokens;
}

template <class Params>
void set_params(const Params& params, Launch& launch) {
  static_assert(sizeof(Params) <= sizeof(launch.params) && alignof(Params) <= 64);
  launch.param_bytes = sizeof(params);
  *reinterpret_cast<Params*>(launch.params) = params;
}

}  // namespace pyvit_accel
