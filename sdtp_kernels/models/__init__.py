"""The model patch and its public functions; CONTRIBUTING.md says which file knows what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .handle import SdtpHandle
from .report import PrefillReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..kv_predictor import KVPredictor
    from ..schedule import PruningSchedule
    from ..scorers import StageInput

__all__ = ["PrefillReport", "SdtpHandle", "apply_sdtp", "remove_sdtp"]


def apply_sdtp(
    model: Any,
    pruners: Mapping[int, Any] | str | Callable[[StageInput], Any],
    schedule: PruningSchedule | float | None = None,
    backend: str = "auto",
    *,
    later_turns: bool = True,
    evict_earlier_kv: bool = False,
    dropped_kv: Literal["none", "predicted"] | None = None,
    kv_predictor: KVPredictor | None = None,
) -> SdtpHandle:
    """Make a model prune long prompts during prefill.

    Acts on this instance only: its class and its decoder's become subclasses that prune. ``generate()`` and plain calls
    go on working. Prompts shorter than ``schedule.min_prompt`` are left alone. With a keep ratio of 1.0 the model
    computes the same as without the patch, bit for bit. ``generate()`` and calls of the model take the settings of
    :meth:`SdtpHandle.request` as keywords.

    A call with ``logits_to_keep=k`` treats the last ``k - 1`` tokens as tokens after the prompt: they are never pruned.
    A call without it returns the logits of the kept tokens only, and warns once: ``report().kept`` says which tokens
    they belong to.

    Under the block budget a prompt may come in chunks: ``generate(prefill_chunk_size=...)``, later turns of a chat, a
    kept prefix and what follows it. The cache is the same as after one call with the whole prompt. A call of the model
    itself reads a chunk if it says how many columns the whole prompt has: ``sdtp_prompt_length=columns``. Without that,
    a call that continues a cache adds tokens and prunes none.

    Under the global budget a later turn is added and not pruned. ``generate()`` refuses what directly follows a pruned
    prompt, because that is not one prompt with all the tokens; `later_turns` False allows it.

    Parameters
    ----------
    model : transformers model
        ``ForCausalLM`` or ``Model`` of Llama, Mistral, Qwen2 or Qwen3, with sdpa, eager, flex or flash attention; on
        one device, by an accelerate ``device_map``, or tensor parallel. The decoder of a ``ForCausalLM`` may be passed
        as well; both are patched.
    pruners : mapping of int to module, str or callable
        For every layer of the schedule a :class:`TokenPruner`, or any module that turns hidden states ``[..., D]``
        into scores ``[...]``; the result of :func:`load_pruners`; the name of a training-free scorer (``"random"``,
        ``"recent"``, ``"norm"``, ``"attention"``, ``"lexical"``, ``"question"``); or a function of a
        :class:`~sdtp_kernels.scorers.StageInput`. Under the block budget a :class:`TokenPruner` scores by its MLP
        alone, and a function prunes prompts in chunks only if it is declared
        :func:`~sdtp_kernels.scorers.block_local`.
    schedule : PruningSchedule or float, optional
        A number is the keep ratio of every stage, at the pruners' layers or in the paper's pattern for this model. By
        default the schedule in the pruner file's header, else 0.9.
    backend : str, default "auto"
        A name from :func:`explain_backends`; a name never falls back to another backend.
    later_turns : bool, default True
        Under the block budget, whether a prompt that continues a cache (a later turn of a chat, what follows a kept
        prefix) is pruned as it completes blocks. Generated tokens are deferred to the next prompt. False: all that
        follows the first prompt is added whole, under either budget.
    evict_earlier_kv : bool, default False
        Drop what a stage prunes from the caches of the layers below it as well. All layers then hold the tokens that
        the last stage keeps; later tokens see nothing else in any layer. A prompt has to be prefilled in one call, and
        later turns are not pruned.
    dropped_kv : {"none", "predicted"}, optional
        What later layers keep of a dropped token. ``"none"``, as in the paper: nothing. ``"predicted"``: a key and a
        value in each layer, by a linear map of the hidden state that it was dropped with. Predicted loses less at the
        same keep ratio, takes longer, and gives up the memory that dropping saves: all layers of the cache have the
        prompt's length. It needs sdpa or eager attention. By default predicted where there is a predictor; the report
        says which.
    kv_predictor : KVPredictor, optional
        The maps; by default those in the pruner file. Needed for scorers by name.

    Returns
    -------
    SdtpHandle
        Undoes the patch (``remove()``, or at the end of a ``with`` block) and reports on the last prefill.

    Raises
    ------
    ValueError
        If pruners, schedule and model do not fit together, a weight is not finite, or no backend has that name.
    NotImplementedError
        If the model's family, attention or version of transformers is not supported, or `model` is a wrapper.
    BackendUnavailableError
        If the named backend cannot run on the model's device.
    RuntimeError
        If the model is patched already.

    Examples
    --------
    >>> handle = apply_sdtp(model, "attention", 0.9)
    >>> output = model.generate(prompt, max_new_tokens=2, do_sample=False)
    >>> handle.report().tokens, handle.report().kept_per_stage
    (120, [108, 98])
    >>> handle.remove()
    """
    from .patch import apply  # transformers is imported where it is used

    return apply(model, pruners, schedule, backend, later_turns, evict_earlier_kv, dropped_kv, kv_predictor)


def remove_sdtp(model: Any) -> None:
    """Undo :func:`apply_sdtp` without its handle: the handle was lost, or the model is a copy of a patched one.

    Parameters
    ----------
    model : transformers model
        The patched one; one that is not is left alone.

    Examples
    --------
    >>> _ = apply_sdtp(model, "recent", 0.8)
    >>> remove_sdtp(model)
    """
    for module in model.modules():
        handle = module.__dict__.get("_sdtp")
        if handle is not None:
            handle.remove()
