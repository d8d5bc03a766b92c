"""The attention of one layer, computed again from its input: what fused kernels do not tell."""

from __future__ import annotations

from typing import Any

import torch

from sdtp_kernels.models.family import family_of
from sdtp_kernels.reference import rotate

ALL = slice(None)


def probabilities(
    layer: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    rows: slice = ALL,
) -> torch.Tensor:
    """Causal attention of some rows of a batch without padding, ``[B, heads, rows, n]``, float32.

    Parameters
    ----------
    layer : Module
        A decoder layer of a supported family.
    hidden_states : Tensor [B, n, D]
        Its input.
    position_embeddings : tuple of Tensor [1 or B, n, head_dim]
        cos and sin.
    rows : slice
        The queries; all by default.
    """
    family, (cos, sin) = family_of(layer), position_embeddings
    query = rotate(family.queries(layer, hidden_states[:, rows]), cos[:, rows], sin[:, rows])
    key = rotate(family.keys(layer, hidden_states), cos, sin)
    position = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    return softmax(query, key, position <= position[rows, None], layer.self_attn.scaling)


def softmax(query: torch.Tensor, key: torch.Tensor, is_visible: torch.Tensor, scaling: float) -> torch.Tensor:
    """Of rotated queries ``[B, heads, m, d]`` and keys ``[B, kv_heads, n, d]``: ``[B, heads, m, n]``, float32.

    NaN where a query sees nothing: `is_visible` ``[m, n]`` or ``[B, 1, m, n]``.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # query heads that share a key head side by side
    logits: torch.Tensor = (grouped @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2).float() * scaling
    return logits.masked_fill(~is_visible, -torch.inf).softmax(-1)
