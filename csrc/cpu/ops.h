// The five ops on CPU tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace sdtp::cpu {

using torch::stable::Tensor;

Tensor score_tokens(const Tensor& hidden_states, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                    const std::optional<Tensor>& score_bias, std::optional<double> rms_eps);

Tensor select_tokens(const Tensor& scores, int64_t num_keep, int64_t sink, int64_t recent,
                     std::optional<int64_t> block_size, const std::optional<Tensor>& rows, int64_t pooling);

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& indices);

// The three composed: scores tensors[0], gathers all of `tensors`. Returns them and the indices.
std::tuple<std::vector<Tensor>, Tensor> prune_tokens(const std::vector<Tensor>& tensors, const Tensor& w1,
                                                     const Tensor& b1, const Tensor& w2, const Tensor& b2,
                                                     int64_t num_keep, int64_t sink, int64_t recent,
                                                     std::optional<int64_t> block_size,
                                                     const std::optional<Tensor>& rows, int64_t pooling,
                                                     const std::optional<Tensor>& score_bias,
                                                     std::optional<double> rms_eps);

Tensor window_attention(const Tensor& query, const Tensor& key, const Tensor& query_index, const Tensor& key_index,
                        const Tensor& query_weight, double scaling, int64_t pooling);

}  // namespace sdtp::cpu
