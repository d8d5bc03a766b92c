"""How the chunks of a prompt join: what an earlier call deferred comes first, what is unfinished is deferred again.

A prompt that is read whole is one chunk. :func:`join` runs once a call, where the tokens arrive at the first stage;
:func:`hold` tells each layer of the cache what is about to be written to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.masking_utils import create_causal_mask

from .. import ops
from .cache import install, is_growing, pruned_layer
from .layers import Deferred, PrunedState, Tokens
from .masks import cached_mask

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from ..lexical import PromptTokens
    from ..schedule import PruningSchedule
    from .dropped import CompletedCache
    from .handle import SdtpHandle
    from .masks import Mask
    from .scoring import RunningMean
    from .settings import Protected

MASK_IS_MISSING = "this cache holds a padded batch: pass the attention_mask of the prompt and the new tokens"


class Segment(NamedTuple):
    """The layers between two stages: they see the same tokens and share one mask."""

    stage: int
    mask: Mask
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    position_ids: torch.Tensor | None
    token_index: torch.Tensor
    """``[B, n]`` index of each token in the row's own prompt, -1 for padding."""
    is_protected: torch.Tensor | None = None
    """``[B, n]`` bool; ``None`` where no token is protected."""
    running_mean: RunningMean | None = None


class Chunk(NamedTuple):
    """What part of a prompt a call reads."""

    columns: int
    """Columns of the prompt up to the end of this chunk."""
    keep_last: int
    """The last of them that stand after the prompt: they are never pruned."""
    is_padded: bool
    """Whether a row may have padding, here or in an earlier chunk."""
    is_ragged: bool
    """Whether rows may keep different counts: for padding, for settings of their own, for protected tokens."""
    is_last: bool
    """Whether this chunk's logits are wanted, rather than the cache alone."""


class Prefill(NamedTuple):
    """A call that prunes: what is known before its first layer, and does not change."""

    decoder: Any
    handle: SdtpHandle
    cache: Cache | None
    chunk: Chunk
    groups: list[tuple[list[int] | None, PruningSchedule]]
    """Rows with the schedule that they share; layers, budget and block size are always the same."""
    protected: Protected | None
    earlier: PrunedState | None
    """The layer at the first stage that holds what earlier chunks deferred."""
    completed: CompletedCache | None
    """Where dropped tokens keep predicted keys and values: what layers are handed for a cache."""
    prompt: PromptTokens | None
    """Its token ids, where it is read whole and not as embeddings."""

    @property
    def schedule(self) -> PruningSchedule:
        """That of all rows, where they are alike."""
        return self.groups[0][1]

    @property
    def may_continue(self) -> bool:
        """Whether later calls can add chunks to this prompt."""
        is_block = self.schedule.budget == "block" and not self.handle.evict_earlier_kv
        return is_block and self.cache is not None and is_growing(self.cache)

    @property
    def defers(self) -> bool:
        """Whether unfinished tokens are kept for a later call."""
        return self.may_continue and (self.handle.later_turns or not self.chunk.is_last)

    @property
    def leaves_out(self) -> bool:
        """Whether unfinished tokens stay at the first stage.

        Ragged rows finish blocks at different times, which the host does not know: theirs always go on.
        """
        return self.may_continue and not self.chunk.is_last and not self.chunk.is_ragged


class Counts(NamedTuple):
    """What :func:`join` counted: on the host where all rows are alike, by row on their device where they are ragged."""

    length: int = 0
    """Tokens of the prompt so far, without `keep_last`; of ragged rows the widest."""
    finished: int = 0
    """Of them, those in blocks that earlier calls have pruned; 0 for ragged rows."""
    num_deferred: int = 0
    """Trailing tokens that are unfinished after this call, `keep_last` included; of ragged rows the most."""
    lengths: torch.Tensor | None = None
    """``[B]`` tokens of each ragged row that the schedule counts."""
    lengths_finished: torch.Tensor | None = None
    """``[B]`` of them, those in blocks that earlier calls have pruned."""
    finished_end: torch.Tensor | None = None
    """``[B, 1]`` index after each ragged row's finished blocks."""
    counted: torch.Tensor | None = None
    """``[B, 1]`` tokens that the schedule counts in these blocks."""
    least_protected: int = 0
    most_protected: int = 0
    """Least and most protected tokens that any row has."""


