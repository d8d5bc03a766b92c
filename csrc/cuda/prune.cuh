// The fused launches of the block budget. A block's place in the output is known from its number, so its CTA needs
// nothing of any other one.
#pragma once

#include <cstdint>

#include "gather.cuh"
#include "score.cuh"
#include "select.cuh"

namespace sdtp::cuda {

// A CTA scores its own block up to this size. Larger blocks are too few to keep a GPU busy with one CTA each.
inline constexpr int kOneLaunchBlock = 256;

// Copies the slots of a block that this CTA chose, and its part of those outside all blocks. The columns travel from
// the selection to the copy through `indices`, which is an output anyway.
__device__ inline void copy_chosen(const SelectArguments& arguments, const RowPlan& row, const Run& slots,
                                   const TensorTable<kFewTensors>& table) {
    const Rest rest(arguments.selection, row);
    const int64_t* columns = Output(arguments.selection, false).indices;
    rest.write(arguments.selection, arguments.scores.mean_score);
    __syncthreads();  // the threads that read a column are not those that wrote it
#pragma unroll 1      // one body: three would take registers that the copies need
    for (int i = 0; i < 3; ++i) {
        const Run run = i == 0 ? slots : i == 1 ? rest.padding : rest.tail;
        copy_tokens(table, static_cast<int>(blockIdx.y), columns, arguments.selection.num_keep, run);
    }
}

struct SelectAndGatherArguments {
    SelectArguments select;
    TensorTable<kFewTensors> table;
};

// The second of two launches: CTA (share of a block's copies, row). Each ranks all of the block.
__global__ void __launch_bounds__(kThreads, kSelectCtas)
    select_and_gather_kernel(const __grid_constant__ SelectAndGatherArguments arguments) {
    const SelectArguments& select = arguments.select;
    auto& shared = *reinterpret_cast<SelectShared*>(shared_memory());
    const RowPlan row(select.selection, blockIdx.y);
    const Block block(select.selection, row, select.block_index());
    const Run all{block.first_slot, block.first_slot + block.num_keep};
    const Run slots = all.part(select.index_in_block(), select.ctas_per_block);
    const int64_t offset = select.offset(block);
    select_block([&](int i) { return select.scores.load(offset + i); },
                 [&](int i) { return select.scores.load_mean(offset + i); }, block, Run{0, block.size}, slots,
                 select.selection.pooling / 2, Group{0, 1, nullptr, nullptr}, select.cta_keys(), shared,
                 Output(select.selection, select.index_in_block() == 0));
    copy_chosen(select, row, slots, arguments.table);
}

struct PruneArguments {
    Scoring scoring;
    bool is_aligned;
    SelectArguments select;
    TensorTable<kFewTensors> table;
};

struct RankingShared {
    SelectShared select;
    uint32_t keys[kOneLaunchBlock];
};

struct PruneShared {
    float means[kOneLaunchBlock];
    union {  // one after the other
        unsigned char stages[kScoreSharedBytes];
        RankingShared ranking;
    };
};

// The running means of a CTA's block go to shared memory; scores never leave the multiprocessor.
template <typename T>
__device__ void score_own_block(const PruneArguments& arguments, PruneShared& shared) {
    const Scoring& scoring = arguments.scoring;
    const SelectArguments& select = arguments.select;
    const auto batch = static_cast<int>(blockIdx.y);
    const Block block(select.selection, RowPlan(select.selection, batch), select.block_index());
    for (int first = 0; first < block.size; first += kTileTokens) {
        const Matrix<T> tokens =
            token_matrix<T>(scoring, batch, block.first_column + first, block.first_column + block.size);
        float sum = 0.0f;
        for (int unit = 0; unit < scoring.pruner_size; unit += kTileUnits<T>) {
            sum += score_tile<T>(scoring, tokens, unit, arguments.is_aligned, shared.stages);
            __syncthreads();  // the next tile, or the keys, overwrite what this one has summed
        }
        const int token = first + thread();
        if (thread() < kTileTokens && token < block.size) {
            shared.means[token] = select.scores.mean(sum, select.offset(block) + token);
        }
    }
    __syncthreads();
}

// The only launch: CTA (block, row) scores, selects and copies.
template <typename T>
__global__ void __launch_bounds__(kThreads, kScoreCtas<T>)
    prune_kernel(const __grid_constant__ PruneArguments arguments) {
    const SelectArguments& select = arguments.select;
    auto& shared = *reinterpret_cast<PruneShared*>(shared_memory());
    score_own_block<T>(arguments, shared);
    const RowPlan row(select.selection, blockIdx.y);  // again: kept, it would take registers from the scoring
    const Block block(select.selection, row, select.block_index());
    const Run slots{block.first_slot, block.first_slot + block.num_keep};
    const int64_t offset = select.offset(block);
    select_block([&](int i) { return select.scores.with_bias(shared.means[i], offset + i); },
                 [&](int i) { return shared.means[i]; }, block, Run{0, block.size}, slots, select.selection.pooling / 2,
                 Group{0, 1, nullptr, nullptr}, shared.ranking.keys, shared.ranking.select,
                 Output(select.selection, true));
    copy_chosen(select, row, slots, arguments.table);
}

}  // namespace sdtp::cuda
