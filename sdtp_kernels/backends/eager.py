"""Last-window attention in a few fast steps of torch, for windows that are too large for a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import reference


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
    """Rotation and product are in the dtype of `query` and the rest in float32."""
    if cos is not None and sin is not None:
        query = reference.rotate(query, cos, sin)
    # Query heads that share a key head side by side, [B, kv_heads, groups * window, n]: one product for all of them.
    group, window = query.shape[1] // key.shape[1], query.shape[2]
    grouped = (query * scaling).unflatten(1, (-1, group)).flatten(2, 3)
    logits = (grouped @ key.transpose(-1, -2)).float().unflatten(2, (group, window)).flatten(1, 2)

    index = key_index[:, None]
    is_seen = (index >= 0) & (index <= query_index[..., None])
    logits = logits.masked_fill(~is_seen[:, None], torch.finfo(torch.float32).min)
    has_a_say = is_seen.any(-1)[:, None, :, None]
    per_head = logits.softmax(-1).where(has_a_say, 0).sum(2)
    return _max_pool(per_head, pooling).mean(1)


def _max_pool(values: torch.Tensor, width: int) -> torch.Tensor:
    """Maximum of each value, none negative, and its `width` - 1 neighbours along the last dimension."""
    # Not F.max_pool1d, which would tie a compiled graph to one length; nor by unfolding, which takes 4 to 7 times as
    # long: the maximum of two maxima reaches twice as far.
    pooled = F.pad(values, (width // 2,) * 2)
    reach = 1
    while reach < width:
        step = min(reach, width - reach)
        pooled = torch.maximum(pooled[..., :-step], pooled[..., step:])
        reach += step
    return pooled
