"""Qwen2: the decoder loop of transformers with pruning stages in it.

The loop below is ``Qwen2Model.forward`` of transformers 5.x plus three things: a stage may replace the hidden states
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

from .. import backends
from .cache import stage_of
from .checks import KEEP_LAST, check_call, check_inputs, check_layers, decoder_of, refuse_chunks
from .report import SdtpHandle
from .stages import Prompt, Pruning, Segment, continue_segment, resolve_pruners

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
) -> SdtpHandle:
    """:func:`sdtp_kernels.apply_sdtp` for Qwen2. Everything is checked before anything is changed."""
    backends.check_name(backend)
    decoder = decoder_of(model)
    config = decoder.config
    check_layers(schedule, config)
    device, dtype = next(decoder.parameters()).device, decoder.dtype
    backends.choose(backend, device, dtype)
    scorers = resolve_pruners(pruners, schedule, config, device, dtype)

    undo = contextlib.ExitStack()
    handle = SdtpHandle(undo.close)
    pruning = Pruning(schedule, scorers, backend, handle)
    decoder.forward = types.MethodType(_make_forward(pruning), decoder)
    undo.callback(decoder.__dict__.pop, "forward")
    if model is not decoder:
        undo.callback(model.register_forward_pre_hook(check_call, with_kwargs=True).remove)
        model._prefill = types.MethodType(refuse_chunks, model)
        undo.callback(model.__dict__.pop, "_prefill")
    return handle


def _make_forward(pruning: Pruning) -> Callable[..., Any]:
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
        keep_last = kwargs.pop(KEEP_LAST, 0)
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

        check_inputs(self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, kwargs)
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
        segment = Segment(0, dense_mask, self.rotary_emb(hidden_states, position_ids), position_ids)
        prompt = Prompt(self, pruning, padding_mask, inputs_embeds, keep_last) if is_prefill else None

        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if prompt is not None:
                hidden_states, segment = prompt.enter(i, hidden_states, segment, past_key_values)
            elif stage_of(past_key_values, i) != segment.stage:
                segment = continue_segment(self, i, hidden_states, segment, padding_mask, past_key_values)
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
