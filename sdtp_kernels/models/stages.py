"""What happens at a pruning stage, for any decoder whose layers look like Qwen2's.

A prompt enters every layer through :class:`Prompt`, which prunes where a stage stands. Between two stages lies a
:class:`Segment`: layers that see the same tokens and share one mask.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from transformers.masking_utils import create_causal_mask

from .. import ops
from ..scorers import StageInput
from .attention import Visibility, see_cached, see_prompt
from .cache import PrunedState, Waiting, cached_keys, evict, install, is_growing, pruned_layer, waiting_layer
from .devices import from_first
from .report import SdtpHandle, new_recorder
from .scoring import Fused, Opinion, Scorer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers.cache_utils import Cache

    from ..schedule import PruningSchedule
    from .settings import Current, Settings


MASK_IS_MISSING = "this cache holds a padded batch: pass the attention_mask of the prompt and the new tokens"


class Pruning(NamedTuple):
    """What :func:`sdtp_kernels.apply_sdtp` was given, in the form that the loop uses."""

    schedule: PruningSchedule
    scorers: dict[int, Scorer]
    backend: str
    handle: SdtpHandle
    current: Current
    later_turns: bool
    evict_earlier_kv: bool
    group: ProcessGroup | None
    """The processes of tensor parallelism; ``None`` for one alone."""


class _Selection(TypedDict):
    sink: int
    recent: int
    block_size: int | None
    rows: torch.Tensor | None


class Segment(NamedTuple):
    """The layers between two stages: they see the same tokens."""

    stage: int
    visibility: Visibility
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    position_ids: torch.Tensor | None
    token_index: torch.Tensor
    """``[B, n]`` index of each token in the row's own prompt, -1 for padding."""
    is_protected: torch.Tensor | None = None
    """``[B, n]`` bool; ``None`` where no token is protected."""
    opinion: Opinion | None = None


class Piece(NamedTuple):
    """What part of a prompt a call reads: all of it, a chunk, a later turn."""

    columns: int
    """Columns of the prompt up to the end of this piece."""
    keep_last: int
    """The last of them that stand behind the prompt: they are never pruned."""
    is_padded: bool
    """Whether a row may have padding, here or in an earlier piece."""
    is_ragged: bool
    """Whether rows may keep different counts: for padding, for settings of their own, for protected tokens."""
    is_last: bool
    """Whether this piece's logits are wanted, rather than the cache alone."""


