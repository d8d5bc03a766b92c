// The six ops on CPU tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace sdtp::cpu {

using torch::stable::Tensor;

Tensor score_tokens(const Tensor& hidden_states, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                    const std::optional<Tensor>& mean_score, int64_t num_scores,
                    const std::optional<Tensor>& score_bias, std::optional<double> rms_eps);

// The running means of the scores, without a bias. The last `num_unscored` tokens of a row have the mean that they came
// with, or 0.
Tensor mean_scores(const Tensor& hidden_states, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                   const std::optional<Tensor>& mean_score, int64_t num_scores, std::optional<double> rms_eps,
                   int64_t num_unscored);

Tensor with_bias(const Tensor& means, const std::optional<Tensor>& score_bias);

Tensor select_tokens(const Tensor& scores, int64_t num_keep, int64_t sink, int64_t recent,
                     std::optional<int64_t> block_size, const std::optional<Tensor>& rows, int64_t pooling);

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& indices);

// The three composed: scores tensors[0], gathers all of `tensors`. Returns them, the indices, the kept means, and the
// indices of the dropped tokens.
std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> prune_tokens(
    const std::vector<Tensor>& tensors, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const std::optional<Tensor>& mean_score, int64_t num_scores, const std::optional<Tensor>& score_bias,
    std::optional<double> rms_eps, int64_t num_keep, int64_t sink, int64_t recent, std::optional<int64_t> block_size,
    const std::optional<Tensor>& rows, int64_t pooling, int64_t num_dropped);

Tensor window_attention(const Tensor& query, const Tensor& key, const Tensor& query_index, const Tensor& key_index,
                        const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double scaling,
                        int64_t pooling);

// The same, where the window's tokens are columns `first` on of `query_index`, `cos` and `sin`.
Tensor window_attention_from(int64_t first, const Tensor& query, const Tensor& key, const Tensor& query_index,
                             const Tensor& key_index, const std::optional<Tensor>& cos,
                             const std::optional<Tensor>& sin, double scaling, int64_t pooling);

Tensor prompt_bias(const Tensor& token_index, const Tensor& distance_table, int64_t keep_last,
                   const std::optional<Tensor>& attention, double attention_weight, const std::optional<Tensor>& query,
                   const std::optional<Tensor>& key, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                   double scaling, int64_t pooling);

}  // namespace sdtp::cpu
