"""The state of a pruned prompt, kept where the prompt itself is kept: in the layers of its KV cache.

Two requests never mix, and whatever ``generate()`` does to a cache (beam reordering, cropping, copying) happens to the
state as well.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class PrunedLayer(DynamicLayer):
    """A cache layer whose prompt was pruned.

    Parameters
    ----------
    stage : int
        Number of the last stage before this layer; layers of one stage hold the same tokens.
    kept : Tensor [B, K], int64
        Column of ``input_ids`` of each cached prompt token, ascending; -1 is padding.
    prompt_length : int
        Columns of ``input_ids`` that the prefill had.
    num_tail : int
        Trailing prompt tokens known to be in every layer, so that a crop of them is the same in all.
    is_padded : bool
        Whether `kept` may hold padding.
    """

    def __init__(self, stage: int, kept: torch.Tensor, prompt_length: int, num_tail: int, is_padded: bool) -> None:
        super().__init__()
        self.stage = stage
        self.kept = kept
        self.prompt_length = prompt_length
        self.num_tail = num_tail
        self.is_padded = is_padded

    def padding_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """The logical padding mask ``[B, past + new]`` in terms of what this layer holds, ``[B, K + new]``."""
        return torch.cat([self.kept >= 0, attention_mask[:, self.prompt_length :].bool()], dim=-1)

    def crop(self, tokens_to_remove: int) -> None:
        into_prompt = abs(tokens_to_remove) - (self.get_seq_length() - self.kept.shape[1])
        if into_prompt > self.num_tail:
            raise ValueError(
                f"crop({tokens_to_remove}) would remove {into_prompt} tokens of a pruned prompt; only its last "
                f"{self.num_tail} are known to be in every layer: prefill the shorter prompt instead"
            )
        super().crop(tokens_to_remove)
        if into_prompt > 0:
            self.kept = self.kept[:, :-into_prompt]
            self.prompt_length -= into_prompt
            self.num_tail -= into_prompt

    def reset(self) -> None:
        super().reset()
        self.stage = 0
        self.kept = self.kept[:, :0]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.kept = self.kept.index_select(0, beam_idx.to(self.kept.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.kept = self.kept.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.kept = self.kept[indices, ...]


def stage_of(cache: Cache | None, layer_idx: int) -> int:
    """Stages that the tokens in this layer of the cache went through."""
    if cache is None or layer_idx >= len(cache.layers):
        return 0
    return getattr(cache.layers[layer_idx], "stage", 0)


def install(cache: Cache, layer_idx: int, layer: PrunedLayer) -> None:
    """Put an empty layer into its place before the decoder layer writes to it."""
    if layer_idx < len(cache.layers):
        cache.layers[layer_idx] = layer
    else:  # a DynamicCache without a config grows layer by layer
        cache.layers.append(layer)


def check_supported(cache: Any) -> None:
    """Refuse caches whose layers cannot hold a length of their own."""
    kinds = {type(layer) for layer in getattr(cache, "layers", [])} - {DynamicLayer, PrunedLayer}
    if not isinstance(cache, Cache) or kinds or cache.offloading:
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or type(cache).__name__
        raise NotImplementedError(
            f"SDTP keeps a length per layer, which this cache cannot ({found}): pass past_key_values=DynamicCache(), "
            "and no cache_implementation"
        )
