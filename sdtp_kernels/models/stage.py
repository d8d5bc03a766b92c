"""What a pruning stage does with the tokens that arrive: score, select, gather.

:func:`prune` is the whole of it. :func:`_plan` asks the schedule for counts, :func:`_select` turns scores into indices
where rows are not all alike.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F

from .. import ops
from ..scorers import StageInput
from .cache import cached_keys
from .devices import from_first
from .family import family_of
from .scoring import Fused, RunningMean

if TYPE_CHECKING:
    from ..schedule import PruningSchedule
    from .chunks import Counts, Prefill, Segment


class _Selection(TypedDict):
    sink: int
    recent: int
    block_size: int | None
    rows: torch.Tensor | None


class LastQueries:
    """What a module makes of some of the tokens of its next call, in this thread: a layer's queries, taken on the way.

    A scorer that looks at the layer below wants its last queries: to project them again is to read the weights again.
    """

    def __init__(self, query_tap: torch.nn.Module, tokens: slice) -> None:
        self.value: torch.Tensor | None = None
        self._tokens, self._thread = tokens, threading.get_ident()
        self._hook = query_tap.register_forward_hook(self)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if threading.get_ident() == self._thread:
            self.value = output[:, self._tokens].detach().clone()  # not a view, which would hold all of them
            self.remove()

    def remove(self) -> None:
        self._hook.remove()


class Below(NamedTuple):
    """What a stage may see of the layer below: held over one layer, and only where a stage follows."""

    hidden_states: torch.Tensor
    queries: LastQueries | None

    @classmethod
    def of(cls, prefill: Prefill, layer_idx: int, hidden_states: torch.Tensor) -> Below | None:
        """Before the layer at `layer_idx` runs."""
        if layer_idx + 1 not in prefill.schedule.layers:
            return None
        end = hidden_states.shape[1] - prefill.chunk.keep_last
        wanted = prefill.handle.scorers[layer_idx + 1].num_queries
        if not wanted or end <= 0 or torch.compiler.is_compiling():
            return cls(hidden_states, None)
        layer = prefill.decoder.layers[layer_idx]
        tap = family_of(layer).query_tap(layer.self_attn)
        return cls(hidden_states, LastQueries(tap, slice(max(end - wanted, 0), end)))


def prune(
    prefill: Prefill, counts: Counts, layer_idx: int, hidden_states: torch.Tensor, segment: Segment, below: Below | None
) -> tuple[torch.Tensor, Segment, torch.Tensor]:
    """The tokens that go into layer `layer_idx`, their segment, and their indices among those that arrived."""
    handle, group, chunk = prefill.handle, prefill.handle.group, prefill.chunk
    stage, device, backend = prefill.schedule.layers.index(layer_idx) + 1, hidden_states.device, handle.backend
    scorer = handle.scorers[layer_idx].ready(hidden_states)
    has_joined = stage == 1 and prefill.earlier is not None
    queries = None if below is None or below.queries is None else below.queries.value
    keys = None
    if prefill.completed is not None and prefill.completed.computed_keys is not None:
        keys = prefill.completed.computed_keys
    elif prefill.earlier is None:
        keys = cached_keys(prefill.cache, layer_idx - 1, hidden_states.shape[1])
    cos, sin = (t.to(device) for t in segment.position_embeddings)
    index = segment.token_index.to(device)
    is_protected = None if segment.is_protected is None else segment.is_protected.to(device)
    segment = segment._replace(token_index=index, is_protected=is_protected)
    stage_input = StageInput(
        hidden_states,
        (cos, sin),
        index,
        chunk.keep_last,
        prefill.decoder.layers[layer_idx - 1],
        None if below is None or has_joined else below.hidden_states.to(device),
        None if queries is None or has_joined else queries.to(device),
        keys,
        prefill.prompt,
        group=group,
        backend=backend,
    )
    # Every row has positions of its own from here on.
    batch = hidden_states.shape[0]
    carried = [*(t.expand(batch, -1, -1) for t in (cos, sin)), index]
    arrived = hidden_states, segment
    if is_protected is not None:
        carried.append(is_protected)
    is_simple = not chunk.is_ragged or (prefill.earlier is None and is_protected is None)
    is_simple = is_simple and group is None and len(prefill.groups) == 1
    if isinstance(scorer, Fused) and is_simple:
        num_keep, selection = _plan(prefill, counts, prefill.schedule, stage, device)
        hidden_states, (cos, sin, index), indices, mean_score, dropped = ops.prune_tokens(
            hidden_states, carried, *scorer.weights, num_keep, **selection, **scorer.averaged(segment.running_mean),
            pooling=scorer.pooling, score_bias=scorer.bias(stage_input), rms_eps=scorer.rms_eps,
            num_dropped=_num_dropped(prefill, counts, stage, hidden_states.shape[1], num_keep), backend=backend,
        )  # fmt: skip
        running_mean = scorer.next_mean(mean_score, segment.running_mean)
        is_protected = None
    else:
        scores, running_mean = scorer.score(stage_input, segment.running_mean, backend)
        indices = from_first(_select(prefill, counts, scores, stage, scorer.pooling, segment), group)
        num_dropped = _num_dropped(prefill, counts, stage, hidden_states.shape[1], indices.shape[1])
        dropped = _dropped(indices, index, num_dropped)
        if running_mean is not None:
            carried.append(running_mean.score)
        hidden_states, cos, sin, index, *others = ops.gather_tokens([hidden_states, *carried], indices, backend=backend)
        if running_mean is not None:
            running_mean = RunningMean(others.pop(), running_mean.number)
        is_protected = others[0] if others else None
    if dropped.shape[1]:
        assert prefill.completed is not None
        prefill.completed.drop(layer_idx, *arrived, dropped)
    if chunk.is_ragged:
        index = torch.where(indices < 0, -1, index)  # a gather leaves zeros in padding, and 0 is a token
    segment = segment._replace(
        position_embeddings=(cos, sin), token_index=index, is_protected=is_protected, running_mean=running_mean
    )
    return hidden_states, segment, indices


def _num_dropped(prefill: Prefill, counts: Counts, stage: int, num_arrived: int, num_kept: int) -> int:
    """How many tokens a row drops at most; 0 where nobody asks for them."""
    if prefill.completed is None:
        return 0
    if prefill.chunk.is_ragged:
        return max(own.max_dropped(counts.length, stage) for _, own in prefill.groups)
    return num_arrived - num_kept


def _dropped(indices: torch.Tensor, token_index: torch.Tensor, most: int) -> torch.Tensor:
    """The `most` tokens ``[B, n]`` that are not among `indices`, ascending, after as many -1 as are missing."""
    batch, width = token_index.shape
    if most == 0:
        return indices.new_empty(batch, 0)
    is_kept = torch.zeros(batch, width + 1, dtype=torch.bool, device=indices.device)
    is_kept = is_kept.scatter(1, indices + 1, torch.ones_like(indices, dtype=torch.bool))[:, 1:]
    is_dropped = ~is_kept & (token_index >= 0)
    order = is_dropped.int().argsort(dim=-1, stable=True)[:, width - most :]
    return torch.where(is_dropped.gather(1, order), order, -1)


def _plan(
    prefill: Prefill,
    counts: Counts,
    schedule: PruningSchedule,
    stage: int,
    device: torch.device,
    rows: list[int] | None = None,
) -> tuple[int, _Selection]:
    """Arguments of a selection for all rows, or for those that share this schedule."""
    keep_last, by_row = prefill.chunk.keep_last, None
    plan = schedule.plan(counts.length, stage, keep_last, padded=prefill.chunk.is_ragged, finished=counts.finished)
    if prefill.leaves_out:
        plan = plan._replace(num_keep=plan.num_keep - plan.recent, recent=0)
    if counts.lengths is not None:
        assert counts.lengths_finished is not None
        own = slice(None) if rows is None else rows
        finished = None if prefill.earlier is None else counts.lengths_finished.to(device)[own]
        by_row = schedule.plan_rows(counts.lengths.to(device)[own], stage, keep_last, finished)
    return plan.num_keep, {
        "sink": plan.sink,
        "recent": plan.recent,
        "block_size": plan.block_size,
        "rows": by_row,
    }


def _select(
    prefill: Prefill, counts: Counts, scores: torch.Tensor, stage: int, pooling: int, segment: Segment
) -> torch.Tensor:
    """Indices ``[B, K]`` of the tokens that go on, where rows are not all alike."""
    width, order, backend, is_protected = scores.shape[1], None, prefill.handle.backend, segment.is_protected
    if is_protected is not None:
        # The schedule sees the row without its protected tokens.
        is_counted = (segment.token_index >= 0) & ~is_protected
        order = is_counted.int().argsort(dim=-1, stable=True)[:, counts.least_protected :]
        scores = scores.gather(1, order)
    parts = []
    for rows, schedule in prefill.groups:
        own = slice(None) if rows is None else rows
        num_keep, selection = _plan(prefill, counts, schedule, stage, scores.device, rows)
        chosen = ops.select_tokens(scores[own], num_keep, **selection, pooling=pooling, backend=backend)
        if prefill.earlier is not None and counts.lengths_finished is not None:  # only some rows have their sink here
            selection["sink"] = 0
            later = ops.select_tokens(scores[own], num_keep, **selection, pooling=pooling, backend=backend)
            has_sink = counts.lengths_finished.to(scores.device)[own].unsqueeze(-1) == 0
            chosen = torch.where(has_sink, chosen, later)
        parts.append(chosen)
    indices = parts[0]
    if len(parts) > 1:
        widest = max(part.shape[1] for part in parts)
        indices = indices.new_empty(scores.shape[0], widest)
        for (rows, _), part in zip(prefill.groups, parts, strict=True):
            indices[rows] = F.pad(part, (widest - part.shape[1], 0), value=-1)
    if order is None or is_protected is None:
        return indices
    indices = torch.where(indices < 0, -1, order.gather(1, indices.clamp(min=0)))
    columns = torch.arange(width, device=scores.device)
    protected = torch.where(is_protected, columns, -1).sort(dim=-1).values[:, -counts.most_protected :]
    both = torch.cat([indices, protected], dim=-1).sort(dim=-1).values
    return both[:, max(0, both.shape[1] - width) :]
