"""The compiled CPU library: thin calls of ``csrc/bindings/cpu.cpp``."""

from __future__ import annotations

from typing import Any

import torch

from ._native import load_error

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu tensors, not on {device.type}"
    if dtype is not None and dtype not in _FLOATS:
        return f"computes in {', '.join(map(str, _FLOATS))}, not in {dtype}"
    return load_error("cpu")


def score_tokens(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    score_bias: torch.Tensor | None = None,
    rms_eps: float | None = None,
) -> torch.Tensor:
    return torch.ops.sdtp_native.score_tokens.default(  # type: ignore[no-any-return]
        hidden_states, w1, b1, w2, b2, score_bias, rms_eps
    )


def select_tokens(
    scores: torch.Tensor,
    num_keep: int,
    sink: int = 0,
    recent: int = 0,
    block_size: int | None = None,
    rows: torch.Tensor | None = None,
    pooling: int = 1,
) -> torch.Tensor:
    return torch.ops.sdtp_native.select_tokens.default(  # type: ignore[no-any-return]
        scores, num_keep, sink, recent, block_size, rows, pooling
    )


def gather_tokens(tensors: list[torch.Tensor], indices: torch.Tensor) -> list[torch.Tensor]:
    return torch.ops.sdtp_native.gather_tokens.default(tensors, indices)  # type: ignore[no-any-return]


def prune_tokens(
    hidden_states: torch.Tensor,
    tensors: list[torch.Tensor],
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    num_keep: int,
    sink: int = 0,
    recent: int = 0,
    block_size: int | None = None,
    rows: torch.Tensor | None = None,
    pooling: int = 1,
    score_bias: torch.Tensor | None = None,
    rms_eps: float | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    kept, indices = torch.ops.sdtp_native.prune_tokens.default(
        [hidden_states, *tensors], w1, b1, w2, b2,
        num_keep, sink, recent, block_size, rows, pooling, score_bias, rms_eps,
    )  # fmt: skip
    return kept[0], kept[1:], indices


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    query_index: torch.Tensor,
    key_index: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scaling: float,
    pooling: int = 1,
) -> torch.Tensor:
    return torch.ops.sdtp_native.window_attention.default(  # type: ignore[no-any-return]
        query, key, query_index, key_index, cos, sin, scaling, pooling
    )


def score_prompt(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    rms_eps: float | None,
    *terms: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.sdtp_native.score_prompt(  # type: ignore[no-any-return]
        hidden_states, w1, b1, w2, b2, rms_eps, *terms
    )
