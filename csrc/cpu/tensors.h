// Small things that kernels do with tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace sdtp::cpu {

// A call through torch's dispatcher takes some microseconds, so it is spared where it would change nothing.
inline torch::stable::Tensor make_contiguous(const torch::stable::Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace sdtp::cpu
