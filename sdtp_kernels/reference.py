"""The oracle: every op in plain PyTorch, written to be read beside the paper and never optimised.

Argument conventions, shapes and promises are those of :mod:`sdtp_kernels.ops`, which checks the arguments before any
backend sees them. Everything here is tensor arithmetic, so it runs on any device without a host sync.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def score_tokens(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    score_bias: torch.Tensor | None = None,
    rms_eps: float | None = None,
) -> torch.Tensor:
    """``w2 . GELU(w1 x + b1) + b2 (+ score_bias)``, SDTP equation (1), in float64."""
    x = hidden_states.double()
    if rms_eps is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + rms_eps)
    activation = F.gelu(F.linear(x, w1.double(), b1.double()))
    scores = activation @ w2.double() + b2.double()
    if score_bias is not None:
        scores = scores + score_bias
    return scores.float()


def select_tokens(
    scores: torch.Tensor,
    num_keep: int,
    sink: int = 0,
    recent: int = 0,
    block_size: int | None = None,
    rows: torch.Tensor | None = None,
    pooling: int = 1,
) -> torch.Tensor:
    """Keep the forced tokens, then the best scores of each block; see :func:`sdtp_kernels.select_tokens`."""
    batch, width = scores.shape
    if rows is None:
        length, keep, tail = (torch.full((batch, 1), n, device=scores.device) for n in (width, num_keep, recent))
    else:
        length, keep, tail = rows.to(torch.int64).unsqueeze(-1).unbind(1)

    # Rows are right-aligned: index in the row = column - padding of the row.
    column = torch.arange(width, device=scores.device)
    index = column - (width - length)
    is_valid = index >= 0
    is_tail = index >= length - tail

    # What stands before the tail is cut into blocks; without a block size it is one block.
    per_block = (length - tail).clamp(min=1) if block_size is None else torch.full_like(length, block_size)
    num_blocks = (length - tail) // per_block
    quota = (keep - tail) // num_blocks.clamp(min=1)
    block = index.clamp(min=0) // per_block
    is_forced = (index < sink) | (index % per_block == per_block - 1 if block_size is not None else False)

    # Max-pooling: the neighbours that count stand in the same block; NaN is below every number.
    reach = torch.arange(-(pooling // 2), pooling // 2 + 1, device=scores.device)
    neighbour = column.unsqueeze(-1) + reach
    is_inside = (neighbour >= 0) & (neighbour < width)
    neighbour = neighbour.clamp(0, width - 1)
    is_near = is_inside & (is_valid & ~is_tail)[:, neighbour] & (block[:, neighbour] == block.unsqueeze(-1))
    is_number = is_near & ~scores.isnan()[:, neighbour]
    value = torch.where(is_number, scores[:, neighbour], -torch.inf).amax(-1) + 0.0  # turns -0 into +0
    is_nan = ~is_number.any(-1)

    # Order inside a block: forced, then by value descending, then NaN; equal ones by index. Stable sorts from the last
    # criterion to the first do exactly that.
    by_value = value.argsort(dim=-1, descending=True, stable=True)
    group = 3 * block + torch.where(is_forced, 0, torch.where(is_nan, 2, 1))
    group = torch.where(is_valid & ~is_tail, group, torch.iinfo(torch.int64).max)  # padding and tail: behind all blocks
    order = by_value.gather(-1, group.gather(-1, by_value).argsort(dim=-1, stable=True))
    rank = torch.empty_like(order).scatter_(-1, order, column.expand_as(order)) - block * per_block

    is_kept = is_valid & (is_tail | (rank < quota))
    kept_columns = torch.where(is_kept, column, -1).sort(dim=-1).values
    return kept_columns[:, width - num_keep :].contiguous()


def gather_tokens(tensors: list[torch.Tensor], indices: torch.Tensor) -> list[torch.Tensor]:
    """Rows `indices` of every tensor along its token dimension; index -1 gives zeros."""
    gathered = []
    for tensor in tensors:
        # Token dimension first behind the batch: [B, N, ...].
        tokens = tensor.movedim(token_dim(tensor), 1)
        batch = torch.arange(indices.shape[0], device=indices.device).unsqueeze(-1)
        rows = tokens[batch, indices.clamp(min=0)]
        is_padding = (indices < 0).reshape(*indices.shape, *[1] * (rows.dim() - 2))
        rows = rows.masked_fill(is_padding, 0)
        gathered.append(rows.movedim(1, token_dim(tensor)).contiguous())
    return gathered


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
    """Score, select and gather, one after the other."""
    scores = score_tokens(hidden_states, w1, b1, w2, b2, score_bias, rms_eps)
    indices = select_tokens(scores, num_keep, sink, recent, block_size, rows, pooling)
    kept_hidden_states, *kept = gather_tokens([hidden_states, *tensors], indices)
    return kept_hidden_states, kept, indices


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    query_index: torch.Tensor,
    key_index: torch.Tensor,
    query_weight: torch.Tensor,
    scaling: float,
    pooling: int = 1,
) -> torch.Tensor:
    """Softmax per query, weighted sum over queries, max-pooling per head, mean over heads, as in SnapKV.

    The product is in the dtype of `query` and the rest in float32: GPU backends run this as it stands.
    """
    # Query heads that share a key head side by side, [B, kv_heads, groups * window, n]: one product for all of them.
    group, window = query.shape[1] // key.shape[1], query.shape[2]
    grouped = (query * scaling).unflatten(1, (-1, group)).flatten(2, 3)
    logits = (grouped @ key.transpose(-1, -2)).float().unflatten(2, (group, window)).flatten(1, 2)

    index = key_index[:, None]
    is_seen = (index >= 0) & (index <= query_index[..., None]) & (query_weight[..., None] != 0)
    # Not -inf: a query that sees nothing must not become NaN; it has no say in the sum.
    logits = logits.masked_fill(~is_seen[:, None], torch.finfo(torch.float32).min)
    weight = query_weight * is_seen.any(-1)
    per_head = (weight[:, None, None] @ logits.softmax(-1)).squeeze(2)
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


def unavailable_reason(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why this backend cannot run there; it always can."""
    return None


def token_dim(tensor: torch.Tensor) -> int:
    """Dimension of the tokens: 1 in ``[B, N]`` and ``[B, N, D]``, 2 in ``[B, heads, N, D]``."""
    return max(1, tensor.dim() - 2)
