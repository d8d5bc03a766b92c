// The only file that knows what runs the kernels: PTX behind names, and the launch. Tests put a CPU in its place.
//
// The others use CUDA's own names, but never <<<>>>, static shared memory or inline PTX.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdtp::cuda {

struct Grid {
    int64_t x;
    int64_t y;
    int threads;
    size_t shared_bytes;
    bool cooperative;  // all CTAs run at once, so that they may wait for one another
};

}  // namespace sdtp::cuda

#ifdef SDTP_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else

#include <cuda_runtime.h>

#include "sdtp/cuda.h"
#include "sdtp/floats.h"

namespace sdtp::cuda {

// The dynamic shared memory of the CTA; there is no other.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes to shared memory; of the source only `num_bytes` (0 or 16) are read, the rest are zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, int num_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(num_bytes)
                 : "memory");
}

// Copies started since the last call form a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the last `kPending`.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 16-byte matrices; lane i names row i % 8 of matrix i / 8 and gets bytes 4 (i % 4) of row i / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sums [16 x 8] += a [16 x 32 bytes] b [32 bytes x 8], in the fragments of mma.sync; float32 operands count as tf32.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define SDTP_MULTIPLY_ADD(type, instruction)                                                                   \
    template <>                                                                                                \
    __device__ __forceinline__ void multiply_add<type>(float (&sums)[4], const uint32_t (&a)[4],               \
                                                       const uint32_t (&b)[2]) {                               \
        asm("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
    }
SDTP_MULTIPLY_ADD(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SDTP_MULTIPLY_ADD(Half, "m16n8k16.row.col.f32.f16.f16.f32")
SDTP_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef SDTP_MULTIPLY_ADD

// Nearest float with the 10 bits of mantissa that tf32 has, ties away from zero.
__device__ __forceinline__ float round_to_tf32(float value) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return from_bits(bits);
}

// Adds to a counter of all CTAs; what this thread knew to be written is written for whoever sees the sum.
__device__ __forceinline__ void add_release(uint32_t* counter, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

template <typename Arguments>
const char* launch(void (*kernel)(Arguments), const Grid& grid, Stream stream, Arguments arguments) {
    constexpr size_t kSharedWithoutAsking = 48 * 1024;
    const auto* function = reinterpret_cast<const void*>(kernel);
    const cudaError_t unknown_device = cudaSetDevice(stream.device);
    if (unknown_device != cudaSuccess) return cudaGetErrorString(unknown_device);
    if (grid.shared_bytes > kSharedWithoutAsking) {
        const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(grid.shared_bytes));
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream.handle);
    config.attrs = &cooperative;
    config.numAttrs = grid.cooperative ? 1 : 0;
    void* pointers[] = {&arguments};
    const cudaError_t error = cudaLaunchKernelExC(&config, function, pointers);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* clear(void* memory, size_t bytes, Stream stream) {
    cudaError_t error = cudaSetDevice(stream.device);
    if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream.handle));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int num_multiprocessors(Stream stream) {
    int count = 1;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stream.device);
    return count;
}

}  // namespace sdtp::cuda

#endif
