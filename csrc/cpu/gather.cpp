#include "sdtp/gather.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/ops.h"

namespace sdtp::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
namespace stable = torch::stable;

// Bytes that are worth waking a thread for.
constexpr int64_t kGrainBytes = 64 * 1024;

// Dimension of the tokens: 1 in [B, N] and [B, N, D], 2 in [B, heads, N, D].
int64_t token_dim(const Tensor& tensor) { return std::max<int64_t>(tensor.dim() - 2, 1); }

bool has_contiguous_rows(const Tensor& tensor) {
    return tensor.dim() == 2 || tensor.stride(tensor.dim() - 1) == 1 || tensor.size(tensor.dim() - 1) == 1;
}

Tensor empty_output(const Tensor& tensor, int64_t num_keep) {
    std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
    shape[token_dim(tensor)] = num_keep;
    return stable::new_empty(tensor, IntHeaderOnlyArrayRef(shape));
}

TokenRows describe(const Tensor& source, const Tensor& destination) {
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

}  // namespace

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& indices) {
    const int64_t batch = indices.size(0);
    const int64_t num_keep = indices.size(1);
    const Tensor contiguous_indices = stable::contiguous(indices);
    const int64_t* wanted = contiguous_indices.const_data_ptr<int64_t>();
    if (batch * num_keep > 0) {
        const auto [lowest, highest] = std::minmax_element(wanted, wanted + batch * num_keep);
        for (size_t i = 0; i < tensors.size(); ++i) {
            const int64_t num_tokens = tensors[i].size(token_dim(tensors[i]));
            STD_TORCH_CHECK(-1 <= *lowest && *highest < num_tokens, "indices: got values from ", *lowest, " to ",
                            *highest, "; expected -1 (padding) to ", num_tokens - 1, ", the last token of tensors[", i,
                            "]. Pass the indices that select_tokens made for tensors of this length");
        }
    }

    std::vector<Tensor> sources;  // own what `rows` points to
    std::vector<Tensor> outputs;
    std::vector<TokenRows> rows;
    int64_t token_bytes = 0;
    for (const Tensor& tensor : tensors) {
        sources.push_back(has_contiguous_rows(tensor) ? tensor : stable::contiguous(tensor));
        outputs.push_back(empty_output(tensor, num_keep));
        rows.push_back(describe(sources.back(), outputs.back()));
        token_bytes += rows.back().num_heads * rows.back().row_bytes;
    }

    const int64_t grain = std::max<int64_t>(kGrainBytes / std::max<int64_t>(token_bytes, 1), 1);
    stable::parallel_for(0, batch * num_keep, grain, [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t row = begin / num_keep;
            const int64_t first = begin - row * num_keep;
            const int64_t last = std::min(end - row * num_keep, num_keep);
            for (const TokenRows& each : rows) {
                gather_rows(each, row, wanted + row * num_keep, num_keep, first, last);
            }
            begin = row * num_keep + last;
        }
    });
    return outputs;
}

}  // namespace sdtp::cpu
