// The plan of sparse24_linear, on the host: what is refused, which kernel is chosen, and what it is launched with.
#include "sparse24_linear.h"

#include <cstdint>
#include <cstdlib>

#include "linear_plan.h"
#include "sparse24.cuh"

namespace pyvit_accel {
namespace {

constexpr int MAX_K = 1 << 20;

int check(const Sparse24Linear& p) {
  const Epilogue& e = p.epilogue;
  if (p.elements < INT8 || p.elements > BFLOAT16)
    return fail(ERROR_ARGUMENT, "sparse24_linear: elements=%d; they are 0 int8, 1 float16 or 2 bfloat16", p.elements);
  if (const int error = check_sizes("sparse24_linear", e, p.K, MAX_K)) return error;
  const bool int8 = p.elements == INT8;
  const int64_t product = (128 + std::abs(static_cast<int64_t>(e.x_zero_point))) << 7, kept = 2 * ceil_div(p.K, 4);
  if (int8 && product * kept > INT32_MAX)
    return fail(ERROR_ARGUMENT, "sparse24_linear: K=%d, x_zero_point=%d; int32 sums are exact for K up to %lld", p.K,
                e.x_zero_point, static_cast<long long>(INT32_MAX / product / 2 * 4));
  if (const int error = check_given("sparse24_linear", {{"x", p.x}, {"values", p.values}, {"meta", p.meta}, {"y", e.y}}))
    return error;
  if (int8)
    if (const int error = check_given("sparse24_linear", {{"x_scale", e.x_scale}, {"w_scale", e.w_scale}})) return error;
  const int64_t bytes_of_row = static_cast<int64_t>(p.K) * (int8 ? 1 : 2);
  if (const int error = check_rows("sparse24_linear", p.x, p.x_stride, e.M, bytes_of_row)) return error;
  if (!aligned(p.values, 16) || !aligned(p.meta, 16) || !aligned(p.rows, 16))
    return fail(ERROR_ARGUMENT, "sparse24_linear: values at %p, meta at %p and rows at %p; use multiples of 16", p.values,
                static_cast<const void*>(p.meta), p.rows);
  if (int8 && e.x_zero_point && (!e.w_packed || !aligned(e.w_packed, 16) || e.w_stride != 64))
    return fail(ERROR_ARGUMENT, "sparse24_linear: x_zero_point=%d with the sums of the weights at %p, %lld bytes apart; use a "
                "multiple of 16, and 64 apart", e.x_zero_point, static_cast<const void*>(e.w_packed),
                static_cast<long long>(e.w_stride));
  if (!int8 && (e.x_scale || e.w_scale || e.x_zero_point))
    return fail(ERROR_ARGUMENT, "sparse24_linear: x_scale, w_scale or x_zero_point with 16-bit floats, which have none");
  return check_outputs("sparse24_linear", e);
}

// Estimates.
constexpr double SHARED_SHARE = 0.8;       // of the products' rate, which shared memory lets through on Hopper,
constexpr double ROWS_SHARE = 0.5;         // and where the weights come through it too (sparse24_linear_sm90.cu)
constexpr double EPILOGUE_CLOCKS = 0.165;  // of an output: the 16 instructions of codes with a bias, and 5 of exchange()

TileCost cost(const Sparse24LinearConfig& config, const Sparse24Linear& p) {
  const double row = static_cast<double>(p.K) * (p.elements == INT8 ? 1 : 2);  // bytes
  const double meta = row * (p.elements == INT8 ? 0.125 : 0.0625) * (config.from_rows ? 2 : 1);
  const double weights = config.features * (row / 2 + meta) / config.cluster_tokens;
  const double products = area(config) * row / config.bytes_per_clock / (config.from_rows ? ROWS_SHARE : SHARED_SHARE);
  return {.products = products,
          .bytes = weights + config.tokens * row / config.cluster_features,
          .epilogue = EPILOGUE_CLOCKS,
          .stages = static_cast<double>(stages_of(p.K, p.elements)),
          .bytes_ahead = weights,
          .ahead = config.ahead};
}

const Sparse24LinearConfig* config_at(int config) {
  return numbered<Sparse24LinearConfig>(config, {sparse24_linear_sm80(), sparse24_linear_sm90()});
}

// Weights that go to registers are loaded one stage ahead, those of rows, if there are any, as many as shared memory has. So rows
// are for problems that leave an SM one block, beside which nobody works while it waits; elsewhere registers are the faster way.
const Sparse24LinearConfig* choose(const Sparse24Linear& p, int capability, int sm_count) {
  const auto fits = [&](const Sparse24LinearConfig& config) {
    return config.elements == p.elements && (p.rows || !config.from_rows);
  };
  const auto cost_of = [&](const Sparse24LinearConfig& config) { return cost(config, p); };
  return fastest(config_at, p.epilogue, capability, sm_count, fits, cost_of);
}

}  // namespace
}  // namespace pyvit_accel

using namespace pyvit_accel;

const char* pyvit_accel_sparse24_linear_config(int config) {
  const Sparse24LinearConfig* of = config_at(config);
  return of ? of->name : nullptr;
}

int pyvit_accel_sparse24_linear_plan(const Sparse24Linear* problem, int capability, int sm_count, int config, Launch* launch) {
  if (const int error = check(*problem)) return error;
  if (const int error = check_device("sparse24_linear", capability, sm_count)) return error;
  const Sparse24LinearConfig* of = config == -1 ? choose(*problem, capability, sm_count) : config_at(config);
  if (!of) return fail(ERROR_CONFIG, "sparse24_linear: there is no config %d; use -1 to have one chosen", config);
  static const char* const names[] = {"int8", "float16", "bfloat16"};
  if (of->elements != problem->elements || !runs_on(*of, capability))
    return fail(ERROR_CONFIG, "sparse24_linear: %s is for %s on capability %d%s; got %s on %d", of->name,
                names[of->elements], of->capability, of->capability == 80 ? " or newer" : "", names[problem->elements],
                capability);
  if (of->from_rows && !problem->rows)
    return fail(ERROR_CONFIG, "sparse24_linear: %s reads the values row by row; give rows", of->name);
  if (const int error = check_grid("sparse24_linear", *of, problem->epilogue)) return error;
  Sparse24Linear valid = *problem;
  valid.epilogue.vectors = vectors(valid.epilogue, problem->elements == INT8 ? 4 : 2);
  begin_launch(*of, *launch);
  of->prepare(valid, *of, sm_count, *launch);
  return OK;
}

int pyvit_accel_sparse24_linear(const Sparse24Linear* problem, int capability, int sm_count, int config, void* stream) {
  Launch launch;
  if (const int error = pyvit_accel_sparse24_linear_plan(problem, capability, sm_count, config, &launch)) return error;
  return pyvit_accel_launch(&launch, stream);
}