class LastQueries:
    """What a layer's ``q_proj`` makes of some of the tokens of its next call, in this thread.

    A scorer that looks at the layer below wants its last queries: to project them anew is to read the weights again.
    """

    def __init__(self, q_proj: torch.nn.Module, tokens: slice) -> None:
        self.value: torch.Tensor | None = None
        self._tokens, self._thread = tokens, threading.get_ident()
        self._handle = q_proj.register_forward_hook(self)

    def __call__(self, q_proj: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if threading.get_ident() == self._thread:
            self._handle.remove()
            self.value = output[:, self._tokens].detach().clone()  # not a view, which would hold all of them


class Prompt:
    """A piece of a prompt on its way through the stages; :mod:`~sdtp_kernels.models.cache` says how pieces join."""

    def __init__(
        self,
        decoder: Any,
        pruning: Pruning,
        settings: Settings,
        cache: Cache | None,
        piece: Piece,
        inputs_embeds: torch.Tensor,
    ) -> None:
        self.decoder, self.pruning, self.cache, self.piece = decoder, pruning, cache, piece
        self.groups, self.protected = settings.groups(inputs_embeds.shape[0]), settings.protected
        self.schedule = schedule = self.groups[0][1]
        """That of all rows where they are alike; layers, budget and block size are always the same."""
        self.first_layer = schedule.layers[0]
        self.earlier = waiting_layer(cache, self.first_layer)
        self.may_go_on = (
            schedule.budget == "block" and cache is not None and is_growing(cache) and not pruning.evict_earlier_kv
        )
        self.keeps_waiting = self.may_go_on and (pruning.later_turns or not piece.is_last)
        # Ragged rows finish blocks at different times, which the host does not know: they never fall behind.
        self.is_behind = self.may_go_on and not piece.is_last and not piece.is_ragged
        # Set where the prompt arrives at the first stage: of ragged rows by row, on their device, otherwise here.
        self.length = self.num_waiting = self.num_finished_before = 0
        self.lengths: torch.Tensor | None = None
        self.finished_before: torch.Tensor | None = None
        self.finished: torch.Tensor | None = None
        self.counted: torch.Tensor | None = None
        self.least_protected = self.most_protected = 0
        self.waiting: Waiting | None = None
        self.indices: torch.Tensor | None = None
        self.hidden_states_below: torch.Tensor | None = None
        self.queries_below: LastQueries | None = None
        self.recorder = None
        is_captured = inputs_embeds.is_cuda and torch.cuda.is_current_stream_capturing()
        if not (torch.compiler.is_compiling() or is_captured):  # a graph has no clock
            self.recorder = new_recorder(decoder, pruning.backend, inputs_embeds)

    def enter(self, layer_idx: int, hidden_states: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, Segment]:
        """What goes into layer `layer_idx`: pruned where a stage stands before it, after what has waited there."""
        schedule = self.schedule
        tokens_in, begin, end = hidden_states.shape[1], None, None
        layer, is_changed = None, False
        if self.earlier is not None and layer_idx >= self.first_layer:
            layer = pruned_layer(self.cache, layer_idx)
        if layer is not None:
            layer.drop_waiting(self.pruning.backend)
        if layer_idx in schedule.layers:
            stage, entered = schedule.layers.index(layer_idx) + 1, segment
            if stage == 1:
                hidden_states, segment = self._join(hidden_states, segment)
            if any(own.drops(stage) for _, own in self.groups):
                begin = self.recorder.now() if self.recorder else None
                hidden_states, segment = self._prune(layer_idx, stage, hidden_states, segment)
                end = self.recorder.now() if self.recorder else None
            is_changed = segment.token_index is not entered.token_index  # other tokens than in the layer below
            if is_changed:
                segment = segment._replace(stage=stage, position_ids=None)
        if segment.stage > 0 and self.cache is not None:
            if layer is None:
                layer = install(self.cache, layer_idx, segment.token_index[:, :0])
            self._hold(layer_idx, layer, segment)
            if self.pruning.evict_earlier_kv and self.indices is not None:
                evict(self.cache, layer_idx, layer, self.indices, self.pruning.backend)
                self.indices = None
                if self.recorder:
                    self.recorder.evict(hidden_states.shape[1])
        if is_changed:  # behind the above: a static layer has its size now
            segment = segment._replace(visibility=self._see(layer_idx, hidden_states, segment, layer))
        if self.recorder:
            self.recorder.layer(tokens_in, hidden_states.shape[1], begin, end)
        # Held over one layer, and only where a stage follows that may look at them.
        self.hidden_states_below = self.queries_below = None
        if layer_idx + 1 in schedule.layers:
            self.hidden_states_below = hidden_states
            end, wanted = hidden_states.shape[1] - self.piece.keep_last, self.pruning.scorers[layer_idx + 1].num_queries
            if wanted and end > 0 and not torch.compiler.is_compiling():
                q_proj = self.decoder.layers[layer_idx].self_attn.q_proj
                self.queries_below = LastQueries(q_proj, slice(max(end - wanted, 0), end))
        return hidden_states, segment

    def leave(self) -> None:
        if self.recorder:
            self.recorder.finish()
            self.pruning.handle.record(self.recorder)

    def _join(self, hidden_states: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, Segment]:
        """At the first stage: what waited comes before what arrives. What is unfinished then waits, again or anew."""
        columns, keep_last, is_padded, is_ragged, _ = self.piece
        assert segment.position_ids is not None
        # With a device_map, a stage runs where the layer below left its output: only what is kept moves on.
        device = hidden_states.device
        index, position_ids = segment.token_index.to(device), segment.position_ids.to(device)
        is_protected = torch.zeros_like(index, dtype=torch.bool)
        if self.protected is not None:
            past = columns - index.shape[1]
            is_protected = self.protected.look_up(index, past)
            is_protected[:, index.shape[1] - keep_last :] = False  # these are kept in any case
            self.least_protected, self.most_protected = self.protected.bounds(
                past, index.shape[1] - keep_last, is_padded
            )
        tokens = Waiting(hidden_states, position_ids.expand(index.shape), index, is_protected)
        if self.earlier is not None:
            assert self.earlier.waiting is not None
            tokens = self.earlier.waiting.followed_by(tokens)
            self.least_protected, self.most_protected = 0, self.most_protected + self.earlier.most_protected
            if is_ragged:  # both begin with padding
                order = (tokens.token_index >= 0).int().argsort(dim=-1, stable=True)
                tokens = Waiting(*ops.gather_tokens(tokens, order, backend=self.pruning.backend))
        width = tokens.token_index.shape[1]
        if is_ragged:
            self._count_rows(tokens)
            longest = max(schedule.max_unfinished for _, schedule in self.groups)
            self.num_waiting = min(width, longest + keep_last + self.most_protected)
        else:
            self.length, self.num_finished_before = columns - keep_last, columns - width
            self.num_waiting = self.schedule.num_recent(self.length, self.num_finished_before) + keep_last
        if self.keeps_waiting:
            # Copies: a view would keep the whole prompt alive.
            self.waiting = tokens.each(lambda t: t[:, width - self.num_waiting :].clone())
            if self.finished is not None:
                index = self.waiting.token_index
                self.waiting = self.waiting._replace(token_index=torch.where(index < self.finished, -1, index))
        segment = segment._replace(is_protected=tokens.is_protected if self.most_protected else None)
        if self.is_behind:
            tokens = tokens.each(lambda t: t[:, : width - self.num_waiting])
        elif self.earlier is None:
            return hidden_states, segment._replace(stage=int(self.may_go_on))
        embeddings = self.decoder.rotary_emb(tokens.hidden_states, tokens.position_ids)
        return tokens.hidden_states, segment._replace(
            stage=1, position_embeddings=embeddings, token_index=tokens.token_index
        )

    def _count_rows(self, tokens: Waiting) -> None:
        """What the schedule wants to know of every row, on the device. Protected tokens are no part of its prompt."""
        keep_last, is_valid = self.piece.keep_last, tokens.token_index >= 0
        is_counted = is_valid & ~tokens.is_protected
        so_far = tokens.token_index[:, -1] + 1
        before = so_far - is_valid.sum(-1)
        if self.earlier is not None and self.earlier.counted is not None:
            before = self.earlier.counted[:, 0]
        self.length = tokens.token_index.shape[1] - keep_last - self.least_protected
        self.finished_before, self.lengths = before, before + is_counted.sum(-1) - keep_last
        unfinished = torch.empty_like(before)
        for rows, schedule in self.groups:
            own = slice(None) if rows is None else rows
            unfinished[own] = schedule.num_recent(self.lengths[own], before[own])
        self.counted = (self.lengths - unfinished).unsqueeze(-1)
        # A token waits where no fewer counted tokens stand before it than the finished blocks have.
        place = before.unsqueeze(-1) + is_counted.cumsum(-1) - is_counted.long()
        num_waiting = (is_valid & (place >= self.counted)).sum(-1)
        self.finished = (so_far - num_waiting).unsqueeze(-1)

    def _prune(
        self, layer_idx: int, stage: int, hidden_states: torch.Tensor, segment: Segment
    ) -> tuple[torch.Tensor, Segment]:
        backend, scorer, group = self.pruning.backend, self.pruning.scorers[layer_idx], self.pruning.group
        device, below, queries = hidden_states.device, self.hidden_states_below, self.queries_below
        has_waited = stage == 1 and self.earlier is not None
        cos, sin = (t.to(device) for t in segment.position_embeddings)
        index = segment.token_index.to(device)
        if segment.is_protected is not None:
            segment = segment._replace(is_protected=segment.is_protected.to(device))
        segment = segment._replace(token_index=index)
        stage_input = StageInput(
            hidden_states,
            (cos, sin),
            index,
            self.piece.keep_last,
            self.decoder.layers[layer_idx - 1],
            None if below is None or has_waited else below.to(device),
            None if queries is None or queries.value is None or has_waited else queries.value.to(device),
            None if self.earlier is not None else cached_keys(self.cache, layer_idx - 1, hidden_states.shape[1]),
            group=group,
            backend=backend,
        )
        # Every row has positions of its own from here on.
        batch = hidden_states.shape[0]
        carried = [*(t.expand(batch, -1, -1) for t in (cos, sin)), index]
        if segment.is_protected is not None:
            carried.append(segment.is_protected)
        is_simple = not self.piece.is_ragged or (self.earlier is None and segment.is_protected is None)
        is_simple = is_simple and group is None and len(self.groups) == 1
        if isinstance(scorer, Fused) and scorer.is_alone and is_simple:
            num_keep, selection = self._plan(self.schedule, stage, device)
            hidden_states, (cos, sin, index), indices = ops.prune_tokens(
                hidden_states, carried, *scorer.weights, num_keep, **selection, pooling=scorer.pooling,
                rms_eps=scorer.rms_eps, backend=backend,
            )  # fmt: skip
            is_protected, opinion = None, None
        else:
            scores, opinion = scorer.score(stage_input, segment.opinion, backend)
            indices = from_first(self._select(scores, stage, scorer.pooling, segment), group)
            if opinion is not None:
                carried.append(opinion.mean_score)
            hidden_states, cos, sin, index, *others = ops.gather_tokens(
                [hidden_states, *carried], indices, backend=backend
            )
            if opinion is not None:
                opinion = Opinion(others.pop(), opinion.number)
            is_protected = others[0] if others else None
        if self.piece.is_ragged:
            index = torch.where(indices < 0, -1, index)  # a gather leaves zeros in padding, and 0 is a token
        self.indices = indices
        return hidden_states, segment._replace(
            position_embeddings=(cos, sin), token_index=index, is_protected=is_protected, opinion=opinion
        )

    def _plan(
        self, schedule: PruningSchedule, stage: int, device: torch.device, rows: list[int] | None = None
    ) -> tuple[int, _Selection]:
        """Arguments of a selection for all rows, or for those that share this schedule."""
        keep_last, counts = self.piece.keep_last, None
        plan = schedule.plan(
            self.length, stage, keep_last, padded=self.piece.is_ragged, finished=self.num_finished_before
        )
        if self.is_behind:
            plan = plan._replace(num_keep=plan.num_keep - plan.recent, recent=0)
        if self.lengths is not None:
            assert self.finished_before is not None
            own = slice(None) if rows is None else rows
            finished = None if self.earlier is None else self.finished_before.to(device)[own]
            counts = schedule.plan_rows(self.lengths.to(device)[own], stage, keep_last, finished)
        return plan.num_keep, {
            "sink": plan.sink,
            "recent": plan.recent,
            "block_size": plan.block_size,
            "rows": counts,
        }

    def _select(self, scores: torch.Tensor, stage: int, pooling: int, segment: Segment) -> torch.Tensor:
        """Indices ``[B, K]`` of the tokens that go on, where rows are not all alike."""
        width, order = scores.shape[1], None
        if segment.is_protected is not None:
            # The schedule sees the row without its protected tokens.
            is_counted = (segment.token_index >= 0) & ~segment.is_protected
            order = is_counted.int().argsort(dim=-1, stable=True)[:, self.least_protected :]
            scores = scores.gather(1, order)
        parts = []
        for rows, schedule in self.groups:
            own = slice(None) if rows is None else rows
            num_keep, selection = self._plan(schedule, stage, scores.device, rows)
            chosen = ops.select_tokens(
                scores[own], num_keep, **selection, pooling=pooling, backend=self.pruning.backend
            )
            if self.earlier is not None and self.finished_before is not None:  # only some rows have their sink here
                selection["sink"] = 0
                later = ops.select_tokens(
                    scores[own], num_keep, **selection, pooling=pooling, backend=self.pruning.backend
                )
                has_sink = self.finished_before.to(scores.device)[own].unsqueeze(-1) == 0
                chosen = torch.where(has_sink, chosen, later)
            parts.append(chosen)
        indices = parts[0]
        if len(parts) > 1:
            widest = max(part.shape[1] for part in parts)
            indices = indices.new_empty(scores.shape[0], widest)
            for (rows, _), part in zip(self.groups, parts, strict=True):
                indices[rows] = F.pad(part, (widest - part.shape[1], 0), value=-1)
        if order is None or segment.is_protected is None:
            return indices
        indices = torch.where(indices < 0, -1, order.gather(1, indices.clamp(min=0)))
        columns = torch.arange(width, device=scores.device)
        protected = torch.where(segment.is_protected, columns, -1).sort(dim=-1).values[:, -self.most_protected :]
        both = torch.cat([indices, protected], dim=-1).sort(dim=-1).values
        return both[:, max(0, both.shape[1] - width) :]

    def _see(
        self, layer_idx: int, hidden_states: torch.Tensor, segment: Segment, layer: PrunedState | None
    ) -> Visibility:
        held = segment.token_index if layer is None else layer.kept
        mask = held >= 0 if self.piece.is_ragged else None
        if self.earlier is None or self.cache is None:
            return see_prompt(self.decoder.config, hidden_states, mask, self.cache, layer_idx)
        return see_cached(self.decoder.config, hidden_states, mask, self.cache, layer_idx)

    def _hold(self, layer_idx: int, layer: PrunedState, segment: Segment) -> None:
        """Tell the cache's layer what is about to be written to it."""
        columns, keep_last, is_padded, is_ragged, _ = self.piece
        layer.stage, layer.is_padded, layer.is_ragged = segment.stage, is_padded, is_ragged
        layer.expect(segment.token_index, columns)
        num_waiting = 0 if self.is_behind else self.num_waiting
        layer.num_tail = keep_last if is_ragged else num_waiting
        if not self.may_go_on:
            return
        layer.finished = None if self.finished is None else self.finished.to(layer.kept.device)
        layer.counted, layer.most_protected = self.counted, self.most_protected
        layer.num_finished = layer.kept.shape[1] - num_waiting
        if is_ragged:
            layer.most_kept = max(layer.most_kept, *(own.block_keep(segment.stage) for _, own in self.groups))
            most = columns // self.schedule.block_size * layer.most_kept + self.most_protected
            layer.num_finished = min(layer.kept.shape[1], most)
        if layer_idx == self.first_layer:
            layer.waiting, layer.is_behind = self.waiting, self.is_behind


def token_index(padding_mask: torch.Tensor | None, past: int, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """``[B, n]`` index of new tokens in their own row's conversation, -1 for padding."""
    batch, width = inputs_embeds.shape[:2]
    if padding_mask is None:
        return (torch.arange(width, device=inputs_embeds.device) + past).expand(batch, -1)
    index = padding_mask.cumsum(-1) - 1
    return torch.where(padding_mask, index, -1)[:, past:]


def later_piece_is_padded(
    decoder: Any, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, earlier: PrunedState
) -> bool:
    """Whether a row may have padding, in this piece of the prompt or in an earlier one."""
    was_padded = earlier.is_padded or earlier.is_waiting_padded
    if attention_mask is None:
        if was_padded:
            raise ValueError(MASK_IS_MISSING)
        return False
    # Asked of transformers, which looks at the mask anyway: the new columns by themselves, as if they were a prompt.
    new_columns = attention_mask[:, -inputs_embeds.shape[1] :]
    return was_padded or create_causal_mask(decoder.config, inputs_embeds, new_columns, None) is not None


def append_waiting(layer: PrunedState, hidden_states: torch.Tensor, segment: Segment, is_padded: bool) -> None:
    """Tokens behind a prompt that are not pruned now wait for the next piece, if there may be one."""
    if layer.waiting is None:
        return
    assert segment.position_ids is not None
    index = segment.token_index
    is_protected = torch.zeros_like(index, dtype=torch.bool)
    new = Waiting(hidden_states, segment.position_ids.expand(index.shape), index, is_protected)
    layer.waiting = layer.waiting.followed_by(new)
    layer.is_waiting_padded = layer.is_waiting_padded or is_padded


def continue_segment(
    decoder: Any,
    layer_idx: int,
    hidden_states: torch.Tensor,
    segment: Segment,
    attention_mask: torch.Tensor | None,
    may_be_padded: bool,
    cache: Cache,
) -> Segment:
    """The segment that begins at `layer_idx` when tokens are added to a pruned prompt."""
    layer: Any = cache.layers[layer_idx]
    if layer.is_padded and attention_mask is None:
        raise ValueError(MASK_IS_MISSING)
    mask = None
    if layer.is_ragged or may_be_padded:
        mask = layer.padding_mask(attention_mask, hidden_states.shape[1])
    # Layer 0 answers with the length of the conversation. Where something was evicted from it, so it was from layer 1.
    visibility = see_cached(decoder.config, hidden_states, mask, cache, max(layer_idx, 1))
    return segment._replace(stage=layer.stage, visibility=visibility)
