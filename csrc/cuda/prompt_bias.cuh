// From the heads' sums over the window to the attention, or on to the bias that a score gets from it.
//
// Tokens are counted from the row's end, as in window.cuh.
#pragma once

#include <cmath>
#include <cstdint>

#include "cta.cuh"
#include "sdtp/cuda.h"

namespace sdtp::cuda {

// As in reference.py.
inline constexpr float kAttentionFloor = 1e-9f;
inline constexpr float kLeastSpread = 1e-6f;

// Of some values; as it stands, of none.
struct Moments {
    float count = 0.0f;
    float mean = 0.0f;
    float squares = 0.0f;  // of the distances from the mean
};

// Chan, Golub and LeVeque. The same bits in either order, and those of `a` where `b` is of nothing.
__device__ inline Moments combine(const Moments& a, const Moments& b) {
    if (b.count == 0.0f) return a;
    if (a.count == 0.0f) return b;
    const float count = a.count + b.count;
    const float distance = a.mean - b.mean;
    return {count, (a.count * a.mean + b.count * b.mean) / count,
            a.squares + b.squares + distance * distance * (a.count * b.count / count)};
}

// All lanes' together, in every lane.
__device__ inline Moments combine_lanes(Moments own) {
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const Moments other{__shfl_xor_sync(kAllLanes, own.count, distance),
                            __shfl_xor_sync(kAllLanes, own.mean, distance),
                            __shfl_xor_sync(kAllLanes, own.squares, distance)};
        own = combine(own, other);
    }
    return own;
}

// All threads' together, in every thread. `warps` holds kWarps of them in shared memory.
__device__ inline Moments combine_threads(const Moments& own, Moments* warps) {
    const Moments together = combine_lanes(own);
    if (lane() == 0) warps[warp()] = together;
    __syncthreads();
    return combine_lanes(lane() < kWarps ? warps[lane()] : Moments{});
}

// A token is valid that is neither padding nor after the prompt: its distance to the prompt's last one is not negative.
struct Distance {
    int64_t index;
    int64_t distance;

    __device__ Distance(const PromptBias& bias, int batch, int column) {
        const int64_t* row = bias.token_index + int64_t{batch} * bias.num_tokens;
        const int end = bias.num_tokens - bias.keep_last;
        index = row[column];
        distance = end > 0 ? row[end - 1] - index : -1;
    }
    __device__ bool is_valid() const { return index >= 0 && distance >= 0; }
};

// Sums over the window, of which the attention is made.
struct HeadSums {
    const float* sums;  // [B, H, n]
    int num_heads;
    int num_keys;
    int reach;  // of the pooling, to either side

    __device__ float attention(int batch, int column) const {
        const int begin = max(column - reach, 0), end = min(column + reach, num_keys - 1);
        float total = 0.0f;
        for (int head = 0; head < num_heads; ++head) {
            const float* row = sums + (int64_t{batch} * num_heads + head) * num_keys;
            float best = row[column];
            for (int i = begin; i <= end; ++i) best = row[i] > best ? row[i] : best;
            total += best;
        }
        return total / static_cast<float>(num_heads);
    }
};

struct PoolArguments {
    HeadSums heads;
    float* output;  // [B, n]
    Moments*
        moments;      // [B, CTAs of a row] of the logarithms of valid tokens; null where the attention is wanted itself
    PromptBias bias;  // with moments
};

// CTA (run of keys, row). Writes the attention, or the logarithms of valid tokens.
__global__ void __launch_bounds__(kThreads) pool_kernel(const __grid_constant__ PoolArguments arguments) {
    const auto batch = static_cast<int>(blockIdx.y);
    const int column = arguments.heads.num_keys - 1 - static_cast<int>(blockIdx.x) * kThreads - thread();
    float* output = arguments.output + int64_t{batch} * arguments.heads.num_keys + column;
    if (arguments.moments == nullptr) {
        if (column >= 0) *output = arguments.heads.attention(batch, column);
        return;
    }
    Moments own;
    if (column >= 0 && Distance(arguments.bias, batch, column).is_valid()) {
        *output = logf(arguments.heads.attention(batch, column) + kAttentionFloor);
        own = {1.0f, *output, 0.0f};
    }
    const Moments together = combine_threads(own, reinterpret_cast<Moments*>(shared_memory()));
    if (thread() == 0) arguments.moments[int64_t{batch} * gridDim.x + blockIdx.x] = together;
}

struct BiasArguments {
    PromptBias bias;
    const Moments* moments;  // [B, CTAs of a row], with logarithms in `output`; null where there is no attention
    float* output;           // [B, N]
};

// CTA (run of tokens, row).
__global__ void __launch_bounds__(kThreads) bias_kernel(const __grid_constant__ BiasArguments arguments) {
    const PromptBias& bias = arguments.bias;
    const auto batch = static_cast<int>(blockIdx.y);
    const int column = bias.num_tokens - 1 - static_cast<int>(blockIdx.x) * kThreads - thread();
    Moments row;
    if (arguments.moments != nullptr) {
        const auto num_ctas = static_cast<int>(gridDim.x);
        for (int i = thread(); i < num_ctas; i += kThreads) {
            row = combine(row, arguments.moments[int64_t{batch} * num_ctas + i]);
        }
        row = combine_threads(row, reinterpret_cast<Moments*>(shared_memory()));
    }
    if (column < 0) return;
    float* output = arguments.output + int64_t{batch} * bias.num_tokens + column;
    const Distance token(bias, batch, column);
    float value = 0.0f;
    if (token.is_valid()) {
        const int64_t first = bias.is_by_row ? batch * bias.num_distances : 0;
        value = bias.distance_table[first + min(token.distance, bias.num_distances - 1)];
        if (arguments.moments != nullptr) {
            const float spread = sqrtf(row.squares / row.count);
            value += bias.attention_weight * (*output - row.mean) / (spread + kLeastSpread);
        }
    }
    *output = value;
}

}  // namespace sdtp::cuda
