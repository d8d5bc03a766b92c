// Choice of the best tokens of a block: a threshold by four histograms, then one packed scan that gives every kept
// token its slot, above_before + min(equal_before, ties): ascending, ties to the lower index, the same bits on every
// run.
//
// A block is one CTA's work, its keys in shared memory. A long row under the global budget is the work of a group of
// CTAs, each with a part of the keys: they exchange one histogram a digit, and from the same histograms each knows how
// many kept tokens stand before its own.
#pragma once

#include <cstdint>

#include "cta.cuh"
#include "score.cuh"
#include "sdtp/cuda.h"
#include "sdtp/order.h"

namespace sdtp::cuda {

// Digits of 8 bits: a bin for each thread.
inline constexpr int kDigits = 4;
inline constexpr int kBins = kThreads;
// CTAs for whose registers a multiprocessor has room: four spill on some targets, and ptxas left to itself spills too.
inline constexpr int kSelectCtas = 3;
inline constexpr int kMaxReach = kMaxPooling / 2;

// Keys that a CTA holds in shared memory. More wait in device memory; a group's CTAs take no more than these where
// there are multiprocessors enough.
inline constexpr int kSharedKeys = 4096;

struct SelectShared {
    uint32_t histogram[kBins];
    uint32_t warp_sums[kWarps];
    uint32_t digit;
    int ties;
    uint32_t staged[kThreads + 2 * kMaxReach];
};

// CTAs that share the keys of a row. A lone one is a group of one and needs no memory.
struct Group {
    int index;
    int size;
    uint32_t* histograms;  // [kDigits, size, kBins] of the row
    uint32_t* arrivals;    // how many times a CTA came to a barrier; 0 when the launch begins

    // Waits until every CTA has come here for the `round`-th time, counted from 1.
    __device__ void wait(int round) const {
        __syncthreads();  // all threads of this CTA have written
        if (thread() == 0) {
            add_release(arrivals, 1);
            while (load_acquire(arrivals) < static_cast<uint32_t>(round * size)) {
            }
        }
        __syncthreads();  // none reads before the others have written
    }
};

// What a row asks for: its own counts where `rows` gives them. The host does not see those; clamped like this, wrong
// ones give a wrong selection, but no slot and no column outside the row.
struct RowPlan {
    int length;  // valid tokens, at the row's end
    int keep;
    int tail;  // trailing tokens that are always kept

    __device__ RowPlan(const Selection& selection, int batch)
        : length(selection.num_tokens), keep(selection.num_keep), tail(selection.recent) {
        if (selection.rows == nullptr) return;
        const int64_t* row = selection.rows + int64_t{batch} * 3;
        const auto clamped = [](int64_t value, int most) {
            return static_cast<int>(value < 0 ? 0 : value > most ? most : value);
        };
        length = clamped(row[0], selection.num_tokens);
        keep = clamped(row[1], min(length, selection.num_keep));
        tail = clamped(row[2], keep);
    }
};

// One block of a row; without a block size, all that stands before the tail.
struct Block {
    int size;  // 0 where the row has no such block
    int num_keep;
    int num_sink;  // leading tokens that stay whatever their score
    bool keep_last;
    int first_column;
    int first_slot;
    int first_drop;  // slot of the first dropped token among the row's; less than 0 where there is no room for it

