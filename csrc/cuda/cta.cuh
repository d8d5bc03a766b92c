// What all kernels share: the shape of a CTA, sums over it, and the way work is divided.
#pragma once

#include <cstdint>

#include "platform.cuh"

namespace sdtp::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane() { return thread() % kWarpSize; }
__device__ __forceinline__ int warp() { return thread() / kWarpSize; }

__host__ __device__ constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Consecutive places: tokens, or slots of the output.
struct Run {
    int first;
    int last;  // after the run

    __device__ int size() const { return last - first; }

    // The `index`-th of `count` parts; the last ones may be shorter, or empty.
    __device__ Run part(int index, int count) const {
        const int each = (size() + count - 1) / count;
        const int begin = first + min(index * each, size());
        return {begin, min(begin + each, last)};
    }
};

struct Sum {
    uint32_t before;  // over the threads below
    uint32_t total;
};

// `warp_sums` holds kWarps words of shared memory.
__device__ inline Sum sum_over_threads(uint32_t value, uint32_t* warp_sums) {
    uint32_t inclusive = value;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const uint32_t below = __shfl_up_sync(kAllLanes, inclusive, distance);
        if (lane() >= distance) inclusive += below;
    }
    if (lane() == kWarpSize - 1) warp_sums[warp()] = inclusive;
    __syncthreads();
    Sum sum{inclusive - value, 0};
    for (int i = 0; i < kWarps; ++i) {
        if (i < warp()) sum.before += warp_sums[i];
        sum.total += warp_sums[i];
    }
    __syncthreads();  // the next call writes them again
    return sum;
}

}  // namespace sdtp::cuda
