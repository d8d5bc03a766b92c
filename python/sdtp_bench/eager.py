"""The pruning step as people write it in PyTorch: what the fused op is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdtp_bench.shapes import Stage
    from sdtp_kernels.schedule import StagePlan


def prune_tokens(
    stage: Stage, plan: StagePlan, pooling: int = 1, copy: Callable[..., torch.Tensor] | None = None
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Norm, linear, GELU, linear, mean, bias, topk, sort and gather, in the model's dtype.

    Rows have no padding. Near ties may fall otherwise than in the op: scores are rounded to the model's dtype, and
    ``topk`` promises no order of equal values.

    Parameters
    ----------
    stage : Stage
        All in one dtype, as the parts of a model are; see :func:`in_one_dtype`.
    plan : StagePlan
    pooling : int, default 1
    copy : callable, optional
        Of a tensor and indices ``[B, K]``: its rows. :func:`gather_rows` by default.

    Returns
    -------
    hidden_states, tensors, indices
        The first three of :func:`sdtp_kernels.prune_tokens`.
    """
    hidden_states, tensors, (w1, b1, w2, b2, mean_score, num_scores, score_bias, rms_eps) = stage
    batch, tokens, hidden_size = hidden_states.shape
    x = hidden_states if rms_eps is None else F.rms_norm(hidden_states, (hidden_size,), eps=rms_eps)
    scores = F.linear(F.gelu(F.linear(x, w1, b1)), w2.unsqueeze(0), b2.unsqueeze(0)).squeeze(-1)
    if mean_score is not None:
        scores = torch.lerp(mean_score, scores, 1 / (num_scores + 1))
    if score_bias is not None:
        scores = scores + score_bias
    ranked = ranked_blocks(scores, plan, pooling)
    _, blocks, size = ranked.shape
    best = ranked.topk((plan.num_keep - plan.recent) // max(blocks, 1)).indices
    if plan.block_size:
        best = best + torch.arange(0, blocks * size, size, device=best.device).unsqueeze(-1)
    tail = torch.arange(tokens - plan.recent, tokens, device=best.device).expand(batch, -1)
    indices = torch.cat([best.flatten(1).sort().values, tail], dim=1)
    copy = copy or gather_rows
    kept = [copy(tensor, indices) for tensor in (hidden_states, *tensors)]
    return kept[0], kept[1:], indices


def gather_rows(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """As people write it: ``gather`` by an index that is expanded to every element of a row."""
    index = indices if tensor.dim() == 2 else indices.unsqueeze(-1).expand(-1, -1, tensor.shape[2])
    return tensor.gather(1, index)


def copy_rows(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """As one writes it after a profile: ``index_select``, which copies whole rows, one row of the batch at a time."""
    copies = tensor.new_empty(*indices.shape, *tensor.shape[2:])
    for row, of_row, copy in zip(tensor, indices, copies, strict=True):
        torch.index_select(row, 0, of_row, out=copy)
    return copies


def ranked_blocks(scores: torch.Tensor, plan: StagePlan, pooling: int) -> torch.Tensor:
    """What the tokens before the tail rank by: pooled in their block, forced ones at infinity.

    Parameters
    ----------
    scores : Tensor [B, N]
        Without NaN. May be written to.
    plan : StagePlan
    pooling : int

    Returns
    -------
    Tensor [B, blocks, tokens of a block]
    """
    batch, tokens = scores.shape
    body = tokens - plan.recent
    size = plan.block_size or max(body, 1)
    values = scores[:, :body].reshape(-1, size)
    if pooling > 1:
        values = F.max_pool1d(values.unsqueeze(1), pooling, stride=1, padding=pooling // 2).squeeze(1)
    values = values.view(batch, body // size, size)
    values[:, :1, : plan.sink].fill_(torch.inf)
    if plan.block_size:
        values[:, :, -1].fill_(torch.inf)
    return values


def in_one_dtype(stage: Stage) -> Stage:
    """The stage with everything in the dtype of the hidden states, as ``model.to(dtype)`` leaves it."""
    dtype = stage.hidden_states.dtype
    fields: dict[str, Any] = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in stage.scoring._asdict().items()
    }
    return stage._replace(scoring=stage.scoring._replace(**fields))
