"""The compiled CPU library: thin calls of ``csrc/bindings/cpu.cpp``. Attention is torch's own, in blocks of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ._native import load_error

if TYPE_CHECKING:
    from ..arguments import PromptTerms, Scoring, Selection, Window

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_QUERIES = 256


def unavailable_reason(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu tensors, not on {device.type}"
    if dtype is not None and dtype not in _FLOATS:
        return f"computes in {', '.join(map(str, _FLOATS))}, not in {dtype}"
    return load_error("cpu")


def score_tokens(hidden_states: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    return torch.ops.sdtp_native.score_tokens.default(hidden_states, *scoring)  # type: ignore[no-any-return]


def select_tokens(scores: torch.Tensor, selection: Selection) -> torch.Tensor:
    return torch.ops.sdtp_native.select_tokens.default(scores, *selection)  # type: ignore[no-any-return]


def gather_tokens(tensors: list[torch.Tensor], indices: torch.Tensor) -> list[torch.Tensor]:
    return torch.ops.sdtp_native.gather_tokens.default(tensors, indices)  # type: ignore[no-any-return]


def prune_tokens(
    hidden_states: torch.Tensor, tensors: list[torch.Tensor], scoring: Scoring, selection: Selection, num_dropped: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    kept, *others = torch.ops.sdtp_native.prune_tokens.default(
        [hidden_states, *tensors], *scoring, *selection, num_dropped
    )
    return kept[0], kept[1:], *others


def window_attention(window: Window) -> torch.Tensor:
    return torch.ops.sdtp_native.window_attention.default(*window)  # type: ignore[no-any-return]


def prompt_bias(terms: PromptTerms) -> torch.Tensor:
    return torch.ops.sdtp_native.prompt_bias.default(*terms)  # type: ignore[no-any-return]


def position_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_visible: torch.Tensor,
    first_visible: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """A block of queries at a time, over the keys that one of them sees: half the products of a causal prompt.

    Blocks are cut from the row's end, so that they are the same in a left-padded row as in the row alone.
    """
    batch, _, num_queries, _ = query.shape
    output = torch.zeros_like(query)
    firsts = [0] * batch if first_visible is None else first_visible.clamp(min=0).tolist()
    for row, (first, visible) in enumerate(zip(firsts, num_visible.clamp(max=key.shape[2]).tolist(), strict=True)):
        padding = next((i for i, end in enumerate(visible) if end > first), num_queries)
        for stop in range(num_queries, padding, -_BLOCK_QUERIES):
            queries = slice(max(stop - _BLOCK_QUERIES, padding), stop)
            end = max(visible[queries])
            if end > first:  # torch's kernel divides by the number of keys
                output[row, :, queries] = F.scaled_dot_product_attention(
                    query[row : row + 1, :, queries],
                    key[row : row + 1, :, first:end],
                    value[row : row + 1, :, first:end],
                    attn_mask=torch.arange(first, end, device=query.device) < num_visible[row, queries, None],
                    scale=scale,
                    enable_gqa=True,
                )[0]
    return output
