// Bytes of shared memory that the launches ask for at most, as JSON.
#include <cstdio>

#include "cuda/prune.cuh"

int main() {
    using namespace sdtp::cuda;
    const size_t select = sizeof(SelectShared) + kSharedKeys * sizeof(uint32_t);
    std::printf(
        "{\"score_kernel\": %d, \"prune_kernel\": %zu, \"select_kernel\": %zu, \"select_and_gather_kernel\": %zu}",
        kScoreSharedBytes, sizeof(PruneShared), select, select);
    return 0;
}