def join(
    prefill: Prefill, hidden_states: torch.Tensor, segment: Segment
) -> tuple[torch.Tensor, Segment, Counts, Deferred | None]:
    """At the first stage: deferred tokens come before the new ones; what is unfinished is deferred."""
    columns, keep_last, is_padded, is_ragged, _ = prefill.chunk
    earlier = prefill.earlier
    assert segment.position_ids is not None
    # With a device_map, a stage runs where the layer below left its output: only what is kept moves on.
    device = hidden_states.device
    index, position_ids = segment.token_index.to(device), segment.position_ids.to(device)
    is_protected = torch.zeros_like(index, dtype=torch.bool)
    least = most = 0
    if prefill.protected is not None:
        past, end = columns - index.shape[1], index.shape[1] - keep_last
        is_protected = prefill.protected.look_up(index, past)
        is_protected[:, end:] = False  # these are kept in any case
        least, most = prefill.protected.bounds(past, end, is_padded)
    tokens = Tokens(hidden_states, position_ids.expand(index.shape), index, is_protected)
    if earlier is not None:
        assert earlier.deferred is not None
        tokens = earlier.deferred.tokens.followed_by(tokens)
        least, most = 0, most + earlier.deferred.most_protected
        if is_ragged:  # both begin with padding
            order = (tokens.token_index >= 0).int().argsort(dim=-1, stable=True)
            tokens = Tokens(*ops.gather_tokens(tokens, order, backend=prefill.handle.backend))
    width = tokens.token_index.shape[1]
    if is_ragged:
        counts = _count_rows(prefill, tokens, least, most)
    else:
        length, finished = columns - keep_last, columns - width
        num_deferred = prefill.schedule.num_recent(length, finished) + keep_last
        counts = Counts(length, finished, num_deferred, least_protected=least, most_protected=most)
    deferred = None
    if prefill.defers:
        # Copies: a view would keep the whole prompt alive.
        unfinished = tokens.each(lambda t: t[:, width - counts.num_deferred :].clone())
        if counts.finished_end is not None:
            index = unfinished.token_index
            unfinished = unfinished._replace(token_index=torch.where(index < counts.finished_end, -1, index))
        deferred = Deferred(unfinished, counts.counted, counts.most_protected, is_left_out=prefill.leaves_out)
    segment = segment._replace(is_protected=tokens.is_protected if most else None)
    if prefill.leaves_out:
        tokens = tokens.each(lambda t: t[:, : width - counts.num_deferred])
    elif earlier is None:
        return hidden_states, segment._replace(stage=int(prefill.may_continue)), counts, deferred
    embeddings = prefill.decoder.rotary_emb(tokens.hidden_states, tokens.position_ids)
    segment = segment._replace(stage=1, position_embeddings=embeddings, token_index=tokens.token_index)
    return tokens.hidden_states, segment, counts, deferred


def _count_rows(prefill: Prefill, tokens: Tokens, least: int, most: int) -> Counts:
    """What the schedule wants to know of every row, on the device. Protected tokens are no part of its prompt."""
    keep_last, is_valid, earlier = prefill.chunk.keep_last, tokens.token_index >= 0, prefill.earlier
    width = tokens.token_index.shape[1]
    is_counted = is_valid & ~tokens.is_protected
    so_far = tokens.token_index[:, -1] + 1
    before = so_far - is_valid.sum(-1)
    if earlier is not None and earlier.deferred is not None and earlier.deferred.counted is not None:
        before = earlier.deferred.counted[:, 0]
    lengths = before + is_counted.sum(-1) - keep_last
    unfinished = torch.empty_like(before)
    for rows, schedule in prefill.groups:
        own = slice(None) if rows is None else rows
        unfinished[own] = schedule.num_recent(lengths[own], before[own])
    counted = (lengths - unfinished).unsqueeze(-1)
    # A token is deferred where no fewer counted tokens stand before it than the finished blocks have.
    place = before.unsqueeze(-1) + is_counted.cumsum(-1) - is_counted.long()
    num_deferred = (is_valid & (place >= counted)).sum(-1)
    longest = max(schedule.max_unfinished for _, schedule in prefill.groups)
    return Counts(
        length=width - keep_last - least,
        num_deferred=min(width, longest + keep_last + most),
        lengths=lengths,
        lengths_finished=before,
        finished_end=(so_far - num_deferred).unsqueeze(-1),
        counted=counted,
        least_protected=least,
        most_protected=most,
    )


