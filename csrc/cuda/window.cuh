// The attention that a window of queries pays each key, in two launches: the softmax's statistics of each query over
// tiles of keys, then each key's sum over the window. The logits are computed in both: kept, they would be the largest
// array of a prefill, heads x window x keys of float32. What pools the sums and takes their mean over the heads stands
// in prompt_bias.cuh.
//
// Keys are counted from the row's end, so that a left-padded row has the tiles, and the bits, that it has alone.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cta.cuh"
#include "sdtp/cuda.h"
#include "sdtp/floats.h"

namespace sdtp::cuda {

// Two keys a thread: each query that is read from shared memory serves both.
inline constexpr int kThreadKeys = 2;
inline constexpr int kTileKeys = kThreadKeys * kThreads;
// Queries that one pass over the keys serves, as many as the registers hold sums for.
inline constexpr int kPassQueries = 16;
// Of one access.
template <typename T>
inline constexpr int kKeyElements = 16 / sizeof(T);

// Keeps `value` where `other` is NaN.
__device__ __forceinline__ float larger(float other, float value) { return other > value ? other : value; }

// Of a query's softmax over some keys; as it stands, over none. NaN is in the sum alone.
struct Softmax {
    float most = -FLT_MAX;  // logit; not -inf, which would make NaN where there is no key
    float sum = 0.0f;       // of 2^(logit - most)
};

__device__ __forceinline__ Softmax combine(const Softmax& a, const Softmax& b) {
    const float most = larger(a.most, b.most);
    return {most, a.sum * exp2f(a.most - most) + b.sum * exp2f(b.most - most)};
}

// All lanes' together, in every lane.
__device__ inline Softmax combine_lanes(const Softmax& own) {
    float most = own.most;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        most = larger(__shfl_xor_sync(kAllLanes, most, distance), most);
    }
    float sum = own.sum * exp2f(own.most - most);
    for (int distance = 1; distance < kWarpSize; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    return {most, sum};
}

struct WindowArguments {
    Window window;
    bool is_aligned;      // every kKeyElements of a key are one access
    int num_tiles;        // of keys
    Softmax* statistics;  // [B, H, w, num_tiles]
    float* sums;          // [B, H, n]

    __device__ Softmax* of_query(int batch, int head, int query) const {
        return statistics + ((int64_t{batch} * window.num_heads + head) * window.num_queries + query) * num_tiles;
    }
};

// A pass's queries, and what is known of their softmax.
struct WindowShared {
    alignas(16) float queries[kPassQueries][kMaxHeadDim];
    int64_t index[kPassQueries];
    Softmax warps[kWarps][kPassQueries];
    float most[kPassQueries];
    float share[kPassQueries];  // 1 / sum; 0 of a query that has no say
};

// One thread's keys, and the work of its CTA. Heads vary fastest: CTAs that share keys run side by side, so these come
// from HBM once and from L2 after that.
template <typename T>
struct WindowTile {
    const Window& window;
    bool is_aligned;
    int batch;
    int head;
    int tile;
    const T* keys[kThreadKeys];
    int columns[kThreadKeys];    // negative where there is no key
    int64_t index[kThreadKeys];  // negative where nobody sees it

    __device__ explicit WindowTile(const WindowArguments& arguments)
        : window(arguments.window),
          is_aligned(arguments.is_aligned),
          batch(static_cast<int>(blockIdx.y)),
          head(static_cast<int>(blockIdx.x) % window.num_heads),
          tile(static_cast<int>(blockIdx.x) / window.num_heads) {
        const int key_head = head / (window.num_heads / window.num_key_heads);
        const T* first =
            static_cast<const T*>(window.key) + batch * window.key_strides[0] + key_head * window.key_strides[1];
#pragma unroll
        for (int k = 0; k < kThreadKeys; ++k) {
            columns[k] = window.num_keys - 1 - (tile * kTileKeys + k * kThreads + thread());
            keys[k] = first + max(columns[k], 0) * window.key_strides[2];
            index[k] = columns[k] < 0 ? -1 : window.key_index[int64_t{batch} * window.num_keys + columns[k]];
        }
    }

    // Queries [first, first + kPassQueries), rotated and scaled; zeros that see nothing where there are no more.
    __device__ void load_queries(int first, WindowShared& shared) const {
        const int size = window.head_dim, half = size / 2;
        const int width = static_cast<int>(ceil_divide(size, kKeyElements<T>)) * kKeyElements<T>;
        const T* head_queries =
            static_cast<const T*>(window.query) + batch * window.query_strides[0] + head * window.query_strides[1];
        for (int i = thread(); i < kPassQueries * width; i += kThreads) {
            const int query = i / width, d = i % width;
            float value = 0.0f;
            if (first + query < window.num_queries && d < size) {
                const T* from = head_queries + (first + query) * window.query_strides[2];
                value = to_float(from[d]);
                if (window.cos != nullptr) {
                    const int64_t rotary =
                        batch * window.rotary_strides[0] + (first + query) * window.rotary_strides[1] + d;
                    const float other = d < half ? -to_float(from[d + half]) : to_float(from[d - half]);
                    value = value * to_float(static_cast<const T*>(window.cos)[rotary]) +
                            other * to_float(static_cast<const T*>(window.sin)[rotary]);
                }
            }
            shared.queries[query][d] = value * window.scale;
        }
        if (thread() < kPassQueries) {
            const int query = first + thread();
            shared.index[thread()] =
                query < window.num_queries ? window.query_index[batch * window.query_index_stride + query] : -1;
        }
    }

