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

}  // namespace oracle
