#include "sdtp/gather.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bindings/token_rows.h"
#include "cpu/ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sdtp::cpu {
namespace {

namespace stable = torch::stable;

// Bytes that are worth waking a thread for.
constexpr int64_t kGrainBytes = 64 * 1024;

// The system has to give the memory of large outputs each time, and a fault for each 4 KiB of it costs more than the
// copy. A hint: where the system knows no huge pages, or gives none, nothing happens.
void prefer_huge_pages([[maybe_unused]] char* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
    const auto first = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (first + bytes) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
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

    const Gather gather(tensors, num_keep);
    int64_t token_bytes = 0;
    for (const TokenRows& each : gather.rows) {
        const int64_t bytes = each.num_heads * each.row_bytes;
        prefer_huge_pages(each.destination, batch * num_keep * bytes);
        token_bytes += bytes;
    }

    const int64_t grain = std::max<int64_t>(kGrainBytes / std::max<int64_t>(token_bytes, 1), 1);
    stable::parallel_for(0, batch * num_keep, grain, [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t row = begin / num_keep;
            const int64_t first = begin - row * num_keep;
            const int64_t last = std::min(end - row * num_keep, num_keep);
            for (const TokenRows& each : gather.rows) {
                gather_rows(each, row, wanted + row * num_keep, num_keep, first, last);
            }
            begin = row * num_keep + last;
        }
    });
    return gather.outputs;
}

}  // namespace sdtp::cpu
