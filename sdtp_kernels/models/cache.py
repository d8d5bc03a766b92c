"""The state of a pruned prompt, kept where the prompt itself is kept: in the layers of its KV cache.

Two requests never mix, and whatever ``generate()`` does to a cache (beam reordering, cropping, copying) happens to the
state as well.

Under the block budget a prompt may arrive in pieces: chunks of a prefill, turns of a chat, a kept prefix and what
follows it. Its unfinished block is then *waiting*: its tokens are in all layers, because what comes next attends to
them, but only until the block is complete. A layer from the first stage on holds first what is finished, which never
changes again, then what waits: the unfinished block, and tokens generated since. The layer at the first stage keeps
the hidden states of all that waits as well, as they arrived there.

The next piece of the prompt goes through the layers below the first stage by itself, and from there on together with
what has waited, whose entries it replaces. So each layer computes what one call with the whole prompt would: below the
first stage nothing is ever dropped, and from there on complete blocks alone are final, pruned at each stage from all
their tokens, while queries behind them see what they kept. A piece whose logits nobody wants (a chunk that is not the
last) leaves what is unfinished at the first stage: *behind*, until the next piece takes it along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer

from .. import ops

if TYPE_CHECKING:
    from collections.abc import Callable


class Waiting(NamedTuple):
    """Tokens as they arrive at the first stage; kept of those behind the last finished block."""

    hidden_states: torch.Tensor
    """``[B, n, D]``"""
    position_ids: torch.Tensor
    """``[B, n]``"""
    token_index: torch.Tensor
    """``[B, n]`` index in the row's own prompt, -1 for padding."""
    is_protected: torch.Tensor
    """``[B, n]`` bool: never to be pruned."""

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Waiting:
        return Waiting(*map(change, self))

    def followed_by(self, other: Waiting) -> Waiting:
        return Waiting(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))


