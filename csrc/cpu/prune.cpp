#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace sdtp::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
namespace stable = torch::stable;

// What is not among the kept columns of each row, after its padding.
Tensor dropped_tokens(const Tensor& indices, int64_t width, const std::optional<Tensor>& rows, int64_t num_dropped) {
    const int64_t batch = indices.size(0), num_keep = indices.size(1);
    const std::array<int64_t, 2> shape{batch, num_dropped};
    Tensor dropped = stable::new_empty(indices, IntHeaderOnlyArrayRef(shape));
    for (int64_t row = 0; num_dropped > 0 && row < batch; ++row) {
        const int64_t* kept = indices.const_data_ptr<int64_t>() + row * num_keep;
        const int64_t* end = kept + num_keep;
        kept = std::find_if(kept, end, [](int64_t column) { return column >= 0; });
        const int64_t length = rows ? *(rows->const_data_ptr<int64_t>() + row * rows->stride(0)) : width;
        const int64_t count = length - (end - kept);
        STD_TORCH_CHECK(count <= num_dropped, "row ", row, ": drops ", count, " tokens; num_dropped=", num_dropped,
                        " has no room for them");
        int64_t* next = dropped.mutable_data_ptr<int64_t>() + row * num_dropped;
        next = std::fill_n(next, num_dropped - count, -1);
        for (int64_t column = width - length; column < width; ++column) {
            if (kept != end && *kept == column) {
                ++kept;
            } else {
                *next++ = column;
            }
        }
    }
    return dropped;
}

}  // namespace

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> prune_tokens(
    const std::vector<Tensor>& tensors, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const std::optional<Tensor>& mean_score, int64_t num_scores, const std::optional<Tensor>& score_bias,
    std::optional<double> rms_eps, int64_t num_keep, int64_t sink, int64_t recent, std::optional<int64_t> block_size,
    const std::optional<Tensor>& rows, int64_t pooling, int64_t num_dropped) {
    // Nothing ranks the last tokens of a row. Where each row has a count of its own, all are scored.
    Tensor means = mean_scores(tensors.at(0), w1, b1, w2, b2, mean_score, num_scores, rms_eps, rows ? 0 : recent);
    const Tensor indices =
        select_tokens(with_bias(means, score_bias), num_keep, sink, recent, block_size, rows, pooling);
    const int64_t width = means.size(1);
    if (rows) {
        const Tensor before = mean_score ? make_contiguous(*mean_score) : means;
        for (int64_t row = 0; row < means.size(0); ++row) {
            const int64_t tail = *(rows->const_data_ptr<int64_t>() + row * rows->stride(0) + 2 * rows->stride(1));
            const int64_t first = (row + 1) * width - tail;
            float* values = means.mutable_data_ptr<float>() + first;
            if (mean_score) {
                std::copy_n(before.const_data_ptr<float>() + first, tail, values);
            } else {
                std::fill_n(values, tail, 0.0f);
            }
        }
    }
    std::vector<Tensor> carried = tensors;
    carried.push_back(means);
    std::vector<Tensor> kept = gather_tokens(carried, indices);
    const Tensor kept_means = kept.back();
    kept.pop_back();
    return {kept, indices, kept_means, dropped_tokens(indices, width, rows, num_dropped)};
}

}  // namespace sdtp::cpu