    __device__ Block(const Selection& selection, const RowPlan& row, int index)
        : size(selection.block_size), keep_last(selection.block_size > 0) {
        const int body = row.length - row.tail;
        if (!keep_last) size = body;
        const int count = keep_last ? body / size : 1;
        num_keep = min((row.keep - row.tail) / max(count, 1), size);
        first_column = selection.num_tokens - row.length + index * size;
        first_slot = selection.num_keep - row.keep + index * num_keep;
        first_drop = selection.num_dropped - (row.length - row.keep) + index * (size - num_keep);
        num_sink = selection.sink - index * size;
        if (index >= count) size = num_keep = 0;
    }
};

// Keys of tokens `part` of a block, the first at keys[0]; `load(i)` is the score of the block's token i. With a reach,
// a token ranks by the best score among its neighbours in the block; forced ones rank highest. Here as below a thread
// touches every kThreads-th key and no other, so keys need no barrier.
template <typename Load>
__device__ void make_keys(const Load& load, const Block& block, const Run& part, int reach, uint32_t* keys,
                          uint32_t* staged) {
    for (int first = part.first; first < part.last; first += kThreads) {
        const int i = first + thread();
        uint32_t key = kNanKey;
        if (reach == 0) {
            if (i < part.last) key = order_key(to_bits(load(i)));
        } else {
            for (int j = thread(); j < kThreads + 2 * reach; j += kThreads) {
                const int neighbour = first + j - reach;
                const bool is_inside = 0 <= neighbour && neighbour < block.size;
                staged[j] = is_inside ? order_key(to_bits(load(neighbour))) : kNanKey;
            }
            __syncthreads();
            for (int j = 0; j <= 2 * reach; ++j) key = max(key, staged[thread() + j]);
            __syncthreads();  // the next tile writes them again
        }
        if (i < block.num_sink || (block.keep_last && i == block.size - 1)) key = kForcedKey;
        if (i < part.last) keys[i - part.first] = key;
    }
}

struct Threshold {
    uint32_t key;      // of the last token that stays
    int ties;          // how many tokens with exactly that key stay, lowest indices first
    int above_before;  // keys of the group's earlier CTAs above it
    int equal_before;  // and equal to it
};

// Of `count` keys here and those of the group, `num_keep` stay; at least one, and all if it is all of them.
__device__ inline Threshold find_threshold(const uint32_t* keys, int count, int num_keep, const Group& group,
                                           SelectShared& shared) {
    Threshold threshold{0, num_keep, 0, 0};
    for (int digit = 0; digit < kDigits; ++digit) {
        const int shift = 24 - 8 * digit;
        const uint32_t known = ~0u << shift << 8;  // digits of the threshold known so far
        shared.histogram[thread()] = 0;
        __syncthreads();
        for (int first = 0; first < count; first += kThreads) {
            const int i = first + thread();
            const bool is_counted = i < count && ((keys[i] ^ threshold.key) & known) == 0;
            const uint32_t bin = is_counted ? keys[i] >> shift & (kBins - 1) : kBins;
            // Scores stand close together, so lanes share bins: the first of them adds for all.
            const uint32_t peers = __match_any_sync(kAllLanes, bin);
            if (is_counted && lane() == __ffs(peers) - 1) atomicAdd(&shared.histogram[bin], __popc(peers));
        }
        __syncthreads();

        uint32_t total = shared.histogram[thread()];
        uint32_t earlier = 0;
        if (group.size > 1) {
            uint32_t* all = group.histograms + digit * group.size * kBins;
            all[group.index * kBins + thread()] = total;
            group.wait(digit + 1);
            total = 0;
            for (int i = 0; i < group.size; ++i) {
                const uint32_t theirs = all[i * kBins + thread()];
                if (i < group.index) earlier += theirs;
                total += theirs;
            }
        }
        const Sum sum = sum_over_threads(total, shared.warp_sums);
        const int above = static_cast<int>(sum.total - sum.before - total);
        if (above < threshold.ties && threshold.ties <= above + static_cast<int>(total)) {
            shared.digit = thread();
            shared.ties = threshold.ties - above;
        }
        __syncthreads();
        const auto found = static_cast<int>(shared.digit);
        threshold.key |= static_cast<uint32_t>(found) << shift;
        threshold.ties = shared.ties;
        if (group.size > 1) {
            threshold.above_before +=
                static_cast<int>(sum_over_threads(thread() > found ? earlier : 0, shared.warp_sums).total);
            threshold.equal_before =
                static_cast<int>(sum_over_threads(thread() == found ? earlier : 0, shared.warp_sums).total);
        }
    }
    return threshold;
}

// Calls emit(num_before, i, is_kept) for each of `count` keys, with how many of the block's kept tokens stand before
// it.
template <typename Emit>
__device__ void compact(const uint32_t* keys, int count, Threshold threshold, uint32_t* warp_sums, const Emit& emit) {
    for (int first = 0; first < count; first += kThreads) {
        const int i = first + thread();
        const bool is_above = i < count && keys[i] > threshold.key;
        const bool is_equal = i < count && keys[i] == threshold.key;
        // Two counts, one scan.
        const Sum sum = sum_over_threads(uint32_t{is_above} | uint32_t{is_equal} << 16, warp_sums);
        const int num_above = threshold.above_before + static_cast<int>(sum.before & 0xffff);
        const int num_equal = threshold.equal_before + static_cast<int>(sum.before >> 16);
        if (i < count) {
            emit(num_above + min(num_equal, threshold.ties), i, is_above || (is_equal && num_equal < threshold.ties));
        }
        threshold.above_before += static_cast<int>(sum.total & 0xffff);
        threshold.equal_before += static_cast<int>(sum.total >> 16);
    }
}

// Where the results of a row go.
struct Output {
    int64_t* indices;
    float* kept_mean;  // may be null
    int64_t* dropped;  // null where another CTA writes them
    int num_dropped;

