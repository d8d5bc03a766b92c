"""The oracle: every op in plain PyTorch, written to be read beside the paper and never optimised.

Argument conventions, shapes and promises are those of :mod:`sdtp_kernels.ops`, which checks the arguments before any
backend sees them. Everything here is tensor arithmetic, so it runs on any device without a host sync.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

ATTENTION_FLOOR = 1e-9  # below every probability that matters, so that a logarithm of 0 stays finite


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
    group = torch.where(is_valid & ~is_tail, group, torch.iinfo(torch.int64).max)  # padding and tail: after all blocks
    order = by_value.gather(-1, group.gather(-1, by_value).argsort(dim=-1, stable=True))
    rank = torch.empty_like(order).scatter_(-1, order, column.expand_as(order)) - block * per_block

    is_kept = is_valid & (is_tail | (rank < quota))
    kept_columns = torch.where(is_kept, column, -1).sort(dim=-1).values
    return kept_columns[:, width - num_keep :].contiguous()


def gather_tokens(tensors: list[torch.Tensor], indices: torch.Tensor) -> list[torch.Tensor]:
    """Rows `indices` of every tensor along its token dimension; index -1 gives zeros."""
    gathered = []
    for tensor in tensors:
        # Token dimension first after the batch: [B, N, ...].
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
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scaling: float,
    pooling: int = 1,
) -> torch.Tensor:
    """Softmax per query, sum over queries, max-pooling per head, mean over heads, as in SnapKV.

    Rotation and product are in the dtype of `query` and the rest in float32: GPU backends run this as it stands.
    """
    if cos is not None and sin is not None:
        query = rotate(query, cos, sin)
    # Query heads that share a key head side by side, [B, kv_heads, groups * window, n]: one product for all of them.
    group, window = query.shape[1] // key.shape[1], query.shape[2]
    grouped = (query * scaling).unflatten(1, (-1, group)).flatten(2, 3)
    logits = (grouped @ key.transpose(-1, -2)).float().unflatten(2, (group, window)).flatten(1, 2)

    index = key_index[:, None]
    is_seen = (index >= 0) & (index <= query_index[..., None])
    # Not -inf: a query that sees nothing must not become NaN; it has no say in the sum.
    logits = logits.masked_fill(~is_seen[:, None], torch.finfo(torch.float32).min)
    has_a_say = is_seen.any(-1)[:, None, :, None]
    per_head = logits.softmax(-1).where(has_a_say, 0).sum(2)
    return _max_pool(per_head, pooling).mean(1)


def position_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_visible: torch.Tensor,
    first_visible: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention in float32 over the keys ``first_visible .. num_visible - 1`` of each query."""
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]  # query heads that share a key head stand side by side
    key, value = (t.to(wide).repeat_interleave(group, dim=1) for t in (key, value))
    if scale is None:
        scale = query.shape[-1] ** -0.5
    logits = scale * query.to(wide) @ key.mT

    column = torch.arange(key.shape[2], device=key.device)
    is_visible = column < num_visible[..., None]
    if first_visible is not None:
        is_visible &= column >= first_visible[:, None, None]
    is_visible = is_visible[:, None]
    # Not -inf: neither a query that sees no key nor its gradient may become NaN.
    weights = logits.masked_fill(~is_visible, torch.finfo(wide).min).softmax(-1).where(is_visible, 0)
    return torch.empty_like(query).copy_(weights @ value)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``[B, heads, n, d]`` by ``[B or 1, n, d]``, in halves of the head."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


def score_prompt_by(
    score_tokens: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    rms_eps: float | None,
    *terms: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``score_tokens`` of any backend, then :func:`add_terms`: for backends without a kernel for all of it."""
    return add_terms(score_tokens(hidden_states, w1, b1, w2, b2, None, rms_eps), *terms)


score_prompt = functools.partial(score_prompt_by, score_tokens)


def add_terms(
    scores: torch.Tensor,
    token_index: torch.Tensor,
    keep_last: int,
    distance_table: torch.Tensor,
    mean_score: torch.Tensor | None = None,
    num_scores: int = 0,
    attention: torch.Tensor | None = None,
    attention_weight: float = 0.0,
    query: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    scaling: float = 1.0,
    pooling: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a pruner's score is made of beside its MLP."""
    if mean_score is not None:
        scores = torch.lerp(mean_score, scores, 1 / (num_scores + 1))
    end = token_index.shape[1] - keep_last
    if query is not None and key is not None:
        last = slice(end - query.shape[2], end)
        cos, sin = (None if t is None else t[:, last] for t in (cos, sin))
        attention = window_attention(query, key, token_index[:, last], token_index, cos, sin, scaling, pooling)
    distance = token_index[:, end - 1 : end] - token_index if end > 0 else torch.full_like(token_index, -1)
    is_valid = (token_index >= 0) & (distance >= 0)
    bias = distance_table.take(distance.clamp(0, distance_table.shape[0] - 1))
    if attention is not None:
        bias = bias + attention_weight * standardized_log(attention, is_valid)
    return scores + bias.masked_fill(~is_valid, 0), scores


def standardized_log(attention: torch.Tensor, is_valid: torch.Tensor | None = None) -> torch.Tensor:
    """Logarithms with mean 0 and standard deviation 1 in each row, so that one weight fits every prompt length.

    Parameters
    ----------
    attention : Tensor [B, n]
        Not negative.
    is_valid : bool Tensor [B, n], optional
        The tokens that mean and deviation are taken over; all by default.

    Returns
    -------
    Tensor [B, n], float32
        Differentiable.
    """
    value = torch.log(attention.float() + ATTENTION_FLOOR)
    weight = torch.ones_like(value) if is_valid is None else is_valid.float()
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    centred = value - (value * weight).sum(-1, keepdim=True) / count
    spread = ((centred.square() * weight).sum(-1, keepdim=True) / count).sqrt()
    return centred / (spread + 1e-6)


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
