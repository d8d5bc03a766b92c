"""Qwen2: the decoder loop of transformers with pruning stages in it.

The loop below is ``Qwen2Model.forward`` of transformers 5.x plus three things: a stage may replace the hidden states
and position embeddings before a layer, every stage begins a segment with a mask of its own, and the cache layers of a
pruned prompt carry what was kept. Prompts that are not pruned never reach it: they go to the original forward.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import Qwen2ForCausalLM, Qwen2Model
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .. import backends, ops
from ..pruner import PrunerStack, PrunerWeights, TokenPruner, check_finite
from ..scorers import SCORERS, StageInput, attention_score
from .cache import PrunedLayer, check_supported, install, stage_of
from .report import PrefillRecorder, SdtpHandle

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers.cache_utils import Cache

    from ..schedule import PruningSchedule

ATTENTIONS = ("sdpa", "eager")
TRANSFORMERS = (Version("5.23"), Version("6"))  # from, before: the range the tests run on

# How the outer model's hook tells the decoder about tokens that must survive; travels in its keyword arguments.
_KEEP_LAST = "sdtp_keep_last"


def apply_sdtp_to_qwen2(
    model: Qwen2ForCausalLM | Qwen2Model,
    pruners: Mapping[int, Any] | str | Callable[[StageInput], torch.Tensor],
    schedule: PruningSchedule,
    backend: str = "auto",
) -> SdtpHandle:
    """:func:`sdtp_kernels.apply_sdtp` for Qwen2. Everything is checked before anything is changed."""
    backends.check_name(backend)
    decoder = _decoder_of(model)
    config = decoder.config
    _check_layers(schedule, config)
    device, dtype = next(decoder.parameters()).device, decoder.dtype
    backends.choose(backend, device, dtype)
    scorers = _resolve_pruners(pruners, schedule, config, device, dtype)

    undo = contextlib.ExitStack()
    handle = SdtpHandle(undo.close)
    pruning = _Pruning(schedule, scorers, backend, handle)
    decoder.forward = types.MethodType(_make_forward(pruning), decoder)
    undo.callback(decoder.__dict__.pop, "forward")
    if model is not decoder:
        undo.callback(model.register_forward_pre_hook(_check_call, with_kwargs=True).remove)
        model._prefill = types.MethodType(_refuse_chunks, model)
        undo.callback(model.__dict__.pop, "_prefill")
    return handle


class _Pruning(NamedTuple):
    """What :func:`apply_sdtp_to_qwen2` was given, in the form that the loop uses."""

    schedule: PruningSchedule
    scorers: dict[int, Callable[[StageInput], torch.Tensor] | _Fused]
    backend: str
    handle: SdtpHandle


class _Fused(NamedTuple):
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
        attention = attention_score(stage) if self.pruner.attention else None
        return self.pruner.score_bias(distance, attention, (stage.token_index >= 0) & (distance >= 0))


class _Selection(TypedDict):
    sink: int
    recent: int
    block_size: int | None
    rows: torch.Tensor | None


class _Segment(NamedTuple):
    """The layers between two stages: they see the same tokens."""

    stage: int
    attention_mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    position_ids: torch.Tensor | None
    kept: torch.Tensor | None = None
    """``[B, n]`` column of ``input_ids`` of each token, -1 for padding; ``None`` while nothing is pruned."""


def _make_forward(pruning: _Pruning) -> Callable[..., Any]:
    schedule, handle = pruning.schedule, pruning.handle
    any_drop = any(schedule.drops(stage) for stage in range(1, schedule.num_stages + 1))

    def forward(
        self: Qwen2Model,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        keep_last = kwargs.pop(_KEEP_LAST, 0)
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        if is_prefill:
            inputs = input_ids if inputs_embeds is None else inputs_embeds
            length = 0 if inputs is None else inputs.shape[1] - keep_last
            is_pruned = any_drop and length >= schedule.min_prompt
            if not is_pruned and not torch.compiler.is_compiling():
                handle.note(
                    f"a prompt of {length} tokens is shorter than min_prompt={schedule.min_prompt}: not pruned"
                    if any_drop
                    else "every keep ratio is 1.0: nothing to prune"
                )
        else:
            is_pruned = any(stage_of(past_key_values, i) for i in range(len(self.layers)))
        if not is_pruned:
            return type(self).forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )

        _check_inputs(self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, kwargs)
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)

        dense_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        # transformers has just looked whether the batch is padded; where it found none, neither mask is needed.
        padding_mask = attention_mask.bool() if attention_mask is not None and dense_mask is not None else None
        hidden_states = inputs_embeds
        segment = _Segment(0, dense_mask, self.rotary_emb(hidden_states, position_ids), position_ids)
        prompt = _Prompt(self, pruning, padding_mask, inputs_embeds, keep_last) if is_prefill else None

        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if prompt is not None:
                hidden_states, segment = prompt.enter(i, hidden_states, segment, past_key_values)
            elif stage_of(past_key_values, i) != segment.stage:
                segment = _continue_segment(self, i, hidden_states, segment, padding_mask, past_key_values)
            hidden_states = layer(
                hidden_states,
                attention_mask=segment.attention_mask,
                position_embeddings=segment.position_embeddings,
                position_ids=segment.position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        if prompt is not None:
            prompt.leave()

        output = BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )
        return output if return_dict else output.to_tuple()

    return forward


class _Prompt:
    """One prompt on its way through the stages."""

    def __init__(
        self,
        decoder: Qwen2Model,
        pruning: _Pruning,
        padding_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        keep_last: int,
    ) -> None:
        self.decoder, self.pruning = decoder, pruning
        self.width = inputs_embeds.shape[1]
        self.keep_last = keep_last
        self.lengths = None
        if padding_mask is not None:
            _assert_left_padded(padding_mask)
            self.lengths = padding_mask.sum(-1) - keep_last
        self.hidden_states_below = inputs_embeds
        self.recorder = None
        if not torch.compiler.is_compiling():
            self.recorder = _new_recorder(decoder, pruning.backend, inputs_embeds)

    def enter(
        self, layer_idx: int, hidden_states: torch.Tensor, segment: _Segment, cache: Cache | None
    ) -> tuple[torch.Tensor, _Segment]:
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
        self.hidden_states_below = hidden_states
        return hidden_states, segment

    def _prune(
        self, layer_idx: int, hidden_states: torch.Tensor, segment: _Segment, cache: Cache | None
    ) -> tuple[torch.Tensor, _Segment]:
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
        )
        if isinstance(scorer, _Fused):
            hidden_states, (cos, sin, kept), indices = ops.prune_tokens(
                hidden_states, carried, *scorer.weights, plan.num_keep,
                **selection, score_bias=scorer.score_bias(stage_input), rms_eps=scorer.rms_eps, backend=backend,
            )  # fmt: skip
        else:
            scores = scorer(stage_input)
            indices = ops.select_tokens(scores.float(), plan.num_keep, **selection, backend=backend)
            hidden_states, cos, sin, kept = ops.gather_tokens([hidden_states, *carried], indices, backend=backend)
        mask = None
        if self.lengths is not None:
            kept = torch.where(indices < 0, -1, kept)  # a gather leaves zeros in padding, and 0 is a column
            mask = indices >= 0
        return hidden_states, _Segment(
            stage, _segment_mask(self.decoder, layer_idx, hidden_states, mask, cache), (cos, sin), None, kept
        )

    def leave(self) -> None:
        if self.recorder:
            self.recorder.finish()
            self.pruning.handle.record(self.recorder)


def _continue_segment(
    decoder: Qwen2Model,
    layer_idx: int,
    hidden_states: torch.Tensor,
    segment: _Segment,
    padding_mask: torch.Tensor | None,
    cache: Cache,
) -> _Segment:
    """The segment that begins at `layer_idx` when tokens are added to a pruned prompt."""
    layer: Any = cache.layers[layer_idx]
    if padding_mask is None and layer.is_padded:
        raise ValueError("this cache holds a padded batch: pass the attention_mask of the prompt and the new tokens")
    mask = None if padding_mask is None else layer.padding_mask(padding_mask)
    causal_mask = _segment_mask(decoder, layer_idx, hidden_states, mask, cache)
    return segment._replace(stage=layer.stage, attention_mask=causal_mask)


def _segment_mask(
    decoder: Qwen2Model,
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


def _new_recorder(decoder: Qwen2Model, backend: str, inputs_embeds: torch.Tensor) -> PrefillRecorder:
    device, dtype = inputs_embeds.device, inputs_embeds.dtype
    if backend == "auto":
        chosen = next(status.name for status in backends.explain_backends(device, dtype) if status.chosen)
        backend = f"auto ({chosen})"
    attention = decoder.layers[0].self_attn
    kv_width = attention.k_proj.out_features + attention.v_proj.out_features
    kv_bytes_per_token = inputs_embeds.shape[0] * kv_width * dtype.itemsize
    return PrefillRecorder(inputs_embeds.shape[1], backend, device, kv_bytes_per_token)


# ------------------------------------------------------------------------------------------ checks when applying


def _decoder_of(model: Any) -> Qwen2Model:
    found = Version(transformers.__version__)
    if not TRANSFORMERS[0] <= found < TRANSFORMERS[1]:
        raise NotImplementedError(
            f"transformers {found}: the Qwen2 patch is tested on >= {TRANSFORMERS[0]}, < {TRANSFORMERS[1]}; install one"
        )
    if not isinstance(model, (Qwen2ForCausalLM, Qwen2Model)):
        raise NotImplementedError(
            f"{type(model).__name__}: heads that read other tokens than the last see a pruned sequence; use "
            "Qwen2ForCausalLM or Qwen2Model"
        )
    decoder = model.model if isinstance(model, Qwen2ForCausalLM) else model
    if "forward" in decoder.__dict__:
        raise RuntimeError(
            "the decoder's forward is replaced already, by apply_sdtp (call handle.remove() first) or by another tool "
            "(such as the hooks of accelerate, which are not supported yet)"
        )
    attention = decoder.config._attn_implementation
    if attention not in ATTENTIONS:
        raise NotImplementedError(
            f"attn_implementation={attention!r}: supported are {', '.join(ATTENTIONS)}; load the model with one of them"
        )
    if "sliding_attention" in decoder.config.layer_types:
        raise NotImplementedError(
            "sliding-window layers count distance in tokens, which pruning changes: load the model with "
            "use_sliding_window=False"
        )
    return decoder


def _check_layers(schedule: PruningSchedule, config: Any) -> None:
    if schedule.layers[-1] >= config.num_hidden_layers:
        raise ValueError(
            f"the schedule prunes at layer {schedule.layers[-1]}, the model has layers 0 to "
            f"{config.num_hidden_layers - 1}; PruningSchedule.every({config.num_hidden_layers}) fits"
        )


def _resolve_pruners(
    pruners: Mapping[int, Any] | str | Callable[[StageInput], torch.Tensor],
    schedule: PruningSchedule,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[int, Callable[[StageInput], torch.Tensor] | _Fused]:
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
) -> Callable[[StageInput], torch.Tensor] | _Fused:
    if isinstance(pruner, TokenPruner):
        if pruner.hidden_size != config.hidden_size:
            raise ValueError(
                f"pruner of layer {layer} has hidden_size={pruner.hidden_size}, the model {config.hidden_size}"
            )
        # A copy: the model keeps the weights it was given, whatever becomes of the module.
        pruner = copy.deepcopy(pruner).to(device).requires_grad_(False)
        return _Fused(pruner, pruner.weights(dtype), pruner.rms_eps if pruner.rms_norm else None)
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


# ------------------------------------------------------------------------------------------ checks of every call


def _check_call(model: Qwen2ForCausalLM, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pre-hook of the outer model, which alone sees labels and logits_to_keep."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("labels") is not None:
        raise NotImplementedError(
            "labels: a loss over pruned logits would be wrong. Score a continuation with logits_to_keep=k, which is "
            "never pruned, or remove() the patch"
        )
    logits_to_keep = given.get("logits_to_keep", 0)
    if not isinstance(logits_to_keep, int):
        raise NotImplementedError("logits_to_keep as indices does not survive pruning: pass a count of last tokens")
    if logits_to_keep > 1:
        kwargs = {**kwargs, _KEEP_LAST: logits_to_keep - 1}
    return args, kwargs


def _refuse_chunks(
    model: Qwen2ForCausalLM, input_ids: torch.Tensor, generation_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Stands before ``generate()``'s prefill."""
    if generation_config.prefill_chunk_size is not None:
        raise NotImplementedError(
            "prefill_chunk_size: only the first chunk would be pruned. Prefill in one piece (prefill_chunk_size=None)"
        )
    return type(model)._prefill(model, input_ids, generation_config, *args, **kwargs)


def _check_inputs(
    decoder: Qwen2Model,
    input_ids: torch.Tensor | None,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Any,
    inputs_embeds: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if cache is not None:
        check_supported(cache)
    if attention_mask is not None and getattr(attention_mask, "ndim", None) != 2:
        raise NotImplementedError(
            "a prebuilt attention mask cannot follow the tokens that are kept: pass the [batch, tokens] padding mask"
        )
    if position_ids is not None and attention_mask is None and cache is None:
        raise NotImplementedError(
            "position_ids without attention_mask and cache may mean packed sequences, which are not supported: pass an "
            "attention_mask (of ones) as well"
        )
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name, getattr(decoder.config, name, False)):
            raise NotImplementedError(
                f"{name}: pruned layers have different lengths. Leave it out, or remove() the patch for this call"
            )


def _assert_left_padded(padding_mask: torch.Tensor) -> None:
    # An assertion on the device: reading the mask here would make the host wait for a GPU.
    mask = padding_mask.bool()
    is_left_padded = (mask[:, 1:] >= mask[:, :-1]).all() & mask[:, -1].all()
    torch._assert_async(
        is_left_padded,
        "SDTP needs left padding: attention_mask has a zero behind a one. Set tokenizer.padding_side='left'",
    )
