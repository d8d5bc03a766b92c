"""Qwen2: the decoder loop of transformers with pruning stages in it.

The loop below is ``Qwen2Model.forward`` of transformers 5.24 plus three things: a stage may replace the hidden states
and position embeddings before a layer, every stage begins a segment with a mask of its own, and the cache layers of a
pruned prompt carry what was kept. Prompts that are not pruned never reach it: they go to the original forward.
"""

from __future__ import annotations

import contextlib
import types
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from .. import backends
from .attention import Visibility, as_it_is, masks_for_generate, see_prompt
from .cache import is_empty, is_growing, stage_of, waiting_layer
from .checks import (
    KEEP_LAST,
    PROMPT_LENGTH,
    assert_left_padded,
    check_call,
    check_inputs,
    check_is_turn,
    check_layers,
    check_pieces,
    check_takes_pieces,
    decoder_of,
)
from .devices import device_of, replace_forward, tensor_parallel_group
from .report import SdtpHandle
from .scoring import resolve_pruners
from .settings import SETTINGS, Current, make_settings
from .stages import (
    Piece,
    Prompt,
    Pruning,
    Segment,
    append_waiting,
    continue_segment,
    later_piece_is_padded,
    token_index,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import Qwen2ForCausalLM, Qwen2Model
    from transformers.cache_utils import Cache

    from ..schedule import PruningSchedule
    from ..scorers import StageInput


def apply_sdtp_to_qwen2(
    model: Qwen2ForCausalLM | Qwen2Model,
    pruners: Mapping[int, Any] | str | Callable[[StageInput], torch.Tensor],
    schedule: PruningSchedule,
    backend: str = "auto",
    *,
    later_turns: bool = True,
    evict_earlier_kv: bool = False,
) -> SdtpHandle:
    """:func:`sdtp_kernels.apply_sdtp` for Qwen2. Everything is checked before anything is changed."""
    backends.check_name(backend)
    decoder = decoder_of(model)
    config = decoder.config
    check_layers(schedule, config)
    # A stage runs where the layer below it does.
    devices = {layer: device_of(decoder.layers[layer - 1]) for layer in schedule.layers}
    for device in devices.values():
        backends.choose(backend, device, decoder.dtype)
    scorers = resolve_pruners(pruners, schedule, config, devices, decoder.dtype)

    undo = contextlib.ExitStack()
    current = Current(make_settings(schedule))
    handle = SdtpHandle(undo.close, schedule, current)
    group = tensor_parallel_group(model)
    pruning = Pruning(schedule, scorers, backend, handle, current, later_turns, evict_earlier_kv, group)
    undo.callback(replace_forward(decoder, _make_forward(pruning)))
    if model is not decoder:
        undo.callback(model.register_forward_pre_hook(check_call, with_kwargs=True).remove)
        model._prefill = types.MethodType(_prefill, model)
        undo.callback(model.__dict__.pop, "_prefill")
        model.create_masks_for_generate = masks_for_generate
        undo.callback(model.__dict__.pop, "create_masks_for_generate")
        model.generate = types.MethodType(_make_generate(handle), model)
        undo.callback(model.__dict__.pop, "generate")
    return handle


def _make_generate(handle: SdtpHandle) -> Callable[..., Any]:
    """``generate()`` that takes the settings of a request as keywords."""

    def generate(self: Qwen2ForCausalLM, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        with handle.request(**given) if given else contextlib.nullcontext():
            return type(self).generate(self, *args, **kwargs)

    return generate


def _prefill(
    model: Qwen2ForCausalLM,
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    is_first_iteration: bool = True,
) -> Any:
    """``generate()``'s prefill, which alone knows how long the prompt is that its chunks belong to."""
    if generation_config.prefill_chunk_size is not None:
        check_takes_pieces(model_kwargs.get("cache"))
    if is_first_iteration:  # an assistant model drafts by calls that are no prefill
        attention_mask = model_kwargs.get("attention_mask")
        tokens = input_ids if attention_mask is None else attention_mask
        model_kwargs[PROMPT_LENGTH] = tokens.shape[1]
    try:
        return type(model)._prefill(model, input_ids, generation_config, model_kwargs, is_first_iteration)
    finally:
        model_kwargs.pop(PROMPT_LENGTH, None)


def _why_only_added(pruning: Pruning, is_enabled: bool, tokens: int) -> str:
    """What the report says of a prompt that continues a cache and is not pruned."""
    added = f"{tokens} tokens added to a cache, none of them pruned: "
    if not is_enabled:
        return added + "every keep ratio is 1.0, or the request not enabled"
    if pruning.schedule.budget == "global":
        return added + (
            "the global budget ranks one prompt at once. This is not what one prompt with all the tokens would give; "
            'under PruningSchedule(budget="block") it is'
        )
    return added + (
        "later turns are pruned where the cache began pruned, is a DynamicCache that is not offloaded, and apply_sdtp "
        "was called with later_turns=True and evict_earlier_kv=False"
    )


def _make_forward(pruning: Pruning) -> Callable[..., Any]:
    schedule, handle = pruning.schedule, pruning.handle
    may_go_on = schedule.budget == "block" and pruning.later_turns and not pruning.evict_earlier_kv

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self: Qwen2Model,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        keep_last, prompt_length = kwargs.pop(KEEP_LAST, 0), kwargs.pop(PROMPT_LENGTH, None)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        width = 0 if inputs is None else inputs.shape[1]
        is_first, in_pieces = is_empty(cache), is_growing(cache)
        past = 0 if cache is None or is_first else cache.get_seq_length()
        is_last = prompt_length is None or not (is_first or in_pieces) or past + width >= prompt_length
        earlier = waiting_layer(cache, schedule.layers[0])
        settings = pruning.current.settings
        if is_first:
            shortest = min(own.min_prompt for own in settings.schedules)
            is_long = width - keep_last >= shortest
            is_prompt = settings.is_enabled and (is_long or not is_last or (may_go_on and in_pieces))
            if not is_prompt and not torch.compiler.is_compiling():
                handle.note(
                    f"a prompt of {width - keep_last} tokens is shorter than min_prompt={shortest}: not pruned"
                    if settings.is_enabled
                    else "every keep ratio is 1.0, or the request not enabled: nothing to prune"
                )
        else:
            is_asked = prompt_length is not None and settings.is_enabled
            is_prompt = earlier is not None and (is_asked or earlier.is_behind)
            if prompt_length is not None and not is_prompt and not torch.compiler.is_compiling():
                if settings.is_enabled:
                    check_is_turn(pruning, cache)
                handle.note(_why_only_added(pruning, settings.is_enabled, width))
        is_pruned = is_prompt or (not is_first and any(stage_of(cache, i) for i in range(len(self.layers))))
        if not is_pruned:
            return type(self).forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )

        check_inputs(self, pruning, input_ids, attention_mask, position_ids, cache, inputs_embeds, kwargs)
        if is_prompt:
            check_pieces(pruning, is_chunk=not is_last, is_later=earlier is not None)
            if not is_last:
                check_takes_pieces(cache)
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = (torch.arange(width, device=inputs_embeds.device) + past).unsqueeze(0)

        countable = as_it_is(self.config, cache)
        dense_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, countable, position_ids)
        # transformers has just looked whether the batch is padded; where it found none, neither mask is needed.
        padding_mask = attention_mask.bool() if attention_mask is not None and dense_mask is not None else None
        # Of a prompt, or of what may become a part of one; nobody asks for that of others.
        index = token_index(padding_mask if in_pieces or is_first else None, past, inputs_embeds)
        hidden_states, visibility = inputs_embeds, Visibility(dense_mask, {})
        if is_first and padding_mask is not None:
            visibility = see_prompt(self.config, hidden_states, padding_mask, cache, 0)
        segment = Segment(0, visibility, self.rotary_emb(hidden_states, position_ids), position_ids, index)
        prompt = None
        if is_prompt:
            is_padded = padding_mask is not None
            if not is_first and earlier is not None:
                is_padded = later_piece_is_padded(self, inputs_embeds, attention_mask, earlier)
            elif padding_mask is not None:
                assert_left_padded(padding_mask, is_last)
            is_ragged = is_padded or settings.is_ragged or (earlier is not None and earlier.is_ragged)
            piece = Piece(past + width, keep_last, is_padded, is_ragged, is_last)
            prompt = Prompt(self, pruning, settings, cache, piece, inputs_embeds)

        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if prompt is not None:
                hidden_states, segment = prompt.enter(i, hidden_states, segment)
                if hidden_states.shape[1] == 0:  # all of it waits
                    break
            elif stage_of(cache, i) != segment.stage:
                if earlier is not None and i == schedule.layers[0]:
                    append_waiting(earlier, hidden_states, segment, padding_mask is not None)
                may_be_padded = padding_mask is not None
                segment = continue_segment(self, i, hidden_states, segment, attention_mask, may_be_padded, cache)
            hidden_states = layer(
                hidden_states,
                attention_mask=segment.visibility.attention_mask,
                position_embeddings=segment.position_embeddings,
                position_ids=segment.position_ids,
                cache=cache,
                use_cache=use_cache,
                **segment.visibility.kwargs,
                **kwargs,
            )
        if prompt is not None:
            prompt.leave()

        output = BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache if use_cache else None)
        return output if return_dict else output.to_tuple()

    return forward  # type: ignore[no-any-return]
