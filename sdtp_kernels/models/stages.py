"""What happens at a pruning stage, for any decoder whose layers look like Qwen2's.

A prompt enters every layer through :class:`Prompt`, which prunes where a stage stands. Between two stages lies a
:class:`Segment`: layers that see the same tokens and share one mask.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from .. import backends, ops
from ..pruner import PrunerStack, PrunerWeights, TokenPruner, check_finite
from ..scorers import SCORERS, StageInput, question_attention
from .cache import PrunedLayer, install
from .checks import assert_left_padded
from .report import PrefillRecorder, SdtpHandle

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers.cache_utils import Cache

    from ..schedule import PruningSchedule


class Pruning(NamedTuple):
    """What :func:`sdtp_kernels.apply_sdtp` was given, in the form that the loop uses."""

    schedule: PruningSchedule
    scorers: dict[int, Callable[[StageInput], torch.Tensor] | Fused]
    backend: str
    handle: SdtpHandle


class Fused(NamedTuple):
    """A TokenPruner, ready for the fused op."""

    pruner: TokenPruner
    weights: PrunerWeights
    rms_eps: float | None

    def score_bias(self, stage: StageInput) -> torch.Tensor | None:
        """What the pruner adds to the scores beside the hidden states, if anything."""
        if not (self.pruner.distance or self.pruner.attention):
            return None
        last = stage.token_index.shape[1] - stage.keep_last - 1
        distance = stage.token_index[:, last : last + 1] - stage.token_index
        attention = question_attention(stage) if self.pruner.attention else None
        return self.pruner.score_bias(distance, attention, (stage.token_index >= 0) & (distance >= 0))


class _Selection(TypedDict):
    sink: int
    recent: int
    block_size: int | None
    rows: torch.Tensor | None


class Segment(NamedTuple):
    """The layers between two stages: they see the same tokens."""

    stage: int
    attention_mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    position_ids: torch.Tensor | None
    kept: torch.Tensor | None = None
    """``[B, n]`` column of ``input_ids`` of each token, -1 for padding; ``None`` while nothing is pruned."""


class Prompt:
    """One prompt on its way through the stages."""

    def __init__(
        self,
        decoder: Any,
        pruning: Pruning,
        padding_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        keep_last: int,
    ) -> None:
        self.decoder, self.pruning = decoder, pruning
        self.width = inputs_embeds.shape[1]
        self.keep_last = keep_last
        self.lengths = None
        if padding_mask is not None:
            assert_left_padded(padding_mask)
            self.lengths = padding_mask.sum(-1) - keep_last
        self.hidden_states_below: torch.Tensor | None = None
        self.recorder = None
        if not torch.compiler.is_compiling():
            self.recorder = _new_recorder(decoder, pruning.backend, inputs_embeds)

    def enter(
        self, layer_idx: int, hidden_states: torch.Tensor, segment: Segment, cache: Cache | None
    ) -> tuple[torch.Tensor, Segment]:
        """What goes into layer `layer_idx`: pruned where a stage stands before it."""
        schedule = self.pruning.schedule
        tokens_in, begin, end = hidden_states.shape[1], None, None
        if layer_idx in schedule.layers and schedule.drops(schedule.layers.index(layer_idx) + 1):
            begin = self.recorder.now() if self.recorder else None
            hidden_states, segment = self._prune(layer_idx, hidden_states, segment, cache)
            end = self.recorder.now() if self.recorder else None
        if segment.kept is not None and cache is not None:
            num_tail = self.keep_last
            if self.lengths is None:
                num_tail = num_tail + schedule.num_recent(self.width - self.keep_last)
            is_padded = self.lengths is not None
            install(cache, layer_idx, PrunedLayer(segment.stage, segment.kept, self.width, num_tail, is_padded))
        if self.recorder:
            self.recorder.layer(tokens_in, hidden_states.shape[1], begin, end)
        # Held over one layer, and only where a stage follows that may look at it.
        self.hidden_states_below = hidden_states if layer_idx + 1 in schedule.layers else None
        return hidden_states, segment

    def _prune(
        self, layer_idx: int, hidden_states: torch.Tensor, segment: Segment, cache: Cache | None
    ) -> tuple[torch.Tensor, Segment]:
        schedule, scorers, backend, _ = self.pruning
        stage = schedule.layers.index(layer_idx) + 1
        batch, width = hidden_states.shape[:2]
        plan = schedule.plan(self.width - self.keep_last, stage, self.keep_last, padded=self.lengths is not None)
        rows = None if self.lengths is None else schedule.plan_rows(self.lengths, stage, self.keep_last)
        selection: _Selection = {
            "sink": plan.sink,
            "recent": plan.recent,
            "block_size": plan.block_size,
            "rows": rows,
        }

        kept = segment.kept
        if kept is None:
            kept = torch.arange(width, device=hidden_states.device).expand(batch, -1)
        # Every row has positions of its own from here on.
        carried = [*(t.expand(batch, -1, -1) for t in segment.position_embeddings), kept]
        scorer = scorers[layer_idx]
        assert self.hidden_states_below is not None  # no stage stands before layer 0
        # Index in the row's own prompt; a row's padding stands before it.
        padding = 0 if self.lengths is None else (self.width - self.keep_last - self.lengths).unsqueeze(-1)
        stage_input = StageInput(
            hidden_states,
            segment.position_embeddings,
            kept - padding,
            self.keep_last,
            self.decoder.layers[layer_idx - 1],
            self.hidden_states_below,
            None if cache is None else cache.layers[layer_idx - 1].keys,
            self.lengths is not None,
        )
        if isinstance(scorer, Fused):
            hidden_states, (cos, sin, kept), indices = ops.prune_tokens(
                hidden_states, carried, *scorer.weights, plan.num_keep,
                **selection, pooling=scorer.pruner.pooling,
                score_bias=scorer.score_bias(stage_input), rms_eps=scorer.rms_eps, backend=backend,
            )  # fmt: skip
        else:
            scores = scorer(stage_input)
            indices = ops.select_tokens(scores.float(), plan.num_keep, **selection, backend=backend)
            hidden_states, cos, sin, kept = ops.gather_tokens([hidden_states, *carried], indices, backend=backend)
        mask = None
        if self.lengths is not None:
            kept = torch.where(indices < 0, -1, kept)  # a gather leaves zeros in padding, and 0 is a column
            mask = indices >= 0
        return hidden_states, Segment(
            stage, segment_mask(self.decoder, layer_idx, hidden_states, mask, cache), (cos, sin), None, kept
        )

    def leave(self) -> None:
        if self.recorder:
            self.recorder.finish()
            self.pruning.handle.record(self.recorder)


def continue_segment(
    decoder: Any,
    layer_idx: int,
    hidden_states: torch.Tensor,
    segment: Segment,
    padding_mask: torch.Tensor | None,
    cache: Cache,
) -> Segment:
    """The segment that begins at `layer_idx` when tokens are added to a pruned prompt."""
    layer: Any = cache.layers[layer_idx]
    if padding_mask is None and layer.is_padded:
        raise ValueError("this cache holds a padded batch: pass the attention_mask of the prompt and the new tokens")
    mask = None if padding_mask is None else layer.padding_mask(padding_mask)
    causal_mask = segment_mask(decoder, layer_idx, hidden_states, mask, cache)
    return segment._replace(stage=layer.stage, attention_mask=causal_mask)


def segment_mask(
    decoder: Any,
    layer_idx: int,
    hidden_states: torch.Tensor,
    padding_mask: torch.Tensor | None,
    cache: Cache | None,
) -> torch.Tensor | None:
    # No position_ids: those of kept tokens have gaps, which transformers would take for packed sequences. A padded
    # segment keeps its mask without asking the device whether it could do without.
    return create_causal_mask(  # type: ignore[no-any-return]
        decoder.config,
        hidden_states,
        padding_mask,
        cache,
        layer_idx=layer_idx,
        allow_is_causal_skip=padding_mask is None,
    )


def _new_recorder(decoder: Any, backend: str, inputs_embeds: torch.Tensor) -> PrefillRecorder:
    device, dtype = inputs_embeds.device, inputs_embeds.dtype
    if backend == "auto":
        chosen = next(status.name for status in backends.explain_backends(device, dtype) if status.chosen)
        backend = f"auto ({chosen})"
    attention = decoder.layers[0].self_attn
    kv_width = attention.k_proj.out_features + attention.v_proj.out_features
    kv_bytes_per_token = inputs_embeds.shape[0] * kv_width * dtype.itemsize
    return PrefillRecorder(inputs_embeds.shape[1], backend, device, kv_bytes_per_token)


def resolve_pruners(
    pruners: Mapping[int, Any] | str | Callable[[StageInput], torch.Tensor],
    schedule: PruningSchedule,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[int, Callable[[StageInput], torch.Tensor] | Fused]:
    if isinstance(pruners, str):
        if pruners not in SCORERS:
            raise ValueError(f"no scorer {pruners!r}; known: {', '.join(SCORERS)}. For a file use load_pruners(path)")
        pruners = SCORERS[pruners]
    if not isinstance(pruners, Mapping):
        if not callable(pruners) or isinstance(pruners, nn.Module):
            raise ValueError(
                f"pruners: expected {{layer: module}}, a scorer's name or function, got {type(pruners).__name__}"
            )
        return dict.fromkeys(schedule.layers, pruners)
    if isinstance(pruners, PrunerStack):
        _check_header(pruners, config)
    missing = [layer for layer in schedule.layers if layer not in pruners]
    if missing:
        raise ValueError(f"no pruner for layers {missing} of the schedule; there are pruners for {sorted(pruners)}")
    used = {layer: pruners[layer] for layer in schedule.layers}
    check_finite({layer: pruner for layer, pruner in used.items() if isinstance(pruner, nn.Module)})
    return {layer: _resolve_pruner(layer, pruner, config, device, dtype) for layer, pruner in used.items()}


def _resolve_pruner(
    layer: int, pruner: Any, config: Any, device: torch.device, dtype: torch.dtype
) -> Callable[[StageInput], torch.Tensor] | Fused:
    if isinstance(pruner, TokenPruner):
        if pruner.hidden_size != config.hidden_size:
            raise ValueError(
                f"pruner of layer {layer} has hidden_size={pruner.hidden_size}, the model {config.hidden_size}"
            )
        # A copy: the model keeps the weights it was given, whatever becomes of the module.
        pruner = copy.deepcopy(pruner).to(device).requires_grad_(False)
        return Fused(pruner, pruner.weights(dtype), pruner.rms_eps if pruner.rms_norm else None)
    if isinstance(pruner, nn.Module):
        return lambda stage: pruner(stage.hidden_states)
    if callable(pruner):
        return pruner  # type: ignore[no-any-return]
    raise ValueError(f"pruner of layer {layer}: expected a module or a scorer function, got {type(pruner).__name__}")


def _check_header(pruners: PrunerStack, config: Any) -> None:
    names = ("model_type", "hidden_size", "num_hidden_layers")
    pairs = {name: (getattr(pruners.header, name), getattr(config, name)) for name in names}
    differences = [f"{name}: file {a}, model {b}" for name, (a, b) in pairs.items() if a is not None and a != b]
    if differences:
        raise ValueError(
            f"these pruners were made for another model ({'; '.join(differences)}); load the file of this model"
        )