    __device__ Output(const Selection& selection, bool with_dropped)
        : indices(selection.indices + int64_t{blockIdx.y} * selection.num_keep),
          kept_mean(selection.kept_mean == nullptr ? nullptr
                                                   : selection.kept_mean + int64_t{blockIdx.y} * selection.num_keep),
          dropped(with_dropped && selection.num_dropped > 0
                      ? selection.dropped + int64_t{blockIdx.y} * selection.num_dropped
                      : nullptr),
          num_dropped(selection.num_dropped) {}
};

// Writes the columns and means of the block's kept tokens, as far as they are among `part` and their slots in
// [slots.first, slots.last): CTAs that share a block's copies rank it each and write a share each. `keys` holds the
// part's; `load(i)` and `load_mean(i)` are the score and the running mean of the block's token i.
template <typename Load, typename LoadMean>
__device__ void select_block(const Load& load, const LoadMean& load_mean, const Block& block, const Run& part,
                             const Run& slots, int reach, const Group& group, uint32_t* keys, SelectShared& shared,
                             const Output& output) {
    // The same for all threads of the group.
    if (block.size == 0 || (block.num_keep == 0 && output.dropped == nullptr)) return;
    Threshold threshold{~0u, 0, 0, 0};  // where none stays
    if (block.num_keep > 0) {
        make_keys(load, block, part, reach, keys, shared.staged);
        threshold = find_threshold(keys, part.size(), block.num_keep, group, shared);
    } else {
        for (int i = thread(); i < part.size(); i += kThreads) keys[i] = kNanKey;
    }
    compact(keys, part.size(), threshold, shared.warp_sums, [&](int num_before, int i, bool is_kept) {
        const int token = part.first + i;
        if (is_kept) {
            const int slot = block.first_slot + num_before;
            if (slot < slots.first || slots.last <= slot) return;
            output.indices[slot] = block.first_column + token;
            if (output.kept_mean != nullptr) output.kept_mean[slot] = load_mean(token);
        } else if (output.dropped != nullptr) {
            const int slot = block.first_drop + token - num_before;
            if (0 <= slot && slot < output.num_dropped) output.dropped[slot] = block.first_column + token;
        }
    });
}

// Slots that no block fills: the padding before them all, and the tail after. All CTAs of a row share them evenly.
struct Rest {
    Run padding;
    Run tail;
    Run drop_padding;

    __device__ Rest(const Selection& selection, const RowPlan& row)
        : padding(Run{0, selection.num_keep - row.keep}.part(blockIdx.x, gridDim.x)),
          tail(Run{selection.num_keep - row.tail, selection.num_keep}.part(blockIdx.x, gridDim.x)),
          drop_padding(Run{0, max(selection.num_dropped - (row.length - row.keep), 0)}.part(blockIdx.x, gridDim.x)) {}

    // The tail keeps the mean that it came with.
    __device__ void write(const Selection& selection, const float* mean_score) const {
        const Output output(selection, true);
        for (int slot = padding.first + thread(); slot < padding.last; slot += kThreads) {
            output.indices[slot] = -1;
            if (output.kept_mean != nullptr) output.kept_mean[slot] = 0.0f;
        }
        for (int slot = tail.first + thread(); slot < tail.last; slot += kThreads) {
            const int column = slot + selection.num_tokens - selection.num_keep;
            output.indices[slot] = column;
            if (output.kept_mean != nullptr) {
                const int64_t offset = int64_t{blockIdx.y} * selection.num_tokens + column;
                output.kept_mean[slot] = mean_score == nullptr ? 0.0f : mean_score[offset];
            }
        }
        for (int slot = drop_padding.first + thread(); slot < drop_padding.last; slot += kThreads) {
            output.dropped[slot] = -1;
        }
    }
};

struct SelectArguments {
    Scores scores;
    Selection selection;
    int ctas_per_block;    // a group that shares the keys of a block, or CTAs that share its copies
    uint32_t* histograms;  // [B, kDigits, ctas_per_block, kBins]
    uint32_t* arrivals;    // [B]
    uint32_t* keys;        // [CTAs, keys_per_cta], null where they fit into shared memory
    int keys_per_cta;

    __device__ int block_index() const { return static_cast<int>(blockIdx.x) / ctas_per_block; }
    __device__ int index_in_block() const { return static_cast<int>(blockIdx.x) % ctas_per_block; }

    __device__ uint32_t* cta_keys() const {
        if (keys == nullptr) return reinterpret_cast<uint32_t*>(shared_memory() + sizeof(SelectShared));
        return keys + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * keys_per_cta;
    }

    // Offset of the block's first score in [B, N].
    __device__ int64_t offset(const Block& block) const {
        return int64_t{blockIdx.y} * selection.num_tokens + block.first_column;
    }
};

// CTA (part of a block, row). The CTAs of a block wait for one another, so they must all run at once.
__global__ void __launch_bounds__(kThreads, kSelectCtas)
    select_kernel(const __grid_constant__ SelectArguments arguments) {
    const Selection& selection = arguments.selection;
    auto& shared = *reinterpret_cast<SelectShared*>(shared_memory());
    const RowPlan row(selection, blockIdx.y);
    const Block block(selection, row, arguments.block_index());
    const int index = arguments.index_in_block();
    const int size = arguments.ctas_per_block;
    const Group group{index, size, arguments.histograms + int64_t{blockIdx.y} * kDigits * size * kBins,
                      arguments.arrivals + blockIdx.y};
    const int64_t offset = arguments.offset(block);
    select_block([&](int i) { return arguments.scores.load(offset + i); },
                 [&](int i) { return arguments.scores.load_mean(offset + i); }, block,
                 Run{0, block.size}.part(index, size), Run{0, selection.num_keep}, selection.pooling / 2, group,
                 arguments.cta_keys(), shared, Output(selection, true));
    Rest(selection, row).write(selection, arguments.scores.mean_score);
}

}  // namespace sdtp::cuda
