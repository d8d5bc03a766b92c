"""What cannot be right is refused: when the patch is applied, and in every call that would prune."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers import Qwen2ForCausalLM, Qwen2Model

from .attention import ATTENTIONS
from .cache import check_supported, is_growing, pruned_layer
from .devices import own_forward

if TYPE_CHECKING:
    from ..schedule import PruningSchedule
    from .stages import Pruning

TRANSFORMERS = (Version("5.24"), Version("5.25"))  # from, before: the range the tests run on

# How the outer model's hook tells the decoder about tokens that must survive; travels in its keyword arguments.
KEEP_LAST = "sdtp_keep_last"
# How a call says that it reads a prompt, or a piece of it, and how many columns the prompt has.
PROMPT_LENGTH = "sdtp_prompt_length"


def decoder_of(model: Any) -> Qwen2Model:
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
    if own_forward(decoder) is not None:
        raise RuntimeError(
            "the decoder's forward is replaced already, by apply_sdtp (call handle.remove() first) or by another tool"
        )
    if getattr(model, "_pp_stage", None) is not None:
        raise NotImplementedError(
            "pipeline parallelism: the next stage would take the pruned prompt for a whole one. Use one device"
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


def check_layers(schedule: PruningSchedule, config: Any) -> None:
    if schedule.layers[-1] >= config.num_hidden_layers:
        raise ValueError(
            f"the schedule prunes at layer {schedule.layers[-1]}, the model has layers 0 to "
            f"{config.num_hidden_layers - 1}; PruningSchedule.every({config.num_hidden_layers}) fits"
        )


def check_call(model: Qwen2ForCausalLM, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
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
        kwargs = {**kwargs, KEEP_LAST: logits_to_keep - 1}
    return args, kwargs


def check_pieces(pruning: Pruning, is_chunk: bool, is_later: bool) -> None:
    """Refuse a piece of a prompt, more of which is to come or was there, where pieces would not make up the whole."""
    if is_chunk and pruning.schedule.budget != "block":
        raise NotImplementedError(
            "prefill_chunk_size: the global budget ranks the whole prompt at once. Prefill in one piece "
            '(prefill_chunk_size=None), or use PruningSchedule(budget="block"), where every chunk size gives the same'
        )
    if is_chunk and pruning.evict_earlier_kv:
        raise NotImplementedError(
            "prefill_chunk_size with evict_earlier_kv=True: later chunks would miss what earlier ones evict. Prefill "
            "in one piece (prefill_chunk_size=None), or leave evict_earlier_kv out"
        )
    if not (is_chunk or is_later):
        return
    for layer, scorer in pruning.scorers.items():
        if not scorer.is_block_local:
            raise NotImplementedError(
                f"{scorer.name} (layer {layer}) looks past its block: a prompt in pieces would not be pruned like the "
                "whole. Prefill in one piece and apply_sdtp(..., later_turns=False), or mark a scorer that looks at "
                "nothing behind the block with @block_local"
            )


def check_is_turn(pruning: Pruning, cache: Any) -> None:
    """Refuse what follows a kept prefix under the global budget, unless the caller said that nothing later is pruned.

    A turn of a chat stands behind an answer; what stands directly behind a pruned prompt would belong to it.
    """
    layer = pruned_layer(cache, pruning.schedule.layers[0])
    if pruning.schedule.budget != "block" and pruning.later_turns and layer is not None and layer.num_appended == 0:
        raise NotImplementedError(
            "this cache holds a pruned prompt and nothing behind it: what follows such a prefix would not be pruned as "
            "one prompt with all the tokens, which the global budget ranks at once. Use "
            'PruningSchedule(budget="block"), where it is, or apply_sdtp(..., later_turns=False) '
            "to add all that follows unpruned"
        )


def check_takes_pieces(cache: Any) -> None:
    """Refuse a chunk of a prompt where what waits could not be taken out of the cache again."""
    if not is_growing(cache):
        raise NotImplementedError(
            "prefill_chunk_size: a pruned prompt in pieces needs a DynamicCache that is not offloaded. Prefill in one "
            "piece (prefill_chunk_size=None), or leave out cache and cache_implementation"
        )


def check_inputs(
    decoder: Qwen2Model,
    pruning: Pruning,
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
    if pruning.evict_earlier_kv and not is_growing(cache):
        raise NotImplementedError(
            "evict_earlier_kv=True needs a DynamicCache that is not offloaded: pass one, or leave evict_earlier_kv out"
        )
    if attention_mask is not None and getattr(attention_mask, "ndim", None) != 2:
        raise NotImplementedError(
            "a prebuilt attention mask cannot follow the tokens that are kept: pass the [batch, tokens] padding mask"
        )
    if position_ids is not None and attention_mask is None and cache is None:
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


def assert_left_padded(padding_mask: torch.Tensor, is_last: bool) -> None:
    # An assertion on the device: reading the mask here would make the host wait for a GPU.
    mask = padding_mask.bool()
    is_left_padded = (mask[:, 1:] >= mask[:, :-1]).all()
    if is_last:  # a row may begin in a later chunk
        is_left_padded = is_left_padded & mask[:, -1].all()
    torch._assert_async(
        is_left_padded,
        "SDTP needs left padding: attention_mask has a zero behind a one. Set tokenizer.padding_side='left'",
    )
