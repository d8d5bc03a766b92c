"""The compiled CUDA library: thin calls of ``csrc/bindings/cuda.cpp``.

Scoring multiplies with mma.sync on every target. On compute capability 9 and 10 that leaves much of the tensor cores
unused, which only wgmma and tcgen05 reach: there, as everywhere for now, ``"auto"`` prefers the Triton backend, whose
compiler emits those. A backend named by the user runs its own kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import reference
from . import limits
from ._native import build_info, load_error

if TYPE_CHECKING:
    from ..arguments import PromptTerms, Scoring, Selection, Window

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    if error := load_error("cuda"):
        return error
    if torch.version.hip:
        return f"compiled for NVIDIA GPUs, and torch {torch.__version__} is for AMD ones"
    if not torch.cuda.is_available():
        return f"no GPU on this machine that torch {torch.__version__} can use; libsdtp_cuda.so {_built()}, and loads"
    if device.type != "cuda":
        return f"runs on cuda tensors, not on {device.type}"
    if dtype is not None and dtype not in _FLOATS:
        return f"computes in {', '.join(map(str, _FLOATS))}, not in {dtype}"
    if error := _driver_error():
        return error
    major, minor = torch.cuda.get_device_capability(device)
    if _has_code_for(10 * major + minor):
        return None
    name = torch.cuda.get_device_name(device)
    return f"libsdtp_cuda.so {_built()}; {name} has {major}.{minor}: build with SDTP_CUDA_ARCHS={10 * major + minor}"


def _build() -> dict[str, Any]:
    return build_info().get("cuda") or {"nvcc": "unknown", "targets": []}


def _driver_error() -> str | None:
    """Why this driver would refuse every launch: the library's CUDA runtime is its own, whichever torch has."""
    get_version = getattr(torch._C, "_cuda_getDriverVersion", None)
    built_for = _build()["nvcc"].split(".")[0]
    if get_version is None or not built_for.isdigit():
        return None
    major, minor = divmod(get_version() // 10, 100)
    if major >= int(built_for):
        return None
    return (
        f"libsdtp_cuda.so {_built()} and needs a driver for CUDA {built_for}; this one is for CUDA {major}.{minor}: "
        "update the driver, or install triton"
    )


def _built() -> str:
    return f"is built by nvcc {_build()['nvcc']} for {', '.join(_build()['targets'])}"


def _has_code_for(capability: int) -> bool:
    """Whether a target's machine code runs there (same major version, not newer), or its PTX (not newer)."""
    for target in _build()["targets"]:
        kind, _, built_for = target.partition("_")
        if int(built_for) <= capability and (kind == "compute" or int(built_for) // 10 == capability // 10):
            return True
    return False


def score_tokens(hidden_states: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    limits.check_size("cuda", hidden_states.shape[0], hidden_states.shape[1])
    return torch.ops.sdtp_native.score_tokens.default(hidden_states, *scoring)  # type: ignore[no-any-return]


def select_tokens(scores: torch.Tensor, selection: Selection) -> torch.Tensor:
    limits.check_size("cuda", scores.shape[0], scores.shape[1])
    limits.check_pooling("cuda", selection.pooling)
    return torch.ops.sdtp_native.select_tokens.default(scores, *selection)  # type: ignore[no-any-return]


def gather_tokens(tensors: list[torch.Tensor], indices: torch.Tensor) -> list[torch.Tensor]:
    limits.check_size("cuda", indices.shape[0], indices.shape[1])
    return torch.ops.sdtp_native.gather_tokens.default(tensors, indices)  # type: ignore[no-any-return]


def prune_tokens(
    hidden_states: torch.Tensor, tensors: list[torch.Tensor], scoring: Scoring, selection: Selection, num_dropped: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    limits.check_size("cuda", hidden_states.shape[0], hidden_states.shape[1])
    limits.check_pooling("cuda", selection.pooling)
    kept, *others = torch.ops.sdtp_native.prune_tokens.default(
        [hidden_states, *tensors], *scoring, *selection, num_dropped
    )
    return kept[0], kept[1:], *others


def window_attention(window: Window) -> torch.Tensor:
    limits.check_size("cuda", window.key.shape[0], window.key.shape[2])
    limits.check_head_dim("cuda", window.query.shape[3])
    return torch.ops.sdtp_native.window_attention.default(*window)  # type: ignore[no-any-return]


def prompt_bias(terms: PromptTerms) -> torch.Tensor:
    limits.check_size("cuda", terms.token_index.shape[0], terms.token_index.shape[1])
    if terms.query is not None:
        limits.check_head_dim("cuda", terms.query.shape[3])
    return torch.ops.sdtp_native.prompt_bias.default(*terms)  # type: ignore[no-any-return]


# No kernel of its own.
position_attention = reference.position_attention
