// Functions of a device, and of both a device and its host.
#pragma once

#ifdef __CUDACC__
#define PYENGINE_DEVICE __device__ __forceinline__
#define PYENGINE_BOTH __host__ __device__ __forceinline__
#else
#define PYENGINE_DEVICE inline
#define PYENGINE_BOTH inline
#endif
