// CUDA for one translation unit on a CPU, for tests: what csrc/cuda/platform.cuh includes instead of CUDA.
//
// Every CUDA thread is a fiber of runtime.cpp, which switches between them wherever they meet: at barriers, warp
// operations and spins. Memory is touched here, in code that the sanitizers instrument; the runtime only decides who
// goes on. Fragments of ldmatrix and mma follow the tables of the PTX ISA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "runtime.h"
#include "sdtp/cuda.h"
#include "sdtp/floats.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};

#define threadIdx (::cuda_on_cpu::index().thread)
#define blockIdx (::cuda_on_cpu::index().block)
#define gridDim (::cuda_on_cpu::index().grid)

// Where a call stands: default arguments are evaluated at the caller.
#define SDTP_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace sdtp::cuda {

using std::max;
using std::min;

inline void __syncthreads(SDTP_HERE) { cuda_on_cpu::barrier(file, line); }

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, SDTP_HERE) {
    T all[32];
    cuda_on_cpu::exchange("shfl", mask, &value, all, sizeof(T), file, line);
    return all[(threadIdx.x % 32) ^ lane_mask];
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int distance, SDTP_HERE) {
    T all[32];
    cuda_on_cpu::exchange("shfl", mask, &value, all, sizeof(T), file, line);
    const int lane = threadIdx.x % 32;
    return all[lane >= distance ? lane - distance : lane];
}

inline uint32_t __match_any_sync(uint32_t mask, uint32_t value, SDTP_HERE) {
    uint32_t all[32];
    cuda_on_cpu::exchange("match", mask, &value, all, sizeof(value), file, line);
    uint32_t peers = 0;
    for (int lane = 0; lane < 32; ++lane) peers |= uint32_t{all[lane] == value} << lane & mask;
    return peers;
}

inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline void add_release(uint32_t* to, uint32_t value) { __atomic_fetch_add(to, value, __ATOMIC_RELEASE); }
inline uint32_t load_acquire(const uint32_t* from, SDTP_HERE) {
    cuda_on_cpu::yield(file, line);
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

inline unsigned char* shared_memory() { return cuda_on_cpu::shared_memory(); }

// The destination is spoiled at once, so that neither a read before the wait nor a place still in use goes unnoticed.
inline void copy_async(void* to, const void* from, int num_bytes, SDTP_HERE) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(num_bytes ? from : nullptr)) % 16 != 0) {
        cuda_on_cpu::fail("cp.async of 16 bytes is not aligned", file, line);
    }
    const auto* source = static_cast<const volatile unsigned char*>(from);
    for (int i = 0; i < num_bytes; ++i) (void)source[i];
    auto* words = static_cast<uint32_t*>(to);
    for (int i = 0; i < 4; ++i) words[i] = ~0u;
    cuda_on_cpu::push_copy({to, from, num_bytes}, file, line);
}

inline void commit_copies() { cuda_on_cpu::commit_copies(); }

template <int kPending>
void wait_for_copies() {
    cuda_on_cpu::Copy copy;
    while (cuda_on_cpu::pop_copy(kPending, copy)) {
        auto* to = static_cast<uint32_t*>(copy.to);
        const auto* from = static_cast<const uint32_t*>(copy.from);
        for (int i = 0; i < 4; ++i) to[i] = 4 * i < copy.num_bytes ? from[i] : 0;
    }
}

inline void load_matrices(uint32_t (&to)[4], const void* row, SDTP_HERE) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        cuda_on_cpu::fail("ldmatrix of a row that is not aligned", file, line);
    uint4 all[32];
    const uint4 own = *static_cast<const uint4*>(row);
    cuda_on_cpu::exchange("ldmatrix", ~0u, &own, all, sizeof(own), file, line);
    const int lane = threadIdx.x % 32;
    for (int matrix = 0; matrix < 4; ++matrix) {
        const uint4& words = all[matrix * 8 + lane / 4];
        const uint32_t choice[4] = {words.x, words.y, words.z, words.w};
        to[matrix] = choice[lane % 4];
    }
}

// The numbers in a word of operands.
template <typename T>
struct Operands {
    static constexpr int kCount = 4 / sizeof(T);
    static float value(uint32_t word, int i) {
        if constexpr (kCount == 1) {
            return from_bits(word & 0xffffe000u);  // the tensor core does not see the rest
        } else {
            return to_float(T{static_cast<uint16_t>(word >> 16 * i)});
        }
    }
};

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SDTP_HERE) {
    struct Fragment {
        uint32_t a[4], b[2];
    } own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, all[32];
    cuda_on_cpu::exchange("mma", ~0u, &own, all, sizeof(own), file, line);
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8;
        const int column = lane % 4 * 2 + i % 2;
        double sum = sums[i];
        for (int k = 0; k < 8; ++k) {  // words of 4 bytes along the product
            const uint32_t x = all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2];
            const uint32_t y = all[column * 4 + k % 4].b[k / 4];
            for (int j = 0; j < Operands<T>::kCount; ++j) {
                sum += double{Operands<T>::value(x, j)} * double{Operands<T>::value(y, j)};
            }
        }
        sums[i] = static_cast<float>(sum);
    }
}

inline float round_to_tf32(float value) {
    const uint32_t bits = to_bits(value);
    return (bits & 0x7f800000u) == 0x7f800000u ? value : from_bits((bits + 0x1000u) & 0xffffe000u);
}

template <typename Arguments>
const char* launch(void (*kernel)(Arguments), const Grid& grid, Stream, Arguments arguments) {
    struct Bound {
        void (*kernel)(Arguments);
        const Arguments& arguments;
    } bound{kernel, arguments};
    const auto body = [](const void* pointer) {
        const auto* bound = static_cast<const Bound*>(pointer);
        bound->kernel(bound->arguments);
    };
    return cuda_on_cpu::run(body, &bound, grid.x, grid.y, grid.threads, grid.shared_bytes, grid.cooperative);
}

inline const char* clear(void* memory, size_t bytes, Stream) {
    std::memset(memory, 0, bytes);
    return nullptr;
}

inline int num_multiprocessors(Stream) { return cuda_on_cpu::num_multiprocessors(); }

}  // namespace sdtp::cuda
