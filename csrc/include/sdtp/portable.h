// What lets a header serve the host's compiler and nvcc alike.
#pragma once

#ifdef __CUDACC__
#define SDTP_HOST_DEVICE __host__ __device__
#else
#define SDTP_HOST_DEVICE
#endif

// A helper must be inlined to be compiled for its caller's target (score_tile.cpp clones functions for several).
#define SDTP_INLINE inline __attribute__((always_inline))
