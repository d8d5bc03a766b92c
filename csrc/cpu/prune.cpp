#include "cpu/ops.h"

namespace sdtp::cpu {

std::tuple<std::vector<Tensor>, Tensor> prune_tokens(const std::vector<Tensor>& tensors, const Tensor& w1,
                                                     const Tensor& b1, const Tensor& w2, const Tensor& b2,
                                                     int64_t num_keep, int64_t sink, int64_t recent,
                                                     std::optional<int64_t> block_size,
                                                     const std::optional<Tensor>& rows, int64_t pooling,
                                                     const std::optional<Tensor>& score_bias,
                                                     std::optional<double> rms_eps) {
    const Tensor scores = score_tokens(tensors.at(0), w1, b1, w2, b2, score_bias, rms_eps);
    const Tensor indices = select_tokens(scores, num_keep, sink, recent, block_size, rows, pooling);
    return {gather_tokens(tensors, indices), indices};
}

}  // namespace sdtp::cpu
