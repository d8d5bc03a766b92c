"""The oracle: every op in plain PyTorch, written to be read beside the paper and never optimised.

Arguments, shapes and promises are those of :mod:`sdtp_kernels.ops`, which checks the arguments before any backend sees
them. Everything here is tensor arithmetic, so it runs on any device without a host sync.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .arguments import PromptTerms, Scoring, Selection, Window, token_dim

ATTENTION_FLOOR = 1e-9  # below every probability that matters, so that a logarithm of 0 stays finite


def score_tokens(hidden_states: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """``w2 . GELU(w1 x + b1) + b2``, SDTP equation (1), in float64; averaged over the stages, and the bias added."""
    x = hidden_states.double()
    if scoring.rms_eps is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + scoring.rms_eps)
    activation = F.gelu(F.linear(x, scoring.w1.double(), scoring.b1.double()))
    scores = activation @ scoring.w2.double() + scoring.b2.double()
    if scoring.mean_score is not None:
        scores = scoring.mean_score + (scores - scoring.mean_score) / (scoring.num_scores + 1)
    if scoring.score_bias is not None:
        scores = scores + scoring.score_bias
    return scores.float()


def select_tokens(scores: torch.Tensor, selection: Selection) -> torch.Tensor:
    """Keep the forced tokens, then the best scores of each block; see :func:`sdtp_kernels.select_tokens`."""
    is_kept, _, _ = _kept(scores, selection)
    return _columns(is_kept, selection.num_keep)


def _kept(scores: torch.Tensor, selection: Selection) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which tokens ``[B, N]`` are kept, which of them without being ranked, and which are no padding."""
    num_keep, sink, recent, block_size, rows, pooling = selection
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

    return is_valid & (is_tail | (rank < quota)), is_valid & is_tail, is_valid


def _columns(mask: torch.Tensor, width: int) -> torch.Tensor:
    """The last `width` columns where `mask` ``[B, N]`` holds, ascending; -1 where there are fewer."""
    columns = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).sort(dim=-1).values
    return columns[:, mask.shape[1] - width :].contiguous()


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
    hidden_states: torch.Tensor, tensors: list[torch.Tensor], scoring: Scoring, selection: Selection, num_dropped: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, select and gather, one after the other."""
    is_kept, is_tail, is_valid = _kept(score_tokens(hidden_states, scoring), selection)
    indices = _columns(is_kept, selection.num_keep)
    mean = score_tokens(hidden_states, scoring._replace(score_bias=None))
    mean = torch.where(is_tail, 0 if scoring.mean_score is None else scoring.mean_score, mean)
    kept_hidden_states, *kept, kept_mean = gather_tokens([hidden_states, *tensors, mean], indices)
    return kept_hidden_states, kept, indices, kept_mean, _columns(is_valid & ~is_kept, num_dropped)


def window_attention(window: Window) -> torch.Tensor:
    """Softmax per query, sum over queries, max-pooling per head, mean over heads, as in SnapKV, in float64."""
    query, key, query_index, key_index, cos, sin, scaling, pooling = window
    query = query.double()
    if cos is not None and sin is not None:
        query = rotate(query, cos.double(), sin.double())
    group = query.shape[1] // key.shape[1]  # query heads that share a key head stand side by side
    logits = scaling * query @ key.double().repeat_interleave(group, dim=1).mT

    index = key_index[:, None, None]
    is_seen = (index >= 0) & (index <= query_index[:, None, :, None])
    # Not -inf: a query that sees nothing must not become NaN; it has no say in the sum.
    weights = logits.masked_fill(~is_seen, torch.finfo(torch.float32).min).softmax(-1)
    per_head = weights.where(is_seen.any(-1, keepdim=True), 0).sum(2)
    padded = F.pad(per_head, (pooling // 2, pooling // 2))
    pooled = torch.stack([padded[..., i : i + key.shape[2]] for i in range(pooling)]).amax(0)
    return pooled.mean(1).float()


def prompt_bias(terms: PromptTerms) -> torch.Tensor:
    """The distance term, and the standardised logarithm of the last queries' attention."""
    index, attention, end = terms.token_index, terms.attention, terms.end
    if terms.window is not None:
        attention = window_attention(terms.window)
    distance = index[:, end - 1 : end] - index if end > 0 else torch.full_like(index, -1)
    is_valid = (index >= 0) & (distance >= 0)
    table = terms.distance_table.expand(len(index), -1)
    bias = table.gather(1, distance.clamp(0, table.shape[1] - 1))
    if attention is not None:
        bias = bias + terms.attention_weight * standardized_log(attention, is_valid)
    return bias.masked_fill(~is_valid, 0)


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


def unavailable_reason(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why this backend cannot run there; it always can."""
    return None
