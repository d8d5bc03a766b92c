// The CPU kernels of the private ops `sdtp_native::*`, on PyTorch's stable ABI. The schemas stand in
// sdtp_kernels/backends/_native.py, and sdtp_kernels/ops.py has checked shapes, dtypes and devices; what is checked
// here are the values that it cannot see without reading tensors.

#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(sdtp_native, CPU, m) {
    m.impl("score_tokens", TORCH_BOX(&sdtp::cpu::score_tokens));
    m.impl("select_tokens", TORCH_BOX(&sdtp::cpu::select_tokens));
    m.impl("gather_tokens", TORCH_BOX(&sdtp::cpu::gather_tokens));
    m.impl("prune_tokens", TORCH_BOX(&sdtp::cpu::prune_tokens));
    m.impl("window_attention", TORCH_BOX(&sdtp::cpu::window_attention));
    m.impl("prompt_bias", TORCH_BOX(&sdtp::cpu::prompt_bias));
}
