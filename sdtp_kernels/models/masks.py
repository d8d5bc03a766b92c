"""Attention masks of a segment, in the form that each attention implementation takes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .. import ops
from .cache import is_empty, mask_sizes
from .compat import take_cache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLASH = ("flash_attention_2", "flash_attention_3")
ATTENTIONS = ("sdpa", "eager", "flex_attention", *FLASH)
POSITION_ATTENTIONS = ("sdpa", "eager")
"""Those that take queries at any position, over more keys."""


class Mask(NamedTuple):
    """What the layers of a segment are given next to their hidden states."""

    attention_mask: Any
    """A mask in the form of the attention implementation; ``None`` where causality is all."""
    kwargs: dict[str, Any]
    """Further arguments of the attention function."""


def prompt_mask(
    config: PreTrainedConfig,
    hidden_states: torch.Tensor,
    padding_mask: torch.Tensor | None,
    cache: Cache | None,
    layer_idx: int,
) -> Mask:
    """The mask among the tokens of a prompt, which no cached ones precede.

    Parameters
    ----------
    config : PreTrainedConfig
    hidden_states : Tensor [B, n, D]
    padding_mask : bool Tensor [B, n], optional
        Of left-padded rows, false where a row is padded. ``None`` says that none is.
    cache : Cache, optional
    layer_idx : int
        First layer of the segment.
    """
    if config._attn_implementation in FLASH:
        if cache is not None and layer_idx < len(cache.layers) and isinstance(cache.layers[layer_idx], StaticLayer):
            # The keys come with the room after them, which only a mask tells apart.
            ones = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            return Mask(ones if padding_mask is None else padding_mask, {})
        return Mask(None, {} if padding_mask is None else _varlen(padding_mask))
    return Mask(_mask(config, hidden_states, padding_mask, cache, layer_idx), {})


def cached_mask(
    config: PreTrainedConfig,
    hidden_states: torch.Tensor,
    padding_mask: torch.Tensor | None,
    cache: Cache,
    layer_idx: int,
) -> Mask:
    """The mask of new tokens over cached ones and themselves; ``padding_mask [B, cached + n]``."""
    if (
        config._attn_implementation in FLASH
        and isinstance(cache.layers[layer_idx], StaticLayer)
        and padding_mask is None
    ):
        raise ValueError(
            "flash attention over a static cache needs the attention_mask of the prompt and the new tokens; before "
            "transformers 5.24 generate() drops one without padding: use a DynamicCache there"
        )
    return Mask(_mask(config, hidden_states, padding_mask, cache, layer_idx), {})


class Visible(NamedTuple):
    """Stands in for an attention mask of queries at any position: see :func:`~sdtp_kernels.position_attention`."""

    num_visible: torch.Tensor
    """``[B, n]``"""
    first_visible: torch.Tensor | None
    """``[B]``; ``None`` where no row is padded."""
    backend: str


def teach_sdpa() -> None:
    """Make transformers' ``sdpa`` take :class:`Visible` for a mask. Everything else goes to what was there before.

    Not by an attention of another name, which the config would have to be changed for during a call. A function that
    has not been taught fails on such a mask: it would cut the keys to as many as there are queries if there were none.
    """
    known = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(known, "takes_visible", False):
        return

    @functools.wraps(known)
    def sdpa(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(attention_mask, Visible):
            return known(module, query, key, value, attention_mask, *args, **kwargs)
        if kwargs.get("dropout"):
            raise NotImplementedError("attention_dropout with dropped_kv='predicted': call model.eval() first")
        num_visible, first_visible, backend = attention_mask
        attended = ops.position_attention(
            query, key, value, num_visible, first_visible, scale=kwargs.get("scaling"), backend=backend
        )
        return attended.transpose(1, 2).contiguous(), None

    sdpa.takes_visible = True  # type: ignore[attr-defined]
    AttentionInterface.register("sdpa", sdpa)


def position_mask(
    config: PreTrainedConfig, dtype: torch.dtype, num_visible: torch.Tensor, is_token: torch.Tensor
) -> Mask:
    """The mask of queries at any position, for attention that takes no :class:`Visible`.

    Parameters
    ----------
    config : PreTrainedConfig
    dtype : torch.dtype
        Of the hidden states.
    num_visible : Tensor [B, n], int64
        Query i of a row sees its first ``num_visible[i]`` keys.
    is_token : bool Tensor [B, num_keys]
        Those of them that are no padding.
    """
    columns = torch.arange(is_token.shape[1], device=num_visible.device)
    is_seen = ((columns < num_visible.unsqueeze(-1)) & is_token.unsqueeze(1)).unsqueeze(1)
    if config._attn_implementation == "eager":
        return Mask(torch.zeros_like(is_seen, dtype=dtype).masked_fill(~is_seen, torch.finfo(dtype).min), {})
    return Mask(is_seen, {})


class _Snapshot:
    """A cache, and how full it is now, for the masks of a patched model.

    The mask of flex attention is a function, called when the layer has written the new tokens. A static cache counts
    them in place, and transformers 5.24 hands that very counter to the mask: a token would see one that is not there.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self._cache.get_query_offset(layer_idx) + 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> Any:
        if layer_idx >= len(self._cache.layers):
            return self._cache.get_mask_sizes(query_length, layer_idx)
        return mask_sizes(self._cache.layers[layer_idx], query_length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def as_it_is(config: PreTrainedConfig, cache: Cache | None) -> Any:
    """The cache in the form that a mask of it may be made from."""
    if cache is None or not cache.layers:
        return cache
    is_counted_in_place = any(isinstance(layer, StaticLayer) for layer in cache.layers)
    is_flex = config._attn_implementation == "flex_attention"
    refuses_others = "get_mask_sizes" in vars(cache.layers[0])
    return _Snapshot(cache) if refuses_others or (is_counted_in_place and is_flex) else cache


def masks_for_generate(
    config: PreTrainedConfig, attention_mask: torch.Tensor | None, **kwargs: Any
) -> torch.Tensor | None:
    """Stands in for what ``generate()`` calls for static caches: that makes one mask for all layers, we one a segment.

    Every step gets a padding mask of one shape, so that decoding is one compiled graph. What stands after the tokens
    of the step is hidden by causality.
    """
    cache = take_cache(kwargs)
    if attention_mask is None or cache is None or is_empty(cache) or config._attn_implementation in FLASH:
        return attention_mask
    room = cache.get_max_length(0) - attention_mask.shape[1]
    return torch.nn.functional.pad(attention_mask, (0, room), value=1)


def _mask(
    config: PreTrainedConfig,
    hidden_states: torch.Tensor,
    padding_mask: torch.Tensor | None,
    cache: Cache | None,
    layer_idx: int,
) -> Any:
    # No position_ids: those of kept tokens have gaps, which transformers would take for packed sequences. A padded
    # segment keeps its mask without asking the device whether it could do without.
    return create_causal_mask(
        config,
        hidden_states,
        padding_mask,
        as_it_is(config, cache),
        layer_idx=layer_idx,
        allow_is_causal_skip=padding_mask is None,
    )


def _varlen(padding_mask: torch.Tensor) -> dict[str, Any]:
    """Arguments of flash attention's varlen kernel for left-padded rows: padding is a sequence of its own.

    transformers would gather the tokens that are none, layer by layer, and wait for the device to tell how many.
    """
    batch, width = padding_mask.shape
    begin = torch.arange(batch, device=padding_mask.device) * width
    first = begin + width - padding_mask.sum(-1)
    bounds = torch.nn.functional.pad(torch.stack([begin, first], dim=-1).flatten(), (0, 1), value=batch * width)
    bounds = bounds.to(torch.int32)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": width, "max_length_k": width}
