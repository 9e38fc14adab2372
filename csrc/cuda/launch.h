// What every op of the library is launched with, and how: plain C structures, which pyvit_accel/cuda mirrors with ctypes.
//
// An op's plan fills a Launch without a GPU: all that a GPU will see, and what tests hand to the emulator.
#pragma once
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define PYVIT_ACCEL_ABI 2  // raised when a structure or a function of the library changes

extern "C" {

// A tensor map that the launch encodes; dimension 0 is contiguous.
struct TensorMap {
  uint64_t base;
  uint64_t dims[5];     // elements
  uint64_t strides[4];  // bytes, of dimensions 1 ..
  uint32_t box[5];
  uint32_t rank;
  uint32_t swizzle;  // 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes
  uint32_t element_bytes;
  uint32_t offset;  // of its 128 bytes in the parameters; a multiple of 64
};

struct Launch {
  char kernel[64];
  const void* function;  // of the kernel, on the host
  uint32_t grid, block, cluster, shared_bytes, param_bytes, num_maps;
  uint32_t dependent;  // 1: programmatic dependent launch
  TensorMap maps[4];
  alignas(64) uint8_t params[1024];
};

// What functions that can fail return; pyvit_accel_error has the words.
enum Error {
  OK = 0,
  ERROR_ARGUMENT,  // the problem cannot be computed
  ERROR_CONFIG,    // this kernel cannot compute it, or not there
  ERROR_DRIVER,    // the driver or the runtime refused
};

EXPORT int pyvit_accel_abi_version(void);
EXPORT const char* pyvit_accel_error(void);         // what the last failure of this thread was: what came, what is expected
EXPORT const char* pyvit_accel_device_error(void);  // why nothing can be launched here, or null
EXPORT int pyvit_accel_launch(const Launch* launch, void* stream);

}  // extern "C"

namespace pyvit_accel {

// Keeps the words for pyvit_accel_error and returns the code.
__attribute__((format(printf, 2, 3))) int fail(Error code, const char* format, ...);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace pyvit_accel
