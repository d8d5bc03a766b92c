// Tensors of tokens as the gather kernels see them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sdtp/gather.h"

namespace sdtp {

using torch::stable::Tensor;

// Dimension of the tokens: 1 in [B, N] and [B, N, D], 2 in [B, heads, N, D].
inline int64_t token_dim(const Tensor& tensor) { return std::max<int64_t>(tensor.dim() - 2, 1); }

inline bool has_contiguous_rows(const Tensor& tensor) {
    return tensor.dim() == 2 || tensor.stride(tensor.dim() - 1) == 1 || tensor.size(tensor.dim() - 1) == 1;
}

inline TokenRows describe(const Tensor& source, const Tensor& destination) {
    const auto element = static_cast<int64_t>(source.element_size());
    const int64_t dim = token_dim(source);
    const bool has_heads = dim == 2;
    return {static_cast<const char*>(source.const_data_ptr()),
            static_cast<char*>(destination.mutable_data_ptr()),
            source.stride(0) * element,
            has_heads ? source.stride(1) * element : 0,
            source.stride(dim) * element,
            has_heads ? source.size(1) : 1,
            (source.dim() == 2 ? 1 : source.size(dim + 1)) * element};
}

// A gather's tensors: `sources` and `outputs` own what `rows` points to.
struct Gather {
    std::vector<Tensor> sources;
    std::vector<Tensor> outputs;
    std::vector<TokenRows> rows;

    Gather(const std::vector<Tensor>& tensors, int64_t num_keep) {
        for (const Tensor& tensor : tensors) {
            std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
            shape[token_dim(tensor)] = num_keep;
            sources.push_back(has_contiguous_rows(tensor) ? tensor : torch::stable::contiguous(tensor));
            outputs.push_back(torch::stable::new_empty(tensor, torch::headeronly::IntHeaderOnlyArrayRef(shape)));
            rows.push_back(describe(sources.back(), outputs.back()));
        }
    }
};

}  // namespace sdtp
