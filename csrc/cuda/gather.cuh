// Copies of the chosen tokens, of all tensors in one launch. Pointers and strides are kernel arguments, so nothing goes
// to the device but the launch.
#pragma once

#include <cstdint>

#include "cta.cuh"
#include "sdtp/cuda.h"
#include "sdtp/gather.h"

namespace sdtp::cuda {

inline constexpr int kGatherTokens = 16;   // of one CTA
inline constexpr int kCopiesInFlight = 4;  // of a thread: enough bytes under way to keep HBM busy

template <int kRoom>
struct TensorTable {
    int count;
    TokenRows tensors[kRoom];
};

// Copies slots `slots` of one tensor with accesses of sizeof(Vector) bytes, which all its rows must be aligned to.
// A row is the work of `lanes` neighbouring threads, as many as it has vectors, up to a warp.
template <typename Vector>
__device__ void copy_rows(const TokenRows& tensor, int batch, const int64_t* columns, int num_keep, const Run& slots) {
    const auto num_vectors = static_cast<int>(tensor.row_bytes / sizeof(Vector));
    int lanes = 1;
    while (lanes < kWarpSize && lanes < num_vectors) lanes *= 2;
    const int first_vector = thread() % lanes;
    for (int head = 0; head < tensor.num_heads; ++head) {
        const char* source = tensor.source + batch * tensor.batch_stride + head * tensor.head_stride;
        char* destination =
            tensor.destination + (int64_t{batch} * tensor.num_heads + head) * num_keep * tensor.row_bytes;
        for (int slot = slots.first + thread() / lanes; slot < slots.last; slot += kThreads / lanes) {
            const int64_t column = columns[slot];
            const auto* from = reinterpret_cast<const Vector*>(source + column * tensor.token_stride);
            auto* to = reinterpret_cast<Vector*>(destination + slot * tensor.row_bytes);
            for (int first = first_vector; first < num_vectors; first += lanes * kCopiesInFlight) {
                Vector values[kCopiesInFlight] = {};  // zeros where the slot is padding
#pragma unroll
                for (int i = 0; i < kCopiesInFlight; ++i) {
                    if (column >= 0 && first + i * lanes < num_vectors) values[i] = from[first + i * lanes];
                }
#pragma unroll
                for (int i = 0; i < kCopiesInFlight; ++i) {
                    if (first + i * lanes < num_vectors) to[first + i * lanes] = values[i];
                }
            }
        }
    }
}

// Fills slots `slots` of every output of row `batch`. The token of slot i stands in column columns[i]; -1 gives zeros.
template <int kRoom>
__device__ void copy_tokens(const TensorTable<kRoom>& table, int batch, const int64_t* columns, int num_keep,
                            const Run& slots) {
    for (int t = 0; t < table.count; ++t) {
        const TokenRows& tensor = table.tensors[t];
        // The widest access that divides all that an address is made of.
        const auto bits = reinterpret_cast<uint64_t>(tensor.source) | reinterpret_cast<uint64_t>(tensor.destination) |
                          static_cast<uint64_t>(tensor.batch_stride | tensor.head_stride | tensor.token_stride) |
                          static_cast<uint64_t>(tensor.row_bytes);
        if (bits % 16 == 0) {
            copy_rows<uint4>(tensor, batch, columns, num_keep, slots);
        } else if (bits % 8 == 0) {
            copy_rows<uint2>(tensor, batch, columns, num_keep, slots);
        } else if (bits % 4 == 0) {
            copy_rows<uint32_t>(tensor, batch, columns, num_keep, slots);
        } else if (bits % 2 == 0) {
            copy_rows<uint16_t>(tensor, batch, columns, num_keep, slots);
        } else {
            copy_rows<uint8_t>(tensor, batch, columns, num_keep, slots);
        }
    }
}

template <int kRoom>
struct GatherArguments {
    const int64_t* indices;  // [B, num_keep]
    int num_keep;
    TensorTable<kRoom> table;
};

// CTA (run of slots, row).
template <int kRoom>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherArguments<kRoom> arguments) {
    const auto batch = static_cast<int>(blockIdx.y);
    const int first = static_cast<int>(blockIdx.x) * kGatherTokens;
    copy_tokens(arguments.table, batch, arguments.indices + int64_t{batch} * arguments.num_keep, arguments.num_keep,
                {first, min(first + kGatherTokens, arguments.num_keep)});
}

}  // namespace sdtp::cuda