class PrunedLayer(DynamicLayer):
    """A cache layer whose prompt was pruned.

    Its state is set by :class:`~sdtp_kernels.models.stages.Prompt` before the decoder layer writes to it.

    Parameters
    ----------
    kept : Tensor [B, K], int64
        Index in the row's own prompt of each cached prompt token, ascending; -1 is padding.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__()
        self.kept = kept
        self.stage = 0
        """Number of the last stage before this layer; layers of one stage hold the same tokens."""
        self.prompt_length = 0
        """Columns of ``input_ids`` that have been read as a prompt."""
        self.num_tail = 0
        """Trailing prompt tokens known to be in every layer, so that a crop of them is the same in all."""
        self.is_padded = False
        """Whether a row may have padding among the columns of ``input_ids``."""
        self.is_ragged = False
        """Whether rows may hold different counts, and `kept` padding."""
        self.num_finished = 0
        """Entries of finished blocks; where rows are ragged, the most that any row can have."""
        self.most_kept = 0
        """The most entries that any finished block has left here."""
        self.finished: torch.Tensor | None = None
        """``[B, 1]`` tokens of each row up to the end of its finished blocks; ``None`` where all rows are alike."""
        self.counted: torch.Tensor | None = None
        """``[B, 1]`` of them, those that the schedule counts: all but protected ones."""
        self.most_protected = 0
        """Most protected tokens that any row can have had so far."""
        self.waiting: Waiting | None = None
        """In the layer at the first stage, while the prompt may go on."""
        self.is_waiting_padded = False
        """Whether a row may have padding among what waits."""
        self.is_behind = False
        """Whether what waits is not in the cache: more of the prompt was to come at once."""

    def drop_waiting(self, backend: str) -> None:
        """Reduce the layer to its finished blocks: what waits comes again, with the next piece of the prompt."""
        held = self.kept.shape[1]
        if self.finished is None:
            self.kept = self.kept[:, : self.num_finished]
            if self.is_initialized:
                self.keys = self.keys[:, :, : self.num_finished]
                self.values = self.values[:, :, : self.num_finished]
            return
        is_finished = (self.kept >= 0) & (self.kept < self.finished)
        columns = torch.where(is_finished, torch.arange(held, device=self.kept.device), -1)
        columns = columns.sort(dim=-1).values[:, held - self.num_finished :]
        (kept,) = ops.gather_tokens([self.kept], columns, backend=backend)
        self.kept = torch.where(columns < 0, -1, kept)
        if self.is_initialized:
            held_now = [t[:, :, :held] for t in (self.keys, self.values)]
            self.keys, self.values = ops.gather_tokens(held_now, columns, backend=backend)

    def padding_mask(self, attention_mask: torch.Tensor | None, num_new: int) -> torch.Tensor:
        """The logical padding mask ``[B, past + new]`` in terms of what this layer holds, ``[B, K + new]``."""
        if attention_mask is not None:
            return torch.cat([self.kept >= 0, attention_mask[:, self.prompt_length :].bool()], dim=-1)
        return F.pad(self.kept >= 0, (0, self.num_appended + num_new), value=True)

    @property
    def num_appended(self) -> int:
        """Tokens added behind the prompt."""
        return self.keys.shape[2] - self.kept.shape[1] if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        into_prompt = abs(tokens_to_remove) - self.num_appended
        if into_prompt > self.num_tail:
            raise ValueError(
                f"crop({tokens_to_remove}) would remove {into_prompt} tokens of a pruned prompt; only its last "
                f"{self.num_tail} are known to be in every layer: prefill the shorter prompt instead"
            )
        super().crop(tokens_to_remove)
        if self.waiting is not None and tokens_to_remove != 0:
            self.waiting = self.waiting.each(lambda t: t[:, : -abs(tokens_to_remove)])
        if into_prompt > 0:
            self.kept = self.kept[:, :-into_prompt]
            self.prompt_length -= into_prompt
            self.num_tail -= into_prompt

    def reset(self) -> None:
        super().reset()
        self.stage = self.prompt_length = 0
        self.kept = self.kept[:, :0]
        self.waiting = self.finished = self.counted = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._each_row(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._each_row(lambda t: t[indices, ...])

    def _each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.kept = change(self.kept)
        self.finished = None if self.finished is None else change(self.finished)
        self.counted = None if self.counted is None else change(self.counted)
        self.waiting = None if self.waiting is None else self.waiting.each(change)


class EvictedFirstLayer(PrunedLayer):
    """Layer 0, where pruned tokens were evicted from it: ``generate()`` asks it for the length of the conversation.

    Masks of what it holds are sized by layer 1, which then holds the same tokens.
    """

    def get_seq_length(self) -> int:
        return self.prompt_length + self.num_appended


def evict(cache: Cache, num_layers: int, like: PrunedLayer, indices: torch.Tensor, backend: str) -> None:
    """Drop pruned tokens from the layers below a stage, which have cached them already.

    Parameters
    ----------
    cache : Cache
    num_layers : int
        Layers below the stage. All of them hold the same tokens: the input of the stage.
    like : PrunedLayer
        State of a layer above the stage, for those below it as well.
    indices : Tensor [B, K], int64
        What the stage keeps of its input.
    backend : str
    """
    below: list[Any] = cache.layers[:num_layers]
    kept = iter(ops.gather_tokens([t for layer in below for t in (layer.keys, layer.values)], indices, backend=backend))
    for i, old in enumerate(below):
        layer = (PrunedLayer if i else EvictedFirstLayer)(like.kept)
        layer.stage, layer.prompt_length, layer.num_tail = like.stage, like.prompt_length, like.num_tail
        layer.is_padded, layer.is_ragged = like.is_padded, like.is_ragged
        layer.keys, layer.values = next(kept), next(kept)
        layer.dtype, layer.device, layer.is_initialized = old.dtype, old.device, True
        cache.layers[i] = layer


def pruned_layer(cache: Cache | None, layer_idx: int) -> PrunedLayer | None:
    """This layer of the cache, where it is one that holds a pruned prompt."""
    if cache is None or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    return layer if isinstance(layer, PrunedLayer) else None


def waiting_layer(cache: Cache | None, layer_idx: int) -> PrunedLayer | None:
    """The same at the first stage, where a prompt is in the cache that may go on."""
    layer = pruned_layer(cache, layer_idx)
    return None if layer is None or layer.waiting is None else layer


def stage_of(cache: Cache | None, layer_idx: int) -> int:
    """Stages that the tokens in this layer of the cache went through."""
    layer = pruned_layer(cache, layer_idx)
    return 0 if layer is None else layer.stage


def install(cache: Cache, layer_idx: int, layer: PrunedLayer) -> None:
    """Put an empty layer into its place before the decoder layer writes to it."""
    if layer_idx < len(cache.layers):
        cache.layers[layer_idx] = layer
    else:  # a DynamicCache without a config grows layer by layer
        cache.layers.append(layer)


def check_supported(cache: Any) -> None:
    """Refuse caches whose layers cannot hold a length of their own."""
    kinds = {type(layer) for layer in getattr(cache, "layers", [])} - {DynamicLayer, PrunedLayer, EvictedFirstLayer}
    if not isinstance(cache, Cache) or kinds or cache.offloading:
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or type(cache).__name__
        raise NotImplementedError(
            f"SDTP keeps a length per layer, which this cache cannot ({found}): pass past_key_values=DynamicCache(), "
            "and no cache_implementation"
        )
