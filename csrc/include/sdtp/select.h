// Choice of the best tokens of one block by counting: three histogram passes find the key of the last token that stays
// and how many tokens with that key stay; one ordered pass emits them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "sdtp/order.h"

namespace sdtp {

// One block of one row. Its kept tokens have a fixed place in the output, so blocks are independent of each other.
struct BlockSelection {
    const float* scores;  // of the block's first token
    int64_t stride;       // between the scores of neighbouring tokens
    int64_t size;         // tokens in the block
    int64_t num_keep;     // tokens that stay, forced ones included
    int64_t num_forced;   // leading tokens that stay whatever their score
    bool force_last;      // whether the last token stays too
    int64_t reach;        // a token ranks by the best score among so many neighbours on either side
    int64_t first_index;  // index to emit for the block's first token
    int64_t* indices;     // [num_keep], ascending
};

struct Threshold {
    uint32_t key;      // of the last token that stays
    int64_t num_ties;  // how many tokens with exactly that key stay, lowest indices first
};

// `scratch` is for block.size keys where the block has a reach.
inline void load_keys(const BlockSelection& block, uint32_t* keys, uint32_t* scratch) {
    uint32_t* own = block.reach > 0 ? scratch : keys;
    for (int64_t i = 0; i < block.size; ++i) {
        uint32_t bits;
        std::memcpy(&bits, block.scores + i * block.stride, sizeof(bits));
        own[i] = order_key(bits);
    }
    if (block.reach > 0) {
        for (int64_t i = 0; i < block.size; ++i) {
            const int64_t begin = std::max<int64_t>(i - block.reach, 0);
            keys[i] = *std::max_element(own + begin, own + std::min(i + block.reach + 1, block.size));
        }
    }
    std::fill_n(keys, block.num_forced, kForcedKey);
    if (block.force_last) keys[block.size - 1] = kForcedKey;
}

// Requires 1 <= num_keep <= size.
inline Threshold find_threshold(const uint32_t* keys, int64_t size, int64_t num_keep) {
    uint32_t prefix = 0;       // digits of the threshold known so far
    uint32_t prefix_mask = 0;  // where they stand
    int64_t remaining = num_keep;
    for (int digit = 0; digit < kNumDigits; ++digit) {
        const int shift = kDigitShift[digit];
        const uint32_t digit_mask = (1u << kDigitBits[digit]) - 1;
        int64_t histogram[kMaxBins] = {};
        for (int64_t i = 0; i < size; ++i) {
            if ((keys[i] & prefix_mask) == prefix) ++histogram[(keys[i] >> shift) & digit_mask];
        }
        uint32_t bin = digit_mask;
        while (histogram[bin] < remaining) remaining -= histogram[bin--];
        prefix |= bin << shift;
        prefix_mask |= digit_mask << shift;
    }
    return {prefix, remaining};
}

// `keys` is scratch for block.size keys, and so is `scratch` where the block has a reach.
inline void select_block(const BlockSelection& block, uint32_t* keys, uint32_t* scratch) {
    if (block.num_keep == 0) return;
    load_keys(block, keys, scratch);
    Threshold threshold = find_threshold(keys, block.size, block.num_keep);
    int64_t* next = block.indices;
    for (int64_t i = 0; i < block.size; ++i) {
        const bool is_kept = keys[i] > threshold.key || (keys[i] == threshold.key && threshold.num_ties-- > 0);
        if (is_kept) *next++ = block.first_index + i;
    }
}

}  // namespace sdtp
