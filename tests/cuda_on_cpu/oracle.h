// What the kernels must compute, straight from the text of the contract (docs of sdtp_kernels/ops.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace oracle {

// Kept indices of one row without padding.
inline std::vector<int64_t> select(const std::vector<float>& scores, int64_t num_keep, int64_t sink, int64_t recent,
                                   int64_t block_size, int64_t pooling) {
    const auto length = static_cast<int64_t>(scores.size());
    const int64_t body = length - recent;
    const int64_t per_block = block_size > 0 ? block_size : body;
    std::vector<int64_t> kept;
    for (int64_t begin = 0; begin < body; begin += per_block) {
        const int64_t end = begin + per_block;
        const auto rank = [&](int64_t i) {
            const bool is_forced = i < sink || (block_size > 0 && i == end - 1);
            bool is_number = false;
            double best = 0.0;
            for (int64_t j = std::max(begin, i - pooling / 2); j < std::min(end, i + pooling / 2 + 1); ++j) {
                if (std::isnan(scores[j])) continue;
                best = is_number ? std::max<double>(best, scores[j]) : scores[j];
                is_number = true;
            }
            return std::tuple(!is_forced, !is_number, -best, i);
        };
        std::vector<decltype(rank(0))> order;
        for (int64_t i = begin; i < end; ++i) order.push_back(rank(i));
        std::sort(order.begin(), order.end());
        order.resize((num_keep - recent) / (body / per_block));
        for (const auto& token : order) kept.push_back(std::get<3>(token));
    }
    std::sort(kept.begin(), kept.end());
    for (int64_t i = body; i < length; ++i) kept.push_back(i);
    return kept;
}

inline double gelu(double x) { return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))); }

// One row's attention: softmax of each query over the keys that it sees, sum over queries, pooling, mean over heads.
// logit(head, query, key) is scaled.
template <typename Logit>
std::vector<double> window_attention(int heads, const std::vector<int64_t>& query_index,
                                     const std::vector<int64_t>& key_index, int pooling, const Logit& logit) {
    const auto num_keys = static_cast<int>(key_index.size());
    std::vector<double> mean(num_keys);
    for (int head = 0; head < heads; ++head) {
        std::vector<double> sums(num_keys);
        for (int i = 0; i < static_cast<int>(query_index.size()); ++i) {
            std::vector<int> seen;
            std::vector<double> powers;
            for (int j = 0; j < num_keys; ++j) {
                if (0 > key_index[j] || key_index[j] > query_index[i]) continue;
                seen.push_back(j);
                powers.push_back(logit(head, i, j));
            }
            if (seen.empty()) continue;
            const double most = *std::max_element(powers.begin(), powers.end());
            double total = 0;
            for (double& power : powers) total += power = std::exp(power - most);
            for (size_t s = 0; s < seen.size(); ++s) sums[seen[s]] += powers[s] / total;
        }
        for (int j = 0; j < num_keys; ++j) {
            const int begin = std::max(j - pooling / 2, 0), end = std::min(j + pooling / 2 + 1, num_keys);
            mean[j] += *std::max_element(sums.begin() + begin, sums.begin() + end) / heads;
        }
    }
    return mean;
}

// One row's bias; `attention` is empty where there is none.
inline std::vector<double> prompt_bias(const std::vector<int64_t>& index, int64_t keep_last,
                                       const std::vector<float>& distance_table, const std::vector<double>& attention,
                                       double weight) {
    const auto num_tokens = static_cast<int64_t>(index.size()), end = num_tokens - keep_last;
    const auto distance = [&](int64_t i) { return index[end - 1] - index[i]; };
    const auto is_valid = [&](int64_t i) { return end > 0 && index[i] >= 0 && distance(i) >= 0; };
    double count = 0, mean = 0, squares = 0;
    std::vector<double> logs;
    for (double value : attention) logs.push_back(std::log(value + 1e-9));
    for (int64_t i = 0; i < num_tokens && !logs.empty(); ++i) {
        if (is_valid(i)) count += 1, mean += logs[i];
    }
    mean /= std::max(count, 1.0);
    for (int64_t i = 0; i < num_tokens && !logs.empty(); ++i) {
        if (is_valid(i)) squares += (logs[i] - mean) * (logs[i] - mean);
    }
    std::vector<double> bias(num_tokens);
    for (int64_t i = 0; i < num_tokens; ++i) {
        if (!is_valid(i)) continue;
        bias[i] = distance_table[std::min<int64_t>(distance(i), static_cast<int64_t>(distance_table.size()) - 1)];
        if (!logs.empty()) bias[i] += weight * (logs[i] - mean) / (std::sqrt(squares / count) + 1e-6);
    }
    return bias;
}

}  // namespace oracle
