// The plan of lowbit_linear, on the host: what is refused, which kernel is chosen, and what it is launched with.
#include "lowbit_linear.h"

#include <stddef.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "epilogue_plan.h"

namespace pyvit_accel {
namespace {

constexpr int MAX_K = 131071;          // where int32 sums of 8-bit products, or of 4-bit ones times 16, are exact
constexpr int64_t MAX_GRID = 0x7FFFFFFF;

// What a choice is made by; estimates, in clocks of an SM, until they are measured.
constexpr double L2_BYTES_PER_CLOCK = 32;     // an SM's share when all of them read
constexpr double EPILOGUE_CLOCKS = 0.125;     // of an output: the 16 instructions of codes with a bias
constexpr double ACTIVATION_CLOCKS = 0.25;    // and the 32 of an activation
constexpr double BLOCK_CLOCKS = 1000;         // until the first product, and after the last

const LowbitLinearConfig* config_at(int config) {
  for (const LowbitLinearConfigs& family : {lowbit_linear_sm80(), lowbit_linear_sm90()}) {
    if (config < 0) return nullptr;
    if (config < family.count) return family.of + config;
    config -= family.count;
  }
  return nullptr;
}

int check(const LowbitLinear& p) {
  const Epilogue& e = p.epilogue;
  if (e.M < 1 || e.N < 1 || p.K < 1 || p.K > MAX_K)
    return fail(ERROR_ARGUMENT, "lowbit_linear: M=%d, N=%d, K=%d; use 1 or more, and K up to %d", e.M, e.N, p.K, MAX_K);
  if (p.w_bits != 4 && p.w_bits != 8)
    return fail(ERROR_ARGUMENT, "lowbit_linear: w_bits=%d; these kernels have 4 and 8", p.w_bits);
  const int64_t product = (128 + std::abs(static_cast<int64_t>(e.x_zero_point))) << (p.w_bits - 1);
  if (product * p.K > INT32_MAX)
    return fail(ERROR_ARGUMENT, "lowbit_linear: K=%d, x_zero_point=%d; int32 sums of %d-bit weights are exact for K up to %lld",
                p.K, e.x_zero_point, p.w_bits, static_cast<long long>(INT32_MAX / product));
  const void* needed[] = {p.x, e.w_packed, e.x_scale, e.w_scale, e.y};
  const char* names[] = {"x", "w_packed", "x_scale", "w_scale", "y"};
  for (int i = 0; i < 5; ++i)
    if (!needed[i]) return fail(ERROR_ARGUMENT, "lowbit_linear: %s is null", names[i]);
  const int64_t columns = 16 * ceil_div(p.K, 16);
  if (!aligned(p.x, 16) || p.x_stride % 16 || (e.M > 1 && p.x_stride < columns))
    return fail(ERROR_ARGUMENT, "lowbit_linear: x at %p with rows %lld bytes apart; use multiples of 16, at least %lld apart",
                static_cast<const void*>(p.x), static_cast<long long>(p.x_stride), static_cast<long long>(columns));
  const int64_t w_stride = 64 + 64 * p.w_bits * ceil_div(p.K, 32);
  if (!aligned(e.w_packed, 16) || e.w_stride != w_stride)
    return fail(ERROR_ARGUMENT, "lowbit_linear: w_packed at %p with rows of %lld bytes; K=%d codes of %d bits are %lld, at a multiple of 16",
                static_cast<const void*>(e.w_packed), static_cast<long long>(e.w_stride), p.K, p.w_bits,
                static_cast<long long>(w_stride));
  return check_outputs("lowbit_linear", e);
}

bool runs_on(const LowbitLinearConfig& config, int capability) {
  return config.capability == 80 ? capability >= 80 : capability == config.capability;
}

int64_t tiles(const LowbitLinearConfig& config, const Epilogue& e) {
  return ceil_div(e.M, config.tokens * config.cluster) * config.cluster * ceil_div(e.N, config.features);
}

// Clocks until the busiest SM has done its tiles. Where it has two blocks, the epilogue of one runs under the products of
// the other.
double clocks(const LowbitLinearConfig& config, const LowbitLinear& p, int sm_count) {
  const double area = static_cast<double>(config.features) * config.tokens;
  const double products = area * p.K / config.macs_per_clock;
  const double bytes = p.K * (config.features * p.w_bits / 8.0 / config.cluster + config.tokens) / L2_BYTES_PER_CLOCK;
  const double loop = std::max(products, bytes);
  const double epilogue = area * (EPILOGUE_CLOCKS + (p.epilogue.activation ? ACTIVATION_CLOCKS : 0));
  const int64_t of_sm = ceil_div(tiles(config, p.epilogue), sm_count);
  const double alone = of_sm * (loop + epilogue);
  const double together = of_sm * std::max(loop, epilogue) + std::min(loop, epilogue);
  return (config.blocks_per_sm > 1 ? together : alone) + ceil_div(of_sm, config.blocks_per_sm) * BLOCK_CLOCKS;
}

// The fastest by the model, of those made for this capability if there are any.
const LowbitLinearConfig* choose(const LowbitLinear& p, int capability, int sm_count) {
  const LowbitLinearConfig* best = nullptr;
  for (int i = 0; const LowbitLinearConfig* config = config_at(i); ++i) {
    if (config->w_bits != p.w_bits || !runs_on(*config, capability)) continue;
    if (best && config->capability < best->capability) continue;
    const bool newer = !best || config->capability > best->capability;
    if (newer || clocks(*config, p, sm_count) < clocks(*best, p, sm_count)) best = config;
  }
  return best;
}

}  // namespace
}  // namespace pyvit_accel

