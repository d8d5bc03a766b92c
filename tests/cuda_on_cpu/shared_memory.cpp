// Bytes of shared memory that the launches ask for at most, as JSON.
#include <cstdio>

#include "cuda/prompt_bias.cuh"
#include "cuda/prune.cuh"
#include "cuda/window.cuh"

int main() {
    using namespace sdtp::cuda;
    const size_t select = sizeof(SelectShared) + kSharedKeys * sizeof(uint32_t);
    std::printf(
        "{\"score_kernel\": %d, \"prune_kernel\": %zu, \"select_kernel\": %zu, \"select_and_gather_kernel\": %zu, "
        "\"window_statistics_kernel\": %zu, \"window_sum_kernel\": %zu, \"pool_kernel\": %zu, \"bias_kernel\": %zu}",
        kScoreSharedBytes, sizeof(PruneShared), select, select, sizeof(WindowShared), sizeof(WindowShared),
        kWarps * sizeof(Moments), kWarps * sizeof(Moments));
    return 0;
}
