"""What cannot be right is refused: when the patch is applied, and in every call that would prune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .cache import check_supported, is_growing, pruned_layer
from .masks import ATTENTIONS, POSITION_ATTENTIONS

if TYPE_CHECKING:
    from ..kv_predictor import KVPredictor
    from ..schedule import PruningSchedule
    from .call import CallInfo
    from .handle import SdtpHandle


def check_model(model: Any, config: Any, is_predicted: bool) -> None:
    """Refuse what no call of this model could do right."""
    if getattr(model, "_pp_stage", None) is not None:
        raise NotImplementedError(
            "pipeline parallelism: the next stage would take the pruned prompt for a whole one. Use one device"
        )
    _check_attention(config, is_predicted)


def _check_attention(config: Any, is_predicted: bool) -> None:
    attention = config._attn_implementation
    if is_predicted and attention not in POSITION_ATTENTIONS:
        raise NotImplementedError(
            f"dropped_kv='predicted' with attn_implementation={attention!r}: queries of kept tokens over the keys of "
            f"all need {' or '.join(POSITION_ATTENTIONS)}; load the model with one of them, or pass dropped_kv='none'"
        )
    if attention not in ATTENTIONS:
        raise NotImplementedError(
            f"attn_implementation={attention!r}: supported are {', '.join(ATTENTIONS)}; load the model with one of "
            "them, or go back by model.set_attn_implementation"
        )


def check_predicted(kv_predictor: KVPredictor, config: Any, schedule: PruningSchedule, evict_earlier_kv: bool) -> None:
    """Refuse predicted keys and values where they do not fit, or would be lost again."""
    kv_predictor.check(config, schedule)
    if evict_earlier_kv:
        raise NotImplementedError(
            "evict_earlier_kv=True drops from memory what dropped_kv='predicted' keeps there: pass one of them. A "
            "cache press gives memory back on top of predicted keys and values"
        )


def check_layers(schedule: PruningSchedule, config: Any) -> None:
    number = config.num_hidden_layers
    if schedule.layers[-1] >= number:
        fits = f"; PruningSchedule.every({number}) fits" if number > 4 else ""
        raise ValueError(
            f"the schedule prunes at layer {schedule.layers[-1]}, the model has layers 0 to {number - 1}{fits}"
        )


def check_chunks(handle: SdtpHandle, is_chunk: bool, is_later: bool) -> None:
    """Refuse a chunk of a prompt, more of which is to come or was there, where chunks would not make up the whole."""
    if is_chunk and handle.schedule.budget != "block":
        raise NotImplementedError(
            "prefill_chunk_size: the global budget ranks the whole prompt at once. Prefill in one call "
            '(prefill_chunk_size=None), or use PruningSchedule(budget="block"), where every chunk size gives the same'
        )
    if is_chunk and handle.evict_earlier_kv:
        raise NotImplementedError(
            "prefill_chunk_size with evict_earlier_kv=True: later chunks would miss what earlier ones evict. Prefill "
            "in one call (prefill_chunk_size=None), or leave evict_earlier_kv out"
        )
    if not (is_chunk or is_later):
        return
    for layer, scorer in handle.scorers.items():
        if not scorer.is_block_local:
            raise NotImplementedError(
                f"{scorer.name} (layer {layer}) looks past its block: a prompt in chunks would not be pruned like the "
                "whole. Prefill in one call and apply_sdtp(..., later_turns=False), or mark a scorer that looks at "
                "nothing after the block with @block_local"
            )


def check_is_turn(handle: SdtpHandle, cache: Any) -> None:
    """Refuse what follows a kept prefix under the global budget, unless the caller said that nothing later is pruned.

    A turn of a chat follows an answer; what directly follows a pruned prompt would belong to it.
    """
    layer = pruned_layer(cache, handle.schedule.layers[0])
    if handle.schedule.budget != "block" and handle.later_turns and layer is not None and layer.num_appended == 0:
        raise NotImplementedError(
            "this cache holds a pruned prompt and nothing after it: what follows such a prefix would not be pruned as "
            "one prompt with all the tokens, which the global budget ranks at once. Use "
            'PruningSchedule(budget="block"), where it is, or apply_sdtp(..., later_turns=False) '
            "to add all that follows unpruned"
        )


def check_takes_chunks(cache: Any) -> None:
    """Refuse a chunk of a prompt where what is deferred could not be taken out of the cache again."""
    if not is_growing(cache):
        raise NotImplementedError(
            "prefill_chunk_size: a pruned prompt in chunks needs a DynamicCache that is not offloaded. Prefill in one "
            "call (prefill_chunk_size=None), or leave out cache and cache_implementation"
        )


def check_inputs(
    decoder: Any,
    handle: SdtpHandle,
    info: CallInfo,
    input_ids: torch.Tensor | None,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Any,
    inputs_embeds: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuse a call that prunes, or that meets a pruned cache, where it could not be right."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    _check_attention(decoder.config, handle.kv_predictor is not None)
    if info.reads_loss:
        raise NotImplementedError(
            "labels: a loss over pruned logits would be wrong. Score a continuation with logits_to_keep=k, which is "
            "never pruned, or remove() the patch"
        )
    if info.reads_index:
        raise NotImplementedError("logits_to_keep as indices does not survive pruning: pass a count of last tokens")
    if cache is not None:
        check_supported(cache)
        _check_schedule(handle, cache)
    if handle.evict_earlier_kv and not is_growing(cache):
        raise NotImplementedError(
            "evict_earlier_kv=True needs a DynamicCache that is not offloaded: pass one, or leave evict_earlier_kv out"
        )
    if attention_mask is not None and getattr(attention_mask, "ndim", None) != 2:
        raise NotImplementedError(
            "a prebuilt attention mask cannot follow the tokens that are kept: pass the [batch, tokens] padding mask"
        )
    is_generating = info.prompt_length is not None or handle.current.prompt_columns is not None
    if position_ids is not None and attention_mask is None and cache is None and not is_generating:
        raise NotImplementedError(
            "position_ids without attention_mask and cache may mean packed sequences, which are not supported: pass an "
            "attention_mask (of ones) as well"
        )
    if kwargs.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(
            "cu_seq_lens_q: packed sequences are not supported; pass the sequences as a left-padded batch"
        )
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name, getattr(decoder.config, name, False)):
            raise NotImplementedError(
                f"{name}: pruned layers have different lengths. Leave it out, or remove() the patch for this call"
            )


def _check_schedule(handle: SdtpHandle, cache: Any) -> None:
    layer = pruned_layer(cache, handle.schedule.layers[-1])
    if layer is None or layer.kept.shape[1] == 0 or layer.schedule is handle.schedule:
        return
    if layer.schedule != handle.schedule:
        raise ValueError(
            f"this cache holds a prompt pruned by {layer.schedule}, and the model is patched with {handle.schedule}: "
            "go on with the schedule that the cache began with, or prefill the prompt again"
        )


def assert_left_padded(padding_mask: torch.Tensor, is_last: bool) -> None:
    # An assertion on the device: reading the mask here would make the host wait for a GPU.
    mask = padding_mask.bool()
    is_left_padded = (mask[:, 1:] >= mask[:, :-1]).all()
    if is_last:  # a row may begin in a later chunk
        is_left_padded = is_left_padded & mask[:, -1].all()
    torch._assert_async(
        is_left_padded,
        "SDTP needs left padding: the attention_mask of the prompt has a zero after a one, or a row of zeros. Set "
        "tokenizer.padding_side='left', and leave out empty prompts",
    )
