#include "sdtp/select.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/ops.h"

namespace sdtp::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
namespace stable = torch::stable;

// Tokens that are worth waking a thread for: about 20 us of counting.
constexpr int64_t kGrainTokens = 8192;

// What one row asks for. `length` tokens stand at the row's end, after its padding.
struct RowPlan {
    int64_t length;
    int64_t num_keep;
    int64_t recent;

    int64_t before_recent() const { return length - recent; }
};

struct Blocks {
    int64_t count;
    int64_t size;
    int64_t num_keep;  // in each block
};

RowPlan read_plan(const Tensor& rows, int64_t row) {
    const int64_t* values = rows.const_data_ptr<int64_t>() + row * rows.stride(0);
    return {values[0], values[rows.stride(1)], values[2 * rows.stride(1)]};
}

// Cuts a row into blocks, or says what does not fit.
Blocks cut_blocks(const RowPlan& plan, int64_t row, int64_t width, int64_t num_keep, int64_t sink,
                  std::optional<int64_t> block_size) {
    STD_TORCH_CHECK(0 <= plan.recent && plan.recent <= plan.num_keep && plan.num_keep <= plan.length &&
                        plan.length <= width && plan.num_keep <= num_keep,
                    "row ", row, ": got ", plan.length, " valid tokens, ", plan.num_keep, " to keep and ", plan.recent,
                    " recent ones; expected 0 <= recent <= keep <= valid <= ", width,
                    " and keep <= num_keep=", num_keep,
                    ". PruningSchedule.plan_rows computes `rows`, plan(..., padded=True) num_keep");
    const int64_t to_choose = plan.num_keep - plan.recent;
    const int64_t num_candidates = plan.before_recent();
    const int64_t size = block_size.value_or(num_candidates);
    const int64_t count = num_candidates == 0 ? 0 : num_candidates / size;
    STD_TORCH_CHECK(count * size == num_candidates, "row ", row, ": got ", num_candidates,
                    " tokens before the recent ones; expected a multiple of block_size=", size,
                    ". Count the unfinished block as recent");
    if (count == 0) {
        STD_TORCH_CHECK(to_choose == 0, "row ", row, ": got ", plan.num_keep, " tokens to keep, but only the ",
                        plan.recent, " recent ones are there; keep exactly those");
        return {0, 0, 0};
    }
    const int64_t in_block = to_choose / count;
    const int64_t forced = std::min(block_size ? sink + 1 : sink, size);
    STD_TORCH_CHECK(in_block * count == to_choose && forced <= in_block, "row ", row, ": got ", to_choose,
                    " tokens to keep in ", count, " block(s) of ", size,
                    " tokens; expected the same count in each, from ", forced, " (forced) to ", size,
                    ". Keep more tokens, or force fewer");
    return {count, size, in_block};
}

}  // namespace

Tensor select_tokens(const Tensor& scores, int64_t num_keep, int64_t sink, int64_t recent,
                     std::optional<int64_t> block_size, const std::optional<Tensor>& rows, int64_t pooling) {
    const int64_t batch = scores.size(0);
    const int64_t width = scores.size(1);
    std::vector<RowPlan> plans;
    std::vector<Blocks> cuts;
    for (int64_t row = 0; row < batch; ++row) {
        plans.push_back(rows ? read_plan(*rows, row) : RowPlan{width, num_keep, recent});
        cuts.push_back(cut_blocks(plans.back(), row, width, num_keep, sink, block_size));
    }

    const std::array<int64_t, 2> shape{batch, num_keep};
    Tensor indices = stable::new_empty(scores, IntHeaderOnlyArrayRef(shape), ScalarType::Long);
    const float* values = scores.const_data_ptr<float>();
    const int64_t stride = scores.stride(1);
    std::vector<BlockSelection> blocks;
    int64_t longest = 0;
    for (int64_t row = 0; row < batch; ++row) {
        const auto [count, size, in_block] = cuts[row];
        int64_t* next = indices.mutable_data_ptr<int64_t>() + row * num_keep;
        next = std::fill_n(next, num_keep - plans[row].num_keep, -1);
        int64_t column = width - plans[row].length;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t forced = std::clamp<int64_t>(sink - i * size, 0, size);
            blocks.push_back({values + row * scores.stride(0) + column * stride, stride, size, in_block, forced,
                              block_size.has_value(), pooling / 2, column, next});
            column += size;
            next += in_block;
        }
        for (; column < width; ++column) *next++ = column;
        longest = std::max(longest, size);
    }

    const auto num_blocks = static_cast<int64_t>(blocks.size());
    const int64_t grain = std::max<int64_t>(kGrainTokens / std::max<int64_t>(longest, 1), 1);
    stable::parallel_for(0, num_blocks, grain, [&](int64_t begin, int64_t end) {
        std::vector<uint32_t> keys(longest), scratch(pooling > 1 ? longest : 0);
        for (int64_t i = begin; i < end; ++i) select_block(blocks[i], keys.data(), scratch.data());
    });
    return indices;
}

}  // namespace sdtp::cpu
