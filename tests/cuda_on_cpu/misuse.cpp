// Kernels that break a rule of CUDA, one for each rule that the runtime watches:
//
//     misuse NAME    ends with what was broken, and where; status 70
#include <cstdio>
#include <map>
#include <string>

#include "cuda/platform.cuh"

namespace sdtp::cuda {
namespace {

struct Nothing {};
uint32_t counter;
alignas(16) unsigned char global_memory[32];

void linger() {
    for (int i = 0; i < 100; ++i) load_acquire(&counter);
}

const std::map<std::string, void (*)(Nothing)> kKernels{
    {"right", [](Nothing) { __syncthreads(); }},
    {"divergent barrier",
     [](Nothing) {
         if (threadIdx.x < 16) {
             __syncthreads();
         } else {
             __syncthreads();
         }
     }},
    {"a thread ended, others wait at the barrier",
     [](Nothing) {
         if (threadIdx.x == 5) {
             linger();
         } else {
             __syncthreads();
         }
     }},
    {"mask mismatch", [](Nothing) { __shfl_xor_sync(threadIdx.x % 2 == 0 ? 0xffffffffu : 0xfffffffeu, 1.0f, 2); }},
    {"a lane that is not in its mask", [](Nothing) { __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }},
    {"lanes in different warp operations",
     [](Nothing) {
         if (threadIdx.x % 2 == 0) {
             __match_any_sync(0xffffffffu, 1);
         } else {
             __shfl_xor_sync(0xffffffffu, 1.0f, 1);
         }
     }},
    {"a thread ended, its warp waits",
     [](Nothing) {
         if (threadIdx.x == 5) {
             linger();
         } else {
             __shfl_up_sync(0xffffffffu, 1.0f, 1);
         }
     }},
    {"deadlock",
     [](Nothing) {
         if (threadIdx.x == 5) return;
         linger();
         __shfl_up_sync(0xffffffffu, 1.0f, 1);
     }},
    {"a warp operation while a lane waits at a barrier",
     [](Nothing) {
         if (threadIdx.x == 5) {
             __syncthreads();
         } else {
             linger();
         }
         __shfl_up_sync(0xffffffffu, 1.0f, 1);
     }},
    {"livelock",
     [](Nothing) {
         while (load_acquire(&counter) == 0) {
         }
     }},
    {"cp.async of 16 bytes is not aligned",
     [](Nothing) {
         if (threadIdx.x == 5) copy_async(shared_memory() + 8, global_memory, 16);
     }},
    {"ldmatrix of a row that is not aligned",
     [](Nothing) {
         uint32_t words[4];
         load_matrices(words, shared_memory() + 4);
     }},
    {"a thread ended before its asynchronous copies",
     [](Nothing) { copy_async(shared_memory() + 16 * threadIdx.x, global_memory, 16); }},
};

}  // namespace
}  // namespace sdtp::cuda

int main(int, char** argv) {
    const sdtp::cuda::Grid grid{1, 1, 32, 1024, false};
    const char* error = sdtp::cuda::launch(sdtp::cuda::kKernels.at(argv[1]), grid, {}, sdtp::cuda::Nothing{});
    const sdtp::cuda::Grid large{3, 1, 32, 0, true};
    const char* too_large = sdtp::cuda::launch(sdtp::cuda::kKernels.at("right"), large, {}, sdtp::cuda::Nothing{});
    std::printf("%s; %s\n", error == nullptr ? "ran" : error, too_large == nullptr ? "ran" : too_large);
    return 0;
}
