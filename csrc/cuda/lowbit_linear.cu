// The plan of lowbit_linear, on the host: what is refused, which kernel is chosen, and what it is launched with.
#include "lowbit_linear.h"

#include <cstdint>
#include <cstdlib>

#include "linear_plan.h"

namespace pyvit_accel {
namespace {

constexpr int MAX_K = 131071;  // where int32 sums of 8-bit products, or of 4-bit ones times 16, are exact

int check(const LowbitLinear& p) {
  const Epilogue& e = p.epilogue;
  if (const int error = check_sizes("lowbit_linear", e, p.K, MAX_K)) return error;
  if (p.w_bits != 4 && p.w_bits != 8)
    return fail(ERROR_ARGUMENT, "lowbit_linear: w_bits=%d; these kernels have 4 and 8", p.w_bits);
  const int64_t product = (128 + std::abs(static_cast<int64_t>(e.x_zero_point))) << (p.w_bits - 1);
  if (product * p.K > INT32_MAX)
    return fail(ERROR_ARGUMENT, "lowbit_linear: K=%d, x_zero_point=%d; int32 sums of %d-bit weights are exact for K up to %lld",
                p.K, e.x_zero_point, p.w_bits, static_cast<long long>(INT32_MAX / product));
  if (const int error = check_given("lowbit_linear", {{"x", p.x}, {"w_packed", e.w_packed}, {"x_scale", e.x_scale},
                                                      {"w_scale", e.w_scale}, {"y", e.y}}))
    return error;
  if (const int error = check_rows("lowbit_linear", p.x, p.x_stride, e.M, p.K)) return error;
  const int64_t w_stride = 64 + 64 * p.w_bits * ceil_div(p.K, 32);
  if (!aligned(e.w_packed, 16) || e.w_stride != w_stride)
    return fail(ERROR_ARGUMENT, "lowbit_linear: w_packed at %p with rows of %lld bytes; K=%d codes of %d bits are %lld, at a multiple of 16",
                static_cast<const void*>(e.w_packed), static_cast<long long>(e.w_stride), p.K, p.w_bits,
                static_cast<long long>(w_stride));
  return check_outputs("lowbit_linear", e);
}

constexpr double EPILOGUE_CLOCKS = 0.125;  // of an output: the 16 instructions of codes with a bias; an estimate

TileCost cost(const LowbitLinearConfig& config, const LowbitLinear& p) {
  const double w_bytes = config.features * p.w_bits / 8.0 / config.cluster_tokens;  // of an input
  const double x_bytes = static_cast<double>(config.tokens) / config.cluster_features;
  return {.products = area(config) * p.K / config.macs_per_clock,
          .bytes = p.K * (w_bytes + x_bytes),
          .epilogue = EPILOGUE_CLOCKS};
}

const LowbitLinearConfig* config_at(int config) {
  return numbered<LowbitLinearConfig>(config, {lowbit_linear_sm80(), lowbit_linear_sm90()});
}

const LowbitLinearConfig* choose(const LowbitLinear& p, int capability, int sm_count) {
  const auto fits = [&](const LowbitLinearConfig& config) { return config.w_bits == p.w_bits; };
  const auto cost_of = [&](const LowbitLinearConfig& config) { return cost(config, p); };
  return fastest(config_at, p.epilogue, capability, sm_count, fits, cost_of);
}

}  // namespace
}  // namespace pyvit_accel

using namespace pyvit_accel;

const char* pyvit_accel_lowbit_linear_config(int config) {
  const LowbitLinearConfig* of = config_at(config);
  return of ? of->name : nullptr;
}

int pyvit_accel_lowbit_linear_plan(const LowbitLinear* problem, int capability, int sm_count, int config, Launch* launch) {
  if (const int error = check(*problem)) return error;
  if (const int error = check_device("lowbit_linear", capability, sm_count)) return error;
  const LowbitLinearConfig* of = config == -1 ? choose(*problem, capability, sm_count) : config_at(config);
  if (!of) return fail(ERROR_CONFIG, "lowbit_linear: there is no config %d; use -1 to have one chosen", config);
  if (of->w_bits != problem->w_bits || !runs_on(*of, capability))
    return fail(ERROR_CONFIG, "lowbit_linear: %s is for %d-bit weights on capability %d%s; got %d bits on %d", of->name,
                of->w_bits, of->capability, of->capability == 80 ? " or newer" : "", problem->w_bits, capability);
  if (const int error = check_grid("lowbit_linear", *of, problem->epilogue)) return error;
  LowbitLinear valid = *problem;
  valid.epilogue.vectors = vectors(valid.epilogue);
  begin_launch(*of, *launch);
  of->prepare(valid, *of, sm_count, *launch);
  return OK;
}

int pyvit_accel_lowbit_linear(const LowbitLinear* problem, int capability, int sm_count, int config, void* stream) {
  Launch launch;
  if (const int error = pyvit_accel_lowbit_linear_plan(problem, capability, sm_count, config, &launch)) return error;
  return pyvit_accel_launch(&launch, stream);
}
