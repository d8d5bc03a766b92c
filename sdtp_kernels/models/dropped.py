"""Dropped tokens that keep predicted keys and values: out of the computation, not out of memory.

A stage reduces what is computed, as it always does, and what it drops is encoded once. The layers after it compute
queries, keys and values of the tokens that are left; the cache that they are handed completes keys and values to the
whole prompt, by position, and stores them at once. So every layer of the cache has the logical length, and is what it
would be after a dense prefill: later calls are the model's own.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import StaticLayer

from .. import backends, ops, reference
from .devices import device_of
from .masks import Mask, Visible, position_mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

    from ..kv_predictor import KVPredictor
    from ..schedule import PruningSchedule
    from .chunks import Segment


def on_layers(
    predictor: KVPredictor, decoder: Any, schedule: PruningSchedule, group: ProcessGroup | None
) -> KVPredictor:
    """The maps that the schedule needs, in the model's dtype, each where the layers are that use it.

    Of tensor parallelism, each process has the maps of its own heads.
    """
    own = copy.copy(predictor)
    number, rank = (1, 0) if group is None else (group.size(), group.rank())
    if predictor.num_key_value_heads % number:
        raise NotImplementedError(
            f"dropped_kv='predicted' with tensor parallelism over {number} processes: {predictor.num_key_value_heads} "
            "key heads do not split into equal shares; pass dropped_kv='none'"
        )
    own.num_key_value_heads //= number
    heads = slice(rank * own.num_key_value_heads, (rank + 1) * own.num_key_value_heads)
    own._modules = dict(predictor._modules)
    own.down, own.up = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    for name, linear in predictor.down.items():
        if int(name) in schedule.layers:
            own.down[name] = _moved(linear, decoder.layers[int(name) - 1], decoder.dtype)
    for name, linear in predictor.up.items():
        stage, layer = map(int, name.split(":"))
        if stage in schedule.layers:
            own.up[name] = _moved(linear, decoder.layers[layer], decoder.dtype)
            for p in own.up[name].parameters() if number > 1 else ():
                p.data = p.data.unflatten(0, (2, -1, own.head_dim))[:, heads].flatten(0, 2)  # keys and values
    return own


def _moved(linear: torch.nn.Module, layer: Any, dtype: torch.dtype) -> torch.nn.Module:
    return copy.deepcopy(linear).to(device_of(layer), dtype).requires_grad_(False)


def has_position_attention(backend: str, decoder: Any) -> bool:
    """Whether the op beats one attention with a mask wherever this model has layers.

    The CUDA library has no kernel of its own for it.
    """
    devices = {device_of(layer) for layer in decoder.layers}
    if backend == "reference":
        return True
    chosen = [backends.choose(backend, device, decoder.dtype) for device in devices]
    return all(module.position_attention is not reference.position_attention for module in chosen)


class _Dropped(NamedTuple):
    """What one stage has dropped."""

    stage: int
    """The layer after the stage."""
    tokens: torch.Tensor
    """``[B, n, R]``, encoded for the maps of this stage."""
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    columns: torch.Tensor
    """``[B, n]`` column of each in the batch; -1 for none."""


class CompletedCache:
    """Stands in for the cache in the layers of one prefill: what they compute is completed by what is predicted."""

    def __init__(self, predictor: KVPredictor, cache: Cache | None, backend: str, by_position: bool) -> None:
        self._predictor, self._cache, self._backend, self._by_position = predictor, cache, backend, by_position
        self._dropped: list[_Dropped] = []
        self.computed_keys: torch.Tensor | None = None
        """Those that the last layer computed, ``[B, kv_heads, n, d]``, for a stage that scores by them."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing has been dropped yet."""
        return not self._dropped

    def begin(self, token_index: torch.Tensor) -> None:
        """Tokens ``[B, N]`` arrive at the first stage: layers from here on write all of them, each row's last one at
        the end."""
        self.token_index = token_index
        self._offset = token_index.shape[1] - 1 - token_index[:, -1:]

    def drop(self, layer_idx: int, hidden_states: torch.Tensor, arrived: Segment, indices: torch.Tensor) -> None:
        """Note which of the tokens that arrived the stage before layer `layer_idx` drops: `indices` ``[B, n]``, -1 for
        none."""
        carried = [
            hidden_states,
            *(t.expand(hidden_states.shape[0], -1, -1) for t in arrived.position_embeddings),
            arrived.token_index,
        ]
        dropped, cos, sin, index = ops.gather_tokens(carried, indices, backend=self._backend)
        columns = torch.where(indices < 0, -1, self._columns(index))
        self._dropped.append(_Dropped(layer_idx, self._predictor.encode(layer_idx, dropped), (cos, sin), columns))

    def mask(
        self,
        config: PreTrainedConfig,
        hidden_states: torch.Tensor,
        token_index: torch.Tensor,
        written: torch.Tensor,
        is_ragged: bool,
    ) -> Mask:
        """The mask of the tokens that are left, over all keys that their layers hold.

        `written` ``[B, cached + N]`` are the tokens of these keys. From here on `token_index` are what layers compute.
        """
        computed = self._columns(token_index)
        columns = torch.cat([computed, *(d.columns.to(computed.device) for d in self._dropped)], dim=-1)
        num_columns, num_keys = self.token_index.shape[1], written.shape[1]
        source = columns.new_full((columns.shape[0], num_columns + 1), -1)
        place = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        self._source = source.scatter(1, columns + 1, place)[:, 1:].contiguous()  # -1 is padding, which nobody sees
        is_token = written.to(columns.device) >= 0
        num_padding = (is_token.cumsum(-1) == 0).sum(-1)
        num_visible = torch.where(token_index < 0, num_padding.unsqueeze(-1), num_keys - num_columns + computed + 1)
        # Chunks of padded rows have padding between those that are cached and those that come.
        is_contiguous = num_keys == num_columns or not is_ragged
        if self._by_position and is_contiguous and config._attn_implementation == "sdpa":
            return Mask(Visible(num_visible, num_padding if is_ragged else None, self._backend), {})
        # A query that is padding sees the first key: what it computes is finite, and nobody reads it.
        num_visible = torch.maximum(num_visible, num_padding.unsqueeze(-1) + 1)
        return position_mask(config, hidden_states.dtype, num_visible, is_token)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the cache's own: the layer's keys, rotated, and values come in; those of all tokens go out."""
        self.computed_keys = key_states
        device, dtype = key_states.device, key_states.dtype
        all_keys, all_values = [key_states], [value_states]
        for stage, tokens, (cos, sin), _ in self._dropped:
            keys, values = self._predictor(stage, layer_idx, tokens.to(device))
            all_keys.append(reference.rotate(keys, cos.to(device), sin.to(device)).to(dtype))
            all_values.append(values.to(dtype))
        both = [torch.cat(all_keys, dim=2), torch.cat(all_values, dim=2)]
        keys, values = ops.gather_tokens(both, self._source.to(device), backend=self._backend)
        if self._cache is None:
            return keys, values
        keys, values = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        if not isinstance(self._cache.layers[layer_idx], StaticLayer):
            return keys, values
        num_columns = self.token_index.shape[1]  # a static layer hands out the room after the prompt as well
        return keys[:, :, :num_columns], values[:, :, :num_columns]

    def _columns(self, token_index: torch.Tensor) -> torch.Tensor:
        """Where these tokens stand among all that are written."""
        return torch.where(token_index < 0, -1, token_index + self._offset.to(token_index.device))
