// Functions that the kernels run and that tests compile for the host.
#pragma once
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif
