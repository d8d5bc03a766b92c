"""The state of a pruned prompt, kept where the prompt itself is kept: in the layers of its KV cache.

Two requests never mix, and whatever ``generate()`` does to a cache (beam reordering, cropping, copying) happens to the
state as well.

Under the block budget a prompt may arrive in chunks: of a prefill, turns of a chat, a kept prefix and what follows it.
Tokens after the last finished block are *deferred*: the layers hold them, because what comes next attends to them, but
only until their block is finished. A layer from the first stage on holds first the finished blocks, which never change
again, then what is deferred: unfinished blocks, and tokens generated since. The layer at the first stage also keeps the
hidden states of all deferred tokens, as they arrived there (:class:`Deferred`).

The next chunk goes through the layers below the first stage alone, and from there on together with the deferred tokens,
whose entries it replaces. So each layer computes what one call with the whole prompt would: below the first stage
nothing is ever dropped, and from there on only finished blocks are final. A chunk whose logits nobody wants leaves what
is unfinished at the first stage, *left out* of the later layers, until the next chunk takes it along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    HQQQuantizedLayer,
    QuantoQuantizedLayer,
    StaticLayer,
)

from .. import ops
from .compat import RESET_EMPTIES, Fp8QuantizedLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..schedule import PruningSchedule


class Tokens(NamedTuple):
    """Tokens as they arrive at the first stage."""

    hidden_states: torch.Tensor
    """``[B, n, D]``"""
    position_ids: torch.Tensor
    """``[B, n]``"""
    token_index: torch.Tensor
    """``[B, n]`` index in the row's own prompt, -1 for padding."""
    is_protected: torch.Tensor
    """``[B, n]`` bool: never to be pruned."""

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Tokens:
        return Tokens(*map(change, self))

    def followed_by(self, other: Tokens) -> Tokens:
        return Tokens(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))


@dataclass
class Deferred:
    """What the layer at the first stage keeps while its prompt may go on."""

    tokens: Tokens
    """Those after the last finished block."""
    counted: torch.Tensor | None = None
    """``[B, 1]`` tokens of each row in finished blocks that the schedule counts; ``None`` where all rows are alike."""
    most_protected: int = 0
    """Most protected tokens that any row can have had so far."""
    is_padded: bool = False
    """Whether a row may have padding among these tokens."""
    is_left_out: bool = False
    """Whether the cache does not hold them: more of the prompt was to come at once."""

    def each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.tokens = self.tokens.each(change)
        self.counted = None if self.counted is None else change(self.counted)


class PrunedState(CacheLayerMixin):
    """What a layer of the cache needs next to its storage once its prompt is pruned.

    Set by :func:`~sdtp_kernels.models.chunks.hold` before the decoder layer writes to it.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def begin(self, kept: torch.Tensor, schedule: PruningSchedule) -> None:
        """No column of the prompt has been read, apart from what `kept` says is held already."""
        self.kept = kept
        """``[B, K]`` index in the row's own prompt of each cached prompt token, ascending; -1 is padding."""
        self.schedule = schedule
        """The one that the prompt is pruned by."""
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
        self.deferred: Deferred | None = None
        """In the layer at the first stage, while the prompt may go on."""

    def expect(self, token_index: torch.Tensor, prompt_length: int) -> None:
        """These tokens are about to be written; `prompt_length` columns of the prompt have then been read."""
        self.kept = torch.cat([self.kept, token_index], dim=-1)
        self.prompt_length = prompt_length

    def drop_deferred(self, backend: str) -> None:
        """Reduce the layer to its finished blocks: what is deferred comes again, with the next chunk."""
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
            after = attention_mask[:, self.prompt_length :].to(self.kept.device, torch.bool)
            # A static layer that was cropped may still name tokens that are gone.
            length = self.kept.shape[1] + attention_mask.shape[1] - self.prompt_length
            is_token = self.kept >= 0
            if self.num_tail:  # columns that are in every layer, padded or not
                tail = attention_mask[:, self.prompt_length - self.num_tail : self.prompt_length]
                around = is_token.shape[1] - self.num_tail, self.num_tail - tail.shape[1]
                tail = F.pad(tail.to(is_token.device, torch.bool), around, value=True)
                is_token = is_token & tail
            return torch.cat([is_token, after], dim=-1)[:, :length]
        return F.pad(self.kept >= 0, (0, self.num_appended + num_new), value=True)

    @property
    def num_appended(self) -> int:
        """Tokens added after the prompt; of a static layer, those that there is room for."""
        return self.keys.shape[2] - self.kept.shape[1] if self.is_initialized else 0

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens of the prompt that are not in every layer."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): expected minus the number of tokens to remove")
        into_prompt = abs(tokens_to_remove) - self.num_appended
        if into_prompt > self.num_tail:
            raise ValueError(
                f"crop({tokens_to_remove}) would remove {into_prompt} tokens of a pruned prompt; only its last "
                f"{self.num_tail} are known to be in every layer: prefill the shorter prompt instead"
            )

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        into_prompt = abs(tokens_to_remove) - self.num_appended
        super().crop(tokens_to_remove)
        if self.deferred is not None and tokens_to_remove != 0:
            self.deferred.tokens = self.deferred.tokens.each(lambda t: t[:, :tokens_to_remove])
        if into_prompt > 0:
            self.kept = self.kept[:, :-into_prompt]
            self.prompt_length -= into_prompt
            self.num_tail -= into_prompt

    def reset(self) -> None:
        if isinstance(self, DynamicLayer) and not RESET_EMPTIES:
            raise NotImplementedError(
                "reset() of a DynamicCache leaves zeros in it under this version of transformers, and the next prompt "
                "would attend to them: pass a new DynamicCache instead, or install transformers>=5.18"
            )
        super().reset()
        self.stage = self.prompt_length = 0
        self.kept = self.kept[:, :0]
        self.deferred = self.finished = None

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
        if self.deferred is not None:
            self.deferred.each_row(change)


class PrunedLayer(PrunedState, DynamicLayer):
    """Grows with the tokens after the prompt, and with the prompt: the one that a prompt may enter in chunks."""


class EvictedFirstLayer(PrunedLayer):
    """Layer 0, where pruned tokens were evicted from it: ``generate()`` asks it for the length of the conversation.

    Masks of what it holds are sized by layer 1, which then holds the same tokens.
    """

    def get_seq_length(self) -> int:
        return self.prompt_length + self.num_appended


class _PrunedQuantizedState(PrunedState):
    cumulative_length: int

    @property
    def num_appended(self) -> int:
        return self.cumulative_length - self.kept.shape[1] if self.is_initialized else 0


class PrunedQuantoLayer(_PrunedQuantizedState, QuantoQuantizedLayer):
    """Keys and values in 2 or 4 bits, by optimum-quanto."""


class PrunedHqqLayer(_PrunedQuantizedState, HQQQuantizedLayer):
    """Keys and values in 1 to 8 bits, by HQQ."""


class PrunedStaticLayer(PrunedState, StaticLayer):
    """Has room for the kept tokens and for what the cache was made to take after the prompt, and no more."""

    num_dropped = 0

    def expect(self, token_index: torch.Tensor, prompt_length: int) -> None:
        super().expect(token_index, prompt_length)
        self.num_dropped = prompt_length - token_index.shape[1]
        self.max_cache_len -= self.num_dropped

    def check_crop(self, tokens_to_remove: int) -> None:
        # Only the device knows how many tokens there are, so `kept` goes on naming those of the tail: what comes in
        # their place is no padding either.
        num_left = self.cumulative_length - abs(tokens_to_remove)
        torch._assert_async(
            num_left >= self.kept.shape[1] - self.num_tail,
            f"crop({tokens_to_remove}) of a static cache would remove tokens of a pruned prompt before its last "
            f"{self.num_tail}, which alone are known to be in every layer: prefill the shorter prompt instead",
        )

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        StaticLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        # The next prompt may need more room, or be too short to be pruned: the memory is given back.
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self.max_cache_len += self.num_dropped
        self.num_dropped = 0


PRUNED_KINDS: dict[type[CacheLayerMixin], type[PrunedState]] = {
    DynamicLayer: PrunedLayer,
    StaticLayer: PrunedStaticLayer,
    QuantoQuantizedLayer: PrunedQuantoLayer,
    HQQQuantizedLayer: PrunedHqqLayer,
}
if Fp8QuantizedLayer is not None:

    class PrunedFp8Layer(_PrunedQuantizedState, Fp8QuantizedLayer):
        """Keys and values in 8-bit floating point."""

    PRUNED_KINDS[Fp8QuantizedLayer] = PrunedFp8Layer
