#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "cpu/ops.h"
#include "cpu/tensors.h"

namespace sdtp::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
namespace stable = torch::stable;

// As in reference.py.
constexpr float kAttentionFloor = 1e-9f;
constexpr double kLeastSpread = 1e-6;

// One row.
struct Terms {
    const int64_t* token_index;
    int64_t num_tokens;
    int64_t last_index;  // of the prompt
    const float* distance_table;
    int64_t num_distances;
    const float* attention;  // may be null
    double attention_weight;

    bool is_valid(int64_t i) const { return token_index[i] >= 0 && token_index[i] <= last_index; }
};

// Sums run over valid tokens alone, in their order, so that padding changes no bit.
void write_bias(const Terms& terms, float* bias) {
    double mean = 0.0, scale = 0.0;
    if (terms.attention != nullptr) {
        double count = 0.0, sum = 0.0, squares = 0.0;
        for (int64_t i = 0; i < terms.num_tokens; ++i) {
            if (!terms.is_valid(i)) continue;
            bias[i] = std::log(terms.attention[i] + kAttentionFloor);
            sum += bias[i];
            count += 1.0;
        }
        count = std::max(count, 1.0);
        mean = sum / count;
        for (int64_t i = 0; i < terms.num_tokens; ++i) {
            if (terms.is_valid(i)) squares += (bias[i] - mean) * (bias[i] - mean);
        }
        scale = terms.attention_weight / (std::sqrt(squares / count) + kLeastSpread);
    }
    for (int64_t i = 0; i < terms.num_tokens; ++i) {
        float value = 0.0f;
        if (terms.is_valid(i)) {
            value = terms.distance_table[std::min(terms.last_index - terms.token_index[i], terms.num_distances - 1)];
            if (terms.attention != nullptr) value += static_cast<float>((bias[i] - mean) * scale);
        }
        bias[i] = value;
    }
}

}  // namespace

Tensor prompt_bias(const Tensor& token_index, const Tensor& distance_table, int64_t keep_last,
                   const std::optional<Tensor>& attention, double attention_weight, const std::optional<Tensor>& query,
                   const std::optional<Tensor>& key, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                   double scaling, int64_t pooling) {
    const int64_t batch = token_index.size(0), num_tokens = token_index.size(1), end = num_tokens - keep_last;
    // Named, so that what the pointers below refer to outlives the call.
    const Tensor indices = make_contiguous(token_index);
    const Tensor table = make_contiguous(distance_table);
    const int64_t num_distances = table.size(table.dim() - 1), next_table = table.dim() == 1 ? 0 : num_distances;
    std::optional<Tensor> attentions;
    if (attention.has_value()) attentions = make_contiguous(*attention);
    if (query.has_value()) {
        attentions =
            window_attention_from(end - query->size(2), *query, *key, indices, indices, cos, sin, scaling, pooling);
    }
    Tensor output = stable::new_empty(indices, IntHeaderOnlyArrayRef({batch, num_tokens}), ScalarType::Float);
    for (int64_t row = 0; row < batch; ++row) {
        const int64_t first = row * num_tokens;
        const int64_t* index = indices.const_data_ptr<int64_t>() + first;
        const Terms terms{index,
                          num_tokens,
                          end > 0 ? index[end - 1] : -1,
                          table.const_data_ptr<float>() + row * next_table,
                          num_distances,
                          attentions ? attentions->const_data_ptr<float>() + first : nullptr,
                          attention_weight};
        write_bias(terms, output.mutable_data_ptr<float>() + first);
    }
    return output;
}

}  // namespace sdtp::cpu
