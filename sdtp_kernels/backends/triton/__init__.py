"""The Triton backend: NVIDIA from compute capability 8.0, AMD CDNA, and the interpreter for tests.

Triton is imported with the first op that runs here, not before: asking why a backend is unavailable costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from sdtp_kernels.backends import limits

if TYPE_CHECKING:
    from sdtp_kernels.arguments import PromptTerms, Scoring, Selection, Window

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MIN_TRITON = (3, 6)
_AMD_TARGETS = ("gfx90a", "gfx942")  # CDNA 2 and 3: what the table of configurations holds


def unavailable_reason(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on cuda tensors; on cpu tensors only in Triton's interpreter (TRITON_INTERPRET=1), for tests"
    elif device.type != "cuda":
        return f"runs on cuda tensors, not on {device.type}"
    if dtype is not None and dtype not in _FLOATS:
        return f"computes in {', '.join(map(str, _FLOATS))}, not in {dtype}"
    try:
        import triton
    except ImportError as error:
        return f"triton does not import ({error}): pip install 'sdtp-kernels[triton]' (Linux)"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _MIN_TRITON:
        return f"needs triton 3.6 or newer, found {triton.__version__}: pip install 'sdtp-kernels[triton]'"
    return None if device.type == "cpu" else _gpu_reason(device)


def _gpu_reason(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return f"no GPU that torch {torch.__version__} can use"
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        target = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if target in _AMD_TARGETS else f"needs AMD CDNA ({', '.join(_AMD_TARGETS)}); {name} is {target}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0 or newer; {name} has {major}.{minor}"


def score_tokens(hidden_states: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    from . import score

    limits.check_size("triton", hidden_states.shape[0], hidden_states.shape[1])
    with torch.cuda.device_of(hidden_states):
        return score.score_tokens(hidden_states, scoring)


def select_tokens(scores: torch.Tensor, selection: Selection) -> torch.Tensor:
    from . import select

    limits.check_size("triton", scores.shape[0], scores.shape[1])
    limits.check_pooling("triton", selection.pooling)
    with torch.cuda.device_of(scores):
        return select.select_tokens(scores, selection)


def gather_tokens(tensors: list[torch.Tensor], indices: torch.Tensor) -> list[torch.Tensor]:
    from . import gather

    limits.check_size("triton", indices.shape[0], indices.shape[1])
    with torch.cuda.device_of(indices):
        return gather.gather_tokens(tensors, indices)


def prune_tokens(
    hidden_states: torch.Tensor, tensors: list[torch.Tensor], scoring: Scoring, selection: Selection, num_dropped: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    from . import fused

    limits.check_size("triton", hidden_states.shape[0], hidden_states.shape[1])
    limits.check_pooling("triton", selection.pooling)
    with torch.cuda.device_of(hidden_states):
        return fused.prune_tokens(hidden_states, tensors, scoring, selection, num_dropped)


def window_attention(window: Window) -> torch.Tensor:
    from .window import window_attention

    limits.check_size("triton", window.key.shape[0], window.key.shape[2])
    with torch.cuda.device_of(window.key):
        return window_attention(window)


def prompt_bias(terms: PromptTerms) -> torch.Tensor:
    from . import window

    limits.check_size("triton", *terms.token_index.shape)
    with torch.cuda.device_of(terms.token_index):
        return window.prompt_bias(terms)


def position_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_visible: torch.Tensor,
    first_visible: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    from . import attention

    limits.check_size("triton", query.shape[0], max(query.shape[2], key.shape[2]))
    with torch.cuda.device_of(query):
        return attention.position_attention(query, key, value, num_visible, first_visible, scale)