def hold(
    prefill: Prefill, counts: Counts, deferred: Deferred | None, layer_idx: int, stage: int, token_index: torch.Tensor
) -> PrunedState | None:
    """Tell a layer of the cache which tokens are about to be written to it, after `stage` stages.

    None where it needs no telling: below the first stage, without a cache, and where a whole prompt is written that
    nothing can continue.
    """
    cache, (columns, keep_last, is_padded, is_ragged, _) = prefill.cache, prefill.chunk
    if stage == 0 or cache is None or (prefill.completed is not None and not prefill.may_continue):
        return None
    layer = pruned_layer(cache, layer_idx) if prefill.earlier is not None else None
    if layer is None:
        layer = install(cache, layer_idx, token_index[:, :0], prefill.handle.schedule)
    else:
        layer.drop_deferred(prefill.handle.backend)
    layer.stage, layer.is_padded, layer.is_ragged = stage, is_padded, is_ragged
    layer.expect(token_index, columns)
    num_deferred = 0 if prefill.leaves_out else counts.num_deferred
    layer.num_tail = keep_last if is_ragged else num_deferred
    if not prefill.may_continue:
        return layer
    layer.finished = None if counts.finished_end is None else counts.finished_end.to(layer.kept.device)
    layer.num_finished = layer.kept.shape[1] - num_deferred
    if is_ragged:
        kept_stages = 0 if prefill.completed is not None else stage
        layer.most_kept = max(layer.most_kept, *(own.block_keep(kept_stages) for _, own in prefill.groups))
        most = columns // prefill.schedule.block_size * layer.most_kept + counts.most_protected
        layer.num_finished = min(layer.kept.shape[1], most)
    if layer_idx == prefill.schedule.layers[0]:
        layer.deferred = deferred
    return layer


def token_index(padding_mask: torch.Tensor | None, past: int, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """``[B, n]`` index of new tokens in their own row's conversation, -1 for padding."""
    batch, width = inputs_embeds.shape[:2]
    if padding_mask is None:
        return (torch.arange(width, device=inputs_embeds.device) + past).expand(batch, -1)
    index = padding_mask.cumsum(-1) - 1
    return torch.where(padding_mask, index, -1)[:, past:]


def is_chunk_padded(
    decoder: Any, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, earlier: PrunedState
) -> bool:
    """Whether a row may have padding, in this chunk of the prompt or in an earlier one."""
    assert earlier.deferred is not None
    was_padded = earlier.is_padded or earlier.deferred.is_padded
    if attention_mask is None:
        if was_padded:
            raise ValueError(MASK_IS_MISSING)
        return False
    # Asked of transformers, which looks at the mask anyway: the new columns alone, as if they were a prompt.
    new_columns = attention_mask[:, -inputs_embeds.shape[1] :]
    return was_padded or create_causal_mask(decoder.config, inputs_embeds, new_columns, None) is not None


def append_deferred(layer: PrunedState, hidden_states: torch.Tensor, segment: Segment, is_padded: bool) -> None:
    """Tokens after a prompt that are not pruned now are deferred to the next chunk, if there may be one."""
    if layer.deferred is None:
        return
    assert segment.position_ids is not None
    index = segment.token_index
    is_protected = torch.zeros_like(index, dtype=torch.bool)
    new = Tokens(hidden_states, segment.position_ids.expand(index.shape), index, is_protected)
    layer.deferred.tokens = layer.deferred.tokens.followed_by(new)
    layer.deferred.is_padded = layer.deferred.is_padded or is_padded


def appended_segment(
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
    padding = None
    if layer.is_ragged or may_be_padded:
        padding = layer.padding_mask(attention_mask, hidden_states.shape[1])
    # Layer 0 answers with the length of the conversation. Where something was evicted from it, so it was from layer 1.
    mask = cached_mask(decoder.config, hidden_states, padding, cache, max(layer_idx, 1))
    return segment._replace(stage=layer.stage, mask=mask)
