// The plan of sparse24_linear, on the host: what is refused, which kernel is chosen, and what it is launched with.
#include "sparse24_linear.h"

#include <stddef.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "epilogue_plan.h"

namespace pyvit_accel {
namespace {

constexpr int MAX_K = 1 << 20;
constexpr int64_t MAX_GRID = 0x7FFFFFFF;

// What a choice is made by; estimates, in clocks of an SM, until they are measured.
constexpr double L2_BYTES_PER_CLOCK = 32;     // an SM's share when all of them read
constexpr double SHARED_SHARE = 0.8;          // of the products' rate, which shared memory lets through on Hopper
constexpr double EPILOGUE_CLOCKS = 0.165;     // of an output: the 16 instructions of codes with a bias, and 5 of exchange()
constexpr double ACTIVATION_CLOCKS = 0.25;    // and the 32 of an activation
constexpr double BLOCK_CLOCKS = 1000;         // until the first product, and after the last

const Sparse24LinearConfig* config_at(int config) {
  for (const Sparse24LinearConfigs& family : {sparse24_linear_sm80(), sparse24_linear_sm90()}) {
    if (config < 0) return nullptr;
    if (config < family.count) return family.of + config;
    config -= family.count;
  }
  return nullptr;
}

int check(const Sparse24Linear& p) {
  const Epilogue& e = p.epilogue;
  if (p.elements < INT8 || p.elements > BFLOAT16)
    return fail(ERROR_ARGUMENT, "sparse24_linear: elements=%d; they are 0 int8, 1 float16 or 2 bfloat16", p.elements);
  if (e.M < 1 || e.N < 1 || p.K < 1 || p.K > MAX_K)
    return fail(ERROR_ARGUMENT, "sparse24_linear: M=%d, N=%d, K=%d; use 1 or more, and K up to %d", e.M, e.N, p.K, MAX_K);
  const bool int8 = p.elements == INT8;
  const int64_t product = (128 + std::abs(static_cast<int64_t>(e.x_zero_point))) << 7, kept = 2 * ceil_div(p.K, 4);
  if (int8 && product * kept > INT32_MAX)
    return fail(ERROR_ARGUMENT, "sparse24_linear: K=%d, x_zero_point=%d; int32 sums are exact for K up to %lld", p.K,
                e.x_zero_point, static_cast<long long>(INT32_MAX / product / 2 * 4));
  const void* needed[] = {p.x, p.values, p.meta, e.y, int8 ? e.x_scale : e.y, int8 ? e.w_scale : e.y};
  const char* names[] = {"x", "values", "meta", "y", "x_scale", "w_scale"};
  for (int i = 0; i < 6; ++i)
    if (!needed[i]) return fail(ERROR_ARGUMENT, "sparse24_linear: %s is null", names[i]);
  const int64_t row = 16 * ceil_div(static_cast<int64_t>(p.K) * (int8 ? 1 : 2), 16);
  if (!aligned(p.x, 16) || p.x_stride % 16 || (e.M > 1 && p.x_stride < row))
    return fail(ERROR_ARGUMENT, "sparse24_linear: x at %p with rows %lld bytes apart; use multiples of 16, at least %lld apart",
                p.x, static_cast<long long>(p.x_stride), static_cast<long long>(row));
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

bool runs_on(const Sparse24LinearConfig& config, int capability) {
  return config.capability == 80 ? capability >= 80 : capability == config.capability;
}

int64_t tiles(const Sparse24LinearConfig& config, const Epilogue& e) {
  return ceil_div(e.M, config.tokens) * ceil_div(e.N, config.features * config.cluster) * config.cluster;
}

// Clocks until the busiest SM has done its tiles. Where it has two blocks, the epilogue of one runs under the products of
// the other.
double clocks(const Sparse24LinearConfig& config, const Sparse24Linear& p, int sm_count) {
  const double area = static_cast<double>(config.features) * config.tokens;
  const double row = static_cast<double>(p.K) * (p.elements == INT8 ? 1 : 2);  // bytes
  const double products = area * row / config.bytes_per_clock / SHARED_SHARE;
  const double packed = row * (p.elements == INT8 ? 0.625 : 0.5625);
  const double bytes = (config.features * packed + config.tokens * row / config.cluster) / L2_BYTES_PER_CLOCK;
  const double loop = std::max(products, bytes);
  const double epilogue = area * (EPILOGUE_CLOCKS + (p.epilogue.activation ? ACTIVATION_CLOCKS : 0));
  const int64_t of_sm = ceil_div(tiles(config, p.epilogue), sm_count);
  const double alone = of_sm * (loop + epilogue);
  const double together = of_sm * std::max(loop, epilogue) + std::min(loop, epilogue);
  return (config.blocks_per_sm > 1 ? together : alone) + ceil_div(of_sm, config.blocks_per_sm) * BLOCK_CLOCKS;
}

// The fastest by the model, of those made for this capability if there are any. Not from rows: by the model they are slower,
// and it takes a GPU to know better.
const Sparse24LinearConfig* choose(const Sparse24Linear& p, int capability, int sm_count) {
  const Sparse24LinearConfig* best = nullptr;
  for (int i = 0; const Sparse24LinearConfig* config = config_at(i); ++i) {
    if (config->elements != p.elements || config->from_rows || !runs_on(*config, capability)) continue;
    if (best && config->capability < best->capability) continue;
    const bool newer = !best || config->capability > best->capability;
    if (newer || clocks(*config, p, sm_count) < clocks(*best, p, sm_count)) best = config;
  }
  return best;
}

}  // namespace
}  // namespace pyvit_accel

using namespace pyvit_accel;

const char* pyvit_accel_sparse24_linear_config(int config) {
  const Sparse24LinearConfig* of = config_at(config);
  return of ? of->kernel : nullptr;
}

int pyvit_accel_sparse24_linear_plan(const Sparse24Linear* problem, int capability, int sm_count, int config, Launch* launch) {
  if (const int error = check(*problem)) return error;
  if (capability < 80 || sm_count < 1)
    return fail(ERROR_CONFIG, "sparse24_linear: a GPU of capability %d.%d with %d SMs; the kernels need 8.0 or newer, and an SM",
                capability / 10, capability % 10, sm_count);
  const Sparse24LinearConfig* of = config == -1 ? choose(*problem, capability, sm_count) : config_at(config);
  if (!of) return fail(ERROR_CONFIG, "sparse24_linear: there is no config %d; use -1 to have one chosen", config);
  static const char* const names[] = {"int8", "float16", "bfloat16"};
  if (of->elements != problem->elements || !runs_on(*of, capability))
    return fail(ERROR_CONFIG, "sparse24_linear: %s is for %s on capability %d%s; got %s on %d", of->kernel,
                names[of->elements], of->capability, of->capability == 80 ? " or newer" : "", names[problem->elements],
                capability);
  if (of->from_rows && !problem->rows)
    return fail(ERROR_CONFIG, "sparse24_linear: %s reads the values row by row; give rows", of->kernel);
  const int64_t beyond = 2 * of->tokens;  // tokens of the last tiles, which are counted in int32 too
  if (tiles(*of, problem->epilogue) > MAX_GRID || problem->epilogue.M > MAX_GRID - beyond)
    return fail(ERROR_ARGUMENT, "sparse24_linear: M=%d, N=%d are more tiles of %d x %d than a grid has blocks; split M",
                problem->epilogue.M, problem->epilogue.N, of->features, of->tokens);
  Sparse24Linear valid = *problem;
  valid.epilogue.vectors = vectors(valid.epilogue, problem->elements == INT8 ? 4 : 2);
  memset(launch, 0, offsetof(Launch, params));
  strncpy(launch->kernel, of->kernel, sizeof(launch->kernel) - 1);
  launch->function = of->function;
  launch->block = of->threads;
  launch->shared_bytes = of->shared_bytes;
  launch->cluster = 1;
  of->prepare(valid, *of, sm_count, *launch);
  return OK;
}

int pyvit_accel_sparse24_linear(const Sparse24Linear* problem, int capability, int sm_count, int config, void* stream) {
  Launch launch;
  if (const int error = pyvit_accel_sparse24_linear_plan(problem, capability, sm_count, config, &launch)) return error;
  return pyvit_accel_launch(&launch, stream);
}
