// What lets a header serve the host's compiler and nvcc alike.
#pragma once

#ifdef __CUDACC__
#define SDTP_HOST_DEVICE __host__ __device__
#else
#define SDTP_HOST_DEVICE
#endif

// A portable build runs everywhere and still uses wide vectors where they are: the loader picks the clone.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define SDTP_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SDTP_VECTOR_CLONES
#endif

// A helper must be inlined to be compiled for its caller's target.
#define SDTP_INLINE inline __attribute__((always_inline))