using namespace pyvit_accel;

const char* pyvit_accel_lowbit_linear_config(int config) {
  const LowbitLinearConfig* of = config_at(config);
  return of ? of->kernel : nullptr;
}

int pyvit_accel_lowbit_linear_plan(const LowbitLinear* problem, int capability, int sm_count, int config, Launch* launch) {
  if (const int error = check(*problem)) return error;
  if (capability < 80 || sm_count < 1)
    return fail(ERROR_CONFIG, "lowbit_linear: a GPU of capability %d.%d with %d SMs; the kernels need 8.0 or newer, and an SM",
                capability / 10, capability % 10, sm_count);
  const LowbitLinearConfig* of = config == -1 ? choose(*problem, capability, sm_count) : config_at(config);
  if (!of) return fail(ERROR_CONFIG, "lowbit_linear: there is no config %d; use -1 to have one chosen", config);
  if (of->w_bits != problem->w_bits || !runs_on(*of, capability))
    return fail(ERROR_CONFIG, "lowbit_linear: %s is for %d-bit weights on capability %d%s; got %d bits on %d", of->kernel,
                of->w_bits, of->capability, of->capability == 80 ? " or newer" : "", problem->w_bits, capability);
  const int64_t beyond = 2 * of->tokens * of->cluster;  // tokens of the last tiles, which are counted in int32 too
  if (tiles(*of, problem->epilogue) > MAX_GRID || problem->epilogue.M > MAX_GRID - beyond)
    return fail(ERROR_ARGUMENT, "lowbit_linear: M=%d, N=%d are more tiles of %d x %d than a grid has blocks; split M",
                problem->epilogue.M, problem->epilogue.N, of->features, of->tokens);
  LowbitLinear valid = *problem;
  valid.epilogue.vectors = vectors(valid.epilogue);
  memset(launch, 0, offsetof(Launch, params));
  strncpy(launch->kernel, of->kernel, sizeof(launch->kernel) - 1);
  launch->function = of->function;
  launch->block = of->threads;
  launch->shared_bytes = of->shared_bytes;
  launch->cluster = 1;
  of->prepare(valid, *of, sm_count, *launch);
  return OK;
}

int pyvit_accel_lowbit_linear(const LowbitLinear* problem, int capability, int sm_count, int config, void* stream) {
  Launch launch;
  if (const int error = pyvit_accel_lowbit_linear_plan(problem, capability, sm_count, config, &launch)) return error;
  return pyvit_accel_launch(&launch, stream);
}
