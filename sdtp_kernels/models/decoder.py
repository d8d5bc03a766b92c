"""The decoder loop of transformers with pruning stages in it.

It is the loop of every family's ``Model.forward`` plus three things: a stage may replace the hidden states and position
embeddings before a layer, every stage begins a segment with a mask of its own, and the cache layers of a pruned prompt
carry what was kept. Calls that neither prune nor meet a pruned cache never reach it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask

from ..lexical import PromptTokens
from . import compat
from .cache import deferring_layer, evict, is_empty, is_growing, stage_of, tell_others
from .call import Call, CallInfo, classify_call
from .checks import assert_left_padded, check_chunks, check_inputs, check_is_turn, check_takes_chunks
from .chunks import (
    Chunk,
    Counts,
    Prefill,
    Segment,
    append_deferred,
    appended_segment,
    hold,
    is_chunk_padded,
    join,
    token_index,
)
from .dropped import CompletedCache
from .masks import Mask, as_it_is, cached_mask, prompt_mask
from .report import PrefillRecorder
from .stage import Below, prune

if TYPE_CHECKING:
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import BaseModelOutputWithPast

    from .handle import SdtpHandle


def classify(
    handle: SdtpHandle, info: CallInfo, num_layers: int, cache: Cache | None, width: int
) -> tuple[Call, CallInfo]:
    """What a call of `width` columns is; its info comes back with the settings that hold for it."""
    schedule = handle.schedule
    settings = info.settings or handle.settings()
    info = info._replace(settings=settings)
    is_first, grows = is_empty(cache), is_growing(cache)
    past = 0 if cache is None or is_first else cache.get_seq_length()
    earlier = deferring_layer(cache, schedule.layers[0])
    is_named = info.prompt_length is not None
    shortest = min(own.min_prompt for own in settings.schedules)
    call = classify_call(
        is_first=is_first,
        is_enabled=settings.is_enabled,
        is_long=width - info.keep_last >= shortest,
        is_last=info.prompt_length is None or not (is_first or grows) or past + width >= info.prompt_length,
        is_named_prompt=is_named,
        may_continue=schedule.budget == "block" and handle.later_turns and not handle.evict_earlier_kv and grows,
        has_deferred=earlier is not None,
        has_left_out=earlier is not None and earlier.deferred is not None and earlier.deferred.is_left_out,
        is_pruned=not is_first and any(stage_of(cache, i) for i in range(num_layers)),
    )
    if not call.prunes and (is_first or is_named) and not torch.compiler.is_compiling():
        if not is_first:
            if settings.is_enabled:
                check_is_turn(handle, cache)
            handle.note(_why_only_added(handle, settings.is_enabled, width))
        elif settings.is_enabled:
            tokens = width - info.keep_last
            handle.note(f"a prompt of {tokens} tokens is shorter than min_prompt={shortest}: not pruned")
        else:
            handle.note("every keep ratio is 1.0, or the request not enabled: nothing to prune")
    return call, info


def run(
    decoder: Any,
    handle: SdtpHandle,
    call: Call,
    info: CallInfo,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    inputs_embeds: torch.Tensor | None,
    use_cache: bool | None,
    kwargs: dict[str, Any],
) -> BaseModelOutputWithPast | tuple[Any, ...]:
    """A call that prunes, or that adds tokens to a pruned prompt."""
    config, schedule = decoder.config, handle.schedule
    check_inputs(decoder, handle, info, input_ids, attention_mask, position_ids, cache, inputs_embeds, kwargs)
    is_first, earlier = is_empty(cache), deferring_layer(cache, schedule.layers[0])
    if call.prunes:
        check_chunks(handle, is_chunk=call is Call.CHUNK, is_later=earlier is not None)
        if call is Call.CHUNK:
            check_takes_chunks(cache)
    return_dict = kwargs.pop("return_dict", config.return_dict)
    use_cache = config.use_cache if use_cache is None else use_cache
    if decoder.training and torch.is_grad_enabled() and getattr(decoder.layers[0], "gradient_checkpointing", False):
        use_cache, cache = False, None  # as transformers does: a layer that is computed again would cache twice
    if inputs_embeds is None:
        inputs_embeds = decoder.embed_tokens(input_ids)
    width = inputs_embeds.shape[1]
    if use_cache and cache is None:
        cache = DynamicCache(config=config)
    past = 0 if cache is None or is_first else cache.get_seq_length()
    if position_ids is None:
        position_ids = (torch.arange(width, device=inputs_embeds.device) + past).unsqueeze(0)

    dense_mask = create_causal_mask(
        config, inputs_embeds, attention_mask, as_it_is(config, cache), position_ids=position_ids
    )
    # transformers has just looked whether the batch is padded; where it found none, neither mask is needed.
    padding_mask = attention_mask.bool() if attention_mask is not None and dense_mask is not None else None
    if is_first and padding_mask is not None and info.keep_last:
        # Completions may end in padding: it follows all tokens, so none sees it, and the prompt is padded on the left.
        padding_mask = torch.nn.functional.pad(padding_mask[:, : -info.keep_last], (0, info.keep_last), value=True)
    # Of a prompt, or of what may become a part of one; nobody asks for that of others.
    index = token_index(padding_mask if is_growing(cache) or is_first else None, past, inputs_embeds)
    hidden_states, mask = inputs_embeds, Mask(dense_mask, {})
    if is_first and padding_mask is not None:
        mask = prompt_mask(config, hidden_states, padding_mask, cache, 0)
    segment = Segment(0, mask, decoder.rotary_emb(hidden_states, position_ids), position_ids, index)
    prefill, completed, recorder = None, None, None
    if call.prunes:
        assert info.settings is not None
        is_padded = padding_mask is not None
        if earlier is not None:
            is_padded = is_chunk_padded(decoder, inputs_embeds, attention_mask, earlier)
        elif padding_mask is not None:
            assert_left_padded(padding_mask, call is Call.PROMPT)
        is_ragged = is_padded or info.settings.is_ragged or (earlier is not None and earlier.is_ragged)
        chunk = Chunk(past + width, info.keep_last, is_padded, is_ragged, call is not Call.CHUNK)
        groups = info.settings.groups(inputs_embeds.shape[0], handle.current.rows_per_setting)
        if info.settings.protected is not None:
            info.settings.protected.check(info.prompt_length or past + width)
        completed = None
        if handle.kv_predictor is not None:
            completed = CompletedCache(handle.kv_predictor, cache, handle.backend, handle.attends_by_position)
        prompt = None
        if call is Call.PROMPT:
            prompt = _prompt_tokens(handle, input_ids, index, info.keep_last, is_padded)
        prefill = Prefill(decoder, handle, cache, chunk, groups, info.settings.protected, earlier, completed, prompt)
        is_captured = inputs_embeds.is_cuda and torch.cuda.is_current_stream_capturing()
        if not (torch.compiler.is_compiling() or is_captured):  # a graph has no clock
            recorder = PrefillRecorder(handle.backend, inputs_embeds, "none" if completed is None else "predicted")

    counts, deferred, below, queries = Counts(), None, None, None
    for i, layer in enumerate(decoder.layers[: config.num_hidden_layers]):
        if prefill is not None:
            arrived, tokens_in, begin, end, indices = segment, hidden_states.shape[1], None, None, None
            if i in schedule.layers:
                stage = schedule.layers.index(i) + 1
                if stage == 1:
                    hidden_states, segment, counts, deferred = join(prefill, hidden_states, segment)
                    if completed is not None:
                        completed.begin(segment.token_index)
                if any(own.drops(stage) for _, own in prefill.groups):
                    begin = recorder.now() if recorder else None
                    hidden_states, segment, indices = prune(prefill, counts, i, hidden_states, segment, below)
                    end = recorder.now() if recorder else None
                if segment.token_index is not arrived.token_index:  # other tokens than in the layer below
                    segment = segment._replace(stage=stage, position_ids=None)
            arriving = segment.token_index if completed is None or segment.stage == 0 else completed.token_index
            held = hold(prefill, counts, deferred, i, segment.stage, arriving)
            if handle.evict_earlier_kv and indices is not None and held is not None and cache is not None:
                evict(cache, i, held, indices, handle.backend)
            if segment.token_index is not arrived.token_index:  # after the above: a static layer has its size now
                written = arriving if held is None else held.kept
                padding = written >= 0 if prefill.chunk.is_ragged else None
                if completed is not None and not completed.is_complete:
                    mask = completed.mask(config, hidden_states, segment.token_index, written, prefill.chunk.is_ragged)
                else:
                    of_segment = prompt_mask if earlier is None or cache is None else cached_mask
                    mask = of_segment(config, hidden_states, padding, cache, i)
                segment = segment._replace(mask=mask)
            if recorder:
                recorder.layer(tokens_in, hidden_states.shape[1], begin, end)
            if hidden_states.shape[1] == 0:  # all of it is deferred
                break
            below = Below.of(prefill, i, hidden_states)
            queries = None if below is None else below.queries
        elif stage_of(cache, i) != segment.stage:
            assert cache is not None
            if earlier is not None and i == schedule.layers[0]:
                append_deferred(earlier, hidden_states, segment, padding_mask is not None)
            segment = appended_segment(
                decoder, i, hidden_states, segment, attention_mask, padding_mask is not None, cache
            )
        try:
            hidden_states = layer(
                hidden_states,
                attention_mask=segment.mask.attention_mask,
                position_embeddings=segment.position_embeddings,
                position_ids=segment.position_ids,
                use_cache=use_cache,
                **{compat.CACHE: cache if completed is None or completed.is_complete else completed},
                **segment.mask.kwargs,
                **kwargs,
            )
        finally:
            if queries is not None:
                queries.remove()
    if call.prunes and cache is not None and cache.layers and not torch.compiler.is_compiling():
        tell_others(cache)
    if recorder:
        recorder.finish(cache, segment.token_index)
        handle.record(recorder)
    output = compat.output(decoder.norm(hidden_states), cache if use_cache else None)
    return output if return_dict else output.to_tuple()


def _prompt_tokens(
    handle: SdtpHandle, input_ids: torch.Tensor | None, index: torch.Tensor, keep_last: int, is_padded: bool
) -> PromptTokens | None:
    """The words of a prompt that is read whole, ready where a pruner looks at them."""
    is_lexical = any(scorer.is_lexical for scorer in handle.scorers.values())
    if input_ids is None:
        if is_lexical and not torch.compiler.is_compiling():
            handle.warn_once(
                "the prompt came as inputs_embeds, which have no words: scores are without their lexical term; pass "
                "input_ids to have it"
            )
        return None
    end = input_ids.shape[1] - keep_last
    prompt = PromptTokens(input_ids[:, :end], index[:, :end] >= 0 if is_padded else None)
    if is_lexical:
        prompt.overlap_by_distance(input_ids.device)  # before the layers, and so in no stage
    return prompt


def _why_only_added(handle: SdtpHandle, is_enabled: bool, tokens: int) -> str:
    """What the report says of a prompt that continues a cache and is not pruned."""
    added = f"{tokens} tokens added to a cache, none of them pruned: "
    if not is_enabled:
        return added + "every keep ratio is 1.0, or the request not enabled"
    if handle.schedule.budget == "global":
        return added + (
            "the global budget ranks one prompt at once. This is not what one prompt with all the tokens would give; "
            'under PruningSchedule(budget="block") it is'
        )
    return added + (
        "later turns are pruned where the cache began pruned, is a DynamicCache that is not offloaded, and apply_sdtp "
        "was called with later_turns=True and evict_earlier_kv=False"
    )
