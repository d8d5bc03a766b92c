"""What the patch asks of a KV cache and does to it; :mod:`.layers` are what a pruned prompt is held in."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, QuantizedLayer, StaticLayer

from .. import ops
from .compat import BaseQuantizedLayer
from .layers import PRUNED_KINDS, EvictedFirstLayer, PrunedLayer, PrunedState

if TYPE_CHECKING:
    import torch

    from ..schedule import PruningSchedule


def is_empty(cache: Cache | None) -> bool:
    """Whether nothing is cached yet.

    A static layer counts its tokens on the device, where asking would make the host wait. One that has memory counts as
    filled; that of a pruned prompt has none after ``reset()``.
    """
    if cache is None or not cache.layers:
        return True
    if isinstance(cache.layers[0], StaticLayer):
        return not all(layer.is_initialized for layer in cache.layers)
    return bool(cache.get_seq_length() == 0)


def is_growing(cache: Cache | None) -> bool:
    """Whether entries of a layer can be taken out again, as chunks of a prompt and eviction need it."""
    if cache is None:
        return True
    growing = (DynamicLayer, PrunedLayer, EvictedFirstLayer)
    return not cache.offloading and all(type(layer) in growing for layer in cache.layers)


def cached_keys(cache: Cache | None, layer_idx: int, length: int) -> torch.Tensor | None:
    """The first `length` keys of a layer, where they can be read as they were written."""
    if cache is None or cache.offloading or isinstance(cache.layers[layer_idx], BaseQuantizedLayer):
        return None
    keys: torch.Tensor = cache.layers[layer_idx].keys
    return keys[:, :, :length]


def evict(cache: Cache, num_layers: int, like: PrunedState, indices: torch.Tensor, backend: str) -> None:
    """Drop pruned tokens from the layers below a stage, which have cached them already.

    Parameters
    ----------
    cache : Cache
    num_layers : int
        Layers below the stage. All of them hold the same tokens: the input of the stage.
    like : PrunedState
        State of a layer above the stage, for those below it as well.
    indices : Tensor [B, K], int64
        What the stage keeps of its input.
    backend : str
    """
    below: list[Any] = cache.layers[:num_layers]
    for i, old in enumerate(below):
        layer = PrunedLayer() if i else EvictedFirstLayer()
        layer.begin(like.kept, like.schedule)
        layer.stage, layer.prompt_length, layer.num_tail = like.stage, like.prompt_length, like.num_tail
        layer.is_padded, layer.is_ragged = like.is_padded, like.is_ragged
        own = indices.to(old.keys.device)
        layer.keys, layer.values = ops.gather_tokens([old.keys, old.values], own, backend=backend)
        layer.device, layer.dtype, layer.is_initialized = old.device, layer.keys.dtype, True
        cache.layers[i] = layer


def pruned_layer(cache: Cache | None, layer_idx: int) -> PrunedState | None:
    """This layer of the cache, where it is one that holds a pruned prompt."""
    if cache is None or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    return layer if isinstance(layer, PrunedState) else None


def deferring_layer(cache: Cache | None, layer_idx: int) -> PrunedState | None:
    """The same at the first stage, where a prompt is in the cache that may go on."""
    layer = pruned_layer(cache, layer_idx)
    return None if layer is None or layer.deferred is None else layer


def stage_of(cache: Cache | None, layer_idx: int) -> int:
    """Stages that the tokens in this layer of the cache went through."""
    layer = pruned_layer(cache, layer_idx)
    return 0 if layer is None else layer.stage


def install(cache: Cache, layer_idx: int, kept: torch.Tensor, schedule: PruningSchedule) -> PrunedState:
    """Make an empty layer one of a pruned prompt, before the decoder layer writes to it; `kept` is empty."""
    if layer_idx >= len(cache.layers):  # a DynamicCache without a config grows layer by layer
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[layer_idx]
    if type(layer) not in PRUNED_KINDS.values():
        layer = cache.layers[layer_idx] = PRUNED_KINDS[type(layer)](*_settings(layer))
    layer.begin(kept, schedule)
    return layer  # type: ignore[no-any-return]


def _settings(layer: CacheLayerMixin) -> tuple[int, ...]:
    """Arguments that make another layer like this one."""
    if isinstance(layer, StaticLayer):
        return (layer.max_cache_len,)
    if isinstance(layer, QuantizedLayer):
        return (layer.nbits, layer.axis_key, layer.axis_value, layer.q_group_size, layer.residual_length)
    return ()


def tell_others(cache: Cache) -> None:
    """Make a pruned cache refuse models that are not patched: their one mask for all layers would not fit.

    Layer 0 is the one that they ask. It is also the first that a crop shortens, so it asks the others before.
    """
    first: Any = cache.layers[0]
    if "get_mask_sizes" not in vars(first):
        first.get_mask_sizes = functools.partial(_refuse_others, cache)
        first.crop = functools.partial(_crop, cache)


def _refuse_others(cache: Cache, query_length: int) -> Any:
    pruned = [layer for layer in cache.layers if isinstance(layer, PrunedState)]
    if any(layer.kept.shape[1] and (layer.is_ragged or layer.kept.shape[1] != layer.prompt_length) for layer in pruned):
        raise RuntimeError(
            "this cache holds a prompt pruned by apply_sdtp, and the model that reads it is not patched: its layers "
            "hold different tokens, which one mask cannot fit. Go on inside the `with` block, or before handle.remove()"
        )
    return mask_sizes(cache.layers[0], query_length)


def _crop(cache: Cache, tokens_to_remove: int) -> None:
    for layer in cache.layers:
        if isinstance(layer, PrunedState) and layer.kept.shape[1]:
            layer.check_crop(tokens_to_remove)
    first: Any = cache.layers[0]
    type(first).crop(first, tokens_to_remove)


def mask_sizes(layer: Any, query_length: int) -> Any:
    """Length and offset of the keys that a mask is made for, whoever may read them."""
    return type(layer).get_mask_sizes(layer, query_length)


def check_supported(cache: Any) -> None:
    """Refuse caches whose layers cannot hold a length of their own."""
    supported = {*PRUNED_KINDS, *PRUNED_KINDS.values(), EvictedFirstLayer}
    kinds = {type(layer) for layer in getattr(cache, "layers", [])} - supported
    if not isinstance(cache, Cache) or kinds:
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or type(cache).__name__
        raise NotImplementedError(
            f"SDTP keeps a length per layer, which this cache cannot ({found}): pass a DynamicCache, StaticCache or "
            "QuantizedCache of a model without sliding-window layers"
        )