    __device__ bool sees(int64_t query_index, int k) const { return 0 <= index[k] && index[k] <= query_index; }

    // kKeyElements of a key from element `first` on, zeros after its end.
    __device__ void load_elements(int k, int first, float (&to)[kKeyElements<T>]) const {
        T elements[kKeyElements<T>] = {};
        if (is_aligned) {
            const uint4 words = *reinterpret_cast<const uint4*>(keys[k] + first);
            std::memcpy(elements, &words, sizeof(words));
        } else {
#pragma unroll
            for (int i = 0; i < kKeyElements<T>; ++i) {
                if (first + i < window.head_dim) elements[i] = keys[k][first + i];
            }
        }
#pragma unroll
        for (int i = 0; i < kKeyElements<T>; ++i) to[i] = to_float(elements[i]);
    }

    // Of the pass's queries and the thread's keys. Both launches have the same bits from here.
    __device__ void multiply(const WindowShared& shared, float (&logits)[kPassQueries][kThreadKeys]) const {
#pragma unroll
        for (int query = 0; query < kPassQueries; ++query) {
#pragma unroll
            for (int k = 0; k < kThreadKeys; ++k) logits[query][k] = 0.0f;
        }
#pragma unroll 1  // the registers hold one step
        for (int first = 0; first < window.head_dim; first += kKeyElements<T>) {
            float elements[kThreadKeys][kKeyElements<T>];
#pragma unroll
            for (int k = 0; k < kThreadKeys; ++k) load_elements(k, first, elements[k]);
#pragma unroll
            for (int query = 0; query < kPassQueries; ++query) {
#pragma unroll
                for (int i = 0; i < kKeyElements<T>; ++i) {
                    const float factor = shared.queries[query][first + i];
#pragma unroll
                    for (int k = 0; k < kThreadKeys; ++k) {
                        logits[query][k] = fmaf(factor, elements[k][i], logits[query][k]);
                    }
                }
            }
        }
    }
};

// CTA (query head and tile of keys, row).
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    window_statistics_kernel(const __grid_constant__ WindowArguments arguments) {
    auto& shared = *reinterpret_cast<WindowShared*>(shared_memory());
    const WindowTile<T> tile(arguments);
    const int num_queries = arguments.window.num_queries;
    for (int first = 0; first < num_queries; first += kPassQueries) {
        tile.load_queries(first, shared);
        __syncthreads();
        float logits[kPassQueries][kThreadKeys];
        tile.multiply(shared, logits);
#pragma unroll
        for (int query = 0; query < kPassQueries; ++query) {
            const int64_t index = shared.index[query];
            Softmax own;
#pragma unroll
            for (int k = 0; k < kThreadKeys; ++k) {
                if (tile.sees(index, k)) own.most = larger(logits[query][k], own.most);
            }
#pragma unroll
            for (int k = 0; k < kThreadKeys; ++k) {
                if (tile.sees(index, k)) own.sum += exp2f(logits[query][k] - own.most);
            }
            const Softmax together = combine_lanes(own);
            if (lane() == 0) shared.warps[warp()][query] = together;
        }
        __syncthreads();  // the warps' statistics are there, and the queries' place is free
        for (int query = warp(); query < min(kPassQueries, num_queries - first); query += kWarps) {
            const Softmax together = combine_lanes(lane() < kWarps ? shared.warps[lane()][query] : Softmax{});
            if (lane() == 0) arguments.of_query(tile.batch, tile.head, first + query)[tile.tile] = together;
        }
    }
}

// CTA (query head and tile of keys, row), after the statistics.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) window_sum_kernel(const __grid_constant__ WindowArguments arguments) {
    auto& shared = *reinterpret_cast<WindowShared*>(shared_memory());
    const WindowTile<T> tile(arguments);
    const Window& window = arguments.window;
    float sums[kThreadKeys] = {};
    for (int first = 0; first < window.num_queries; first += kPassQueries) {
        tile.load_queries(first, shared);
        for (int query = warp(); query < kPassQueries; query += kWarps) {
            Softmax own;
            if (first + query < window.num_queries) {
                const Softmax* tiles = arguments.of_query(tile.batch, tile.head, first + query);
                for (int i = lane(); i < arguments.num_tiles; i += kWarpSize) own = combine(own, tiles[i]);
            }
            const Softmax all = combine_lanes(own);
            if (lane() == 0) {
                shared.most[query] = all.most;
                shared.share[query] = all.sum == 0.0f ? 0.0f : 1.0f / all.sum;
            }
        }
        __syncthreads();
        float logits[kPassQueries][kThreadKeys];
        tile.multiply(shared, logits);
#pragma unroll
        for (int query = 0; query < kPassQueries; ++query) {
            const int64_t index = shared.index[query];
#pragma unroll
            for (int k = 0; k < kThreadKeys; ++k) {
                const float power = tile.sees(index, k) ? exp2f(logits[query][k] - shared.most[query]) : 0.0f;
                sums[k] += power * shared.share[query];  // also where the power is 0: NaN is the whole row's
            }
        }
        __syncthreads();  // the next pass overwrites the queries
    }
    float* row = arguments.sums + (int64_t{tile.batch} * window.num_heads + tile.head) * window.num_keys;
#pragma unroll
    for (int k = 0; k < kThreadKeys; ++k) {
        if (tile.columns[k] >= 0) row[tile.columns[k]] = sums[k];
    }
}

}  // namespace sdtp::cuda
