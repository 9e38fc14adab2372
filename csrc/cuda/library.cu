// What is common to all ops: the ABI version, errors in words, and the launch.
//
// Linked with the static CUDA runtime and nothing else: the one driver function it needs is asked for at run time, so the
// library loads where there is no driver.
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <mutex>

#include "launch.h"

namespace pyvit_accel {
namespace {

thread_local char error_text[512] = "no error";

int refused(const char* what, cudaError_t error) {
  return error == cudaSuccess ? OK : fail(ERROR_DRIVER, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return reinterpret_cast<Encode>(error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr);
}

int encode(const TensorMap& map, void* to) {
  static const Encode encoder = find_encoder();
  if (!encoder) return fail(ERROR_DRIVER, "the driver has no cuTensorMapEncodeTiled; use one of CUDA 12.0 or newer");
  const CUtensorMapDataType type = map.element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : map.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  const uint32_t every[5] = {1, 1, 1, 1, 1};
  const CUresult error = encoder(static_cast<CUtensorMap*>(to), type, map.rank, reinterpret_cast<void*>(map.base),
                                 map.dims, map.strides, map.box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 swizzles[map.swizzle], CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error == CUDA_SUCCESS) return OK;
  return fail(ERROR_DRIVER, "cuTensorMapEncodeTiled refused a map of rank %u, box %u x %u: CUresult %d", map.rank,
              map.box[0], map.box[1], static_cast<int>(error));
}

// Shared memory beyond 48 KiB has to be asked for, and its largest share for as many blocks as fit: once for each kernel on
// each device, for it costs as much as the launch.
int make_room(const Launch& launch) {
  struct Done {
    int device;
    const void* function;
  };
  static std::mutex mutex;
  static Done done[512];
  static int count = 0;
  if (launch.shared_bytes < 32 * 1024) return OK;
  int device = 0;
  if (const int error = refused("cudaGetDevice", cudaGetDevice(&device))) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  for (int i = 0; i < count; ++i)
    if (done[i].device == device && done[i].function == launch.function) return OK;
  cudaError_t error = cudaFuncSetAttribute(launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(launch.shared_bytes));
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(launch.function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess && count < 512) done[count++] = {device, launch.function};
  return refused(launch.kernel, error);
}

}  // namespace

int fail(Error code, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(error_text, sizeof(error_text), format, values);
  va_end(values);
  return code;
}

}  // namespace pyvit_accel

using namespace pyvit_accel;

int pyvit_accel_abi_version(void) { return PYVIT_ACCEL_ABI; }

const char* pyvit_accel_error(void) { return error_text; }

const char* pyvit_accel_device_error(void) {
  int driver = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error != cudaSuccess ? cudaGetErrorString(error) : devices == 0 ? "there is no CUDA device" : nullptr;
}

int pyvit_accel_launch(const Launch* launch, void* stream) {
  alignas(64) uint8_t params[sizeof(launch->params)];
  memcpy(params, launch->params, launch->param_bytes);
  for (uint32_t i = 0; i < launch->num_maps; ++i)
    if (const int error = encode(launch->maps[i], params + launch->maps[i].offset)) return error;
  if (const int error = make_room(*launch)) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch->grid);
  config.blockDim = dim3(launch->block);
  config.dynamicSmemBytes = launch->shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (launch->cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = launch->cluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  }
  if (launch->dependent) {
    cudaLaunchAttribute& dependent = attributes[config.numAttrs++];
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {params};
  return refused(launch->kernel, cudaLaunchKernelExC(&config, launch->function, arguments));
}
